#include "ep/hop.h"

#include <string.h>

#include "ep/hop_desk.h"
#include "kernels/host/partial.h"
#include "kernels/host/scratch.h"

static const struct problem *problem_of(const struct rank_run *run)
{
    return &run->plan->team->problem;
}

static struct hop_routing *routing_of(const struct rank_run *run)
{
    return &plan_router(run->plan)->routing.hop;
}

static uint32_t node_of_expert(const struct problem *problem, int32_t expert)
{
    return (uint32_t)expert / problem->n_local_experts / problem->ranks_per_node;
}

static enum epd_status check(enum epd_status status, const char *kernel, struct epd_error *error)
{
    if (status)
        return error_set(error, status, "%s: no scratch memory", kernel);
    return EPD_OK;
}

/* The rank of this rail on another node, as the source of what came from there. */
static uint32_t rank_on(const struct rank_run *run, uint32_t node)
{
    const struct problem *problem = problem_of(run);
    return node * problem->ranks_per_node + run->plan->rank % problem->ranks_per_node;
}

/* ---- there ---- */

/* Rows of a [T, ...] tensor, those of some tokens one behind the other. */
static void pack(void *to, const void *from, size_t row_bytes, const int32_t *tokens, uint32_t n)
{
    for (uint32_t i = 0; i < n; i++)
        memcpy((char *)to + i * row_bytes, (const char *)from + (size_t)tokens[i] * row_bytes, row_bytes);
}

static void pack_there(const struct rank_run *run, const struct exchange_args *args, uint32_t content)
{
    const struct problem *problem = problem_of(run);
    const struct hop_routing *hop = routing_of(run);
    struct hop_desk *desk = hop_desk_of(run);
    const size_t n_choices = problem->top_k;
    hop_desk_begin(run, HOP_THERE, content, hop->n_sent);
    for (uint32_t node = 0; node < problem->n_nodes; node++) {
        const struct hop_frame *frame = &desk->lines[HOP_THERE][node].sent;
        const int32_t *tokens = hop->sent[node];
        const uint32_t n = hop->n_sent[node];
        if (node == problem->node)
            continue;
        if (frame->counts)
            memcpy(frame->counts, args->routing.counts + (size_t)run->plan->rank * problem->n_experts,
                   problem->n_experts * sizeof(int32_t));
        if (frame->experts)
            pack(frame->experts, args->routing.expert, n_choices * sizeof(int32_t), tokens, n);
        if (frame->weights)
            pack(frame->weights, args->topk_weights.data, n_choices * sizeof(float), tokens, n);
        if (frame->rows)
            pack(frame->rows, args->x.data, problem->hidden * dtype_bytes(problem->dtype), tokens, n);
    }
}

static void take_weights(const struct rank_run *run)
{
    const struct problem *problem = problem_of(run);
    struct hop_routing *hop = routing_of(run);
    const struct hop_desk *desk = hop_desk_of(run);
    for (uint32_t node = 0; node < problem->n_nodes; node++) {
        const struct hop_frame *came = &desk->lines[HOP_THERE][node].came;
        if (node != problem->node && came->weights)
            memcpy(hop->from[node].weights, came->weights,
                   (size_t)hop->from[node].n_tokens * problem->top_k * sizeof(float));
    }
}

/* The counts of the rail's other ranks become known to every rank of this node. */
static void take_routing(const struct rank_run *run, const struct exchange_args *args)
{
    const struct problem *problem = problem_of(run);
    struct hop_routing *hop = routing_of(run);
    const struct hop_desk *desk = hop_desk_of(run);
    const uint32_t first = problem_first_rank(problem);
    for (uint32_t node = 0; node < problem->n_nodes; node++) {
        const struct hop_frame *came = &desk->lines[HOP_THERE][node].came;
        if (node == problem->node)
            continue;
        hop->from[node].n_tokens = came->head->n_tokens;
        memcpy(hop->from[node].expert, came->experts,
               (size_t)came->head->n_tokens * problem->top_k * sizeof(int32_t));
        for (uint32_t rank = first; rank < first + problem->ranks_per_node; rank++)
            memcpy(args->counts[rank] + (size_t)rank_on(run, node) * problem->n_experts, came->counts,
                   problem->n_experts * sizeof(int32_t));
    }
    take_weights(run);
}

static uint32_t weights_content(const struct exchange_args *args)
{
    return args->topk_weights.n_dims ? HOP_WEIGHTS : 0;
}

