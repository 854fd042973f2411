/* What is printed: one JSON line per result, or rows of a table for people. */
#ifndef EPD_BENCH_REPORT_H
#define EPD_BENCH_REPORT_H

#include "client/bench/run.h"
#include "client/bench/sessions.h"

struct report {
    int json;
    const char *backend;
    uint32_t n_devices; /* of the daemon */
    int titles_printed;
};

/* solo: the same computation in one process; NULL where there is none. */
void report_job(struct report *report, const struct job *job, const struct result *result,
                const struct result *solo);
void report_sessions(struct report *report, const struct sessions_result *result);

#endif
