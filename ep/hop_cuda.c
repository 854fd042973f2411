#include "ep/hop_cuda.h"

#include <string.h>

#include "ep/cuda_exchange.h"
#include "kernels/cuda/hop.h"

/* Parts of a frame that cross together: from `begin` to `end`. */
struct span {
    size_t begin, end;
};

static uint32_t ranks_per_node(const struct exchange_shape *shape)
{
    return shape->world_size / shape->n_nodes;
}

static uint32_t first_rank(const struct exchange_shape *shape)
{
    return shape->rank / ranks_per_node(shape) * ranks_per_node(shape);
}

static uint64_t n_choices(const struct exchange_shape *shape)
{
    return (uint64_t)shape->max_tokens * shape->top_k;
}

/* The exchange of one set, as the ranks of this node see it. */
static struct exchange_shape set_shape(const struct exchange_shape *shape)
{
    struct exchange_shape set = *shape;
    set.world_size = ranks_per_node(shape);
    set.rank = shape->rank % set.world_size;
    set.n_experts = shape->n_experts / shape->n_nodes;
    set.n_nodes = 1;
    return set;
}

/* ---- memory ---- */

void hop_cuda_carve_routing(struct hop_cuda_routing *routing, const struct exchange_shape *shape,
                            struct layout *layout)
{
    const uint64_t n = shape->n_nodes * n_choices(shape);
    routing->expert = layout_take(layout, n * sizeof *routing->expert);
    routing->row = layout_take(layout, n * sizeof *routing->row);
    routing->place =
        layout_take(layout, (uint64_t)shape->n_nodes * shape->max_tokens * sizeof *routing->place);
}

void hop_cuda_carve_frames(struct hop_cuda_frames *frames, const struct exchange_shape *shape,
                           uint64_t row_bytes, struct layout *layout)
{
    const struct exchange_shape set = set_shape(shape);
    struct cuda_hop_frame frame;
    cuda_hop_frame_layout(shape, row_bytes, &frame);
    frames->out = layout_take(layout, (shape->n_nodes - 1) * frame.bytes);
    frames->in = layout_take(layout, (shape->n_nodes - 1) * frame.bytes);
    frames->unused = layout_take(layout, (uint64_t)set.world_size * set.n_experts * sizeof *frames->unused);
}

/* ---- sets ---- */

/* What the kernels at the rail's end need. */
static struct cuda_hop hop_of(const struct hop_cuda *hop, const struct exchange_args *args)
{
    struct cuda_hop kernels = {
        .shape = args->shape,
        .node = args->shape.rank / ranks_per_node(&args->shape),
        .row_bytes = hop->row_bytes,
        .out = hop->frames.out,
        .in = hop->frames.in,
        .expert = args->routing.expert,
        .place = hop->routing.place,
    };
    cuda_hop_frame_layout(&args->shape, hop->row_bytes, &kernels.frame);
    return kernels;
}

static char *frame_of(const struct cuda_hop *kernels, char *frames, uint32_t node)
{
    return frames + (node - (node > kernels->node ? 1u : 0u)) * kernels->frame.bytes;
}

/* A set of another node: its tensors are in the frame that came from there, as large as they can be. */
static void args_of_frame(struct exchange_args *set, const struct cuda_hop *kernels, uint32_t node)
{
    char *frame = frame_of(kernels, kernels->in, node);
    const int64_t n_tokens = kernels->shape.max_tokens;
    set->shape.n_tokens = kernels->shape.max_tokens;
    set->splits_out = NULL;
    set->offsets_out = NULL;
    set->x.data = set->out.data = frame + kernels->frame.rows;
    set->x.shape[0] = set->out.shape[0] = n_tokens;
    if (set->topk_weights.n_dims) {
        set->topk_weights.data = frame + kernels->frame.weights;
        set->topk_weights.shape[0] = n_tokens;
    }
    set->scalars = (float *)(frame + kernels->frame.experts);
}

/* Arrays by rank begin with the first one of this node. */
static void args_take_ranks(struct exchange_args *set, const struct exchange_args *args,
                            uint64_t workspace_at)
{
    const uint32_t first = first_rank(&args->shape);
    for (uint32_t i = 0; i < set->shape.world_size; i++) {
        set->workspace[i] = (char *)args->workspace[first + i] + workspace_at;
        set->recv_x[i] = args->recv_x[first + i];
        set->recv_weights[i] = args->recv_weights[first + i];
        set->y[i] = args->y[first + i];
        set->value[i] = args->value[first + i];
    }
}

