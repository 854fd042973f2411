/* Grouped GEMM engines against a float64 reference. Every case: NaN in rows of nobody, poisoned outputs, tails untouched,
 * two runs bit-identical, then a replay of a captured graph with other splits. Prints one line per case and exits 1 if any
 * failed. Usage: gemm_test [engine [first case [last case]]] */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <vector>

extern "C" {
#include "kernels/gemm/engine.h"
}
#include "tests/gpu/gemm/check.cuh"
#include "tests/gpu/gemm/compare.cuh"
#include "tests/gpu/gemm/reference.cuh"

enum split_kind { EVEN, LAST_ZERO, RANDOM, HOT, PRIMES, ONES, ALL_ZERO, STEPS };

struct test_case {
    enum epd_gemm_layout layout;
    enum epd_dtype dtype, dtype_c, dtype_bias;
    uint32_t groups, rows_per_group, k, n;
    enum split_kind splits;
    uint32_t alignment; /* 1 = packed without offsets */
    int parts, accumulate, row_weights;
    enum epd_activation activation; /* NN: the product and the activation's backward */
    int keep_preact;                /* NN: d_preact takes the place of preact */
};

static int is_backward(const struct test_case *test)
{
    return test->activation && test->layout == EPD_GEMM_NN;
}

struct layout_rows {
    std::vector<int64_t> rows, first;
    std::vector<int> group_of_row;
};

static int64_t split_of(const struct test_case *test, uint32_t group, uint32_t turn)
{
    static const int primes[] = {2, 3, 5, 7, 11, 13, 17, 19, 23, 31, 61, 127, 131, 251, 257, 509};
    int64_t mean = test->rows_per_group;
    uint32_t h = (group * 7919 + turn * 104729 + 12345) * 2654435761u >> 8;
    switch (test->splits) {
    case EVEN:
        return turn ? (mean > (int64_t)(h % 5) ? mean - h % 5 : 0) : mean;
    case LAST_ZERO:
        return group + 1 == test->groups ? 0 : turn ? mean / 2 : mean;
    case RANDOM:
        return h % 4 == 0 ? 0 : h % (2 * mean);
    case HOT:
        return group == (turn ? 0 : test->groups / 2) ? mean * test->groups : 0;
    case PRIMES:
        return primes[(group + turn) % 16];
    case ONES:
        return 1;
    case ALL_ZERO:
        return turn ? 3 : 0;
    case STEPS:
        return (int64_t)mean * (group + 1);
    }
    return 0;
}

static struct layout_rows lay_out(const struct test_case *test, uint32_t turn, int64_t max_rows)
{
    struct layout_rows out;
    out.group_of_row.assign(max_rows, -1);
    int64_t next = 0;
    for (uint32_t group = 0; group < test->groups; group++) {
        int64_t rows = split_of(test, group, turn);
        if (next + rows > max_rows)
            rows = max_rows - next;
        out.first.push_back(next);
        out.rows.push_back(rows);
        for (int64_t i = 0; i < rows; i++)
            out.group_of_row[next + i] = group;
        next += (rows + test->alignment - 1) / test->alignment * test->alignment;
        if (next > max_rows)
            next = max_rows;
    }
    out.first.push_back(next);
    return out;
}

struct buffers {
    size_t n_a, n_b, n_c, n_act;
    void *a, *b, *c, *c_again, *bias, *dbias, *act, *prefill, *preact;
    float *row_weights, *d_row_weights;
    const void **parts;
    void **c_parts;
    int64_t *splits, *offsets;
    int *group_of_row;
    double *reference;
    struct kernel_error *error;
};

static void *device(size_t bytes)
{
    void *memory = NULL;
    CHECK(cudaMalloc(&memory, bytes ? bytes : 16));
    return memory;
}

