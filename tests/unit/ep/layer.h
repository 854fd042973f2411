/* An op case as a group of clients: its inputs in their memory, the reference's answers, plans over them. */
#ifndef EPD_TESTS_UNIT_EP_LAYER_H
#define EPD_TESTS_UNIT_EP_LAYER_H

#include "tests/reference/op_cases.h"
#include "tests/unit/ep/harness.h"

/* Inputs of one rank. */
struct layer_inputs {
    struct slab x, topk_idx, topk_weights, dout, w1, b1, w2, b2;
};

/* Outputs of one rank; poisoned when taken. */
struct layer_outputs {
    struct slab out, m_splits, dx, d_weights, dw1, db1, dw2, db2;
};

struct layer {
    const struct op_case *op_case; /* borrowed */
    struct op_inputs inputs;
    struct reference_routing routing;
    struct crew crew;
    struct layer_inputs ranks[HARNESS_MAX_RANKS];
    uint32_t n_tokens[HARNESS_MAX_RANKS];
    double *x[HARNESS_MAX_RANKS], *weights[HARNESS_MAX_RANKS], *dout[HARNESS_MAX_RANKS];
    size_t hidden, ffn, n_local;
    enum epd_status status; /* what a step that routes ends with */
};

/* EPD_TEST_VERBOSE in the environment: the case is named. */
void layer_init(struct layer *layer, struct harness *harness, const struct op_case *op_case);
void layer_fini(struct layer *layer);
/* Gives the case other routing and tokens, of a case with the same sizes; the reference routes anew. */
void layer_reroute(struct layer *layer, uint64_t seed);

void layer_take_outputs(struct layer *layer, struct layer_outputs *outputs);
void layer_poison_outputs(struct layer *layer, const struct layer_outputs *outputs);

struct layer_modes {
    enum epd_saved saved;
    int delay_wgrad, accumulate;
    int parts;                  /* weights and their gradients as lists */
    enum epd_crossing crossing; /* of the forward; the backward takes the same */
};

void layer_forward_plan(struct layer *layer, struct layer_modes modes, const struct layer_outputs *outputs,
                        struct crew_plan *plan);
void layer_backward_plan(struct layer *layer, struct layer_modes modes, const struct layer_outputs *outputs,
                         const struct crew_plan *forward, struct crew_plan *plan);
/* The local plan of one rank. */
void layer_wgrad_plan(struct layer *layer, struct layer_modes modes, const struct layer_outputs *outputs,
                      const struct crew_plan *backward, uint32_t rank, struct crew_plan *plan);

/* Against the reference. */
void layer_check_forward(const struct layer *layer, const struct layer_outputs *outputs);
void layer_check_backward(const struct layer *layer, const struct layer_outputs *outputs);
/* Bit for bit. */
void layer_check_same(const struct layer *layer, const struct layer_outputs *a,
                      const struct layer_outputs *b);

#endif
