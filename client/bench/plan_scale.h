/* epd-bench --op plan-scale: plans dispatches over many nodes, in this process alone, without a daemon. Routing is drawn
 * for every rank of 16 to 1,024; which tokens cross, slabs, capacities, messages and schedules of each are built by the
 * functions that do so in the daemon (plan_world.h), which itself takes 64 ranks, and checked. The time that planning a
 * rank took stands beside what crosses the links in a dispatch and its combine. Moving the messages is no part of it. */
#ifndef EPD_BENCH_PLAN_SCALE_H
#define EPD_BENCH_PLAN_SCALE_H

#include <stdint.h>
#include <stdio.h>

struct plan_scale_options {
    uint32_t n_tokens, top_k, hidden; /* of a rank; 0: 1024, 8, 7168; top_k at most JOB_MAX_TOP_K */
    double zipf;                      /* 0: uniform */
    int json;
};

/* From the smallest number of ranks to the largest: how many times the time of a rank grew, how many times ranks * log(ranks)
 * did, and what is allowed. Times in microseconds. */
struct plan_scale_growth {
    double time, sizes, allowed;
};
struct plan_scale_growth plan_scale_growth(double first_us, double last_us);
int plan_scale_too_fast(const struct plan_scale_growth *growth);

/* 0; 1 if a plan is wrong, memory is short, or planning a rank grows faster than ranks * log(ranks); why goes to stderr. */
int plan_scale_run(const struct plan_scale_options *options, FILE *out);

#endif
