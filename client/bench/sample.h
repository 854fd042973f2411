/* Order statistics of measured times. */
#ifndef EPD_BENCH_SAMPLE_H
#define EPD_BENCH_SAMPLE_H

#include <stddef.h>

/* Sorts in place. */
void sample_sort(double *samples, size_t n);
/* The smallest value that at least share (0..1) of the sorted samples do not exceed. n > 0. */
double sample_quantile(const double *sorted, size_t n, double share);

#endif