static struct buffers make_buffers(const struct test_case *test, int64_t max_rows)
{
    struct buffers out = {};
    size_t weights = (size_t)test->groups * test->n * test->k;
    int nt = test->layout == EPD_GEMM_NT, tn = test->layout == EPD_GEMM_TN;
    out.n_a = (size_t)max_rows * (tn ? test->k : test->n);
    out.n_b = nt ? (size_t)max_rows * test->k : weights;
    out.n_c = nt ? weights : (size_t)max_rows * (tn ? test->n : is_backward(test) ? 2 * test->k : test->k);
    out.n_act = test->activation ? (size_t)max_rows * (tn ? test->n / 2 : test->k) : 0;
    out.a = device(out.n_a * 2);
    out.b = device(out.n_b * 2);
    out.c = device(out.n_c * 4);
    out.prefill = device(out.n_c * 4);
    out.c_again = device(out.n_c * 4);
    out.bias = device((size_t)test->groups * test->n * 4);
    out.dbias = device((size_t)test->groups * test->n * 4);
    out.act = device(out.n_act * 2);
    out.preact = device(out.n_c * 2);
    out.row_weights = (float *)device(max_rows * 4);
    out.d_row_weights = (float *)device(max_rows * 4);
    out.parts = (const void **)device(test->groups * sizeof(void *));
    out.c_parts = (void **)device(test->groups * sizeof(void *));
    out.splits = (int64_t *)device(test->groups * 8);
    out.offsets = (int64_t *)device((test->groups + 1) * 8);
    out.group_of_row = (int *)device(max_rows * 4);
    out.reference = (double *)device(((nt ? out.n_c : out.n_c) + (size_t)test->groups * test->n) * 8);
    out.error = (struct kernel_error *)device(sizeof(struct kernel_error));
    std::vector<const void *> parts;
    std::vector<void *> c_parts;
    for (uint32_t group = 0; group < test->groups; group++) {
        parts.push_back((char *)out.b + (size_t)group * test->n * test->k * 2);
        c_parts.push_back((char *)out.c + (size_t)group * test->n * test->k * out_bytes(test->dtype_c));
    }
    CHECK(cudaMemcpy(out.parts, parts.data(), parts.size() * 8, cudaMemcpyHostToDevice));
    CHECK(cudaMemcpy(out.c_parts, c_parts.data(), parts.size() * 8, cudaMemcpyHostToDevice));
    float scale = 1.0f / sqrtf(nt ? test->rows_per_group : tn ? test->k : test->n);
    fill_random<<<1024, 256>>>(out.a, test->dtype, out.n_a, 1, 1.0f);
    fill_random<<<1024, 256>>>(out.b, test->dtype, out.n_b, 2, scale);
    fill_random<<<1024, 256>>>(out.row_weights, EPD_F32, max_rows, 3, 1.0f);
    fill_random<<<1024, 256>>>(out.prefill, test->dtype_c, out.n_c, 4, 1.0f);
    if (test->dtype_bias)
        fill_random<<<64, 256>>>(out.bias, test->dtype_bias, (size_t)test->groups * test->n, 5, 1.0f);
    CHECK(cudaMemset(out.error, 0, sizeof(struct kernel_error)));
    CHECK(cudaDeviceSynchronize());
    return out;
}

static void free_buffers(struct buffers *b)
{
    void *all[] = {b->a,       b->b,       b->c,       b->c_again,      b->bias,          b->dbias,
                   b->act,     b->prefill, b->preact,  b->row_weights,  b->d_row_weights, b->parts,
                   b->c_parts, b->splits,  b->offsets, b->group_of_row, b->reference,     b->error};
    for (void *memory : all)
        CHECK(cudaFree(memory));
}

static void set_splits(const struct buffers *b, const struct layout_rows *rows, size_t columns,
                       enum epd_dtype dtype, const struct test_case *test)
{
    CHECK(cudaMemcpy(b->splits, rows->rows.data(), rows->rows.size() * 8, cudaMemcpyHostToDevice));
    CHECK(cudaMemcpy(b->offsets, rows->first.data(), rows->first.size() * 8, cudaMemcpyHostToDevice));
    CHECK(cudaMemcpy(b->group_of_row, rows->group_of_row.data(), rows->group_of_row.size() * 4,
                     cudaMemcpyHostToDevice));
    int64_t max_rows = rows->group_of_row.size();
    float scale = 1.0f / sqrtf(test->rows_per_group);
    fill_random<<<1024, 256>>>(b->a, dtype, b->n_a, 1, 1.0f);
    poison_rows<<<1024, 256>>>((uint16_t *)b->a, columns, b->group_of_row, max_rows);
    if (is_backward(test)) {
        fill_random<<<1024, 256>>>(b->preact, dtype, b->n_c, 6, 2.0f);
        poison_rows<<<1024, 256>>>((uint16_t *)b->preact, 2 * test->k, b->group_of_row, max_rows);
    }
    if (test->layout == EPD_GEMM_NT) {
        fill_random<<<1024, 256>>>(b->b, dtype, b->n_b, 2, scale);
        poison_rows<<<1024, 256>>>((uint16_t *)b->b, test->k, b->group_of_row, max_rows);
    }
    CHECK(cudaDeviceSynchronize());
}

