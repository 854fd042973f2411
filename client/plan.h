/* struct epd_plan: an op bound to buffers, and its place in the session page. Ended by epd_plan_destroy or
 * with its group.
 *
 * Threads: launch, wait and check may run on different threads; one thread waits at a time. */
#ifndef EPD_CLIENT_PLAN_H
#define EPD_CLIENT_PLAN_H

#include <stdatomic.h>

#include "client/buffer.h"

/* Host backend: one launch at a time. CUDA: idle or in flight, whatever their number. */
enum plan_state {
    PLAN_IDLE = 0,  /* a launch takes it to PLAN_BEGINNING, with EPD_BUSY for everybody who comes second */
    PLAN_BEGINNING, /* the launching thread sets flags and sends; waits pass by, as before the launch */
    PLAN_IN_FLIGHT, /* the wait that sees the end takes it to PLAN_IDLE */
};

struct epd_plan {
    struct epd_group *group; /* borrowed: ends its plans before itself */
    /* as it was asked for; bindings owned, their ids of the current daemon */
    struct message_plan_create create;
    struct epd_buffer **buffers; /* [create.n_bindings], borrowed: a buffer outlives the plans bound to it */
    struct epd_plan *context;    /* NULL or one reference */
    atomic_uint references;      /* the caller's and one per plan that has it as context */
    struct message_reply_plan reply;
    uint32_t max_tokens;     /* T */
    atomic_uint n_tokens;    /* of the next launch */
    struct page_plan *flags; /* in the connection's page */
    void *stream_words;      /* CUDA: the same for streams; of stream_ops bind */

    atomic_uint state;        /* enum plan_state */
    atomic_ullong n_launched; /* CUDA: since it was bound */
    uint64_t n_released;      /* CUDA: of these, after a loss; watcher thread */
    atomic_uint untaken;      /* CUDA: since it was bound, a launch was sent that its stream did not take */
    atomic_uint waiting;      /* a thread is in epd_plan_wait */
    uint64_t ended_before,
        failed_before;      /* page counters when the launch in flight began, or was last asked for */
    atomic_ullong last_seq; /* of the last launch */
    atomic_ullong launches, failed_launches;
    uint64_t seen_idx;          /* of page_take */
    pthread_mutex_t lock;       /* guards failure, seen_idx, and failed_before of a launch in flight */
    struct epd_failure failure; /* status EPD_OK: none yet */
    TAILQ_ENTRY(epd_plan) link;
};

/* Creates the plan in the daemon that its group is being recovered to. Not while it is
 * in flight. */
EPD_MUST_CHECK enum epd_status plan_restore(struct epd_plan *plan, struct epd_error *error);
/* Frees without telling the daemon. */
void plan_free(struct epd_plan *plan);

#endif
