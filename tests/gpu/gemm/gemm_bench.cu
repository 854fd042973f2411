/* Speed of the grouped GEMM engines: the standard cases, medians of CUDA event times with the L2 flushed before every
 * launch. Prints a JSON line per case; flops are 2 * rows * n * k, rows that exist only.
 * Usage: gemm_bench [engine [op [part of the case's name [repeats [pause in ms before each launch]]]]]
 * GEMM_TILE, GEMM_BOX, GEMM_STAGES override the cost model of sm90 (the link wraps sm90_config_choose). */
#include <algorithm>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <vector>

extern "C" {
#include "kernels/gemm/engine.h"
#include "kernels/gemm/sm90_args.h"
#include "kernels/gemm/sm90_config.h"
struct sm90_config __real_sm90_config_choose(const struct gemm_problem *problem, uint32_t n_clusters);
struct sm90_config __wrap_sm90_config_choose(const struct gemm_problem *problem, uint32_t n_clusters);
}
#include "tests/gpu/gemm/check.cuh"
#include "tests/gpu/gemm/reference.cuh"

#define CEILING_TFLOPS 791.0 /* dense bf16 8192^3 by cuBLAS on this kind of host */

static uint32_t from_environment(const char *name, uint32_t otherwise)
{
    const char *text = getenv(name);
    return text ? atoi(text) : otherwise;
}

struct sm90_config __wrap_sm90_config_choose(const struct gemm_problem *problem, uint32_t n_clusters)
{
    struct sm90_config config = __real_sm90_config_choose(problem, n_clusters);
    config.tile_inner = from_environment("GEMM_TILE", config.tile_inner);
    config.box_rows = from_environment("GEMM_BOX", config.box_rows);
    uint32_t boxed = (config.tile_inner + config.box_rows - 1) / config.box_rows * config.box_rows;
    config.stage_bytes = 128 * (128 + boxed);
    config.n_stages = from_environment("GEMM_STAGES", 8);
    while (sm90_smem_bytes(config.n_stages, config.stage_bytes) > 232448)
        config.n_stages--;
    return config;
}

enum bench_routing { EVEN, REAL, ZIPF };

struct bench_case {
    const char *name;
    uint32_t groups, rows, k, n;
    enum bench_routing routing;
};

static const struct bench_case cases[] = {
    {"8x4096", 8, 4096, 4096, 2048, EVEN},       {"8x2048", 8, 2048, 7168, 4096, EVEN},
    {"32x512", 32, 512, 2048, 1536, EVEN},       {"32x1024", 32, 1024, 7168, 4096, EVEN},
    {"64x128", 64, 128, 7168, 4096, EVEN},       {"64x512a", 64, 512, 7168, 4096, EVEN},
    {"64x512b", 64, 512, 2048, 7168, EVEN},      {"4x8192", 4, 8192, 4096, 7168, EVEN},
    {"64x512a_real", 64, 512, 7168, 4096, REAL}, {"64x512b_real", 64, 512, 2048, 7168, REAL},
    {"64x512a_zipf", 64, 512, 7168, 4096, ZIPF}, {"64x512b_zipf", 64, 512, 2048, 7168, ZIPF},
};

static std::vector<int64_t> make_splits(const struct bench_case *test)
{
    std::vector<int64_t> out;
    double total = 0.0;
    for (uint32_t i = 0; i < test->groups; i++)
        total += 1.0 / (i + 1);
    uint32_t state = 12345;
    int64_t given = 0, all = (int64_t)test->groups * test->rows;
    for (uint32_t i = 0; i < test->groups; i++) {
        double normal = -6.0;
        for (int j = 0; j < 12; j++) {
            state = state * 1664525u + 1013904223u;
            normal += (state >> 8) / 16777216.0;
        }
        int64_t rows = test->rows;
        if (test->routing == REAL)
            rows += llround(normal * 22.0);
        if (test->routing == ZIPF) /* the hot expert somewhere in the middle */
            rows = llround(all / total / ((i * 29 + 40) % test->groups + 1));
        if (i + 1 == test->groups && test->routing != EVEN)
            rows = all - given > 0 ? all - given : 0;
        given += rows;
        out.push_back(rows);
    }
    return out;
}

static void *device(size_t bytes)
{
    void *memory = NULL;
    CHECK(cudaMalloc(&memory, bytes));
    return memory;
}

static float median(std::vector<float> times)
{
    std::sort(times.begin(), times.end());
    return times[times.size() / 2];
}

struct variant {
    const char *name;
    enum epd_gemm_layout layout;
    enum epd_dtype dtype_c;
    int accumulate, parts;
    enum epd_activation activation;
    int keep;
    enum epd_dtype bias;
};

static const struct variant variants[] = {
    {"tn", EPD_GEMM_TN, EPD_BF16},
    {"nn", EPD_GEMM_NN, EPD_BF16},
    {"nt", EPD_GEMM_NT, EPD_BF16},
    {"nt_f32", EPD_GEMM_NT, EPD_F32},
    {"nt_f32_add", EPD_GEMM_NT, EPD_F32, 1},
    {"nt_dbias", EPD_GEMM_NT, EPD_BF16, 0, 0, EPD_ACTIVATION_UNSPECIFIED, 0, EPD_F32},
    {"tn_parts", EPD_GEMM_TN, EPD_BF16, 0, 1},
    {"tn_bias", EPD_GEMM_TN, EPD_BF16, 0, 0, EPD_ACTIVATION_UNSPECIFIED, 0, EPD_BF16},
    {"tn_swiglu", EPD_GEMM_TN, EPD_BF16, 0, 0, EPD_SWIGLU, 0},
    {"tn_swiglu_keep", EPD_GEMM_TN, EPD_BF16, 0, 0, EPD_SWIGLU, 1},
};

