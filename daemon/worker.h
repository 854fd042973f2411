/* The worker process: the loop, everything that lives on it, and the order in which it starts and stops. The
 * one struct that is passed down; it knows every other part, and only the loop thread touches it (a lane
 * thread only calls the notify function that ep was given, which is uv_async_send).
 *
 * Start: loop, log, failpoints, recorder, fabric, node (lanes), then listeners; only then, and only when all nodes of
 * its fabric are there, the supervisor is told "ready". Stop: listeners, sessions (each ends its groups, plans and buffers), the loop runs until they are
 * gone, node, loop. */
#ifndef EPD_DAEMON_WORKER_H
#define EPD_DAEMON_WORKER_H

#include <uv.h>

#include "daemon/config.h"
#include "daemon/dump.h"
#include "daemon/fabric.h"
#include "daemon/failpoint.h"
#include "daemon/list.h"
#include "daemon/listener.h"
#include "daemon/log.h"
#include "daemon/peer.h"
#include "daemon/quota.h"
#include "daemon/recorder.h"
#include "daemon/registry.h"
#include "daemon/stats.h"
#include "ep/device_watch.h"
#include "ep/node.h"
#include "proto/arena.h"
#include "proto/message.h"

/* Exit codes of a worker, read by the supervisor. */
enum worker_exit {
    WORKER_EXIT_DONE = 0,   /* drained or told to stop: do not restart */
    WORKER_EXIT_CONFIG = 2, /* cannot start with this configuration */
    WORKER_EXIT_FATAL = 3,  /* device context lost, or an invariant broken: restart */
};

/* With the second SIGTERM, or when the sessions do not go away, the worker waits no longer than this. */
#define WORKER_STOP_MS 3000
/* At its end a dump that is being written is waited for, no longer than this. */
#define WORKER_DUMP_MS 1000
/* Hello deadlines, replies crowded out and the end of a drain are looked at this often, while there is something to
 * look for. */
#define WORKER_SWEEP_MS 50
/* From the end of the drain to the end of the process, at most: two deadlines that the sweep looks at, and the dumps. */
#define WORKER_END_MS (WORKER_STOP_MS + 2 * WORKER_SWEEP_MS + WORKER_DUMP_MS)
/* How often the GPUs are asked whether they still work. */
#define WORKER_DEVICE_LOOK_MS 500
/* At most one dump file in this time. */
#define WORKER_DUMP_INTERVAL_NS (10ull * 1000000000ull)

/* What the supervisor hands over; fds are the worker's from then on. */
struct worker_start {
    int rank_fd, control_fd; /* listening sockets */
    int channel_fd;          /* SEQPACKET to the supervisor: its end is our end */
    int recorder_fd;
    uint64_t generation;   /* workers started before this one */
    uint64_t n_hangs;      /* of them, killed because their loop was stuck */
    const char *last_exit; /* how the one before ended; "" if none */
    int supervisor_pid;
};

enum worker_state {
    WORKER_SERVING,  /* everything is allowed */
    WORKER_DRAINING, /* waits for launches in flight, at most until drain_deadline; new joins and sessions are
                        refused */
    WORKER_STOPPING, /* sessions are closed; waits for their jobs, at most WORKER_STOP_MS */
};

struct worker {
    uv_loop_t loop;
    struct config config;
    struct log *log; /* borrowed from main */
    struct worker_start start;
    enum worker_state state;
    enum worker_exit exit_code;
    int fails; /* stops before the loop sleeps again: whoever found the failure may be amid its groups and plans */
    uint64_t started_ns, drain_deadline_ns, stop_deadline_ns, dumped_ns;
    uint32_t n_dumps;
    struct dumps dumps;
    uint8_t boot_id[EPD_BOOT_ID_BYTES];
    uint64_t epoch;

    struct node *node;     /* owned */
    struct fabric *fabric; /* owned; NULL: a node by itself */
    uv_async_t notify;
    uv_signal_t sigterm, sigint;
    uv_poll_t channel;
    uv_timer_t sweep;
    uv_timer_t device_timer;
    struct device_watch *device_watch; /* owned; CUDA only */
    uv_prepare_t before_sleep;         /* ends closed sessions */
    struct listener rank_listener, control_listener;

    enum peer_watch peer_watch; /* how the deaths of clients can be seen here */

    struct registry registry;
    struct accounts accounts;
    struct stats stats;
    struct recorder recorder;
    struct failpoints failpoints;

    struct list sessions; /* struct session, open ones */
    struct list closing;  /* struct session, closed in this turn of the loop */
    struct list groups;   /* struct group, all that exist */
    struct list blocked;  /* struct group: complete steps that a full lane ring refused */
    struct list idle_flights;
    uint32_t n_flights; /* steps on the lanes */

    /* One of each for all sessions: the loop handles one datagram at a time. */
    struct arena arena;
    struct message message;
    unsigned char received[EPD_MAX_DATAGRAM_BYTES];
    unsigned char encoded[EPD_MAX_DATAGRAM_BYTES];
};

/* Runs until told to stop; returns the exit code. */
int worker_run(const struct worker_start *start, struct log *log);

/* Begins to drain; does nothing when already draining or stopping. */
void worker_drain(struct worker *worker);
/* Closes every session for the reason and ends the loop. */
void worker_stop(struct worker *worker, enum close_reason reason, enum worker_exit code);
/* The devices or an invariant are lost: logs, writes the flight recorder; stops, before the loop sleeps again, so that the
 * supervisor restarts. Legal anywhere. */
void worker_fail(struct worker *worker, const struct epd_error *error);
/* Writes the flight recorder beside the control socket, at most once in WORKER_DUMP_INTERVAL_NS. */
void worker_dump(struct worker *worker, const char *why);
/* All nodes of the fabric are there for the first time: the worker is ready. */
void worker_fabric_complete(struct worker *worker);
/* A new epoch: a group's membership changed. */
uint64_t worker_next_epoch(struct worker *worker);
/* Something that the sweep looks at has begun (a session that has yet to say Hello, a reply crowded out). */
void worker_watch(struct worker *worker);

#endif
