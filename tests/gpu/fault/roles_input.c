/* Ranks whose device memory holds what it must not: wrong routing, wrong splits, one row too many, NaN. */
#include <string.h>
#include <unistd.h>

#include "tests/gpu/fault/roles.h"

/* ---- routing ---- */

static void expect_bad_routing(struct gpu_rank *rank, int bad_token)
{
    struct epd_failure failure = {.size = sizeof failure};
    char token[32];
    snprintf(token, sizeof token, "token %d", bad_token);
    gpu_rank_route(rank, rank->rank == rank->world - 1 ? bad_token : -1);
    GPU_MUST(gpu_rank_step(rank) == EPD_BAD_ROUTING);
    GPU_MUST(epd_plan_failure(rank->dispatch, &failure) == EPD_OK);
    GPU_MUST(failure.rank == (int)rank->world - 1 && strstr(failure.text, token) != NULL);
    gpu_rank_route(rank, -1);
}

static void write_idx(struct gpu_rank *rank, int first, int second)
{
    const int pair[2] = {first, second};
    gpu_put(rank->idx, pair, sizeof pair);
}

/* Out of range, far out of range, negative, twice: named by rank and token, and the next step is right. */
static void run_routing(struct gpu_rank *rank)
{
    static const int pairs[][2] = {{GPU_E, 0}, {0x7fffffff, 1}, {-2, 1}, {-0x7fffffff - 1, 3}, {3, 3}};
    gpu_rank_open(rank);
    expect_bad_routing(rank, 11);
    expect_bad_routing(rank, GPU_T - 1);
    GPU_MUST(gpu_rank_step(rank) == EPD_OK);
    for (size_t i = 0; i < sizeof pairs / sizeof pairs[0]; i++) {
        if (rank->rank == 0)
            write_idx(rank, pairs[i][0], pairs[i][1]);
        GPU_MUST(gpu_rank_step(rank) == EPD_BAD_ROUTING);
        gpu_rank_route(rank, -1);
        GPU_MUST(gpu_rank_step(rank) == EPD_OK);
    }
    gpu_rank_close(rank);
}

/* Another stream rewrites topk_idx all the time: every step ends, in bounds, one way or the other. */
static void run_flicker(struct gpu_rank *rank)
{
    cudaStream_t other;
    int *garbage;
    gpu_rank_open(rank);
    GPU_MUST(cudaStreamCreateWithFlags(&other, cudaStreamNonBlocking) == cudaSuccess);
    GPU_MUST(cudaMallocHost((void **)&garbage, GPU_T * GPU_K * sizeof(int)) == cudaSuccess);
    for (int i = 0; i < GPU_T * GPU_K; i++)
        garbage[i] = i % 3 == 0 ? -i * 1000003 : i % GPU_E;
    for (int step = 0; step < 60; step++) {
        enum epd_status launched = gpu_rank_launch(rank);
        GPU_MUST(launched == EPD_OK);
        for (int i = 0; i < 20; i++)
            GPU_MUST(cudaMemcpyAsync(rank->idx, garbage, GPU_T * GPU_K * sizeof(int), cudaMemcpyHostToDevice,
                                     other) == cudaSuccess);
        GPU_MUST(cudaStreamSynchronize(rank->stream) == cudaSuccess);
        (void)!epd_plan_wait(rank->combine, 0);
        const enum epd_status status = epd_plan_wait(rank->dispatch, 0);
        GPU_MUST(status == EPD_OK || status == EPD_BAD_ROUTING);
        GPU_MUST(cudaStreamSynchronize(other) == cudaSuccess);
        gpu_rank_route(rank, -1);
    }
    GPU_MUST(gpu_rank_step(rank) == EPD_OK);
    gpu_rank_close(rank);
}

/* ---- capacity ---- */

/* Every token of every rank to expert 0 of rank 0 and to the first of the next rank: world * T rows each. One row more than
 * the capacity is an error that says what would do; the test starts this with the right capacity and with one less. */
static void run_full(struct gpu_rank *rank)
{
    struct epd_failure failure = {.size = sizeof failure};
    char needed[32], name[64];
    const char *const group_name = rank->group_name;
    int idx[GPU_T * GPU_K];
    const int64_t rows = (int64_t)rank->world * GPU_T * (rank->world == 1 ? GPU_K : 1);
    for (int short_by = 0; short_by < 2; short_by++) {
        rank->capacity_rows = rows - short_by;
        snprintf(name, sizeof name, "%s-%d", group_name, short_by);
        rank->group_name = name;
        gpu_rank_open(rank);
        for (int token = 0; token < GPU_T; token++) {
            idx[token * GPU_K] = 0;
            idx[token * GPU_K + 1] = rank->world == 1 ? 1 : GPU_E / (int)rank->world;
        }
        gpu_put(rank->idx, idx, sizeof idx);
        const enum epd_status status = gpu_rank_step(rank);
        GPU_MUST(status == (short_by ? EPD_CAPACITY_OVERFLOW : EPD_OK));
        if (short_by) {
            snprintf(needed, sizeof needed, "%lld", (long long)rows);
            GPU_MUST(epd_plan_failure(rank->dispatch, &failure) == EPD_OK);
            GPU_MUST(strstr(failure.text, needed) != NULL);
            gpu_rank_route(rank, -1); /* spread out it is T * K rows for everybody */
            if (rank->capacity_rows >= GPU_T * GPU_K)
                GPU_MUST(gpu_rank_step(rank) == EPD_OK);
        }
        gpu_rank_close(rank);
    }
}

