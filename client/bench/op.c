#include "client/bench/op.h"

#include <stdarg.h>

#include "client/bench/fill.h"

static enum epd_status op_check(struct op *op, const char *what, enum epd_status status)
{
    if (status != EPD_OK)
        (void)snprintf(op->text, sizeof(op->text), "%s: %s: %s", what, epd_status_name(status),
                       epd_error_text());
    return status;
}

static enum epd_status op_connect(struct op *op)
{
    char name[32];
    (void)snprintf(name, sizeof(name), "epd-bench rank %u", op->rank);
    const struct epd_open_options options = {
        .size = sizeof(options), .socket_path = op->job->socket_path, .client_name = name};
    enum epd_status status = op_check(op, "connecting", epd_open(&options, &op->client));
    if (status != EPD_OK)
        return status;
    struct epd_client_info info = {.size = sizeof(info)};
    status = op_check(op, "asking for the backend", epd_client_info(op->client, &info));
    if (status == EPD_OK && info.backend != EPD_BACKEND_HOST) {
        (void)snprintf(
            op->text, sizeof(op->text),
            "the daemon runs the CUDA backend; epd-bench fills its inputs on the host and measures the "
            "host backend only");
        return EPD_UNSUPPORTED;
    }
    return status;
}

static enum epd_status op_join(struct op *op)
{
    const struct job *job = op->job;
    const struct epd_group_options options = {
        .size = sizeof(options),
        .name = job->group_name,
        .world_size = job->n_ranks,
        .rank = op->rank,
        .n_experts = job->n_experts,
        .top_k = job->top_k,
        .hidden = job->hidden,
        .ffn = job->ffn,
        .max_tokens = job->n_tokens,
        .capacity_rows = job->capacity_rows,
        .dtype = job->dtype,
    };
    enum epd_status status = op_check(op, "joining", epd_group_join(op->client, &options, &op->group));
    if (status != EPD_OK)
        return status;
    op->group_info = (struct epd_group_info){.size = sizeof(op->group_info)};
    return op_check(op, "asking for the group", epd_group_info(op->group, &op->group_info));
}

/* Element bytes of any dtype that the ops take. */
static uint64_t element_bytes(enum epd_dtype dtype)
{
    return dtype == EPD_I64 ? 8 : dtype == EPD_F32 || dtype == EPD_I32 ? 4 : 2;
}

struct shape {
    uint32_t n_dims;
    int64_t d[3];
};

/* Gives the role a buffer of its own; zeros. */
static enum epd_status op_tensor(struct op *op, enum epd_role role, enum epd_dtype dtype, struct shape shape)
{
    struct epd_tensor *tensor = &op->tensors[role];
    *tensor = (struct epd_tensor){.role = role, .dtype = dtype, .n_dims = shape.n_dims};
    uint64_t bytes = element_bytes(dtype);
    for (uint32_t i = 0; i < 3; i++) {
        tensor->shape[i] = i < shape.n_dims ? shape.d[i] : 1;
        bytes *= (uint64_t)tensor->shape[i];
    }
    return op_check(op, "allocating", epd_buffer_alloc(op->group, bytes, &tensor->buffer));
}

/* The same with random values. */
static enum epd_status op_input(struct op *op, enum epd_role role, struct shape shape, float scale)
{
    enum epd_status status = op_tensor(op, role, op->job->dtype, shape);
    if (status == EPD_OK)
        fill_values(epd_buffer_data(op->tensors[role].buffer),
                    epd_buffer_bytes(op->tensors[role].buffer) / element_bytes(op->job->dtype),
                    op->job->dtype, scale, 1000003ull * (uint64_t)role + op->rank);
    return status;
}

static enum epd_status op_routing(struct op *op)
{
    const struct job *job = op->job;
    const struct shape shape = {2, {job->n_tokens, job->top_k, 0}};
    enum epd_status status =
        op_input(op, EPD_ROLE_X, (struct shape){2, {job->n_tokens, job->hidden, 0}}, 1.0f);
    if (status == EPD_OK)
        status = op_tensor(op, EPD_ROLE_TOPK_IDX, EPD_I32, shape);
    if (status == EPD_OK)
        status = op_tensor(op, EPD_ROLE_TOPK_WEIGHTS, EPD_F32, shape);
    if (status == EPD_OK)
        fill_routing(epd_buffer_data(op->tensors[EPD_ROLE_TOPK_IDX].buffer),
                     epd_buffer_data(op->tensors[EPD_ROLE_TOPK_WEIGHTS].buffer), job->n_tokens,
                     job->n_experts, job->top_k, op->rank);
    return status;
}

