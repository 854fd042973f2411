#include "tests/gpu/exchange/cluster.h"

#include <string.h>
#include <time.h>

int device_count(void)
{
    int n = 0;
    return cudaGetDeviceCount(&n) == cudaSuccess ? n : 0;
}

void devices_start(void)
{
    int n = device_count();
    struct epd_error error;
    for (int device = 0; device < n; device++) {
        MUST(cudaSetDevice(device));
        for (int peer = 0; peer < n; peer++)
            if (peer != device)
                MUST(cudaDeviceEnablePeerAccess(peer, 0));
        if (cuda_kernels_load(&error) != EPD_OK) {
            fprintf(stderr, "cuda_kernels_load: %s\n", error.text);
            exit(1);
        }
    }
}

struct exchange_shape shape_of_rank(const struct problem *problem, uint32_t rank)
{
    return (struct exchange_shape){
        .world_size = problem->n_ranks,
        .rank = rank,
        .n_experts = problem->n_experts,
        .n_local_experts = problem->n_experts / problem->n_ranks,
        .top_k = problem->top_k,
        .hidden = problem->hidden,
        .max_tokens = problem->max_tokens,
        .alignment = problem->alignment,
        .capacity_rows = problem->capacity_rows,
        .n_tokens = problem->n_tokens[rank],
    };
}

struct tensor tensor_of(void *data, enum epd_dtype dtype, int64_t rows, int64_t columns)
{
    return (struct tensor){.data = data, .dtype = dtype, .n_dims = 2, .shape = {rows, columns, 1}};
}

void *device_bytes(struct device_memory *memory, size_t bytes)
{
    void *data;
    MUST(cudaMalloc(&data, bytes ? bytes : 16));
    MUST(cudaMemset(data, 0xff, bytes ? bytes : 16));
    memory->allocations[memory->n_allocations++] = data;
    return data;
}

void device_memory_free(struct device_memory *memory)
{
    for (int i = 0; i < memory->n_allocations; i++)
        MUST(cudaFree(memory->allocations[i]));
}

struct routing device_routing(struct device_memory *memory, const struct problem *problem)
{
    const size_t slots = (size_t)problem->max_tokens * problem->top_k,
                 n_local = problem->n_experts / problem->n_ranks, rows = (size_t)problem->capacity_rows;
    return (struct routing){
        .expert = device_bytes(memory, slots * 4),
        .row = device_bytes(memory, slots * 4),
        .counts = device_bytes(memory, (size_t)problem->n_ranks * problem->n_experts * 4),
        .source = device_bytes(memory, rows * 4),
        .m_splits = device_bytes(memory, n_local * 8),
        .offsets = device_bytes(memory, (n_local + 1) * 8),
        .needed_rows = device_bytes(memory, 8),
        .dropped_rows = device_bytes(memory, 8),
    };
}

static void rank_open(struct cluster *cluster, uint32_t rank)
{
    const struct problem *p = &cluster->problem;
    struct rank_memory *m = &cluster->ranks[rank];
    struct device_memory *memory = &cluster->memory;
    size_t slots = (size_t)p->max_tokens * p->top_k, row_bytes = p->hidden * dtype_bytes(p->dtype);
    size_t rows = (size_t)p->capacity_rows;
    m->device = (int)rank % device_count();
    MUST(cudaSetDevice(m->device));
    MUST(cudaStreamCreateWithFlags(&m->stream, cudaStreamNonBlocking));
    MUST(cudaStreamCreateWithFlags(&m->abort_stream, cudaStreamNonBlocking));
    MUST(cudaHostAlloc((void **)&m->one, sizeof(*m->one), cudaHostAllocDefault));
    *m->one = 1;
    m->abort_word = device_bytes(memory, sizeof(*m->abort_word));
    m->workspace = device_bytes(memory, cluster->layout.bytes);
    m->routing = (struct cuda_routing){
        .base = device_routing(memory, p),
        .slot_row = device_bytes(memory, p->n_ranks * slots * 4),
        .slot_weight = device_bytes(memory, p->n_ranks * slots * 4),
        .slot_tokens = device_bytes(memory, p->n_ranks * 4),
    };
    m->topk_idx = device_bytes(memory, slots * 8);
    m->topk_weights = device_bytes(memory, slots * 4);
    m->d_weights = device_bytes(memory, slots * 4);
    m->recv_weights = device_bytes(memory, rows * 4);
    m->dot = device_bytes(memory, rows * cuda_row_pieces(row_bytes) * 4);
    m->x = device_bytes(memory, p->max_tokens * row_bytes);
    m->out = device_bytes(memory, p->max_tokens * row_bytes);
    m->dout = device_bytes(memory, p->max_tokens * row_bytes);
    m->recv_x = device_bytes(memory, rows * row_bytes);
    m->y = device_bytes(memory, rows * row_bytes);
    m->dy = device_bytes(memory, rows * row_bytes);
    m->error = device_bytes(memory, sizeof(*m->error));
}