static struct exchange_args args_of_set(const struct hop_cuda *hop, const struct cuda_hop *kernels,
                                        const struct exchange_args *args, uint32_t node)
{
    const struct exchange_shape *shape = &args->shape;
    const uint64_t choices = node * n_choices(shape);
    struct exchange_sizes sizes;
    struct exchange_args set = *args;
    set.shape = set_shape(shape);
    cuda_exchange_sizes(&set.shape, kernels->row_bytes, &sizes);
    set.set = (struct exchange_set){.idx = node,
                                    .n_more = shape->n_nodes - 1,
                                    .bytes = sizes.workspace_bytes,
                                    .first_rank = first_rank(shape)};
    args_take_ranks(&set, args, node * sizes.workspace_bytes);
    set.routing.expert = hop->routing.expert + choices;
    set.routing.row = hop->routing.row + choices;
    set.routing.counts = hop->frames.unused;
    set.slots.row = args->slots.row + choices * set.shape.world_size;
    if (set.slots.weight)
        set.slots.weight = args->slots.weight + choices * set.shape.world_size;
    set.slots.tokens = args->slots.tokens + node * set.shape.world_size;
    if (set.slots.sent)
        set.slots.sent = args->slots.sent + (uint64_t)node * shape->world_size + set.set.first_rank;
    if (node != kernels->node)
        args_of_frame(&set, kernels, node);
    set.topk_idx = (struct tensor){.data = set.routing.expert,
                                   .dtype = EPD_I32,
                                   .n_dims = 2,
                                   .shape = {set.shape.n_tokens, shape->top_k}};
    return set;
}

/* One stage of every set, in the order of the nodes. */
static enum epd_status launch_sets(const struct hop_cuda *hop, const struct cuda_hop *kernels,
                                   enum exchange_op op, uint32_t stage, const struct exchange_args *args,
                                   struct CUstream_st *stream, struct epd_error *error)
{
    for (uint32_t node = 0; node < args->shape.n_nodes && !hop->off; node++) {
        const struct exchange_args set = args_of_set(hop, kernels, args, node);
        if (cuda_exchange_launch(op, stage, &set, stream, error))
            return error->status;
    }
    return EPD_OK;
}

/* ---- the rail ---- */

/* The same part of every frame. back: what lies in the frames that came in goes out, into those that had gone out. */
static enum epd_status swap_span(const struct hop_cuda *hop, const struct cuda_hop *kernels, int back,
                                 struct span span, struct CUstream_st *stream, struct epd_error *error)
{
    struct transport_move moves[EPD_MAX_NODES] = {{NULL, 0, NULL, 0}};
    const uint64_t bytes = span.end - span.begin;
    for (uint32_t node = 0; node < kernels->shape.n_nodes; node++) {
        if (node == kernels->node)
            continue;
        char *out = frame_of(kernels, kernels->out, node) + span.begin,
             *in = frame_of(kernels, kernels->in, node) + span.begin;
        moves[node] = (struct transport_move){
            .send = back ? in : out, .send_bytes = bytes, .receive = back ? out : in, .receive_bytes = bytes};
    }
    return hop->swap(hop->swap_arg, moves, stream, error);
}

static struct span rows_span(const struct cuda_hop *kernels)
{
    return (struct span){kernels->frame.rows, kernels->frame.bytes};
}

static struct span scalars_span(const struct cuda_hop *kernels)
{
    return (struct span){kernels->frame.experts, kernels->frame.weights};
}

/* Tokens, weights or both of a routing that the other nodes know; NULL: not wanted. */
static enum epd_status cross_known(const struct hop_cuda *hop, const struct cuda_hop *kernels, const void *x,
                                   const struct tensor *weights, struct CUstream_st *stream,
                                   struct epd_error *error)
{
    const struct cuda_hop_pack_args pack = {
        .hop = *kernels, .weights = weights ? weights->data : NULL, .x = x};
    const struct cuda_hop_frame *frame = &kernels->frame;
    const struct span span = {weights ? frame->weights : frame->rows, x ? frame->bytes : frame->rows};
    if (!hop->off && cuda_hop_pack_launch(&pack, stream, error))
        return error->status;
    return swap_span(hop, kernels, 0, span, stream, error);
}

/* A rank without tokens may have no memory for them. */
static const void *x_of(const struct cuda_hop *kernels, const struct exchange_args *args)
{
    return args->x.data ? args->x.data : kernels->in;
}

/* ---- ops ---- */

static void counts_here(const struct exchange_args *args, int32_t **counts)
{
    memcpy(counts, args->counts + first_rank(&args->shape), ranks_per_node(&args->shape) * sizeof *counts);
}

static enum epd_status choose_and_cross(const struct hop_cuda *hop, const struct cuda_hop *kernels,
                                        const struct exchange_args *args, struct CUstream_st *stream,
                                        struct epd_error *error)
{
    struct cuda_hop_choose_args choose = {
        .hop = *kernels,
        .topk_idx = args->topk_idx,
        .expert = args->routing.expert,
        .place = hop->routing.place,
        .expert_here = hop->routing.expert + kernels->node * n_choices(&args->shape),
        .sent_tokens =
            args->slots.sent ? args->slots.sent + (uint64_t)kernels->node * args->shape.world_size : NULL,
        .error = args->route_error};
    const struct cuda_hop_pack_args pack = {
        .hop = *kernels, .experts = 1, .weights = args->topk_weights.data, .x = args->x.data};
    struct cuda_hop_take_args take = {
        .hop = *kernels, .experts_here = hop->routing.expert, .error = args->route_error};
    counts_here(args, choose.counts);
    counts_here(args, take.counts);
    if (!hop->off &&
        (cuda_hop_choose_launch(&choose, stream, error) || cuda_hop_pack_launch(&pack, stream, error)))
        return error->status;
    if (swap_span(hop, kernels, 0, (struct span){0, kernels->frame.bytes}, stream, error))
        return error->status;
    return hop->off ? EPD_OK : cuda_hop_take_launch(&take, stream, error);
}