/* A plan over the roles given, ended by 0. */
static enum epd_status op_plan(struct op *op, struct epd_plan_options options, struct epd_plan **plan, ...)
{
    struct epd_tensor tensors[EPD_ROLE_COUNT];
    va_list roles;
    va_start(roles, plan);
    for (int role = va_arg(roles, int); role; role = va_arg(roles, int))
        tensors[options.n_tensors++] = op->tensors[role];
    va_end(roles);
    options.size = sizeof(options);
    options.tensors = tensors;
    return op_check(op, "creating the plan", epd_plan_create(op->group, &options, plan));
}

static enum epd_status op_launch(struct op *op, struct epd_plan *plan)
{
    enum epd_status status = epd_plan_launch(plan, NULL);
    if (status == EPD_OK)
        status = epd_plan_wait(plan, 0);
    return op_check(op, "launching", status);
}

static enum epd_status open_dispatch(struct op *op, struct epd_plan **plan)
{
    const int64_t n_rows = op->group_info.capacity_rows, n_local = op->group_info.n_local_experts;
    enum epd_status status = op_routing(op);
    if (status == EPD_OK)
        status =
            op_tensor(op, EPD_ROLE_RECV_X, op->job->dtype, (struct shape){2, {n_rows, op->job->hidden, 0}});
    if (status == EPD_OK)
        status = op_tensor(op, EPD_ROLE_M_SPLITS, EPD_I64, (struct shape){1, {n_local, 0, 0}});
    if (status != EPD_OK)
        return status;
    return op_plan(op, (struct epd_plan_options){.op = EPD_OP_DISPATCH}, plan, EPD_ROLE_X, EPD_ROLE_TOPK_IDX,
                   EPD_ROLE_TOPK_WEIGHTS, EPD_ROLE_RECV_X, EPD_ROLE_M_SPLITS, 0);
}

/* The received rows stand for the experts' answers: combine reads the buffer that dispatch wrote. */
static enum epd_status open_combine(struct op *op)
{
    struct epd_plan *dispatch = NULL;
    enum epd_status status = open_dispatch(op, &dispatch);
    if (status == EPD_OK)
        status = op_launch(op, dispatch);
    if (status == EPD_OK)
        status = op_tensor(op, EPD_ROLE_OUT, op->job->dtype,
                           (struct shape){2, {op->job->n_tokens, op->job->hidden, 0}});
    if (status != EPD_OK)
        return status;
    op->tensors[EPD_ROLE_Y] = op->tensors[EPD_ROLE_RECV_X];
    op->tensors[EPD_ROLE_Y].role = EPD_ROLE_Y;
    return op_plan(op, (struct epd_plan_options){.op = EPD_OP_COMBINE, .context = dispatch}, &op->measured,
                   EPD_ROLE_Y, EPD_ROLE_TOPK_WEIGHTS, EPD_ROLE_OUT, 0);
}

/* The first GEMM of a layer with n_rows rows, spread evenly over the local experts. */
static enum epd_status open_grouped_gemm(struct op *op, int64_t n_rows)
{
    const int64_t n_local = op->group_info.n_local_experts, hidden = op->job->hidden,
                  width = 2 * (int64_t)op->job->ffn;
    enum epd_status status = op_input(op, EPD_ROLE_A, (struct shape){2, {n_rows, hidden, 0}}, 1.0f);
    if (status == EPD_OK)
        status = op_input(op, EPD_ROLE_B, (struct shape){3, {n_local, width, hidden}}, 1.0f / 64);
    if (status == EPD_OK)
        status = op_tensor(op, EPD_ROLE_M_SPLITS, EPD_I64, (struct shape){1, {n_local, 0, 0}});
    if (status == EPD_OK)
        status = op_tensor(op, EPD_ROLE_C, op->job->dtype, (struct shape){2, {n_rows, width, 0}});
    if (status != EPD_OK)
        return status;
    int64_t *splits = epd_buffer_data(op->tensors[EPD_ROLE_M_SPLITS].buffer);
    for (int64_t l = 0; l < n_local; l++)
        splits[l] = n_rows * (l + 1) / n_local - n_rows * l / n_local;
    return op_plan(op, (struct epd_plan_options){.op = EPD_OP_GROUPED_GEMM, .layout = EPD_GEMM_TN},
                   &op->measured, EPD_ROLE_A, EPD_ROLE_B, EPD_ROLE_M_SPLITS, EPD_ROLE_C, 0);
}

