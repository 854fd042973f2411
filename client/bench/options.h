/* The command line of epd-bench. Strings point into argv. */
#ifndef EPD_BENCH_OPTIONS_H
#define EPD_BENCH_OPTIONS_H

#include "client/bench/daemon.h"
#include "client/bench/job.h"

struct options {
    struct daemon_options daemon;
    const char *socket_path;  /* NULL: start a daemon of our own */
    struct job job;           /* sizes, ranks, dtype, iterations; op by op filled by main */
    int wanted[JOB_OP_COUNT]; /* by op */
    int sessions;             /* measure idle sessions */
    uint32_t n_sessions;
    int json;
    int rank, board_fd; /* of a rank process; -1 */
};

enum options_result { OPTIONS_RUN, OPTIONS_SHOWN, OPTIONS_USAGE_ERROR };

/* Errors, help and version have been printed. */
enum options_result options_parse(struct options *options, int argc, char **argv);

#endif
