/* What a plan keeps of a step until a later plan has used it: a block of the heap, within the session's
 * budget. moe_forward keeps received rows and pre-activations for moe_backward; a moe_backward that delays
 * its weight gradients keeps what moe_wgrad needs and the forward plan does not hold already. */
#ifndef EPD_EP_SAVED_H
#define EPD_EP_SAVED_H

#include "ep/backend.h"
#include "ep/layout.h"
#include "ep/problem.h"

enum saved_part {
    SAVED_RECV_X = 1,
    SAVED_PREACT = 2, /* backward turns it into the gradient of the pre-activation, in place */
    SAVED_DOUT = 4,
    SAVED_ACT = 8, /* the weighted activation */
};

struct saved_context {
    struct backend_block block; /* owned by the plan */
    void *recv_x;               /* [C, H] */
    void *preact;               /* [C, 2F] */
    void *dout;                 /* [C, H] */
    void *act;                  /* [C, F] */
};

/* parts: a sum of enum saved_part. 0 bytes for no part. */
uint64_t saved_bytes(const struct problem *problem, unsigned parts);
/* The block is allocated; parts that are not asked for stay NULL. */
void saved_carve(struct saved_context *saved, const struct problem *problem, unsigned parts);

#endif
