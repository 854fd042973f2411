/* The progress line: step, loss, tokens per second since the last line. */
#ifndef TRAIN_MOE_PROGRESS_H
#define TRAIN_MOE_PROGRESS_H

#include "settings.h"

struct progress {
    const struct settings *settings; /* borrowed, outlives this */
    const char *who;                 /* borrowed */
    double last_s;                   /* CLOCK_MONOTONIC at the last line */
    uint32_t n_steps;                /* since then */
};

void progress_init(struct progress *progress, const struct settings *settings, const char *who);
/* Counts a step; prints when one is due, at the first and at the last. */
void progress_step(struct progress *progress, uint32_t step, double loss);

#endif
