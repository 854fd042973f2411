/* How long a step may wait for its ranks: a warning, the end of the step, the end of a rank that others have missed for too
 * long. */
#include <inttypes.h>
#include <stdio.h>

#include "daemon/clock.h"
#include "daemon/gather.h"
#include "daemon/group_span.h"
#include "daemon/number_set.h"
#include "daemon/rank_plan.h"
#include "daemon/session.h"

static uint64_t deadline_ms(const struct group *group)
{
    return group->config.deadline_ms ? group->config.deadline_ms : group->worker->config.stuck_ms;
}

uint64_t gather_warn_ms(const struct group *group)
{
    const uint64_t warn = group->worker->config.warn_ms;
    return warn < deadline_ms(group) ? warn : deadline_ms(group);
}

static void name_missing(const struct group *group, char *text, size_t bytes, int32_t *first)
{
    const uint32_t begin = group_first_rank(group), end = begin + group_n_ranks(group);
    uint64_t missing = 0;
    for (uint32_t rank = begin; rank < end; rank++)
        missing |= (uint64_t) !(group->gather.arrived >> rank & 1) << rank;
    *first = missing ? (int32_t)__builtin_ctzll(missing) : -1;
    number_set_name(missing, text, bytes);
}

static const char *op_of_gather(const struct group *group)
{
    return op_name(member_next(group->members[group->gather.first_rank])->plan->op);
}

static void warn(struct group *group, uint64_t now_ns)
{
    char missing[80];
    int32_t first_missing;
    struct log_word name;
    group->gather.warned = 1;
    name_missing(group, missing, sizeof(missing), &first_missing);
    (void)log_limited(group->worker->log, LOG_WARN, "gather_warn", now_ns,
                      "group %" PRIu64 " name %s step %" PRIu64 " op %s phase gather waits_ms %" PRIu64
                      " missing_ranks%s",
                      group->id, log_word(&name, group->name), group->ordinal + 1, op_of_gather(group),
                      (uint64_t)((now_ns - group->gather.first_ns) / CLOCK_NS_PER_MS), missing);
}

static void time_out(struct group *group, uint64_t now_ns)
{
    char missing[80];
    int32_t first_missing;
    name_missing(group, missing, sizeof(missing), &first_missing);
    struct epd_error error;
    (void)error_set(&error, EPD_TIMEOUT,
                    "step %" PRIu64 " (%s) of group %s, phase gather: not asked for within %" PRIu64
                    " ms by rank%s",
                    group->ordinal + 1, op_of_gather(group), group->name, deadline_ms(group), missing);
    (void)log_limited(group->worker->log, LOG_WARN, "gather_timeout", now_ns, "group %" PRIu64 " timeout %s",
                      group->id, error.text);
    for (uint32_t rank = 0; rank < group->world_size; rank++) {
        struct member *member = group->members[rank];
        if (member && !(group->gather.arrived >> rank & 1) && !member->missing_since_ns)
            member->missing_since_ns = group->gather.first_ns;
    }
    gather_fail_step(group, &error, first_missing);
    worker_dump(group->worker, error.text);
    gather_pump_all(group);
}

static uint64_t check_step(struct group *group, uint64_t now_ns)
{
    for (;;) {
        const struct gather *gather = &group->gather;
        if (!gather->n_arrived || gather->n_arrived == group_n_ranks(group))
            return CLOCK_NEVER;
        const uint64_t warn_ns = gather->first_ns + clock_ms_to_ns(gather_warn_ms(group));
        const uint64_t end_ns = gather->first_ns + clock_ms_to_ns(deadline_ms(group));
        if (now_ns < end_ns) {
            if (!gather->warned && now_ns >= warn_ns)
                warn(group, now_ns);
            return gather->warned ? end_ns : warn_ns;
        }
        time_out(group, now_ns);
    }
}

static uint64_t check_missing(struct group *group, uint64_t now_ns)
{
    uint64_t next_ns = CLOCK_NEVER;
    const uint64_t dead = group->worker->config.dead_ms;
    const uint64_t limit_ms = dead > deadline_ms(group) ? dead : deadline_ms(group);
    for (uint32_t rank = 0; rank < group->world_size; rank++) {
        struct member *member = group->members[rank];
        if (!member || !member->missing_since_ns)
            continue;
        const uint64_t end_ns = member->missing_since_ns + clock_ms_to_ns(limit_ms);
        if (now_ns < end_ns) {
            next_ns = end_ns < next_ns ? end_ns : next_ns;
            continue;
        }
        char text[128];
        (void)snprintf(text, sizeof(text), "the other ranks of group %.64s missed rank %u for %" PRIu64 " ms",
                       group->name, rank, limit_ms);
        member->missing_since_ns = 0;
        session_close(member->session, CLOSE_DEAD, text);
    }
    return next_ns;
}

uint64_t gather_check(struct group *group, uint64_t now_ns)
{
    if (group->state != GROUP_OPEN)
        return CLOCK_NEVER;
    const uint64_t step_ns = check_step(group, now_ns);
    const uint64_t missing_ns = check_missing(group, now_ns);
    return step_ns < missing_ns ? step_ns : missing_ns;
}
