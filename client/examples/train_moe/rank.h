/* One rank process: trains its share of every batch through epd. */
#ifndef TRAIN_MOE_RANK_H
#define TRAIN_MOE_RANK_H

#include "settings.h"
#include <epd.h>

/* Runs all steps; settings->rank and ->exchange_fd are set. Rank 0 prints progress and records the losses. */
enum epd_status rank_run(const struct settings *settings);

#endif
