/* Phases that move rows between ranks. */
#include "ep/phase.h"

#include "ep/hop.h"

static struct exchange_shape shape_of(const struct rank_run *run)
{
    struct exchange_shape shape = problem_shape(&run->plan->team->problem);
    shape.rank = run->plan->rank;
    shape.n_tokens = run->n_tokens;
    shape.max_blocks = run->plan->team->node->comm_blocks;
    return shape;
}

/* The step's rows of a [T, ...] tensor that the plan, or one of its contexts, has bound; data NULL if none
 * has. */
static struct tensor token_tensor(const struct rank_run *run, enum epd_role role)
{
    const struct plan *owner = plan_owner(run->plan, role);
    if (!owner)
        return (struct tensor){.data = NULL};
    struct tensor tensor = owner->bindings.tensors[role];
    tensor.shape[0] = run->n_tokens;
    return tensor;
}

/* The same, of this plan alone: the weights of an exchange are not taken from its context. */
static struct tensor own_tensor(const struct rank_run *run, enum epd_role role)
{
    return plan_has(run->plan, role) ? token_tensor(run, role) : (struct tensor){.data = NULL};
}

/* The ranks on this node: first_rank(run) to end_rank(run) - 1. */
static uint32_t first_rank(const struct rank_run *run)
{
    return problem_first_rank(&run->plan->team->problem);
}

static uint32_t end_rank(const struct rank_run *run)
{
    return first_rank(run) + run->plan->team->problem.ranks_per_node;
}

static struct plan *peer_of(const struct rank_run *run, uint32_t rank)
{
    return run->peers[rank - first_rank(run)];
}

/* What every exchange needs of the routing that the plan uses. */
static struct exchange_args args_of(const struct rank_run *run)
{
    const struct plan *router = plan_router(run->plan);
    struct exchange_args args = {
        .shape = shape_of(run),
        .fused = run->plan->team->fused,
        .routing = router->routing.routing,
        .slots = router->routing.slots,
        .dot = run->plan->work.dot,
    };
    for (uint32_t rank = first_rank(run); rank < end_rank(run); rank++)
        args.workspace[rank] = peer_of(run, rank)->work.workspace;
    return args;
}

static enum epd_status run_exchange(const struct rank_run *run, enum exchange_op op,
                                    const struct exchange_args *args, struct epd_error *error)
{
    if (team_spans(run->plan->team))
        return run->plan->team->hop->exchange(run, op, args, error);
    return run->backend->exchange(run->queue, op, run->stage, args, error);
}

enum epd_status exchange_dispatch(const struct rank_run *run, struct epd_error *error)
{
    struct plan *plan = run->plan;
    struct exchange_args args = args_of(run);
    args.topk_idx = token_tensor(run, EPD_ROLE_TOPK_IDX);
    args.splits_out = plan_data(plan, EPD_ROLE_M_SPLITS);
    args.offsets_out = plan_data(plan, EPD_ROLE_OFFSETS);
    args.route_error = &plan->records[PLAN_RECORD_ROUTE];
    args.layout_error = &plan->records[PLAN_RECORD_LAYOUT];
    args.x = token_tensor(run, EPD_ROLE_X);
    args.topk_weights = own_tensor(run, EPD_ROLE_TOPK_WEIGHTS);
    for (uint32_t rank = first_rank(run); rank < end_rank(run); rank++) {
        struct plan *peer = peer_of(run, rank);
        args.counts[rank] = peer->routing.routing.counts;
        args.recv_x[rank] = peer->work.recv_x;
        args.recv_source[rank] = peer->routing.routing.source;
        args.recv_weights[rank] =
            plan->op == EPD_OP_DISPATCH ? plan_data(peer, EPD_ROLE_RECV_WEIGHTS) : peer->routing.recv_weights;
    }
    return run_exchange(run, EXCHANGE_ROUTE_DISPATCH, &args, error);
}

/* moe_backward that recomputes: its slots have been described by the forward already. */
enum epd_status exchange_push_x(const struct rank_run *run, struct epd_error *error)
{
    if (plan_router(run->plan)->saved != EPD_SAVED_RECOMPUTE)
        return EPD_OK;
    struct exchange_args args = args_of(run);
    args.x = token_tensor(run, EPD_ROLE_X);
    for (uint32_t rank = first_rank(run); rank < end_rank(run); rank++)
        args.recv_x[rank] = peer_of(run, rank)->work.recv_x;
    return run_exchange(run, EXCHANGE_DISPATCH, &args, error);
}

