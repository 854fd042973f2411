#include "tests/gpu/backend/pair.h"

void pair_init(struct pair *pair, const struct op_case *op_case, enum epd_saved saved)
{
    const struct layer_modes modes = {.saved = saved};
    harness_open(&pair->harness, op_case->world_size, 0);
    layer_init(&pair->layer, &pair->harness, op_case);
    layer_take_outputs(&pair->layer, pair->outputs);
    layer_forward_plan(&pair->layer, modes, pair->outputs, &pair->forward);
    layer_backward_plan(&pair->layer, modes, pair->outputs, &pair->forward, &pair->backward);
}

void pair_fini(struct pair *pair)
{
    crew_plan_destroy(&pair->backward);
    crew_plan_destroy(&pair->forward);
    layer_fini(&pair->layer);
    harness_close(&pair->harness);
}
