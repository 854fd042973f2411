/* One execution of a plan set. The daemon submits it when every rank has asked for it; lanes wait for each rank's ready
 * flag, run, and set each rank's done flag themselves. Loop thread; see node.h. */
#ifndef EPD_EP_STEP_H
#define EPD_EP_STEP_H

#include "ep/plan.h"
#include "kernels/tensor.h"

/* What one rank's part came to. */
struct step_rank_result {
    enum epd_status status;
    enum epd_phase phase;       /* where it failed, or NONE */
    struct kernel_error record; /* when status came from a kernel record */
    int64_t rows;        /* received rows in this rank's slabs, before padding (dispatch, moe_forward) */
    int64_t needed_rows; /* capacity the step would have needed */
    int64_t dropped_rows;
    /* Payload sent to other ranks, as if each token had gone straight there, once to each rank that has one of its experts,
     * before drops; the same on every backend and number of nodes. */
    uint64_t wire_bytes;
    uint64_t
        network_bytes; /* sent to and received from other nodes, on this rank's rail: messages whole, as they cross */
    /* payload moved between two buffers for no other reason: 0 on every zero-copy path */
    uint64_t copied_bytes;
    uint64_t flops; /* of the grouped GEMMs */
    /* Where work goes on later: the time its submission took, of a replayed graph all of it in the first phase. */
    uint64_t phase_ns[EPD_PHASE_COUNT];
    uint64_t end_ns; /* CLOCK_MONOTONIC when done was set */
};

struct step_result {
    uint32_t n_ranks;
    const struct step_rank_result *ranks; /* [n_ranks], valid during the callback */
    const int64_t
        *expert_rows; /* [E] rows per expert of this step before drops, NULL if the op routes nothing */
    uint32_t n_experts;
};

typedef void (*step_callback)(void *arg, const struct step_result *result);

/* n_tokens[n_plans] (each at most that plan's T), seq[n_plans] as named by each rank (for its page entries). Allocates
 * nothing once warm. EPD_BUSY when a lane's ring is full; EPD_UNKNOWN_ID when a plan of the set is dead. */
EPD_MUST_CHECK enum epd_status step_submit(struct plan_set *set, const uint32_t *n_tokens,
                                           const uint64_t *seq, step_callback callback, void *arg,
                                           struct epd_error *error);

#endif
