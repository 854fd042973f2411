#include "ep/hop_routing.h"

#include <string.h>

void hop_routing_carve(struct hop_routing *hop, const struct problem *problem, struct layout *layout)
{
    if (problem->n_nodes == 1)
        return;
    const uint64_t n = (uint64_t)problem->max_tokens * problem->top_k;
    hop->from = layout_take(layout, problem->n_nodes * sizeof *hop->from);
    hop->sent = layout_take(layout, problem->n_nodes * sizeof *hop->sent);
    hop->n_sent = layout_take(layout, problem->n_nodes * sizeof *hop->n_sent);
    for (uint32_t node = 0; node < problem->n_nodes; node++) {
        int32_t *sent = layout_take(layout, problem->max_tokens * sizeof *sent);
        const struct hop_arrivals from = {
            .expert = layout_take(layout, n * sizeof *from.expert),
            .row = layout_take(layout, n * sizeof *from.row),
            .weights = layout_take(layout, n * sizeof *from.weights),
        };
        if (!layout->base)
            continue;
        hop->from[node] = from;
        hop->sent[node] = sent;
    }
}

static uint32_t experts_per_node(const struct problem *problem)
{
    return problem->n_local_experts * problem->ranks_per_node;
}

void hop_routing_choose(struct hop_routing *hop, const struct problem *problem, const int32_t *expert,
                        uint32_t n_tokens)
{
    const uint32_t n_here = experts_per_node(problem);
    memset(hop->n_sent, 0, problem->n_nodes * sizeof *hop->n_sent);
    for (uint32_t token = 0; token < n_tokens; token++)
        for (uint32_t k = 0; k < problem->top_k; k++) {
            const int32_t chosen = expert[(size_t)token * problem->top_k + k];
            const uint32_t node = chosen < 0 ? problem->node : (uint32_t)chosen / n_here;
            if (node == problem->node)
                continue;
            uint32_t *n = &hop->n_sent[node];
            if (*n == 0 || hop->sent[node][*n - 1] != (int32_t)token) /* tokens rise */
                hop->sent[node][(*n)++] = (int32_t)token;
        }
}

uint64_t hop_routing_place_words(const struct problem *problem)
{
    return (uint64_t)(problem->n_nodes + 1) * experts_per_node(problem);
}

/* For every expert of this node: rows[e] of all ranks, and before[node][e] of the ranks before the rail's one there. */
static void count_rows(const struct problem *problem, uint32_t rail, const int32_t *counts, int64_t *rows,
                       int64_t *before)
{
    const uint32_t n_here = experts_per_node(problem);
    memset(rows, 0, n_here * sizeof *rows);
    for (uint32_t source = 0; source < problem->world_size; source++) {
        const int32_t *routed = counts + (size_t)source * problem->n_experts + problem->node * n_here;
        if (source % problem->ranks_per_node == rail)
            memcpy(before + (size_t)(source / problem->ranks_per_node) * n_here, rows, n_here * sizeof *rows);
        for (uint32_t e = 0; e < n_here; e++)
            rows[e] += routed[e];
    }
}

/* The slabs of a rank's experts follow each other, each at a multiple of the alignment. */
static void add_slabs(const struct problem *problem, const int64_t *rows, int64_t *next_row)
{
    const uint32_t n_here = experts_per_node(problem);
    const int64_t mask = (int64_t)problem->alignment - 1;
    int64_t slab = 0;
    for (uint32_t e = 0; e < n_here; e++) {
        if (e % problem->n_local_experts == 0)
            slab = 0;
        for (uint32_t node = 0; node < problem->n_nodes; node++)
            next_row[(size_t)node * n_here + e] += slab;
        slab += (rows[e] + mask) & ~mask;
    }
}

/* Only the experts of this node have rows here; what is over the capacity has none. */
static void place_rows(const struct problem *problem, int64_t *next_row, struct hop_arrivals *from)
{
    const uint32_t n_here = experts_per_node(problem), first = problem->node * n_here;
    const size_t n = (size_t)from->n_tokens * problem->top_k;
    for (size_t i = 0; i < n; i++) {
        const uint32_t e = (uint32_t)from->expert[i] - first; /* huge where it is not here, or none */
        const int64_t row = e < n_here ? next_row[e]++ : -1;
        from->row[i] = row < problem->capacity_rows ? (int32_t)row : -1;
    }
}

const int64_t *hop_routing_place(struct hop_routing *hop, const struct problem *problem, uint32_t rank,
                                 const int32_t *counts, int64_t *words)
{
    const uint32_t n_here = experts_per_node(problem);
    int64_t *rows = words, *next_row = words + n_here;
    count_rows(problem, rank % problem->ranks_per_node, counts, rows, next_row);
    add_slabs(problem, rows, next_row);
    for (uint32_t node = 0; node < problem->n_nodes; node++)
        place_rows(problem, next_row + (size_t)node * n_here, &hop->from[node]);
    return rows + (size_t)(rank % problem->ranks_per_node) * problem->n_local_experts;
}
