#include "daemon/rank_plan.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

#include "daemon/buffer.h"
#include "daemon/member.h"
#include "daemon/session.h"

static const char *const state_names[] = {"creating", "waiting", "ready", "ending"};

const char *rank_plan_state_name(enum rank_plan_state state)
{
    return state_names[state];
}

/* ---- end ---- */

static void release_buffers(struct rank_plan *plan)
{
    for (uint32_t i = 0; i < plan->n_buffers; i++)
        if (plan->keeps)
            buffer_unbind_ending(plan->buffers[i]);
        else
            buffer_unbind(plan->buffers[i]);
    plan->n_buffers = 0;
    free(plan->buffers);
    plan->buffers = NULL;
}

/* What the plan keeps counts against its session as long as it is there: with steps that wait, or as the context of another
 * plan, that may be long after the plan was destroyed. */
static void release_memory(struct rank_plan *plan)
{
    release_buffers(plan);
    quota_give(&plan->session->quota, QUOTA_SAVED_BYTES, plan->saved_bytes);
    plan->saved_bytes = 0;
}

/* Of the rank that the plan is, or was, of; if it has not left. */
static void count_heap(const struct rank_plan *plan)
{
    struct member *member = plan->group->members[plan->rank];
    if (member && member->session == plan->session)
        member_count_heap(member);
}

/* ep has nothing of this plan any more. */
static void free_plan(struct rank_plan *plan)
{
    struct session *session = plan->session;
    struct group *group = plan->group;
    release_memory(plan);
    count_heap(plan);
    session_flag_release(session, plan->flag_idx);
    free(plan);
    group_release(group);
    session_release(session);
}

static void on_gone(void *arg)
{
    struct rank_plan *plan = arg;
    plan->plan = NULL;
    free_plan(plan);
}

/* Takes it out of every list that a client's request could find it by, and gives its quotas back. */
static void detach(struct rank_plan *plan)
{
    struct session *session = plan->session;
    plan->state = RANK_PLAN_ENDING;
    registry_remove(&session->worker->registry, REGISTRY_PLAN, plan->id);
    plan->id = 0;
    list_remove(&plan->in_session);
    list_remove(&plan->in_member);
    quota_give(&session->quota, QUOTA_PLANS, 1);
    plan->keeps = plan->plan && plan_in_use(plan->plan);
    if (plan->keeps)
        for (uint32_t i = 0; i < plan->n_buffers; i++)
            buffer_bind_ending(plan->buffers[i]);
    else
        release_memory(plan);
    plan->member = NULL;
}

void rank_plan_destroy(struct rank_plan *plan)
{
    if (plan->state == RANK_PLAN_ENDING)
        return;
    assert(plan->n_queued == 0);
    detach(plan);
    if (plan->joint)
        joint_plan_leave(plan->joint, plan->rank);
    plan->joint = NULL;
    if (plan->set)
        plan_set_destroy(plan->set);
    plan->set = NULL;
    if (plan->job) /* on_plan ends it */
        return;
    if (plan->plan)
        plan_destroy(plan->plan, on_gone, plan);
    else
        free_plan(plan);
}

/* ---- answers ---- */

void rank_plan_ready(struct rank_plan *plan)
{
    plan->state = RANK_PLAN_READY;
    struct message message = {.kind = MESSAGE_REPLY_PLAN,
                              .request_id = plan->request_id,
                              .reply_plan = {.plan_id = plan->id,
                                             .plan_key = plan->joint ? plan->joint->key : 0,
                                             .flag_idx = plan->flag_idx,
                                             .shape_hash = plan_shape_hash(plan->plan),
                                             .saved_bytes = plan->saved_bytes}};
    session_send(plan->session, &message, -1);
}

void rank_plan_refuse(struct rank_plan *plan, const struct epd_error *error)
{
    struct session *session = plan->session;
    const uint64_t request_id = plan->request_id;
    const struct epd_error shown = *error; /* the joint plan it may be in can go with the plan */
    session_hold(session);
    rank_plan_destroy(plan);
    session_reply_error(session, request_id, &shown);
    session_release(session);
}

/* ---- creation ---- */

static enum epd_status take_saved(struct rank_plan *plan, struct epd_error *error)
{
    struct worker *worker = plan->session->worker;
    const uint64_t bytes = plan_saved_bytes(plan->plan);
    enum epd_status status = quota_take(&worker->accounts, &worker->config, &plan->session->quota,
                                        QUOTA_SAVED_BYTES, bytes, error);
    if (status == EPD_OK)
        plan->saved_bytes = bytes;
    return status;
}

