/* Phases that compute on the rows a rank has: grouped GEMMs and activations. */
#include "ep/phase.h"

/* The slabs of the routing that this plan uses. */
static struct row_groups slabs_of(const struct rank_run *run)
{
    const struct plan *router = plan_router(run->plan);
    const struct problem *problem = &run->plan->team->problem;
    return (struct row_groups){
        .n_groups = problem->n_local_experts,
        .m_splits = router->routing.routing.m_splits,
        .offsets = router->routing.routing.offsets,
        .max_rows = problem->capacity_rows,
    };
}

/* The groups of a local op: the plan's own copies of the caller's splits. */
static struct row_groups groups_of(const struct plan *plan)
{
    return (struct row_groups){
        .n_groups = (uint32_t)plan->bindings.dims[DIM_GROUPS],
        .m_splits = plan->splits,
        .offsets = plan_has(plan, EPD_ROLE_OFFSETS) ? plan->offsets : NULL,
        .max_rows = plan->bindings.dims[DIM_ROWS],
    };
}

static struct kernel_error *record_of(const struct rank_run *run)
{
    return &run->plan->records[PLAN_RECORD_EXPERT];
}

/* The caller may write its splits at any time: they are read once. */
enum epd_status expert_take_splits(const struct rank_run *run, struct epd_error *error)
{
    const struct plan *plan = run->plan;
    uint64_t n_groups = (uint64_t)plan->bindings.dims[DIM_GROUPS];
    if (run->backend->copy(run->queue, plan->splits, plan_data(plan, EPD_ROLE_M_SPLITS),
                           n_groups * sizeof(int64_t), error))
        return error->status;
    if (plan_has(plan, EPD_ROLE_OFFSETS) &&
        run->backend->copy(run->queue, plan->offsets, plan_data(plan, EPD_ROLE_OFFSETS),
                           (n_groups + 1) * sizeof(int64_t), error))
        return error->status;
    return EPD_OK;
}

enum epd_status expert_grouped_gemm(const struct rank_run *run, struct epd_error *error)
{
    const struct plan *plan = run->plan;
    const struct binding_set *set = &plan->bindings;
    enum epd_role bias = plan->layout == EPD_GEMM_NT ? EPD_ROLE_DBIAS : EPD_ROLE_BIAS;
    struct gemm_args args = {
        .shape =
            {
                .layout = plan->layout,
                .dtype = set->tensors[EPD_ROLE_A].dtype,
                .dtype_c = set->tensors[EPD_ROLE_C].dtype,
                .dtype_bias = set->tensors[bias].dtype,
                .n = (uint32_t)set->dims[DIM_N],
                .k = (uint32_t)set->dims[DIM_K],
                .accumulate = plan->accumulate,
            },
        .groups = groups_of(plan),
        .a = plan_data(plan, EPD_ROLE_A),
        .b = plan_data(plan, EPD_ROLE_B),
        .b_parts = (const void *const *)plan->part_tables[EPD_ROLE_B],
        .c = plan_data(plan, EPD_ROLE_C),
        .c_parts = plan->part_tables[EPD_ROLE_C],
        .bias = plan_data(plan, EPD_ROLE_BIAS),
        .dbias = plan_data(plan, EPD_ROLE_DBIAS),
        .error = record_of(run),
    };
    struct gemm_launch launch = {.args = args};
    return run->backend->gemm_launch(run->queue, plan->gemms[PLAN_GEMM_ALONE], &launch, error);
}

enum epd_status expert_activation_alone(const struct rank_run *run, struct epd_error *error)
{
    const struct plan *plan = run->plan;
    struct activation_args args = {
        .groups = groups_of(plan),
        .kind = plan->activation,
        .dtype = plan->bindings.tensors[EPD_ROLE_ACT].dtype,
        .ffn = (uint32_t)plan->bindings.dims[DIM_ACT],
        .preact = plan_data(plan, EPD_ROLE_PREACT),
        .act = plan_data(plan, EPD_ROLE_ACT),
        .row_weights = plan_data(plan, EPD_ROLE_RECV_WEIGHTS),
        .error = record_of(run),
    };
    return run->backend->activation(run->queue, &args, error);
}

enum epd_status expert_activation_bwd_alone(const struct rank_run *run, struct epd_error *error)
{
    const struct plan *plan = run->plan;
    struct activation_bwd_args args = {
        .groups = groups_of(plan),
        .kind = plan->activation,
        .dtype = plan->bindings.tensors[EPD_ROLE_D_ACT].dtype,
        .ffn = (uint32_t)plan->bindings.dims[DIM_ACT],
        .preact = plan_data(plan, EPD_ROLE_PREACT),
        .d_act = plan_data(plan, EPD_ROLE_D_ACT),
        .row_weights = plan_data(plan, EPD_ROLE_RECV_WEIGHTS),
        .d_preact = plan_data(plan, EPD_ROLE_D_PREACT),
        .weighted_act = plan_data(plan, EPD_ROLE_ACT),
        .d_row_weights = plan_data(plan, EPD_ROLE_D_RECV_WEIGHTS),
        .error = record_of(run),
    };
    return run->backend->activation_bwd(run->queue, &args, error);
}

