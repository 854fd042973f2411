#include "daemon/group.h"

#include <assert.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "daemon/clock.h"
#include "daemon/gather.h"
#include "daemon/group_span.h"
#include "daemon/joint_plan.h"
#include "daemon/member.h"
#include "daemon/number_set.h"
#include "daemon/session.h"

static const char *const state_names[] = {"joining", "open", "broken"};

const char *group_state_name(const struct group *group)
{
    return group->closed ? "closed" : state_names[group->state];
}

/* ---- life ---- */

void group_hold(struct group *group)
{
    group->n_refs++;
}

static void give_back(struct group *group)
{
    if (group->left_bytes) /* with queues, so the account is there */
        quota_give_left(group->account, QUOTA_HEAP_BYTES, group->left_bytes);
    group->left_bytes = 0;
    for (uint32_t i = 0; i < EPD_MAX_DEVICES; i++) {
        const uint32_t n = group->queues[i];
        group->queues[i] = 0;
        if (n)
            quota_give_shared_queues(group->account, i, n);
    }
}

static void on_timer_closed(uv_handle_t *handle)
{
    struct group *group = handle->data;
    joint_plan_free_all(group);
    if (group->team)
        team_destroy(group->team);
    group_span_destroy(group);
    give_back(group);
    list_remove(&group->in_worker);
    registry_remove(&group->worker->registry, REGISTRY_GROUP, group->id);
    load_fini(&group->load);
    free(group);
}

void group_release(struct group *group)
{
    assert(group->n_refs > 0);
    if (--group->n_refs)
        return;
    list_remove(&group->in_blocked);
    uv_close((uv_handle_t *)&group->timer, on_timer_closed);
}

enum epd_status group_create(struct session *session, const struct message_group_join *join,
                             struct group **result, struct epd_error *error)
{
    struct worker *worker = session->worker;
    struct group *group = calloc(1, sizeof(*group));
    if (!group)
        return error_set(error, EPD_NO_MEMORY, "group: no memory");
    *group = (struct group){.worker = worker,
                            .uid = session->peer.uid,
                            .world_size = join->world_size,
                            .first_joiner = join->rank,
                            .config = join->config,
                            .created_ns = clock_ns(),
                            .lost_rank = -1,
                            .timer_at_ns = CLOCK_NEVER};
    memcpy(group->name, join->name, sizeof(group->name));
    list_init(&group->joint_plans);
    list_init(&group->in_blocked);
    enum epd_status status = group_span_create(group, error);
    if (status != EPD_OK)
        goto free_group;
    status = load_init(&group->load, join->config.n_experts, error);
    if (status != EPD_OK)
        goto free_span;
    status = registry_add(&worker->registry, REGISTRY_GROUP, 0, group, &group->id, error);
    if (status != EPD_OK)
        goto free_load;
    (void)uv_timer_init(&worker->loop, &group->timer); /* cannot fail */
    group->timer.data = group;
    list_append(&worker->groups, &group->in_worker);
    *result = group;
    return EPD_OK;

free_load:
    load_fini(&group->load);
free_span:
    group_span_destroy(group);
free_group:
    free(group);
    return status;
}

/* ---- deadlines ---- */

/* The ranks of this node that have not joined. */
static void name_missing(const struct group *group, char *text, size_t bytes)
{
    const uint32_t first = group_first_rank(group), end = first + group_n_ranks(group);
    uint64_t missing = 0;
    for (uint32_t rank = first; rank < end; rank++)
        missing |= (uint64_t)!group->members[rank] << rank;
    number_set_name(missing, text, bytes);
}

