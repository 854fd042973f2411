/* A step on its lanes. Every lane: checks all its ranks, meets the others, runs the phases with a barrier
 * where the row says so, copies out what the kernels recorded, meets the others for the last time; then every
 * lane decides by itself, from the same records, what the step came to, and sets its ranks' done flags.
 *
 * A lane that cannot go on writes why, aborts the phases' barrier and goes to the last one. So lanes never
 * part: each step ends on all of them, whatever happens. */
#include "ep/step_impl.h"

#include <stdio.h>

#include "ep/clock.h"

static struct step_lane *step_lane_of_job(struct lane_job *job)
{
    return (struct step_lane *)((char *)job - offsetof(struct step_lane, job));
}

static struct rank_run rank_run_of(const struct step_lane *lane, uint32_t idx)
{
    return (struct rank_run){
        .backend = lane_backend(lane->team_lane->lane),
        .queue = lane->team_lane->queue,
        .plan = lane->step->plans[idx],
        .peers = lane->step->plans,
        .n_tokens = lane->step->n_tokens[idx],
    };
}

static void fail_rank(struct step *step, uint32_t idx, const struct epd_error *error, enum epd_phase phase)
{
    step->ranks[idx].error = *error;
    step->ranks[idx].phase = phase;
    barrier_abort(&step->phases);
}

/* All ready flags are looked at, and so consumed, before anything starts. */
static void check_ranks(struct step_lane *lane)
{
    struct step *step = lane->step;
    for (uint32_t i = 0; i < lane->n_ranks; i++) {
        struct rank_run run = rank_run_of(lane, lane->ranks[i]);
        struct epd_error error = {.status = EPD_OK};
        if (run.backend->flag_ready(run.queue, &run.plan->flag, &error) || moe_check_step(&run, &error) ||
            (run.plan->records && run.backend->zero(run.queue, run.plan->records,
                                                    PLAN_RECORD_COUNT * sizeof *run.plan->records, &error)))
            fail_rank(step, lane->ranks[i], &error, EPD_PHASE_GATHER);
    }
}

/* Lanes meet, and their queues wait for each other's work. 0 if the step is off. */
static int meet(struct step_lane *lane, struct barrier *barrier)
{
    struct step *step = lane->step;
    const struct backend *backend = lane_backend(lane->team_lane->lane);
    struct epd_error error = {.status = EPD_OK};
    uint32_t barrier_idx = lane->n_barriers++;
    if (step->n_lanes == 1)
        return barrier_wait(barrier);
    if (backend->queue_mark(lane->team_lane->queue, barrier_idx, &error))
        fail_rank(step, lane->ranks[0], &error, EPD_PHASE_NONE);
    if (!barrier_wait(barrier))
        return 0;
    for (uint32_t i = 0; i < step->n_lanes; i++) {
        struct team_lane *other = step->lanes[i].team_lane;
        if (other != lane->team_lane &&
            backend->queue_join(lane->team_lane->queue, other->queue, barrier_idx, &error)) {
            fail_rank(step, lane->ranks[0], &error, EPD_PHASE_NONE);
            return 0;
        }
    }
    return 1;
}

static int run_phase(struct step_lane *lane, const struct phase *phase)
{
    struct step *step = lane->step;
    for (uint32_t i = 0; i < lane->n_ranks; i++) {
        uint32_t idx = lane->ranks[i];
        struct rank_run run = rank_run_of(lane, idx);
        struct epd_error error = {.status = EPD_OK};
        uint64_t begin_ns = clock_now_ns();
        if (phase->run(&run, &error)) {
            fail_rank(step, idx, &error, phase->phase);
            return 0;
        }
        step->results[idx].phase_ns[phase->phase] += clock_now_ns() - begin_ns;
    }
    return 1;
}

/* 0 if the step is off: then other lanes may still be in any phase. */
static int run_phases(struct step_lane *lane)
{
    const struct pipeline *pipeline = moe_pipeline(lane->step->op);
    for (uint32_t i = 0; i < pipeline->n_phases; i++) {
        const struct phase *phase = &pipeline->phases[i];
        if ((i == 0 || phase->after_barrier) && !meet(lane, &lane->step->phases))
            return 0;
        if (!run_phase(lane, phase))
            return 0;
    }
    return 1;
}

