/* Durations in logarithmic buckets: eight per power of two, so that a percentile is right within 12.5 %.
 * Fixed size, no allocation. One thread. */
#ifndef EPD_DAEMON_HISTOGRAM_H
#define EPD_DAEMON_HISTOGRAM_H

#include <stdint.h>

#define HISTOGRAM_SUB_BITS  3
#define HISTOGRAM_N_BUCKETS ((64 - HISTOGRAM_SUB_BITS + 1) << HISTOGRAM_SUB_BITS)

struct histogram {
    uint64_t count, sum, max;
    uint32_t buckets[HISTOGRAM_N_BUCKETS];
};

void histogram_add(struct histogram *histogram, uint64_t value);
/* The upper end of the bucket in which the share-th part (0..1) of the values ends, at most max; 0 if empty.
 */
uint64_t histogram_quantile(const struct histogram *histogram, double share);

#endif
