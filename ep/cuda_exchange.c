#include "ep/cuda_exchange.h"

#include <string.h>

#include "kernels/cuda/cuda.h"

static uint64_t row_bytes_of(const struct exchange_args *args, const struct tensor *tensor)
{
    return args->shape.hidden * dtype_bytes(tensor->dtype);
}

void cuda_exchange_sizes(const struct exchange_shape *shape, uint64_t row_bytes, struct exchange_sizes *sizes)
{
    const uint32_t n_sets = shape->n_nodes > 1 ? shape->n_nodes : 1;
    struct exchange_shape set = *shape;
    struct cuda_workspace layout;
    set.world_size /= n_sets;
    set.n_experts /= n_sets;
    cuda_workspace_layout(&set, row_bytes, &layout);
    *sizes = (struct exchange_sizes){
        .workspace_bytes = n_sets * layout.bytes,
        .dot_bytes = (uint64_t)shape->capacity_rows * cuda_row_pieces(row_bytes) * sizeof(float),
        .keeps_slots = 1,
    };
}

/* The workspace was made for rows of the group's dtype, which is what every exchange of it moves. */
static struct cuda_exchange exchange_of(const struct exchange_args *args, uint64_t row_bytes,
                                        enum cuda_stage stage)
{
    struct cuda_exchange exchange = {.shape = args->shape, .set = args->set, .stage = stage};
    exchange.abort_word =
        (const uint32_t *)((const char *)args->workspace[args->shape.rank] + CUDA_ABORT_OFFSET);
    cuda_workspace_layout(&args->shape, row_bytes, &exchange.layout);
    memcpy(exchange.workspace, args->workspace, sizeof exchange.workspace);
    return exchange;
}

static struct cuda_routing routing_of(const struct exchange_args *args)
{
    return (struct cuda_routing){
        .base = args->routing,
        .slot_row = args->slots.row,
        .slot_weight = args->slots.weight,
        .slot_tokens = args->slots.tokens,
        .sent_tokens = args->slots.sent,
    };
}

/* Kernels go by the pointer; a rank without tokens may have weights bound and no memory for them. */
static struct tensor weights_of(const struct exchange_args *args)
{
    struct tensor weights = args->topk_weights;
    if (weights.n_dims && !weights.data)
        weights.data = args->workspace[args->shape.rank];
    return weights;
}

static enum epd_status launch_dispatch(int route, enum cuda_stage stage, const struct exchange_args *args,
                                       struct CUstream_st *stream, struct epd_error *error)
{
    uint32_t rank = args->shape.rank;
    struct cuda_dispatch_args dispatch = {
        .exchange = exchange_of(args, row_bytes_of(args, &args->x), stage),
        .routing = routing_of(args),
        .route = route,
        .scaled = args->scaled,
        .topk_idx = args->topk_idx,
        .topk_weights = weights_of(args),
        .x = args->x,
        .splits_out = args->splits_out,
        .offsets_out = args->offsets_out,
        .recv_x = args->recv_x[rank],
        .recv_weights = args->recv_weights[rank],
        .error = args->route_error,
    };
    if (!route && !dispatch.topk_weights.data)
        dispatch.routing.slot_weight = NULL; /* then weights count as 1 */
    return cuda_dispatch_launch(&dispatch, stream, error);
}

static enum epd_status launch_combine(enum cuda_stage stage, const struct exchange_args *args,
                                      struct CUstream_st *stream, struct epd_error *error)
{
    struct cuda_combine_args combine = {
        .exchange = exchange_of(args, row_bytes_of(args, &args->out), stage),
        .routing = routing_of(args),
        .topk_weights = weights_of(args),
        .y = args->y[args->shape.rank],
        .out = args->out,
    };
    /* The expert's side has them since the dispatch. */
    if (args->weights_kept) {
        combine.saved_weights = 1;
        combine.topk_weights.data = NULL;
    }
    if (stage == CUDA_STAGE_PUBLISH && !combine.topk_weights.data)
        return EPD_OK;
    return cuda_combine_launch(&combine, stream, error);
}

static enum epd_status launch_gather(enum cuda_stage stage, const struct exchange_args *args,
                                     const float *value, uint32_t n_parts, uint64_t row_bytes,
                                     struct CUstream_st *stream, struct epd_error *error)
{
    struct cuda_gather_scalars_args gather = {
        .exchange = exchange_of(args, row_bytes, stage),
        .routing = routing_of(args),
        .value = value,
        .n_parts = n_parts,
        .out = args->scalars,
    };
    return cuda_gather_scalars_launch(&gather, stream, error);
}