static uint64_t check_join(struct group *group, uint64_t now_ns)
{
    if (group->state != GROUP_JOINING)
        return CLOCK_NEVER;
    const uint64_t limit_ms = group->worker->config.join_ms;
    uint64_t end_ns = group->created_ns + clock_ms_to_ns(limit_ms);
    if (group->n_members == group_n_ranks(group)) /* node 0 speaks first: it knows which nodes are missing */
        end_ns += clock_ms_to_ns(GROUP_JOIN_GRACE_MS);
    if (now_ns < end_ns)
        return end_ns;
    struct epd_error error;
    if (group->n_members == group_n_ranks(group)) {
        (void)error_set(&error, EPD_TIMEOUT,
                        "group %s: not joined within %" PRIu64 " ms by all of its other nodes", group->name,
                        limit_ms);
        group_fail_join(group, &error);
        return CLOCK_NEVER;
    }
    char missing[80];
    name_missing(group, missing, sizeof(missing));
    (void)error_set(&error, EPD_TIMEOUT, "group %s: not joined within %" PRIu64 " ms by rank%s", group->name,
                    limit_ms, missing);
    group_fail_join(group, &error);
    return CLOCK_NEVER;
}

static uint64_t check_joint_plans(struct group *group, uint64_t now_ns)
{
    uint64_t next_ns = CLOCK_NEVER;
    list_each(node, after, &group->joint_plans)
    {
        uint64_t at_ns = joint_plan_check(list_owner(node, struct joint_plan, in_group), now_ns);
        next_ns = at_ns < next_ns ? at_ns : next_ns;
    }
    return next_ns;
}

static void on_timer(uv_timer_t *timer)
{
    struct group *group = timer->data;
    const uint64_t now_ns = clock_ns();
    const int late = now_ns > group->timer_at_ns + GROUP_LATE_NS;
    group->timer_at_ns = CLOCK_NEVER;
    if (late) { /* the daemon itself was stopped: what the ranks sent meanwhile is read first */
        group_arm(group, now_ns + GROUP_GRACE_NS);
        return;
    }
    group_hold(group);
    group_arm(group, check_join(group, now_ns));
    group_arm(group, check_joint_plans(group, now_ns));
    group_arm(group, gather_check(group, now_ns));
    group_release(group);
}

void group_arm(struct group *group, uint64_t at_ns)
{
    if (at_ns >= group->timer_at_ns)
        return;
    group->timer_at_ns = at_ns;
    const uint64_t now_ns = clock_ns();
    const uint64_t wait_ns = at_ns > now_ns ? at_ns - now_ns : 0;
    uv_update_time(&group->worker->loop);
    (void)uv_timer_start(&group->timer, on_timer, wait_ns / CLOCK_NS_PER_MS + 1, 0);
}

/* ---- opening ---- */

static void answer_join(struct member *member)
{
    const struct group *group = member->group;
    struct device_info info;
    node_device_info(group->worker->node, member->device_idx, &info);
    const uint32_t n_local = team_n_local_experts(group->team);
    struct message reply = {.kind = MESSAGE_REPLY_GROUP,
                            .request_id = member->join_request_id,
                            .reply_group = {.group_id = group->id,
                                            .epoch = group->epoch,
                                            .device_idx = member->device_idx,
                                            .n_local_experts = n_local,
                                            .first_expert = n_local * member->rank,
                                            .capacity_rows = team_capacity_rows(group->team),
                                            .heap_bytes = team_heap_bytes(group->team, member->rank)}};
    memcpy(reply.reply_group.device_uuid, info.uuid, EPD_UUID_BYTES);
    member->join_request_id = 0;
    session_send(member->session, &reply, -1);
}