/* No rank routes anything; then rank 0 alone has no tokens. */
static void run_empty(struct gpu_rank *rank)
{
    int idx[GPU_T * GPU_K];
    int64_t splits[GPU_E];
    gpu_rank_open(rank);
    memset(idx, 0xff, sizeof idx);
    gpu_put(rank->idx, idx, sizeof idx);
    GPU_MUST(gpu_rank_launch(rank) == EPD_OK && cudaStreamSynchronize(rank->stream) == cudaSuccess);
    GPU_MUST(epd_plan_wait(rank->dispatch, 0) == EPD_OK && epd_plan_wait(rank->combine, 0) == EPD_OK);
    for (int i = 0; i < GPU_T * GPU_H; i++)
        GPU_MUST(rank->out_host[i] == 0); /* nothing of the poison, no rows: zero */
    GPU_MUST(cudaMemcpy(splits, rank->splits, GPU_E / rank->world * sizeof splits[0],
                        cudaMemcpyDeviceToHost) == cudaSuccess);
    for (unsigned i = 0; i < GPU_E / rank->world; i++)
        GPU_MUST(splits[i] == 0);
    gpu_rank_route(rank, -1);
    if (rank->rank == 0)
        GPU_MUST(epd_plan_set_tokens(rank->dispatch, 0) == EPD_OK &&
                 epd_plan_set_tokens(rank->combine, 0) == EPD_OK);
    if (rank->rank == 0) {
        GPU_MUST(gpu_rank_launch(rank) == EPD_OK && cudaStreamSynchronize(rank->stream) == cudaSuccess);
        GPU_MUST(epd_plan_wait(rank->dispatch, 0) == EPD_OK && epd_plan_wait(rank->combine, 0) == EPD_OK);
        for (int i = 0; i < GPU_T * GPU_H; i++)
            GPU_MUST(rank->out_host[i] == 0xffff); /* rows of no token are left alone */
        GPU_MUST(epd_plan_set_tokens(rank->dispatch, GPU_T) == EPD_OK);
        GPU_MUST(epd_plan_set_tokens(rank->combine, GPU_T) == EPD_OK);
    } else {
        GPU_MUST(gpu_rank_step(rank) == EPD_OK);
    }
    GPU_MUST(gpu_rank_step(rank) == EPD_OK);
    gpu_rank_close(rank);
}

/* ---- NaN ---- */

static int is_nan(unsigned short value)
{
    return (value & 0x7f80) == 0x7f80 && (value & 0x7f) != 0;
}

/* Padding rows are zero though the buffer was full of NaN, and a NaN stays in its token. */
static void run_nan(struct gpu_rank *rank)
{
    const int nan_token = 5;
    rank->alignment = 64;
    gpu_rank_open(rank);
    GPU_MUST(gpu_rank_launch(rank) == EPD_OK);
    GPU_MUST(gpu_rank_wait(rank) == EPD_OK);
    const size_t n = (size_t)rank->n_recv_rows * GPU_H;
    unsigned short *rows = malloc(n * sizeof *rows);
    int64_t splits[GPU_E], row = 0;
    GPU_MUST(cudaMemcpy(rows, rank->recv_x, n * sizeof *rows, cudaMemcpyDeviceToHost) == cudaSuccess);
    GPU_MUST(cudaMemcpy(splits, rank->splits, GPU_E / rank->world * sizeof splits[0],
                        cudaMemcpyDeviceToHost) == cudaSuccess);
    for (unsigned expert = 0; expert < GPU_E / rank->world; expert++) {
        const int64_t end = row + (splits[expert] + rank->alignment - 1) / rank->alignment * rank->alignment;
        for (int64_t i = (row + splits[expert]) * GPU_H; i < end * GPU_H; i++)
            GPU_MUST(rows[i] == 0);
        row = end;
    }
    free(rows);
    GPU_MUST(gpu_rank_launch(rank) == EPD_OK); /* the same step as the rank's own, with one bad value */
    GPU_MUST(gpu_rank_wait(rank) == EPD_OK);
    const unsigned short nan = 0x7fc0;
    gpu_put((unsigned short *)rank->x + nan_token * GPU_H, &nan, sizeof nan);
    GPU_MUST(epd_plan_launch(rank->dispatch, rank->stream) == EPD_OK);
    GPU_MUST(epd_plan_launch(rank->combine, rank->stream) == EPD_OK);
    GPU_MUST(cudaStreamSynchronize(rank->stream) == cudaSuccess);
    GPU_MUST(epd_plan_wait(rank->dispatch, 0) == EPD_OK && epd_plan_wait(rank->combine, 0) == EPD_OK);
    unsigned short *want = malloc(GPU_T * GPU_H * sizeof *want);
    memcpy(want, rank->out_host, GPU_T * GPU_H * sizeof *want);
    GPU_MUST(cudaMemcpy(rank->out_host, rank->out, GPU_T * GPU_H * sizeof *want, cudaMemcpyDeviceToHost) ==
             cudaSuccess);
    for (int i = 0; i < GPU_T * GPU_H; i++)
        GPU_MUST(i == nan_token * GPU_H ? is_nan(rank->out_host[i]) : rank->out_host[i] == want[i]);
    free(want);
    GPU_MUST(gpu_rank_step(rank) == EPD_OK);
    gpu_rank_close(rank);
}