static enum epd_status open_forward(struct op *op, enum epd_saved saved, struct epd_plan **plan)
{
    const int64_t n_local = op->group_info.n_local_experts, hidden = op->job->hidden, ffn = op->job->ffn;
    enum epd_status status = op_routing(op);
    if (status == EPD_OK)
        status = op_input(op, EPD_ROLE_W1, (struct shape){3, {n_local, 2 * ffn, hidden}}, 1.0f / 64);
    if (status == EPD_OK)
        status = op_input(op, EPD_ROLE_W2, (struct shape){3, {n_local, hidden, ffn}}, 1.0f / 64);
    if (status == EPD_OK)
        status =
            op_tensor(op, EPD_ROLE_OUT, op->job->dtype, (struct shape){2, {op->job->n_tokens, hidden, 0}});
    if (status != EPD_OK)
        return status;
    return op_plan(
        op, (struct epd_plan_options){.op = EPD_OP_MOE_FORWARD, .activation = EPD_SWIGLU, .saved = saved},
        plan, EPD_ROLE_X, EPD_ROLE_TOPK_IDX, EPD_ROLE_TOPK_WEIGHTS, EPD_ROLE_W1, EPD_ROLE_W2, EPD_ROLE_OUT,
        0);
}

static enum epd_status open_backward(struct op *op)
{
    const struct job *job = op->job;
    const int64_t n_local = op->group_info.n_local_experts, hidden = job->hidden, ffn = job->ffn;
    enum epd_status status = open_forward(op, EPD_SAVED_CONTEXT, &op->before);
    if (status == EPD_OK)
        status = op_input(op, EPD_ROLE_DOUT, (struct shape){2, {job->n_tokens, hidden, 0}}, 1.0f / 64);
    if (status == EPD_OK)
        status = op_tensor(op, EPD_ROLE_DX, job->dtype, (struct shape){2, {job->n_tokens, hidden, 0}});
    if (status == EPD_OK)
        status =
            op_tensor(op, EPD_ROLE_D_WEIGHTS, EPD_F32, (struct shape){2, {job->n_tokens, job->top_k, 0}});
    if (status == EPD_OK)
        status = op_tensor(op, EPD_ROLE_DW1, job->dtype, (struct shape){3, {n_local, 2 * ffn, hidden}});
    if (status == EPD_OK)
        status = op_tensor(op, EPD_ROLE_DW2, job->dtype, (struct shape){3, {n_local, hidden, ffn}});
    if (status != EPD_OK)
        return status;
    return op_plan(
        op,
        (struct epd_plan_options){.op = EPD_OP_MOE_BACKWARD, .context = op->before, .activation = EPD_SWIGLU},
        &op->measured, EPD_ROLE_DOUT, EPD_ROLE_W1, EPD_ROLE_W2, EPD_ROLE_DX, EPD_ROLE_D_WEIGHTS, EPD_ROLE_DW1,
        EPD_ROLE_DW2, 0);
}

static enum epd_status open_plans(struct op *op)
{
    switch (op->job->op) {
    case JOB_HANDOFF_BARRIER:
        return op_plan(op, (struct epd_plan_options){.op = EPD_OP_BARRIER}, &op->measured, 0);
    case JOB_HANDOFF_GROUPED_GEMM:
        return op->rank == 0 ? open_grouped_gemm(op, 1) : EPD_OK;
    case JOB_DISPATCH:
        return open_dispatch(op, &op->measured);
    case JOB_COMBINE:
        return open_combine(op);
    case JOB_GROUPED_GEMM:
        return open_grouped_gemm(op, (int64_t)op->job->n_tokens * op->job->top_k);
    case JOB_MOE_FORWARD:
        return open_forward(op, EPD_SAVED_NONE, &op->measured);
    case JOB_MOE_BACKWARD:
        return open_backward(op);
    case JOB_OP_COUNT:
        break;
    }
    return EPD_INTERNAL;
}

enum epd_status op_open(struct op *op, const struct job *job, uint32_t rank)
{
    *op = (struct op){.job = job, .rank = rank};
    enum epd_status status = op_connect(op);
    if (status == EPD_OK)
        status = op_join(op);
    if (status == EPD_OK)
        status = open_plans(op);
    if (status != EPD_OK)
        op_close(op);
    return status;
}

void op_close(struct op *op)
{
    epd_close(op->client);
    op->client = NULL;
}

enum epd_status op_prepare(struct op *op)
{
    return op->before ? op_launch(op, op->before) : EPD_OK;
}

enum epd_status op_run(struct op *op)
{
    return op->measured ? op_launch(op, op->measured) : EPD_OK;
}
