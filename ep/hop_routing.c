#include "ep/hop_routing.h"

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