static void reset_outputs(const struct test_case *test, const struct buffers *b)
{
    size_t bytes = b->n_c * out_bytes(test->dtype_c);
    if (test->accumulate)
        CHECK(cudaMemcpy(b->c, b->prefill, bytes, cudaMemcpyDeviceToDevice));
    else if (is_backward(test) && test->keep_preact)
        CHECK(cudaMemcpy(b->c, b->preact, bytes, cudaMemcpyDeviceToDevice));
    else
        CHECK(cudaMemset(b->c, 0xff, bytes));
    CHECK(cudaMemset(b->act, 0xff, b->n_act * 2));
    CHECK(cudaMemset(b->d_row_weights, 0xff,
                     (b->n_act ? b->n_act / (test->layout == EPD_GEMM_TN ? test->n / 2 : test->k) : 0) * 4));
    if (test->accumulate && test->dtype_bias)
        CHECK(cudaMemcpy(b->dbias, b->bias, (size_t)test->groups * test->n * out_bytes(test->dtype_bias),
                         cudaMemcpyDeviceToDevice));
    else
        CHECK(cudaMemset(b->dbias, 0xff, (size_t)test->groups * test->n * 4));
}

static std::vector<uint8_t> fetch(const void *memory, size_t bytes)
{
    std::vector<uint8_t> out(bytes);
    CHECK(cudaMemcpy(out.data(), memory, bytes, cudaMemcpyDeviceToHost));
    return out;
}

static std::vector<double> fetch_reference(const struct buffers *b, size_t n)
{
    std::vector<double> out(n);
    CHECK(cudaDeviceSynchronize());
    CHECK(cudaMemcpy(out.data(), b->reference, n * 8, cudaMemcpyDeviceToHost));
    return out;
}

/* want: d_act [max_rows, F]. In place, rows of nobody keep the NaN of the pre-activation, all bits set as well. */
static int check_backward(const struct test_case *test, const struct buffers *b,
                          const std::vector<double> &d_act, int64_t max_rows)
{
    size_t ffn = test->k;
    std::vector<uint8_t> preact = fetch(b->preact, b->n_c * 2);
    std::vector<float> weights(max_rows, 1.0f);
    if (test->row_weights)
        CHECK(cudaMemcpy(weights.data(), b->row_weights, max_rows * 4, cudaMemcpyDeviceToHost));
    std::vector<double> d_preact(b->n_c), act(b->n_act), sums(max_rows);
    for (int64_t row = 0; row < max_rows; row++) {
        double sum = 0.0;
        for (size_t f = 0; f < ffn; f++) {
            double gate = load_element(preact.data(), test->dtype, row * 2 * ffn + f), value, slope;
            double up = load_element(preact.data(), test->dtype, row * 2 * ffn + ffn + f),
                   d = d_act[row * ffn + f];
            gate_of(test->activation, gate, &value, &slope);
            d_preact[row * 2 * ffn + f] = weights[row] * d * up * slope;
            d_preact[row * 2 * ffn + ffn + f] = weights[row] * d * value;
            act[row * ffn + f] = isnan(d) ? d : weights[row] * value * up;
            sum += d * value * up;
        }
        sums[row] = sum;
    }
    struct difference d = compare(fetch(b->c, b->n_c * 2), test->dtype, d_preact);
    int failed = report("d_preact", &d);
    d = compare(fetch(b->act, b->n_act * 2), test->dtype, act);
    failed |= report("weighted act", &d);
    d = compare(fetch(b->d_row_weights, max_rows * 4), EPD_F32, sums);
    return failed | report("d_row_weights", &d);
}

