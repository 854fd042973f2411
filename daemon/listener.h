/* One listening socket: accepts, looks at the peer's credentials, keeps the connection limits, and survives
 * running out of fds. Refused peers are told why in a CLOSED message. Loop thread. */
#ifndef EPD_DAEMON_LISTENER_H
#define EPD_DAEMON_LISTENER_H

#include <uv.h>

struct worker;

/* Connections taken per wake-up, so that a flood of them does not starve the sessions. */
#define LISTENER_BATCH 64
/* After EMFILE nobody is accepted for this long. */
#define LISTENER_PAUSE_MS 100

enum session_kind {
    SESSION_RANK = 1,    /* rank socket: Hello, groups, buffers, plans, launches */
    SESSION_CONTROL = 2, /* control socket: CONTROL requests only */
};

struct listener {
    struct worker *worker; /* borrowed */
    enum session_kind kind;
    int fd;       /* owned, listening, non-blocking; -1 when stopped */
    int spare_fd; /* owned: given up for a moment to accept and refuse one peer when fds run out; -1 if none
                   */
    uv_poll_t poll;
    uv_timer_t pause;
    int started;
};

/* Takes over fd. Aborts on libuv errors, which only misuse can cause. */
void listener_start(struct listener *listener, struct worker *worker, enum session_kind kind, int fd);
/* Idempotent. */
void listener_stop(struct listener *listener);

#endif