void group_open(struct group *group, const struct team_span *span)
{
    struct worker *worker = group->worker;
    uint32_t devices[EPD_MAX_WORLD_SIZE];
    const uint32_t first = group_first_rank(group), n_ranks = group_n_ranks(group);
    for (uint32_t i = 0; i < n_ranks; i++)
        devices[i] = group->members[first + i]->device_idx;
    struct epd_error error = {0};
    enum epd_status status = failpoint_hit(&worker->failpoints, "group_open", &error);
    if (status == EPD_OK)
        status = team_create_spanning(worker->node, &group->config, group->world_size, devices, span,
                                      &group->team, &error);
    if (status != EPD_OK) {
        group_fail_join(group, &error);
        return;
    }
    struct log_word name;
    group->state = GROUP_OPEN;
    group->epoch = worker_next_epoch(worker);
    (void)log_limited(worker->log, LOG_INFO, "group_open", clock_ns(),
                      "group %" PRIu64 " open name %s ranks %u epoch %" PRIu64 " exchange %s", group->id,
                      log_word(&name, group->name), group->world_size, group->epoch,
                      team_is_fused(group->team) ? "fused" : "staged");
    for (uint32_t i = 0; i < n_ranks; i++)
        answer_join(group->members[first + i]);
}

void group_begin(struct group *group)
{
    const struct team_span alone = {.n_nodes = 1};
    if (group->span)
        group_span_begin(group);
    else
        group_open(group, &alone);
}

void group_fail_join(struct group *group, const struct epd_error *error)
{
    const struct epd_error shown = *error;
    group_hold(group);
    group->state = GROUP_BROKEN;
    group->lost = shown;
    group_span_end(group, -1, &shown);
    for (uint32_t rank = 0; rank < group->world_size; rank++) {
        struct member *member = group->members[rank];
        if (!member)
            continue;
        session_reply_error(member->session, member->join_request_id, &shown);
        member_destroy(member);
    }
    group_release(group);
}

enum epd_status group_find_member(struct session *session, uint64_t group_id, struct member **member,
                                  struct epd_error *error)
{
    void *object = NULL;
    enum epd_status status =
        registry_find_owned(&session->worker->registry, REGISTRY_GROUP, group_id, 0, &object, error);
    if (status != EPD_OK)
        return status;
    const struct group *group = object;
    for (uint32_t rank = 0; rank < group->world_size; rank++)
        if (group->members[rank] && group->members[rank]->session == session && group->team) {
            *member = group->members[rank];
            return EPD_OK;
        }
    return error_set(error, EPD_FOREIGN_ID, "group %" PRIu64 ": this session is not a rank of it", group_id);
}

/* ---- end ---- */

void group_break(struct group *group, int32_t rank, const struct epd_error *error)
{
    group_end(group, rank, error, 0);
}

void group_end(struct group *group, int32_t rank, const struct epd_error *error, int orderly)
{
    if (group->state == GROUP_BROKEN)
        return;
    struct worker *worker = group->worker;
    struct log_word name;
    group->state = GROUP_BROKEN;
    group->lost = *error;
    group->lost_rank = rank;
    group->closed = orderly;
    group->epoch = worker_next_epoch(worker);
    (void)log_limited(worker->log, LOG_INFO, orderly ? "group_closed" : "group_broken", clock_ns(),
                      "group %" PRIu64 " %s name %s steps %" PRIu64 " reason %s", group->id,
                      group_state_name(group), log_word(&name, group->name), group->n_launches, error->text);
    group_span_end(group, rank, error);
    joint_plan_fail_all(group, error);
    gather_break(group);
}

int group_asked(const struct group *group)
{
    for (uint32_t rank = 0; rank < group->world_size; rank++)
        if (group->members[rank] && group->members[rank]->queue.count)
            return 1;
    return 0;
}

int group_idle(const struct group *group)
{
    return !group->n_flights && !group_asked(group);
}

void group_drain(struct group *group)
{
    if (group->state == GROUP_JOINING) {
        const struct epd_error error = {EPD_DRAINING, "the daemon is draining, no new groups"};
        group_fail_join(group, &error);
        return;
    }
    for (uint32_t rank = 0; rank < group->world_size; rank++)
        if (group->members[rank] && member_asked(group->members[rank]) > group->drain_ordinal)
            group->drain_ordinal = member_asked(group->members[rank]);
}
