#include "ep/hop_cuda.h"

#include <assert.h>
#include <string.h>

#include "ep/cuda_exchange.h"
#include "kernels/cuda/hop.h"

/* Parts of a swap, at most: heads and counts, experts, weights, rows. */
#define MAX_PARTS 4

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

/* A set of another node: its tensors are in the frame that came from there, as large as they can be where nobody knows
 * better. */
static void args_of_frame(struct exchange_args *set, const struct hop_cuda *hop,
                          const struct cuda_hop *kernels, uint32_t node)
{
    char *frame = frame_of(kernels, kernels->in, node);
    const uint32_t n_tokens = hop->counts ? hop->counts->came[node] : hop->limit;
    set->shape.n_tokens = n_tokens;
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
        args_of_frame(&set, hop, kernels, node);
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

/* What a swap moves. back: what lies in the frames that came in goes out, into those that had gone out. */
struct moves {
    const struct cuda_hop *kernels;
    int back;
    uint32_t n_parts;
    struct transport_move list[MAX_PARTS * EPD_MAX_NODES]; /* [n_parts, n_nodes] */
};

static struct moves moves_begin(const struct cuda_hop *kernels, int back)
{
    return (struct moves){.kernels = kernels, .back = back};
}

/* The part of every frame that begins there; sent_bytes and came_bytes: of those that had gone out, and had come in. */
static void moves_add(struct moves *moves, size_t begin, uint32_t node, uint64_t sent_bytes,
                      uint64_t came_bytes)
{
    const struct cuda_hop *kernels = moves->kernels;
    char *out = frame_of(kernels, kernels->out, node) + begin,
         *in = frame_of(kernels, kernels->in, node) + begin;
    struct transport_move *move = &moves->list[moves->n_parts * kernels->shape.n_nodes + node];
    if (moves->back)
        *move = (struct transport_move){
            .send = in, .send_bytes = came_bytes, .receive = out, .receive_bytes = sent_bytes};
    else
        *move = (struct transport_move){
            .send = out, .send_bytes = sent_bytes, .receive = in, .receive_bytes = came_bytes};
}

/* Heads and counts, with which every frame begins. */
static void moves_add_heads(struct moves *moves)
{
    const struct cuda_hop *kernels = moves->kernels;
    assert(moves->n_parts < MAX_PARTS);
    for (uint32_t node = 0; node < kernels->shape.n_nodes; node++)
        if (node != kernels->node)
            moves_add(moves, 0, node, kernels->frame.experts, kernels->frame.experts);
    moves->n_parts++;
}

/* Of what the frames have for each token from there on, as much as there are tokens. */
static void moves_add_tokens(struct moves *moves, const struct hop_cuda *hop, size_t begin,
                             uint64_t token_bytes)
{
    const struct cuda_hop *kernels = moves->kernels;
    assert(moves->n_parts < MAX_PARTS);
    for (uint32_t node = 0; node < kernels->shape.n_nodes; node++)
        if (node != kernels->node)
            moves_add(moves, begin, node, (hop->eager ? hop->counts->sent[node] : hop->limit) * token_bytes,
                      (hop->eager ? hop->counts->came[node] : hop->limit) * token_bytes);
    moves->n_parts++;
}

static enum epd_status moves_swap(const struct moves *moves, const struct hop_cuda *hop,
                                  struct CUstream_st *stream, struct epd_error *error)
{
    return hop->swap(hop->swap_arg, moves->list, moves->n_parts, stream, error);
}

/* There any but scalars, back rows or scalars, which lie where the experts lay. */
enum content { ROWS = 1, WEIGHTS = 2, SCALARS = 4, EXPERTS = 8 };

static void moves_add_content(struct moves *moves, const struct hop_cuda *hop, unsigned content)
{
    const struct cuda_hop_frame *frame = &moves->kernels->frame;
    const uint64_t choices_bytes = moves->kernels->shape.top_k * sizeof(float);
    if (content & (SCALARS | EXPERTS))
        moves_add_tokens(moves, hop, frame->experts, choices_bytes);
    if (content & WEIGHTS)
        moves_add_tokens(moves, hop, frame->weights, choices_bytes);
    if (content & ROWS)
        moves_add_tokens(moves, hop, frame->rows, moves->kernels->row_bytes);
}

static enum epd_status swap_content(const struct hop_cuda *hop, const struct cuda_hop *kernels, int back,
                                    unsigned content, struct CUstream_st *stream, struct epd_error *error)
{
    struct moves moves = moves_begin(kernels, back);
    moves_add_content(&moves, hop, content);
    return moves_swap(&moves, hop, stream, error);
}

/* Tokens, weights or both of a routing that the other nodes know; NULL: not wanted. */
static enum epd_status cross_known(const struct hop_cuda *hop, const struct cuda_hop *kernels, const void *x,
                                   const struct tensor *weights, struct CUstream_st *stream,
                                   struct epd_error *error)
{
    const struct cuda_hop_pack_args pack = {
        .hop = *kernels, .weights = weights ? weights->data : NULL, .x = x};
    if (!hop->off && cuda_hop_pack_launch(&pack, stream, error))
        return error->status;
    return swap_content(hop, kernels, 0, (weights ? WEIGHTS : 0u) | (x ? ROWS : 0u), stream, error);
}

/* ---- what crosses ---- */

void hop_cuda_heads(const struct hop_cuda_frames *frames, const struct exchange_shape *shape,
                    uint64_t row_bytes, uint32_t node, struct cuda_hop_head **out, struct cuda_hop_head **in)
{
    struct cuda_hop kernels = {.shape = *shape, .node = shape->rank / ranks_per_node(shape)};
    cuda_hop_frame_layout(shape, row_bytes, &kernels.frame);
    *out = (struct cuda_hop_head *)(void *)(frame_of(&kernels, frames->out, node) + kernels.frame.head);
    *in = (struct cuda_hop_head *)(void *)(frame_of(&kernels, frames->in, node) + kernels.frame.head);
}

static int is_head(const struct exchange_shape *shape, const struct cuda_hop_head *head)
{
    return head->magic == CUDA_HOP_MAGIC && head->n_tokens <= shape->max_tokens;
}

int hop_cuda_learn(const struct exchange_shape *shape, const struct cuda_hop_head *out,
                   const struct cuda_hop_head *in, struct hop_cuda_counts *counts)
{
    const uint32_t own = shape->rank / ranks_per_node(shape);
    struct hop_cuda_counts learnt = {.sent = {0}};
    for (uint32_t node = 0; node < shape->n_nodes; node++) {
        if (node == own)
            continue;
        if (!is_head(shape, &out[node]) || !is_head(shape, &in[node]))
            return (int)node;
        learnt.sent[node] = out[node].n_tokens;
        learnt.came[node] = in[node].n_tokens;
    }
    *counts = learnt;
    return -1;
}

/* ---- ops ---- */

/* A rank without tokens may have no memory for them. */
static const void *x_of(const struct cuda_hop *kernels, const struct exchange_args *args)
{
    return args->x.data ? args->x.data : kernels->in;
}

static void counts_here(const struct exchange_args *args, int32_t **counts)
{
    memcpy(counts, args->counts + first_rank(&args->shape), ranks_per_node(&args->shape) * sizeof *counts);
}

/* Fills the frames that go out. */
static enum epd_status choose_and_pack(const struct hop_cuda *hop, const struct cuda_hop *kernels,
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
    counts_here(args, choose.counts);
    if (hop->off) /* nothing comes: the others wait for heads, and for what they say */
        choose.hop.shape.n_tokens = 0;
    if (cuda_hop_choose_launch(&choose, stream, error))
        return error->status;
    return hop->off ? EPD_OK : cuda_hop_pack_launch(&pack, stream, error);
}

static enum epd_status take(const struct hop_cuda *hop, const struct cuda_hop *kernels,
                            const struct exchange_args *args, struct CUstream_st *stream,
                            struct epd_error *error)
{
    struct cuda_hop_take_args take = {
        .hop = *kernels, .experts_here = hop->routing.expert, .error = args->route_error};
    counts_here(args, take.counts);
    return hop->off ? EPD_OK : cuda_hop_take_launch(&take, stream, error);
}

/* Of the tokens whose heads and counts say that they come. */
static unsigned told_content(const struct exchange_args *args)
{
    return EXPERTS | ROWS | (args->topk_weights.n_dims ? WEIGHTS : 0u);
}

static enum epd_status choose_and_cross(const struct hop_cuda *hop, const struct cuda_hop *kernels,
                                        const struct exchange_args *args, struct CUstream_st *stream,
                                        struct epd_error *error)
{
    struct moves moves = moves_begin(kernels, 0);
    moves_add_heads(&moves);
    moves_add_content(&moves, hop, told_content(args));
    if ((!hop->off && choose_and_pack(hop, kernels, args, stream, error)) ||
        moves_swap(&moves, hop, stream, error))
        return error->status;
    return take(hop, kernels, args, stream, error);
}

/* Eager: what is to come is told, and follows when the host knows it. The frames are filled meanwhile. */
static enum epd_status choose_and_tell(const struct hop_cuda *hop, const struct cuda_hop *kernels,
                                       const struct exchange_args *args, struct CUstream_st *stream,
                                       struct epd_error *error)
{
    struct moves moves = moves_begin(kernels, 0);
    moves_add_heads(&moves);
    if (!(hop->off && hop->told) && choose_and_pack(hop, kernels, args, stream, error) && !hop->off)
        return error->status;
    return moves_swap(&moves, hop, stream, error);
}

static enum epd_status cross_told(const struct hop_cuda *hop, const struct cuda_hop *kernels,
                                  const struct exchange_args *args, struct CUstream_st *stream,
                                  struct epd_error *error)
{
    if (swap_content(hop, kernels, 0, told_content(args), stream, error))
        return error->status;
    return take(hop, kernels, args, stream, error);
}

static enum epd_status route_dispatch(const struct hop_cuda *hop, uint32_t stage,
                                      const struct exchange_args *args, struct CUstream_st *stream,
                                      struct epd_error *error)
{
    const struct cuda_hop kernels = hop_of(hop, args);
    if (hop->eager && stage == 0)
        return choose_and_tell(hop, &kernels, args, stream, error);
    if (hop->eager)
        stage--;
    if (stage == 0 && (hop->eager ? cross_told(hop, &kernels, args, stream, error)
                                  : choose_and_cross(hop, &kernels, args, stream, error)))
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
    if (swap_content(hop, &kernels, 1, ROWS, stream, error))
        return error->status;
    return hop->off ? EPD_OK : cuda_hop_finish_launch(&finish, stream, error);
}

/* Behind the last stage: each token's numbers go to its rank. */
static enum epd_status scalars_back(const struct hop_cuda *hop, const struct cuda_hop *kernels,
                                    const struct exchange_args *args, struct CUstream_st *stream,
                                    struct epd_error *error)
{
    const struct cuda_hop_collect_args collect = {.hop = *kernels, .scalars = args->scalars};
    if (swap_content(hop, kernels, 1, SCALARS, stream, error))
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
