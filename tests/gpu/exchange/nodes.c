#include "tests/gpu/exchange/nodes.h"

#include <string.h>

#include "kernels/cuda/hop.h"

static struct exchange_shape shape_of(const struct nodes *nodes, uint32_t rank)
{
    struct exchange_shape shape = shape_of_rank(&nodes->problem, rank);
    shape.max_blocks = nodes->max_blocks;
    shape.n_nodes = nodes->n_nodes;
    return shape;
}

/* ---- the rail ---- */

static struct node_rank *rail_peer(struct node_rank *self, uint32_t node)
{
    uint32_t n_here = self->nodes->problem.n_ranks / self->nodes->n_nodes;
    return &self->nodes->ranks[node * n_here + self->rank % n_here];
}

static uint32_t node_of(const struct node_rank *self)
{
    return self->rank / (self->nodes->problem.n_ranks / self->nodes->n_nodes);
}

/* After the copy: what a broken rail, or a node that lies, may leave. */
static void spoil(struct node_rank *self, const struct transport_move *move)
{
    struct exchange_shape shape = shape_of(self->nodes, self->rank);
    struct cuda_hop_frame frame;
    cuda_hop_frame_layout(&shape, self->hop.row_bytes, &frame);
    if (self->nodes->rail_mode == RAIL_VOID)
        MUST(cudaMemsetAsync(move->receive, 0xff, move->receive_bytes, self->stream));
    else if (move->receive_bytes == frame.bytes)
        MUST(cudaMemcpyAsync((char *)move->receive + frame.counts, self->nodes->lies,
                             frame.weights - frame.counts, cudaMemcpyDefault, self->stream));
}

static enum epd_status take_from(struct node_rank *self, uint32_t part, uint32_t node,
                                 struct epd_error *error)
{
    struct node_rank *peer = rail_peer(self, node);
    const uint32_t n_nodes = self->nodes->n_nodes;
    const struct transport_move *move = &self->moves[part * n_nodes + node],
                                *theirs = &peer->moves[part * n_nodes + node_of(self)];
    if (theirs->send_bytes != move->receive_bytes)
        return error_set(error, EPD_INTERNAL, "rail: node %u sends %llu bytes, node %u takes %llu", node,
                         (unsigned long long)theirs->send_bytes, node_of(self),
                         (unsigned long long)move->receive_bytes);
    MUST(cudaStreamWaitEvent(self->stream, peer->ready, 0));
    MUST(cudaMemcpyAsync(move->receive, theirs->send, move->receive_bytes, cudaMemcpyDefault, self->stream));
    return EPD_OK;
}

static enum epd_status swap(void *arg, const struct transport_move *moves, uint32_t n_parts,
                            struct CUstream_st *stream, struct epd_error *error)
{
    struct node_rank *self = arg;
    struct nodes *nodes = self->nodes;
    enum epd_status status = EPD_OK;
    if (n_parts > NODES_MAX_PARTS)
        return error_set(error, EPD_INTERNAL, "rail: %u parts", n_parts);
    memcpy(self->moves, moves, n_parts * nodes->n_nodes * sizeof *moves);
    MUST(cudaEventRecord(self->ready, stream));
    pthread_barrier_wait(&nodes->barrier);
    for (uint32_t part = 0; part < n_parts; part++)
        for (uint32_t node = 0; node < nodes->n_nodes; node++)
            if (node != node_of(self) && take_from(self, part, node, error))
                status = error->status;
    uint32_t first_other = node_of(self) == 0 ? 1 : 0;
    MUST(cudaEventRecord(self->done, stream));
    if (nodes->rail_mode != RAIL_TRUE)
        spoil(self, &moves[first_other]);
    pthread_barrier_wait(&nodes->barrier);
    for (uint32_t node = 0; node < nodes->n_nodes; node++)
        if (node != node_of(self))
            MUST(cudaStreamWaitEvent(stream, rail_peer(self, node)->done, 0));
    return status;
}

/* ---- memory ---- */