/* combine_bwd: dout crosses once for DY and the gradient of the weights. */
static int pushes_with_grad(const struct rank_run *run)
{
    return run->plan->op == EPD_OP_COMBINE_BWD && plan_has(run->plan, EPD_ROLE_D_WEIGHTS) &&
           run->backend->weight_grad_pushes;
}

/* w * dout into the slots of combine_bwd; dout as it is into those of moe_backward, whose experts weight it where it is
 * cheaper. */
static void push_dout(const struct rank_run *run, struct exchange_args *args)
{
    args->x = token_tensor(run, EPD_ROLE_DOUT);
    if (run->plan->op == EPD_OP_COMBINE_BWD) {
        args->topk_weights = own_tensor(run, EPD_ROLE_TOPK_WEIGHTS);
        args->scaled = 1;
    }
    for (uint32_t rank = first_rank(run); rank < end_rank(run); rank++)
        args->recv_x[rank] = peer_of(run, rank)->work.dout;
}

/* combine_bwd: d_weights. DY may lie where Y lies: a row is read before it is written, or, where the rows are pushed
 * apart, there is a barrier between. */
enum epd_status exchange_weight_grad(const struct rank_run *run, struct epd_error *error)
{
    if (!plan_has(run->plan, EPD_ROLE_D_WEIGHTS))
        return EPD_OK;
    struct exchange_args args = args_of(run);
    args.x = token_tensor(run, EPD_ROLE_DOUT);
    args.scalars = plan_data(run->plan, EPD_ROLE_D_WEIGHTS);
    if (pushes_with_grad(run))
        push_dout(run, &args);
    for (uint32_t rank = first_rank(run); rank < end_rank(run); rank++)
        args.y[rank] = peer_of(run, rank)->work.y;
    return run_exchange(run, EXCHANGE_WEIGHT_GRAD, &args, error);
}

enum epd_status exchange_push_dout(const struct rank_run *run, struct epd_error *error)
{
    if (pushes_with_grad(run))
        return EPD_OK;
    struct exchange_args args = args_of(run);
    push_dout(run, &args);
    return run_exchange(run, EXCHANGE_DISPATCH, &args, error);
}

static enum epd_status combine_into(const struct rank_run *run, enum epd_role out, struct tensor weights,
                                    struct epd_error *error)
{
    struct exchange_args args = args_of(run);
    args.topk_weights = weights;
    args.weights_kept = run->plan->op == EPD_OP_MOE_FORWARD;
    args.out = token_tensor(run, out);
    for (uint32_t rank = first_rank(run); rank < end_rank(run); rank++)
        args.y[rank] = peer_of(run, rank)->work.y;
    return run_exchange(run, EXCHANGE_COMBINE, &args, error);
}

enum epd_status exchange_combine_out(const struct rank_run *run, struct epd_error *error)
{
    return combine_into(run, EPD_ROLE_OUT, own_tensor(run, EPD_ROLE_TOPK_WEIGHTS), error);
}

enum epd_status exchange_combine_dx(const struct rank_run *run, struct epd_error *error)
{
    if (!plan_has(run->plan, EPD_ROLE_DX))
        return EPD_OK;
    return combine_into(run, EPD_ROLE_DX, (struct tensor){.data = NULL}, error);
}

/* dispatch_bwd, moe_backward: one number per slot back to its token. */
enum epd_status exchange_gather_weights(const struct rank_run *run, struct epd_error *error)
{
    if (!plan_has(run->plan, EPD_ROLE_D_WEIGHTS))
        return EPD_OK;
    struct exchange_args args = args_of(run);
    args.scalars = plan_data(run->plan, EPD_ROLE_D_WEIGHTS);
    for (uint32_t rank = first_rank(run); rank < end_rank(run); rank++)
        args.value[rank] = peer_of(run, rank)->work.row_scalars;
    return run_exchange(run, EXCHANGE_GATHER_SCALARS, &args, error);
}
