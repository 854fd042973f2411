/* A layer of a case on the devices there are: its forward plan and the backward plan of it. */
#ifndef EPD_TESTS_GPU_BACKEND_PAIR_H
#define EPD_TESTS_GPU_BACKEND_PAIR_H

#include "tests/unit/ep/layer.h"

struct pair {
    struct harness harness;
    struct layer layer;
    struct layer_outputs outputs[HARNESS_MAX_RANKS];
    struct crew_plan forward, backward;
};

void pair_init(struct pair *pair, const struct op_case *op_case, enum epd_saved saved);
void pair_fini(struct pair *pair);

#endif
