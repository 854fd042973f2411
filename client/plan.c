#include "client/plan.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "client/deadline.h"
#include "client/options.h"

/* ---- creation ---- */

static enum epd_status binding_of_tensor(const struct epd_plan *plan, uint32_t tensor_idx,
                                         const struct epd_tensor *tensor, struct message_binding *binding,
                                         struct epd_error *error)
{
    const char *op = op_name(plan->create.op);
    const char *role = role_name(tensor->role);

    if (!tensor->buffer)
        return error_set(error, EPD_INVALID_ARGUMENT, "%s tensor %u (%s): buffer is NULL", op, tensor_idx,
                         role);
    if (tensor->buffer->group->connection != plan->group->connection)
        return error_set(error, EPD_FOREIGN_ID, "%s tensor %u (%s): buffer of another session", op,
                         tensor_idx, role);
    *binding = (struct message_binding){
        .role = tensor->role,
        .part_idx = tensor->part_idx,
        .n_parts = tensor->n_parts,
        .buffer_id = tensor->buffer->buffer_id,
        .offset = tensor->offset_bytes,
        .dtype = tensor->dtype,
        .n_dims = tensor->n_dims,
    };
    memcpy(binding->shape, tensor->shape, sizeof binding->shape);
    return EPD_OK;
}

/* Copies the tensors; each buffer counts the plan from here on. */
static enum epd_status plan_bind(struct epd_plan *plan, const struct epd_plan_options *options,
                                 struct epd_error *error)
{
    uint32_t n_tensors = options->n_tensors;

    if (n_tensors > EPD_MAX_BINDINGS)
        return error_set(error, EPD_INVALID_ARGUMENT, "%s: %u tensors, at most %d", op_name(options->op),
                         n_tensors, EPD_MAX_BINDINGS);
    if (n_tensors > 0 && !options->tensors)
        return error_set(error, EPD_INVALID_ARGUMENT, "%s: %u tensors at NULL", op_name(options->op),
                         n_tensors);
    plan->create.bindings = calloc(n_tensors + 1u, sizeof *plan->create.bindings);
    plan->buffers = calloc(n_tensors + 1u, sizeof *plan->buffers);
    if (!plan->create.bindings || !plan->buffers)
        return error_set(error, EPD_NO_MEMORY, "%s: no memory for %u tensors", op_name(options->op),
                         n_tensors);
    for (uint32_t i = 0; i < n_tensors; i++) {
        const struct epd_tensor *tensor = &options->tensors[i];
        if (binding_of_tensor(plan, i, tensor, &plan->create.bindings[i], error))
            return error->status;
        plan->buffers[i] = tensor->buffer;
        atomic_fetch_add(&tensor->buffer->n_bindings, 1);
        plan->create.n_bindings = i + 1;
    }
    return EPD_OK;
}

/* T: the rows of the tensors that have a row per token; 0 for ops that have none. */
static uint32_t plan_tokens(const struct epd_plan *plan)
{
    for (uint32_t i = 0; i < plan->create.n_bindings; i++) {
        const struct message_binding *binding = &plan->create.bindings[i];
        switch (binding->role) {
        case EPD_ROLE_X:
        case EPD_ROLE_TOPK_IDX:
        case EPD_ROLE_OUT:
        case EPD_ROLE_DOUT:
        case EPD_ROLE_DX:
            return binding->shape[0] > 0 && binding->shape[0] <= EPD_MAX_TOKENS ? (uint32_t)binding->shape[0]
                                                                                : 0;
        default:
            break;
        }
    }
    return 0;
}

/* moe_backward takes what its forward has, the other ops have no activation. */
static enum epd_activation plan_activation(const struct epd_plan_options *options)
{
    switch (options->op) {
    case EPD_OP_ACTIVATION:
    case EPD_OP_ACTIVATION_BWD:
    case EPD_OP_MOE_FORWARD:
        return options->activation ? options->activation : EPD_SWIGLU;
    default:
        return options->activation;
    }
}

static enum epd_status plan_prepare(struct epd_group *group, const struct epd_plan_options *options,
                                    struct epd_plan *plan, struct epd_error *error)
{
    struct epd_plan *context = options->context;

