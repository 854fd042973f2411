#include "tests/gpu/fault/gpu_rank.h"

#include <string.h>

#define ROW_BYTES (GPU_H * sizeof(unsigned short))
#define X_BYTES   (GPU_T * ROW_BYTES)

static void enter(struct gpu_rank *rank, enum board_place place)
{
    atomic_store(&rank->own->place, place);
}

void gpu_rank_select(const struct gpu_rank *rank)
{
    int n_gpus = 0;
    GPU_MUST(cudaGetDeviceCount(&n_gpus) == cudaSuccess && n_gpus > 0);
    GPU_MUST(cudaSetDevice((int)rank->rank % n_gpus) == cudaSuccess);
}

unsigned short gpu_bf16(int value)
{
    float f = (float)value;
    unsigned bits;
    memcpy(&bits, &f, sizeof bits);
    return (unsigned short)(bits >> 16);
}

/* ---- opening ---- */

static enum epd_status own_buffer(struct gpu_rank *rank, size_t bytes, void **data,
                                  struct epd_buffer **buffer)
{
    GPU_MUST(cudaMalloc(data, bytes) == cudaSuccess);
    GPU_MUST(cudaMemset(*data, 0xff, bytes) == cudaSuccess);
    GPU_MUST(cudaDeviceSynchronize() == cudaSuccess);
    return epd_buffer_register_cuda(rank->group, *data, bytes, buffer);
}

static enum epd_status make_buffers(struct gpu_rank *rank)
{
    enum epd_status status = own_buffer(rank, X_BYTES, &rank->x, &rank->buffers[0]);
    if (status == EPD_OK)
        status = own_buffer(rank, GPU_T * GPU_K * 4, &rank->idx, &rank->buffers[1]);
    if (status == EPD_OK)
        status = own_buffer(rank, (size_t)rank->n_recv_rows * ROW_BYTES, &rank->recv_x, &rank->buffers[2]);
    if (status == EPD_OK)
        status = own_buffer(rank, GPU_E / rank->world * 8, &rank->splits, &rank->buffers[3]);
    if (status == EPD_OK)
        status = epd_buffer_alloc(rank->group, X_BYTES, &rank->buffers[4]);
    if (status == EPD_OK) {
        rank->out = epd_buffer_data(rank->buffers[4]);
        gpu_rank_route(rank, -1);
    }
    return status;
}

static struct epd_tensor tensor(enum epd_role role, struct epd_buffer *buffer, enum epd_dtype dtype,
                                int64_t d0, int64_t d1)
{
    return (struct epd_tensor){
        .role = role, .buffer = buffer, .dtype = dtype, .n_dims = d1 ? 2 : 1, .shape = {d0, d1, 0}};
}

enum epd_status gpu_rank_plan(struct gpu_rank *rank)
{
    const struct epd_tensor dispatch[] = {
        tensor(EPD_ROLE_X, rank->buffers[0], EPD_BF16, GPU_T, GPU_H),
        tensor(EPD_ROLE_TOPK_IDX, rank->buffers[1], EPD_I32, GPU_T, GPU_K),
        tensor(EPD_ROLE_RECV_X, rank->buffers[2], EPD_BF16, rank->n_recv_rows, GPU_H),
        tensor(EPD_ROLE_M_SPLITS, rank->buffers[3], EPD_I64, GPU_E / rank->world, 0)};
    const struct epd_tensor combine[] = {
        tensor(EPD_ROLE_Y, rank->buffers[2], EPD_BF16, rank->n_recv_rows, GPU_H),
        tensor(EPD_ROLE_OUT, rank->buffers[4], EPD_BF16, GPU_T, GPU_H)};
    struct epd_plan_options options = {
        .size = sizeof options, .op = EPD_OP_DISPATCH, .n_tensors = 4, .tensors = dispatch};
    enum epd_status status = epd_plan_create(rank->group, &options, &rank->dispatch);
    if (status != EPD_OK)
        return status;
    options = (struct epd_plan_options){.size = sizeof options,
                                        .op = EPD_OP_COMBINE,
                                        .context = rank->dispatch,
                                        .n_tensors = 2,
                                        .tensors = combine};
    return epd_plan_create(rank->group, &options, &rank->combine);
}

static enum epd_status join(struct gpu_rank *rank)
{
    const struct epd_open_options open = {
        .size = sizeof open, .socket_path = rank->socket_path, .timeout_ms = 30000};
    const struct epd_group_options options = {.size = sizeof options,
                                              .name = rank->group_name,
                                              .world_size = rank->world,
                                              .rank = rank->rank,
                                              .n_experts = GPU_E,
                                              .top_k = GPU_K,
                                              .hidden = GPU_H,
                                              .max_tokens = GPU_T,
                                              .capacity_rows = rank->capacity_rows,
                                              .alignment = rank->alignment,
                                              .overflow = rank->overflow,
                                              .deadline_ms = rank->deadline_ms,
                                              .dtype = EPD_BF16};
    struct epd_group_info info = {.size = sizeof info};
    enter(rank, BOARD_OPEN);
    enum epd_status status = epd_open(&open, &rank->client);
    if (status == EPD_OK)
        status = epd_group_join(rank->client, &options, &rank->group);
    if (status == EPD_OK)
        status = epd_group_info(rank->group, &info);
    rank->n_recv_rows = info.capacity_rows;
    return status;
}

