/* A step on its lanes: what is submitted. Every lane: checks all its ranks, meets the others, runs the phases,
 * and has copied out what the kernels recorded. What follows is in step_end.c.
 *
 * Stage by stage the lanes meet where a phase's row says so. A lane that cannot go on writes why, aborts the
 * phases' barrier and goes to the last one. So lanes never part: each step ends on all of them, whatever
 * happens.
 *
 * Fused (ep/backend.h) they meet once: behind the waits for every rank's ready flag, so that no kernel runs,
 * and waits for others, before all clients are there. A lane that cannot go on before that aborts the meeting,
 * and nobody launches. From then on every launch is certain: a lane that fails all the same tells the kernels
 * of the others to leave, and the team's workspaces are reset when all is quiet (step_break, step_end.c).
 * Without a second meeting a lane may be at most one step ahead of another, as with it: it waits for it in
 * the next step. */
#include "ep/step_impl.h"

#include <assert.h>

#include "ep/clock.h"
#include "ep/rails.h"

static struct step_lane *step_lane_of_job(struct lane_job *job)
{
    return (struct step_lane *)((char *)job - offsetof(struct step_lane, job));
}

struct rank_run step_rank_run(const struct step_lane *lane, uint32_t idx)
{
    return (struct rank_run){
        .backend = lane_backend(lane->team_lane->lane),
        .queue = lane->team_lane->queue,
        .plan = lane->step->plans[idx],
        .peers = lane->step->plans,
        .n_tokens = lane->step->n_tokens[idx],
    };
}

/* Once lanes have committed themselves, one that has met must not take a later failure for a failed meeting. */
void step_fail_rank(struct step_lane *lane, uint32_t idx, const struct epd_error *error, enum epd_phase phase)
{
    struct step *step = lane->step;
    step->ranks[idx].error = *error;
    step->ranks[idx].phase = phase;
    if (step_spans(step)) {
        const struct rank_run run = step_rank_run(lane, idx);
        step->ranks[idx].followed = step->team->hop->only_followed(&run);
    }
    atomic_store(&step->failed, 1);
    if (!lane->committed)
        barrier_abort(&step->phases);
}

static const struct backend *backend_of(const struct step_lane *lane)
{
    return lane_backend(lane->team_lane->lane);
}

void step_break(struct step_lane *lane)
{
    struct step *step = lane->step;
    struct epd_error error = {.status = EPD_OK};
    void *workspaces[EPD_MAX_RANKS];
    for (uint32_t i = 0; i < step->n_ranks; i++)
        workspaces[i] = step->plans[i]->work.workspace;
    atomic_fetch_add(&step->team->n_breaks, 1);
    atomic_store(&step->team->broken, 1);
    if (workspaces[0] &&
        backend_of(lane)->exchange_abort(lane->team_lane->queue, workspaces, step->n_ranks, &error))
        step_fail_rank(lane, lane->ranks[0], &error, EPD_PHASE_NONE);
}

static enum epd_status check_team(struct step_lane *lane, struct epd_error *error)
{
    const struct step *step = lane->step;
    lane->n_breaks = atomic_load(&step->team->n_breaks);
    if (op_is_collective(step->op) && atomic_load(&step->team->broken))
        return error_set(error, EPD_BUSY, "%s: the group recovers from a step that could not be launched",
                         op_name(step->op));
    return EPD_OK;
}

/* All ready flags are looked at, and so consumed, before anything starts. */
static void check_ranks(struct step_lane *lane)
{
    lane->begun_ns = clock_now_ns();
    for (uint32_t i = 0; i < lane->n_ranks; i++) {
        struct rank_run run = step_rank_run(lane, lane->ranks[i]);
        struct epd_error error = {.status = EPD_OK};
        if (run.backend->flag_ready(run.queue, &run.plan->flag, &lane->ready_ticket, &error) ||
            check_team(lane, &error) || moe_check_step(&run, &error))
            step_fail_rank(lane, lane->ranks[i], &error, EPD_PHASE_GATHER);
        if (i == 0 && lane->ready_ticket)
            lane->before_ticket = lane->ready_ticket - 1; /* a queue's tickets are numbers in a row */
    }
}