/* Tokens, weights or both to the nodes that know the tokens' routing already. */
static enum epd_status send_known(const struct rank_run *run, const struct exchange_args *args,
                                  uint32_t content, struct epd_error *error)
{
    const struct problem *problem = problem_of(run);
    uint32_t n_due[EPD_MAX_NODES];
    for (uint32_t node = 0; node < problem->n_nodes; node++)
        n_due[node] = routing_of(run)->from[node].n_tokens;
    pack_there(run, args, content);
    if (hop_desk_swap(run, HOP_THERE, content, n_due, error))
        return error->status;
    take_weights(run);
    return EPD_OK;
}

static enum epd_status route_there(const struct rank_run *run, const struct exchange_args *given,
                                   struct epd_error *error)
{
    const struct problem *problem = problem_of(run);
    struct exchange_args args = *given;
    /* Counting writes to the ranks of other nodes too: here their place is this rank's own. */
    for (uint32_t rank = 0; rank < problem->world_size; rank++)
        if (!args.counts[rank])
            args.counts[rank] = args.routing.counts;
    if (run->backend->exchange(run->queue, EXCHANGE_ROUTE_DISPATCH, 0, &args, error))
        return error->status;
    hop_routing_choose(routing_of(run), problem, args.routing.expert, run->n_tokens);
    const uint32_t content = HOP_COUNTS | HOP_EXPERTS | HOP_ROWS | weights_content(&args);
    pack_there(run, &args, content);
    if (hop_desk_swap(run, HOP_THERE, content, NULL, error))
        return error->status;
    take_routing(run, given);
    return EPD_OK;
}

/* ---- inside the node ---- */

/* The shape and routing of what came from a node, as its rank's. */
static struct exchange_shape shape_from(const struct rank_run *run, const struct exchange_args *args,
                                        uint32_t node)
{
    struct exchange_shape shape = args->shape;
    shape.rank = rank_on(run, node);
    shape.n_tokens = routing_of(run)->from[node].n_tokens;
    return shape;
}

static struct routing routing_from(const struct rank_run *run, const struct exchange_args *args,
                                   uint32_t node)
{
    struct hop_desk *desk = hop_desk_of(run);
    const struct hop_arrivals *from = &routing_of(run)->from[node];
    struct routing routing = args->routing;
    routing.expert = from->expert;
    routing.row = from->row;
    if (node == problem_of(run)->node)
        return routing;
    /* The slabs of a rank of another node are not here: it lays them out itself. */
    routing.m_splits = desk->splits;
    routing.offsets = desk->offsets;
    routing.needed_rows = &desk->needed_rows;
    routing.dropped_rows = &desk->dropped_rows;
    return routing;
}

static struct tensor weights_from(const struct rank_run *run, const struct exchange_args *args, uint32_t node)
{
    struct tensor weights = args->topk_weights;
    if (node == problem_of(run)->node || !weights.n_dims)
        return weights;
    weights.shape[0] = routing_of(run)->from[node].n_tokens;
    weights.data = routing_of(run)->from[node].weights;
    return weights;
}

static struct tensor rows_from(const struct rank_run *run, const struct exchange_args *args, uint32_t node)
{
    struct tensor x = args->x;
    if (node == problem_of(run)->node)
        return x;
    x.shape[0] = routing_of(run)->from[node].n_tokens;
    x.data = hop_desk_of(run)->lines[HOP_THERE][node].came.rows;
    return x;
}

static enum epd_status lay_out(const struct rank_run *run, const struct exchange_args *args,
                               struct epd_error *error)
{
    const struct problem *problem = problem_of(run);
    struct hop_desk *desk = hop_desk_of(run);
    struct hop_routing *hop = routing_of(run);
    struct hop_arrivals *own = &hop->from[problem->node];
    const size_t n = (size_t)run->n_tokens * problem->top_k;
    const size_t n_floats = hop_routing_place_words(problem) * (sizeof(int64_t) / sizeof(float));
    const struct route_args route = {
        .shape = shape_from(run, args, problem->node), .routing = args->routing, .error = args->layout_error};
    float *floats;
    if (check(host_scratch_acquire(&desk->scratch, n_floats, &floats), "dispatch", error))
        return error->status;
    own->n_tokens = run->n_tokens;
    memcpy(own->expert, args->routing.expert, n * sizeof *own->expert);
    host_route_slabs(&route, hop_routing_place(hop, problem, run->plan->rank, args->routing.counts,
                                               (int64_t *)(void *)floats));
    return EPD_OK;
}

