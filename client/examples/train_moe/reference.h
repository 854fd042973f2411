/* The same training in one process without epd: same weights, same batches, the ranks' tokens one rank after
 * the other. */
#ifndef TRAIN_MOE_REFERENCE_H
#define TRAIN_MOE_REFERENCE_H

#include "settings.h"
#include <epd.h>

/* Writes losses[n_steps], the mean over all tokens of each step. Prints progress if asked to. */
enum epd_status reference_run(const struct settings *settings, int print_progress, double *losses);

#endif
