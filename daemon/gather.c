#include "daemon/gather.h"

#include <inttypes.h>

#include "daemon/clock.h"
#include "daemon/flight.h"
#include "daemon/group_span.h"
#include "daemon/joint_plan.h"
#include "daemon/rank_plan.h"
#include "daemon/session.h"
#include "daemon/step_record.h"
#include "ep/step.h"

/* Steps and refused launches of a group that the lanes hold at once: what waits there for a client takes room from others.
 * All groups that a device has queues for fit into a lane's ring together. */
#define MAX_ON_LANES 32u
/* Launches that are worked off in one go; then others have their turn. */
#define MAX_IN_A_GO 1024u

/* ---- handing over ---- */

static void block(struct group *group)
{
    if (list_empty(&group->in_blocked))
        list_append(&group->worker->blocked, &group->in_blocked);
}

/* What is wrong with one launch, as an error that names the rank, what it gave and what it should have given.
 */
static enum epd_status explain_flaw(const struct member *member, const struct launch *launch,
                                    struct epd_error *error)
{
    const char *op = op_name(launch->plan->op);
    switch (launch->flaw) {
    case LAUNCH_BAD_SEQ:
        return error_set(error, EPD_SEQ_MISMATCH,
                         "%s in group %s: rank %u names seq %" PRIu64 ", want %" PRIu64, op,
                         member->group->name, member->rank, launch->seq, launch->wanted_seq);
    case LAUNCH_BAD_HASH:
        return error_set(error, EPD_SEQ_MISMATCH,
                         "%s in group %s: rank %u names another shape than its plan has", op,
                         member->group->name, member->rank);
    case LAUNCH_BAD_TOKENS:
        return error_set(error, EPD_INVALID_ARGUMENT,
                         "%s in group %s: rank %u has %u tokens, its plan at most %u", op,
                         member->group->name, member->rank, launch->n_tokens, launch->plan->max_tokens);
    default:
        return EPD_OK;
    }
}

/* The front launch is local: hands it over or ends it. 0 if the lane has no room. */
static int run_local(struct member *member, struct launch *launch)
{
    struct group *group = member->group;
    struct worker *worker = group->worker;
    struct epd_error error = {0};
    const uint64_t now_ns = clock_ns();
    enum epd_status status = explain_flaw(member, launch, &error);
    struct flight *flight = NULL;
    if (status == EPD_OK) {
        flight = flight_acquire(worker);
        if (!flight)
            status = error_set(&error, EPD_NO_MEMORY, "launch: no memory");
    }
    if (status == EPD_OK) {
        *flight = (struct flight){
            .group = group, .op = launch->plan->op, .n_plans = 1, .n_tokens = launch->n_tokens};
        flight->plans[0] = launch->plan;
        status = step_submit(launch->plan->set, &launch->n_tokens, &launch->seq, flight_land, flight, &error);
    }
    if (status == EPD_OK) {
        flight->entry = step_record_begin(group, launch, 0, launch->arrived_ns);
        flight_depart(flight, now_ns);
    } else {
        if (flight)
            flight_release(worker, flight);
        if (status == EPD_BUSY) {
            block(group);
            return 0;
        }
        member_fail_first(member, &error, EPD_PHASE_NONE, (int32_t)member->rank);
    }
    member_pop(member);
    return 1;
}

/* The step is over for the ranks that took part: their launches are done with, or (announced) wait at the front of
 * their queues until the other nodes have come to the step. */
static void close_gather(struct group *group, uint64_t now_ns, int announced)
{
    for (uint32_t rank = 0; rank < group->world_size; rank++) {
        struct member *member = group->members[rank];
        if (!member || !member->announced)
            continue;
        member->announced = 0;
        member->ordinal++;
        if (announced)
            member->ahead++;
        else
            member_pop(member);
    }
    group->ordinal++;
    group->gather = (struct gather){.ended_ns = now_ns};
}

/* The step is complete here or has failed here: the other nodes are told, and it ends when they have spoken. */
static void announce_step(struct group *group, const struct epd_error *error, int32_t rank)
{
    if (error) {
        group->missed = *error;
        group->missed_rank = rank;
    }
    group_span_announce(group, error, rank);
    close_gather(group, clock_ns(), 1);
}

/* The step ends without running, for all ranks: those that are there now, those that come later when they
 * come. */
static void end_step(struct group *group, const struct epd_error *error, int32_t rank)
{
    struct worker *worker = group->worker;
    const uint64_t now_ns = clock_ns();
    group->missed = *error;
    group->missed_rank = rank;
    group->n_launches++;
    group->n_failed++;
    step_record_failed(worker, group->gather.entry, error, EPD_PHASE_GATHER, rank, now_ns);
    for (uint32_t i = 0; i < group->world_size; i++)
        if (group->members[i] && group->members[i]->announced)
            member_fail_first(group->members[i], error, EPD_PHASE_GATHER, rank);
    close_gather(group, now_ns, 0);
}

void gather_fail_step(struct group *group, const struct epd_error *error, int32_t rank)
{
    if (group->span)
        announce_step(group, error, rank);
    else
        end_step(group, error, rank);
}

