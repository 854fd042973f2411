/* What the daemon says in its statistics that it has copied between buffers for no other reason than to move it. It counts since it
 * started: what a job did is the difference of two documents. */
#ifndef EPD_BENCH_COPIED_H
#define EPD_BENCH_COPIED_H

#include "client/bench/job.h"

/* Bytes copied in the job's op up to this document of epd_stats; 0 if there was none of that op yet, -1 if the document does not say. */
double copied_in(const char *document, enum job_op op);
/* -1 if one of them is not known. */
double copied_between(double before, double after);

#endif