static struct exchange_shape shape_of(const struct cluster *cluster, uint32_t rank)
{
    struct exchange_shape shape = shape_of_rank(&cluster->problem, rank);
    shape.max_blocks = cluster->max_blocks;
    return shape;
}

void cluster_open(struct cluster *cluster, const struct problem *problem)
{
    *cluster = (struct cluster){.problem = *problem};
    struct exchange_shape shape = shape_of(cluster, 0);
    cuda_workspace_layout(&shape, problem->hidden * dtype_bytes(problem->dtype), &cluster->layout);
    for (uint32_t rank = 0; rank < problem->n_ranks; rank++)
        rank_open(cluster, rank);
    cluster_reset(cluster);
}

void cluster_close(struct cluster *cluster)
{
    device_memory_free(&cluster->memory);
    for (uint32_t rank = 0; rank < cluster->problem.n_ranks; rank++)
        MUST(cudaStreamDestroy(cluster->ranks[rank].stream));
    for (uint32_t rank = 0; rank < cluster->problem.n_ranks; rank++) {
        MUST(cudaStreamDestroy(cluster->ranks[rank].abort_stream));
        MUST(cudaFreeHost(cluster->ranks[rank].one));
    }
}

void cluster_reset(struct cluster *cluster)
{
    struct epd_error error;
    for (uint32_t rank = 0; rank < cluster->problem.n_ranks; rank++) {
        struct rank_memory *m = &cluster->ranks[rank];
        MUST(cudaSetDevice(m->device));
        MUST(cudaMemsetAsync(m->abort_word, 0, sizeof(*m->abort_word), m->stream));
        if (cuda_workspace_reset_launch(&cluster->layout, m->workspace, m->stream, &error) != EPD_OK)
            exit(1);
        MUST(cudaStreamSynchronize(m->stream));
    }
}

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

/* While kernels wait, the copy engine still gets through. */
static void cluster_abort(struct cluster *cluster)
{
    for (uint32_t rank = 0; rank < cluster->problem.n_ranks; rank++) {
        struct rank_memory *m = &cluster->ranks[rank];
        MUST(cudaSetDevice(m->device));
        MUST(cudaMemcpyAsync(m->abort_word, m->one, sizeof(*m->abort_word), cudaMemcpyHostToDevice,
                             m->abort_stream));
    }
    for (uint32_t rank = 0; rank < cluster->problem.n_ranks; rank++)
        MUST(cudaStreamSynchronize(cluster->ranks[rank].stream));
    cluster_reset(cluster);
}

int cluster_wait(struct cluster *cluster, double seconds)
{
    double deadline = now() + seconds;
    for (uint32_t rank = 0; rank < cluster->problem.n_ranks; rank++) {
        for (;;) {
            cudaError_t code = cudaStreamQuery(cluster->ranks[rank].stream);
            if (code == cudaSuccess)
                break;
            if (code != cudaErrorNotReady)
                MUST(code);
            if (now() < deadline)
                continue;
            cluster_abort(cluster);
            return 0;
        }
    }
    return 1;
}

static struct cuda_exchange exchange_of(const struct cluster *cluster, uint32_t rank, enum cuda_stage stage)
{
    struct cuda_exchange x = {
        .shape = shape_of(cluster, rank),
        .layout = cluster->layout,
        .abort_word = cluster->ranks[rank].abort_word,
        .stage = stage,
        .send_blocks = cluster->send_blocks,
    };
    for (uint32_t i = 0; i < cluster->problem.n_ranks; i++)
        x.workspace[i] = cluster->ranks[i].workspace;
    return x;
}

