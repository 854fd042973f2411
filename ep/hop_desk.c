#include "ep/hop_desk.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

#include "ep/rails.h"

struct hop_desk *hop_desk_of(const struct rank_run *run)
{
    return run->plan->team->ranks[run->plan->rank].desk;
}

static uint32_t rail_idx(const struct rank_run *run)
{
    return run->plan->rank - problem_first_rank(&run->plan->team->problem);
}

/* ---- memory ---- */

static void measure(struct hop_desk *desk, const struct problem *problem)
{
    const struct hop_tokens most = {problem->max_tokens, problem->max_tokens};
    struct hop_frame frame;
    hop_frame_lay(&frame, problem, HOP_COUNTS | HOP_EXPERTS | HOP_WEIGHTS | HOP_ROWS, most, NULL);
    desk->room[HOP_THERE] = frame.bytes;
    struct hop_frame sums, scalars;
    hop_frame_lay(&sums, problem, HOP_SUMS, most, NULL);
    hop_frame_lay(&scalars, problem, HOP_SCALARS, most, NULL);
    desk->room[HOP_BACK] = sums.bytes > scalars.bytes ? sums.bytes : scalars.bytes;
    /* A rank whose step is off takes whatever the others still send here. */
    if (desk->room[HOP_THERE] < desk->room[HOP_BACK])
        desk->room[HOP_THERE] = desk->room[HOP_BACK];
}

static uint64_t carve(struct hop_desk *desk, const struct problem *problem)
{
    struct layout layout = {.base = desk->block.data};
    const uint64_t n = problem->max_tokens, n_local = problem->n_local_experts;
    for (int way = 0; way < HOP_WAY_COUNT; way++)
        for (uint32_t node = 0; node < problem->n_nodes; node++) {
            if (node == problem->node)
                continue;
            desk->lines[way][node].out = layout_take(&layout, desk->room[way]);
            desk->lines[way][node].in = layout_take(&layout, desk->room[way]);
        }
    desk->own_sums = layout_take(&layout, n * problem->hidden * sizeof(float));
    desk->own_scalars = layout_take(&layout, n * problem->top_k * sizeof(float));
    desk->splits = layout_take(&layout, n_local * sizeof(int64_t));
    desk->offsets = layout_take(&layout, (n_local + 1) * sizeof(int64_t));
    return layout.bytes;
}

static void desk_free(struct hop_desk *desk)
{
    host_scratch_fini(&desk->scratch);
    for (int way = 0; way < HOP_WAY_COUNT; way++)
        free(desk->lines[way]);
    free(desk->verdicts);
    free(desk);
}

enum epd_status hop_desk_create(struct team *team, uint32_t rank, struct epd_error *error)
{
    const struct problem *problem = &team->problem;
    struct hop_desk *desk = calloc(1, sizeof *desk);
    if (!desk)
        return error_set(error, EPD_NO_MEMORY, "hop: no memory");
    for (int way = 0; way < HOP_WAY_COUNT; way++)
        desk->lines[way] = calloc(problem->n_nodes, sizeof *desk->lines[way]);
    desk->verdicts = calloc(2 * (size_t)problem->n_nodes, sizeof *desk->verdicts);
    measure(desk, problem);
    if (!desk->lines[HOP_THERE] || !desk->lines[HOP_BACK] || !desk->verdicts) {
        desk_free(desk);
        return error_set(error, EPD_NO_MEMORY, "hop: no memory for %u nodes", problem->n_nodes);
    }
    if (team_alloc(team, rank, carve(desk, problem), &desk->block, error)) {
        desk_free(desk);
        return error->status;
    }
    (void)carve(desk, problem);
    team->ranks[rank].desk = desk;
    return EPD_OK;
}

void hop_desk_destroy(struct team *team, uint32_t rank)
{
    struct hop_desk *desk = team->ranks[rank].desk;
    if (!desk)
        return;
    team_free(team, rank, &desk->block);
    desk_free(desk);
    team->ranks[rank].desk = NULL;
}

