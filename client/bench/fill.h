/* Inputs of the benchmark: random, the same in every run. Values are multiples of 1/8192 below 1/64 or of
 * 1/128 below 1, so that they are exact in every dtype and no product overflows. Any thread. */
#ifndef EPD_BENCH_FILL_H
#define EPD_BENCH_FILL_H

#include <stddef.h>

#include "client/bench/job.h"

/* n elements of dtype with magnitudes below `scale`, a power of two from 2^-12 to 1. */
void fill_values(void *data, size_t n, enum epd_dtype dtype, float scale, uint64_t seed);
/* [n_tokens, top_k] distinct experts of each token, all equally likely, and weights that sum to 1. */
void fill_routing(int32_t *topk_idx, float *topk_weights, uint32_t n_tokens, uint32_t n_experts,
                  uint32_t top_k, uint64_t seed);

#endif
