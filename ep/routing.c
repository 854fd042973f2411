#include "ep/routing.h"

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
        slots->sent = layout_take(layout, problem->world_size * sizeof *slots->sent);
    }
    context->recv_weights = with_weights ? layout_take(layout, n_rows * sizeof(float)) : NULL;
}
