#include "tests/reference/tolerance.h"

#include <math.h>

struct tolerance tolerance_of(enum epd_dtype dtype)
{
    switch (dtype) {
    case EPD_BF16:
        return (struct tolerance){.rtol = 1.6e-2, .atol = 1e-5};
    case EPD_F16:
        return (struct tolerance){.rtol = 1e-3, .atol = 1e-5};
    default:
        return (struct tolerance){.rtol = 1.3e-6, .atol = 1e-5};
    }
}

struct tolerance tolerance_sum(enum epd_dtype dtype, size_t n_terms, double magnitude)
{
    struct tolerance tolerance = tolerance_of(dtype);
    tolerance.atol += (double)n_terms * 0x1p-22 * magnitude;
    return tolerance;
}

struct tolerance tolerance_chain(enum epd_dtype dtype, const double *want, size_t n)
{
    double squares = 0;
    for (size_t i = 0; i < n; i++)
        squares += want[i] * want[i];
    double fraction = dtype == EPD_BF16 ? 0x1p-4 : dtype == EPD_F16 ? 0x1p-7 : 1e-5;
    struct tolerance tolerance = tolerance_of(dtype);
    tolerance.atol += n ? fraction * sqrt(squares / (double)n) : 0.0;
    return tolerance;
}
