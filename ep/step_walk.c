/* A step through its phases, on one lane. What waits is a place to come back to, so that a patient step can give the lane to
 * other jobs there; the walk of any other step is over when the call returns.
 *
 * A step that is off walks once more, through its exchanges alone: what it has not swapped yet is swapped, in the order in
 * which the lanes of other nodes do so. */
#include <assert.h>

#include "ep/clock.h"
#include "ep/rails.h"
#include "ep/step_impl.h"

static const struct backend *backend_of(const struct step_lane *lane)
{
    return lane_backend(lane->team_lane->lane);
}

static int is_fused(const struct step_lane *lane)
{
    return lane->step->team->fused && op_is_collective(lane->step->op);
}

/* ---- meetings ---- */

/* Queues wait for each other's marks. */
static enum step_pace join_queues(struct step_lane *lane, uint32_t barrier_idx)
{
    struct step *step = lane->step;
    struct epd_error error = {.status = EPD_OK};
    for (uint32_t i = 0; i < step->n_lanes; i++) {
        struct team_lane *other = step->lanes[i].team_lane;
        if (other == lane->team_lane ||
            !backend_of(lane)->queue_join(lane->team_lane->queue, other->queue, barrier_idx, &error))
            continue;
        step_fail_rank(lane, lane->ranks[0], &error, EPD_PHASE_NONE);
        return STEP_FAILED;
    }
    return STEP_DONE;
}

static uint32_t barrier_idx_of(const struct step_lane *lane)
{
    return (uint32_t)(lane->step->number % STEP_BARRIER_SETS) * STEP_MAX_BARRIERS + lane->n_barriers;
}

static void mark_queue(struct step_lane *lane)
{
    struct epd_error error = {.status = EPD_OK};
    assert(lane->n_barriers < STEP_MAX_BARRIERS);
    if (lane->step->n_lanes > 1 &&
        backend_of(lane)->queue_mark(lane->team_lane->queue, barrier_idx_of(lane), &error))
        step_fail_rank(lane, lane->ranks[0], &error, EPD_PHASE_NONE);
}

/* How long a lane looks for what is about to come if nothing holds it up, before it gives way to other jobs: the other lanes,
 * when it has arrived in a barrier. */
#define LOOK_NS 100000ull

/* The lane goes on with other jobs, and its tickets say whether the device is idle: one is put behind what the step has put
 * there. Before the first meeting that is nothing but waits, each with its own. */
static int give_way(struct step_lane *lane)
{
    struct epd_error error = {.status = EPD_OK};
    uint64_t ticket;
    if (lane->n_barriers == 0 || lane->lost ||
        !backend_of(lane)->queue_ticket(lane->team_lane->queue, &ticket, &error))
        return 1;
    step_lose_device(lane, lane->ranks[0], &error);
    return 0;
}

/* Arrives where it has not, and looks. */
static enum step_pace look(struct step_lane *lane, struct barrier *barrier)
{
    struct step_walk *walk = &lane->walk;
    const int arrives = !walk->arrived;
    uint64_t until_ns = 0;
    if (arrives) {
        mark_queue(lane);
        walk->arrived_at = barrier_arrive(barrier);
        walk->arrived = 1;
        until_ns = clock_now_ns() + LOOK_NS;
    }
    enum barrier_seen seen = barrier_look(barrier, walk->arrived_at);
    while (seen == BARRIER_NOT_YET && clock_now_ns() < until_ns)
        seen = barrier_look(barrier, walk->arrived_at);
    if (seen == BARRIER_NOT_YET && (!arrives || give_way(lane)))
        return STEP_LATER;
    walk->arrived = 0;
    return seen == BARRIER_PASSED ? STEP_DONE : STEP_FAILED;
}

static enum step_pace await(struct step_lane *lane, struct barrier *barrier)
{
    mark_queue(lane);
    return barrier_wait(barrier) ? STEP_DONE : STEP_FAILED;
}

enum step_pace step_meet(struct step_lane *lane, struct barrier *barrier)
{
    const enum step_pace pace = lane->step->patient ? look(lane, barrier) : await(lane, barrier);
    if (pace == STEP_LATER)
        return pace;
    const uint32_t barrier_idx = barrier_idx_of(lane);
    lane->n_barriers++;
    if (pace == STEP_FAILED)
        return pace;
    if (barrier == &lane->step->phases && is_fused(lane))
        lane->committed = 1;
    return join_queues(lane, barrier_idx);
}

/* ---- what crosses ---- */