/* What the kernels recorded, and on the lane of position 0 what the routing counted. */
static void copy_reports(struct step_lane *lane, int with_counts)
{
    struct step *step = lane->step;
    for (uint32_t i = 0; i < lane->n_ranks; i++) {
        uint32_t idx = lane->ranks[i];
        struct rank_run run = rank_run_of(lane, idx);
        const struct plan *router = plan_router(run.plan);
        const struct problem *problem = &step->team->problem;
        struct epd_error error = {.status = EPD_OK};
        if (run.plan->records && run.backend->copy_out(run.queue, step->ranks[idx].records, run.plan->records,
                                                       sizeof step->ranks[idx].records, &error))
            fail_rank(step, idx, &error, EPD_PHASE_NONE);
        if (idx == 0 && step->counts && with_counts &&
            run.backend->copy_out(run.queue, step->counts, router->routing.routing.counts,
                                  (uint64_t)problem->world_size * problem->n_experts * sizeof *step->counts,
                                  &error))
            fail_rank(step, idx, &error, EPD_PHASE_NONE);
        if (step->splits && run.backend->copy_out(
                                run.queue, step->splits, run.plan->splits,
                                (uint64_t)run.plan->bindings.dims[DIM_GROUPS] * sizeof *step->splits, &error))
            fail_rank(step, idx, &error, EPD_PHASE_NONE);
    }
}

void step_lane_run(struct lane_job *job, struct lane *lane)
{
    struct step_lane *part = step_lane_of_job(job);
    struct epd_error error = {.status = EPD_OK};
    check_ranks(part);
    copy_reports(part, run_phases(part));
    (void)meet(part, &part->step->last);
    if (lane_backend(lane)->queue_ticket(part->team_lane->queue, &part->ticket, &error))
        fail_rank(part->step, part->ranks[0], &error, EPD_PHASE_NONE);
}

/* What the step came to; the same on every lane. */
struct verdict {
    struct epd_error error;
    enum epd_phase phase;
    int32_t rank; /* to blame; -1: none */
    struct kernel_error record;
};

static enum epd_phase record_phase(enum plan_record record)
{
    return record == PLAN_RECORD_EXPERT ? EPD_PHASE_GEMM : EPD_PHASE_ROUTE;
}

static void describe_record(const struct step *step, const struct plan *plan, struct verdict *verdict)
{
    const struct kernel_error *record = &verdict->record;
    const char *op = op_name(step->op);
    long long got = record->got, allowed = record->allowed;
    switch (record->status) {
    case EPD_BAD_ROUTING:
        if (record->expert >= 0)
            error_set(&verdict->error, EPD_BAD_ROUTING, "%s: topk_idx of rank %u token %d: expert %lld twice",
                      op, plan->rank, record->token, got);
        else
            error_set(&verdict->error, EPD_BAD_ROUTING,
                      "%s: topk_idx of rank %u token %d: expert %lld, want -1..%lld", op, plan->rank,
                      record->token, got, allowed);
        return;
    case EPD_CAPACITY_OVERFLOW:
        error_set(&verdict->error, EPD_CAPACITY_OVERFLOW,
                  "%s: rank %u receives %lld rows, its capacity is %lld", op, plan->rank, got, allowed);
        return;
    case EPD_BAD_SPLITS:
        error_set(&verdict->error, EPD_BAD_SPLITS,
                  "%s: m_splits of rank %u expert %d: rows %lld, want 0..%lld (max_rows)", op, plan->rank,
                  record->expert, got, allowed);
        return;
    default:
        error_set(&verdict->error, EPD_INTERNAL, "%s: kernel record %u of rank %u", op, record->status,
                  plan->rank);
    }
}

/* The first rank whose host side failed; else the first record of the lowest rank. */
static struct verdict decide(const struct step *step)
{
    struct verdict verdict = {.error = {.status = EPD_OK}, .rank = -1};
    for (uint32_t i = 0; i < step->n_ranks; i++) {
        if (!step->ranks[i].error.status)
            continue;
        verdict.error = step->ranks[i].error;
        verdict.phase = step->ranks[i].phase;
        verdict.rank = (int32_t)step->plans[i]->rank;
        return verdict;
    }
    for (int record = 0; record < PLAN_RECORD_COUNT; record++) {
        for (uint32_t i = 0; i < step->n_ranks; i++) {
            const struct kernel_error *seen = &step->ranks[i].records[record];
            if (!seen->status ||
                (seen->status == EPD_CAPACITY_OVERFLOW && step->team->problem.overflow == EPD_OVERFLOW_DROP))
                continue;
            verdict.record = *seen;
            verdict.phase = record_phase((enum plan_record)record);
            verdict.rank = (int32_t)step->plans[i]->rank;
            describe_record(step, step->plans[i], &verdict);
            return verdict;
        }
    }
    return verdict;
}

/* The verdict as this rank is told: its own words to the one that is to blame, the rank's name to the others.
 */
static struct epd_error told(const struct step *step, const struct verdict *verdict, const struct plan *plan)
{
    struct epd_error error = verdict->error;
    if (verdict->record.status || (int32_t)plan->rank == verdict->rank)
        return error;
    if (verdict->error.status == EPD_PROTOCOL)
        error_set(&error, EPD_PEER_LOST, "%s: rank %d %.180s", op_name(step->op), verdict->rank,
                  verdict->error.text);
    else
        error_set(&error, verdict->error.status, "rank %d: %.200s", verdict->rank, verdict->error.text);
    return error;
}

