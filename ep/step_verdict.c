/* What a step came to: from what the host met on each rank and what kernels recorded, and, of a team that spans nodes, from
 * what the other nodes say. Every lane comes to the same. */
#include <stdio.h>
#include <string.h>

#include "ep/rails.h"
#include "ep/step_impl.h"

static enum epd_phase record_phase(enum plan_record record)
{
    return record == PLAN_RECORD_EXPERT ? EPD_PHASE_GEMM : EPD_PHASE_ROUTE;
}

/* What errors call a node of the team; records and reports may say anything. */
static uint32_t node_name(const struct step *step, uint32_t node)
{
    return step_spans(step) ? rails_node_name(step->team->rails, node) : node;
}

/* Of a rank of any node. */
static void describe_record(const struct step *step, uint32_t rank, struct step_verdict *verdict)
{
    const struct kernel_error *record = &verdict->record;
    const char *op = op_name(step->op);
    long long got = record->got, allowed = record->allowed;
    switch (record->status) {
    case EPD_BAD_ROUTING:
        if (record->expert >= 0)
            error_set(&verdict->error, EPD_BAD_ROUTING, "%s: topk_idx of rank %u token %d: expert %lld twice",
                      op, rank, record->token, got);
        else
            error_set(&verdict->error, EPD_BAD_ROUTING,
                      "%s: topk_idx of rank %u token %d: expert %lld, want -1..%lld", op, rank, record->token,
                      got, allowed);
        return;
    case EPD_CAPACITY_OVERFLOW:
        error_set(&verdict->error, EPD_CAPACITY_OVERFLOW,
                  "%s: rank %u receives %lld rows, its capacity is %lld", op, rank, got, allowed);
        return;
    case EPD_BAD_SPLITS:
        error_set(&verdict->error, EPD_BAD_SPLITS,
                  "%s: m_splits of rank %u expert %d: rows %lld, want 0..%lld (max_rows)", op, rank,
                  record->expert, got, allowed);
        return;
    case EPD_PROTOCOL:
        error_set(&verdict->error, EPD_PEER_LOST, "%s: rank %u: what came from node %u is no frame", op, rank,
                  node_name(step, (uint32_t)record->token));
        return;
    default:
        error_set(&verdict->error, EPD_INTERNAL, "%s: kernel record %u of rank %u", op, record->status, rank);
    }
}

/* The lowest rank whose host side failed by itself, or only followed one of another node. */
static int find_host_failure(const struct step *step, int followed, struct step_verdict *verdict)
{
    for (uint32_t i = 0; i < step->n_ranks; i++) {
        const struct step_rank *rank = &step->ranks[i];
        if (!rank->error.status || rank->followed != followed)
            continue;
        verdict->error = rank->error;
        verdict->phase = rank->phase;
        verdict->rank = (int32_t)step->plans[i]->rank;
        return 1;
    }
    return 0;
}

static int takes_record(const struct step *step, uint32_t rank, int record, const struct kernel_error *seen,
                        struct step_verdict *verdict)
{
    if (!seen->status ||
        (seen->status == EPD_CAPACITY_OVERFLOW && step->team->problem.overflow == EPD_OVERFLOW_DROP))
        return 0;
    verdict->record = *seen;
    verdict->phase = record_phase((enum plan_record)record);
    verdict->rank = (int32_t)rank;
    describe_record(step, rank, verdict);
    return 1;
}

static int find_record(const struct step *step, struct step_verdict *verdict)
{
    for (int record = 0; record < PLAN_RECORD_COUNT; record++)
        for (uint32_t i = 0; i < step->n_ranks; i++)
            if (takes_record(step, step->plans[i]->rank, record, &step->ranks[i].records[record], verdict))
                return 1;
    return 0;
}

/* The first rank whose host side failed; else the first record of the lowest rank; else who only followed. */
struct step_verdict step_decide_here(const struct step *step)
{
    struct step_verdict verdict = {.error = {.status = EPD_OK}, .rank = -1};
    if (!find_host_failure(step, 0, &verdict) && !find_record(step, &verdict))
        (void)find_host_failure(step, 1, &verdict);
    return verdict;
}

/* Where in the order of verdicts this one stands: what the host side met, what kernels recorded, and last what
 * only tells of another rank's end. */
enum { ORDER_HOST = 0, ORDER_RECORD = 1, ORDER_FOLLOWED = ORDER_RECORD + PLAN_RECORD_COUNT };

static uint32_t order_of(const struct step *step, const struct step_verdict *verdict)
{
    if (verdict->record.status == EPD_PROTOCOL) /* its node has said why */
        return ORDER_FOLLOWED;
    if (verdict->record.status)
        return verdict->record.status == EPD_CAPACITY_OVERFLOW ? ORDER_RECORD + 1 : ORDER_RECORD;
    for (uint32_t i = 0; i < step->n_ranks; i++)
        if ((int32_t)step->plans[i]->rank == verdict->rank && step->ranks[i].followed)
            return ORDER_FOLLOWED;
    return ORDER_HOST;
}