static int check_rows(const struct test_case *test, const struct buffers *b, struct reference_args args)
{
    args.row_weights = test->row_weights && !test->activation ? b->row_weights : NULL;
    reference_rows<<<4096, 256>>>(args, b->reference);
    if (is_backward(test))
        return check_backward(test, b, fetch_reference(b, b->n_act), args.max_rows);
    std::vector<double> want = fetch_reference(b, b->n_c);
    std::vector<uint8_t> got = fetch(b->c, b->n_c * out_bytes(test->dtype_c));
    if (test->activation && !test->keep_preact) {
        for (uint8_t byte : got)
            if (byte != 0xff)
                return puts("    c written although it is not kept"), 1;
    } else {
        struct difference d = compare(got, test->dtype_c, want);
        if (report("c", &d))
            return 1;
    }
    if (!test->activation)
        return 0;
    std::vector<float> weights(args.max_rows);
    CHECK(cudaMemcpy(weights.data(), b->row_weights, weights.size() * 4, cudaMemcpyDeviceToHost));
    size_t ffn = test->n / 2;
    std::vector<double> act(b->n_act);
    for (size_t i = 0; i < act.size(); i++) {
        size_t row = i / ffn, f = i % ffn;
        act[i] = activate(test->activation, want[row * test->n + f], want[row * test->n + ffn + f]) *
                 (test->row_weights && !isnan(want[row * test->n + f]) ? weights[row] : 1.0);
    }
    struct difference d = compare(fetch(b->act, b->n_act * 2), test->dtype, act);
    return report("act", &d);
}

static int check_groups(const struct test_case *test, const struct buffers *b, struct reference_args args)
{
    reference_groups<<<4096, 256>>>(args, b->reference, 0);
    std::vector<double> want = fetch_reference(b, b->n_c);
    if (test->accumulate) {
        std::vector<uint8_t> old = fetch(b->prefill, b->n_c * out_bytes(test->dtype_c));
        for (size_t i = 0; i < want.size(); i++)
            want[i] += load_element(old.data(), test->dtype_c, i);
    }
    struct difference d = compare(fetch(b->c, b->n_c * out_bytes(test->dtype_c)), test->dtype_c, want);
    int failed = report("dw", &d);
    if (!test->dtype_bias)
        return failed;
    size_t n = (size_t)test->groups * test->n;
    reference_groups<<<1024, 256>>>(args, b->reference, 1);
    want = fetch_reference(b, n);
    if (test->accumulate) {
        std::vector<uint8_t> old = fetch(b->bias, n * out_bytes(test->dtype_bias));
        for (size_t i = 0; i < n; i++)
            want[i] += load_element(old.data(), test->dtype_bias, i);
    }
    d = compare(fetch(b->dbias, n * out_bytes(test->dtype_bias)), test->dtype_bias, want);
    return failed | report("dbias", &d);
}

static int check_outputs(const struct test_case *test, const struct buffers *b,
                         const struct gemm_problem *problem)
{
    struct reference_args args = {};
    args.shape = problem->shape;
    args.a = b->a;
    args.b = b->b;
    args.bias = test->dtype_bias && test->layout == EPD_GEMM_TN ? b->bias : NULL;
    args.group_of_row = b->group_of_row;
    args.first = b->offsets;
    args.rows = b->splits;
    args.max_rows = problem->max_rows;
    args.n_groups = test->groups;
    return test->layout == EPD_GEMM_NT ? check_groups(test, b, args) : check_rows(test, b, args);
}

