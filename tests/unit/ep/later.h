/* A node where work goes on later, without CUDA and NCCL: the backend is the host's, said to work later, the rails are those
 * over the fake of NCCL, kernels leave what the test says, and the other node is made up. Wraps lane_start and
 * transport_find. One at a time. */
#ifndef EPD_TESTS_UNIT_EP_LATER_H
#define EPD_TESTS_UNIT_EP_LATER_H

#include <stdatomic.h>

#include "ep/backend.h"
#include "ep/hop.h"

#define N_RANKS      2 /* of this node, which is node 0 of 2; each has a lane */
#define MAX_TOKENS   16
#define HIDDEN       12
#define N_EXPERTS    8
#define TOP_K        2
#define ROW_BYTES    (4 * HIDDEN)
#define CHOICE_BYTES (4 * TOP_K)
#define TOLD_BYTES   512 /* heads and counts */
#define REPORT_BYTES sizeof(struct hop_report)

/* Set by the test, any thread; took, n_to_give_back and n_disturbed by the lanes. */
struct later {
    struct backend_queue *_Atomic held;  /* a queue in which nothing ends */
    struct page_plan *_Atomic absent;    /* of a client that has not come: all queues wait for its flag */
    _Atomic uint32_t sends[N_RANKS];     /* tokens that cross to the other node */
    _Atomic uint32_t comes[N_RANKS];     /* and from there */
    _Atomic uint32_t took[N_RANKS];      /* tokens of the other node's set, as kernels were told */
    _Atomic int choose_fails, set_fails; /* on rank 1, once */
    _Atomic int no_head,
        other_overflows;             /* of the other node: its heads are none; its kernels have met that */
    _Atomic uint32_t n_to_give_back; /* of rank 0's device, when it is idle */
    _Atomic uint32_t n_disturbed;    /* times that it gave back while its queue had work */
};

extern struct later later;
extern struct backend later_backend; /* made by later_reset, before any lane runs */

/* Everything goes well, and nothing crosses yet. The caller destroys fake_nccl.queue_stream. */
void later_reset(void);

#endif