static enum epd_status accept_made(struct rank_plan *plan, const struct epd_error *result,
                                   struct epd_error *error)
{
    *error = *result;
    if (error->status != EPD_OK)
        return error->status;
    struct worker *worker = plan->session->worker;
    enum epd_status status = failpoint_hit(&worker->failpoints, "plan_ready", error);
    if (status == EPD_OK)
        status =
            quota_check(&worker->accounts, &worker->config, &plan->session->quota, QUOTA_HEAP_BYTES, error);
    if (status == EPD_OK)
        status = take_saved(plan, error);
    if (status == EPD_OK && !plan->joint)
        status = plan_join(&plan->plan, 1, &plan->set, error);
    return status;
}

static void on_plan(void *arg, struct plan *made, const struct epd_error *result)
{
    struct rank_plan *plan = arg;
    plan->plan = made;
    plan->job = 0;
    count_heap(plan); /* also where it was not made: what it shares with others may have been */
    if (plan->state == RANK_PLAN_ENDING) { /* its session or group ended meanwhile */
        if (made)
            plan_destroy(made, on_gone, plan);
        else
            free_plan(plan);
        return;
    }
    struct epd_error error;
    if (accept_made(plan, result, &error) != EPD_OK) {
        struct joint_plan *joint = plan->joint;
        if (joint) /* the others first: the joint plan may go with this plan */
            joint_plan_fail(joint, (int32_t)plan->rank, &error);
        rank_plan_refuse(plan, &error);
    } else if (plan->joint) {
        plan->state = RANK_PLAN_WAITING;
        joint_plan_add(plan->joint, plan);
    } else {
        rank_plan_ready(plan);
    }
}

/* T of the plan: the first dimension of whatever tensor is counted in this rank's tokens. */
static uint32_t tokens_of(const struct message_plan_create *request)
{
    for (uint32_t i = 0; i < request->n_bindings; i++) {
        const struct message_binding *binding = &request->bindings[i];
        switch (binding->role) {
        case EPD_ROLE_X:
        case EPD_ROLE_OUT:
        case EPD_ROLE_DOUT:
        case EPD_ROLE_DX:
            return (uint32_t)binding->shape[0];
        default:
            break;
        }
    }
    return 0;
}

static enum epd_status bind_buffers(struct rank_plan *plan, const struct message_plan_create *request,
                                    struct plan_binding *bindings, struct epd_error *error)
{
    struct session *session = plan->session;
    for (uint32_t i = 0; i < request->n_bindings; i++) {
        const struct message_binding *binding = &request->bindings[i];
        void *object = NULL;
        enum epd_status status = registry_find_owned(&session->worker->registry, REGISTRY_BUFFER,
                                                     binding->buffer_id, session->id, &object, error);
        if (status != EPD_OK) {
            const struct epd_error inner = *error;
            return error_set(error, status, "%s %s: %.180s", op_name(plan->op), role_name(binding->role),
                             inner.text);
        }
        struct buffer *buffer = object;
        buffer_bind(buffer);
        plan->buffers[plan->n_buffers++] = buffer;
        bindings[i] = (struct plan_binding){.role = binding->role,
                                            .part_idx = binding->part_idx,
                                            .n_parts = binding->n_parts,
                                            .memory = buffer->memory,
                                            .offset = binding->offset,
                                            .dtype = binding->dtype,
                                            .n_dims = binding->n_dims};
        memcpy(bindings[i].shape, binding->shape, sizeof(bindings[i].shape));
    }
    return EPD_OK;
}

static enum epd_status find_context(struct rank_plan *plan, uint64_t context_id, struct plan **context,
                                    struct epd_error *error)
{
    *context = NULL;
    if (!context_id)
        return EPD_OK;
    struct session *session = plan->session;
    void *object = NULL;
    enum epd_status status = registry_find_owned(&session->worker->registry, REGISTRY_PLAN, context_id,
                                                 session->id, &object, error);
    if (status != EPD_OK)
        return status;
    const struct rank_plan *other = object;
    if (other->member != plan->member)
        return error_set(error, EPD_INVALID_ARGUMENT, "%s context: plan %llu is of another group",
                         op_name(plan->op), (unsigned long long)context_id);
    if (other->state != RANK_PLAN_READY)
        return error_set(error, EPD_BUSY, "%s context: plan %llu is not ready", op_name(plan->op),
                         (unsigned long long)context_id);
    *context = other->plan;
    plan->context_key = other->joint ? other->joint->key : 0;
    return EPD_OK;
}