    if (context && context->group != group)
        return error_set(error, EPD_FOREIGN_ID, "%s context: a plan of another group", op_name(options->op));
    plan->group = group;
    plan->create = (struct message_plan_create){
        .group_id = group->reply.group_id,
        .op = options->op,
        .context_plan_id = context ? context->reply.plan_id : 0,
        .layout = options->layout,
        .activation = plan_activation(options),
        .saved = options->saved,
        .accumulate = options->accumulate != 0,
        .delay_wgrad = options->delay_wgrad != 0,
        .crossing = options->crossing,
    };
    if (plan_bind(plan, options, error))
        return error->status;
    plan->max_tokens = plan_tokens(plan);
    atomic_init(&plan->n_tokens, plan->max_tokens);
    return EPD_OK;
}

/* Tells the daemon to forget a plan that this side could not finish. */
static void plan_abandon(struct epd_plan *plan)
{
    struct message request = {.kind = MESSAGE_PLAN_DESTROY, .plan_destroy = {.id = plan->reply.plan_id}};
    struct inbox_item reply;
    struct epd_error ignored;

    if (group_call(plan->group, &request, -1, MESSAGE_REPLY_OK, CLIENT_REPLY_TIMEOUT_MS, &reply, &ignored))
        return; /* the session is lost, and the plan with it */
}

/* Creates the plan in the daemon and finds its place in the page. */
static enum epd_status plan_request(struct epd_plan *plan, struct epd_error *error)
{
    struct message request = {.kind = MESSAGE_PLAN_CREATE, .plan_create = plan->create};
    uint32_t timeout_ms =
        op_is_collective(plan->create.op) ? CLIENT_COLLECTIVE_TIMEOUT_MS : CLIENT_REPLY_TIMEOUT_MS;
    struct inbox_item reply;

    if (group_call(plan->group, &request, -1, MESSAGE_REPLY_PLAN, timeout_ms, &reply, error))
        return error->status;
    plan->reply = reply.message.reply_plan;
    if (plan->reply.flag_idx >= EPD_PAGE_MAX_PLANS)
        return error_set(error, EPD_PROTOCOL, "plan %llu: place %u in the session page, it has %d",
                         (unsigned long long)plan->reply.plan_id, plan->reply.flag_idx, EPD_PAGE_MAX_PLANS);
    plan->flags = &connection_page(group_connection(plan->group))->plans[plan->reply.flag_idx];
    plan->seen_idx = 0;
    plan->group->ops->unbind(plan);
    if (plan->group->ops->bind(plan, error) == EPD_OK)
        return EPD_OK;
    plan_abandon(plan);
    return error->status;
}

enum epd_status plan_restore(struct epd_plan *plan, struct epd_error *error)
{
    plan->create.group_id = plan->group->reply.group_id;
    plan->create.context_plan_id = plan->context ? plan->context->reply.plan_id : 0;
    for (uint32_t i = 0; i < plan->create.n_bindings; i++)
        plan->create.bindings[i].buffer_id = plan->buffers[i]->buffer_id;
    return plan_request(plan, error);
}

void plan_free(struct epd_plan *plan)
{
    for (uint32_t i = 0; i < plan->create.n_bindings; i++)
        atomic_fetch_sub(&plan->buffers[i]->n_bindings, 1);
    plan->group->ops->unbind(plan);
    free(plan->buffers);
    free(plan->create.bindings);
    pthread_mutex_destroy(&plan->lock);
    free(plan);
}

enum epd_status epd_plan_create(struct epd_group *group, const struct epd_plan_options *options,
                                struct epd_plan **created)
{
    struct epd_error *error;
    struct epd_plan_options known;