static void open_hop(struct nodes *nodes, struct node_rank *m, uint64_t row_bytes)
{
    struct exchange_shape shape = shape_of(nodes, m->rank);
    struct layout routing = {.base = NULL}, frames = {.base = NULL};
    if (nodes->n_nodes == 1)
        return;
    m->hop = (struct hop_cuda){
        .row_bytes = (uint32_t)row_bytes, .limit = nodes->problem.max_tokens, .swap = swap, .swap_arg = m};
    hop_cuda_carve_routing(&m->hop.routing, &shape, &routing);
    hop_cuda_carve_frames(&m->hop.frames, &shape, row_bytes, &frames);
    nodes->frames_bytes = frames.bytes;
    routing = (struct layout){.base = device_bytes(&nodes->memory, routing.bytes)};
    m->frames = device_bytes(&nodes->memory, frames.bytes);
    frames = (struct layout){.base = m->frames};
    hop_cuda_carve_routing(&m->hop.routing, &shape, &routing);
    hop_cuda_carve_frames(&m->hop.frames, &shape, row_bytes, &frames);
}

static void rank_open(struct nodes *nodes, uint32_t rank)
{
    const struct problem *p = &nodes->problem;
    struct node_rank *m = &nodes->ranks[rank];
    struct device_memory *memory = &nodes->memory;
    size_t slots = (size_t)p->max_tokens * p->top_k, n_local = p->n_experts / p->n_ranks;
    size_t row_bytes = p->hidden * dtype_bytes(p->dtype), rows = (size_t)p->capacity_rows;
    m->nodes = nodes;
    m->rank = rank;
    m->device = (int)rank % device_count();
    MUST(cudaSetDevice(m->device));
    MUST(cudaStreamCreateWithFlags(&m->stream, cudaStreamNonBlocking));
    MUST(cudaEventCreateWithFlags(&m->ready, cudaEventDisableTiming));
    MUST(cudaEventCreateWithFlags(&m->done, cudaEventDisableTiming));
    for (int i = 0; i < 2; i++)
        MUST(cudaEventCreateWithFlags(&m->met[i], cudaEventDisableTiming));
    MUST(cudaEventCreate(&m->begun));
    MUST(cudaEventCreate(&m->ended));
    m->workspace = device_bytes(memory, nodes->sizes.workspace_bytes);
    m->routing = device_routing(memory, p);
    m->slots = (struct exchange_slots){
        .row = device_bytes(memory, p->n_ranks * slots * 4),
        .weight = device_bytes(memory, p->n_ranks * slots * 4),
        .tokens = device_bytes(memory, p->n_ranks * 4),
        .sent = device_bytes(memory, nodes->n_nodes * p->n_ranks * 4),
    };
    m->splits = device_bytes(memory, n_local * 8);
    m->offsets = device_bytes(memory, (n_local + 1) * 8);
    m->topk_idx = device_bytes(memory, slots * 8);
    m->topk_weights = device_bytes(memory, slots * 4);
    m->d_weights = device_bytes(memory, slots * 4);
    m->recv_weights = device_bytes(memory, rows * 4);
    m->value = device_bytes(memory, rows * 4);
    m->dot = device_bytes(memory, nodes->sizes.dot_bytes);
    m->x = device_bytes(memory, p->max_tokens * row_bytes);
    m->out = device_bytes(memory, p->max_tokens * row_bytes);
    m->dout = device_bytes(memory, p->max_tokens * row_bytes);
    m->recv_x = device_bytes(memory, rows * row_bytes);
    m->y = device_bytes(memory, rows * row_bytes);
    m->dy = device_bytes(memory, rows * row_bytes);
    m->error = device_bytes(memory, sizeof *m->error);
    /* As a team does with fresh memory. */
    MUST(cudaMemset(m->workspace, 0, nodes->sizes.workspace_bytes));
    open_hop(nodes, m, row_bytes);
    MUST(cudaDeviceSynchronize());
}

void nodes_open(struct nodes *nodes, const struct problem *problem, uint32_t n_nodes)
{
    *nodes = (struct nodes){.problem = *problem, .n_nodes = n_nodes};
    struct exchange_shape shape = shape_of(nodes, 0);
    struct cuda_hop_frame frame;
    uint64_t row_bytes = problem->hidden * dtype_bytes(problem->dtype);
    cuda_exchange_sizes(&shape, row_bytes, &nodes->sizes);
    for (uint32_t rank = 0; rank < problem->n_ranks; rank++)
        rank_open(nodes, rank);
    cuda_hop_frame_layout(&shape, row_bytes, &frame);
    nodes->lies_bytes = frame.weights - frame.counts;
    MUST(cudaHostAlloc(&nodes->lies, nodes->lies_bytes, cudaHostAllocPortable));
    for (uint64_t i = 0; i < nodes->lies_bytes / 4; i++)
        ((int32_t *)nodes->lies)[i] = (int32_t)(i % 3 == 2 ? i * 2654435761u : i / 2 % problem->n_experts);
    pthread_barrier_init(&nodes->barrier, NULL, problem->n_ranks);
    MUST(cudaDeviceSynchronize());
}

