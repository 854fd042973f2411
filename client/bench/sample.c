#include "client/bench/sample.h"

#include <math.h>
#include <stdlib.h>

static int compare(const void *left, const void *right)
{
    const double a = *(const double *)left, b = *(const double *)right;
    return (a > b) - (a < b);
}

void sample_sort(double *samples, size_t n)
{
    qsort(samples, n, sizeof(*samples), compare);
}

double sample_quantile(const double *sorted, size_t n, double share)
{
    const double position = ceil(share * (double)n);
    return sorted[position < 1 ? 0 : (size_t)position - 1];
}
