/* Inside of a node, for the files of ep. */
#ifndef EPD_EP_NODE_IMPL_H
#define EPD_EP_NODE_IMPL_H

#include "ep/lane.h"

/* Longer than a step takes to be broken off (STEP_DEAD_NS): what has not ended by then is a kernel that never will. */
#define NODE_STEP_LOST_NS 120000000000ull

struct node {
    const struct backend *backend;
    uint32_t n_devices;
    struct lane *lanes[EPD_MAX_DEVICES]; /* owned */
    uint32_t comm_blocks;                /* for communication kernels; 0: their default */
    int replays;                         /* steps may be replayed as graphs; fixed while steps run */
    uint64_t step_lost_ns; /* a step that runs so long costs its device; fixed while steps run */
    uint64_t n_sets;       /* plan sets ever joined: their identities */
    /* Loop thread: blocks that the fused ops of all teams may hold at once on each device. */
    uint32_t resident_blocks[EPD_MAX_DEVICES];
};

#endif
