/* Two loops that everything in this example is made of. The order of every sum is fixed, so the same inputs
 * give the same bits in every process. n is a multiple of 8. */
#ifndef TRAIN_MOE_VECTOR_H
#define TRAIN_MOE_VECTOR_H

#include <stddef.h>

/* Sum of a[i] * b[i]. */
static inline float vector_dot(const float *a, const float *b, size_t n)
{
    /* Eight sums side by side let the compiler use vector registers without changing the order of any of
     * them. */
    float sums[8] = {0};
    for (size_t i = 0; i < n; i += 8)
        for (size_t lane = 0; lane < 8; lane++)
            sums[lane] += a[i + lane] * b[i + lane];
    return ((sums[0] + sums[4]) + (sums[2] + sums[6])) + ((sums[1] + sums[5]) + (sums[3] + sums[7]));
}

/* y[i] += scale * x[i]; y and x do not overlap. */
static inline void vector_add_scaled(float *restrict y, float scale, const float *restrict x, size_t n)
{
    for (size_t i = 0; i < n; i++)
        y[i] += scale * x[i];
}

#endif
