/* What a plan needs on its device, made once on the lane when the plan is created: the step path makes
 * nothing. */
#include "ep/hop.h"
#include "ep/plan_impl.h"

#include <string.h>

static int is_moe(const struct plan *plan)
{
    return plan->op == EPD_OP_MOE_FORWARD || plan->op == EPD_OP_MOE_BACKWARD;
}

static int recomputes(const struct plan *plan)
{
    return plan->op == EPD_OP_MOE_BACKWARD && plan->context->saved == EPD_SAVED_RECOMPUTE;
}

/* M_SPLITS of these is an input, and client memory: a step works on its own copy. */
static int takes_splits(const struct plan *plan)
{
    return plan->op == EPD_OP_GROUPED_GEMM || plan->op == EPD_OP_ACTIVATION ||
           plan->op == EPD_OP_ACTIVATION_BWD;
}

unsigned prepare_saved_parts(const struct plan *plan)
{
    if (plan->op == EPD_OP_MOE_FORWARD && plan->saved == EPD_SAVED_CONTEXT)
        return SAVED_RECV_X | SAVED_PREACT;
    if (plan->op == EPD_OP_MOE_BACKWARD && plan->delay_wgrad)
        return SAVED_DOUT | SAVED_ACT | (recomputes(plan) ? SAVED_RECV_X | SAVED_PREACT : 0u);
    return 0;
}

static int keeps_slots(const struct plan *plan)
{
    const struct problem *problem = &plan->team->problem;
    const struct exchange_shape shape = problem_shape(problem);
    struct exchange_sizes sizes;
    lane_backend(plan->lane)->exchange_sizes(&shape, problem->hidden * dtype_bytes(problem->dtype), &sizes);
    return sizes.keeps_slots;
}

static uint64_t carve_control(struct plan *plan)
{
    struct layout layout = {.base = plan->control.data};
    if (plan->op == EPD_OP_BARRIER)
        return 0;
    plan->records = layout_take(&layout, PLAN_RECORD_COUNT * sizeof *plan->records);
    if (plan_routes(plan))
        routing_carve(&plan->routing, &plan->team->problem,
                      plan->op == EPD_OP_MOE_FORWARD && plan->saved != EPD_SAVED_NONE, keeps_slots(plan),
                      &layout);
    if (plan_routes(plan) && team_spans(plan->team))
        plan->team->hop->carve_routing(&plan->routing, &plan->team->problem, &layout);
    if (takes_splits(plan)) {
        uint64_t n_groups = (uint64_t)plan->bindings.dims[DIM_GROUPS];
        plan->splits = layout_take(&layout, n_groups * sizeof *plan->splits);
        plan->offsets = layout_take(&layout, (n_groups + 1) * sizeof *plan->offsets);
    }
    for (int role = 0; role < EPD_ROLE_COUNT; role++)
        if (plan->bindings.parts[role])
            plan->part_tables[role] = layout_take(&layout, plan->bindings.n_parts[role] * sizeof(void *));
    return layout.bytes;
}

static enum epd_status make_control(struct plan *plan, struct epd_error *error)
{
    const struct backend *backend = lane_backend(plan->lane);
    uint64_t bytes = carve_control(plan);
    if (bytes == 0)
        return EPD_OK;
    if (team_alloc(plan->team, plan->rank, bytes, &plan->control, error))
        return error->status;
    (void)carve_control(plan);
    for (int role = 0; role < EPD_ROLE_COUNT; role++)
        if (plan->bindings.parts[role] &&
            backend->copy_in(lane_device(plan->lane), plan->part_tables[role], plan->bindings.parts[role],
                             plan->bindings.n_parts[role] * sizeof(void *), error))
            return error->status;
    return EPD_OK;
}

static enum epd_status make_saved(struct plan *plan, struct epd_error *error)
{
    if (!plan->saved_bytes)
        return EPD_OK;
    if (team_alloc(plan->team, plan->rank, plan->saved_bytes, &plan->kept.block, error))
        return error->status;
    saved_carve(&plan->kept, &plan->team->problem, plan->saved_parts);
    return EPD_OK;
}

/* Where one intermediate lies: in what is kept, or else in the team's scratch. */
static enum epd_status place(struct plan *plan, void *kept, enum scratch_region region, void **data,
                             struct epd_error *error)
{
    *data = kept;
    return kept ? EPD_OK : team_scratch(plan->team, plan->rank, region, data, error);
}