static enum epd_status push_all(const struct rank_run *run, const struct exchange_args *args,
                                struct epd_error *error)
{
    const struct problem *problem = problem_of(run);
    struct hop_desk *desk = hop_desk_of(run);
    /* A rank of another node has no padding here. */
    memset(desk->splits, 0, problem->n_local_experts * sizeof *desk->splits);
    memset(desk->offsets, 0, (problem->n_local_experts + 1) * sizeof *desk->offsets);
    for (uint32_t node = 0; node < problem->n_nodes; node++) {
        struct dispatch_args push = {.shape = shape_from(run, args, node),
                                     .routing = routing_from(run, args, node),
                                     .x = rows_from(run, args, node),
                                     .topk_weights = weights_from(run, args, node),
                                     .scaled = args->scaled};
        memcpy(push.recv_x, args->recv_x, sizeof push.recv_x);
        memcpy(push.recv_weights, args->recv_weights, sizeof push.recv_weights);
        memcpy(push.recv_source, args->recv_source, sizeof push.recv_source);
        if (check(host_dispatch_push(&push, &desk->scratch), "dispatch", error))
            return error->status;
    }
    return EPD_OK;
}

static enum epd_status route_dispatch(const struct rank_run *run, const struct exchange_args *args,
                                      struct epd_error *error)
{
    if (run->stage == 0)
        return route_there(run, args, error);
    if (lay_out(run, args, error))
        return error->status;
    const uint64_t n_local = problem_of(run)->n_local_experts;
    if (args->splits_out)
        memcpy(args->splits_out, args->routing.m_splits, n_local * sizeof(int64_t));
    if (args->offsets_out)
        memcpy(args->offsets_out, args->routing.offsets, (n_local + 1) * sizeof(int64_t));
    return push_all(run, args, error);
}

static enum epd_status dispatch(const struct rank_run *run, const struct exchange_args *args,
                                struct epd_error *error)
{
    /* A combine_bwd that has computed d_weights has sent the rows, and their weights, already. */
    const int sent = run->plan->op == EPD_OP_COMBINE_BWD && plan_has(run->plan, EPD_ROLE_D_WEIGHTS);
    if (!sent && send_known(run, args, HOP_ROWS | weights_content(args), error))
        return error->status;
    return push_all(run, args, error);
}

/* ---- back ---- */

/* Begins the messages back: as many tokens as came from each node. */
static void begin_back(const struct rank_run *run, uint32_t content)
{
    const struct hop_routing *hop = routing_of(run);
    uint32_t n_tokens[EPD_MAX_NODES];
    for (uint32_t node = 0; node < problem_of(run)->n_nodes; node++)
        n_tokens[node] = hop->from[node].n_tokens;
    hop_desk_begin(run, HOP_BACK, content, n_tokens);
}

static enum epd_status sum_all(const struct rank_run *run, const struct exchange_args *args,
                               struct epd_error *error)
{
    const struct problem *problem = problem_of(run);
    struct hop_desk *desk = hop_desk_of(run);
    for (uint32_t node = 0; node < problem->n_nodes; node++) {
        struct combine_args combine = {.shape = shape_from(run, args, node),
                                       .routing = routing_from(run, args, node),
                                       .topk_weights = weights_from(run, args, node),
                                       .out = args->out};
        memcpy(combine.y, args->y, sizeof combine.y);
        float *sums = node == problem->node ? desk->own_sums : desk->lines[HOP_BACK][node].sent.sums;
        if (check(host_combine_partial(&combine, sums, &desk->scratch), "combine", error))
            return error->status;
    }
    return EPD_OK;
}

static enum epd_status combine(const struct rank_run *run, const struct exchange_args *args,
                               struct epd_error *error)
{
    const struct problem *problem = problem_of(run);
    const struct hop_routing *hop = routing_of(run);
    struct hop_desk *desk = hop_desk_of(run);
    if (args->topk_weights.n_dims && !args->weights_kept && send_known(run, args, HOP_WEIGHTS, error))
        return error->status;
    begin_back(run, HOP_SUMS);
    if (sum_all(run, args, error) || hop_desk_swap(run, HOP_BACK, HOP_SUMS, hop->n_sent, error))
        return error->status;
    struct partial_sums parts[EPD_MAX_NODES];
    for (uint32_t node = 0; node < problem->n_nodes; node++)
        parts[node] = node == problem->node
                          ? (struct partial_sums){.sums = desk->own_sums, .n = run->n_tokens}
                          : (struct partial_sums){.sums = desk->lines[HOP_BACK][node].came.sums,
                                                  .tokens = hop->sent[node],
                                                  .n = hop->n_sent[node]};
    return check(host_add_partials(parts, problem->n_nodes, &args->out, &desk->scratch), "combine", error);
}

