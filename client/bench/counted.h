/* What the daemon of rank 0 counts in its statistics, of a job's op. It counts since it started: what a job did is the difference of
 * two documents. */
#ifndef EPD_BENCH_COUNTED_H
#define EPD_BENCH_COUNTED_H

#include "client/bench/job.h"

struct counted {
    double launches;      /* of all ranks there */
    double copied_bytes;  /* between buffers for no other reason than to move it */
    double network_bytes; /* to and from other nodes, messages whole */
};

/* Nothing is known. */
#define COUNTED_NONE ((struct counted){-1, -1, -1})

/* In the job's op up to this document of epd_stats: zeros if there was none of that op yet; what the document does not say is -1. */
struct counted counted_in(const char *document, enum job_op op);
/* -1 where one of them is not known. */
struct counted counted_between(const struct counted *before, const struct counted *after);

#endif
