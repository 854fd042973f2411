/* The weight gradients of a layer, launch after launch: what hangs once in a thousand launches has to show. Two products as a
 * layer makes them one behind the other, 32 groups of about 256 rows, ragged or all whole steps, for some seconds each.
 * Usage: repeat_test [seconds of each form]. Exit code 77 without a GPU of compute capability 9.0. */
#include <random>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <vector>

extern "C" {
#include "kernels/gemm/engine.h"
}
#include "tests/gpu/gemm/check.cuh"

constexpr uint32_t GROUPS = 32, HIDDEN = 2048, FFN = 768, ROWS = 256;
constexpr int64_t MAX_ROWS = GROUPS * ROWS * 5 / 4;
constexpr int N_SPLITS = 64, BATCH = 32;
constexpr double STUCK_S = 2; /* a batch takes some 5 ms */

static double now_s()
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec + now.tv_nsec * 1e-9;
}

static void *device(size_t bytes)
{
    void *memory = NULL;
    CHECK(cudaMalloc(&memory, bytes));
    CHECK(cudaMemset(memory, 0, bytes));
    return memory;
}

/* [N_SPLITS, GROUPS] on the device. */
static int64_t *make_splits(bool ragged)
{
    std::mt19937 random(7);
    std::binomial_distribution<int> draw(ROWS * 128, 1.0 / 128);
    std::vector<int64_t> host(N_SPLITS * GROUPS);
    for (int64_t &rows : host)
        rows = ragged ? draw(random) : ROWS;
    int64_t *splits = (int64_t *)device(host.size() * sizeof host[0]);
    CHECK(cudaMemcpy(splits, host.data(), host.size() * sizeof host[0], cudaMemcpyHostToDevice));
    return splits;
}

struct product {
    struct gemm_engine_plan *plan;
    struct gemm_launch launch;
};

static struct product make_product(const struct gemm_engine *engine, uint32_t n, uint32_t k)
{
    struct product made = {};
    struct gemm_problem problem = {};
    struct epd_error error = {};
    problem.shape = {EPD_GEMM_NT, EPD_BF16, EPD_BF16, EPD_DTYPE_UNSPECIFIED, n, k, 0};
    problem.n_groups = GROUPS;
    problem.max_rows = MAX_ROWS;
    if (!engine->supports(&problem, 0, &error)) {
        printf("skipped: %s\n", error.text);
        exit(77);
    }
    if (engine->create(&problem, 0, &made.plan, &error)) {
        printf("%s\n", error.text);
        exit(2);
    }
    made.launch.args.shape = problem.shape;
    made.launch.args.a = device(MAX_ROWS * n * 2);
    made.launch.args.b = device(MAX_ROWS * k * 2);
    made.launch.args.c = device((size_t)GROUPS * n * k * 2);
    return made;
}

/* Whether everything before the event has ended in time. */
static bool ends(cudaEvent_t event)
{
    double since = now_s();
    for (;;) {
        cudaError_t result = cudaEventQuery(event);
        if (result == cudaSuccess)
            return true;
        if (result != cudaErrorNotReady)
            CHECK(result);
        if (now_s() - since > STUCK_S)
            return false;
    }
}

static bool repeat(const struct gemm_engine *engine, struct product *products, bool ragged, double seconds)
{
    int64_t *splits = make_splits(ragged);
    struct epd_error error = {};
    cudaStream_t stream;
    cudaEvent_t done;
    CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    CHECK(cudaEventCreateWithFlags(&done, cudaEventDisableTiming));
    CHECK(cudaDeviceSynchronize());
    double begin = now_s();
    long n = 0;
    while (now_s() - begin < seconds) {
        for (int i = 0; i < BATCH; i++, n++)
            for (int j = 0; j < 2; j++) {
                products[j].launch.args.groups = {GROUPS, splits + (n % N_SPLITS) * GROUPS, NULL, MAX_ROWS};
                if (engine->launch(products[j].plan, &products[j].launch, stream, &error)) {
                    printf("%s\n", error.text);
                    return false;
                }
            }
        CHECK(cudaEventRecord(done, stream));
        if (!ends(done)) {
            printf("%s rows: stuck after about %ld launches\n", ragged ? "ragged" : "even", 2 * n);
            return false;
        }
    }
    printf("%s rows: %ld launches in %.1f s\n", ragged ? "ragged" : "even", 2 * n, now_s() - begin);
    return true;
}

int main(int argc, char **argv)
{
    int n_devices = 0;
    if (cudaGetDeviceCount(&n_devices) != cudaSuccess || n_devices == 0) {
        printf("skipped: no GPU\n");
        return 77;
    }
    const struct gemm_engine *engine = NULL;
    for (int i = 0; gemm_engines[i]; i++)
        if (strcmp(gemm_engines[i]->name, "sm90") == 0)
            engine = gemm_engines[i];
    if (!engine)
        return 2;
    double seconds = argc > 1 ? atof(argv[1]) : 4;
    struct product products[] = {make_product(engine, HIDDEN, FFN), make_product(engine, 2 * FFN, HIDDEN)};
    bool good = repeat(engine, products, true, seconds) && repeat(engine, products, false, seconds);
    fflush(stdout);
    _Exit(good ? 0 : 1); /* what is stuck would hold up an ordinary end */
}
