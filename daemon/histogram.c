#include "daemon/histogram.h"

#define SUB_BUCKETS (1u << HISTOGRAM_SUB_BITS)

/* Values below SUB_BUCKETS have a bucket each; above, the leading bit and the HISTOGRAM_SUB_BITS after it
 * choose. */
static uint32_t bucket_of(uint64_t value)
{
    if (value < SUB_BUCKETS)
        return (uint32_t)value;
    const uint32_t shift = 63u - (uint32_t)__builtin_clzll(value) - HISTOGRAM_SUB_BITS;
    return ((shift + 1) << HISTOGRAM_SUB_BITS) + (uint32_t)((value >> shift) & (SUB_BUCKETS - 1));
}

static uint64_t bucket_end(uint32_t bucket)
{
    if (bucket < SUB_BUCKETS)
        return bucket;
    const uint32_t shift = (bucket >> HISTOGRAM_SUB_BITS) - 1;
    const uint64_t first = (uint64_t)(SUB_BUCKETS + (bucket & (SUB_BUCKETS - 1))) << shift;
    return first + ((1ull << shift) - 1);
}

void histogram_add(struct histogram *histogram, uint64_t value)
{
    histogram->count++;
    histogram->sum += value;
    if (value > histogram->max)
        histogram->max = value;
    histogram->buckets[bucket_of(value)]++;
}

uint64_t histogram_quantile(const struct histogram *histogram, double share)
{
    const double wanted = share * (double)histogram->count;
    uint64_t seen = 0;
    for (uint32_t i = 0; i < HISTOGRAM_N_BUCKETS; i++) {
        seen += histogram->buckets[i];
        if (seen && (double)seen >= wanted)
            return bucket_end(i) < histogram->max ? bucket_end(i) : histogram->max;
    }
    return histogram->max;
}
