/* One job, run: starts the ranks, waits for them, condenses their times. */
#ifndef EPD_BENCH_RUN_H
#define EPD_BENCH_RUN_H

#include "client/bench/job.h"

struct result {
    double median_ns, p99_ns, min_ns; /* of an iteration: the slowest rank's time */
    uint32_t slowest_rank;            /* with the largest median of its own */
    double slowest_rank_median_ns;
    double copied_bytes; /* by the daemon in this op since it started; -1: not known */
};

/* Errors have been printed, with the rank that failed first. */
enum epd_status run_job(const struct job *job, struct result *result);

#endif
