/* What a daemon says about the agreements of its fabric: the time that nodes take to agree about a step. */
#ifndef EPD_BENCH_AGREEMENT_H
#define EPD_BENCH_AGREEMENT_H

struct agreement {
    double n_steps, sum_ns; /* from the announcement of a step by this node to its go */
    double n_ahead;         /* of them, behind an earlier step of the group that was still on the devices */
};

/* So far. -1, and the reason is printed, if it does not say. */
int agreement_read(const char *control_path, struct agreement *agreement);

#endif
