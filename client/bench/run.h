/* Jobs, run: starts the ranks, waits for them, condenses their times. */
#ifndef EPD_BENCH_RUN_H
#define EPD_BENCH_RUN_H

#include <sys/types.h>

#include "client/bench/board.h"

struct result {
    double median_ns, p10_ns, p90_ns, p99_ns, min_ns; /* of an iteration: the slowest rank's time */
    uint32_t slowest_rank;                            /* with the largest median of its own */
    double slowest_rank_median_ns;
    double launch_ns; /* host time of a launch, median of the rank with the largest; 0: not measured alone */
    double memory_bytes; /* board_memory of the rank with the most; -1: not known */
    double agreement_ns, n_agreed,
        n_ahead;            /* of nodes about a step: mean, steps, those ahead; n_agreed 0: none */
    struct counted counted; /* by the daemon of rank 0 during the job, warm-up included */
};

/* Starts rank process number `rank`, which finds its job on the board. */
enum epd_status run_start_rank(const struct board *board, uint32_t rank, pid_t *pid);

/* JOB_LINK: GB/s that leave a GPU while all GPUs store to all others, median. Errors have been printed. */
enum epd_status run_link(const struct job *job, double *gb_per_s);

/* The rank processes of a benchmark, which do one job after the other. One owner, the parent. */
struct crew {
    struct board board;
    pid_t pids[JOB_MAX_RANKS];
    uint32_t n_ranks;        /* running; 0: none */
    uint32_t max_iterations; /* of the largest job, warm-up included */
};

/* Starts no process yet. */
void crew_init(struct crew *crew, uint32_t max_iterations);
/* Starts the ranks if they do not run, gives them the job, waits for it. All jobs of a crew have the same number of ranks. After a
 * failure the ranks are gone, and the next job starts them again. Errors have been printed, with the rank that failed first.
 * EPD_EVICTED: a signal wants the benchmark to end. */
enum epd_status crew_run(struct crew *crew, const struct job *job, struct result *result);
/* Ends the ranks. */
void crew_fini(struct crew *crew);

#endif
