/* What the engines refuse and what they survive: wrong splits, missing rows, misaligned or missing pointers. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

extern "C" {
#include "kernels/gemm/cublaslt_groups.h"
#include "kernels/gemm/engine.h"
}
#include "tests/gpu/gemm/check.cuh"

static int n_failed;

static void expect(int condition, const char *engine, const char *what)
{
    if (!condition) {
        printf("FAIL %s: %s\n", engine, what);
        n_failed++;
    }
}

struct fixture {
    const struct gemm_engine *engine;
    struct gemm_problem problem;
    struct gemm_engine_plan *plan;
    struct gemm_launch launch;
    uint16_t *a, *w, *c;
    int64_t *splits;
    struct kernel_error *error;
};

enum { GROUPS = 4, ROWS = 100, SLACK = 300, N = 136, K = 72 };

static void *device(size_t bytes, int byte)
{
    void *memory = NULL;
    CHECK(cudaMalloc(&memory, bytes));
    CHECK(cudaMemset(memory, byte, bytes));
    return memory;
}

/* Inputs are small positive numbers (0x3c3c), rows past ROWS of c a guard of 0xff. */
static void set_up(struct fixture *f, const struct gemm_engine *engine)
{
    struct epd_error error = {};
    memset((void *)f, 0, sizeof(*f));
    f->engine = engine;
    f->problem.shape = {EPD_GEMM_TN, EPD_BF16, EPD_BF16, EPD_DTYPE_UNSPECIFIED, N, K, 0};
    f->problem.n_groups = GROUPS;
    f->problem.max_rows = ROWS;
    if (engine->create(&f->problem, 0, &f->plan, &error) != EPD_OK) {
        printf("%s: %s\n", engine->name, error.text);
        exit(2);
    }
    f->a = (uint16_t *)device((ROWS + SLACK) * K * 2, 0x3c);
    f->w = (uint16_t *)device(GROUPS * N * K * 2, 0x3c);
    f->c = (uint16_t *)device((ROWS + SLACK) * N * 2, 0xff);
    f->splits = (int64_t *)device(GROUPS * 8, 0);
    f->error = (struct kernel_error *)device(sizeof(*f->error), 0);
    f->launch.args.shape = f->problem.shape;
    f->launch.args.groups = {GROUPS, f->splits, NULL, ROWS};
    f->launch.args.a = f->a;
    f->launch.args.b = f->w;
    f->launch.args.c = f->c;
    f->launch.args.error = f->error;
}

static void tear_down(struct fixture *f)
{
    f->engine->destroy(f->plan);
    void *all[] = {f->a, f->w, f->c, f->splits, f->error};
    for (void *memory : all)
        CHECK(cudaFree(memory));
}

static enum epd_status launch(struct fixture *f)
{
    struct epd_error error = {};
    enum epd_status status = f->engine->launch(f->plan, &f->launch, 0, &error);
    CHECK(cudaDeviceSynchronize());
    return status;
}

static int guard_untouched(const struct fixture *f)
{
    static uint16_t tail[SLACK * N];
    CHECK(cudaMemcpy(tail, f->c + ROWS * N, sizeof(tail), cudaMemcpyDeviceToHost));
    for (uint16_t value : tail)
        if (value != 0xffff)
            return 0;
    return 1;
}

/* Splits that pass the buffer or are negative are clamped, recorded, and write nothing outside. */
static void wrong_splits_are_clamped_and_recorded(const struct gemm_engine *engine)
{
    static const int64_t wrong[][GROUPS] = {
        {40, 40, 40, 40}, {10, -5, 20, 30}, {INT64_MAX, 1, 1, 1}, {0, 0, 0, 101}};
    static const int guilty[] = {2, 1, 0, 3};
    for (size_t i = 0; i < sizeof(wrong) / sizeof(wrong[0]); i++) {
        struct fixture f;
        set_up(&f, engine);
        CHECK(cudaMemcpy(f.splits, wrong[i], sizeof(wrong[i]), cudaMemcpyHostToDevice));
        expect(launch(&f) == EPD_OK, engine->name, "a launch with wrong splits is enqueued");
        struct kernel_error seen;
        CHECK(cudaMemcpy(&seen, f.error, sizeof(seen), cudaMemcpyDeviceToHost));
        expect(seen.status == EPD_BAD_SPLITS && seen.got == wrong[i][guilty[i]], engine->name,
               "wrong splits are recorded");
        expect(guard_untouched(&f), engine->name, "wrong splits write nothing past the buffer");
        tear_down(&f);
    }
}

