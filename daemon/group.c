#include "daemon/group.h"

#include <assert.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "daemon/clock.h"
#include "daemon/gather.h"
#include "daemon/group_fields.h"
#include "daemon/group_span.h"
#include "daemon/joint_plan.h"
#include "daemon/member.h"
#include "daemon/session.h"

static const char *const state_names[] = {"joining", "open", "broken"};

const char *group_state_name(enum group_state state)
{
    return state_names[state];
}

/* ---- life ---- */

void group_hold(struct group *group)
{
    group->n_refs++;
}

static void give_queues(struct group *group)
{
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
    give_queues(group);
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

static enum epd_status create(struct session *session, const struct message_group_join *join,
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
    char missing[128] = "";
    size_t length = 0;
    const uint32_t first = group_first_rank(group), end = first + group_n_ranks(group);
    for (uint32_t rank = first; rank < end && length < sizeof(missing); rank++)
        if (!group->members[rank])
            length += (size_t)snprintf(missing + length, sizeof(missing) - length, " %u", rank);
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

/* ---- join ---- */

static enum epd_status compare(const struct group *group, const struct message_group_join *join,
                               struct epd_error *error)
{
    if (join->world_size != group->world_size)
        return error_set(error, EPD_GROUP_MISMATCH, "group %s world_size: rank %u says %u, rank %u says %u",
                         group->name, join->rank, join->world_size, group->first_joiner, group->world_size);
    int64_t given[GROUP_N_FIELDS], want[GROUP_N_FIELDS];
    group_field_values(&join->config, given);
    group_field_values(&group->config, want);
    for (size_t i = 0; i < GROUP_N_FIELDS; i++) {
        char given_text[24], want_text[24];
        if (given[i] == want[i])
            continue;
        group_field_format(i, given[i], given_text, sizeof(given_text));
        group_field_format(i, want[i], want_text, sizeof(want_text));
        return error_set(error, EPD_GROUP_MISMATCH, "group %s %s: rank %u says %s, rank %u says %s",
                         group->name, group_field_name(i), join->rank, given_text, group->first_joiner,
                         want_text);
    }
    return group_span_compare(group, join, error);
}

static struct group *find_by_name(const struct worker *worker, uint32_t uid, const char *name)
{
    list_each(node, after, &worker->groups)
    {
        struct group *group = list_owner(node, struct group, in_worker);
        if (group->state != GROUP_BROKEN && group->uid == uid && strcmp(group->name, name) == 0)
            return group;
    }
    return NULL;
}

/* A rank that comes back is often accepted before the loop has heard that its old connection is gone. */
static int drop_hung_up(struct group *group, const struct session *asking)
{
    int n_dropped = 0;
    for (uint32_t rank = 0; rank < group->world_size; rank++) {
        struct session *session = group->members[rank] ? group->members[rank]->session : NULL;
        if (!session || session == asking || !session_hung_up(session))
            continue;
        session_close(session, CLOSE_CLIENT, NULL);
        n_dropped++;
    }
    return n_dropped;
}

static enum epd_status check_place(const struct group *group, const struct session *session,
                                   const struct message_group_join *join, struct epd_error *error)
{
    for (uint32_t rank = 0; rank < group->world_size; rank++)
        if (group->members[rank] && group->members[rank]->session == session)
            return error_set(error, EPD_IN_USE, "group %s: this session is rank %u of it already",
                             group->name, rank);
    if (join->rank >= group->world_size || group->members[join->rank])
        return error_set(error, EPD_IN_USE, "group %s rank %u: taken by another session", group->name,
                         join->rank);
    if (group->state == GROUP_OPEN)
        return error_set(error, EPD_IN_USE, "group %s: complete with %u ranks", group->name,
                         group->world_size);
    return EPD_OK;
}

static enum epd_status check_request(const struct message_group_join *join, struct epd_error *error)
{
    if (!join->world_size || join->world_size > EPD_MAX_WORLD_SIZE)
        return error_set(error, EPD_INVALID_ARGUMENT, "group world_size: %u, want 1 to %d", join->world_size,
                         EPD_MAX_WORLD_SIZE);
    if (join->rank >= join->world_size)
        return error_set(error, EPD_INVALID_ARGUMENT, "group rank: %u, want less than world_size %u",
                         join->rank, join->world_size);
    if (!join->name[0])
        return error_set(error, EPD_INVALID_ARGUMENT, "group name: empty");
    for (const char *at = join->name; *at; at++)
        if (*at < ' ' || *at > '~')
            return error_set(error, EPD_INVALID_ARGUMENT, "group name: byte 0x%02x, want printable ASCII",
                             (unsigned)(unsigned char)*at);
    return EPD_OK;
}

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

/* All ranks of this node are there. */
static void begin(struct group *group)
{
    const struct team_span alone = {.n_nodes = 1};
    if (group->span)
        group_span_begin(group);
    else
        group_open(group, &alone);
}

static enum epd_status bind_device(const struct worker *worker, const struct message_group_join *join,
                                   uint32_t *device_idx, struct epd_error *error)
{
    if (join->has_device)
        return node_find_device(worker->node, join->device_uuid, device_idx, error);
    const uint32_t n_nodes = join->config.n_nodes ? join->config.n_nodes : 1;
    *device_idx = join->rank % (join->world_size / n_nodes) % node_n_devices(worker->node);
    return EPD_OK;
}

/* The group of this name that the request may enter, or a new one. */
static enum epd_status find_or_create(struct session *session, const struct message_group_join *join,
                                      struct group **result, struct epd_error *error)
{
    struct worker *worker = session->worker;
    struct group *group = find_by_name(worker, session->peer.uid, join->name);
    if (group && drop_hung_up(group, session)) {
        session_end_closed(worker);
        if (session->state == SESSION_CLOSING) /* it was in that group and could not be told: gone too */
            return error_set(error, EPD_DISCONNECTED, "group %s: the session has ended", join->name);
        group = find_by_name(worker, session->peer.uid, join->name);
    }
    if (!group)
        return create(session, join, result, error);
    enum epd_status status = EPD_OK;
    if (group->state == GROUP_JOINING) {
        status = compare(group, join, error);
        if (status != EPD_OK) { /* nobody can tell who is right: all learn of it now */
            group_fail_join(group, error);
            return status;
        }
    }
    status = check_place(group, session, join, error);
    if (status == EPD_OK)
        *result = group;
    return status;
}

enum epd_status group_join(struct session *session, uint64_t request_id,
                           const struct message_group_join *join, struct epd_error *error)
{
    struct worker *worker = session->worker;
    if (worker->state != WORKER_SERVING)
        return error_set(error, EPD_DRAINING, "group %.64s: the daemon is draining, no new groups",
                         join->name);
    enum epd_status status = check_request(join, error);
    if (status == EPD_OK)
        status = group_span_check(worker, join, error);
    if (status != EPD_OK)
        return status;
    uint32_t device_idx = 0;
    status = bind_device(worker, join, &device_idx, error);
    if (status != EPD_OK)
        return status;
    struct group *group = NULL;
    status = find_or_create(session, join, &group, error);
    if (status != EPD_OK)
        return status;
    struct member *member = NULL;
    group_hold(group);
    status = member_create(group, session, join->rank, device_idx, request_id, &member, error);
    if (status == EPD_OK && group->n_members == group_n_ranks(group))
        begin(group);
    else if (status == EPD_OK)
        group_arm(group, group->created_ns + clock_ms_to_ns(worker->config.join_ms));
    if (group->state == GROUP_JOINING && !group->n_members)
        group->state = GROUP_BROKEN;
    group_release(group);
    return status;
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
    if (group->state == GROUP_BROKEN)
        return;
    struct worker *worker = group->worker;
    struct log_word name;
    group->state = GROUP_BROKEN;
    group->lost = *error;
    group->lost_rank = rank;
    group->epoch = worker_next_epoch(worker);
    (void)log_limited(worker->log, LOG_INFO, "group_broken", clock_ns(),
                      "group %" PRIu64 " broken name %s steps %" PRIu64 " reason %s", group->id,
                      log_word(&name, group->name), group->n_launches, error->text);
    group_span_end(group, rank, error);
    joint_plan_fail_all(group, error);
    gather_break(group);
}

int group_idle(const struct group *group)
{
    if (group->n_flights)
        return 0;
    for (uint32_t rank = 0; rank < group->world_size; rank++)
        if (group->members[rank] && group->members[rank]->queue.count)
            return 0;
    return 1;
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
