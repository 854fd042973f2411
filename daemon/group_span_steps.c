/* The steps of groups that span nodes: announced to node 0, and begun in the one order that it gives to all of them. */
#include <assert.h>
#include <inttypes.h>
#include <stdlib.h>

#include "daemon/clock.h"
#include "daemon/fabric.h"
#include "daemon/gather.h"
#include "daemon/group_span.h"
#include "daemon/joint_plan.h"
#include "daemon/member.h"
#include "daemon/rank_plan.h"

/* A step that the fabric has decided and that waits for room on the lanes, or for those before it. */
struct fabric_go {
    struct list in_fabric;
    struct group *group; /* held */
    uint64_t number;
    struct epd_error error;
    int32_t rank;
};

static struct span_step *step_at(struct group_span *span, uint64_t number)
{
    return &span->steps[number % SPAN_MAX_AHEAD];
}

int group_span_full(const struct group *group)
{
    return group->span && group->ordinal - group->span->n_gone >= SPAN_MAX_AHEAD;
}

void group_span_announce(struct group *group, const struct epd_error *error, int32_t rank)
{
    struct group_span *span = group->span;
    const struct gather *gather = &group->gather;
    const struct rank_plan *plan = member_next(group->members[gather->first_rank])->plan;
    struct span_step *step = step_at(span, group->ordinal + 1);
    struct fabric_message message;
    assert(!group_span_full(group));
    *step = (struct span_step){.ranks = gather->arrived,
                               .rank = rank,
                               .announced_ns = clock_ns(),
                               .gather_ns = gather->last_ns - gather->first_ns,
                               .entry = gather->entry};
    fabric_message_init(&message, FABRIC_STEP);
    message.group = span->id;
    message.number = group->ordinal + 1;
    message.op = plan->op;
    message.hash = plan->joint->key;
    if (error) {
        step->error = message.error = *error;
        message.rank = rank;
    }
    group_span_tell(group, &message);
}

static void count_agreement(struct group *group, const struct span_step *step, int ahead)
{
    struct fabric_agreements *agreements = &group->worker->fabric->agreements;
    const uint64_t took_ns = clock_ns() - step->announced_ns;
    agreements->n++;
    agreements->sum_ns += took_ns;
    agreements->max_ns = took_ns > agreements->max_ns ? took_ns : agreements->max_ns;
    agreements->n_ahead += (uint64_t)ahead;
}

/* Begins or ends the oldest announced step. 0 if the lanes have no room. */
static int resolve(struct fabric_go *go)
{
    struct group *group = go->group;
    struct group_span *span = group->span;
    struct epd_error error = go->error;
    if (group->state != GROUP_OPEN)
        return 1;
    if (go->number != span->n_gone + 1) {
        (void)error_set(&error, EPD_PROTOCOL, "group %s: step %" PRIu64 " goes, want %" PRIu64, group->name,
                        go->number, span->n_gone + 1);
        group_break(group, -1, &error);
        return 1;
    }
    if (go->number > group->ordinal) { /* it failed before this node had it */
        span->n_gone++;
        if (error.status == EPD_OK)
            (void)error_set(&error, EPD_PROTOCOL, "group %s: step %" PRIu64 " goes unasked", group->name,
                            go->number);
        gather_fail_unasked(group, &error, go->rank);
        return 1;
    }
    const struct span_step step = *step_at(span, go->number);
    const int ahead = group->n_flights > 0;
    if (step.error.status)
        error = step.error;
    if (!gather_resolve(group, &step, error.status ? &error : NULL, step.error.status ? step.rank : go->rank))
        return 0;
    span->n_gone++;
    count_agreement(group, &step, ahead);
    gather_pump_all(group);
    return 1;
}

void group_span_retry(struct fabric *fabric)
{
    while (!list_empty(&fabric->gos)) {
        struct fabric_go *go = list_owner(fabric->gos.next, struct fabric_go, in_fabric);
        if (!resolve(go))
            return;
        list_remove(&go->in_fabric);
        group_release(go->group);
        free(go);
    }
}

void group_span_take_go(struct fabric *fabric, struct group *group, const struct fabric_message *message)
{
    struct fabric_go *go = malloc(sizeof(*go));
    struct epd_error error;
    if (!go) {
        (void)error_set(&error, EPD_NO_MEMORY, "group %s: no memory for a step", group->name);
        group_break(group, -1, &error);
        return;
    }
    *go = (struct fabric_go){
        .group = group, .number = message->number, .error = message->error, .rank = message->rank};
    group_hold(group);
    list_init(&go->in_fabric);
    list_append(&fabric->gos, &go->in_fabric);
    group_span_retry(fabric);
}
