#include "ep/step_impl.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

static struct step_lane *step_lane_of_job(struct lane_job *job)
{
    return (struct step_lane *)((char *)job - offsetof(struct step_lane, job));
}

static void step_free(struct step *step)
{
    free(step->plans);
    free(step->n_tokens);
    free(step->seqs);
    free(step->ranks);
    free(step->results);
    free(step->counts);
    free(step->splits);
    free(step->expert_rows);
    free(step->traffic);
    free(step->sent);
    free(step->reports);
    free(step);
}

void plan_set_free(struct plan_set *set)
{
    assert(set->n_steps == 0);
    while (set->free_steps) {
        struct step *step = set->free_steps;
        set->free_steps = step->next_free;
        step_free(step);
    }
    free(set->plans);
    free(set->links);
    free(set);
}

/* What the step reports of its routing, or of its splits. */
static int step_alloc_reports(struct step *step, struct plan *plan)
{
    const struct problem *problem = &step->team->problem;
    if (plan_router(plan)) {
        step->counts = calloc((size_t)problem->world_size * problem->n_experts, sizeof *step->counts);
        step->expert_rows = calloc(problem->n_experts, sizeof *step->expert_rows);
        step->traffic = calloc(problem->world_size, sizeof *step->traffic);
        step->sent = calloc(problem->ranks_per_node * routing_n_sent(problem), sizeof *step->sent);
        return step->counts && step->expert_rows && step->traffic && step->sent;
    }
    if (plan->splits) {
        step->splits = calloc((size_t)plan->bindings.dims[DIM_GROUPS], sizeof *step->splits);
        return step->splits != NULL;
    }
    return 1;
}

static int step_alloc_hops(struct step *step)
{
    if (!step_reports(step))
        return 1;
    step->reports = calloc((size_t)step->n_ranks * step->team->problem.n_nodes, sizeof *step->reports);
    return step->reports != NULL;
}

static void step_set_lanes(struct step *step, const struct plan *first)
{
    struct team *team = step->team;
    int collective = op_is_collective(step->op);
    step->n_lanes = collective ? team->n_lanes : 1;
    for (uint32_t i = 0; i < step->n_lanes; i++) {
        struct step_lane *lane = &step->lanes[i];
        lane->step = step;
        lane->team_lane = collective ? &team->lanes[i] : &team->lanes[team->ranks[first->rank].lane_idx];
        lane->n_ranks = collective ? lane->team_lane->n_ranks : 1;
        lane->ranks = collective ? lane->team_lane->ranks : &step->zero;
    }
}

static struct step *step_alloc(struct plan_set *set)
{
    uint32_t n = set->n_plans;
    const uint32_t n_lanes = op_is_collective(set->op) ? set->team->n_lanes : 1;
    struct step *step = calloc(1, sizeof *step + n_lanes * sizeof *step->lanes);
    if (!step)
        return NULL;
    step->set = set;
    step->team = set->team;
    step->op = set->op;
    step->n_ranks = n;
    step->plans = calloc(n, sizeof(struct plan *));
    step->n_tokens = calloc(n, sizeof *step->n_tokens);
    step->seqs = calloc(n, sizeof *step->seqs);
    step->ranks = calloc(n, sizeof *step->ranks);
    step->results = calloc(n, sizeof *step->results);
    if (!step->plans || !step->n_tokens || !step->seqs || !step->ranks || !step->results ||
        !step_alloc_reports(step, set->plans[0]) || !step_alloc_hops(step)) {
        step_free(step);
        return NULL;
    }
    step_set_lanes(step, set->plans[0]);
    return step;
}

/* Steps of a set are made when as many are in flight as never before, and then used again. */
static struct step *step_take(struct plan_set *set)
{
    struct step *step = set->free_steps;
    if (!step)
        return step_alloc(set);
    set->free_steps = step->next_free;
    return step;
}

static void step_give_back(struct step *step)
{
    struct plan_set *set = step->set;
    step->next_free = set->free_steps;
    set->free_steps = step;
    set->n_steps--;
    if (!set->destroyed || set->n_steps)
        return;
    set->destroyed = 0; /* plan_set_destroy was called and had to wait for this step */
    plan_set_destroy(set);
}

