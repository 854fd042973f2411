#include "daemon/flight.h"

#include <stdlib.h>

#include "daemon/clock.h"
#include "daemon/group_span.h"
#include "daemon/rank_plan.h"
#include "daemon/step_record.h"

struct flight *flight_acquire(struct worker *worker)
{
    if (list_empty(&worker->idle_flights))
        return calloc(1, sizeof(struct flight));
    struct flight *flight = list_owner(worker->idle_flights.next, struct flight, in_idle);
    list_remove(&flight->in_idle);
    return flight;
}

void flight_release(struct worker *worker, struct flight *flight)
{
    list_init(&flight->in_idle);
    list_append(&worker->idle_flights, &flight->in_idle);
}

void flight_fini(struct worker *worker)
{
    while (!list_empty(&worker->idle_flights)) {
        struct flight *flight = list_owner(worker->idle_flights.next, struct flight, in_idle);
        list_remove(&flight->in_idle);
        free(flight);
    }
}

void flight_depart(struct flight *flight, uint64_t now_ns)
{
    struct group *group = flight->group;
    for (uint32_t i = 0; i < flight->n_plans; i++)
        flight->plans[i]->n_flights++;
    flight->submit_ns = now_ns;
    group->n_launches++;
    group->n_flights++;
    group->worker->n_flights++;
    group_hold(group);
    step_record_running(group->worker, flight->entry, now_ns);
}

static void check_device_lost(struct worker *worker, const struct step_result *result)
{
    for (uint32_t rank = 0; rank < result->n_ranks; rank++) {
        if (result->ranks[rank].status != EPD_CUDA && result->ranks[rank].status != EPD_NCCL)
            continue;
        struct epd_error error;
        (void)error_set(&error, result->ranks[rank].status,
                        "a step failed on the device of rank %u in phase %s", rank,
                        phase_name(result->ranks[rank].phase));
        worker_fail(worker, &error);
        return;
    }
}

void flight_land(void *arg, const struct step_result *result)
{
    struct flight *flight = arg;
    struct group *group = flight->group;
    struct worker *worker = group->worker;
    const uint64_t now_ns = clock_ns();
    int failed = 0;
    struct epd_error ignored = {0};
    (void)!failpoint_hit(&worker->failpoints, "step_done",
                         &ignored); /* may sleep or kill; the step has ended */
    for (uint32_t i = 0; i < flight->n_plans; i++) {
        flight->plans[i]->n_flights--;
        flight->plans[i]->n_failed += result->ranks[i].status != EPD_OK;
        failed |= result->ranks[i].status != EPD_OK;
    }
    stats_count_step(&worker->stats, flight->op, result, flight->n_tokens, flight->gather_ns,
                     now_ns - flight->submit_ns);
    load_count(&group->load, result->expert_rows, result->n_experts);
    step_record_result(worker, flight->entry, result, now_ns);
    group->n_failed += (uint64_t)failed;
    group->n_flights--;
    worker->n_flights--;
    flight_release(worker, flight);
    if (failed)
        check_device_lost(worker, result);
    struct epd_error why;
    if (failed && group->span && rails_broken(group->span->rails, &why))
        group_break(group, -1, &why);
    group_release(group);
}
