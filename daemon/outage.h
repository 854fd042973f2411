/* What the supervisor answers on the control socket while no worker runs: why, since when, and when it tries
 * again. Supervisor. */
#ifndef EPD_DAEMON_OUTAGE_H
#define EPD_DAEMON_OUTAGE_H

#include <stdint.h>

struct outage {
    const char *worker; /* "waiting" or "failed" */
    uint64_t generation, failures, restart_in_ms;
    const char *last_exit;
};

/* A caller that says nothing is waited for this long; the supervisor has nothing else to do. */
#define OUTAGE_READ_MS 200

/* Accepts and answers one caller of the listening socket. */
void outage_answer(int listen_fd, const struct outage *outage);

#endif