static struct gemm_launch make_launch(const struct test_case *test, const struct buffers *b,
                                      const struct gemm_problem *problem)
{
    struct gemm_launch launch = {};
    launch.args.shape = problem->shape;
    launch.args.groups = {test->groups, b->splits, test->alignment > 1 ? b->offsets : NULL,
                          problem->max_rows};
    launch.args.a = b->a;
    launch.args.b = test->parts && test->layout != EPD_GEMM_NT ? NULL : b->b;
    launch.args.b_parts = test->parts && test->layout != EPD_GEMM_NT ? b->parts : NULL;
    launch.args.c = b->c;
    launch.args.c_parts = test->parts && test->layout == EPD_GEMM_NT ? b->c_parts : NULL;
    launch.args.bias = b->bias;
    launch.args.dbias = b->dbias;
    launch.args.error = b->error;
    launch.act = b->act;
    launch.row_weights = b->row_weights;
    launch.preact = is_backward(test) && test->keep_preact ? b->c : b->preact;
    launch.d_row_weights = b->d_row_weights;
    return launch;
}

static int run_once(const struct gemm_engine *engine, struct gemm_engine_plan *plan,
                    const struct gemm_launch *launch, cudaStream_t stream)
{
    struct epd_error error = {};
    if (engine->launch(plan, launch, stream, &error) != EPD_OK)
        return printf("    launch: %s\n", error.text), 1;
    return 0;
}

/* Two runs give the same bits. */
static int check_repeat(const struct test_case *test, const struct buffers *b,
                        const struct gemm_engine *engine, struct gemm_engine_plan *plan,
                        const struct gemm_launch *launch, cudaStream_t stream)
{
    size_t bytes = b->n_c * out_bytes(test->dtype_c);
    size_t sums_bytes = is_backward(test) ? b->n_act / test->k * 4 : 0;
    std::vector<uint8_t> first = fetch(b->c, bytes), first_act = fetch(b->act, b->n_act * 2);
    std::vector<uint8_t> first_sums = fetch(b->d_row_weights, sums_bytes);
    for (int i = 0; i < 3; i++) {
        reset_outputs(test, b);
        if (run_once(engine, plan, launch, stream))
            return 1;
        CHECK(cudaStreamSynchronize(stream));
        if (first != fetch(b->c, bytes) || first_act != fetch(b->act, b->n_act * 2) ||
            first_sums != fetch(b->d_row_weights, sums_bytes))
            return puts("    a second run gave other bits"), 1;
    }
    return 0;
}

static int run_case(const struct gemm_engine *engine, const struct test_case *test)
{
    int64_t max_rows =
        (int64_t)test->groups * (test->rows_per_group * (test->splits == STEPS ? test->groups : 2)) + 80;
    struct gemm_problem problem = {};
    problem.shape = {test->layout, test->dtype, test->dtype_c,   test->dtype_bias,
                     test->n,      test->k,     test->accumulate};
    problem.n_groups = test->groups;
    problem.max_rows = max_rows;
    problem.expected_rows = (int64_t)test->groups * test->rows_per_group;
    problem.pointer_parts = test->parts;
    problem.activation = test->activation;
    problem.keep_preact = test->keep_preact;
    problem.row_weights = test->row_weights;
    problem.d_row_weights = is_backward(test);
    struct epd_error error = {};
    if (!engine->supports(&problem, 0, &error))
        return printf("    unsupported: %s\n", error.text), -1;
    struct gemm_engine_plan *plan = NULL;
    if (engine->create(&problem, 0, &plan, &error) != EPD_OK)
        return printf("    create: %s\n", error.text), 1;
    struct buffers b = make_buffers(test, max_rows);
    struct gemm_launch launch = make_launch(test, &b, &problem);
    cudaStream_t stream;
    CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    size_t columns = test->layout == EPD_GEMM_TN ? test->k : test->n;
    cudaGraphExec_t replay = NULL;
    int failed = 0;
    for (uint32_t turn = 0; turn < 2 && !failed; turn++) {
        struct layout_rows rows = lay_out(test, turn, max_rows);
        set_splits(&b, &rows, columns, test->dtype, test);
        reset_outputs(test, &b);
        if (turn == 0 && engine->splits_on_device) {
            cudaGraph_t graph;
            CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
            failed |= run_once(engine, plan, &launch, stream);
            CHECK(cudaStreamEndCapture(stream, &graph));
            CHECK(cudaGraphInstantiate(&replay, graph, 0));
            CHECK(cudaGraphDestroy(graph));
        }
        if (replay)
            CHECK(cudaGraphLaunch(replay, stream));
        else
            failed |= run_once(engine, plan, &launch, stream);
        CHECK(cudaStreamSynchronize(stream));
        failed |= check_outputs(test, &b, &problem);
        failed |= check_repeat(test, &b, engine, plan, &launch, stream);
        struct kernel_error seen;
        CHECK(cudaMemcpy(&seen, b.error, sizeof(seen), cudaMemcpyDeviceToHost));
        if (seen.status)
            failed |= printf("    error recorded: status %u expert %d got %lld allowed %lld\n", seen.status,
                             seen.expert, (long long)seen.got, (long long)seen.allowed) > 0;
    }
    if (replay)
        CHECK(cudaGraphExecDestroy(replay));
    engine->destroy(plan);
    free_buffers(&b);
    CHECK(cudaStreamDestroy(stream));
    return failed;
}

