#include "client/bench/op.h"

#include <stdarg.h>
#include <string.h>

#include "client/bench/op_impl.h"

enum epd_status op_check(struct op *op, const char *what, enum epd_status status)
{
    if (status != EPD_OK)
        (void)snprintf(op->text, sizeof(op->text), "%s: %s: %s", what, epd_status_name(status),
                       epd_error_text());
    return status;
}

/* The device that the daemon will give to this rank; current before anything of CUDA is asked of libepd. */
static enum epd_status op_open_gpu(struct op *op, const uint8_t uuid[16])
{
    enum epd_status status = gpu_open(&op->gpu, uuid, op->n_marks);
    if (status != EPD_OK)
        (void)snprintf(op->text, sizeof(op->text), "%s", op->gpu.text);
    return status;
}

static enum epd_status connect_client(struct op *op)
{
    char name[32];
    (void)snprintf(name, sizeof(name), "epd-bench rank %u", op->rank);
    const struct epd_open_options options = {
        .size = sizeof(options), .socket_path = job_socket(op->job, op->rank), .client_name = name};
    enum epd_status status = op_check(op, "connecting", epd_open(&options, &op->client));
    if (status != EPD_OK)
        return status;
    struct epd_client_info info = {.size = sizeof(info)};
    status = op_check(op, "asking for the backend", epd_client_info(op->client, &info));
    if (status != EPD_OK || info.backend != EPD_BACKEND_CUDA)
        return status;
    return op_open_gpu(op, info.devices[op->rank % info.n_devices].uuid);
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
        .n_nodes = job->n_nodes,
    };
    enum epd_status status = op_check(op, "joining", epd_group_join(op->client, &options, &op->group));
    if (status != EPD_OK)
        return status;
    op->group_info = (struct epd_group_info){.size = sizeof(op->group_info)};
    return op_check(op, "asking for the group", epd_group_info(op->group, &op->group_info));
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
    enum epd_status status = epd_plan_launch(plan, op->gpu.state ? gpu_stream(&op->gpu) : NULL);
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
    return op_plan(op, (struct epd_plan_options){.op = EPD_OP_DISPATCH, .crossing = op->job->crossing}, plan,
                   EPD_ROLE_X, EPD_ROLE_TOPK_IDX, EPD_ROLE_RECV_X, EPD_ROLE_M_SPLITS, 0);
}

/* A dispatch that is launched once, as the context of what is measured. */
static enum epd_status open_context(struct op *op, struct epd_plan **dispatch)
{
    enum epd_status status = open_dispatch(op, dispatch);
    return status == EPD_OK ? op_launch(op, *dispatch) : status;
}

/* The received rows stand for the experts' answers: combine reads the buffer that dispatch wrote. */
static enum epd_status open_combine(struct op *op, int weighted)
{
    struct epd_plan *dispatch = NULL;
    enum epd_status status = open_context(op, &dispatch);
    if (status == EPD_OK)
        status = op_tensor(op, EPD_ROLE_OUT, op->job->dtype,
                           (struct shape){2, {op->job->n_tokens, op->job->hidden, 0}});
    if (status != EPD_OK)
        return status;
    op->tensors[EPD_ROLE_Y] = op->tensors[EPD_ROLE_RECV_X];
    op->tensors[EPD_ROLE_Y].role = EPD_ROLE_Y;
    return op_plan(op, (struct epd_plan_options){.op = EPD_OP_COMBINE, .context = dispatch}, &op->measured,
                   EPD_ROLE_Y, EPD_ROLE_OUT, weighted ? EPD_ROLE_TOPK_WEIGHTS : 0, 0);
}

/* The received rows stand for the gradients of the slots. */
static enum epd_status open_dispatch_bwd(struct op *op)
{
    const struct job *job = op->job;
    struct epd_plan *dispatch = NULL;
    enum epd_status status = open_context(op, &dispatch);
    if (status == EPD_OK)
        status = op_tensor(op, EPD_ROLE_DX, job->dtype, (struct shape){2, {job->n_tokens, job->hidden, 0}});
    if (status != EPD_OK)
        return status;
    op->tensors[EPD_ROLE_D_RECV_X] = op->tensors[EPD_ROLE_RECV_X];
    op->tensors[EPD_ROLE_D_RECV_X].role = EPD_ROLE_D_RECV_X;
    return op_plan(op, (struct epd_plan_options){.op = EPD_OP_DISPATCH_BWD, .context = dispatch},
                   &op->measured, EPD_ROLE_D_RECV_X, EPD_ROLE_DX, 0);
}

