/* What a device gives back when nothing is left in its queues (device_give_back): memory that CUDA unmaps only then. The end
 * of a step may be such a moment. Under constant load none comes: then the lane takes no new job for some ms, until what its
 * queues have has been done (ep/reclaim.c says for how long and how often). So memory stays mapped only while something in a
 * queue of this device waits for a client, or runs, longer than that. Lane thread; belongs to the lane. */
#ifndef EPD_EP_RECLAIM_H
#define EPD_EP_RECLAIM_H

#include "ep/backend.h"

struct reclaim {
    const struct backend *backend; /* borrowed */
    struct backend_device *device; /* borrowed */
    int waits;                     /* something is to be given back */
    uint64_t patience_ns, hold_ns; /* of the next time */
    uint64_t hold_from_ns, hold_until_ns;
};

void reclaim_init(struct reclaim *reclaim, const struct backend *backend, struct backend_device *device);
/* Behind every job and as often as the lane comes round: 1 if something can be given back now. */
int reclaim_look(struct reclaim *reclaim);
/* Then: returns the bytes of imports unmapped. */
uint64_t reclaim_end(struct reclaim *reclaim);
/* 1 if the lane is to take no job now. What it was given before goes on. */
int reclaim_holds(const struct reclaim *reclaim);

#endif