static int learns(const struct step_lane *lane, const struct phase *phase)
{
    const struct hop_form *hop = lane->step->team->hop;
    return phase->n_exchanges && step_spans(lane->step) && hop->learns &&
           hop->learns(lane->step->plans[lane->ranks[0]], phase->exchange);
}

/* The counts have been copied out. */
static enum step_pace learn(struct step_lane *lane)
{
    struct epd_error error = {.status = EPD_OK};
    for (uint32_t i = 0; i < lane->n_ranks; i++) {
        const struct rank_run run = step_rank_run(lane, lane->ranks[i]);
        if (!lane->step->team->hop->learn(&run, &error))
            continue;
        step_fail_rank(lane, lane->ranks[i], &error, EPD_PHASE_ROUTE);
        return STEP_FAILED;
    }
    lane->walk.learnt = 1;
    return STEP_DONE;
}

/* When its clients have come, what they told is about to come too: once, a lane looks for it without a pause. */
static int is_told(struct step_lane *lane, struct epd_error *error)
{
    struct step_walk *walk = &lane->walk;
    const struct backend *backend = backend_of(lane);
    struct backend_queue *queue = lane->team_lane->queue;
    struct epd_error ignored = {.status = EPD_OK};
    int told = backend->queue_reached(queue, walk->told_ticket, error);
    if (told || walk->looked || !backend->queue_reached(queue, lane->ready_ticket, &ignored))
        return told;
    walk->looked = 1;
    for (const uint64_t until_ns = clock_now_ns() + LOOK_NS; !told && clock_now_ns() < until_ns;)
        told = backend->queue_reached(queue, walk->told_ticket, error);
    return told;
}

/* Behind the stage that tells them, on all ranks of the lane. */
static enum step_pace await_counts(struct step_lane *lane)
{
    struct step_walk *walk = &lane->walk;
    struct backend_queue *queue = lane->team_lane->queue;
    struct epd_error error = {.status = EPD_OK};
    if (walk->learnt)
        return STEP_DONE;
    if (lane->lost)
        return STEP_FAILED;
    if (!walk->told_ticket && backend_of(lane)->queue_ticket(queue, &walk->told_ticket, &error)) {
        step_lose_device(lane, lane->ranks[0], &error);
        return STEP_FAILED;
    }
    if (!is_told(lane, &error))
        return STEP_LATER;
    if (!error.status)
        return learn(lane);
    step_lose_device(lane, lane->ranks[0], &error);
    return STEP_FAILED;
}

/* ---- phases ---- */

/* What routing costs by itself. */
static enum epd_phase stage_phase(const struct phase *phase, uint32_t stage, uint32_t n_stages)
{
    int routes = phase->n_exchanges && phase->exchange == EXCHANGE_ROUTE_DISPATCH && n_stages > 1;
    return routes && stage == 0 ? EPD_PHASE_ROUTE : phase->phase;
}

static enum step_pace run_phase(struct step_lane *lane, const struct phase *phase, uint32_t stage,
                                enum epd_phase name)
{
    struct step *step = lane->step;
    for (uint32_t i = 0; i < lane->n_ranks; i++) {
        uint32_t idx = lane->ranks[i];
        struct rank_run run = step_rank_run(lane, idx);
        run.stage = stage;
        struct epd_error error = {.status = EPD_OK};
        uint64_t begin_ns = clock_now_ns();
        if (phase->run(&run, &error)) {
            step_fail_rank(lane, idx, &error, name);
            return STEP_FAILED;
        }
        step->results[idx].phase_ns[name] += clock_now_ns() - begin_ns;
    }
    return STEP_DONE;
}

static uint32_t n_stages_of(const struct step_lane *lane, const struct phase *phase)
{
    if (!phase->n_exchanges || is_fused(lane))
        return 1;
    return backend_of(lane)->n_stages[phase->exchange] + (learns(lane, phase) ? 1u : 0u);
}

/* Whether the lanes meet before this stage; they always do before the first phase. */
static int meets_before(const struct step_lane *lane, const struct phase *phase, uint32_t stage)
{
    if (is_fused(lane) || (stage == 1 && learns(lane, phase)))
        return 0;
    if (stage > 0)
        return 1;
    return backend_of(lane)->exchange_takes_turns ? phase->n_exchanges : phase->after_barrier;
}

