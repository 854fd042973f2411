#include "daemon/stats.h"

#include <stdlib.h>

static uint32_t status_slot(enum epd_status status)
{
    return (uint32_t)status < STATS_N_STATUSES ? (uint32_t)status : (uint32_t)EPD_INTERNAL;
}

void stats_count_error(struct stats *stats, enum epd_status status)
{
    stats->errors[status_slot(status)]++;
}

void stats_count_failed(struct stats *stats, enum epd_op op, enum epd_status status, uint32_t n_launches)
{
    stats->ops[op].launches += n_launches;
    stats->ops[op].failed += n_launches;
    stats->failed_launches[status_slot(status)] += n_launches;
}

static void count_rank(struct stats *stats, struct stats_op *op, const struct step_rank_result *rank)
{
    op->launches++;
    op->rows += (uint64_t)rank->rows;
    op->dropped_rows += (uint64_t)rank->dropped_rows;
    op->wire_bytes += rank->wire_bytes;
    op->network_bytes += rank->network_bytes;
    op->copied_bytes += rank->copied_bytes;
    op->flops += rank->flops;
    for (int phase = 0; phase < EPD_PHASE_COUNT; phase++)
        op->phase_ns[phase] += rank->phase_ns[phase];
    if (rank->status == EPD_OK)
        return;
    op->failed++;
    stats->failed_launches[status_slot(rank->status)]++;
}

void stats_count_step(struct stats *stats, enum epd_op op, const struct step_result *result,
                      uint64_t n_tokens, uint64_t gather_ns, uint64_t run_ns)
{
    struct stats_op *counts = &stats->ops[op];
    counts->tokens += n_tokens;
    for (uint32_t rank = 0; rank < result->n_ranks; rank++)
        count_rank(stats, counts, &result->ranks[rank]);
    histogram_add(&counts->gather_ns, gather_ns);
    histogram_add(&counts->run_ns, run_ns);
}

enum epd_status load_init(struct load *load, uint32_t n_experts, struct epd_error *error)
{
    *load = (struct load){.n_experts = n_experts};
    load->expert_rows = calloc(n_experts ? n_experts : 1, sizeof(*load->expert_rows));
    if (!load->expert_rows)
        return error_set(error, EPD_NO_MEMORY, "group: no memory for the load of %u experts", n_experts);
    return EPD_OK;
}

void load_fini(struct load *load)
{
    free(load->expert_rows);
    load->expert_rows = NULL;
}

void load_count(struct load *load, const int64_t *expert_rows, uint32_t n_experts)
{
    if (!expert_rows || n_experts != load->n_experts)
        return;
    int64_t sum = 0, most = 0;
    for (uint32_t e = 0; e < n_experts; e++) {
        load->expert_rows[e] += expert_rows[e];
        sum += expert_rows[e];
        most = expert_rows[e] > most ? expert_rows[e] : most;
    }
    if (!sum)
        return;
    load->n_steps++;
    load->imbalance_last = (double)most * n_experts / (double)sum;
    load->imbalance_sum += load->imbalance_last;
}

uint32_t load_hottest(const struct load *load)
{
    uint32_t hottest = 0;
    for (uint32_t e = 1; e < load->n_experts; e++)
        if (load->expert_rows[e] > load->expert_rows[hottest])
            hottest = e;
    return hottest;
}