    if (group_enter(group, "group", &error))
        return error->status;
    if (!created)
        return error_set(error, EPD_INVALID_ARGUMENT, "epd_plan_create: nowhere to put the plan");
    if (options_read(&known, sizeof known, options, "epd_plan_options", error))
        return error->status;
    struct epd_plan *plan = calloc(1, sizeof *plan);
    if (!plan)
        return error_set(error, EPD_NO_MEMORY, "plan: no memory for %zu bytes", sizeof *plan);
    plan->group = group;
    pthread_mutex_init(&plan->lock, NULL);
    atomic_init(&plan->references, 1);
    if (plan_prepare(group, &known, plan, error) || plan_request(plan, error)) {
        plan_free(plan);
        return error->status;
    }
    plan->context = known.context;
    if (plan->context)
        atomic_fetch_add(&plan->context->references, 1);
    pthread_mutex_lock(&group->client->lock);
    TAILQ_INSERT_TAIL(&group->plans, plan, link);
    pthread_mutex_unlock(&group->client->lock);
    *created = plan;
    return EPD_OK;
}

/* A plan that others have as context goes when the last of them does. */
static void plan_release(struct epd_plan *plan)
{
    while (plan && atomic_fetch_sub(&plan->references, 1) == 1) {
        struct epd_client *client = plan->group->client;
        struct epd_plan *context = plan->context;
        struct message request = {.kind = MESSAGE_PLAN_DESTROY, .plan_destroy = {.id = plan->reply.plan_id}};
        struct inbox_item reply;
        struct epd_error ignored;

        /* Fails only if the daemon has nothing left of the plan. */
        if (group_call(plan->group, &request, -1, MESSAGE_REPLY_OK, CLIENT_REPLY_TIMEOUT_MS, &reply,
                       &ignored))
            ignored.status = EPD_OK;
        pthread_mutex_lock(&client->lock);
        TAILQ_REMOVE(&plan->group->plans, plan, link);
        pthread_mutex_unlock(&client->lock);
        plan_free(plan);
        plan = context;
    }
}

void epd_plan_destroy(struct epd_plan *plan)
{
    struct epd_error *error;

    if (!plan || client_enter(plan->group->client, "plan", &error))
        return;
    if (plan->group->ops->wait(plan, DEADLINE_NEVER, error))
        error = error_begin(); /* how its launches ended is nobody's question any more */
    plan_release(plan);
}

/* ---- launches ---- */

enum epd_status epd_plan_set_tokens(struct epd_plan *plan, uint32_t n_tokens)
{
    struct epd_error *error;

    if (group_enter(plan ? plan->group : NULL, "plan", &error))
        return error->status;
    if (n_tokens > plan->max_tokens)
        return error_set(error, EPD_INVALID_ARGUMENT, "%s n_tokens: %u, at most %u (rows of its tensors)",
                         op_name(plan->create.op), n_tokens, plan->max_tokens);
    atomic_store(&plan->n_tokens, n_tokens);
    return EPD_OK;
}

static enum epd_status plan_send(struct epd_plan *plan, uint32_t n_repeats, struct epd_error *error)
{
    struct message_launch launch = {
        .plan_id = plan->reply.plan_id,
        .n_tokens = atomic_load_explicit(&plan->n_tokens, memory_order_relaxed),
        .shape_hash = plan->reply.shape_hash,
        .n_repeats = n_repeats,
    };

    if (connection_launch(plan->group->connection, &launch, &plan->group->last_seq, error))
        return error->status;
    atomic_store_explicit(&plan->last_seq, launch.seq + n_repeats - 1, memory_order_relaxed);
    atomic_fetch_add_explicit(&plan->launches, n_repeats, memory_order_relaxed);
    return EPD_OK;
}

/* With the group's launch_lock. */
static enum epd_status plan_launch(struct epd_plan *plan, void *stream, struct epd_error *error)
{
    const struct stream_ops *ops = plan->group->ops;
    if (ops->begin(plan, stream, error))
        return error->status;
    if (plan_send(plan, 1, error)) {
        ops->cancel(plan, stream);
        return error->status;
    }
    return ops->commit(plan, stream, error);
}

enum epd_status epd_plan_launch(struct epd_plan *plan, void *stream)
{
    struct epd_error *error;

    if (group_enter(plan ? plan->group : NULL, "plan", &error))
        return error->status;
    pthread_mutex_lock(&plan->group->launch_lock);
    enum epd_status status = plan_launch(plan, stream, error);
    pthread_mutex_unlock(&plan->group->launch_lock);
    return status;
}

