#include "ep/plan_impl.h"

#include <assert.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "ep/clock.h"
#include "ep/memory_impl.h"
#include "ep/plan_check.h"

static struct plan *plan_of_job(struct lane_job *job)
{
    return (struct plan *)((char *)job - offsetof(struct plan, job));
}

/* Host side only; what the lane made has been undone. */
static void plan_free(struct plan *plan)
{
    struct plan *context = plan->context;
    binding_fini(&plan->bindings);
    plan->team->n_plans--;
    free(plan);
    if (context)
        plan_let_go(context);
}

/* Lane thread. */
static void plan_run_create(struct lane_job *job, struct lane *lane)
{
    struct plan *plan = plan_of_job(job);
    (void)lane;
    plan->create_error.status = EPD_OK;
    (void)!prepare_plan(plan, &plan->create_error);
}

static void plan_complete_create(struct lane_job *job)
{
    struct plan *plan = plan_of_job(job);
    struct epd_error error = plan->create_error;
    plan_callback callback = plan->callback;
    void *arg = plan->callback_arg;
    if (error.status) {
        plan_free(plan);
        plan = NULL;
    }
    callback(arg, plan, &error);
}

/* Lane thread. */
static void plan_run_end(struct lane_job *job, struct lane *lane)
{
    (void)lane;
    prepare_undo(plan_of_job(job));
}

static void plan_complete_end(struct lane_job *job)
{
    struct plan *plan = plan_of_job(job);
    void (*gone)(void *) = plan->gone;
    void *arg = plan->gone_arg;
    plan_free(plan);
    if (gone)
        gone(arg);
}

/* In one word for all ranks, whether they named it or not. */
static enum epd_crossing resolve_crossing(const struct team *team, const struct plan_request *request)
{
    if (!plan_check_crosses(request->op))
        return EPD_CROSSING_UNSPECIFIED;
    if (request->crossing)
        return request->crossing;
    if (request->context)
        return request->context->crossing;
    return team->node->backend->works_later ? EPD_CROSSING_STATIC : EPD_CROSSING_EAGER;
}

static struct plan *plan_init(struct team *team, const struct plan_request *request)
{
    struct plan *plan = calloc(1, sizeof *plan);
    if (!plan)
        return NULL;
    plan->team = team;
    plan->lane = team->lanes[team->ranks[request->rank].lane_idx].lane;
    plan->rank = request->rank;
    plan->op = request->op;
    plan->layout = request->layout;
    plan->activation = request->activation;
    plan->saved = request->saved;
    plan->accumulate = request->accumulate != 0;
    plan->delay_wgrad = request->delay_wgrad != 0;
    plan->crossing = resolve_crossing(team, request);
    plan->context = request->context;
    plan->flag = (struct backend_flag){.page = request->page, .idx = request->flag_idx};
    plan->public_id = request->public_id;
    plan->control.fd = plan->kept.block.fd = -1;
    /* The same function forward and backward, whether or not the backward plan names it. */
    if (plan->op == EPD_OP_MOE_BACKWARD)
        plan->activation = plan->context->activation;
    return plan;
}

enum epd_status plan_create(struct team *team, const struct plan_request *request, plan_callback callback,
                            void *arg, struct epd_error *error)
{
    if (plan_check_request(team, request, error))
        return error->status;
    struct plan *plan = plan_init(team, request);
    if (!plan)
        return error_set(error, EPD_NO_MEMORY, "%s plan: %zu bytes", op_name(request->op), sizeof *plan);
    struct binding_context context = {
        .problem = &team->problem,
        .backend = team->node->backend,
        .device_idx = team->ranks[request->rank].device_idx,
    };
    if (binding_check(&context, request, &plan->bindings, error))
        goto free_plan;
    if (plan_check_bound(plan, request, error))
        goto fini_bindings;
    int64_t max_tokens = plan->bindings.dims[DIM_TOKENS];
    plan->max_tokens = max_tokens < 0 ? UINT32_MAX : (uint32_t)max_tokens;
    plan->crossing_tokens = team->problem.max_tokens;
    plan_check_fill_key(plan);
    plan->callback = callback;
    plan->callback_arg = arg;
    if (plan->context)
        plan->context->n_users++;
    if (team_spans(team) && team->node->backend->works_later && plan->crossing == EPD_CROSSING_EAGER)
        team->patient = 1;
    team->n_plans++;
    plan->job = (struct lane_job){.run = plan_run_create, .complete = plan_complete_create};
    lane_post(plan->lane, &plan->job);
    return EPD_OK;

fini_bindings:
    binding_fini(&plan->bindings);
free_plan:
    free(plan);
    return error->status;
}

