#include "adam.h"

#include <math.h>
#include <stdlib.h>

#define BETA_MEAN     0.9f
#define BETA_VARIANCE 0.99f
/* Far above the rounding noise of a gradient: with the customary 1e-8 a gradient that is nothing but rounding
 * would still move its weight by a full step, and the losses of two exact implementations would drift apart.
 */
#define EPSILON 1e-6f
/* Steps over which the rate rises to its full value, while the running means fill up. */
#define WARMUP_STEPS 10

enum epd_status adam_init(struct adam *adam, size_t n, float learning_rate)
{
    *adam = (struct adam){.n = n, .learning_rate = learning_rate};
    adam->mean = calloc(n, sizeof(float));
    adam->variance = calloc(n, sizeof(float));
    if (adam->mean && adam->variance)
        return EPD_OK;
    adam_fini(adam);
    return EPD_NO_MEMORY;
}

void adam_fini(struct adam *adam)
{
    free(adam->mean);
    free(adam->variance);
    *adam = (struct adam){0};
}

void adam_step(struct adam *adam, float *weights, const float *grads)
{
    const float step = (float)++adam->n_steps;
    const float warmup = step < WARMUP_STEPS ? step / WARMUP_STEPS : 1.0f;
    const float mean_correction = 1.0f - powf(BETA_MEAN, step);
    const float variance_correction = 1.0f - powf(BETA_VARIANCE, step);
    const float rate = adam->learning_rate * warmup / mean_correction;
    for (size_t i = 0; i < adam->n; i++) {
        adam->mean[i] = BETA_MEAN * adam->mean[i] + (1.0f - BETA_MEAN) * grads[i];
        adam->variance[i] = BETA_VARIANCE * adam->variance[i] + (1.0f - BETA_VARIANCE) * grads[i] * grads[i];
        weights[i] -= rate * adam->mean[i] / (sqrtf(adam->variance[i] / variance_correction) + EPSILON);
    }
}