enum epd_status epd_plan_capture(struct epd_plan *plan, void *stream)
{
    struct epd_error *error;

    if (group_enter(plan ? plan->group : NULL, "plan", &error))
        return error->status;
    return plan->group->ops->capture(plan, stream, error);
}

enum epd_status epd_plan_arm(struct epd_plan *plan, uint32_t n_launches)
{
    struct epd_error *error;

    if (group_enter(plan ? plan->group : NULL, "plan", &error))
        return error->status;
    if (n_launches == 0 || n_launches > EPD_MAX_REPEATS)
        return error_set(error, EPD_INVALID_ARGUMENT, "plan %llu: %u launches to arm, want 1..%u",
                         (unsigned long long)plan->reply.plan_id, n_launches, EPD_MAX_REPEATS);
    if (plan->group->ops->arm(plan, n_launches, error))
        return error->status;
    if (plan_send(plan, n_launches, error)) {
        atomic_fetch_sub(&plan->n_launched, n_launches); /* nobody would end them */
        return error->status;
    }
    return EPD_OK;
}

/* ---- ends of launches ---- */

/* This and what follows up to plan_collect with plan->lock held. */
static enum epd_status plan_fail(struct epd_plan *plan, const struct epd_failure *failure,
                                 struct epd_error *error)
{
    atomic_fetch_add(&plan->failed_launches, 1);
    plan->failure = *failure;
    return error_set(error, failure->status, "%s", failure->text);
}

/* The daemon counted a failure: its report is in the page, unless 64 newer ones of other plans came since. */
static enum epd_status plan_failed(struct epd_plan *plan, struct epd_error *error)
{
    struct epd_failure failure = {
        .size = sizeof failure, .status = EPD_INTERNAL, .seq = atomic_load(&plan->last_seq), .rank = -1};
    struct page_entry entry;

    if (page_take(connection_page(plan->group->connection), plan->reply.plan_id, &plan->seen_idx, &entry)) {
        if (entry.status != EPD_OK && status_known(entry.status))
            failure.status = (enum epd_status)entry.status;
        failure.seq = entry.seq;
        failure.phase = entry.phase < EPD_PHASE_COUNT ? (enum epd_phase)entry.phase : EPD_PHASE_NONE;
        failure.rank = entry.rank;
        snprintf(failure.text, sizeof failure.text, "%s", entry.text);
    } else {
        snprintf(failure.text, sizeof failure.text,
                 "plan %llu: launch %llu failed; newer reports have overwritten why",
                 (unsigned long long)plan->reply.plan_id, atomic_load(&plan->last_seq));
    }
    return plan_fail(plan, &failure, error);
}

/* The connection went before the launch had ended. */
static enum epd_status plan_lost(struct epd_plan *plan, const struct epd_error *loss, struct epd_error *error)
{
    struct epd_failure failure = {
        .size = sizeof failure, .status = loss->status, .seq = atomic_load(&plan->last_seq), .rank = -1};

    snprintf(failure.text, sizeof failure.text,
             "plan %llu: launch %llu in flight when the connection was lost: %.130s",
             (unsigned long long)plan->reply.plan_id, atomic_load(&plan->last_seq), loss->text);
    return plan_fail(plan, &failure, error);
}

/* What the launch that has just ended came to. The page's counters have the first word: a launch that the
 * daemon ended stays ended, whatever happened to the connection afterwards. */
static enum epd_status plan_collect(struct epd_plan *plan, struct epd_error *error)
{
    uint64_t failed = atomic_load_explicit(&plan->flags->failed, memory_order_relaxed);
    const struct stream_ops *ops = plan->group->ops;
    struct epd_error loss;
    enum epd_status status = EPD_OK;

    if (failed != plan->failed_before)
        status = plan_failed(plan, error);
    else if (ops->outstanding(plan) && connection_check(plan->group->connection, &loss))
        status = plan_lost(plan, &loss, error);
    plan->failed_before = failed;
    atomic_store(&plan->state, PLAN_IDLE);
    /* Another thread may have launched it meanwhile. */
    if (ops->launches_overlap && ops->outstanding(plan) &&
        connection_check(plan->group->connection, &loss) == EPD_OK)
        atomic_store(&plan->state, PLAN_IN_FLIGHT);
    return status;
}

