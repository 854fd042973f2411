/* The weights of experts: how they start and how large they are. Shared by the ranks, which keep them in epd
 * buffers, and the reference.
 *
 *   expert(x) = W2 (silu(g) * u),  (g, u) = W1 x        W1 [2 ffn, hidden]: gate half, then up half; W2
 * [hidden, ffn] */
#ifndef TRAIN_MOE_EXPERTS_H
#define TRAIN_MOE_EXPERTS_H

#include <stddef.h>

#include "settings.h"

static inline size_t experts_w1_size(const struct settings *settings)
{
    return 2 * (size_t)settings->ffn * settings->hidden;
}

static inline size_t experts_w2_size(const struct settings *settings)
{
    return (size_t)settings->hidden * settings->ffn;
}

/* First weights of n_experts experts from number first_expert on: w1 [n_experts, 2 ffn, hidden], w2
 * [n_experts, hidden, ffn]. They depend on the seed and the expert's number only. */
void experts_init(const struct settings *settings, uint32_t first_expert, uint32_t n_experts, float *w1,
                  float *w2);

#endif