/* ---- splits of a local op ---- */

enum { GEMM_ROWS = 64, GEMM_K = 128, GEMM_N = 256, GEMM_L = 4 };

static struct epd_buffer *device_buffer(struct gpu_rank *rank, size_t bytes, int fill, void **data)
{
    struct epd_buffer *buffer;
    GPU_MUST(cudaMalloc(data, bytes) == cudaSuccess && cudaMemset(*data, fill, bytes) == cudaSuccess);
    GPU_MUST(cudaDeviceSynchronize() == cudaSuccess);
    GPU_MUST(epd_buffer_register_cuda(rank->group, *data, bytes, &buffer) == EPD_OK);
    return buffer;
}

/* Negative, more than there are rows, absurd: an error that names the expert, no write past the rows, and the next launch is
 * right. Ones times ones of K columns are K. */
static void run_splits(struct gpu_rank *rank)
{
    static const int64_t bad[][GEMM_L] = {{16, -1, 16, 16},
                                          {16, 16, 16, 17},
                                          {INT64_MIN, 1, 1, 1},
                                          {INT64_MAX, INT64_MAX, 1, 1},
                                          {0, 0, 0, 65}};
    static const int64_t good[GEMM_L] = {16, 0, 17, 15};
    void *a, *b, *c, *s;
    struct epd_plan *plan;
    gpu_rank_open(rank);
    /* 0x3f3f: 0.746..., exact in bf16 */
    struct epd_buffer *buffers[] = {device_buffer(rank, GEMM_ROWS * GEMM_K * 2, 0x3f, &a),
                                    device_buffer(rank, GEMM_L * GEMM_N * GEMM_K * 2, 0x3f, &b),
                                    device_buffer(rank, 2 * GEMM_ROWS * GEMM_N * 2, 0xff, &c),
                                    device_buffer(rank, sizeof good, 0, &s)};
    const struct epd_tensor tensors[] = {
        {.role = EPD_ROLE_A,
         .buffer = buffers[0],
         .dtype = EPD_BF16,
         .n_dims = 2,
         .shape = {GEMM_ROWS, GEMM_K}},
        {.role = EPD_ROLE_B,
         .buffer = buffers[1],
         .dtype = EPD_BF16,
         .n_dims = 3,
         .shape = {GEMM_L, GEMM_N, GEMM_K}},
        {.role = EPD_ROLE_C,
         .buffer = buffers[2],
         .dtype = EPD_BF16,
         .n_dims = 2,
         .shape = {GEMM_ROWS, GEMM_N}},
        {.role = EPD_ROLE_M_SPLITS, .buffer = buffers[3], .dtype = EPD_I64, .n_dims = 1, .shape = {GEMM_L}}};
    const struct epd_plan_options options = {.size = sizeof options,
                                             .op = EPD_OP_GROUPED_GEMM,
                                             .layout = EPD_GEMM_TN,
                                             .n_tensors = 4,
                                             .tensors = tensors};
    GPU_MUST(epd_plan_create(rank->group, &options, &plan) == EPD_OK);
    static unsigned short out[2 * GEMM_ROWS * GEMM_N];
    for (size_t i = 0; i <= sizeof bad / sizeof bad[0]; i++) {
        const int is_good = i == sizeof bad / sizeof bad[0];
        gpu_put(s, is_good ? good : bad[i], sizeof good);
        GPU_MUST(epd_plan_launch(plan, rank->stream) == EPD_OK &&
                 cudaStreamSynchronize(rank->stream) == cudaSuccess);
        GPU_MUST(epd_plan_wait(plan, 0) == (is_good ? EPD_OK : EPD_BAD_SPLITS));
        GPU_MUST(cudaMemcpy(out, c, sizeof out, cudaMemcpyDeviceToHost) == cudaSuccess);
        for (size_t e = (is_good ? 48 : GEMM_ROWS) * GEMM_N; e < sizeof out / sizeof out[0]; e++)
            GPU_MUST(out[e] == 0xffff || e < GEMM_ROWS * GEMM_N);
    }
    for (int e = 1; e < 48 * GEMM_N; e++)
        GPU_MUST(out[e] == out[0] && !is_nan(out[e]));
    gpu_rank_close(rank);
}

const struct role roles_of_input[] = {
    {"routing", run_routing}, {"flicker", run_flicker}, {"full", run_full}, {"empty", run_empty},
    {"nan", run_nan},         {"splits", run_splits},   {NULL, NULL},
};
