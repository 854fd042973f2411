/* What is printed: one JSON line per result, or rows of a table for people. */
#ifndef EPD_BENCH_REPORT_H
#define EPD_BENCH_REPORT_H

#include "client/bench/loss.h"
#include "client/bench/run.h"
#include "client/bench/sessions.h"
#include "client/bench/traffic.h"

struct report {
    int json;
    const char *backend;
    uint32_t n_devices;   /* of the daemon */
    const char *device;   /* name of its first device */
    int mps;              /* CUDA: an MPS server is there for the ranks and the daemon */
    double link_gb_per_s; /* what the links can do; 0: not measured */
    uint32_t n_results;   /* printed so far, failures left out */
    int titles_printed;
};

/* solo: the same computation in one process; NULL where there is none. */
void report_job(struct report *report, const struct job *job, const struct result *result,
                const struct traffic *traffic, const struct result *solo);
/* Keeps the number for the lines that follow, too. */
void report_link(struct report *report, double gb_per_s);
void report_loss(struct report *report, const struct job *job, const struct loss_result *result);
/* What could not be measured; job: its sizes, NULL where it has none. Only in JSON: people have read why on stderr. */
void report_failure(const struct report *report, const char *op, const struct job *job,
                    enum epd_status status);
void report_sessions(struct report *report, const struct sessions_result *result);

#endif