static enum epd_status plan_wait(struct epd_plan *plan, uint32_t timeout_ms, struct epd_error *error)
{
    if (atomic_load(&plan->state) != PLAN_IN_FLIGHT)
        return connection_check(plan->group->connection, error);
    if (plan->group->ops->wait(plan, deadline_after_ms(timeout_ms), error))
        return error->status;
    pthread_mutex_lock(&plan->lock);
    enum epd_status status = plan_collect(plan, error);
    pthread_mutex_unlock(&plan->lock);
    return status;
}

enum epd_status epd_plan_wait(struct epd_plan *plan, uint32_t timeout_ms)
{
    struct epd_error *error;

    if (client_enter(plan ? plan->group->client : NULL, "plan", &error))
        return error->status;
    if (atomic_exchange(&plan->waiting, 1))
        return error_set(error, EPD_BUSY, "plan %llu: another thread waits for it",
                         (unsigned long long)plan->reply.plan_id);
    enum epd_status status = plan_wait(plan, timeout_ms, error);
    atomic_store(&plan->waiting, 0);
    return status;
}

enum epd_status epd_plan_check(struct epd_plan *plan)
{
    struct epd_error *error;

    if (group_enter(plan ? plan->group : NULL, "plan", &error))
        return error->status;
    if (atomic_load(&plan->state) != PLAN_IN_FLIGHT)
        return EPD_OK;
    enum epd_status status = EPD_OK;
    pthread_mutex_lock(&plan->lock);
    /* What a thread waits for is its to report. One that comes just now waits for the lock, and is not told that it is busy. */
    if (atomic_load(&plan->state) == PLAN_IN_FLIGHT && !atomic_load(&plan->waiting)) {
        uint64_t failed = atomic_load_explicit(&plan->flags->failed, memory_order_relaxed);
        if (failed != plan->failed_before)
            status = plan_failed(plan, error);
        plan->failed_before = failed;
    }
    pthread_mutex_unlock(&plan->lock);
    return status;
}

enum epd_status epd_plan_step(struct epd_plan *plan, void *stream, const struct epd_copy *copies,
                              uint32_t n_before, uint32_t n_after)
{
    enum epd_status status = epd_plan_check(plan);
    if (status)
        return status;
    const struct stream_ops *ops = plan->group->ops;
    struct epd_error *error = error_begin();
    if (ops->copy(plan, copies, n_before, stream, error))
        return error->status;
    status = epd_plan_launch(plan, stream);
    return status ? status : ops->copy(plan, copies + n_before, n_after, stream, error);
}

enum epd_status epd_plan_failure(const struct epd_plan *plan, struct epd_failure *given)
{
    struct epd_error *error;

    if (client_enter(plan ? plan->group->client : NULL, "plan", &error))
        return error->status;
    pthread_mutex_t *lock = (pthread_mutex_t *)&plan->lock;
    pthread_mutex_lock(lock);
    struct epd_failure failure = plan->failure;
    pthread_mutex_unlock(lock);
    if (failure.status == EPD_OK)
        return error_set(error, EPD_UNKNOWN_ID, "plan %llu: no launch of it has failed",
                         (unsigned long long)plan->reply.plan_id);
    return options_write(given, &failure, sizeof failure, "epd_failure", error);
}

enum epd_status epd_plan_info(const struct epd_plan *plan, struct epd_plan_info *given)
{
    struct epd_error *error;

    if (group_enter(plan ? plan->group : NULL, "plan", &error))
        return error->status;
    const struct epd_plan_info info = {
        .size = sizeof info,
        .plan_id = plan->reply.plan_id,
        .saved_bytes = plan->reply.saved_bytes,
        .launches = atomic_load(&plan->launches),
        .failed_launches = atomic_load(&plan->failed_launches),
    };
    return options_write(given, &info, sizeof info, "epd_plan_info", error);
}
