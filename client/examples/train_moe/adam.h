/* Adam over one vector of weights. One owner, one thread. */
#ifndef TRAIN_MOE_ADAM_H
#define TRAIN_MOE_ADAM_H

#include <stddef.h>
#include <stdint.h>

#include <epd.h>

struct adam {
    size_t n;
    float *mean;     /* owned, [n] running mean of the gradient */
    float *variance; /* owned, [n] running mean of its square */
    float learning_rate;
    uint32_t n_steps;
};

enum epd_status adam_init(struct adam *adam, size_t n, float learning_rate);
void adam_fini(struct adam *adam);
void adam_step(struct adam *adam, float *weights, const float *grads);

#endif