static enum epd_status place_forward(struct plan *plan, struct epd_error *error)
{
    struct plan_work *work = &plan->work;
    int writes_preact = !plan->fc1_activates || plan->kept.preact;
    if (place(plan, plan->kept.recv_x, SCRATCH_SLOTS, &work->recv_x, error) ||
        (writes_preact && place(plan, plan->kept.preact, SCRATCH_PREACT, &work->preact, error)) ||
        place(plan, NULL, SCRATCH_ACT, &work->act, error))
        return error->status;
    return place(plan, NULL, SCRATCH_Y, &work->y, error);
}

static enum epd_status place_backward(struct plan *plan, struct epd_error *error)
{
    struct plan_work *work = &plan->work;
    const struct saved_context *from = recomputes(plan) ? &plan->kept : &plan->context->kept;
    void *row_scalars;
    if (place(plan, from->recv_x, SCRATCH_SLOTS, &work->recv_x, error) ||
        place(plan, from->preact, SCRATCH_PREACT, &work->preact, error) ||
        place(plan, plan->kept.act, SCRATCH_ACT, &work->act, error) ||
        place(plan, plan->kept.dout, recomputes(plan) ? SCRATCH_DOUT : SCRATCH_SLOTS, &work->dout, error) ||
        place(plan, NULL, SCRATCH_Y, &work->y, error) ||
        place(plan, NULL, SCRATCH_ROW_SCALARS, &row_scalars, error))
        return error->status;
    work->row_scalars = row_scalars;
    return EPD_OK;
}

/* Exchange ops work on the caller's tensors in place. */
static void place_bound(struct plan *plan)
{
    struct plan_work *work = &plan->work;
    switch (plan->op) {
    case EPD_OP_DISPATCH:
        work->recv_x = plan_data(plan, EPD_ROLE_RECV_X);
        break;
    case EPD_OP_COMBINE:
        work->y = plan_data(plan, EPD_ROLE_Y);
        break;
    case EPD_OP_DISPATCH_BWD:
        work->y = plan_data(plan, EPD_ROLE_D_RECV_X);
        work->row_scalars = plan_data(plan, EPD_ROLE_D_RECV_WEIGHTS);
        break;
    case EPD_OP_COMBINE_BWD:
        work->y = plan_data(plan, EPD_ROLE_Y);
        work->dout = plan_data(plan, EPD_ROLE_DY);
        break;
    default:
        break;
    }
}

/* What the backend's exchange works in. */
static enum epd_status place_exchange(struct plan *plan, struct epd_error *error)
{
    void *dot = NULL;
    if (!plan_router(plan) || !op_is_collective(plan->op))
        return EPD_OK;
    if (team_scratch(plan->team, plan->rank, SCRATCH_WORKSPACE, &plan->work.workspace, error) ||
        (plan->op == EPD_OP_COMBINE_BWD && plan_has(plan, EPD_ROLE_D_WEIGHTS) &&
         team_scratch(plan->team, plan->rank, SCRATCH_DOT, &dot, error)))
        return error->status;
    plan->work.dot = dot;
    return EPD_OK;
}

static enum epd_status make_work(struct plan *plan, struct epd_error *error)
{
    if (place_exchange(plan, error))
        return error->status;
    if (plan->op == EPD_OP_MOE_FORWARD)
        return place_forward(plan, error);
    if (plan->op == EPD_OP_MOE_BACKWARD)
        return place_backward(plan, error);
    place_bound(plan);
    return EPD_OK;
}

static enum epd_status add_gemm(struct plan *plan, enum plan_gemm slot, const struct gemm_problem *problem,
                                struct epd_error *error)
{
    if (lane_backend(plan->lane)->gemm_create(lane_device(plan->lane), problem, &plan->gemms[slot], error))
        return error->status;
    plan->flops_per_row += 2 * (uint64_t)problem->shape.n * problem->shape.k;
    return EPD_OK;
}

/* One of the layer's GEMMs. bias: UNSPECIFIED if there is none; likewise weights for NT, whose B is no
 * weight. */