static const char *const split_names[] = {"even",   "last_zero", "random",   "hot",
                                          "primes", "ones",      "all_zero", "steps"};

static void add_shapes(std::vector<struct test_case> *cases)
{
    static const uint32_t shapes[][4] = {{1, 127, 128, 512}, {8, 15, 128, 512},   {8, 1027, 128, 512},
                                         {3, 64, 128, 128},  {6, 300, 2880, 520}, {5, 200, 520, 2880},
                                         {4, 257, 8, 8},     {64, 20, 72, 264}};
    static const enum epd_gemm_layout layouts[] = {EPD_GEMM_TN, EPD_GEMM_NN, EPD_GEMM_NT};
    for (auto &shape : shapes)
        for (enum epd_gemm_layout layout : layouts)
            for (enum epd_dtype dtype : {EPD_BF16, EPD_F16})
                cases->push_back({layout, dtype, dtype, EPD_DTYPE_UNSPECIFIED, shape[0], shape[1], shape[2],
                                  shape[3], LAST_ZERO, 1});
    for (enum epd_gemm_layout layout : layouts) {
        for (enum split_kind splits : {EVEN, RANDOM, HOT, PRIMES, ONES, ALL_ZERO, STEPS}) {
            uint32_t rows = splits == STEPS ? 256 : 100, groups = splits == STEPS ? 4 : 40;
            cases->push_back(
                {layout, EPD_BF16, EPD_BF16, EPD_DTYPE_UNSPECIFIED, groups, rows, 264, 392, splits, 1});
            cases->push_back(
                {layout, EPD_BF16, EPD_F32, EPD_DTYPE_UNSPECIFIED, groups, rows, 264, 392, splits, 16, 1});
        }
        cases->push_back({layout, EPD_BF16, EPD_BF16, EPD_DTYPE_UNSPECIFIED, 1024, 5, 64, 136, RANDOM, 1});
        cases->push_back({layout, EPD_BF16, EPD_BF16, EPD_DTYPE_UNSPECIFIED, 1024, 5, 64, 136, RANDOM, 8, 1});
        cases->push_back(
            {layout, EPD_BF16, EPD_BF16, EPD_DTYPE_UNSPECIFIED, 16, 10027 / 8, 128, 512, RANDOM, 128});
    }
}

