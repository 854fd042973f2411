/* The thread that submits work to one device, and the two rings between it and the loop thread.
 *
 * A job is run on the lane thread, then polled there until it has ended, then completed on the loop thread.
 * Jobs run in the order they were given, one at a time; a job that needs polling holds up neither the next
 * one's run nor its end: it may be waiting for a client that waits for the other. What guarantees that neither
 * lanes nor the queues they fill wait for each other in opposite orders is said in node.h. */
#ifndef EPD_EP_LANE_H
#define EPD_EP_LANE_H

#include "ep/backend.h"
#include "ep/heap.h"

struct lane;

/* Embedded in what it works on. */
struct lane_job {
    void (*run)(struct lane_job *job, struct lane *lane); /* lane thread */
    int (*poll)(struct lane_job *job, struct lane *lane); /* lane thread: 1 = ended; NULL: ended with run */
    void (*complete)(struct lane_job *job);               /* loop thread; may free the job */
    const char *what; /* static; for who asks what a lane does that does not go on. NULL: a step or a plan */
    struct lane_job *next; /* of the lane */
};

/* Starts the thread and opens the device on it. notify runs on the lane thread. */
EPD_MUST_CHECK enum epd_status lane_start(const struct backend *backend, const struct node_config *config,
                                          uint32_t device_idx, struct lane **lane, struct epd_error *error);
/* All jobs have been completed. */
void lane_stop(struct lane *lane);

/* Loop thread from here on. */
int lane_has_room(const struct lane *lane);
/* The lane has room. */
void lane_submit(struct lane *lane, struct lane_job *job);
/* Never refused: waits on the loop's side while the ring is full, and later jobs wait behind it. */
void lane_post(struct lane *lane, struct lane_job *job);
/* Completes ended jobs; returns how many. */
uint32_t lane_poll(struct lane *lane);
/* Sleeps until a job may have ended, some ms at most: it may wait for a lane whose jobs wait on the loop's side. Returns at
 * once if none is out. */
void lane_wait(struct lane *lane);
/* Jobs given and not yet completed. */
uint32_t lane_n_jobs(const struct lane *lane);
void lane_info(const struct lane *lane, struct device_info *info);
/* What the lane is at, as its job says; never NULL. If it does not go on, this is why. */
const char *lane_doing(const struct lane *lane);
/* As lane_lose_device: what was promised to clients of this device cannot be kept. */
void lane_give_up(struct lane *lane, const struct epd_error *error);

/* Lane thread: what jobs work with. */
const struct backend *lane_backend(const struct lane *lane);
struct backend_device *lane_device(struct lane *lane);
struct heap *lane_heap(struct lane *lane);
/* The device does not do what it was given: nothing that was promised in its queues will come. The process has to
 * end, and device_watch says so to the loop. Keeps the first error. Lane thread. */
void lane_lose_device(struct lane *lane, const struct epd_error *error);
/* EPD_OK, or what the device was lost by. Lane thread. */
EPD_MUST_CHECK enum epd_status lane_check_device(struct lane *lane, struct epd_error *error);
/* Counts an import (bytes newly mapped, +1) or its end (bytes unmapped, -1) for lane_info. */
void lane_count_import(struct lane *lane, int64_t bytes, int imports);

#endif