/* One of the layer's GEMMs on the slabs. */
struct layer_gemm {
    enum plan_gemm gemm;
    enum epd_gemm_layout layout;
    uint32_t n, k;
    const void *a;
    const void *b; /* NT */
    void *c;       /* TN, NN */
    /* Of a GEMM that activates: struct gemm_launch. */
    void *act;
    const void *preact;
    const float *row_weights;
    float *d_row_weights;
    enum epd_role weights; /* TN, NN: b; NT: c */
    enum epd_role bias;    /* UNSPECIFIED: none */
};

static enum epd_status run_layer_gemm(const struct rank_run *run, const struct layer_gemm *gemm,
                                      struct epd_error *error)
{
    const struct problem *problem = &run->plan->team->problem;
    const struct plan *weights = plan_owner(run->plan, gemm->weights);
    const struct plan *bias = plan_owner(run->plan, gemm->bias);
    int is_wgrad = gemm->layout == EPD_GEMM_NT;
    struct gemm_args args = {
        .shape =
            {
                .layout = gemm->layout,
                .dtype = problem->dtype,
                .dtype_c = is_wgrad ? weights->bindings.tensors[gemm->weights].dtype : problem->dtype,
                .dtype_bias = bias ? bias->bindings.tensors[gemm->bias].dtype : EPD_DTYPE_UNSPECIFIED,
                .n = gemm->n,
                .k = gemm->k,
                .accumulate = is_wgrad && run->plan->accumulate,
            },
        .groups = slabs_of(run),
        .a = gemm->a,
        .b = is_wgrad ? gemm->b : plan_data(weights, gemm->weights),
        .b_parts = is_wgrad ? NULL : (const void *const *)weights->part_tables[gemm->weights],
        .c = is_wgrad ? plan_data(weights, gemm->weights) : gemm->c,
        .c_parts = is_wgrad ? weights->part_tables[gemm->weights] : NULL,
        .bias = bias && !is_wgrad ? plan_data(bias, gemm->bias) : NULL,
        .dbias = bias && is_wgrad ? plan_data(bias, gemm->bias) : NULL,
        .error = record_of(run),
    };
    struct gemm_launch launch = {
        .args = args,
        .act = gemm->act,
        .preact = gemm->preact,
        .row_weights = gemm->row_weights,
        .d_row_weights = gemm->d_row_weights,
    };
    return run->backend->gemm_launch(run->queue, run->plan->gemms[gemm->gemm], &launch, error);
}

/* moe_forward; and moe_backward where it recomputes. */
enum epd_status expert_fc1(const struct rank_run *run, struct epd_error *error)
{
    const struct problem *problem = &run->plan->team->problem;
    if (!run->plan->gemms[PLAN_GEMM_FC1])
        return EPD_OK;
    struct layer_gemm gemm = {
        .gemm = PLAN_GEMM_FC1,
        .layout = EPD_GEMM_TN,
        .n = 2 * problem->ffn,
        .k = problem->hidden,
        .a = run->plan->work.recv_x,
        .c = run->plan->work.preact,
        .act = run->plan->fc1_activates ? run->plan->work.act : NULL,
        .weights = EPD_ROLE_W1,
        .bias = EPD_ROLE_B1,
    };
    return run_layer_gemm(run, &gemm, error);
}

enum epd_status expert_activation(const struct rank_run *run, struct epd_error *error)
{
    const struct plan *plan = run->plan;
    if (plan->fc1_activates)
        return EPD_OK;
    struct activation_args args = {
        .groups = slabs_of(run),
        .kind = plan->activation,
        .dtype = plan->team->problem.dtype,
        .ffn = plan->team->problem.ffn,
        .preact = plan->work.preact,
        .act = plan->work.act,
        .error = record_of(run),
    };
    return run->backend->activation(run->queue, &args, error);
}

/* Straight into what combine reads. */
enum epd_status expert_fc2(const struct rank_run *run, struct epd_error *error)
{
    const struct problem *problem = &run->plan->team->problem;
    struct layer_gemm gemm = {
        .gemm = PLAN_GEMM_FC2,
        .layout = EPD_GEMM_TN,
        .n = problem->hidden,
        .k = problem->ffn,
        .a = run->plan->work.act,
        .c = run->plan->work.y,
        .weights = EPD_ROLE_W2,
        .bias = EPD_ROLE_B2,
    };
    return run_layer_gemm(run, &gemm, error);
}

static float *d_row_weights_of(const struct plan *plan)
{
    return plan_has(plan, EPD_ROLE_D_WEIGHTS) ? plan->work.row_scalars : NULL;
}

/* The gradient of the activation before its row was weighted; or what expert_activation_bwd makes of it. */
enum epd_status expert_d_act(const struct rank_run *run, struct epd_error *error)
{
    struct plan *plan = run->plan, *forward = plan->context;
    const struct problem *problem = &plan->team->problem;
    struct layer_gemm gemm = {
        .gemm = PLAN_GEMM_D_ACT,
        .layout = EPD_GEMM_NN,
        .n = problem->hidden,
        .k = problem->ffn,
        .a = plan->work.dout,
        .c = plan->work.act,
        .weights = EPD_ROLE_W2,
    };
    if (plan->d_act_activates) {
        gemm.c = plan->work.preact;
        gemm.act = plan->work.act;
        gemm.preact = plan->work.preact;
        gemm.row_weights = forward->routing.recv_weights;
        gemm.d_row_weights = d_row_weights_of(plan);
        forward->context_kept = 0;
    }
    return run_layer_gemm(run, &gemm, error);
}