/* Waits, if it has to, for the others and for what crosses. */
static enum step_pace before_stage(struct step_lane *lane, const struct phase *phase)
{
    struct step_walk *walk = &lane->walk;
    if (!walk->met && meets_before(lane, phase, walk->stage)) {
        const enum step_pace pace = step_meet(lane, &lane->step->phases);
        if (pace != STEP_DONE)
            return pace;
    }
    walk->met = 1;
    return walk->stage == 1 && learns(lane, phase) ? await_counts(lane) : STEP_DONE;
}

static enum step_pace run_graph(struct step_lane *lane)
{
    struct epd_error error = {.status = EPD_OK};
    uint64_t begin_ns = clock_now_ns();
    if (step_replay(lane, &error)) {
        step_fail_rank(lane, lane->ranks[0], &error, EPD_PHASE_NONE);
        return STEP_FAILED;
    }
    enum epd_phase name = moe_pipeline(lane->step->op)->phases[0].phase;
    lane->step->results[lane->ranks[0]].phase_ns[name] += clock_now_ns() - begin_ns;
    return STEP_DONE;
}

/* Where work is done at once, to come to the last barrier is enough of a barrier. */
static enum step_pace begin_phases(struct step_lane *lane)
{
    const struct pipeline *pipeline = moe_pipeline(lane->step->op);
    if (pipeline->n_phases || backend_of(lane)->works_later) {
        const enum step_pace pace = step_meet(lane, &lane->step->phases);
        if (pace != STEP_DONE)
            return pace;
    }
    for (uint32_t i = 0; i < lane->n_ranks; i++) {
        const struct rank_run run = step_rank_run(lane, lane->ranks[i]);
        moe_begin_step(&run);
    }
    lane->walk.begun = lane->walk.met = 1;
    return STEP_DONE;
}

/* The stages of one phase that are left. */
static enum step_pace run_stages(struct step_lane *lane, const struct phase *phase)
{
    struct step_walk *walk = &lane->walk;
    const uint32_t n_stages = n_stages_of(lane, phase);
    for (; walk->stage < n_stages; walk->stage++, walk->met = 0) {
        enum step_pace pace = before_stage(lane, phase);
        if (pace == STEP_DONE)
            pace = run_phase(lane, phase, walk->stage, stage_phase(phase, walk->stage, n_stages));
        if (pace != STEP_DONE)
            return pace;
    }
    return STEP_DONE;
}

enum step_pace step_walk_phases(struct step_lane *lane)
{
    const struct pipeline *pipeline = moe_pipeline(lane->step->op);
    struct step_walk *walk = &lane->walk;
    if (!walk->begun) {
        const enum step_pace pace = begin_phases(lane);
        if (pace != STEP_DONE)
            return pace;
        if (step_is_recorded(lane) || step_record(lane))
            return run_graph(lane);
    }
    for (; walk->phase_idx < pipeline->n_phases; walk->phase_idx++, walk->stage = 0) {
        const enum step_pace pace = run_stages(lane, &pipeline->phases[walk->phase_idx]);
        if (pace != STEP_DONE)
            return pace;
    }
    step_note_run(lane);
    return STEP_DONE;
}

/* ---- a step that is off ---- */

void step_walk_begin_off(struct step_lane *lane)
{
    lane->walk.phase_idx = lane->walk.stage = 0;
}

/* What fails now has failed before, or breaks the rails, which all will hear of. */
static enum step_pace run_stages_off(struct step_lane *lane, const struct phase *phase)
{
    struct step_walk *walk = &lane->walk;
    const uint32_t n_stages = n_stages_of(lane, phase);
    for (; walk->stage < n_stages; walk->stage++) {
        if (walk->stage == 1 && learns(lane, phase) && await_counts(lane) == STEP_LATER)
            return STEP_LATER;
        for (uint32_t i = 0; i < lane->n_ranks; i++) {
            struct rank_run run = step_rank_run(lane, lane->ranks[i]);
            struct epd_error ignored = {.status = EPD_OK};
            run.stage = walk->stage;
            (void)phase->run(&run, &ignored);
        }
    }
    return STEP_DONE;
}

enum step_pace step_walk_off(struct step_lane *lane)
{
    const struct pipeline *pipeline = moe_pipeline(lane->step->op);
    struct step_walk *walk = &lane->walk;
    for (; walk->phase_idx < pipeline->n_phases; walk->phase_idx++, walk->stage = 0) {
        const struct phase *phase = &pipeline->phases[walk->phase_idx];
        if (phase->n_exchanges && run_stages_off(lane, phase) == STEP_LATER)
            return STEP_LATER;
    }
    return STEP_DONE;
}
