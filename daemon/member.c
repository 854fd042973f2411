#include "daemon/member.h"

#include <assert.h>
#include <stdio.h>
#include <stdlib.h>

#include "daemon/buffer.h"
#include "daemon/clock.h"
#include "daemon/gather.h"
#include "daemon/group_span.h"
#include "daemon/rank_plan.h"
#include "daemon/session.h"
#include "ep/transport.h"

/* Ranks of a group on one device share its queue; rails between nodes are each rank's own. */
static uint32_t rail_queues(const struct group *group)
{
    const int streams = node_backend(group->worker->node) == EPD_BACKEND_CUDA;
    return group->span && streams ? TRANSPORT_RAIL_STREAMS : 0;
}

static enum epd_status take_quotas(struct member *member, struct epd_error *error)
{
    struct group *group = member->group;
    struct worker *worker = group->worker;
    struct quota *quota = &member->session->quota;
    const uint32_t n_rail = rail_queues(group), device_idx = member->device_idx;
    const uint32_t n_shared = n_rail + (group->queues[device_idx] ? 0 : 1);
    member->n_queues = n_rail + 1;
    enum epd_status status = quota_take(&worker->accounts, &worker->config, quota, QUOTA_GROUPS, 1, error);
    if (status != EPD_OK)
        return status;
    status = quota_take_queues(&worker->accounts, &worker->config, quota, device_idx, member->n_queues,
                               n_shared, error);
    if (status != EPD_OK) {
        quota_give(quota, QUOTA_GROUPS, 1);
        return status;
    }
    group->account = quota->account;
    group->queues[device_idx] += n_shared;
    return EPD_OK;
}

void member_count_heap(struct member *member)
{
    struct quota *quota = &member->session->quota;
    const struct team *team = member->group->team;
    const uint64_t now = team ? team_heap_bytes(team, member->rank) : 0;
    if (now >= member->heap_bytes)
        quota_count(quota, QUOTA_HEAP_BYTES, now - member->heap_bytes);
    else
        quota_give(quota, QUOTA_HEAP_BYTES, member->heap_bytes - now);
    member->heap_bytes = now;
}

static int shares_device(const struct member *member)
{
    const struct group *group = member->group;
    for (uint32_t rank = 0; rank < group->world_size; rank++)
        if (group->members[rank] && group->members[rank] != member &&
            group->members[rank]->device_idx == member->device_idx)
            return 1;
    return 0;
}

/* What is on the devices goes with the group; a group that has not opened has nothing there. */
static void give_quotas(struct member *member)
{
    struct group *group = member->group;
    const uint32_t n_shared = rail_queues(group) + (shares_device(member) ? 0 : 1);
    quota_give(&member->session->quota, QUOTA_GROUPS, 1);
    quota_give_queues(&member->session->quota, member->device_idx, member->n_queues);
    member_count_heap(member);
    quota_leave(&member->session->quota, QUOTA_HEAP_BYTES, member->heap_bytes);
    group->left_bytes += member->heap_bytes;
    if (group->team || (group->span && group->span->rails))
        return;
    group->queues[member->device_idx] -= n_shared;
    quota_give_shared_queues(group->account, member->device_idx, n_shared);
}

enum epd_status member_create(struct group *group, struct session *session, uint32_t rank,
                              uint32_t device_idx, uint64_t request_id, struct member **result,
                              struct epd_error *error)
{
    struct member *member = calloc(1, sizeof(*member));
    if (!member)
        return error_set(error, EPD_NO_MEMORY, "group: no memory for rank %u", rank);
    *member = (struct member){.group = group,
                              .session = session,
                              .rank = rank,
                              .device_idx = device_idx,
                              .join_request_id = request_id};
    enum epd_status status = take_quotas(member, error);
    if (status != EPD_OK) {
        free(member);
        return status;
    }
    list_init(&member->plans);
    list_append(&session->members, &member->in_session);
    group_hold(group);
    group->members[rank] = member;
    group->n_members++;
    *result = member;
    return EPD_OK;
}

/* Whoever is left has said the same, and is named to who says otherwise. */
static void name_another(struct group *group)
{
    for (uint32_t rank = 0; rank < group->world_size; rank++)
        if (group->members[rank]) {
            group->first_joiner = rank;
            return;
        }
}