void nodes_close(struct nodes *nodes)
{
    device_memory_free(&nodes->memory);
    for (uint32_t rank = 0; rank < nodes->problem.n_ranks; rank++) {
        MUST(cudaStreamDestroy(nodes->ranks[rank].stream));
        MUST(cudaEventDestroy(nodes->ranks[rank].ready));
        MUST(cudaEventDestroy(nodes->ranks[rank].done));
        for (int i = 0; i < 2; i++)
            MUST(cudaEventDestroy(nodes->ranks[rank].met[i]));
        MUST(cudaEventDestroy(nodes->ranks[rank].begun));
        MUST(cudaEventDestroy(nodes->ranks[rank].ended));
    }
    MUST(cudaFreeHost(nodes->lies));
    pthread_barrier_destroy(&nodes->barrier);
}

void nodes_poison(struct nodes *nodes)
{
    const struct problem *p = &nodes->problem;
    size_t row_bytes = p->hidden * dtype_bytes(p->dtype), rows = (size_t)p->capacity_rows;
    for (uint32_t rank = 0; rank < p->n_ranks; rank++) {
        struct node_rank *m = &nodes->ranks[rank];
        MUST(cudaSetDevice(m->device));
        MUST(cudaMemset(m->recv_x, 0xff, rows * row_bytes));
        MUST(cudaMemset(m->dy, 0xff, rows * row_bytes));
        MUST(cudaMemset(m->out, 0xff, p->max_tokens * row_bytes));
        MUST(cudaMemset(m->recv_weights, 0xff, rows * 4));
        MUST(cudaMemset(m->d_weights, 0xff, (size_t)p->max_tokens * p->top_k * 4));
        MUST(cudaMemset(m->dot, 0xff, nodes->sizes.dot_bytes));
        MUST(cudaMemset(m->error, 0, sizeof *m->error));
        MUST(cudaMemset(m->frames, 0xff, nodes->frames_bytes));
        MUST(cudaDeviceSynchronize());
    }
}

/* ---- ops ---- */

static void args_by_rank(const struct node_rank *self, const struct nodes_op *op, struct exchange_args *args)
{
    const uint32_t n_here = self->nodes->problem.n_ranks / self->nodes->n_nodes,
                   first = node_of(self) * n_here;
    for (uint32_t rank = first; rank < first + n_here; rank++) {
        struct node_rank *m = &self->nodes->ranks[rank];
        args->workspace[rank] = m->workspace;
        args->counts[rank] = m->routing.counts;
        args->recv_x[rank] = op->no_rows ? NULL : op->bwd ? m->dy : m->recv_x;
        args->recv_weights[rank] = op->bwd ? NULL : m->recv_weights;
        args->recv_source[rank] = m->routing.source;
        args->y[rank] = m->y;
        args->value[rank] = m->value;
    }
}

static struct exchange_args args_of(const struct node_rank *m, const struct nodes_op *op)
{
    const struct problem *p = &m->nodes->problem;
    const int64_t n = p->n_tokens[m->rank];
    struct exchange_args args = {.shape = shape_of(m->nodes, m->rank),
                                 .routing = m->routing,
                                 .slots = m->slots,
                                 .dot = m->dot,
                                 .topk_idx = tensor_of(m->topk_idx, p->idx_dtype, n, p->top_k),
                                 .route_error = m->error,
                                 .layout_error = m->error,
                                 .x = tensor_of(op->bwd ? m->dout : m->x, p->dtype, n, p->hidden),
                                 .weights_kept = op->weights_kept,
                                 .scaled = op->scaled,
                                 .splits_out = m->splits,
                                 .offsets_out = m->offsets,
                                 .out = tensor_of(m->out, p->dtype, n, p->hidden),
                                 .scalars = m->d_weights};
    if (op->weights)
        args.topk_weights = tensor_of(m->topk_weights, EPD_F32, n, p->top_k);
    args_by_rank(m, op, &args);
    return args;
}

struct rank_part {
    struct node_rank *rank;
    const struct nodes_op *op;
    uint32_t n_times;
};

