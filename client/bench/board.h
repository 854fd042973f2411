/* The shared memory in which the ranks of one job meet: what to measure, a barrier, every rank's samples and
 * its last words. The parent makes it, the ranks inherit its fd. */
#ifndef EPD_BENCH_BOARD_H
#define EPD_BENCH_BOARD_H

#include <stdatomic.h>
#include <stddef.h>

#include "client/bench/counted.h"
#include "client/bench/job.h"

#define BOARD_TEXT_BYTES 320

struct board_shared;

/* Of JOB_PEER_LOSS: one killed rank. Times of clock_ns; 0: not yet. Rank i writes its own words, the parent the others. */
struct board_loss {
    _Atomic uint32_t n_ready; /* ranks that work, and the spare */
    _Atomic uint32_t go_on;   /* the survivors shall make the next group with the spare */
    _Atomic double killed_ns;
    double told_ns[JOB_MAX_RANKS];   /* a survivor's step has ended EPD_PEER_LOST */
    double served_ns[JOB_MAX_RANKS]; /* its first step in the next group is done */
};

struct board {
    struct board_shared *shared; /* owned mapping */
    size_t bytes;
    int fd; /* owned */
};

/* Parent: for this job and, with the same ranks, others of up to max_iterations, warm-up included. EPD_SYSTEM after printing why. */
enum epd_status board_create(struct board *board, const struct job *job, uint32_t max_iterations);
/* Rank: fd as inherited, taken over. */
enum epd_status board_open(struct board *board, int fd);
void board_close(struct board *board);

const struct job *board_job(const struct board *board);

/* Rank: iterations of the largest job, with what comes before them. */
uint32_t board_max_marks(const struct board *board);
/* Parent: the ranks have finished their job and shall do this one; what is known of the last one is gone. */
void board_next_job(struct board *board, const struct job *job);
/* Parent: there is no further job. */
void board_no_more_jobs(struct board *board);
/* Rank: waits for the job after number *turn, 0 before the first. 0 if there is none, or after board_abort. */
int board_wait_job(struct board *board, uint32_t *turn);
/* Rank: its part of the job is done. */
void board_finish(struct board *board);
/* Parent: waits for at most 100 ms until all ranks have finished. EPD_TIMEOUT if they have not, EPD_EVICTED if a signal was
 * caught meanwhile. */
enum epd_status board_wait_finished(struct board *board);

/* [n_iterations] nanoseconds of one rank; of JOB_LINK GB/s. */
double *board_samples(const struct board *board, uint32_t rank);
/* [n_iterations] nanoseconds that the launches took on the host, CUDA backend. */
double *board_launches(const struct board *board, uint32_t rank);
/* GPU memory that the group took on the rank's device beyond the rank's own buffers; -1: not known. */
double *board_memory(const struct board *board, uint32_t rank);
/* The sentence with which a rank failed; "" if it did not. */
char *board_text(const struct board *board, uint32_t rank);
struct board_loss *board_loss(const struct board *board);
/* What rank 0 learned from the daemon's stats about the job. */
struct counted *board_counted(const struct board *board);

/* Waits for all ranks. EPD_PEER_LOST after board_abort, EPD_TIMEOUT when a rank does not come. */
enum epd_status board_barrier(struct board *board);
void board_abort(struct board *board);

#endif