static void more_rows_than_planned_are_refused(const struct gemm_engine *engine)
{
    struct fixture f;
    set_up(&f, engine);
    f.launch.args.groups.max_rows = ROWS + 1;
    expect(launch(&f) == EPD_INVALID_SHAPE, engine->name, "one row more than planned is refused");
    tear_down(&f);
}

static void misaligned_pointers_are_refused(const struct gemm_engine *engine)
{
    struct fixture f;
    set_up(&f, engine);
    f.launch.args.c = f.c + 4;
    expect(launch(&f) == EPD_INVALID_ALIGNMENT, engine->name, "a misaligned output is refused");
    f.launch.args.c = NULL;
    expect(launch(&f) == EPD_INVALID_ARGUMENT, engine->name, "a missing output is refused");
    tear_down(&f);
}

/* Without rows null pointers are legal; wgrad still writes its zeros. */
static void no_rows_need_no_pointers(const struct gemm_engine *engine)
{
    struct fixture f;
    set_up(&f, engine);
    for (enum epd_gemm_layout layout : {EPD_GEMM_TN, EPD_GEMM_NN, EPD_GEMM_NT}) {
        struct epd_error error = {};
        struct gemm_engine_plan *plan = NULL;
        f.problem.shape.layout = layout;
        f.problem.max_rows = 0;
        expect(engine->create(&f.problem, 0, &plan, &error) == EPD_OK, engine->name,
               "a plan without rows is made");
        struct gemm_launch launch = {};
        launch.args.shape = f.problem.shape;
        launch.args.groups = {GROUPS, f.splits, NULL, 0};
        uint16_t *dw = (uint16_t *)device(GROUPS * N * K * 2, 0xff);
        launch.args.c = layout == EPD_GEMM_NT ? dw : NULL;
        expect(engine->launch(plan, &launch, 0, &error) == EPD_OK, engine->name,
               "a launch without rows runs");
        CHECK(cudaDeviceSynchronize());
        uint16_t first = 1;
        CHECK(cudaMemcpy(&first, dw, 2, cudaMemcpyDeviceToHost));
        expect(first == (layout == EPD_GEMM_NT ? 0 : 0xffff), engine->name,
               "wgrad without rows writes zeros");
        CHECK(cudaFree(dw));
        engine->destroy(plan);
    }
    tear_down(&f);
}

static void unsupported_problems_name_the_reason(const struct gemm_engine *engine)
{
    struct epd_error error = {};
    struct gemm_problem problem = {};
    problem.shape = {EPD_GEMM_TN, EPD_BF16, EPD_BF16, EPD_DTYPE_UNSPECIFIED, 100, 64, 0};
    problem.n_groups = 1;
    expect(!engine->supports(&problem, 0, &error) && strstr(error.text, "100"), engine->name,
           "n 100 is refused by value");
    problem.shape = {EPD_GEMM_TN, EPD_F32, EPD_F32, EPD_DTYPE_UNSPECIFIED, 64, 64, 0};
    expect(!engine->supports(&problem, 0, &error), engine->name, "f32 inputs are refused");
}