static void plan_unlink(struct plan_link *link)
{
    struct plan **place = &link->set->plans[link->plan_idx];
    struct plan_link **from = &(*place)->first_link;
    while (*from != link)
        from = &(*from)->next;
    *from = link->next;
    *place = NULL;
}

/* Nobody uses the plan any more. */
static void plan_end(struct plan *plan)
{
    while (plan->first_link)
        plan_unlink(plan->first_link);
    plan->job = (struct lane_job){.run = plan_run_end, .complete = plan_complete_end};
    lane_post(plan->lane, &plan->job);
}

void plan_let_go(struct plan *plan)
{
    assert(plan->n_users > 0);
    if (--plan->n_users == 0 && plan->dead)
        plan_end(plan);
}

void plan_destroy(struct plan *plan, void (*gone)(void *arg), void *arg)
{
    assert(!plan->dead);
    plan->dead = 1;
    plan->gone = gone;
    plan->gone_arg = arg;
    if (plan->n_users == 0)
        plan_end(plan);
}

uint64_t plan_shape_hash(const struct plan *plan)
{
    return plan->shape_hash;
}

int plan_in_use(const struct plan *plan)
{
    return plan->n_users > 0;
}

uint64_t plan_saved_bytes(const struct plan *plan)
{
    return plan->saved_bytes;
}

enum epd_op plan_op(const struct plan *plan)
{
    return plan->op;
}

enum epd_status plan_join(struct plan *const *plans, uint32_t n_plans, struct plan_set **set,
                          struct epd_error *error)
{
    if (plan_check_join(plans, n_plans, error))
        return error->status;
    struct plan_set *joined = calloc(1, sizeof *joined);
    if (!joined)
        return error_set(error, EPD_NO_MEMORY, "plan set: %zu bytes", sizeof *joined);
    joined->plans = calloc(n_plans, sizeof *joined->plans);
    joined->links = calloc(n_plans, sizeof *joined->links);
    if (!joined->plans || !joined->links) {
        plan_set_free(joined);
        return error_set(error, EPD_NO_MEMORY, "plan set: %u plans", n_plans);
    }
    joined->team = plans[0]->team;
    joined->id = ++joined->team->node->n_sets;
    joined->op = plans[0]->op;
    joined->n_plans = n_plans;
    for (uint32_t i = 0; i < n_plans; i++) {
        joined->plans[i] = plans[i];
        joined->links[i] = (struct plan_link){.set = joined, .plan_idx = i, .next = plans[i]->first_link};
        plans[i]->first_link = &joined->links[i];
        plans[i]->set_id = joined->id;
    }
    *set = joined;
    return EPD_OK;
}

uint32_t plan_set_tokens(const struct plan_set *set)
{
    uint32_t most = 0;
    for (uint32_t i = 0; i < set->n_plans; i++)
        if (set->plans[i] && plan_routes(set->plans[i]) && set->plans[i]->max_tokens > most)
            most = set->plans[i]->max_tokens;
    return most < set->team->problem.max_tokens ? most : set->team->problem.max_tokens;
}

void plan_set_agree(struct plan_set *set, uint32_t n_tokens)
{
    assert(n_tokens <= set->team->problem.max_tokens);
    for (uint32_t i = 0; i < set->n_plans; i++)
        if (set->plans[i])
            set->plans[i]->crossing_tokens = n_tokens;
}

void plan_set_destroy(struct plan_set *set)
{
    assert(!set->destroyed);
    set->destroyed = 1;
    if (set->n_steps)
        return; /* the last step frees it */
    for (uint32_t i = 0; i < set->n_plans; i++)
        if (set->plans[i])
            plan_unlink(&set->links[i]);
    plan_set_free(set);
}

/* A launch that no step will run, handed back in the order of the queue: its `done` must not overtake the
 * launches before it, nor come before its own `ready`. It counts as completed when `done` is there: a client
 * that loses this process releases its streams from all launches that do not. */
struct plan_refusal {
    struct lane_job job;
    struct plan *plan; /* used */
    struct backend_queue *queue;
    uint64_t turn;
    int begun;
    uint64_t ticket;
    uint64_t begun_ns;
    struct epd_error error;
};

static struct plan_refusal *refusal_of_job(struct lane_job *job)
{
    return (struct plan_refusal *)((char *)job - offsetof(struct plan_refusal, job));
}