/* One number per (token, k), each from the node of its expert. */
static void collect_scalars(const struct rank_run *run, const struct exchange_args *args)
{
    const struct problem *problem = problem_of(run);
    const struct hop_routing *hop = routing_of(run);
    const struct hop_desk *desk = hop_desk_of(run);
    uint32_t at[EPD_MAX_NODES] = {0};
    for (uint32_t token = 0; token < run->n_tokens; token++) {
        const size_t first = (size_t)token * problem->top_k;
        for (uint32_t k = 0; k < problem->top_k; k++) {
            const int32_t expert = args->routing.expert[first + k];
            const uint32_t node = expert < 0 ? problem->node : node_of_expert(problem, expert);
            args->scalars[first + k] =
                node == problem->node
                    ? desk->own_scalars[first + k]
                    : desk->lines[HOP_BACK][node].came.scalars[(size_t)at[node] * problem->top_k + k];
        }
        for (uint32_t node = 0; node < problem->n_nodes; node++)
            if (node != problem->node && at[node] < hop->n_sent[node] &&
                hop->sent[node][at[node]] == (int32_t)token)
                at[node]++;
    }
}

/* dots: <x, y> of every row; else the values themselves. */
static enum epd_status scalars_of(const struct rank_run *run, const struct exchange_args *args, int dots,
                                  uint32_t node, float *out)
{
    struct weight_grad_args grad = {.shape = shape_from(run, args, node),
                                    .routing = routing_from(run, args, node),
                                    .dout = rows_from(run, args, node),
                                    .out = out};
    struct gather_scalars_args gather = {.shape = grad.shape, .routing = grad.routing, .out = out};
    memcpy(grad.y, args->y, sizeof grad.y);
    memcpy(gather.value, args->value, sizeof gather.value);
    return dots ? host_weight_grad(&grad) : host_gather_scalars(&gather);
}

static enum epd_status scalars_back(const struct rank_run *run, const struct exchange_args *args, int dots,
                                    struct epd_error *error)
{
    const struct problem *problem = problem_of(run);
    struct hop_desk *desk = hop_desk_of(run);
    begin_back(run, HOP_SCALARS);
    for (uint32_t node = 0; node < problem->n_nodes; node++) {
        float *out = node == problem->node ? desk->own_scalars : desk->lines[HOP_BACK][node].sent.scalars;
        if (check(scalars_of(run, args, dots, node, out), "d_weights", error))
            return error->status;
    }
    if (hop_desk_swap(run, HOP_BACK, HOP_SCALARS, routing_of(run)->n_sent, error))
        return error->status;
    collect_scalars(run, args);
    return EPD_OK;
}

/* The weights travel with the rows, for the dispatch that follows. */
static enum epd_status weight_grad(const struct rank_run *run, const struct exchange_args *given,
                                   struct epd_error *error)
{
    struct exchange_args args = *given;
    if (plan_has(run->plan, EPD_ROLE_TOPK_WEIGHTS))
        args.topk_weights = run->plan->bindings.tensors[EPD_ROLE_TOPK_WEIGHTS];
    if (send_known(run, &args, HOP_ROWS | weights_content(&args), error))
        return error->status;
    return scalars_back(run, &args, 1, error);
}

static enum epd_status exchange(const struct rank_run *run, enum exchange_op op,
                                const struct exchange_args *args, struct epd_error *error)
{
    switch (op) {
    case EXCHANGE_ROUTE_DISPATCH:
        return route_dispatch(run, args, error);
    case EXCHANGE_DISPATCH:
        return dispatch(run, args, error);
    case EXCHANGE_COMBINE:
        return combine(run, args, error);
    case EXCHANGE_GATHER_SCALARS:
        return scalars_back(run, args, 0, error);
    case EXCHANGE_WEIGHT_GRAD:
        return weight_grad(run, args, error);
    case EXCHANGE_OP_COUNT:
        break;
    }
    return error_set(error, EPD_INTERNAL, "exchange op %d is unknown", (int)op);
}

static void carve_routing(struct routing_context *routing, const struct problem *problem,
                          struct layout *layout)
{
    hop_routing_carve(&routing->hop, problem, layout);
}

const struct hop_form hop_form_host = {
    .desk_create = hop_desk_create,
    .desk_destroy = hop_desk_destroy,
    .carve_routing = carve_routing,
    .exchange = exchange,
    .begin = hop_desk_begin_step,
    .drain = hop_desk_drain,
    .only_followed = hop_desk_only_followed,
    .agree = hop_desk_agree,
};
