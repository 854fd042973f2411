#include "tests/reference/values.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* A binary floating point format: bits of its fraction, bias of its exponent, largest exponent field. */
struct format {
    int fraction_bits;
    int bias;
    int special; /* exponent field of infinities and NaNs */
};

static const struct format f32_format = {.fraction_bits = 23, .bias = 127, .special = 255};
static const struct format bf16_format = {.fraction_bits = 7, .bias = 127, .special = 255};
static const struct format f16_format = {.fraction_bits = 10, .bias = 15, .special = 31};

static const struct format *format_of(enum epd_dtype dtype)
{
    return dtype == EPD_BF16 ? &bf16_format : dtype == EPD_F16 ? &f16_format : &f32_format;
}

static double round_to_format(const struct format *format, double value)
{
    if (value == 0 || !isfinite(value))
        return value;
    int exponent;
    frexp(value, &exponent);
    int lowest = 1 - format->bias; /* of normal numbers; subnormals share its unit */
    int unit = (exponent - 1 > lowest ? exponent - 1 : lowest) - format->fraction_bits;
    double rounded = ldexp(rint(ldexp(value, -unit)), unit);
    double beyond = ldexp(1.0, format->special - format->bias);
    return fabs(rounded) >= beyond ? copysign(INFINITY, value) : rounded;
}

double values_round(enum epd_dtype dtype, double value)
{
    return round_to_format(format_of(dtype), value);
}

/* The 16 bits of a half-width format. */
static uint32_t bits_of(const struct format *format, double value)
{
    uint32_t sign = signbit(value) ? 0x8000u : 0,
             special = (uint32_t)format->special << format->fraction_bits;
    value = fabs(round_to_format(format, value));
    if (isnan(value))
        return sign | special | 1u << (format->fraction_bits - 1);
    if (isinf(value))
        return sign | special;
    if (value == 0)
        return sign;
    int exponent;
    frexp(value, &exponent);
    int field = exponent - 1 + format->bias;
    if (field <= 0) /* subnormal: no leading one */
        return sign | (uint32_t)ldexp(value, format->bias - 1 + format->fraction_bits);
    double fraction = ldexp(value, 1 - exponent) - 1.0;
    return sign | (uint32_t)field << format->fraction_bits | (uint32_t)ldexp(fraction, format->fraction_bits);
}

static double value_of(const struct format *format, uint32_t bits)
{
    double sign = bits & 0x8000u ? -1.0 : 1.0;
    int field = (int)(bits >> format->fraction_bits) & format->special;
    uint32_t fraction = bits & ((1u << format->fraction_bits) - 1);
    if (field == format->special)
        return fraction ? NAN : sign * INFINITY;
    double significand = fraction + (field ? ldexp(1.0, format->fraction_bits) : 0.0);
    return sign * ldexp(significand, (field ? field : 1) - format->bias - format->fraction_bits);
}

void *values_alloc(size_t n, size_t element_bytes)
{
    void *memory = calloc(n ? n : 1, element_bytes);
    if (!memory) {
        fprintf(stderr, "out of memory: %zu elements of %zu bytes\n", n, element_bytes);
        abort();
    }
    return memory;
}

double *values_alloc_doubles(size_t n)
{
    return values_alloc(n, sizeof(double));
}

void values_encode(enum epd_dtype dtype, void *dst, const double *src, size_t n)
{
    const struct format *format = format_of(dtype);
    for (size_t i = 0; i < n; i++) {
        if (dtype == EPD_F32)
            ((float *)dst)[i] = (float)src[i];
        else
            ((uint16_t *)dst)[i] = (uint16_t)bits_of(format, src[i]);
    }
}

void values_decode(enum epd_dtype dtype, double *dst, const void *src, size_t n)
{
    const struct format *format = format_of(dtype);
    for (size_t i = 0; i < n; i++) {
        if (dtype == EPD_F32)
            dst[i] = ((const float *)src)[i];
        else
            dst[i] = value_of(format, ((const uint16_t *)src)[i]);
    }
}

double *values_decoded(enum epd_dtype dtype, const void *src, size_t n)
{
    double *values = values_alloc_doubles(n);
    values_decode(dtype, values, src, n);
    return values;
}

uint64_t values_random(uint64_t *seed)
{
    uint64_t z = *seed += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

double values_uniform(uint64_t *seed, double low, double high)
{
    return low + (high - low) * ldexp((double)(values_random(seed) >> 11), -53);
}

void values_fill(enum epd_dtype dtype, void *dst, size_t n, double low, double high, uint64_t *seed)
{
    for (size_t i = 0; i < n; i++) {
        double value = values_uniform(seed, low, high);
        values_encode(dtype, (char *)dst + i * dtype_bytes(dtype), &value, 1);
    }
}

void values_poison(void *memory, size_t n_bytes)
{
    memset(memory, 0xff, n_bytes);
}

int values_poisoned(const void *memory, size_t n_bytes)
{
    const unsigned char *bytes = memory;
    for (size_t i = 0; i < n_bytes; i++)
        if (bytes[i] != 0xff)
            return 0;
    return 1;
}

int values_match(enum epd_dtype dtype, const void *got, const double *want, size_t n,
                 struct tolerance tolerance, char text[VALUES_TEXT_BYTES])
{
    for (size_t i = 0; i < n; i++) {
        double value;
        values_decode(dtype, &value, (const char *)got + i * dtype_bytes(dtype), 1);
        double allowed = tolerance.atol + tolerance.rtol * fabs(want[i]);
        if (fabs(value - want[i]) <= allowed)
            continue;
        snprintf(text, VALUES_TEXT_BYTES,
                 "element %zu of %zu (%s): got %.9g, want %.9g, off %.3g, allowed %.3g", i, n,
                 dtype_name(dtype), value, want[i], fabs(value - want[i]), allowed);
        return 0;
    }
    text[0] = '\0';
    return 1;
}