/* ---- swaps ---- */

/* Messages of the plan: static ones are always as long as they can be. */
static uint32_t sized(const struct rank_run *run, uint32_t content)
{
    return run->plan->crossing == EPD_CROSSING_STATIC ? content | HOP_STATIC : content;
}

static struct hop_tokens crossing(const struct rank_run *run, uint32_t n_tokens)
{
    return (struct hop_tokens){plan_router(run->plan)->crossing_tokens, n_tokens};
}

void hop_desk_begin(const struct rank_run *run, enum hop_way way, uint32_t content, const uint32_t *n_tokens)
{
    const struct problem *problem = &run->plan->team->problem;
    struct hop_desk *desk = hop_desk_of(run);
    for (uint32_t node = 0; node < problem->n_nodes; node++) {
        struct hop_line *line = &desk->lines[way][node];
        if (node != problem->node)
            hop_frame_begin(&line->sent, problem, sized(run, content), crossing(run, n_tokens[node]),
                            desk->step, line->out);
    }
}

static enum epd_status swap(const struct rank_run *run, enum hop_way way, struct transport_part *parts,
                            struct epd_error *error)
{
    const struct problem *problem = &run->plan->team->problem;
    struct hop_desk *desk = hop_desk_of(run);
    for (uint32_t node = 0; node < problem->n_nodes; node++) {
        const struct hop_line *line = &desk->lines[way][node];
        parts[node] = (struct transport_part){.send = line->out,
                                              .send_bytes = line->sent.bytes,
                                              .receive = line->in,
                                              .receive_room = desk->room[way]};
    }
    desk->n_swaps++;
    return rails_swap(run->plan->team->rails, rail_idx(run), parts, error);
}

enum epd_status hop_desk_swap(const struct rank_run *run, enum hop_way way, uint32_t content,
                              const uint32_t *n_due, struct epd_error *error)
{
    const struct problem *problem = &run->plan->team->problem;
    struct hop_desk *desk = hop_desk_of(run);
    struct transport_part parts[EPD_MAX_NODES];
    if (swap(run, way, parts, error))
        return error->status;
    for (uint32_t node = 0; node < problem->n_nodes; node++) {
        struct hop_line *line = &desk->lines[way][node];
        if (node == problem->node)
            continue;
        if (hop_frame_check(&line->came, problem, sized(run, content),
                            crossing(run, n_due ? n_due[node] : UINT32_MAX), desk->step,
                            rails_node_name(run->plan->team->rails, node), line->in,
                            parts[node].received_bytes, error)) {
            desk->off |= error->status == EPD_PEER_LOST;
            return error->status;
        }
    }
    return EPD_OK;
}

/* ---- a step ---- */

/* Swaps of a step of the plan, without the agreement. In step with hop_exchange. */
static uint32_t count_swaps(const struct plan *plan)
{
    const uint32_t d_weights = plan_has(plan, EPD_ROLE_D_WEIGHTS) ? 1 : 0;
    const uint32_t dx = plan_has(plan, EPD_ROLE_DX) ? 1 : 0;
    switch (plan->op) {
    case EPD_OP_DISPATCH:
        return 1;
    case EPD_OP_COMBINE:
        return plan_has(plan, EPD_ROLE_TOPK_WEIGHTS) ? 2 : 1;
    case EPD_OP_DISPATCH_BWD:
        return dx + d_weights;
    case EPD_OP_COMBINE_BWD:
        return 1 + d_weights;
    case EPD_OP_MOE_FORWARD:
        return 2;
    case EPD_OP_MOE_BACKWARD:
        return 1 + (plan->context->saved == EPD_SAVED_RECOMPUTE) + dx + d_weights;
    default:
        return 0;
    }
}

/* Swaps that a rank takes one behind the other, in one phase, before the lane's next rank has its turn: in these two ops
 * all of the step. */