static struct team_lane *team_lane_of(const struct plan_refusal *refusal)
{
    struct team *team = refusal->plan->team;
    return &team->lanes[team->ranks[refusal->plan->rank].lane_idx];
}

/* Lane thread. */
static void refusal_begin(struct plan_refusal *refusal, const struct backend *backend)
{
    struct plan *plan = refusal->plan;
    refusal->error.status = EPD_OK;
    refusal->begun_ns = clock_now_ns();
    refusal->begun = 1;
    team_lane_pass(team_lane_of(refusal));
    if (team_queue(plan->team, plan->rank, &refusal->queue, &refusal->error) ||
        backend->flag_ready(refusal->queue, &plan->flag, &refusal->ticket, &refusal->error) ||
        backend->flag_done(refusal->queue, &plan->flag, &refusal->error))
        return;
    (void)!backend->queue_ticket(refusal->queue, &refusal->ticket, &refusal->error);
}

/* Lane thread. */
static void refusal_go_on(struct plan_refusal *refusal, struct lane *lane)
{
    if (!refusal->begun && team_lane_has_turn(team_lane_of(refusal), refusal->turn))
        refusal_begin(refusal, lane_backend(lane));
}

/* Lane thread. */
static void refusal_run(struct lane_job *job, struct lane *lane)
{
    struct plan_refusal *refusal = refusal_of_job(job);
    refusal->turn = team_lane_take_turn(team_lane_of(refusal));
    refusal_go_on(refusal, lane);
}

/* Lane thread. */
static int refusal_poll(struct lane_job *job, struct lane *lane)
{
    struct plan_refusal *refusal = refusal_of_job(job);
    struct plan *plan = refusal->plan;
    refusal_go_on(refusal, lane);
    if (!refusal->begun)
        return 0;
    if (refusal->error.status ||
        lane_backend(lane)->queue_reached(refusal->queue, refusal->ticket, &refusal->error)) {
        if (refusal->error.status)
            lane_lose_device(lane, &refusal->error);
        else
            atomic_fetch_add(&plan->flag.page->plans[plan->flag.idx].completed, 1);
        return 1;
    }
    if (atomic_load(&plan->dead) || clock_now_ns() - refusal->begun_ns > PLAN_READY_NS)
        atomic_store(&plan->flag.page->plans[plan->flag.idx].ready, 1);
    return 0;
}

static void refusal_complete(struct lane_job *job)
{
    struct plan_refusal *refusal = refusal_of_job(job);
    struct plan *plan = refusal->plan;
    free(refusal);
    plan->team->n_refused--;
    plan_let_go(plan);
}

/* Where work is done at once: no other launch of the plan is in flight. */
static void hand_back_now(struct plan *plan)
{
    struct page_plan *words = &plan->flag.page->plans[plan->flag.idx];
    atomic_fetch_add(&words->completed, 1);
    atomic_store(&words->ready, 0);
    flag_set(&words->done);
}

static void plan_hand_back(struct plan *plan)
{
    if (!plan->team->node->backend->works_later) {
        hand_back_now(plan);
        return;
    }
    struct plan_refusal *refusal = calloc(1, sizeof *refusal);
    if (!refusal) {
        /* Its flags would come in front of those of launches in the queue, and so would be taken for theirs. The client,
         * which finds it not completed, releases its stream when this process has ended. */
        struct epd_error error = {.status = EPD_OK};
        (void)error_set(&error, EPD_CUDA, "%s: no memory to hand back a launch: its device is given up",
                        op_name(plan->op));
        lane_give_up(plan->lane, &error);
        return;
    }
    refusal->job = (struct lane_job){.run = refusal_run, .poll = refusal_poll, .complete = refusal_complete};
    refusal->plan = plan;
    plan->n_users++;
    plan->team->n_refused++;
    lane_post(plan->lane, &refusal->job);
}

void plan_fail(struct plan *plan, uint64_t seq, const struct epd_error *error, enum epd_phase phase,
               int32_t rank)
{
    struct page_entry entry = {
        .plan_id = plan->public_id,
        .seq = seq,
        .status = error->status,
        .phase = phase,
        .rank = rank,
    };
    struct page_plan *words = &plan->flag.page->plans[plan->flag.idx];
    snprintf(entry.text, sizeof entry.text, "%.*s", (int)sizeof entry.text - 1, error->text);
    page_report(plan->flag.page, &entry);
    atomic_fetch_add(&words->failed, 1);
    plan_hand_back(plan);
}
