#include "ep/routing.h"

#include <string.h>

uint64_t routing_n_sent(const struct problem *problem)
{
    return (uint64_t)problem->n_nodes * problem->world_size;
}

void routing_carve(struct routing_context *context, const struct problem *problem, int with_weights,
                   int with_slots, struct layout *layout)
{
    uint64_t n_choices = (uint64_t)problem->max_tokens * problem->top_k;
    uint64_t n_rows = (uint64_t)problem->capacity_rows, n_local = problem->n_local_experts;
    struct routing *routing = &context->routing;
    routing->expert = layout_take(layout, n_choices * sizeof *routing->expert);
    routing->row = layout_take(layout, n_choices * sizeof *routing->row);
    routing->counts =
        layout_take(layout, (uint64_t)problem->world_size * problem->n_experts * sizeof *routing->counts);
    routing->source = layout_take(layout, n_rows * sizeof *routing->source);
    routing->m_splits = layout_take(layout, n_local * sizeof *routing->m_splits);
    routing->offsets = layout_take(layout, (n_local + 1) * sizeof *routing->offsets);
    routing->needed_rows = layout_take(layout, sizeof *routing->needed_rows);
    routing->dropped_rows = layout_take(layout, sizeof *routing->dropped_rows);
    if (with_slots) {
        struct exchange_slots *slots = &context->slots;
        uint64_t n_slots = problem->world_size * n_choices;
        slots->row = layout_take(layout, n_slots * sizeof *slots->row);
        slots->weight = layout_take(layout, n_slots * sizeof *slots->weight);
        slots->tokens = layout_take(layout, problem->world_size * sizeof *slots->tokens);
        slots->sent = layout_take(layout, routing_n_sent(problem) * sizeof *slots->sent);
    }
    context->recv_weights = with_weights ? layout_take(layout, n_rows * sizeof(float)) : NULL;
}

static void count_sent(const struct problem *problem, const int32_t *expert, uint32_t n_tokens, int32_t *sent)
{
    for (uint32_t token = 0; token < n_tokens; token++) {
        uint64_t ranks = 0;
        for (uint32_t k = 0; k < problem->top_k; k++) {
            const int32_t chosen = expert[(size_t)token * problem->top_k + k];
            if (chosen >= 0 && (uint32_t)chosen < problem->n_experts)
                ranks |= 1ull << (uint32_t)chosen / problem->n_local_experts;
        }
        for (; ranks; ranks &= ranks - 1)
            sent[__builtin_ctzll(ranks)]++;
    }
}

void routing_count_sent(const struct routing_context *context, const struct problem *problem,
                        uint32_t n_tokens, int32_t *sent)
{
    memset(sent, 0, routing_n_sent(problem) * sizeof *sent);
    for (uint32_t node = 0; node < problem->n_nodes; node++) {
        int32_t *of_node = sent + (size_t)node * problem->world_size;
        if (node == problem->node)
            count_sent(problem, context->routing.expert, n_tokens, of_node);
        else
            count_sent(problem, context->hop.from[node].expert, context->hop.from[node].n_tokens, of_node);
    }
}