static enum epd_status launch_dots(enum cuda_stage stage, const struct exchange_args *args,
                                   struct CUstream_st *stream, struct epd_error *error)
{
    struct cuda_dispatch_args dispatch = {
        .exchange = exchange_of(args, row_bytes_of(args, &args->x), stage),
        .routing = routing_of(args),
        .scaled = args->scaled,
        .topk_weights = weights_of(args),
        .x = args->x,
        .recv_x = args->recv_x[args->shape.rank],
        .dot_with = args->y[args->shape.rank],
        .dot = args->dot,
    };
    if (!dispatch.topk_weights.data)
        dispatch.routing.slot_weight = NULL; /* then weights count as 1 */
    return cuda_dispatch_launch(&dispatch, stream, error);
}

static enum epd_status launch_dot_sums(enum cuda_stage stage, const struct exchange_args *args,
                                       struct CUstream_st *stream, struct epd_error *error)
{
    uint64_t row_bytes = row_bytes_of(args, &args->x);
    return launch_gather(stage, args, args->dot, cuda_row_pieces(row_bytes), row_bytes, stream, error);
}

/* dout is multiplied with y at its slots, and stays there, weighted, where it is wanted; the products come back as
 * scalars. */
static enum epd_status launch_weight_grad(uint32_t stage, const struct exchange_args *args,
                                          struct CUstream_st *stream, struct epd_error *error)
{
    static const enum cuda_stage stages[CUDA_WEIGHT_GRAD_STAGES] = {CUDA_STAGE_SEND, CUDA_STAGE_RECEIVE,
                                                                    CUDA_STAGE_SEND, CUDA_STAGE_RECEIVE};
    if (stage < CUDA_DISPATCH_STAGES)
        return launch_dots(stages[stage], args, stream, error);
    return launch_dot_sums(stages[stage], args, stream, error);
}

static enum epd_status launch_fused(enum exchange_op op, const struct exchange_args *args,
                                    struct CUstream_st *stream, struct epd_error *error)
{
    switch (op) {
    case EXCHANGE_ROUTE_DISPATCH:
        return launch_dispatch(1, CUDA_STAGE_ALL, args, stream, error);
    case EXCHANGE_DISPATCH:
        return launch_dispatch(0, CUDA_STAGE_ALL, args, stream, error);
    case EXCHANGE_COMBINE:
        return launch_combine(CUDA_STAGE_ALL, args, stream, error);
    case EXCHANGE_GATHER_SCALARS:
        return launch_gather(CUDA_STAGE_ALL, args, args->value[args->shape.rank], 1, sizeof(float) * 4,
                             stream, error);
    case EXCHANGE_WEIGHT_GRAD:
        if (launch_dots(CUDA_STAGE_ALL, args, stream, error))
            return error->status;
        return launch_dot_sums(CUDA_STAGE_ALL, args, stream, error);
    case EXCHANGE_OP_COUNT:
        break;
    }
    return error_set(error, EPD_INTERNAL, "exchange op %d is unknown", (int)op);
}

enum epd_status cuda_exchange_reset(const struct exchange_shape *shape, uint64_t row_bytes, void *workspace,
                                    struct CUstream_st *stream, struct epd_error *error)
{
    struct cuda_workspace layout;
    cuda_workspace_layout(shape, row_bytes, &layout);
    return cuda_workspace_reset_launch(&layout, workspace, stream, error);
}

enum epd_status cuda_exchange_launch(enum exchange_op op, uint32_t stage, const struct exchange_args *args,
                                     struct CUstream_st *stream, struct epd_error *error)
{
    if (args->fused)
        return launch_fused(op, args, stream, error);
    static const enum cuda_stage route_stages[CUDA_ROUTE_DISPATCH_STAGES] = {
        CUDA_STAGE_SEND, CUDA_STAGE_LAYOUT, CUDA_STAGE_RECEIVE};
    static const enum cuda_stage two_stages[CUDA_DISPATCH_STAGES] = {CUDA_STAGE_SEND, CUDA_STAGE_RECEIVE};
    static const enum cuda_stage combine_stages[CUDA_COMBINE_STAGES] = {CUDA_STAGE_PUBLISH, CUDA_STAGE_SEND,
                                                                        CUDA_STAGE_RECEIVE};
    switch (op) {
    case EXCHANGE_ROUTE_DISPATCH:
        return launch_dispatch(1, route_stages[stage], args, stream, error);
    case EXCHANGE_DISPATCH:
        return launch_dispatch(0, two_stages[stage], args, stream, error);
    case EXCHANGE_COMBINE:
        return launch_combine(combine_stages[stage], args, stream, error);
    case EXCHANGE_GATHER_SCALARS:
        return launch_gather(two_stages[stage], args, args->value[args->shape.rank], 1, sizeof(float) * 4,
                             stream, error);
    case EXCHANGE_WEIGHT_GRAD:
        return launch_weight_grad(stage, args, stream, error);
    case EXCHANGE_OP_COUNT:
        break;
    }
    return error_set(error, EPD_INTERNAL, "exchange op %d is unknown", (int)op);
}
