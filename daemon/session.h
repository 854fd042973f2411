/* A connection: everything the worker holds for one client. Loop thread.
 *
 * Lifetime: session_open makes it; session_close (idempotent, with a reason, legal anywhere) marks it, and
 * before the loop sleeps again session_end_closed takes its groups, plans and buffers away - so nothing that
 * is in use further up the stack disappears. The struct goes when the poll handles are closed and every ep job
 * that was begun for it has called back. A rank costs two fds: its socket and the pidfd of its process. */
#ifndef EPD_DAEMON_SESSION_H
#define EPD_DAEMON_SESSION_H

#include <sys/socket.h>
#include <uv.h>

#include "daemon/close_reason.h"
#include "daemon/list.h"
#include "daemon/quota.h"
#include "daemon/session_output.h"
#include "daemon/worker.h"
#include "proto/message.h"
#include "proto/page.h"

/* Datagrams handled per wake-up, so that one busy client does not starve the others. */
#define SESSION_BATCH 32
enum session_state {
    SESSION_OPENING, /* rank socket only: waits for Hello until the hello timer; anything else closes it
                        (bad_state) */
    SESSION_OPEN,    /* requests are answered; a second Hello closes it (bad_state) */
    SESSION_CLOSING, /* nothing is read or sent any more; waits for its end in this turn of the loop, then for
                        jobs of ep */
    SESSION_STATE_COUNT
};

struct session {
    struct worker *worker; /* borrowed, outlives this */
    struct list in_worker; /* sessions, or closing until its end */
    uint64_t id;
    enum session_kind kind;
    enum session_state state;
    enum close_reason reason; /* once closing */
    char detail[160];         /* once closing: what happened */
    int fd;                   /* owned */
    uv_poll_t poll;
    int peer_fd;         /* owned pidfd of the client's process; -1: not watched (control, or not possible) */
    uv_poll_t peer_poll; /* while peer_fd is there */
    int events;          /* what the poll handle waits for */
    uint32_t n_pauses;   /* members whose launch queue is full: nothing is read while there is one */
    struct ucred peer;
    char name[EPD_MAX_NAME_BYTES];
    uint64_t features;

    struct page *page; /* owned mapping; NULL before Hello and on the control socket */
    uint64_t flags_used[EPD_PAGE_MAX_PLANS / 64];
    struct quota quota;

    struct output *first_output, *last_output; /* owned */
    size_t output_bytes;
    uint32_t n_output_fds;
    int crowded; /* PACKET_CROWDED: the first output waits for the worker's sweep, not for the socket */

    struct list members; /* struct member: groups it is in or waits for */
    struct list plans;   /* struct rank_plan */
    struct list buffers; /* struct buffer */

    uint32_t n_holds; /* poll handles, ep jobs, plans that are not gone */
    uint64_t opened_ns, active_ns, n_requests;
};

/* Takes over fd on success. The peer has passed the listener's checks; the quota is counted here. */
EPD_MUST_CHECK enum epd_status session_open(struct worker *worker, enum session_kind kind, int fd,
                                            const struct ucred *peer, struct epd_error *error);
/* detail: what happened in this case; NULL: the reason's own text. */
void session_close(struct session *session, enum close_reason reason, const char *detail);
/* Ends every session that was closed: tells its client (CLOSED, best effort) and its groups. Called once per
 * turn of the loop, from its own callback. */
void session_end_closed(struct worker *worker);

/* A reason for the struct to live on: an ep job that will call back with it. */
void session_hold(struct session *session);
void session_release(struct session *session);

/* Stops and resumes reading; counted. */
void session_pause(struct session *session);
void session_resume(struct session *session);

/* A place in the session page. EPD_QUOTA when all are taken. */
EPD_MUST_CHECK enum epd_status session_flag_acquire(struct session *session, uint32_t *flag_idx,
                                                    struct epd_error *error);
void session_flag_release(struct session *session, uint32_t flag_idx);

/* Reads unless it is paused; also writes while output waits for the socket. */
void session_wait_as_needed(struct session *session);
/* OPENING -> OPEN after Hello. */
void session_opened(struct session *session);
/* 1 if the peer has closed its end and nobody has noticed yet. */
int session_hung_up(const struct session *session);
const char *session_state_name(enum session_state state);

#endif