/* The queue did not take what must not be missing in it. */
void step_lose_device(struct step_lane *lane, uint32_t idx, struct epd_error *error)
{
    error->status = EPD_CUDA;
    lane->lost = 1;
    lane_lose_device(lane->team_lane->lane, error);
    step_fail_rank(lane, idx, error, EPD_PHASE_NONE);
}

/* Right behind the kernels: what follows is only to know how the step went. */
static void set_done(struct step_lane *lane)
{
    for (uint32_t i = 0; i < lane->n_ranks; i++) {
        struct rank_run run = step_rank_run(lane, lane->ranks[i]);
        struct epd_error error = {.status = EPD_OK};
        if (run.backend->flag_done(run.queue, &run.plan->flag, &error))
            step_lose_device(lane, lane->ranks[i], &error);
    }
}

/* Of the routing used: counts, by the lane of position 0, and by every lane what its ranks' tokens cost. */
static enum epd_status copy_routing(const struct step *step, uint32_t idx, const struct rank_run *run,
                                    struct epd_error *error)
{
    const struct problem *problem = &step->team->problem;
    const struct routing_context *routing = &plan_router(run->plan)->routing;
    int32_t *sent = step->sent + (run->plan->rank - problem_first_rank(problem)) * routing_n_sent(problem);
    if (idx == 0 && run->backend->copy_out(
                        run->queue, step->counts, routing->routing.counts,
                        (uint64_t)problem->world_size * problem->n_experts * sizeof *step->counts, 0, error))
        return error->status;
    if (routing->slots.sent)
        return run->backend->copy_out(run->queue, sent, routing->slots.sent,
                                      routing_n_sent(problem) * sizeof *sent, 0, error);
    routing_count_sent(routing, problem, run->n_tokens, sent);
    return EPD_OK;
}

/* The rails break, and with them the group on all nodes: they may have this one's report already, and it says that all is
 * well. */
void step_fail_report(struct step_lane *lane, uint32_t idx, const struct epd_error *error)
{
    if (!lane->step->ranks[idx].error.status) /* else that is why */
        step_fail_rank(lane, idx, error, EPD_PHASE_NONE);
    if (step_reports(lane->step))
        rails_abort(lane->step->team->rails, error);
}

/* What the kernels recorded, which the next step finds zeroed, and what was counted. */
static void copy_reports(struct step_lane *lane, int with_counts)
{
    struct step *step = lane->step;
    for (uint32_t i = 0; i < lane->n_ranks; i++) {
        uint32_t idx = lane->ranks[i];
        struct rank_run run = step_rank_run(lane, idx);
        struct epd_error error = {.status = EPD_OK};
        if (run.plan->records && run.backend->copy_out(run.queue, step->ranks[idx].records, run.plan->records,
                                                       sizeof step->ranks[idx].records, 1, &error))
            step_fail_report(lane, idx, &error);
        if (step->counts && with_counts && copy_routing(step, idx, &run, &error))
            step_fail_report(lane, idx, &error);
        if (step->splits &&
            run.backend->copy_out(run.queue, step->splits, run.plan->splits,
                                  (uint64_t)run.plan->bindings.dims[DIM_GROUPS] * sizeof *step->splits, 0,
                                  &error))
            step_fail_report(lane, idx, &error);
    }
}

/* Where work goes on later, the next step may be submitted before this one has ended: it takes for granted
 * that this one goes well, and is told in the end if it did not (moe_check_used). */
static void finish_submission(struct step_lane *lane)
{
    for (uint32_t i = 0; i < lane->n_ranks; i++) {
        struct rank_run run = step_rank_run(lane, lane->ranks[i]);
        const struct plan *router = plan_router(run.plan);
        lane->step->ranks[lane->ranks[i]].generation = router ? router->generation : 0;
        if (!atomic_load(&lane->step->failed))
            moe_finish_step(&run);
    }
}

