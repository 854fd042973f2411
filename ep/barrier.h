/* Where the lanes of one step meet between two stages. Reusable; lane threads.
 *
 * Waiting is bounded by the work of the stage before: every lane that takes part has the step in its ring,
 * and stages do not block (node.h, "Order"). A lane that cannot go on aborts the barrier: then nobody waits
 * in it any more, and the lanes meet again at the step's last barrier, which is never aborted. */
#ifndef EPD_EP_BARRIER_H
#define EPD_EP_BARRIER_H

#include <stdatomic.h>
#include <stdint.h>

struct barrier {
    uint32_t n_lanes;
    _Atomic uint32_t n_arrived;
    _Atomic uint32_t generation; /* futex word; moves when all have arrived, and on abort */
    _Atomic uint32_t aborted;
};

void barrier_init(struct barrier *barrier, uint32_t n_lanes);
/* 1 when all lanes have arrived; 0 when the barrier was aborted. */
int barrier_wait(struct barrier *barrier);
/* The same for a lane that does not wait in it: it arrives, once, and looks until it is told. */
uint32_t barrier_arrive(struct barrier *barrier);
enum barrier_seen { BARRIER_ABORTED, BARRIER_PASSED, BARRIER_NOT_YET };
/* arrived: what barrier_arrive returned. Looks for a few microseconds at most. */
enum barrier_seen barrier_look(struct barrier *barrier, uint32_t arrived);
void barrier_abort(struct barrier *barrier);

#endif
