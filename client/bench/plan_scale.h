/* epd-bench --op plan-scale: plans dispatches over many nodes, in this process alone, without a daemon. Routing is drawn
 * for every rank of 16 to 1,024; offsets, slabs and schedule of each are computed and checked by a model of the planning that
 * is this program's own (the daemon's planner takes 64 ranks at most and is not run), and the time it took stands beside
 * what crosses the links. */
#ifndef EPD_BENCH_PLAN_SCALE_H
#define EPD_BENCH_PLAN_SCALE_H

#include <stdint.h>
#include <stdio.h>

struct plan_scale_options {
    uint32_t n_tokens, top_k, hidden; /* of a rank; 0: 1024, 8, 7168 */
    double zipf;                      /* 0: uniform */
    int json;
};

/* 0; 1 if a plan is wrong, memory is short, or planning a rank grows faster than ranks * log(ranks). */
int plan_scale_run(const struct plan_scale_options *options, FILE *out);

#endif