static enum epd_status begin(struct rank_plan *plan, const struct message_plan_create *request,
                             struct epd_error *error)
{
    struct session *session = plan->session;
    const uint32_t n = request->n_bindings ? request->n_bindings : 1;
    struct plan_binding *bindings = calloc(n, sizeof(*bindings));
    plan->buffers = calloc(n, sizeof(struct buffer *));
    enum epd_status status = EPD_OK;
    if (!bindings || !plan->buffers) {
        status = error_set(error, EPD_NO_MEMORY, "plan: no memory for %u bindings", n);
        goto free_bindings;
    }
    struct plan *context = NULL;
    status = find_context(plan, request->context_plan_id, &context, error);
    if (status == EPD_OK)
        status = bind_buffers(plan, request, bindings, error);
    if (status != EPD_OK)
        goto free_bindings;
    const struct plan_request wanted = {
        .op = request->op,
        .rank = plan->rank,
        .context = context,
        .layout = request->layout,
        .activation = request->activation,
        .saved = request->saved,
        .accumulate = request->accumulate,
        .delay_wgrad = request->delay_wgrad,
        .crossing = request->crossing,
        .saved_budget_bytes = quota_left(&session->worker->config, &session->quota, QUOTA_SAVED_BYTES),
        .page = session->page,
        .flag_idx = plan->flag_idx,
        .public_id = plan->id,
        .n_bindings = request->n_bindings,
        .bindings = bindings,
    };
    status = plan_create(plan->group->team, &wanted, on_plan, plan, error);
    plan->job = status == EPD_OK;
free_bindings:
    free(bindings);
    return status;
}

/* Makes the entry with its id, quota and place in the page; everything else can then be undone by
 * rank_plan_destroy. */
static enum epd_status create_entry(struct member *member, uint64_t request_id,
                                    const struct message_plan_create *request, struct rank_plan **result,
                                    struct epd_error *error)
{
    struct session *session = member->session;
    struct worker *worker = session->worker;
    struct rank_plan *plan = calloc(1, sizeof(*plan));
    if (!plan)
        return error_set(error, EPD_NO_MEMORY, "plan: no memory for its entry");
    *plan = (struct rank_plan){.session = session,
                               .group = member->group,
                               .member = member,
                               .request_id = request_id,
                               .op = request->op,
                               .rank = member->rank,
                               .max_tokens = tokens_of(request)};
    /* What it takes is known when it is made: who holds more than he may gets no more. */
    member_count_heap(member);
    enum epd_status status =
        quota_check(&worker->accounts, &worker->config, &session->quota, QUOTA_HEAP_BYTES, error);
    if (status == EPD_OK)
        status = quota_take(&worker->accounts, &worker->config, &session->quota, QUOTA_PLANS, 1, error);
    if (status != EPD_OK)
        goto free_plan;
    status = session_flag_acquire(session, &plan->flag_idx, error);
    if (status != EPD_OK)
        goto give_quota;
    status = registry_add(&worker->registry, REGISTRY_PLAN, session->id, plan, &plan->id, error);
    if (status != EPD_OK)
        goto release_flag;
    list_append(&session->plans, &plan->in_session);
    list_append(&member->plans, &plan->in_member);
    session_hold(session);
    group_hold(member->group);
    *result = plan;
    return EPD_OK;

release_flag:
    session_flag_release(session, plan->flag_idx);
give_quota:
    quota_give(&session->quota, QUOTA_PLANS, 1);
free_plan:
    free(plan);
    return status;
}

enum epd_status rank_plan_create(struct session *session, uint64_t request_id,
                                 const struct message_plan_create *request, struct epd_error *error)
{
    struct member *member = NULL;
    enum epd_status status = group_find_member(session, request->group_id, &member, error);
    if (status != EPD_OK)
        return status;
    /* Local ops need no peer: a rank may finish its own work after others have left. */
    if (member->group->state == GROUP_BROKEN && (op_is_collective(request->op) || !member->group->team)) {
        *error = member->group->lost;
        return error->status;
    }
    /* A collective plan takes its place in the order of the rank's plans even if it fails here: the other
     * ranks' plans of this place then fail too, and the next ones match again. */
    struct joint_plan *joint = NULL;
    if (op_is_collective(request->op)) {
        status = joint_plan_arrive(member, request->op, &joint, error);
        if (status != EPD_OK)
            return status;
    }
    struct rank_plan *plan = NULL;
    status = create_entry(member, request_id, request, &plan, error);
    if (status == EPD_OK) {
        plan->joint = joint;
        status = begin(plan, request, error);
    }
    if (status == EPD_OK)
        return EPD_OK;
    const uint32_t rank = member->rank;
    if (joint)
        joint_plan_fail(joint, (int32_t)rank, error);
    if (plan)
        rank_plan_destroy(plan);
    else if (joint)
        joint_plan_leave(joint, rank);
    return status;
}