static void run(const struct gemm_engine *engine, const struct bench_case *test,
                const struct variant *variant, int repeats, int pause_ms, void *flush, size_t flush_bytes)
{
    int64_t rows = (int64_t)test->groups * test->rows;
    size_t weights = (size_t)test->groups * test->n * test->k;
    struct gemm_problem problem = {};
    problem.shape = {variant->layout, EPD_BF16, variant->dtype_c,   variant->bias,
                     test->n,         test->k,  variant->accumulate};
    problem.n_groups = test->groups;
    problem.max_rows = rows;
    problem.pointer_parts = variant->parts;
    problem.activation = variant->activation;
    problem.keep_preact = variant->keep;
    struct epd_error error = {};
    struct gemm_engine_plan *plan = NULL;
    if (!engine->supports(&problem, 0, &error) || engine->create(&problem, 0, &plan, &error) != EPD_OK) {
        printf("%s %s: %s\n", test->name, variant->name, error.text);
        return;
    }
    int nt = variant->layout == EPD_GEMM_NT;
    size_t n_x = (size_t)rows * test->k, n_y = (size_t)rows * test->n;
    void *x = device(n_x * 2), *y = device(n_y * 4), *w = device(weights * 4), *act = device(n_y),
         *bias = device((size_t)test->groups * test->n * 4);
    fill_random<<<1024, 256>>>(x, EPD_BF16, n_x, 1, 1.0f);
    fill_random<<<1024, 256>>>(y, EPD_BF16, n_y, 2, 1.0f);
    fill_random<<<1024, 256>>>(w, EPD_BF16, weights, 3, 0.02f);
    CHECK(cudaMemset(bias, 0, (size_t)test->groups * test->n * 4));
    int64_t *splits = (int64_t *)device(test->groups * 8);
    std::vector<int64_t> host = make_splits(test);
    CHECK(cudaMemcpy(splits, host.data(), host.size() * 8, cudaMemcpyHostToDevice));
    std::vector<const void *> host_parts;
    for (uint32_t i = 0; i < test->groups; i++)
        host_parts.push_back((char *)w + (size_t)i * test->n * test->k * 2);
    const void **parts = (const void **)device(test->groups * 8);
    CHECK(cudaMemcpy(parts, host_parts.data(), host_parts.size() * 8, cudaMemcpyHostToDevice));
    struct gemm_launch launch = {};
    launch.args.shape = problem.shape;
    launch.args.groups = {test->groups, splits, NULL, rows};
    launch.args.a = variant->layout == EPD_GEMM_TN ? x : y;
    launch.args.b = nt ? x : w;
    launch.args.b_parts = variant->parts ? parts : NULL;
    launch.args.c = nt ? w : variant->layout == EPD_GEMM_TN ? y : x;
    launch.args.bias = launch.args.dbias = bias;
    launch.args.bias = bias;
    launch.act = act;
    std::vector<float> times;
    cudaEvent_t before, after;
    CHECK(cudaEventCreate(&before));
    CHECK(cudaEventCreate(&after));
    for (int i = 0; i < repeats + 3; i++) {
        usleep(pause_ms * 1000);
        CHECK(cudaMemsetAsync(flush, i, flush_bytes, 0));
        CHECK(cudaEventRecord(before, 0));
        if (engine->launch(plan, &launch, 0, &error) != EPD_OK) {
            printf("%s\n", error.text);
            exit(1);
        }
        CHECK(cudaEventRecord(after, 0));
        CHECK(cudaEventSynchronize(after));
        float ms = 0;
        CHECK(cudaEventElapsedTime(&ms, before, after));
        if (i >= 3)
            times.push_back(ms);
    }
    double flops = 0;
    for (int64_t m : host)
        flops += 2.0 * m * test->n * test->k;
    float ms = median(times);
    std::sort(times.begin(), times.end());
    double tflops = flops / ms / 1e9;
    printf("{\"engine\": \"%s\", \"case\": \"%s\", \"op\": \"%s\", \"us\": %.1f, \"p99_us\": %.1f, "
           "\"tflops\": %.1f, "
           "\"of_ceiling\": %.3f}\n",
           engine->name, test->name, variant->name, ms * 1e3, times[(times.size() - 1) * 99 / 100] * 1e3,
           tflops, tflops / CEILING_TFLOPS);
    fflush(stdout);
    engine->destroy(plan);
    void *all[] = {x, y, w, act, bias, splits, parts};
    for (void *memory : all)
        CHECK(cudaFree(memory));
    CHECK(cudaEventDestroy(before));
    CHECK(cudaEventDestroy(after));
}

static int chosen(const char *pattern, const char *name)
{
    return !pattern || strcmp(pattern, "all") == 0 || strstr(name, pattern) != NULL;
}

int main(int argc, char **argv)
{
    const char *engine = argc > 1 ? argv[1] : "sm90", *ops = argc > 2 ? argv[2] : NULL;
    const char *only = argc > 3 ? argv[3] : NULL;
    int repeats = argc > 4 ? atoi(argv[4]) : 20, pause_ms = argc > 5 ? atoi(argv[5]) : 0;
    size_t flush_bytes = 256u << 20;
    void *flush = device(flush_bytes);
    for (int i = 0; gemm_engines[i]; i++)
        if (strcmp(gemm_engines[i]->name, engine) == 0)
            for (const struct variant &variant : variants)
                for (const struct bench_case &test : cases)
                    if ((ops ? strcmp(ops, variant.name) == 0 || strcmp(ops, "all") == 0 : 1) &&
                        chosen(only, test.name))
                        run(gemm_engines[i], &test, &variant, repeats, pause_ms, flush, flush_bytes);
    return 0;
}
