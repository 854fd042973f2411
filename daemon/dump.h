/* The flight recorder written out beside the loop. A full recorder is a megabyte of JSON and tens of milliseconds of
 * work, which every launch and every scraper would wait for: a copy is formatted on a thread of its own.
 *
 * Loop thread. A dump that runs holds its session, if it answers one. */
#ifndef EPD_DAEMON_DUMP_H
#define EPD_DAEMON_DUMP_H

#include <jansson.h>
#include <stdatomic.h>
#include <stdint.h>

#include "daemon/list.h"
#include "proto/status.h"

struct session;
struct worker;

/* Running at once. More are refused with EPD_BUSY, or, where nobody has asked, left out. */
#define DUMP_MAX_RUNNING 4

struct dumps {
    struct list running; /* struct dump */
    uint32_t n_running;
    atomic_uint n_ended; /* by their threads, not yet looked at */
};

void dump_init(struct dumps *dumps);
/* Into a file beside the control socket, or in the configured directory; logs where, or why not. */
void dump_to_file(struct worker *worker, const char *why);
/* The same, and at once where it cannot be done beside the loop: for a worker that is about to end (dump_settle). */
void dump_to_file_last(struct worker *worker, const char *why);
/* Answers a control session with the document; takes header, which gets the ops. */
void dump_answer(struct session *session, uint64_t request_id, json_t *header);
/* Ends what the threads have ended; called whenever the loop is notified. */
void dump_poll(struct worker *worker);
/* Waits for those under way, but no longer than this: a disk may not answer. 1: none is left; else the process has to end with
 * their threads in it. */
EPD_MUST_CHECK int dump_settle(struct worker *worker, uint64_t limit_ms);

#endif
