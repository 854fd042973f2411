/* The ops as rows of phases. */
#include "ep/phase.h"

#define BARRIER 1
/* An exchange: as many stages as the backend cuts it into. */
#define STAGES(op) 1, EXCHANGE_##op

static const struct phase dispatch_phases[] = {
    {EPD_PHASE_DISPATCH, 0, exchange_dispatch, STAGES(ROUTE_DISPATCH)},
};

static const struct phase combine_phases[] = {
    {EPD_PHASE_COMBINE, 0, exchange_combine_out, STAGES(COMBINE)},
};

static const struct phase dispatch_bwd_phases[] = {
    {EPD_PHASE_COMBINE, 0, exchange_combine_dx, STAGES(COMBINE)},
    {EPD_PHASE_COMBINE, 0, exchange_gather_weights, STAGES(GATHER_SCALARS)},
};

static const struct phase combine_bwd_phases[] = {
    {EPD_PHASE_COMBINE, 0, exchange_weight_grad, STAGES(WEIGHT_GRAD)},
    {EPD_PHASE_DISPATCH, BARRIER, exchange_push_dout, STAGES(DISPATCH)},
};

static const struct phase grouped_gemm_phases[] = {
    {EPD_PHASE_ROUTE, 0, expert_take_splits, 0, 0},
    {EPD_PHASE_GEMM, 0, expert_grouped_gemm, 0, 0},
};

static const struct phase activation_phases[] = {
    {EPD_PHASE_ROUTE, 0, expert_take_splits, 0, 0},
    {EPD_PHASE_ACTIVATION, 0, expert_activation_alone, 0, 0},
};

static const struct phase activation_bwd_phases[] = {
    {EPD_PHASE_ROUTE, 0, expert_take_splits, 0, 0},
    {EPD_PHASE_ACTIVATION, 0, expert_activation_bwd_alone, 0, 0},
};

static const struct phase moe_forward_phases[] = {
    {EPD_PHASE_DISPATCH, 0, exchange_dispatch, STAGES(ROUTE_DISPATCH)},
    {EPD_PHASE_GEMM, BARRIER, expert_fc1, 0, 0},
    {EPD_PHASE_ACTIVATION, 0, expert_activation, 0, 0},
    {EPD_PHASE_GEMM, 0, expert_fc2, 0, 0},
    {EPD_PHASE_COMBINE, BARRIER, exchange_combine_out, STAGES(COMBINE)},
};

/* The gradients of the weights come last: nobody waits for them. */
static const struct phase moe_backward_phases[] = {
    {EPD_PHASE_DISPATCH, 0, exchange_push_x, STAGES(DISPATCH)}, /* where the forward is recomputed */
    {EPD_PHASE_DISPATCH, 0, exchange_push_dout, STAGES(DISPATCH)},
    {EPD_PHASE_GEMM, BARRIER, expert_fc1, 0, 0}, /* where the forward is recomputed */
    {EPD_PHASE_GEMM, 0, expert_d_act, 0, 0},
    {EPD_PHASE_ACTIVATION, 0, expert_activation_bwd, 0, 0},
    {EPD_PHASE_GEMM, 0, expert_dx, 0, 0},
    {EPD_PHASE_COMBINE, BARRIER, exchange_combine_dx, STAGES(COMBINE)},
    {EPD_PHASE_COMBINE, 0, exchange_gather_weights, STAGES(GATHER_SCALARS)},
    {EPD_PHASE_WGRAD, 0, expert_wgrad, 0, 0},
};

static const struct phase moe_wgrad_phases[] = {
    {EPD_PHASE_WGRAD, 0, expert_wgrad, 0, 0},
};

#define PIPELINE(phases)                                                                                     \
    {                                                                                                        \
        phases, sizeof(phases) / sizeof *(phases)                                                            \
    }

