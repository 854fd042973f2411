/* Results against what they ought to be, on the host: tolerances in one place, activations in float64. */
#ifndef EPD_TESTS_GPU_GEMM_COMPARE_CUH
#define EPD_TESTS_GPU_GEMM_COMPARE_CUH

#include <math.h>
#include <stdio.h>
#include <vector>

#include "tests/gpu/gemm/reference.cuh"

static size_t out_bytes(enum epd_dtype dtype)
{
    return dtype == EPD_F32 ? 4 : 2;
}

struct difference {
    double cosine, worst; /* worst |got - want| / (1 + |want|) */
    size_t bad, touched;
};

static double tolerance(enum epd_dtype dtype)
{
    return dtype == EPD_F32 ? 1e-4 : dtype == EPD_F16 ? 2e-3 : 1.6e-2;
}

static struct difference compare(const std::vector<uint8_t> &got, enum epd_dtype dtype,
                                 const std::vector<double> &want)
{
    struct difference out = {};
    double xx = 0, yy = 0, xy = 0;
    for (size_t i = 0; i < want.size(); i++) {
        if (isnan(want[i])) {
            const uint8_t *at = got.data() + i * out_bytes(dtype);
            for (size_t j = 0; j < out_bytes(dtype); j++)
                out.touched += at[j] != 0xff;
            continue;
        }
        double x = load_element(got.data(), dtype, i), y = want[i];
        double error = fabs(x - y) / (1.0 + fabs(y));
        if (!(error <= tolerance(dtype)))
            out.bad++;
        if (!(error <= out.worst))
            out.worst = error;
        xx += x * x;
        yy += y * y;
        xy += x * y;
    }
    out.cosine = xx + yy > 0 ? 1.0 - 2.0 * xy / (xx + yy) : 0.0;
    return out;
}

static double activate(enum epd_activation kind, double g, double u)
{
    if (kind == EPD_SWIGLU)
        return g / (1.0 + exp(-g)) * u;
    if (kind == EPD_RELU2)
        return g < 0 ? 0.0 : g * g * u;
    return 0.5 * g * (1.0 + tanh(0.7978845608028654 * (g + 0.044715 * g * g * g))) * u;
}

static int report(const char *what, const struct difference *d)
{
    int failed = d->bad || d->touched || !(d->cosine < 1e-5);
    if (failed)
        printf("    %s: bad %zu touched %zu worst %.3g cosine %.3g\n", what, d->bad, d->touched, d->worst,
               d->cosine);
    return failed;
}

/* f and f'. */
static void gate_of(enum epd_activation kind, double g, double *value, double *slope)
{
    const double h = 1e-6;
    *value = activate(kind, g, 1.0);
    *slope = (activate(kind, g + h, 1.0) - activate(kind, g - h, 1.0)) / (2.0 * h);
}

#endif