enum epd_status launch_dispatch(struct cluster *cluster, uint32_t rank, enum cuda_stage stage,
                                const void *what, struct epd_error *error)
{
    const struct op_dispatch *op = what;
    const struct problem *p = &cluster->problem;
    struct rank_memory *m = &cluster->ranks[rank];
    int64_t n = p->n_tokens[rank];
    struct cuda_dispatch_args args = {
        .exchange = exchange_of(cluster, rank, stage),
        .routing = m->routing,
        .route = op->route,
        .scaled = op->scaled,
        .topk_idx = tensor_of(m->topk_idx, p->idx_dtype, n, p->top_k),
        .topk_weights = tensor_of(op->weights ? m->topk_weights : NULL, EPD_F32, n, p->top_k),
        .x = tensor_of(op->bwd ? m->dout : m->x, p->dtype, n, p->hidden),
        .recv_x = op->no_rows ? NULL
                  : op->bwd   ? m->dy
                              : m->recv_x,
        .recv_weights = op->bwd ? NULL : m->recv_weights,
        .dot_with = op->dot ? m->y : NULL,
        .dot = op->dot ? m->dot : NULL,
        .error = m->error,
    };
    return cuda_dispatch_launch(&args, m->stream, error);
}

enum epd_status launch_combine(struct cluster *cluster, uint32_t rank, enum cuda_stage stage,
                               const void *what, struct epd_error *error)
{
    const struct op_combine *op = what;
    const struct problem *p = &cluster->problem;
    struct rank_memory *m = &cluster->ranks[rank];
    int64_t n = p->n_tokens[rank];
    struct cuda_combine_args args = {
        .exchange = exchange_of(cluster, rank, stage),
        .routing = m->routing,
        .saved_weights = op->saved_weights,
        .topk_weights = tensor_of(op->weights ? m->topk_weights : NULL, EPD_F32, n, p->top_k),
        .y = m->y,
        .out = tensor_of(m->out, p->dtype, n, p->hidden),
    };
    return cuda_combine_launch(&args, m->stream, error);
}

enum epd_status launch_gather(struct cluster *cluster, uint32_t rank, enum cuda_stage stage, const void *what,
                              struct epd_error *error)
{
    const struct op_gather *op = what;
    const struct problem *p = &cluster->problem;
    struct rank_memory *m = &cluster->ranks[rank];
    struct cuda_gather_scalars_args args = {
        .exchange = exchange_of(cluster, rank, stage),
        .routing = m->routing,
        .value = m->dot,
        .n_parts = cuda_row_pieces(p->hidden * dtype_bytes(p->dtype)),
        .accumulate = op->accumulate,
        .out = m->d_weights,
    };
    return cuda_gather_scalars_launch(&args, m->stream, error);
}

int stages_of(launch_function launch, const void *what, enum cuda_stage stages[CLUSTER_MAX_PARTS])
{
    int n = 0;
    if (launch == launch_combine && ((const struct op_combine *)what)->weights)
        stages[n++] = CUDA_STAGE_PUBLISH;
    stages[n++] = CUDA_STAGE_SEND;
    if (launch == launch_dispatch && ((const struct op_dispatch *)what)->route)
        stages[n++] = CUDA_STAGE_LAYOUT;
    stages[n++] = CUDA_STAGE_RECEIVE;
    return n;
}

int cluster_run(struct cluster *cluster, launch_function launch, const void *what, int fused)
{
    enum cuda_stage stages[CLUSTER_MAX_PARTS] = {CUDA_STAGE_ALL};
    int n = fused ? 1 : stages_of(launch, what, stages);
    for (int i = 0; i < n; i++) {
        for (uint32_t rank = 0; rank < cluster->problem.n_ranks; rank++) {
            struct epd_error error;
            MUST(cudaSetDevice(cluster->ranks[rank].device));
            if (launch(cluster, rank, stages[i], what, &error) != EPD_OK) {
                fprintf(stderr, "launch: %s\n", error.text);
                exit(1);
            }
        }
        if (!cluster_wait(cluster, fused ? 5.0 : 60.0))
            return 0;
    }
    return 1;
}

void download(void *to, const void *from, size_t bytes)
{
    MUST(cudaMemcpy(to, from, bytes, cudaMemcpyDefault));
}

void upload(void *to, const void *from, size_t bytes)
{
    MUST(cudaMemcpy(to, from, bytes, cudaMemcpyDefault));
}
