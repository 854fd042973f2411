/* A step on its lanes: how it ends. When the reports of all lanes have come, every lane decides by itself, from
 * the same records, what the step came to, and tells its ranks. */
#include <assert.h>
#include <stdio.h>

#include "ep/clock.h"
#include "ep/rails.h"
#include "ep/step_impl.h"

static struct step_lane *step_lane_of_job(struct lane_job *job)
{
    return (struct step_lane *)((char *)job - offsetof(struct step_lane, job));
}

static const struct backend *backend_of(const struct step_lane *lane)
{
    return lane_backend(lane->team_lane->lane);
}

/* The verdict as this rank is told: its own words to the one that is to blame, the rank's name to the others.
 */
static struct epd_error told(const struct step *step, const struct step_verdict *verdict,
                             const struct plan *plan)
{
    struct epd_error error = verdict->error;
    if (verdict->record.status || verdict->rank < 0 || (int32_t)plan->rank == verdict->rank)
        return error;
    if (verdict->error.status == EPD_PROTOCOL)
        error_set(&error, EPD_PEER_LOST, "%s: rank %d %.180s", op_name(step->op), verdict->rank,
                  verdict->error.text);
    else
        error_set(&error, verdict->error.status, "rank %d: %.200s", verdict->rank, verdict->error.text);
    return error;
}

static void report_failure(const struct plan *plan, uint64_t seq, const struct epd_error *error,
                           const struct step_verdict *verdict)
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