static uint32_t count_swaps_at_once(const struct plan *plan)
{
    return plan->op == EPD_OP_COMBINE || plan->op == EPD_OP_COMBINE_BWD ? count_swaps(plan) : 1;
}

void hop_desk_begin_step(const struct rank_run *runs, uint32_t n_runs, uint64_t step)
{
    for (uint32_t i = 0; i < n_runs; i++) {
        struct hop_desk *desk = hop_desk_of(&runs[i]);
        desk->step = step;
        desk->n_swaps = 0;
        desk->off = 0;
    }
}

static void swap_nothing(const struct rank_run *run)
{
    const struct problem *problem = &run->plan->team->problem;
    struct hop_desk *desk = hop_desk_of(run);
    struct transport_part parts[EPD_MAX_NODES];
    struct epd_error ignored;
    for (uint32_t node = 0; node < problem->n_nodes; node++) {
        struct hop_line *line = &desk->lines[HOP_THERE][node];
        if (node == problem->node)
            continue;
        hop_frame_begin(&line->sent, problem, 0, (struct hop_tokens){0, 0}, desk->step, line->out);
        line->sent.head->status = EPD_PEER_LOST;
    }
    (void)!swap(run, HOP_THERE, parts,
                &ignored); /* what has failed is known; a broken rail fails again below */
}

void hop_desk_drain(const struct rank_run *runs, uint32_t n_runs)
{
    const uint32_t n_swaps = count_swaps(runs[0].plan), n_at_once = count_swaps_at_once(runs[0].plan);
    for (uint32_t number = 0; number < n_swaps; number += n_at_once)
        for (uint32_t i = 0; i < n_runs; i++)
            while (hop_desk_of(&runs[i])->n_swaps < number + n_at_once)
                swap_nothing(&runs[i]);
}

int hop_desk_only_followed(const struct rank_run *run)
{
    return hop_desk_of(run)->off;
}

int hop_counts_before(const struct hop_verdict *a, const struct hop_verdict *b)
{
    if (!a->status || !b->status)
        return a->status != 0;
    return a->order != b->order ? a->order < b->order : a->rank < b->rank;
}

static void agree(const struct rank_run *run, struct hop_verdict *verdict)
{
    const struct problem *problem = &run->plan->team->problem;
    struct hop_desk *desk = hop_desk_of(run);
    struct transport_part parts[EPD_MAX_NODES];
    struct epd_error error;
    const struct hop_verdict mine = *verdict;
    for (uint32_t node = 0; node < problem->n_nodes; node++)
        parts[node] = (struct transport_part){.send = &mine,
                                              .send_bytes = sizeof mine,
                                              .receive = &desk->verdicts[node],
                                              .receive_room = sizeof mine};
    if (rails_swap(run->plan->team->rails, rail_idx(run), parts, &error)) {
        *verdict = (struct hop_verdict){.status = error.status, .rank = -1};
        memcpy(verdict->text, error.text, sizeof verdict->text);
        return;
    }
    for (uint32_t node = 0; node < problem->n_nodes; node++) {
        struct hop_verdict *theirs = &desk->verdicts[node];
        if (node == problem->node)
            continue;
        theirs->text[sizeof theirs->text - 1] = 0;
        if (parts[node].received_bytes != sizeof mine || !status_known(theirs->status) ||
            theirs->phase >= EPD_PHASE_COUNT)
            *theirs =
                (struct hop_verdict){.status = EPD_PROTOCOL, .rank = -1, .text = "a verdict that is none"};
        if (hop_counts_before(theirs, verdict))
            *verdict = *theirs;
    }
}

void hop_desk_agree(const struct rank_run *runs, uint32_t n_runs, struct hop_verdict *verdict)
{
    const struct hop_verdict own = *verdict;
    for (uint32_t i = 0; i < n_runs; i++) {
        struct hop_verdict agreed = own;
        agree(&runs[i], &agreed);
        if (hop_counts_before(&agreed, verdict))
            *verdict = agreed;
    }
}