/* In place: preact becomes its gradient, d_act the weighted activation. y is not needed for the gradient of
 * the weights: <dout, y> = <W2^T dout, act> + <dout, b2>. */
enum epd_status expert_activation_bwd(const struct rank_run *run, struct epd_error *error)
{
    struct plan *plan = run->plan, *forward = plan->context;
    const struct problem *problem = &plan->team->problem;
    const struct plan *bias2 = plan_owner(plan, EPD_ROLE_B2);
    float *d_row_weights = d_row_weights_of(plan);
    int with_bias2 = d_row_weights && bias2;
    if (plan->d_act_activates)
        return EPD_OK;
    struct activation_bwd_args args = {
        .groups = slabs_of(run),
        .kind = plan->activation,
        .dtype = problem->dtype,
        .ffn = problem->ffn,
        .preact = plan->work.preact,
        .d_act = plan->work.act,
        .row_weights = forward->routing.recv_weights,
        .d_preact = plan->work.preact,
        .weighted_act = plan->work.act,
        .d_row_weights = d_row_weights,
        .dy = with_bias2 ? plan->work.dout : NULL,
        .bias2 = with_bias2 ? plan_data(bias2, EPD_ROLE_B2) : NULL,
        .hidden = problem->hidden,
        .error = record_of(run),
    };
    /* Backward works in the saved context: it serves once. */
    forward->context_kept = 0;
    return run->backend->activation_bwd(run->queue, &args, error);
}

enum epd_status expert_dx(const struct rank_run *run, struct epd_error *error)
{
    const struct problem *problem = &run->plan->team->problem;
    if (!plan_has(run->plan, EPD_ROLE_DX))
        return EPD_OK;
    struct layer_gemm gemm = {
        .gemm = PLAN_GEMM_DX,
        .layout = EPD_GEMM_NN,
        .n = 2 * problem->ffn,
        .k = problem->hidden,
        .a = run->plan->work.preact,
        .c = run->plan->work.y,
        .weights = EPD_ROLE_W1,
    };
    return run_layer_gemm(run, &gemm, error);
}

/* The gradient of a bias whose GEMM does not make it: weighted, or without dW. */
static enum epd_status bias_grad(const struct rank_run *run, enum epd_role role, const void *dy,
                                 const float *row_weights, struct epd_error *error)
{
    const struct plan *plan = run->plan;
    const struct tensor *dbias = &plan->bindings.tensors[role];
    struct bias_grad_args args = {
        .groups = slabs_of(run),
        .dtype = plan->team->problem.dtype,
        .dtype_dbias = dbias->dtype,
        .n = (uint32_t)dbias->shape[1],
        .dy = dy,
        .row_weights = row_weights,
        .dbias = dbias->data,
        .accumulate = plan->accumulate,
        .error = record_of(run),
    };
    return run->backend->bias_grad(run->queue, &args, error);
}

/* moe_backward, or moe_wgrad on what a moe_backward left. */
enum epd_status expert_wgrad(const struct rank_run *run, struct epd_error *error)
{
    const struct plan *plan = run->plan;
    struct plan *backward = plan->op == EPD_OP_MOE_WGRAD ? plan->context : run->plan;
    const struct plan_work *work = &backward->work;
    const struct problem *problem = &plan->team->problem;
    struct layer_gemm dw2 = {
        .gemm = PLAN_GEMM_DW2,
        .layout = EPD_GEMM_NT,
        .n = problem->hidden,
        .k = problem->ffn,
        .a = work->dout,
        .b = work->act,
        .weights = EPD_ROLE_DW2,
    };
    struct layer_gemm dw1 = {
        .gemm = PLAN_GEMM_DW1,
        .layout = EPD_GEMM_NT,
        .n = 2 * problem->ffn,
        .k = problem->hidden,
        .a = work->preact,
        .b = work->recv_x,
        .weights = EPD_ROLE_DW1,
        .bias = EPD_ROLE_DB1,
    };
    if (plan_has(plan, EPD_ROLE_DW2) && run_layer_gemm(run, &dw2, error))
        return error->status;
    if (plan_has(plan, EPD_ROLE_DB2) &&
        bias_grad(run, EPD_ROLE_DB2, work->dout, backward->context->routing.recv_weights, error))
        return error->status;
    if (plan_has(plan, EPD_ROLE_DW1) && run_layer_gemm(run, &dw1, error))
        return error->status;
    if (plan_has(plan, EPD_ROLE_DB1) && !plan_has(plan, EPD_ROLE_DW1) &&
        bias_grad(run, EPD_ROLE_DB1, work->preact, NULL, error))
        return error->status;
    return EPD_OK;
}