/* The streams of the ranks of a node wait for each other, as its lanes make them; other nodes go their own way. */
static void meet(struct node_rank *m)
{
    const uint32_t n_here = m->nodes->problem.n_ranks / m->nodes->n_nodes, first = node_of(m) * n_here;
    const uint32_t turn = m->n_met++ % 2;
    MUST(cudaEventRecord(m->met[turn], m->stream));
    pthread_barrier_wait(&m->nodes->barrier);
    for (uint32_t rank = first; rank < first + n_here; rank++)
        if (rank != m->rank)
            MUST(cudaStreamWaitEvent(m->stream, m->nodes->ranks[rank].met[turn], 0));
}

/* What the host does before the second stage of an eager routing. */
static void learn(struct node_rank *m)
{
    const struct exchange_shape shape = shape_of(m->nodes, m->rank);
    struct cuda_hop_head sent[EPD_MAX_NODES], came[EPD_MAX_NODES];
    MUST(cudaStreamSynchronize(m->stream));
    for (uint32_t node = 0; node < m->nodes->n_nodes; node++) {
        struct cuda_hop_head *out, *in;
        if (node == node_of(m))
            continue;
        hop_cuda_heads(&m->hop.frames, &shape, m->hop.row_bytes, node, &out, &in);
        MUST(cudaMemcpy(&sent[node], out, sizeof *out, cudaMemcpyDefault));
        MUST(cudaMemcpy(&came[node], in, sizeof *in, cudaMemcpyDefault));
    }
    const int bad = hop_cuda_learn(&shape, sent, came, &m->counts);
    if (bad >= 0) {
        fprintf(stderr, "rank %u: the frame of node %d is none\n", m->rank, bad);
        exit(1);
    }
}

static void *run_rank(void *arg)
{
    static const uint32_t n_stages[EXCHANGE_OP_COUNT] = {CUDA_ROUTE_DISPATCH_STAGES, CUDA_DISPATCH_STAGES,
                                                         CUDA_COMBINE_STAGES, CUDA_GATHER_STAGES,
                                                         CUDA_WEIGHT_GRAD_STAGES};
    const struct rank_part *part = arg;
    struct node_rank *m = part->rank;
    const struct exchange_args args = args_of(m, part->op);
    MUST(cudaSetDevice(m->device));
    MUST(cudaEventRecord(m->begun, m->stream));
    const int learns = m->nodes->n_nodes > 1 && m->nodes->eager && part->op->op == EXCHANGE_ROUTE_DISPATCH;
    const uint32_t n = n_stages[part->op->op] + (learns ? 1u : 0u);
    m->hop.eager = m->nodes->eager;
    m->hop.counts = m->nodes->eager ? &m->counts : NULL;
    for (uint32_t i = 0; i < part->n_times * n; i++) {
        const uint32_t stage = i % n;
        struct epd_error error;
        if (learns && stage == 1)
            learn(m);
        if (m->nodes->n_nodes == 1
                ? cuda_exchange_launch(part->op->op, stage, &args, m->stream, &error)
                : hop_cuda_launch(&m->hop, part->op->op, stage, &args, m->stream, &error)) {
            fprintf(stderr, "rank %u stage %u: %s\n", m->rank, stage, error.text);
            exit(1); /* the other threads wait for it */
        }
        meet(m);
    }
    MUST(cudaEventRecord(m->ended, m->stream));
    MUST(cudaStreamSynchronize(m->stream));
    return NULL;
}

float nodes_run(struct nodes *nodes, const struct nodes_op *op, uint32_t n_times)
{
    pthread_t threads[CLUSTER_MAX_RANKS];
    struct rank_part parts[CLUSTER_MAX_RANKS];
    float slowest = 0.0f;
    for (uint32_t rank = 0; rank < nodes->problem.n_ranks; rank++) {
        parts[rank] = (struct rank_part){&nodes->ranks[rank], op, n_times};
        if (pthread_create(&threads[rank], NULL, run_rank, &parts[rank]))
            exit(1);
    }
    for (uint32_t rank = 0; rank < nodes->problem.n_ranks; rank++) {
        float ms;
        pthread_join(threads[rank], NULL);
        MUST(cudaEventElapsedTime(&ms, nodes->ranks[rank].begun, nodes->ranks[rank].ended));
        slowest = ms > slowest ? ms : slowest;
    }
    return slowest;
}