static enum epd_status route_dispatch(const struct hop_cuda *hop, uint32_t stage,
                                      const struct exchange_args *args, struct CUstream_st *stream,
                                      struct epd_error *error)
{
    const struct cuda_hop kernels = hop_of(hop, args);
    if (stage == 0 && choose_and_cross(hop, &kernels, args, stream, error))
        return error->status;
    return launch_sets(hop, &kernels, EXCHANGE_ROUTE_DISPATCH, stage, args, stream, error);
}

static enum epd_status dispatch(const struct hop_cuda *hop, uint32_t stage, const struct exchange_args *args,
                                struct CUstream_st *stream, struct epd_error *error)
{
    const struct cuda_hop kernels = hop_of(hop, args);
    const struct tensor *weights = args->topk_weights.n_dims ? &args->topk_weights : NULL;
    if (stage == 0 && cross_known(hop, &kernels, x_of(&kernels, args), weights, stream, error))
        return error->status;
    return launch_sets(hop, &kernels, EXCHANGE_DISPATCH, stage, args, stream, error);
}

static enum epd_status combine(const struct hop_cuda *hop, uint32_t stage, const struct exchange_args *args,
                               struct CUstream_st *stream, struct epd_error *error)
{
    const struct cuda_hop kernels = hop_of(hop, args);
    const struct cuda_hop_finish_args finish = {.hop = kernels, .out = args->out};
    const int new_weights = args->topk_weights.n_dims && !args->weights_kept;
    if (stage == 0 && new_weights && cross_known(hop, &kernels, NULL, &args->topk_weights, stream, error))
        return error->status;
    if (launch_sets(hop, &kernels, EXCHANGE_COMBINE, stage, args, stream, error))
        return error->status;
    if (stage + 1 < CUDA_COMBINE_STAGES)
        return EPD_OK;
    if (swap_span(hop, &kernels, 1, rows_span(&kernels), stream, error))
        return error->status;
    return hop->off ? EPD_OK : cuda_hop_finish_launch(&finish, stream, error);
}

/* Behind the last stage: each token's numbers go to its rank. */
static enum epd_status scalars_back(const struct hop_cuda *hop, const struct cuda_hop *kernels,
                                    const struct exchange_args *args, struct CUstream_st *stream,
                                    struct epd_error *error)
{
    const struct cuda_hop_collect_args collect = {.hop = *kernels, .scalars = args->scalars};
    if (swap_span(hop, kernels, 1, scalars_span(kernels), stream, error))
        return error->status;
    return hop->off ? EPD_OK : cuda_hop_collect_launch(&collect, stream, error);
}

static enum epd_status gather_scalars(const struct hop_cuda *hop, uint32_t stage,
                                      const struct exchange_args *args, struct CUstream_st *stream,
                                      struct epd_error *error)
{
    const struct cuda_hop kernels = hop_of(hop, args);
    if (launch_sets(hop, &kernels, EXCHANGE_GATHER_SCALARS, stage, args, stream, error))
        return error->status;
    return stage + 1 < CUDA_GATHER_STAGES ? EPD_OK : scalars_back(hop, &kernels, args, stream, error);
}

static enum epd_status weight_grad(const struct hop_cuda *hop, uint32_t stage,
                                   const struct exchange_args *args, struct CUstream_st *stream,
                                   struct epd_error *error)
{
    const struct cuda_hop kernels = hop_of(hop, args);
    const struct tensor *weights = args->topk_weights.n_dims ? &args->topk_weights : NULL;
    if (stage == 0 && cross_known(hop, &kernels, x_of(&kernels, args), weights, stream, error))
        return error->status;
    if (launch_sets(hop, &kernels, EXCHANGE_WEIGHT_GRAD, stage, args, stream, error))
        return error->status;
    return stage + 1 < CUDA_WEIGHT_GRAD_STAGES ? EPD_OK : scalars_back(hop, &kernels, args, stream, error);
}

enum epd_status hop_cuda_launch(const struct hop_cuda *hop, enum exchange_op op, uint32_t stage,
                                const struct exchange_args *args, struct CUstream_st *stream,
                                struct epd_error *error)
{
    switch (op) {
    case EXCHANGE_ROUTE_DISPATCH:
        return route_dispatch(hop, stage, args, stream, error);
    case EXCHANGE_DISPATCH:
        return dispatch(hop, stage, args, stream, error);
    case EXCHANGE_COMBINE:
        return combine(hop, stage, args, stream, error);
    case EXCHANGE_GATHER_SCALARS:
        return gather_scalars(hop, stage, args, stream, error);
    case EXCHANGE_WEIGHT_GRAD:
        return weight_grad(hop, stage, args, stream, error);
    case EXCHANGE_OP_COUNT:
        break;
    }
    return error_set(error, EPD_INTERNAL, "exchange op %d is unknown", (int)op);
}