static void finish_rank(struct step_lane *lane, uint32_t idx, const struct step_verdict *verdict)
{
    struct step *step = lane->step;
    struct rank_run run = step_rank_run(lane, idx);
    struct step_rank_result *result = &step->results[idx];
    const struct step_rank *rank = &step->ranks[idx];
    if (verdict->error.status) {
        struct epd_error error = told(step, verdict, run.plan);
        if (run.backend->works_later)
            moe_undo_step(&run, rank->generation);
        result->status = error.status;
        result->phase = verdict->phase;
        result->record = verdict->record;
        report_failure(run.plan, step->seqs[idx], &error, verdict);
    } else if (!run.backend->works_later) {
        moe_finish_step(&run);
    }
    /* With its device lost the launch has no end of its own: the worker ends, and the client, which then finds it
     * not completed, releases its stream. */
    if (!lane->lost)
        atomic_fetch_add(&run.plan->flag.page->plans[run.plan->flag.idx].completed, 1);
    result->end_ns = clock_now_ns();
    if (!run.backend->works_later)
        (void)!run.backend->flag_done(run.queue, &run.plan->flag, &(struct epd_error){0});
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

/* A token goes once to each rank that has one of its experts. Of what the ranks of other nodes send, this node knows what
 * goes to its own. */
static void count_sent(const struct step *step)
{
    const struct problem *problem = &step->team->problem;
    const uint32_t first = problem_first_rank(problem), n_here = problem->ranks_per_node;
    const int32_t *sent = step->sent;
    for (uint32_t i = 0; i < n_here; i++)
        for (uint32_t node = 0; node < problem->n_nodes; node++, sent += problem->world_size) {
            const uint32_t from = node * n_here + i;
            for (uint32_t to = 0; to < problem->world_size; to++) {
                if (to == from)
                    continue;
                if (node == problem->node)
                    step->traffic[from].sent_rows += sent[to];
                if (to >= first && to < first + n_here)
                    step->traffic[to].foreign_rows += sent[to];
            }
        }
}

/* After the flags: nobody waits for numbers. */
static void account_routed(struct step *step)
{
    const struct problem *problem = &step->team->problem;
    problem_count_traffic(problem, step->counts, step->traffic);
    count_sent(step);
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

/* What this node has met of a step whose swaps are in its streams: the other nodes hear of it by their end. */
static void break_rails(const struct step *step, const struct epd_error *why)
{
    if (step_reports(step))
        rails_abort(step->team->rails, why);
}

/* A client that is gone, or does not come, must not hold up the others: its flags are set for it. What the
 * step then computes is nobody's. */
static void release_absent(struct step_lane *lane)
{
    struct step *step = lane->step;
    struct epd_error ignored = {.status = EPD_OK};
    int late = clock_now_ns() - lane->begun_ns > PLAN_READY_NS;
    /* Not before the queue stands at these waits: an earlier launch of the same plan would take the flag. */
    if (!backend_of(lane)->queue_reached(lane->team_lane->queue, lane->before_ticket, &ignored))
        return;
    for (uint32_t i = 0; i < lane->n_ranks; i++) {
        struct plan *plan = step->plans[lane->ranks[i]];
        struct step_rank *rank = &step->ranks[lane->ranks[i]];
        int gone = atomic_load(&plan->dead);
        if (rank->released || (!late && !gone))
            continue;
        /* Written before the flag without which no lane's work of this step can end: all read it in decide.
         */
        rank->released = 1;
        rank->phase = EPD_PHASE_GATHER;
        error_set(&rank->error, gone ? EPD_PEER_LOST : EPD_TIMEOUT, "%s: the stream of rank %u %s",
                  op_name(step->op), plan->rank,
                  gone ? "ended before it reached the launch" : "did not reach the launch in 30 s");
        break_rails(step, &rank->error);
        atomic_store(&plan->flag.page->plans[plan->flag.idx].ready, 1);
    }
}

/* All clients have come, and the step does not end: a rank's kernel waits for one that never comes. */
static void end_dead(struct step_lane *lane)
{
    struct step_rank *rank = &lane->step->ranks[lane->ranks[0]];
    uint64_t now_ns = clock_now_ns();
    const int spans = step_reports(lane->step);
    if (!lane->running_ns)
        lane->running_ns = now_ns;
    if ((!lane->committed && !spans) || rank->error.status || now_ns - lane->running_ns < STEP_DEAD_NS)
        return;
    error_set(&rank->error, EPD_TIMEOUT, "%s: did not end in %llu s on the device", op_name(lane->step->op),
              STEP_DEAD_NS / 1000000000ull);
    if (spans)
        break_rails(lane->step, &rank->error);
    else
        step_break(lane);
}

/* Now and then, and at once when another lane has met an error or aborted them. */
static int is_time_for_rails(const struct step_lane *lane)
{
    struct team_lane *asking = lane->team_lane;
    const uint64_t now_ns = clock_now_ns();
    struct epd_error ignored;
    if (!asking->rails_seen_broken && rails_broken(lane->step->team->rails, &ignored))
        asking->rails_seen_broken = 1;
    else if (now_ns - asking->rails_asked_ns < STEP_RAILS_NS)
        return 0;
    asking->rails_asked_ns = now_ns;
    return 1;
}

/* A rail that has failed ends what its stream waits for; so must the others of this node. */
static void check_rails(const struct step_lane *lane)
{
    const struct step *step = lane->step;
    struct epd_error error = {.status = EPD_OK};
    if (!is_time_for_rails(lane))
        return;
    for (uint32_t i = 0; i < lane->n_ranks; i++)
        if (rails_check(step->team->rails, lane->ranks[i], &error)) {
            rails_abort(step->team->rails, &error);
            return;
        }
}

static void look_after(struct step_lane *lane)
{
    struct epd_error ignored = {.status = EPD_OK};
    if (step_reports(lane->step))
        check_rails(lane);
    if (backend_of(lane)->queue_reached(lane->team_lane->queue, lane->ready_ticket, &ignored))
        end_dead(lane);
    else
        release_absent(lane);
}

/* When the last step of a broken team has ended on this lane it has on all: nothing of the team runs anywhere,
 * and none of its steps begins before all lanes have been here. */
static enum epd_status repair_team(struct step_lane *lane, struct epd_error *error)
{
    struct team *team = lane->step->team;
    const struct problem *problem = &team->problem;
    if (lane->committed)
        lane->team_lane->n_committed--;
    if (!lane->committed || lane->team_lane->n_committed || !atomic_load(&team->broken))
        return EPD_OK;
    for (uint32_t i = 0; i < lane->n_ranks; i++) {
        struct rank_run run = step_rank_run(lane, lane->ranks[i]);
        struct exchange_shape shape = problem_shape(problem);
        shape.rank = run.plan->rank;
        if (run.plan->work.workspace &&
            run.backend->exchange_reset(run.queue, &shape, problem->hidden * dtype_bytes(problem->dtype),
                                        run.plan->work.workspace, error))
            return error->status; /* the team stays broken */
    }
    if (atomic_fetch_add(&team->n_reset, 1) + 1 == team->n_lanes) {
        atomic_store(&team->n_reset, 0);
        atomic_store(&team->broken, 0);
    }
    return EPD_OK;
}

/* It ran behind a step that was broken off, or it is that step. */
static void check_broken(const struct step_lane *lane, struct step_verdict *verdict)
{
    if (lane->committed && lane->n_breaks != atomic_load(&lane->step->team->n_breaks))
        error_set(&verdict->error, EPD_CUDA, "%s: the group's step before it could not be launched",
                  op_name(lane->step->op));
}

/* The routing that the step used may have turned out to be of a failed one; the same on every lane. */
static void check_used(struct step_lane *lane, struct step_verdict *verdict)
{
    struct step *step = lane->step;
    for (uint32_t i = 0; i < lane->n_ranks; i++) {
        struct rank_run run = step_rank_run(lane, lane->ranks[i]);
        if (moe_check_used(&run, step->ranks[lane->ranks[i]].generation, &verdict->error))
            return;
    }
}

/* Each lane hands over what its own ranks report; every lane decides from all of them. */
static int all_delivered(struct step_lane *lane)
{
    struct step *step = lane->step;
    if (!lane->delivered)
        atomic_fetch_add(&step->n_delivered, 1);
    lane->delivered = 1;
    return atomic_load(&step->n_delivered) == step->n_lanes;
}

/* Its clients have come, nothing that it waits for is left, and a kernel does not end: nothing behind it will run. */
static int is_stuck(const struct step_lane *part, struct epd_error *error)
{
    uint64_t limit_ns = part->step->team->node->step_lost_ns;
    if (!part->running_ns || clock_now_ns() - part->running_ns < limit_ns)
        return 0;
    (void)error_set(error, EPD_CUDA, "%s: a kernel has not ended in %.3g s: its device is given up",
                    op_name(part->step->op), (double)limit_ns / 1e9);
    return 1;
}

/* 1: what was put into the queue is done, or never will be: said before it is counted as delivered, so that no lane
 * takes the step for a good one. */
static int ended(struct step_lane *part, struct lane *lane)
{
    struct step_rank *rank = &part->step->ranks[part->ranks[0]];
    struct epd_error lost = {.status = EPD_OK};
    if (part->lost)
        return 1;
    if (!lane_backend(lane)->queue_reached(part->team_lane->queue, part->ticket, &lost)) {
        look_after(part);
        if (!is_stuck(part, &lost))
            return 0;
    }
    if (!lost.status)
        return 1;
    lost.status = EPD_CUDA;
    part->lost = 1;
    lane_lose_device(lane, &lost);
    rank->error = lost;
    rank->phase = EPD_PHASE_NONE;
    return 1;
}

/* A patient step that is not all submitted: what ends the waiting of one that is ends its waiting too. */
static int go_on(struct step_lane *part)
{
    struct epd_error lost = {.status = EPD_OK};
    if (part->place == STEP_SUBMITTED)
        return 1;
    if (part->place != STEP_QUEUED && !part->lost) {
        look_after(part);
        if (part->walk.told_ticket && !part->walk.learnt && is_stuck(part, &lost))
            step_lose_device(part, part->ranks[0], &lost);
    }
    return step_lane_go_on(part);
}

int step_lane_poll(struct lane_job *job, struct lane *lane)
{
    struct step_lane *part = step_lane_of_job(job);
    struct step *step = part->step;
    struct epd_error lost = {.status = EPD_OK};
    if (!go_on(part) || !ended(part, lane))
        return 0;
    if (lane_backend(lane)->works_later && !all_delivered(part))
        return 0;
    struct step_verdict verdict = step_decide(part);
    if (part->lost && !verdict.error.status)
        verdict = step_decide_here(step);
    if (!verdict.error.status)
        check_broken(part, &verdict);
    if (!verdict.error.status)
        check_used(part, &verdict);
    if (repair_team(part, &lost))
        verdict = (struct step_verdict){.error = lost, .rank = -1};
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
