/* The same moe_forward computed directly in this process, without epd: gather rows by expert, two GEMMs by
 * the same CBLAS library, SwiGLU, weighted sum. fp32. It uses as many threads as the daemons have lanes, with
 * the experts and tokens of a rank on the thread of its lane, so that both sides may use the same processors.
 */
#ifndef EPD_BENCH_SOLO_H
#define EPD_BENCH_SOLO_H

#include <signal.h>

#include "client/bench/run.h"

/* Fills median, p99 and min. job->dtype must be EPD_F32. EPD_NO_MEMORY; EPD_SYSTEM without threads; EPD_EVICTED
 * soon after *interrupted has become true. */
enum epd_status solo_run(const struct job *job, uint32_t n_threads, const volatile sig_atomic_t *interrupted,
                         struct result *result);

#endif