void member_destroy(struct member *member)
{
    struct group *group = member->group;
    assert(member->queue.count == 0 && list_empty(&member->plans));
    if (member->window_full)
        session_resume(member->session);
    group->members[member->rank] = NULL;
    group->n_members--;
    if (group->first_joiner == member->rank)
        name_another(group);
    list_remove(&member->in_session);
    give_quotas(member);
    launch_queue_fini(&member->queue);
    free(member);
    group_release(group);
}

/* Buffers belong to the session, but go with the group that gave their device. */
static void drop_buffers(struct member *member)
{
    list_each(node, after, &member->session->buffers)
    {
        struct buffer *buffer = list_owner(node, struct buffer, in_session);
        if (buffer->group_id == member->group->id)
            buffer_drop(buffer);
    }
}

/* Launches of one rank that are handed back one by one when it leaves or when they are refused in one message; a lane can
 * take as many. What lies behind them has not come to its stream, or its client ends it itself when the session has ended. */
#define MAX_TOLD 256u

static void drop_queued(struct member *member, enum epd_status status)
{
    while (member->queue.count) {
        struct rank_plan *plan = launch_queue_first(&member->queue)->plan;
        const uint32_t n = launch_queue_drop(&member->queue);
        stats_count_failed(&member->group->worker->stats, plan->op, status, n);
        plan->n_launches += n;
        plan->n_failed += n;
        plan->n_queued--;
    }
}

static void fail_queued(struct member *member, const struct epd_error *error, int32_t rank)
{
    member->ahead = 0;
    for (uint32_t n = 0; member->queue.count && n < MAX_TOLD; n++) {
        member_fail_first(member, error, EPD_PHASE_NONE, rank);
        member_pop(member);
    }
    drop_queued(member, error->status);
}

/* What the others hear. 0: no rank is to blame. */
static int name_loss(const struct member *member, const struct epd_error *why, struct epd_error *lost)
{
    const struct group *group = member->group;
    if (why->status == EPD_DRAINING || why->status == EPD_RESTARTED) {
        (void)error_set(lost, why->status, "group %s: %s", group->name, why->text);
        return 0;
    }
    /* Its lane has told it that another node is lost, and it has left before the loop has heard of that. */
    if (group->span && group->span->rails && group->state == GROUP_OPEN &&
        rails_broken(group->span->rails, lost))
        return 0;
    (void)error_set(lost, EPD_PEER_LOST, "rank %u of group %s is gone: %s", member->rank, group->name,
                    why->text);
    return 1;
}

void member_leave(struct member *member, const struct epd_error *why, int on_purpose)
{
    struct group *group = member->group;
    struct epd_error lost;
    const int32_t blamed = name_loss(member, why, &lost) ? (int32_t)member->rank : -1;
    const int orderly = on_purpose && blamed >= 0 && !group_asked(group);
    group_hold(group);
    fail_queued(member, why,
                blamed); /* before the group tells everybody that this rank is gone: it is not, to itself */
    if (group->state == GROUP_OPEN)
        group_end(group, blamed, &lost, orderly);
    while (!list_empty(&member->plans))
        rank_plan_destroy(list_owner(member->plans.next, struct rank_plan, in_member));
    drop_buffers(member);
    member_destroy(member);
    /* Nobody waits any more: the name is free, here and on node 0. Or other nodes count on this rank already. */
    if (group->state == GROUP_JOINING &&
        (!group->n_members || (group->span && group->span->state != SPAN_GATHERING)))
        group_fail_join(group, &lost);
    group_release(group);
}

/* ---- launches ---- */

static enum launch_flaw check_launch(const struct member *member, const struct rank_plan *plan,
                                     const struct message_launch *launch)
{
    if (launch->seq != member->last_seq + 1)
        return LAUNCH_BAD_SEQ;
    if (launch->shape_hash != plan_shape_hash(plan->plan))
        return LAUNCH_BAD_HASH;
    if (plan->max_tokens && launch->n_tokens > plan->max_tokens)
        return LAUNCH_BAD_TOKENS;
    return LAUNCH_SOUND;
}