static void add_fused(std::vector<struct test_case> *cases)
{
    for (enum epd_dtype dtype : {EPD_BF16, EPD_F16}) {
        for (enum epd_dtype bias : {EPD_F32, dtype}) {
            cases->push_back({EPD_GEMM_TN, dtype, dtype, bias, 7, 150, 328, 392, RANDOM, 16, 0, 0, 1});
            cases->push_back({EPD_GEMM_TN, dtype, EPD_F32, bias, 7, 150, 328, 392, RANDOM, 1, 1, 0, 1});
            for (int accumulate = 0; accumulate < 2; accumulate++)
                for (enum epd_dtype out : {EPD_F32, dtype})
                    cases->push_back(
                        {EPD_GEMM_NT, dtype, out, bias, 9, 150, 328, 392, RANDOM, 1, accumulate, accumulate});
        }
        cases->push_back(
            {EPD_GEMM_NN, dtype, dtype, EPD_DTYPE_UNSPECIFIED, 7, 150, 328, 392, RANDOM, 16, 0, 0, 1});
        for (enum epd_activation kind : {EPD_SWIGLU, EPD_GEGLU, EPD_RELU2})
            for (int keep = 0; keep < 2; keep++)
                cases->push_back({EPD_GEMM_TN, dtype, dtype, keep ? EPD_F32 : EPD_DTYPE_UNSPECIFIED, 7, 190,
                                  328, 464, RANDOM, keep ? 16u : 1u, keep, 0, kind == EPD_GEGLU || keep, kind,
                                  keep});
    }
    /* {groups, rows, F, H}: tiles of one to four rounds, F not a multiple of 64, one group of everything, ragged ends */
    static const uint32_t shapes[][4] = {
        {7, 150, 328, 464}, {3, 700, 136, 72}, {40, 20, 64, 264}, {2, 1000, 2080, 200}};
    for (auto &shape : shapes)
        for (enum epd_dtype dtype : {EPD_BF16, EPD_F16})
            for (int in_place = 0; in_place < 2; in_place++)
                cases->push_back({EPD_GEMM_NN, dtype, dtype, EPD_DTYPE_UNSPECIFIED, shape[0], shape[1],
                                  shape[2], shape[3], in_place ? PRIMES : RANDOM, in_place ? 16u : 1u,
                                  in_place, 0, in_place, EPD_SWIGLU, in_place});
    for (enum epd_activation kind : {EPD_GEGLU, EPD_RELU2})
        for (enum split_kind splits : {RANDOM, HOT, ALL_ZERO, LAST_ZERO})
            cases->push_back({EPD_GEMM_NN, EPD_BF16, EPD_BF16, EPD_DTYPE_UNSPECIFIED, 7, 190, 328, 464,
                              splits, 1, 0, 0, 1, kind, splits == HOT});
    cases->push_back({EPD_GEMM_NT, EPD_BF16, EPD_F32, EPD_F32, 6, 100, 264, 392, ALL_ZERO, 1, 0, 1});
    cases->push_back({EPD_GEMM_NT, EPD_BF16, EPD_F32, EPD_F32, 6, 100, 264, 392, ALL_ZERO, 1, 0, 0});
}

int main(int argc, char **argv)
{
    int n_devices = 0;
    if (cudaGetDeviceCount(&n_devices) != cudaSuccess || n_devices == 0)
        return puts("skipped: no GPU"), 77;
    const char *name = argc > 1 ? argv[1] : "sm90";
    const struct gemm_engine *engine = NULL;
    for (int i = 0; gemm_engines[i]; i++)
        if (strcmp(gemm_engines[i]->name, name) == 0)
            engine = gemm_engines[i];
    if (!engine)
        return printf("no engine %s\n", name), 2;
    std::vector<struct test_case> cases;
    add_shapes(&cases);
    add_fused(&cases);
    int first = argc > 2 ? atoi(argv[2]) : 0, last = argc > 3 ? atoi(argv[3]) : (int)cases.size() - 1;
    int n_failed = 0, n_run = 0, n_unsupported = 0;
    for (int i = first; i <= last && i < (int)cases.size(); i++) {
        const struct test_case *t = &cases[i];
        char line[256];
        snprintf(line, sizeof(line),
                 "%s case %d layout %d dtype %d c %d bias %d groups %u rows %u k %u n %u splits %s align %u "
                 "parts %d "
                 "accumulate %d weights %d activation %d keep %d",
                 name, i, t->layout, t->dtype, t->dtype_c, t->dtype_bias, t->groups, t->rows_per_group, t->k,
                 t->n, split_names[t->splits], t->alignment, t->parts, t->accumulate, t->row_weights,
                 t->activation, t->keep_preact);
        int failed = run_case(engine, t);
        n_run += failed >= 0;
        n_unsupported += failed < 0;
        n_failed += failed > 0;
        if (failed > 0)
            printf("FAIL %s\n", line);
        fflush(stdout);
    }
    printf("%s: %d cases run, %d failed, %d unsupported\n", name, n_run, n_failed, n_unsupported);
    return n_failed != 0;
}
