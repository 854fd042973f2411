/* The regions of one rank that all plans of its team share: steps of a team run one after the other, so what
 * a step leaves here is nobody's. Each region is allocated by the first plan that needs it and never moves.
 * Lane thread. */
#ifndef EPD_EP_SCRATCH_H
#define EPD_EP_SCRATCH_H

#include "ep/heap.h"
#include "ep/problem.h"

enum scratch_region {
    SCRATCH_SLOTS,       /* [C, H] received rows */
    SCRATCH_DOUT,        /* [C, H] received gradients, while SLOTS holds recomputed rows */
    SCRATCH_Y,           /* [C, H] what combine reads: results, or gradients on their way back */
    SCRATCH_PREACT,      /* [C, 2F] */
    SCRATCH_ACT,         /* [C, F] */
    SCRATCH_ROW_SCALARS, /* [C] f32 */
    SCRATCH_WORKSPACE,   /* of the backend's exchange */
    SCRATCH_DOT,         /* the same, of a weight_grad */
    SCRATCH_REGION_COUNT
};

struct scratch {
    struct backend_block regions[SCRATCH_REGION_COUNT];
};

/* *data: where the region lies (NULL if it takes no bytes); *added_bytes: what it took now (0 if it was
 * there).
 */
EPD_MUST_CHECK enum epd_status scratch_acquire(struct scratch *scratch, struct heap *heap,
                                               const struct problem *problem, enum scratch_region region,
                                               void **data, uint64_t *added_bytes, struct epd_error *error);
void scratch_fini(struct scratch *scratch, struct heap *heap);

#endif