/* The received rows stand for the experts' answers. */
static enum epd_status open_combine_bwd(struct op *op)
{
    const struct job *job = op->job;
    const int64_t n_rows = op->group_info.capacity_rows;
    struct epd_plan *dispatch = NULL;
    enum epd_status status = open_context(op, &dispatch);
    if (status == EPD_OK)
        status = op_input(op, EPD_ROLE_DOUT, (struct shape){2, {job->n_tokens, job->hidden, 0}}, 1.0f / 64);
    if (status == EPD_OK)
        status = op_tensor(op, EPD_ROLE_DY, job->dtype, (struct shape){2, {n_rows, job->hidden, 0}});
    if (status == EPD_OK)
        status =
            op_tensor(op, EPD_ROLE_D_WEIGHTS, EPD_F32, (struct shape){2, {job->n_tokens, job->top_k, 0}});
    if (status != EPD_OK)
        return status;
    op->tensors[EPD_ROLE_Y] = op->tensors[EPD_ROLE_RECV_X];
    op->tensors[EPD_ROLE_Y].role = EPD_ROLE_Y;
    return op_plan(op, (struct epd_plan_options){.op = EPD_OP_COMBINE_BWD, .context = dispatch},
                   &op->measured, EPD_ROLE_DOUT, EPD_ROLE_TOPK_WEIGHTS, EPD_ROLE_Y, EPD_ROLE_DY,
                   EPD_ROLE_D_WEIGHTS, 0);
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
        status = op_even_splits(op, n_rows);
    if (status == EPD_OK)
        status = op_tensor(op, EPD_ROLE_C, op->job->dtype, (struct shape){2, {n_rows, width, 0}});
    if (status != EPD_OK)
        return status;
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
    return op_plan(op,
                   (struct epd_plan_options){.op = EPD_OP_MOE_FORWARD,
                                             .activation = EPD_SWIGLU,
                                             .saved = saved,
                                             .crossing = op->job->crossing},
                   plan, EPD_ROLE_X, EPD_ROLE_TOPK_IDX, EPD_ROLE_TOPK_WEIGHTS, EPD_ROLE_W1, EPD_ROLE_W2,
                   EPD_ROLE_OUT, 0);
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
    case JOB_COMBINE_WEIGHTED:
        return open_combine(op, op->job->op == JOB_COMBINE_WEIGHTED);
    case JOB_DISPATCH_BWD:
        return open_dispatch_bwd(op);
    case JOB_COMBINE_BWD:
        return open_combine_bwd(op);
    case JOB_GROUPED_GEMM:
        return open_grouped_gemm(op, (int64_t)op->job->n_tokens * op->job->top_k);
    case JOB_MOE_FORWARD:
        return open_forward(op, EPD_SAVED_NONE, &op->measured);
    case JOB_MOE_BACKWARD:
        return open_backward(op);
    case JOB_PEER_LOSS:
        return open_forward(op, EPD_SAVED_NONE, &op->measured);
    case JOB_LINK:
    case JOB_OP_COUNT:
        break;
    }
    return EPD_INTERNAL;
}

enum epd_status op_connect(struct op *op, const struct job *job, uint32_t rank, uint32_t n_marks)
{
    *op = (struct op){.job = job, .rank = rank, .n_marks = n_marks};
    enum epd_status status = connect_client(op);
    if (status != EPD_OK)
        op_close(op);
    return status;
}

enum epd_status op_enter(struct op *op)
{
    enum epd_status status = EPD_OK;
    memset(op->tensors, 0, sizeof(op->tensors));
    op->own_bytes = 0;
    if (op->gpu.state)
        status = gpu_free_bytes(&op->gpu, &op->free_bytes);
    if (status == EPD_OK)
        status = op_join(op);
    return status == EPD_OK ? open_plans(op) : status;
}

void op_leave(struct op *op)
{
    epd_group_leave(op->group);
    op->group = NULL;
    op->before = op->measured = NULL;
    gpu_free_all(&op->gpu);
}

void op_close(struct op *op)
{
    epd_close(op->client);
    op->client = NULL;
    gpu_close(&op->gpu);
}

enum epd_status op_prepare(struct op *op)
{
    return op->before ? op_launch(op, op->before) : EPD_OK;
}

enum epd_status op_run(struct op *op)
{
    return op->measured ? op_launch(op, op->measured) : EPD_OK;
}

static enum epd_status op_stream_launch(struct op *op, struct epd_plan *plan)
{
    return plan ? op_check(op, "launching", epd_plan_launch(plan, gpu_stream(&op->gpu))) : EPD_OK;
}

enum epd_status op_enqueue_prepare(struct op *op)
{
    return op_stream_launch(op, op->before);
}

enum epd_status op_enqueue(struct op *op)
{
    return op_stream_launch(op, op->measured);
}

enum epd_status op_settle(struct op *op)
{
    enum epd_status status = EPD_OK;
    if (op->before)
        status = op_check(op, "before the op", epd_plan_wait(op->before, 0));
    if (status == EPD_OK && op->measured)
        status = op_check(op, "the op", epd_plan_wait(op->measured, 0));
    return status;
}