struct launch *member_next(struct member *member)
{
    uint32_t skip = member->ahead;
    for (uint32_t i = 0; i < member->queue.count; i++) {
        struct launch *launch = launch_queue_at(&member->queue, i);
        if (skip < launch->n_left)
            return launch;
        skip -= launch->n_left;
    }
    return NULL;
}

uint64_t member_asked(struct member *member)
{
    uint64_t ordinal = member->ordinal - member->ahead; /* those are in the queue still */
    for (uint32_t i = 0; i < member->queue.count; i++) {
        const struct launch *launch = launch_queue_at(&member->queue, i);
        if (op_is_collective(launch->plan->op))
            ordinal += launch->n_left;
    }
    return ordinal;
}

/* While draining, steps that nobody had asked for before are refused; on every rank, because it goes by their
 * number. */
static int drained(struct member *member, const struct rank_plan *plan)
{
    const struct group *group = member->group;
    if (group->worker->state == WORKER_SERVING || !op_is_collective(plan->op))
        return 0;
    return member_asked(member) >= group->drain_ordinal;
}

static void refuse(struct rank_plan *plan, const struct message_launch *launch, const struct epd_error *error)
{
    struct worker *worker = plan->session->worker;
    stats_count_failed(&worker->stats, plan->op, error->status, launch->n_repeats);
    plan->n_failed += launch->n_repeats;
    for (uint32_t i = 0; i < launch->n_repeats && i < MAX_TOLD; i++)
        plan_fail(plan->plan, launch->seq + i, error, EPD_PHASE_NONE, -1);
}

static void close_window(struct member *member)
{
    member->window_full = 1;
    session_pause(member->session);
}

void member_launch(struct member *member, struct rank_plan *plan, const struct message_launch *launch)
{
    struct worker *worker = member->group->worker;
    struct epd_error error = {0};
    if (failpoint_hit(&worker->failpoints, "launch_received", &error) != EPD_OK) {
        refuse(plan, launch, &error);
        return;
    }
    if (drained(member, plan)) {
        (void)error_set(&error, EPD_DRAINING, "%s: the daemon is draining, no new steps", op_name(plan->op));
        refuse(plan, launch, &error);
        return;
    }
    const struct launch entry = {.plan = plan,
                                 .seq = launch->seq,
                                 .wanted_seq = member->last_seq + 1,
                                 .arrived_ns = clock_ns(),
                                 .n_tokens = plan->max_tokens ? launch->n_tokens : 0,
                                 .n_left = launch->n_repeats,
                                 .flaw = check_launch(member, plan, launch)};
    member->last_seq = launch->seq + launch->n_repeats - 1;
    if (launch_queue_append(&member->queue, &entry, &error) != EPD_OK) {
        refuse(plan, launch, &error);
        if (launch->n_repeats > MAX_TOLD) /* nobody would end the rest while the session lives */
            session_close(plan->session, CLOSE_NO_MEMORY, error.text);
        return;
    }
    plan->n_queued++;
    member->missing_since_ns = 0;
    if (!member->announced)
        gather_pump(member);
    if (!member->window_full && (member->queue.count >= worker->config.launches_per_rank ||
                                 member->queue.n_launches > EPD_MAX_REPEATS))
        close_window(member);
}

void member_fail_first(struct member *member, const struct epd_error *error, enum epd_phase phase,
                       int32_t rank)
{
    const struct launch *launch = launch_queue_first(&member->queue);
    struct rank_plan *plan = launch->plan;
    stats_count_failed(&member->group->worker->stats, plan->op, error->status, 1);
    plan->n_failed++;
    plan_fail(plan->plan, launch->seq, error, phase, rank);
}

void member_pop(struct member *member)
{
    struct launch *launch = launch_queue_first(&member->queue);
    struct rank_plan *plan = launch->plan;
    plan->n_launches++;
    if (!launch_queue_pop(&member->queue))
        return;
    plan->n_queued--;
    const uint64_t limit = member->group->worker->config.launches_per_rank;
    if (member->window_full && member->queue.count <= limit / 2 &&
        member->queue.n_launches <= EPD_MAX_REPEATS) {
        member->window_full = 0;
        session_resume(member->session);
    }
}
