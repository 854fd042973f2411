/* The command line of epd-bench. Strings point into argv. */
#ifndef EPD_BENCH_OPTIONS_H
#define EPD_BENCH_OPTIONS_H

#include "client/bench/daemon.h"
#include "client/bench/job.h"

#define OPTIONS_MAX_CASES 8

/* Sizes that override the case's; 0: not given. */
struct options_sizes {
    uint64_t tokens, hidden, ffn, experts, top_k;
};

struct options {
    struct daemon_options daemon;
    const char *socket_path; /* NULL: start a daemon of our own */
    uint32_t n_nodes;        /* daemons of our own that are a fabric; 0 or 1: one, in none */
    struct job
        job; /* what is the same for all jobs; n_ranks 0 and dtype unspecified: the backend's default */
    char cases[OPTIONS_MAX_CASES][JOB_NAME_BYTES];
    uint32_t n_cases; /* 0: the backend's default */
    struct options_sizes sizes;
    double capacity_factor; /* of tokens * top_k; 0: all that could arrive; below 0: the backend's default */
    int wanted[JOB_OP_COUNT]; /* by op */
    int sessions;             /* measure idle sessions */
    uint32_t n_sessions;
    int link, peer_loss;
    int plan_scale;    /* plan for many ranks; alone, without a daemon */
    uint32_t n_rounds; /* of peer_loss */
    int suite;         /* several jobs, and a failed one does not end it */
    int json;
    int rank, board_fd; /* of a rank process; -1 */
};

enum options_result { OPTIONS_RUN, OPTIONS_SHOWN, OPTIONS_USAGE_ERROR };

/* Fills what a case decides: sizes with their overrides, capacity. Prints what does not fit and returns -1. job->n_ranks is known. */
int options_take_case(const struct options *options, const char *name, struct job *job);

/* Errors, help and version have been printed. */
enum options_result options_parse(struct options *options, int argc, char **argv);

#endif
