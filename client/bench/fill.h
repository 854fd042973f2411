/* Inputs of the benchmark: random, the same in every run. Values are multiples of 1/8192 below 1/64 or of
 * 1/128 below 1, so that they are exact in every dtype and no product overflows. Any thread. */
#ifndef EPD_BENCH_FILL_H
#define EPD_BENCH_FILL_H

#include <stddef.h>

#include "client/bench/job.h"

/* n elements of dtype with magnitudes below `scale`, a power of two from 2^-12 to 1. */
void fill_values(void *data, size_t n, enum epd_dtype dtype, float scale, uint64_t seed);
/* The routing of one rank: [n_tokens, top_k] distinct experts of each token, and weights that sum to 1. With zipf 0 all experts
 * are equally likely; else expert number i of a fixed random order is drawn in proportion to 1 / i^zipf, i from 1. weights may be
 * NULL. EPD_NO_MEMORY only with zipf. */
enum epd_status fill_routing(const struct job *job, uint32_t rank, int32_t *topk_idx, float *topk_weights);

#endif
