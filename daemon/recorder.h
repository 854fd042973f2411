/* The flight recorder: the last RECORDER_N_ENTRIES steps, each with the times at which it reached its phases.
 * It lies in a memfd that the supervisor holds too, so that a worker that crashed leaves its record behind.
 * The worker's loop thread writes; the supervisor reads after the worker's death. No allocation per step. */
#ifndef EPD_DAEMON_RECORDER_H
#define EPD_DAEMON_RECORDER_H

#include <jansson.h>
#include <stdint.h>

#include "proto/status.h"
#include "proto/words.h"

#define RECORDER_N_ENTRIES  2048
#define RECORDER_MAGIC      0x65706466u /* "epdf" */
#define RECORDER_TEXT_BYTES 96

enum recorder_state {
    RECORDER_EMPTY = 0,
    RECORDER_GATHERING, /* some ranks have asked, others are missing */
    RECORDER_RUNNING,   /* submitted to the lanes */
    RECORDER_DONE,      /* ended; status says how */
};

/* One step of a group. Times are CLOCK_MONOTONIC nanoseconds, 0 = not reached. */
struct recorder_entry {
    uint64_t serial;            /* number of this entry, from 1 */
    uint64_t group_id, ordinal; /* n-th collective step of the group; 0 for a local op */
    uint64_t plan_id;           /* of the first rank that asked */
    uint64_t first_ns, last_ns; /* first and last rank's request */
    uint64_t submit_ns, end_ns;
    uint64_t arrived; /* bit r: rank r has asked */
    uint32_t world_size;
    uint32_t op;                        /* enum epd_op */
    uint32_t state;                     /* enum recorder_state */
    uint32_t status;                    /* enum epd_status */
    uint32_t phase;                     /* enum epd_phase in which it failed */
    int32_t rank;                       /* to blame, -1 if none */
    uint64_t phase_ns[EPD_PHASE_COUNT]; /* slowest rank */
    char text[RECORDER_TEXT_BYTES];
};

struct recorder_ring {
    uint32_t magic, n_entries;
    uint64_t n_written;
    struct recorder_entry entries[RECORDER_N_ENTRIES];
};

struct recorder {
    struct recorder_ring *ring; /* owned mapping */
};

/* Makes the memfd; owned by the caller. */
EPD_MUST_CHECK enum epd_status recorder_create(int *fd, struct epd_error *error);
/* Maps it; the fd stays the caller's. */
EPD_MUST_CHECK enum epd_status recorder_open(struct recorder *recorder, int fd, struct epd_error *error);
void recorder_close(struct recorder *recorder);
/* Forgets all entries: a new worker starts. */
void recorder_clear(struct recorder *recorder);

/* The next entry, zeroed but for its serial. */
struct recorder_entry *recorder_begin(struct recorder *recorder);
/* The entry of this serial, NULL once newer ones have taken its place. */
struct recorder_entry *recorder_find(struct recorder *recorder, uint64_t serial);

/* A copy of the entries as they are now, for another thread to read. */
EPD_MUST_CHECK enum epd_status recorder_copy(const struct recorder *recorder, struct recorder *copy,
                                             struct epd_error *error);
void recorder_copy_free(struct recorder *copy);

/* [{serial, group_id, ordinal, plan_id, op, state, status, phase, rank, missing [rank], age_ms, gather_ns,
 * wait_ns, run_ns, phase_ns {}, text}], oldest first; wait_ns is from the last request to the submission.
 * NULL without memory. */
json_t *recorder_document(const struct recorder *recorder, uint64_t now_ns);

#endif