static struct gemm_problem layer_problem(const struct plan *plan, struct gemm_shape shape,
                                         enum epd_role weights, enum epd_role bias)
{
    const struct problem *sizes = &plan->team->problem;
    const struct plan *weights_owner = plan_owner(plan, weights), *bias_owner = plan_owner(plan, bias);
    int64_t expected_rows = (int64_t)sizes->max_tokens * sizes->top_k;
    shape.dtype = sizes->dtype;
    if (!shape.dtype_c)
        shape.dtype_c = sizes->dtype;
    if (bias_owner)
        shape.dtype_bias = bias_owner->bindings.tensors[bias].dtype;
    return (struct gemm_problem){
        .shape = shape,
        .n_groups = sizes->n_local_experts,
        .max_rows = sizes->capacity_rows,
        .expected_rows = expected_rows < sizes->capacity_rows ? expected_rows : sizes->capacity_rows,
        .pointer_parts = weights_owner && weights_owner->bindings.parts[weights],
    };
}

static enum epd_status add_layer_gemm(struct plan *plan, enum plan_gemm slot, struct gemm_shape shape,
                                      enum epd_role weights, enum epd_role bias, struct epd_error *error)
{
    const struct gemm_problem problem = layer_problem(plan, shape, weights, bias);
    return add_gemm(plan, slot, &problem, error);
}

/* With the plan's activation where an engine can; else plain, and a pass of its own follows. */
static enum epd_status add_activating_gemm(struct plan *plan, enum plan_gemm slot,
                                           const struct gemm_problem *plain, const struct gemm_problem *fused,
                                           int *activates, struct epd_error *error)
{
    struct epd_error refusal = {.status = EPD_OK};
    *activates = add_gemm(plan, slot, fused, &refusal) == EPD_OK;
    if (*activates)
        return EPD_OK;
    if (refusal.status != EPD_UNSUPPORTED) {
        *error = refusal;
        return error->status;
    }
    return add_gemm(plan, slot, plain, error);
}

static enum epd_status add_fc1(struct plan *plan, struct gemm_shape shape, struct epd_error *error)
{
    const struct gemm_problem plain = layer_problem(plan, shape, EPD_ROLE_W1, EPD_ROLE_B1);
    struct gemm_problem fused = plain;
    if (plan->op != EPD_OP_MOE_FORWARD) /* a backward that recomputes: the pre-activation is all it wants */
        return add_gemm(plan, PLAN_GEMM_FC1, &plain, error);
    fused.activation = plan->activation;
    fused.keep_preact = plan->kept.preact != NULL;
    return add_activating_gemm(plan, PLAN_GEMM_FC1, &plain, &fused, &plan->fc1_activates, error);
}

static enum epd_status add_d_act(struct plan *plan, struct gemm_shape shape, struct epd_error *error)
{
    const struct gemm_problem plain = layer_problem(plan, shape, EPD_ROLE_W2, EPD_ROLE_UNSPECIFIED);
    struct gemm_problem fused = plain;
    int d_weights = plan_has(plan, EPD_ROLE_D_WEIGHTS);
    if (d_weights && plan_owner(plan, EPD_ROLE_B2)) /* <dout, b2> belongs to it and needs all of dout's row */
        return add_gemm(plan, PLAN_GEMM_D_ACT, &plain, error);
    fused.activation = plan->activation;
    fused.row_weights = 1;
    fused.d_row_weights = d_weights;
    return add_activating_gemm(plan, PLAN_GEMM_D_ACT, &plain, &fused, &plan->d_act_activates, error);
}

static enum epd_status make_wgrad_gemms(struct plan *plan, struct epd_error *error)
{
    const struct problem *sizes = &plan->team->problem;
    struct gemm_shape dw1 = {.layout = EPD_GEMM_NT, .n = 2 * sizes->ffn, .k = sizes->hidden};
    struct gemm_shape dw2 = {.layout = EPD_GEMM_NT, .n = sizes->hidden, .k = sizes->ffn};
    dw1.accumulate = dw2.accumulate = plan->accumulate;
    dw1.dtype_c = plan->bindings.tensors[EPD_ROLE_DW1].dtype;
    dw2.dtype_c = plan->bindings.tensors[EPD_ROLE_DW2].dtype;
    /* db2 is not in its GEMM: the rows of dout are not weighted. */
    if (plan_has(plan, EPD_ROLE_DW2) &&
        add_layer_gemm(plan, PLAN_GEMM_DW2, dw2, EPD_ROLE_DW2, EPD_ROLE_UNSPECIFIED, error))
        return error->status;
    if (plan_has(plan, EPD_ROLE_DW1) &&
        add_layer_gemm(plan, PLAN_GEMM_DW1, dw1, EPD_ROLE_DW1, EPD_ROLE_DB1, error))
        return error->status;
    return EPD_OK;
}