static void count_straggler(struct group *group)
{
    const struct gather *gather = &group->gather;
    if (group_n_ranks(group) == 1)
        return;
    struct member *last = group->members[gather->last_rank];
    last->came_last++;
    last->held_up_ns += gather->last_ns - gather->first_ns;
}

static void fill_flight(struct flight *flight, struct group *group, const struct joint_plan *joint,
                        uint32_t *n_tokens, uint64_t *seq)
{
    flight->group = group;
    flight->op = joint->op;
    flight->n_plans = group_n_ranks(group);
    flight->n_tokens = 0;
    const uint32_t base = group_first_rank(group);
    for (uint32_t i = 0; i < flight->n_plans; i++) {
        const struct launch *launch = launch_queue_first(&group->members[base + i]->queue);
        n_tokens[i] = launch->n_tokens;
        seq[i] = launch->seq;
        flight->n_tokens += launch->n_tokens;
        flight->plans[i] = launch->plan;
    }
}

/* The front launches of all ranks of this node become a flight. EPD_BUSY if the lanes have no room. */
static enum epd_status depart(struct group *group, uint64_t gather_ns, uint64_t entry,
                              struct epd_error *error)
{
    struct worker *worker = group->worker;
    const struct joint_plan *joint =
        launch_queue_first(&group->members[group_first_rank(group)]->queue)->plan->joint;
    struct flight *flight = flight_acquire(worker);
    uint64_t submit_ns = 0;
    enum epd_status status = flight ? EPD_OK : error_set(error, EPD_NO_MEMORY, "launch: no memory");
    if (status == EPD_OK)
        status = failpoint_hit(&worker->failpoints, "step_submit", error);
    if (status == EPD_OK && joint->state != JOINT_PLAN_READY)
        status = error_set(error, EPD_UNKNOWN_ID, "%s in group %s: rank %d has destroyed its plan %u",
                           op_name(joint->op), group->name, (int)joint->ended_by, joint->key);
    if (status == EPD_OK) {
        uint32_t n_tokens[EPD_MAX_WORLD_SIZE];
        uint64_t seq[EPD_MAX_WORLD_SIZE];
        fill_flight(flight, group, joint, n_tokens, seq);
        flight->gather_ns = gather_ns;
        flight->entry = entry;
        submit_ns = clock_ns(); /* before: the lanes may be done with it when step_submit returns */
        status = step_submit(joint->set, n_tokens, seq, flight_land, flight, error);
    }
    if (status == EPD_OK)
        flight_depart(flight, submit_ns);
    else if (flight)
        flight_release(worker, flight);
    return status;
}

/* Every rank's turn has come: hands the step to the lanes. 0 if they have no room. */
static int submit(struct group *group)
{
    const struct gather *gather = &group->gather;
    struct epd_error error = {0};
    const enum epd_status status = depart(group, gather->last_ns - gather->first_ns, gather->entry, &error);
    if (status == EPD_OK) {
        count_straggler(group);
        close_gather(group, clock_ns(), 0);
        return 1;
    }
    group->gather.blocked = status == EPD_BUSY;
    if (status == EPD_BUSY) {
        block(group);
        return 0;
    }
    end_step(group, &error, -1);
    return 1;
}

/* All ranks of this node have come to the step. */
static int complete(struct group *group)
{
    if (!group->span)
        return submit(group);
    count_straggler(group);
    announce_step(group, NULL, -1);
    return 1;
}

int gather_resolve(struct group *group, const struct span_step *step, const struct epd_error *error,
                   int32_t rank)
{
    struct epd_error failed = {0};
    if (!error) {
        const enum epd_status status = depart(group, step->gather_ns, step->entry, &failed);
        if (status == EPD_BUSY)
            return 0;
        if (status != EPD_OK) {
            group_break(group, -1, &failed);
            return 1;
        }
    } else {
        group->n_launches++;
        group->n_failed++;
        step_record_failed(group->worker, step->entry, error, EPD_PHASE_GATHER, rank, clock_ns());
    }
    for (uint32_t i = 0; i < group->world_size; i++) {
        struct member *member = group->members[i];
        if (!member || !(step->ranks >> i & 1))
            continue;
        if (error)
            member_fail_first(member, error, EPD_PHASE_GATHER, rank);
        member->ahead--;
        member_pop(member);
    }
    return 1;
}

void gather_fail_unasked(struct group *group, const struct epd_error *error, int32_t rank)
{
    end_step(group, error, rank);
    gather_pump_all(group);
}

/* ---- gathering ---- */

/* The new launch against the first of its step. */
static enum epd_status compare(const struct member *member, const struct launch *launch,
                               struct epd_error *error)
{
    struct group *group = member->group;
    enum epd_status status = explain_flaw(member, launch, error);
    if (status != EPD_OK)
        return status;
    const struct joint_plan *joint = launch->plan->joint;
    if (joint->state != JOINT_PLAN_READY)
        return error_set(error, EPD_UNKNOWN_ID, "%s in group %s: rank %d has destroyed its plan %u",
                         op_name(joint->op), group->name, (int)joint->ended_by, joint->key);
    const struct launch *first = member_next(group->members[group->gather.first_rank]);
    if (first->plan->joint == joint)
        return EPD_OK;
    return error_set(error, EPD_SEQ_MISMATCH,
                     "step %" PRIu64
                     " of group %s: rank %u launches %s (plan %u), rank %u launches %s (plan %u)",
                     group->ordinal + 1, group->name, member->rank, op_name(joint->op), joint->key,
                     group->gather.first_rank, op_name(first->plan->op), first->plan->joint->key);
}

