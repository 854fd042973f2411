#include "tests/fault/chaos.h"

#include <stdlib.h>
#include <time.h>

uint64_t chaos_now_us(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000u + (uint64_t)t.tv_nsec / 1000u;
}

void chaos_sample(struct chaos_samples *samples, uint64_t us)
{
    const unsigned n = atomic_fetch_add(&samples->n, 1);
    samples->us[n % CHAOS_MAX_SAMPLES] = us < UINT32_MAX ? (uint32_t)us : UINT32_MAX;
}

static int compare(const void *a, const void *b)
{
    const uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
    return (x > y) - (x < y);
}

double chaos_quantile_ms(struct chaos_samples *samples, double quantile)
{
    unsigned n = atomic_load(&samples->n);
    n = n < CHAOS_MAX_SAMPLES ? n : CHAOS_MAX_SAMPLES;
    if (!n)
        return 0;
    qsort(samples->us, n, sizeof samples->us[0], compare);
    return samples->us[(unsigned)(quantile * (n - 1) + 0.5)] / 1e3;
}