static enum epd_status make_moe_gemms(struct plan *plan, struct epd_error *error)
{
    const struct problem *sizes = &plan->team->problem;
    uint32_t h = sizes->hidden, f = sizes->ffn;
    struct gemm_shape fc1 = {.layout = EPD_GEMM_TN, .n = 2 * f, .k = h};
    struct gemm_shape fc2 = {.layout = EPD_GEMM_TN, .n = h, .k = f};
    struct gemm_shape d_act = {.layout = EPD_GEMM_NN, .n = h, .k = f};
    struct gemm_shape dx = {.layout = EPD_GEMM_NN, .n = 2 * f, .k = h};
    if ((plan->op == EPD_OP_MOE_FORWARD || recomputes(plan)) && add_fc1(plan, fc1, error))
        return error->status;
    if (plan->op == EPD_OP_MOE_FORWARD)
        return add_layer_gemm(plan, PLAN_GEMM_FC2, fc2, EPD_ROLE_W2, EPD_ROLE_B2, error);
    if (add_d_act(plan, d_act, error))
        return error->status;
    if (plan_has(plan, EPD_ROLE_DX) &&
        add_layer_gemm(plan, PLAN_GEMM_DX, dx, EPD_ROLE_W1, EPD_ROLE_UNSPECIFIED, error))
        return error->status;
    return make_wgrad_gemms(plan, error);
}

static enum epd_status make_grouped_gemm(struct plan *plan, struct epd_error *error)
{
    const struct binding_set *set = &plan->bindings;
    enum epd_role bias = plan->layout == EPD_GEMM_NT ? EPD_ROLE_DBIAS : EPD_ROLE_BIAS;
    enum epd_role weights = plan->layout == EPD_GEMM_NT ? EPD_ROLE_C : EPD_ROLE_B;
    struct gemm_problem problem = {
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
        .n_groups = (uint32_t)set->dims[DIM_GROUPS],
        .max_rows = set->dims[DIM_ROWS],
        .pointer_parts = set->parts[weights] != NULL,
    };
    return add_gemm(plan, PLAN_GEMM_ALONE, &problem, error);
}

static enum epd_status make_gemms(struct plan *plan, struct epd_error *error)
{
    if (is_moe(plan))
        return make_moe_gemms(plan, error);
    if (plan->op == EPD_OP_MOE_WGRAD)
        return make_wgrad_gemms(plan, error);
    if (plan->op == EPD_OP_GROUPED_GEMM)
        return make_grouped_gemm(plan, error);
    return EPD_OK;
}

static int is_recordable(const struct plan *plan)
{
    const struct backend *backend = lane_backend(plan->lane);
    int recordable = backend->records && plan->team->fused && is_moe(plan);
    for (int i = 0; i < PLAN_GEMM_COUNT && recordable; i++)
        recordable = !plan->gemms[i] || backend->gemm_recordable(plan->gemms[i]);
    return recordable;
}

enum epd_status prepare_plan(struct plan *plan, struct epd_error *error)
{
    struct backend_queue *queue;
    if (team_queue(plan->team, plan->rank, &queue, error))
        return error->status;
    if (lane_backend(plan->lane)->flag_open(lane_device(plan->lane), &plan->flag, error))
        return error->status;
    if (make_control(plan, error) || make_saved(plan, error) || make_gemms(plan, error) ||
        make_work(plan, error)) {
        prepare_undo(plan);
        return error->status;
    }
    plan->recordable = is_recordable(plan);
    return EPD_OK;
}

void prepare_undo(struct plan *plan)
{
    if (plan->graph)
        lane_backend(plan->lane)->graph_destroy(lane_device(plan->lane), plan->graph);
    plan->graph = NULL;
    for (int i = 0; i < PLAN_GEMM_COUNT; i++)
        if (plan->gemms[i])
            lane_backend(plan->lane)->gemm_destroy(plan->gemms[i]);
    memset(plan->gemms, 0, sizeof plan->gemms);
    team_free(plan->team, plan->rank, &plan->kept.block);
    team_free(plan->team, plan->rank, &plan->control);
    lane_backend(plan->lane)->flag_close(lane_device(plan->lane), &plan->flag);
}