/* What cublaslt_grouped reads, made from splits of which one is negative and one too long. */
static void tables_of_grouped_layouts_hold_clamped_sizes(void)
{
    const int64_t splits[GROUPS] = {30, -1, 0, 1000}, rows[GROUPS] = {30, 0, 0, 70};
    struct cublaslt_groups_args args = {};
    uint16_t *x = (uint16_t *)device(ROWS * K * 2, 0), *dy = (uint16_t *)device(ROWS * N * 2, 0);
    uint16_t *dw = (uint16_t *)device(GROUPS * N * K * 2, 0xff);
    int64_t *device_splits = (int64_t *)device(sizeof(splits), 0);
    CHECK(cudaMemcpy(device_splits, splits, sizeof(splits), cudaMemcpyHostToDevice));
    args.gemm.shape = {EPD_GEMM_NT, EPD_BF16, EPD_BF16, EPD_DTYPE_UNSPECIFIED, N, K, 0};
    args.gemm.groups = {GROUPS, device_splits, NULL, ROWS};
    args.gemm.a = dy;
    args.gemm.b = x;
    args.gemm.c = dw;
    args.gemm.error = (struct kernel_error *)device(sizeof(struct kernel_error), 0);
    void *memory = device(cublaslt_tables_carve(&args.tables, GROUPS, NULL), 0xff);
    (void)cublaslt_tables_carve(&args.tables, GROUPS, memory);
    CHECK(cublaslt_groups_prepare());
    CHECK(cublaslt_groups_launch(&args, 0));
    int32_t cols[GROUPS], lead[GROUPS];
    void *data[GROUPS];
    struct kernel_error seen;
    uint16_t head[GROUPS];
    CHECK(cudaMemcpy(cols, args.tables.a.cols, sizeof(cols), cudaMemcpyDeviceToHost));
    CHECK(cudaMemcpy(lead, args.tables.b.rows, sizeof(lead), cudaMemcpyDeviceToHost));
    CHECK(cudaMemcpy(data, args.tables.b.data, sizeof(data), cudaMemcpyDeviceToHost));
    CHECK(cudaMemcpy(&seen, args.gemm.error, sizeof(seen), cudaMemcpyDeviceToHost));
    for (int i = 0; i < GROUPS; i++) {
        CHECK(cudaMemcpy(&head[i], dw + (size_t)i * N * K, 2, cudaMemcpyDeviceToHost));
        expect(cols[i] == rows[i] && lead[i] == N, "cublaslt_groups", "sizes are the clamped splits");
        expect(head[i] == (rows[i] ? 0xffff : 0), "cublaslt_groups", "gradients of empty groups are zeros");
    }
    expect(data[3] == dy + 30 * N, "cublaslt_groups", "packed groups start behind each other");
    expect(seen.status == EPD_BAD_SPLITS && seen.expert == 1 && seen.got == -1, "cublaslt_groups",
           "the first bad split is recorded");
    void *all[] = {x, dy, dw, device_splits, args.gemm.error, memory};
    for (void *each : all)
        CHECK(cudaFree(each));
}

int main(void)
{
    int n_devices = 0;
    if (cudaGetDeviceCount(&n_devices) != cudaSuccess || n_devices == 0)
        return puts("skipped: no GPU"), 77;
    for (int i = 0; gemm_engines[i]; i++) {
        struct epd_error reason = {};
        struct gemm_problem usual = {};
        usual.shape = {EPD_GEMM_TN, EPD_BF16, EPD_BF16, EPD_DTYPE_UNSPECIFIED, N, K, 0};
        usual.n_groups = GROUPS;
        if (!gemm_engines[i]->supports(&usual, 0, &reason)) {
            printf("%s\n", reason.text);
            continue;
        }
        wrong_splits_are_clamped_and_recorded(gemm_engines[i]);
        more_rows_than_planned_are_refused(gemm_engines[i]);
        if (gemm_engines[i]->splits_on_device)
            misaligned_pointers_are_refused(gemm_engines[i]);
        no_rows_need_no_pointers(gemm_engines[i]);
        unsupported_problems_name_the_reason(gemm_engines[i]);
    }
    tables_of_grouped_layouts_hold_clamped_sizes();
    printf("limits: %d failed\n", n_failed);
    return n_failed != 0;
}
