/* Whole plans as graphs of the device. In the fused form the phases of a step are launches on one queue that read
 * counts and splits on the device: the same launches whatever is routed. What is baked in is the number of tokens. So a
 * plan that runs twice with the same number is recorded in its second step and replayed from then on; a step with
 * another number is submitted launch by launch, and one more like it is recorded in its place. moe_forward and
 * moe_backward only; off unless [cuda] graphs = 1, for it gained nothing that could be measured (tests/bench/NOTES.md). */
#include "ep/step_impl.h"

static struct plan *plan_of(const struct step_lane *lane)
{
    return lane->step->plans[lane->ranks[0]];
}

static uint32_t n_tokens_of(const struct step_lane *lane)
{
    return lane->step->n_tokens[lane->ranks[0]];
}

static enum epd_status run_all(const struct rank_run *run, struct epd_error *error)
{
    const struct pipeline *pipeline = moe_pipeline(run->plan->op);
    for (uint32_t i = 0; i < pipeline->n_phases; i++)
        if (pipeline->phases[i].run(run, error))
            return error->status;
    return EPD_OK;
}

/* Nothing runs meanwhile: what cannot be recorded is submitted launch by launch instead. */
static enum epd_status record(const struct rank_run *run, struct epd_error *error)
{
    struct plan *plan = run->plan;
    struct epd_error ignored = {.status = EPD_OK};
    struct backend_graph *graph = NULL;
    if (run->backend->graph_begin(run->queue, error))
        return error->status;
    if (run_all(run, error)) {
        (void)!run->backend->graph_end(run->queue, NULL, &ignored);
        return error->status;
    }
    if (run->backend->graph_end(run->queue, &graph, error))
        return error->status;
    if (plan->graph)
        run->backend->graph_destroy(lane_device(plan->lane), plan->graph);
    plan->graph = graph;
    plan->graph_tokens = run->n_tokens;
    plan->last_tokens = 0;
    return EPD_OK;
}

static int may_replay(const struct step_lane *lane)
{
    const struct plan *plan = plan_of(lane);
    return lane->committed && plan->recordable && plan->team->node->replays;
}

int step_is_recorded(const struct step_lane *lane)
{
    const struct plan *plan = plan_of(lane);
    return may_replay(lane) && plan->graph && plan->graph_tokens == n_tokens_of(lane);
}

/* Any lane; the first one says why. */
static void note_unrecorded(struct team *team, const struct epd_error *why)
{
    if (atomic_fetch_add(&team->n_unrecorded, 1))
        return;
    team->unrecorded = *why;
    atomic_store(&team->unrecorded_told, 1);
}

int step_record(const struct step_lane *lane)
{
    struct plan *plan = plan_of(lane);
    struct epd_error error = {.status = EPD_OK};
    if (!may_replay(lane) || plan->last_tokens != n_tokens_of(lane) + 1)
        return 0;
    const struct rank_run run = step_rank_run(lane, lane->ranks[0]);
    if (record(&run, &error) == EPD_OK)
        return 1;
    plan->recordable = 0;
    note_unrecorded(plan->team, &error);
    return 0;
}

enum epd_status step_replay(struct step_lane *lane, struct epd_error *error)
{
    const struct rank_run run = step_rank_run(lane, lane->ranks[0]);
    return run.backend->graph_launch(run.queue, run.plan->graph, error);
}

void step_note_run(struct step_lane *lane)
{
    if (lane->committed)
        plan_of(lane)->last_tokens = n_tokens_of(lane) + 1;
}
