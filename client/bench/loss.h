/* What the death of a rank costs the others: a rank of a working group is killed in a step, again and again. */
#ifndef EPD_BENCH_LOSS_H
#define EPD_BENCH_LOSS_H

#include "client/bench/job.h"

struct loss_times {
    uint32_t n;
    double p50_ns, p99_ns, max_ns;
};

struct loss_result {
    /* From the kill until the step of every survivor has ended EPD_PEER_LOST. */
    struct loss_times told;
    /* Until the daemon holds no more sessions, heap and imported memory than before the group; the survivors close as soon as they
     * are told. Every other round. */
    struct loss_times reclaim;
    /* Until the first step of the next group, of the survivors and a process that waits for its chance, is done on all. The
     * rounds between. */
    struct loss_times serve;
};

/* n_rounds >= 2. Errors have been printed. */
enum epd_status loss_run(const struct job *job, uint32_t n_rounds, struct loss_result *result);

/* In the rank process; number n_ranks is the spare. */
struct board;
struct op;
enum epd_status loss_rank(struct board *board, struct op *op, uint32_t rank);

#endif
