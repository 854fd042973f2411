/* Random numbers that are a pure function of their key: every rank and the reference draw the same ones
 * without telling each other. No state, any thread. */
#ifndef TRAIN_MOE_RANDOM_H
#define TRAIN_MOE_RANDOM_H

#include <stddef.h>
#include <stdint.h>

/* A well mixed 64-bit number for (key, n). */
uint64_t random_at(uint64_t key, uint64_t n);
/* Fills values[n] evenly from an interval around 0 that has this standard deviation. */
void random_fill(uint64_t key, float deviation, float *values, size_t n);

#endif