static void report_failure(const struct plan *plan, uint64_t seq, const struct epd_error *error,
                           const struct verdict *verdict)
{
    struct page_entry entry = {
        .plan_id = plan->public_id,
        .seq = seq,
        .status = error->status,
        .phase = verdict->phase,
        .rank = verdict->rank,
    };
    snprintf(entry.text, sizeof entry.text, "%.*s", (int)sizeof entry.text - 1, error->text);
    page_report(plan->flag.page, &entry);
    atomic_fetch_add(&plan->flag.page->plans[plan->flag.idx].failed, 1);
}

static void finish_rank(struct step_lane *lane, uint32_t idx, const struct verdict *verdict)
{
    struct step *step = lane->step;
    struct rank_run run = rank_run_of(lane, idx);
    struct step_rank_result *result = &step->results[idx];
    if (verdict->error.status) {
        struct epd_error error = told(step, verdict, run.plan);
        result->status = error.status;
        result->phase = verdict->phase;
        result->record = verdict->record;
        report_failure(run.plan, step->seqs[idx], &error, verdict);
    } else {
        moe_finish_step(&run);
    }
    atomic_fetch_add(&run.plan->flag.page->plans[run.plan->flag.idx].completed, 1);
    result->end_ns = clock_now_ns();
    run.backend->flag_done(run.queue, &run.plan->flag);
}

/* Rows that cross to other ranks, once per direction of the op. */
static uint64_t crossing_rows(enum epd_op op, const struct problem_traffic *traffic)
{
    switch (op) {
    case EPD_OP_DISPATCH:
    case EPD_OP_COMBINE_BWD:
        return (uint64_t)traffic->sent_rows;
    case EPD_OP_COMBINE:
    case EPD_OP_DISPATCH_BWD:
        return (uint64_t)traffic->foreign_rows;
    case EPD_OP_MOE_FORWARD:
    case EPD_OP_MOE_BACKWARD:
        return (uint64_t)(traffic->sent_rows + traffic->foreign_rows);
    default:
        return 0;
    }
}

static uint64_t crossing_bytes(const struct plan *plan, const struct problem_traffic *traffic)
{
    const struct problem *problem = &plan->team->problem;
    uint64_t rows = crossing_rows(plan->op, traffic);
    if (plan->op == EPD_OP_MOE_BACKWARD && !plan_has(plan, EPD_ROLE_DX))
        rows -= (uint64_t)traffic->foreign_rows;
    if (plan->op == EPD_OP_MOE_BACKWARD && plan->context->saved == EPD_SAVED_RECOMPUTE)
        rows += (uint64_t)traffic->sent_rows;
    return rows * problem->hidden * dtype_bytes(problem->dtype);
}

/* After the flags: nobody waits for numbers. */
static void account_routed(struct step *step)
{
    const struct problem *problem = &step->team->problem;
    problem_count_traffic(problem, step->counts, step->traffic);
    for (uint32_t i = 0; i < step->n_ranks; i++) {
        const struct plan *plan = step->plans[i];
        const struct problem_traffic *traffic = &step->traffic[plan->rank];
        struct step_rank_result *result = &step->results[i];
        result->rows = traffic->rows;
        result->needed_rows = traffic->needed_rows;
        result->dropped_rows = plan_routes(plan) ? traffic->dropped_rows : 0;
        result->wire_bytes = crossing_bytes(plan, traffic);
        result->flops = (uint64_t)traffic->rows * plan->flops_per_row;
    }
    for (uint32_t expert = 0; expert < problem->n_experts; expert++) {
        step->expert_rows[expert] = 0;
        for (uint32_t rank = 0; rank < problem->world_size; rank++)
            step->expert_rows[expert] += step->counts[(size_t)rank * problem->n_experts + expert];
    }
}

static void account_local(struct step *step)
{
    const struct plan *plan = step->plans[0];
    int64_t left = plan->bindings.dims[DIM_ROWS];
    for (int64_t group = 0; group < plan->bindings.dims[DIM_GROUPS]; group++) {
        int64_t rows = step->splits[group];
        rows = rows < 0 ? 0 : rows > left ? left : rows;
        left -= rows;
        step->results[0].rows += rows;
    }
    step->results[0].flops = (uint64_t)step->results[0].rows * plan->flops_per_row;
}

int step_lane_poll(struct lane_job *job, struct lane *lane)
{
    struct step_lane *part = step_lane_of_job(job);
    struct step *step = part->step;
    if (!lane_backend(lane)->queue_reached(part->team_lane->queue, part->ticket))
        return 0;
    struct verdict verdict = decide(step);
    for (uint32_t i = 0; i < part->n_ranks; i++)
        finish_rank(part, part->ranks[i], &verdict);
    /* A step that never routed has nothing to count. */
    if (part->ranks[0] != 0 || (verdict.error.status && !verdict.record.status))
        return 1;
    if (step->counts)
        account_routed(step);
    else if (step->splits)
        account_local(step);
    return 1;
}