/* What the rank's rail has moved so far: to and from other nodes. */
static uint64_t moved_bytes(const struct rank_run *run)
{
    const struct team *team = run->plan->team;
    return rails_moved_bytes(team->rails, run->plan->rank % team->problem.ranks_per_node);
}

static void list_runs(const struct step_lane *part, struct rank_run *runs)
{
    for (uint32_t i = 0; i < part->n_ranks; i++)
        runs[i] = step_rank_run(part, part->ranks[i]);
}

static void begin(struct step_lane *part)
{
    struct rank_run runs[EPD_MAX_WORLD_SIZE];
    list_runs(part, runs);
    for (uint32_t i = 0; i < part->n_ranks && step_spans(part->step); i++)
        part->step->results[part->ranks[i]].network_bytes = moved_bytes(&runs[i]); /* before it */
    if (step_spans(part->step))
        part->step->team->hop->begin(runs, part->n_ranks, part->step->number);
    check_ranks(part);
    part->place = STEP_RUNNING;
}

/* All swaps are taken from here on, whatever has become of the step. */
static void leave_phases(struct step_lane *part, int ran)
{
    const struct hop_form *hop = part->step->team->hop;
    struct rank_run runs[EPD_MAX_WORLD_SIZE];
    list_runs(part, runs);
    part->ran = ran;
    part->place = STEP_LEAVING;
    if (!step_spans(part->step))
        return;
    if (hop->drain)
        hop->drain(runs, part->n_ranks);
    if (ran || !hop->turn_off)
        return;
    hop->turn_off(runs, part->n_ranks);
    step_walk_begin_off(part);
    part->place = STEP_OFF;
}

/* Behind all kernels and swaps. */
static void settle(struct step_lane *part)
{
    if (!part->ran && part->committed)
        step_break(part);
    if (backend_of(part)->works_later)
        set_done(part);
    if (step_reports(part->step))
        step_report(part);
    copy_reports(part, part->ran);
    part->settled = 1;
}

static void finish(struct step_lane *part)
{
    const struct backend *backend = backend_of(part);
    struct epd_error error = {.status = EPD_OK};
    if (step_spans(part->step) && !step_reports(part->step))
        step_agree(part);
    for (uint32_t i = 0; i < part->n_ranks && step_spans(part->step); i++) {
        const struct rank_run run = step_rank_run(part, part->ranks[i]);
        struct step_rank_result *result = &part->step->results[part->ranks[i]];
        result->network_bytes = moved_bytes(&run) - result->network_bytes;
    }
    if (backend->works_later)
        finish_submission(part);
    if (backend->queue_ticket(part->team_lane->queue, &part->ticket, &error))
        step_lose_device(part, part->ranks[0], &error);
    part->place = STEP_SUBMITTED;
    team_lane_pass(part->team_lane);
}

int step_lane_go_on(struct step_lane *part)
{
    enum step_pace pace;
    if (part->place == STEP_QUEUED && team_lane_has_turn(part->team_lane, part->turn))
        begin(part);
    if (part->place == STEP_RUNNING && (pace = step_walk_phases(part)) != STEP_LATER)
        leave_phases(part, pace == STEP_DONE);
    if (part->place == STEP_OFF && step_walk_off(part) != STEP_LATER)
        part->place = STEP_LEAVING;
    if (part->place == STEP_LEAVING && !part->settled)
        settle(part);
    if (part->place != STEP_LEAVING)
        return part->place == STEP_SUBMITTED;
    if (part->committed)
        part->team_lane->n_committed++;
    else if (step_meet(part, &part->step->last) == STEP_LATER)
        return 0;
    finish(part);
    return 1;
}

void step_lane_run(struct lane_job *job, struct lane *lane)
{
    struct step_lane *part = step_lane_of_job(job);
    (void)lane;
    part->turn = team_lane_take_turn(part->team_lane);
    const int submitted = step_lane_go_on(part);
    assert(submitted || part->step->patient);
    (void)submitted;
}
