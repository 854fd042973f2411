/* The session page: a sealed memfd that the daemon makes for each session and maps with its client. It holds the host
 * side of the hand-off: per plan a ready and a done word (futexes on the host backend), and the ring of failed launches.
 * The daemon writes everything but `ready` and `read_idx`; the client may write anything, so the daemon never reads back
 * what it wrote to decide anything, and bounds what it reads.
 *
 * Host hand-off of one launch: client sets ready = 1, sends the LAUNCH datagram; the lane waits for ready == 1 and
 * clears it, runs, writes a ring entry if the step failed, adds 1 to `completed` (or `failed`), sets done = 1 and wakes
 * it; the client waits for done == 1 and clears it.
 *
 * On CUDA streams do the same with these words, which both processes register as host memory: the client's stream sets
 * ready, the lane's stream waits for it, runs, and in one write clears it and sets done; the client's stream waits for done
 * and clears both. Host memory, so that either side can end a wait of the other by a plain store. What a step came to is
 * known behind `done`: completed and the ring follow it, and what has not completed when the connection is lost, the client
 * ends itself: so nothing is counted there whose `done` may not come. */
#ifndef EPD_PROTO_PAGE_H
#define EPD_PROTO_PAGE_H

#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>

#include "proto/status.h"

#define EPD_PAGE_MAGIC        0x65706470u /* "epdp" */
#define EPD_PAGE_VERSION      1u
#define EPD_PAGE_MAX_PLANS    512
#define EPD_PAGE_RING_ENTRIES 64

struct page_plan {
    _Atomic uint32_t ready;
    _Atomic uint32_t done;
    _Atomic uint64_t completed; /* launches that ended, failed ones included */
    _Atomic uint64_t failed;
    uint8_t reserved[40];
};

/* One failed launch. Its place is taken by adding 1 to `write_idx`, so that several lanes may report; `stamp` says that
 * it is whole. Reports precede the step's `done`, so a client that has seen `done` finds the step's entry whole. */
struct page_entry {
    uint64_t plan_id;
    uint64_t seq;
    uint32_t status; /* enum epd_status */
    uint32_t phase;  /* enum epd_phase */
    int32_t rank;    /* the rank that is to blame, -1 if none */
    _Atomic uint32_t
        stamp; /* of page_report: low half of the entry's index + 1 once it is whole, 0 while it is written */
    char text[224];
};

struct page {
    uint32_t magic, version;
    uint32_t max_plans, ring_entries;
    _Atomic uint32_t closed; /* enum epd_status once the daemon has closed the session, else 0 */
    uint32_t reserved;
    _Atomic uint64_t write_idx; /* entries ever written; entry i is ring[i % ring_entries] */
    _Atomic uint64_t read_idx;  /* entries the client has taken */
    uint8_t pad[64 - 40];
    struct page_plan plans[EPD_PAGE_MAX_PLANS];
    struct page_entry ring[EPD_PAGE_RING_ENTRIES];
};

_Static_assert(sizeof(struct page_plan) == 64, "one cache line per plan");
_Static_assert(sizeof(struct page_entry) == 256, "ring entries keep their size on the wire");

/* ready and done as one little-endian word of eight bytes, which streams write at once: done set, ready clear. */
#define PAGE_DONE_NOT_READY (1ull << 32)
_Static_assert(offsetof(struct page_plan, ready) % 8 == 0 &&
                   offsetof(struct page_plan, done) == offsetof(struct page_plan, ready) + 4,
               "ready and done are one aligned word");

/* Creates, sizes, seals (shrink, grow, seal) and maps a page; the fd is for the client. Daemon only. */
EPD_MUST_CHECK enum epd_status page_create(struct page **page, int *fd, struct epd_error *error);
/* Maps a page received from the daemon; checks size, seals, magic and version. Client only. The fd stays the caller's. */
EPD_MUST_CHECK enum epd_status page_open(int fd, uint64_t bytes, struct page **page, struct epd_error *error);
void page_close(struct page *page);

/* Daemon, any thread: appends one failure; `stamp` of *entry is ignored. */
void page_report(struct page *page, const struct page_entry *entry);
/* Client: takes the newest entry for the plan that was written after *seen_idx and moves *seen_idx to the end of the ring.
 * Keep one seen_idx per plan: entries of other plans are passed over. 0 if there is none (also when it was overwritten). */
int page_take(struct page *page, uint64_t plan_id, uint64_t *seen_idx, struct page_entry *entry);

/* Shared futex words. flag_set stores 1 and wakes; flag_wait waits until the word is 1 and clears it: spins briefly,
 * then sleeps. deadline_ns is CLOCK_MONOTONIC; EPD_TIMEOUT when it passes. */
void flag_set(_Atomic uint32_t *flag);
EPD_MUST_CHECK enum epd_status flag_wait(_Atomic uint32_t *flag, uint64_t deadline_ns);

#endif
