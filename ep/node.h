/* The devices of this daemon and the lanes that submit work to them; the one object through which the daemon reaches ep.
 *
 * Threads: everything in node.h, memory.h, team.h, plan.h and step.h is called on the loop thread and never blocks on a
 * device: work that may (CUDA calls, allocations, kernels) is a job for a lane thread. Jobs end through the callback
 * their caller gave; callbacks run inside node_poll, on the loop thread. A lane tells the loop that there is something to
 * poll by calling config.notify (from the lane thread; uv_async_send fits).
 *
 * Order: one lane is one FIFO. The loop thread submits a step to all its lanes in one go, so any two steps reach all lanes
 * in the same order, and a lane that waits for another inside a step waits for work that is already ahead of it there:
 * no two groups can wait for each other in opposite orders. A step of a team that spans nodes (hop.h) also waits for
 * lanes of other nodes: all nodes submit such steps in one order, which the caller sees to (fabric_coordinator.h).
 *
 * Steps that wait for a client before they are all submitted (eager ones, where work goes on later) must not hold up what is
 * behind them on a lane. They are patient, and with them all steps of their team from its first eager plan on: where such a
 * step would wait, for its client or for another lane, it gives the lane to other jobs and is looked at again. What goes into
 * the team's queues keeps its order all the same: it takes its turn (team_impl.h). So a lane waits only in steps that no
 * client can hold up, for lanes that come to them without waiting for this one.
 *
 * On devices that work by themselves two groups may stand in opposite orders, for their clients come when they like. What
 * keeps them from waiting for each other: each has a queue of its own on every device, and no two queues share a hardware
 * channel, so one that waits for a client holds up no other; no kernel that waits for another device begins before the
 * clients of all its ranks have come (step_lane.c); and such kernels of all groups of a device fit on it together, with
 * room to spare for the others' (team.c), so each of them runs whatever else waits. The same goes for the swaps of rails
 * (transport.h), which wait on the device for other nodes: their blocks and streams are counted with the others. */
#ifndef EPD_EP_NODE_H
#define EPD_EP_NODE_H

#include "proto/limits.h"
#include "proto/status.h"
#include "proto/words.h"

struct node;

struct node_config {
    /* HOST or CUDA; the daemon has resolved "auto" with node_backend_available */
    enum epd_backend_kind backend;
    uint32_t n_devices;  /* host: emulated devices (1..EPD_MAX_DEVICES); CUDA: 0 = all */
    const char *devices; /* CUDA: comma list of indices or UUIDs, NULL = all; borrowed during node_open */
    uint64_t heap_limit_bytes; /* of owned memory per device; 0 = no limit */
    const char *gemm_engine;   /* NULL = best; a name that is absent fails node_open */
    uint32_t comm_blocks;      /* CUDA: blocks for communication; 0 = default */
    int graphs;                /* CUDA: plans are replayed as graphs where steps are alike */
    void (*notify)(void *arg);
    void *notify_arg;
};

struct device_info {
    uint8_t uuid[EPD_UUID_BYTES];
    char name[EPD_MAX_NAME_BYTES];
    uint64_t memory_bytes;      /* of the device */
    uint32_t n_multiprocessors; /* CUDA; else 0 */
    uint64_t heap_bytes;        /* owned memory now: buffers, workspaces, saved contexts */
    uint64_t heap_peak_bytes;
    uint64_t imported_bytes; /* mapped client memory now */
    uint32_t n_imports;
    uint64_t jobs_done, jobs_queued;
    uint64_t busy_ns; /* time the lane spent in jobs */
};

/* 1 if this build and this machine can run the backend; otherwise 0 and the reason. */
int node_backend_available(enum epd_backend_kind backend, struct epd_error *reason);

EPD_MUST_CHECK enum epd_status node_open(const struct node_config *config, struct node **node,
                                         struct epd_error *error);
/* Ends the lanes after the jobs already queued, runs the remaining callbacks, frees. All teams, plans and memories of the
 * caller must be released before. */
void node_close(struct node *node);

/* Runs the callbacks of ended jobs; returns how many. */
uint32_t node_poll(struct node *node);

enum epd_backend_kind node_backend(const struct node *node);
uint32_t node_n_devices(const struct node *node);
void node_device_info(const struct node *node, uint32_t device_idx, struct device_info *info);
/* EPD_INVALID_DEVICE naming the UUIDs there are, if none has it. */
EPD_MUST_CHECK enum epd_status node_find_device(const struct node *node, const uint8_t uuid[EPD_UUID_BYTES],
                                                uint32_t *device_idx, struct epd_error *error);

#endif
