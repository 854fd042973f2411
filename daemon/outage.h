/* What the supervisor answers on the control socket while no worker serves: why, since when, and when it tries
 * again. Supervisor. */
#ifndef EPD_DAEMON_OUTAGE_H
#define EPD_DAEMON_OUTAGE_H

#include <stdint.h>

struct outage {
    const char
        *worker; /* "ending" (or killed, and not gone yet), "stuck", "waiting" for its start, or "starting" */
    uint64_t generation, hangs, failures, restart_in_ms;
    const char *last_exit;
};

/* A caller that says nothing is waited for this long, and keeps those behind it waiting. */
#define OUTAGE_READ_MS 40

/* How long a worker that starts may take before callers are answered in its place: with many GPUs it takes seconds. */
#define OUTAGE_PATIENCE_MS 40

/* How often it is looked whether a worker that lets callers wait is ending. */
#define OUTAGE_LOOK_MS 5

/* Accepts and answers one caller of the listening socket. */
void outage_answer(int listen_fd, const struct outage *outage);

#endif