enum epd_status gpu_rank_try(struct gpu_rank *rank)
{
    gpu_rank_select(rank);
    GPU_MUST(cudaStreamCreateWithFlags(&rank->stream, cudaStreamNonBlocking) == cudaSuccess);
    GPU_MUST(cudaMallocHost((void **)&rank->x_host, X_BYTES) == cudaSuccess);
    GPU_MUST(cudaMallocHost((void **)&rank->out_host, X_BYTES) == cudaSuccess);
    enum epd_status status = join(rank);
    enter(rank, BOARD_MAKE);
    if (status == EPD_OK)
        status = make_buffers(rank);
    if (status == EPD_OK)
        status = gpu_rank_plan(rank);
    enter(rank, BOARD_OUTSIDE);
    if (status != EPD_OK) {
        fprintf(stderr, "rank %u of %s: %s: %s\n", rank->rank, rank->group_name, epd_status_name(status),
                epd_error_text());
        gpu_rank_close(rank);
    }
    return status;
}

void gpu_rank_open(struct gpu_rank *rank)
{
    GPU_MUST(gpu_rank_try(rank) == EPD_OK);
}

void gpu_rank_close(struct gpu_rank *rank)
{
    enter(rank, BOARD_CLOSE);
    epd_close(rank->client);
    enter(rank, BOARD_OUTSIDE);
    rank->client = NULL;
    (void)cudaFree(rank->x);
    (void)cudaFree(rank->idx);
    (void)cudaFree(rank->recv_x);
    (void)cudaFree(rank->splits);
    (void)cudaFreeHost(rank->x_host);
    (void)cudaFreeHost(rank->out_host);
    (void)cudaStreamDestroy(rank->stream);
    rank->x = rank->idx = rank->recv_x = rank->splits = NULL;
}

/* ---- steps ---- */

void gpu_put(void *to, const void *from, size_t bytes)
{
    GPU_MUST(cudaMemcpy(to, from, bytes, cudaMemcpyHostToDevice) == cudaSuccess &&
             cudaStreamSynchronize(cudaStreamLegacy) == cudaSuccess);
}

void gpu_rank_route(struct gpu_rank *rank, int bad_token)
{
    int idx[GPU_T * GPU_K];
    for (int token = 0; token < GPU_T; token++) {
        idx[token * GPU_K] = (int)((unsigned)token + rank->rank) % GPU_E;
        idx[token * GPU_K + 1] = (int)((unsigned)token + rank->rank + 1) % GPU_E;
    }
    if (bad_token >= 0)
        idx[bad_token * GPU_K] = GPU_E;
    gpu_put(rank->idx, idx, sizeof idx);
}

static int value_of(const struct gpu_rank *rank, unsigned i)
{
    return (int)((i * 7 + rank->n_steps * 13 + rank->rank * 5) % 61) - 30;
}

enum epd_status gpu_rank_launch(struct gpu_rank *rank)
{
    rank->n_steps++;
    for (unsigned i = 0; i < GPU_T * GPU_H; i++)
        rank->x_host[i] = gpu_bf16(value_of(rank, i));
    GPU_MUST(cudaMemcpyAsync(rank->x, rank->x_host, X_BYTES, cudaMemcpyHostToDevice, rank->stream) ==
             cudaSuccess);
    GPU_MUST(cudaMemsetAsync(rank->recv_x, 0xff, (size_t)rank->n_recv_rows * ROW_BYTES, rank->stream) ==
             cudaSuccess);
    GPU_MUST(cudaMemsetAsync(rank->out, 0xff, X_BYTES, rank->stream) == cudaSuccess);
    enter(rank, BOARD_LAUNCH);
    enum epd_status status = epd_plan_launch(rank->dispatch, rank->stream);
    if (status == EPD_OK)
        status = epd_plan_launch(rank->combine, rank->stream);
    enter(rank, BOARD_OUTSIDE);
    GPU_MUST(cudaMemcpyAsync(rank->out_host, rank->out, X_BYTES, cudaMemcpyDeviceToHost, rank->stream) ==
             cudaSuccess);
    return status;
}

static void check_result(const struct gpu_rank *rank)
{
    for (unsigned i = 0; i < GPU_T * GPU_H; i++) {
        const unsigned short want = gpu_bf16(2 * value_of(rank, i));
        if (rank->out_host[i] == want)
            continue;
        fprintf(stderr, "rank %u step %u: EPD_OK, and element %u is %04x, want %04x\n", rank->rank,
                rank->n_steps, i, rank->out_host[i], want);
        exit(2);
    }
}

static void synchronize(struct gpu_rank *rank)
{
    enter(rank, BOARD_STREAM);
    GPU_MUST(cudaStreamSynchronize(rank->stream) == cudaSuccess);
    enter(rank, BOARD_OUTSIDE);
}

enum epd_status gpu_rank_wait(struct gpu_rank *rank)
{
    synchronize(rank);
    enter(rank, BOARD_WAIT);
    const enum epd_status first = epd_plan_wait(rank->dispatch, 0), second = epd_plan_wait(rank->combine, 0);
    enter(rank, BOARD_OUTSIDE);
    if (first == EPD_OK && second == EPD_OK)
        check_result(rank);
    return first ? first : second;
}

enum epd_status gpu_rank_step(struct gpu_rank *rank)
{
    enum epd_status launched = gpu_rank_launch(rank), ended;
    if (launched == EPD_OK)
        return gpu_rank_wait(rank);
    /* The first of the two may have been launched. */
    synchronize(rank);
    enter(rank, BOARD_WAIT);
    ended = epd_plan_wait(rank->dispatch, 0);
    enter(rank, BOARD_OUTSIDE);
    return ended ? ended : launched;
}

enum epd_status gpu_rank_counted_step(struct gpu_rank *rank)
{
    enum epd_status status = gpu_rank_step(rank);
    if (status == EPD_OK)
        atomic_fetch_add(&rank->own->n_good, 1);
    else
        atomic_fetch_add(&rank->own->n_ended[status], 1);
    return status;
}
