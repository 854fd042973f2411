#include "daemon/step_record.h"

#include <stdio.h>

#include "daemon/group_span.h"
#include "daemon/rank_plan.h"

uint64_t step_record_begin(struct group *group, const struct launch *launch, uint64_t ordinal,
                           uint64_t now_ns)
{
    struct recorder_entry *entry = recorder_begin(&group->worker->recorder);
    entry->group_id = group->id;
    entry->ordinal = ordinal;
    entry->plan_id = launch->plan->id;
    entry->first_ns = entry->last_ns = now_ns;
    entry->world_size = ordinal ? group->world_size : 1;
    entry->op = (uint32_t)launch->plan->op;
    /* Ranks of other nodes are theirs to miss. */
    for (uint32_t rank = 0; group->span && rank < group->world_size; rank++)
        if (rank - group_first_rank(group) >= group_n_ranks(group))
            entry->arrived |= 1ull << rank;
    entry->state = RECORDER_GATHERING;
    return entry->serial;
}

void step_record_arrival(struct group *group, uint32_t rank)
{
    struct recorder_entry *entry = recorder_find(&group->worker->recorder, group->gather.entry);
    if (!entry)
        return;
    entry->arrived |= 1ull << rank;
    entry->last_ns = group->gather.last_ns;
}

void step_record_running(struct worker *worker, uint64_t serial, uint64_t now_ns)
{
    struct recorder_entry *entry = recorder_find(&worker->recorder, serial);
    if (!entry)
        return;
    entry->state = RECORDER_RUNNING;
    entry->submit_ns = now_ns;
}

void step_record_failed(struct worker *worker, uint64_t serial, const struct epd_error *error,
                        enum epd_phase phase, int32_t rank, uint64_t now_ns)
{
    struct recorder_entry *entry = recorder_find(&worker->recorder, serial);
    if (!entry)
        return;
    entry->state = RECORDER_DONE;
    entry->status = (uint32_t)error->status;
    entry->phase = (uint32_t)phase;
    entry->rank = rank;
    entry->end_ns = now_ns;
    (void)snprintf(entry->text, sizeof(entry->text), "%.95s", error->text);
}

void step_record_result(struct worker *worker, uint64_t serial, const struct step_result *result,
                        uint64_t now_ns)
{
    struct recorder_entry *entry = recorder_find(&worker->recorder, serial);
    if (!entry)
        return;
    entry->state = RECORDER_DONE;
    entry->end_ns = now_ns;
    for (uint32_t rank = 0; rank < result->n_ranks; rank++) {
        const struct step_rank_result *part = &result->ranks[rank];
        for (int phase = 0; phase < EPD_PHASE_COUNT; phase++)
            if (part->phase_ns[phase] > entry->phase_ns[phase])
                entry->phase_ns[phase] = part->phase_ns[phase];
        if (part->status == EPD_OK || entry->status)
            continue;
        entry->status = (uint32_t)part->status;
        entry->phase = (uint32_t)part->phase;
        entry->rank = (int32_t)rank;
    }
}