static struct hop_verdict to_hop(const struct step *step, const struct step_verdict *verdict)
{
    struct hop_verdict hop = {.status = verdict->error.status,
                              .rank = verdict->rank,
                              .phase = verdict->phase,
                              .order = order_of(step, verdict),
                              .record = verdict->record};
    (void)snprintf(hop.text, sizeof hop.text, "%s", verdict->error.status ? verdict->error.text : "");
    return hop;
}

static struct step_verdict from_hop(const struct hop_verdict *hop)
{
    struct step_verdict verdict = {.rank = hop->rank, .phase = hop->phase, .record = hop->record};
    verdict.error.status = hop->status;
    (void)snprintf(verdict.error.text, sizeof verdict.error.text, "%s", hop->text);
    return verdict;
}

void step_agree(struct step_lane *lane)
{
    const struct step_verdict mine = step_decide_here(lane->step);
    struct rank_run runs[EPD_MAX_WORLD_SIZE];
    lane->agreed = to_hop(lane->step, &mine);
    for (uint32_t i = 0; i < lane->n_ranks; i++)
        runs[i] = step_rank_run(lane, lane->ranks[i]);
    lane->step->team->hop->agree(runs, lane->n_ranks, &lane->agreed);
}

/* ---- reports ---- */

void step_report(struct step_lane *lane)
{
    struct step *step = lane->step;
    const uint32_t n_nodes = step->team->problem.n_nodes;
    for (uint32_t i = 0; i < lane->n_ranks; i++) {
        const uint32_t idx = lane->ranks[i];
        const struct rank_run run = step_rank_run(lane, idx);
        const struct step_rank *rank = &step->ranks[idx];
        struct step_verdict host = {.error = rank->error, .phase = rank->phase, .rank = -1};
        struct epd_error error = {.status = EPD_OK};
        if (host.error.status)
            host.rank = (int32_t)run.plan->rank;
        const struct hop_verdict verdict = to_hop(step, &host);
        if (step->team->hop->report(&run, &verdict, step->reports + (size_t)idx * n_nodes, &error))
            step_fail_report(lane, idx, &error);
    }
}

/* Nothing has come of it: its node is gone, or its rail. */
static struct hop_verdict missing(const struct step *step, uint32_t node)
{
    struct hop_verdict verdict = {.status = EPD_PEER_LOST, .rank = -1, .order = ORDER_FOLLOWED};
    struct epd_error why = {.status = EPD_OK};
    if (rails_broken(step->team->rails, &why))
        verdict.status = why.status;
    else
        (void)snprintf(why.text, sizeof why.text, "%s: node %u did not report", op_name(step->op),
                       node_name(step, node));
    memcpy(verdict.text, why.text, sizeof verdict.text);
    return verdict;
}

/* 0: a rank of another node says that all is well. Else what it came to. */
static int reports_failure(const struct step *step, uint32_t idx, uint32_t node, struct hop_verdict *failure)
{
    const struct problem *problem = &step->team->problem;
    const struct hop_report *report = &step->reports[(size_t)idx * problem->n_nodes + node];
    struct step_verdict verdict = {.error = {.status = EPD_OK}, .rank = -1};
    if (report->step != step->number || report->step_again != step->number || !status_known(report->status) ||
        report->phase >= EPD_PHASE_COUNT || report->rank < -1 ||
        report->rank >= (int64_t)problem->world_size) {
        *failure = missing(step, node);
        return 1;
    }
    if (report->status) {
        /* Its devices are not ours. */
        const int lost = report->status == EPD_CUDA || report->status == EPD_NCCL;
        *failure = (struct hop_verdict){.status = lost ? EPD_PEER_LOST : report->status,
                                        .rank = report->rank,
                                        .phase = report->phase,
                                        .order = report->order};
        memcpy(failure->text, report->text, sizeof failure->text - 1);
        return 1;
    }
    for (int record = 0; record < PLAN_RECORD_COUNT; record++)
        if (takes_record(step, node * problem->ranks_per_node + idx, record, &report->records[record],
                         &verdict)) {
            *failure = to_hop(step, &verdict);
            return 1;
        }
    return 0;
}

/* Of all ranks of all nodes; every lane of every node comes to the same. */
static struct step_verdict decide_jointly(const struct step *step)
{
    const struct problem *problem = &step->team->problem;
    const struct step_verdict mine = step_decide_here(step);
    struct hop_verdict first = {.status = EPD_OK, .rank = -1}, other;
    if (mine.error.status)
        first = to_hop(step, &mine);
    for (uint32_t idx = 0; idx < step->n_ranks; idx++)
        for (uint32_t node = 0; node < problem->n_nodes; node++)
            if (node != problem->node && reports_failure(step, idx, node, &other) &&
                hop_counts_before(&other, &first))
                first = other;
    return first.status ? from_hop(&first) : mine;
}

struct step_verdict step_decide(const struct step_lane *lane)
{
    if (!step_spans(lane->step))
        return step_decide_here(lane->step);
    return step_reports(lane->step) ? decide_jointly(lane->step) : from_hop(&lane->agreed);
}