/* The rank's front launch takes part in the step. 1 if that ended it: handed over or failed. */
static int announce(struct member *member, struct launch *launch)
{
    struct group *group = member->group;
    struct gather *gather = &group->gather;
    const uint64_t at_ns = launch->arrived_ns > gather->ended_ns ? launch->arrived_ns : gather->ended_ns;
    if (!gather->n_arrived) {
        gather->first_rank = member->rank;
        gather->first_ns = at_ns;
        gather->entry = step_record_begin(group, launch, group->ordinal + 1, at_ns);
        if (group_n_ranks(group) > 1)
            group_arm(group, at_ns + clock_ms_to_ns(gather_warn_ms(group)));
    }
    member->announced = 1;
    gather->n_arrived++;
    gather->arrived |= 1ull << member->rank;
    gather->last_rank = member->rank;
    gather->last_ns = at_ns > gather->first_ns ? at_ns : gather->first_ns;
    step_record_arrival(group, member->rank);
    struct epd_error error = {0};
    if (compare(member, launch, &error) != EPD_OK) {
        gather_fail_step(group, &error, (int32_t)member->rank);
        return 1;
    }
    return gather->n_arrived == group_n_ranks(group) ? complete(group) : 0;
}

/* Steps of several nodes have an order of their own. */
static int crowded(const struct group *group)
{
    return !group->span && group->team && group->n_flights + team_n_refused(group->team) >= MAX_ON_LANES;
}

/* The next round of the loop goes on with it. */
static void postpone(struct group *group)
{
    block(group);
    (void)uv_async_send(&group->worker->notify); /* fails only on a closing handle: then all ends anyway */
}

static void fail_alone(struct member *member, const struct epd_error *error, int32_t rank)
{
    member_fail_first(member, error, EPD_PHASE_GATHER, rank);
    member->ordinal++;
    member_pop(member);
}

/* Works off the front of one rank's queue as far as it goes. 1 if a step ended: other ranks' fronts have
 * changed. */
static int advance(struct member *member, uint32_t *n_left)
{
    struct group *group = member->group;
    int ended = 0;
    struct launch *launch;
    while (!member->announced && (launch = member_next(member))) {
        const int in_front = member->ahead == 0;
        if (crowded(group)) {
            block(group);
            break;
        }
        if (*n_left == 0) {
            postpone(group);
            break;
        }
        --*n_left;
        if (!op_is_collective(launch->plan->op)) {
            if (!in_front || !run_local(member, launch)) /* it runs behind what was asked for before it */
                break;
        } else if (group->state == GROUP_BROKEN) {
            fail_alone(member, &group->lost, group->lost_rank);
        } else if (member->ordinal < group->ordinal) {
            if (!in_front)
                break;
            fail_alone(member, &group->missed, group->missed_rank);
        } else if (group_span_full(group)) {
            break;
        } else {
            ended |= announce(member, launch);
        }
    }
    return ended;
}

static void advance_some(struct group *group, uint32_t n_left)
{
    for (int again = 1; again;) {
        again = 0;
        for (uint32_t rank = 0; rank < group->world_size; rank++)
            if (group->members[rank])
                again |= advance(group->members[rank], &n_left);
    }
}

static void advance_all(struct group *group)
{
    advance_some(group, MAX_IN_A_GO);
}

void gather_pump_all(struct group *group)
{
    if (group->state == GROUP_OPEN)
        advance_all(group);
}

void gather_pump(struct member *member)
{
    struct group *group = member->group;
    uint32_t n_left = MAX_IN_A_GO;
    if (advance(member, &n_left))
        advance_some(group, n_left);
}

void gather_retry(struct worker *worker)
{
    struct list blocked;
    list_init(&blocked);
    while (!list_empty(&worker->blocked)) {
        struct list *node = worker->blocked.next;
        list_remove(node);
        list_append(&blocked, node);
    }
    while (!list_empty(&blocked)) {
        struct group *group = list_owner(blocked.next, struct group, in_blocked);
        list_remove(&group->in_blocked);
        group_hold(group);
        if (!group->gather.blocked || submit(group))
            advance_all(group);
        group_release(group);
    }
}

void gather_break(struct group *group)
{
    if (group->gather.n_arrived)
        step_record_failed(group->worker, group->gather.entry, &group->lost, EPD_PHASE_GATHER,
                           group->lost_rank, clock_ns());
    for (uint32_t rank = 0; rank < group->world_size; rank++)
        if (group->members[rank])
            group->members[rank]->announced = group->members[rank]->ahead = 0;
    group->gather = (struct gather){0};
    advance_all(group);
}
