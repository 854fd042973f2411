/* The shared memory in which the ranks of one job meet: what to measure, a barrier, every rank's samples and
 * its last words. The parent makes it, the ranks inherit its fd. */
#ifndef EPD_BENCH_BOARD_H
#define EPD_BENCH_BOARD_H

#include <stddef.h>

#include "client/bench/job.h"

#define BOARD_TEXT_BYTES 320

struct board_shared;

struct board {
    struct board_shared *shared; /* owned mapping */
    size_t bytes;
    int fd; /* owned */
};

/* Parent. EPD_SYSTEM after printing why. */
enum epd_status board_create(struct board *board, const struct job *job);
/* Rank: fd as inherited, taken over. */
enum epd_status board_open(struct board *board, int fd);
void board_close(struct board *board);

const struct job *board_job(const struct board *board);
/* [n_iterations] nanoseconds of one rank. */
double *board_samples(const struct board *board, uint32_t rank);
/* The sentence with which a rank failed; "" if it did not. */
char *board_text(const struct board *board, uint32_t rank);
/* What rank 0 learned from the daemon's stats: bytes copied on the way, or -1. */
double *board_copied_bytes(const struct board *board);

/* Waits for all ranks. EPD_PEER_LOST after board_abort, EPD_TIMEOUT when a rank does not come. */
enum epd_status board_barrier(struct board *board);
void board_abort(struct board *board);

#endif
