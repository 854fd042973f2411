#include "ep/saved.h"

static void *take_part(struct layout *layout, const struct problem *problem, unsigned parts,
                       enum saved_part part, uint64_t columns)
{
    return parts & part ? layout_take(layout, problem_row_bytes(problem, columns)) : NULL;
}

static uint64_t carve(struct saved_context *saved, const struct problem *problem, unsigned parts)
{
    struct layout layout = {.base = saved->block.data};
    saved->recv_x = take_part(&layout, problem, parts, SAVED_RECV_X, problem->hidden);
    saved->preact = take_part(&layout, problem, parts, SAVED_PREACT, 2 * (uint64_t)problem->ffn);
    saved->dout = take_part(&layout, problem, parts, SAVED_DOUT, problem->hidden);
    saved->act = take_part(&layout, problem, parts, SAVED_ACT, problem->ffn);
    return layout.bytes;
}

uint64_t saved_bytes(const struct problem *problem, unsigned parts)
{
    struct saved_context measured = {.block = {.fd = -1}};
    return carve(&measured, problem, parts);
}

void saved_carve(struct saved_context *saved, const struct problem *problem, unsigned parts)
{
    (void)carve(saved, problem, parts);
}