static void step_complete(struct step *step)
{
    const struct step_result result = {
        .n_ranks = step->n_ranks,
        .ranks = step->results,
        .expert_rows = plan_routes(step->plans[0]) ? step->expert_rows : NULL,
        .n_experts = step->team->problem.n_experts,
    };
    step->callback(step->callback_arg, &result);
    /* The set first: it looks at its plans, which may end with their last user. */
    struct plan *plans[EPD_MAX_WORLD_SIZE];
    uint32_t n = step->n_ranks;
    memcpy(plans, step->plans, n * sizeof *plans);
    step_give_back(step);
    for (uint32_t i = 0; i < n; i++)
        plan_let_go(plans[i]);
}

static void step_complete_lane(struct lane_job *job)
{
    struct step *step = step_lane_of_job(job)->step;
    if (--step->n_lanes_left == 0)
        step_complete(step);
}

static enum epd_status step_check(const struct plan_set *set, const uint32_t *n_tokens,
                                  struct epd_error *error)
{
    const char *op = op_name(set->op);
    for (uint32_t i = 0; i < set->n_plans; i++) {
        const struct plan *plan = set->plans[i];
        if (!plan || plan->dead)
            return error_set(error, EPD_UNKNOWN_ID, "%s: the plan of rank %u was destroyed", op, i);
        if (plan->max_tokens != UINT32_MAX && n_tokens[i] > plan->max_tokens)
            return error_set(error, EPD_INVALID_SHAPE,
                             "%s: n_tokens %u of rank %u, want at most %u (T of its plan)", op, n_tokens[i],
                             plan->rank, plan->max_tokens);
    }
    return EPD_OK;
}

enum epd_status step_submit(struct plan_set *set, const uint32_t *n_tokens, const uint64_t *seq,
                            step_callback callback, void *arg, struct epd_error *error)
{
    if (step_check(set, n_tokens, error))
        return error->status;
    struct step *step = step_take(set);
    if (!step)
        return error_set(error, EPD_NO_MEMORY, "%s: no memory for the step", op_name(set->op));
    for (uint32_t i = 0; i < step->n_lanes; i++) {
        if (lane_has_room(step->lanes[i].team_lane->lane))
            continue;
        step->next_free = set->free_steps;
        set->free_steps = step;
        return error_set(error, EPD_BUSY, "%s: too many jobs are waiting for the device", op_name(set->op));
    }
    for (uint32_t i = 0; i < step->n_ranks; i++) {
        step->plans[i] = set->plans[i];
        step->plans[i]->n_users++;
        step->n_tokens[i] = n_tokens[i];
        step->seqs[i] = seq[i];
        step->ranks[i] = (struct step_rank){.error = {.status = EPD_OK}};
        step->results[i] = (struct step_rank_result){.status = EPD_OK};
    }
    set->n_steps++;
    step->number = op_is_collective(step->op) ? ++step->team->n_joint_steps : 0;
    step->patient = step->team->patient;
    step->callback = callback;
    step->callback_arg = arg;
    step->n_lanes_left = step->n_lanes;
    atomic_store(&step->n_delivered, 0);
    atomic_store(&step->failed, 0);
    barrier_init(&step->phases, step->n_lanes);
    barrier_init(&step->last, step->n_lanes);
    /* All lanes in one go: see "Order" in node.h. */
    for (uint32_t i = 0; i < step->n_lanes; i++) {
        step->lanes[i].job =
            (struct lane_job){.run = step_lane_run, .poll = step_lane_poll, .complete = step_complete_lane};
        step->lanes[i].n_barriers = 0;
        step->lanes[i].place = STEP_QUEUED;
        step->lanes[i].walk = (struct step_walk){0};
        step->lanes[i].ran = step->lanes[i].settled = 0;
        step->lanes[i].delivered = 0;
        step->lanes[i].lost = 0;
        step->lanes[i].committed = 0;
        step->lanes[i].running_ns = 0;
        /* Reached, until the queue gives others. */
        step->lanes[i].before_ticket = step->lanes[i].ready_ticket = step->lanes[i].ticket = 0;
        lane_submit(step->lanes[i].team_lane->lane, &step->lanes[i].job);
    }
    return EPD_OK;
}