static const struct pipeline pipelines[EPD_OP_COUNT] = {
    [EPD_OP_BARRIER] = {NULL, 0},
    [EPD_OP_DISPATCH] = PIPELINE(dispatch_phases),
    [EPD_OP_COMBINE] = PIPELINE(combine_phases),
    [EPD_OP_DISPATCH_BWD] = PIPELINE(dispatch_bwd_phases),
    [EPD_OP_COMBINE_BWD] = PIPELINE(combine_bwd_phases),
    [EPD_OP_GROUPED_GEMM] = PIPELINE(grouped_gemm_phases),
    [EPD_OP_ACTIVATION] = PIPELINE(activation_phases),
    [EPD_OP_ACTIVATION_BWD] = PIPELINE(activation_bwd_phases),
    [EPD_OP_MOE_FORWARD] = PIPELINE(moe_forward_phases),
    [EPD_OP_MOE_BACKWARD] = PIPELINE(moe_backward_phases),
    [EPD_OP_MOE_WGRAD] = PIPELINE(moe_wgrad_phases),
};

const struct pipeline *moe_pipeline(enum epd_op op)
{
    return &pipelines[op];
}

static enum epd_status check_router(const struct rank_run *run, const struct plan *router,
                                    struct epd_error *error)
{
    const char *op = op_name(run->plan->op), *context = op_name(router->op);
    if (!router->routing.stepped)
        return error_set(error, EPD_INVALID_ARGUMENT, "%s: its %s plan has not run", op, context);
    if (!router->routing.valid)
        return error_set(error, EPD_INVALID_ARGUMENT, "%s: the last step of its %s plan failed", op, context);
    if (run->plan->op != EPD_OP_MOE_WGRAD && run->n_tokens != router->routing.n_tokens)
        return error_set(error, EPD_INVALID_ARGUMENT,
                         "%s: n_tokens %u, want %u (of the last step of its %s plan)", op, run->n_tokens,
                         router->routing.n_tokens, context);
    return EPD_OK;
}

enum epd_status moe_check_step(const struct rank_run *run, struct epd_error *error)
{
    struct plan *plan = run->plan, *context = plan->context;
    struct plan *router = plan_router(plan);
    if (!context)
        return EPD_OK;
    if (check_router(run, router, error))
        return error->status;
    if (plan->op == EPD_OP_MOE_BACKWARD && !context->context_kept)
        return error_set(error, EPD_INVALID_ARGUMENT,
                         "moe_backward: its moe_forward plan has not run since the last backward");
    if (plan->op == EPD_OP_MOE_WGRAD && !context->held_generation)
        return error_set(error, EPD_INVALID_ARGUMENT,
                         "moe_wgrad: its moe_backward plan has not run since the last moe_wgrad");
    if (plan->op == EPD_OP_MOE_WGRAD && context->held_generation != router->generation)
        return error_set(error, EPD_INVALID_ARGUMENT,
                         "moe_wgrad: the moe_forward plan has run again since the backward");
    return EPD_OK;
}

void moe_begin_step(const struct rank_run *run)
{
    struct plan *plan = run->plan;
    if (!plan_routes(plan))
        return;
    plan->routing.valid = 0;
    plan->routing.stepped = 1;
    plan->routing.n_tokens = run->n_tokens;
    plan->generation++;
    plan->context_kept = 0;
}

void moe_finish_step(const struct rank_run *run)
{
    struct plan *plan = run->plan;
    if (plan_routes(plan))
        plan->routing.valid = 1;
    if (plan->op == EPD_OP_MOE_FORWARD)
        plan->context_kept = plan->saved != EPD_SAVED_NONE;
    if (plan->op == EPD_OP_MOE_BACKWARD && plan->delay_wgrad)
        plan->held_generation = plan->context->generation;
    if (plan->op == EPD_OP_MOE_WGRAD)
        plan->context->held_generation = 0;
}

void moe_undo_step(const struct rank_run *run, uint64_t generation)
{
    struct plan *plan = run->plan;
    if (plan->op == EPD_OP_MOE_BACKWARD && plan->held_generation == generation)
        plan->held_generation = 0;
    if (!plan_routes(plan))
        return;
    plan->failed_generation = generation;
    if (plan->generation != generation)
        return; /* it has run again since */
    plan->routing.valid = 0;
    plan->context_kept = 0;
}

enum epd_status moe_check_used(const struct rank_run *run, uint64_t generation, struct epd_error *error)
{
    const struct plan *router = plan_router(run->plan);
    if (!router || router == run->plan || !generation || router->failed_generation != generation)
        return EPD_OK;
    return error_set(error, EPD_INVALID_ARGUMENT, "%s: the last step of its %s plan failed",
                     op_name(run->plan->op), op_name(router->op));
}
