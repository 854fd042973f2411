/* A rank's work in fault tests: one moe_forward over a small layer, whose every good result is compared with
 * the float64 reference (the first) and bit by bit with the first (all later ones). A wrong result ends the
 * rank process with WORKLOAD_WRONG. Owned by the rank process; one thread. */
#ifndef EPD_TESTS_FAULT_WORKLOAD_H
#define EPD_TESTS_FAULT_WORKLOAD_H

#include "tests/integration/layer.h"

#define WORKLOAD_WRONG 99 /* exit code of a rank that got EPD_OK and a wrong result */

/* 2 ranks, 4 experts, 8 tokens; f32. */
extern const struct op_case workload_case;

struct workload {
    struct layer layer;
    struct layer_tensor x, idx, weights, w1, b1, w2, b2, out;
    struct epd_plan *forward;
    char error[256]; /* of workload_try, when it failed */
    void *first;     /* owned, bytes of out after the first good step; NULL before it */
};

/* Opens, joins, allocates and creates the plan; returns the first error and leaves nothing behind then.
 * deadline_ms: of the group's steps, 0: the daemon's. */
enum epd_status workload_try(struct workload *workload, const struct rank *rank,
                             const struct op_case *op_case, uint32_t deadline_ms);
/* The same, but an error fails the rank. */
void workload_open(struct workload *workload, const struct rank *rank, const struct op_case *op_case,
                   uint32_t deadline_ms);
void workload_close(struct workload *workload);
/* Poisons the output, launches, waits, and checks the result if it is EPD_OK. */
enum epd_status workload_step(struct workload *workload);
/* The two halves of it. */
enum epd_status workload_launch(struct workload *workload);
enum epd_status workload_wait(struct workload *workload);

#endif
