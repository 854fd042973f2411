/* Rows of f32, bf16 and f16 as the host kernels compute with them: in fp32. Rounding is to nearest, ties to
 * even; a NaN stays a NaN; f16 overflows to infinity and keeps subnormals. No state, any thread. */
#ifndef EPD_KERNELS_HOST_DTYPE_H
#define EPD_KERNELS_HOST_DTYPE_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "proto/words.h"

/* All four are free of branches, so that the loops over rows vectorise. */

static inline float dtype_float_of_bits(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, sizeof(value));
    return value;
}

static inline uint32_t dtype_bits_of_float(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof(bits));
    return bits;
}

static inline float dtype_from_bf16(uint16_t bf16)
{
    return dtype_float_of_bits((uint32_t)bf16 << 16);
}

static inline uint16_t dtype_to_bf16(float value)
{
    uint32_t bits = dtype_bits_of_float(value);
    uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    uint32_t quiet_nan = (bits >> 16) | 0x40u;
    return (uint16_t)((bits & 0x7fffffffu) > 0x7f800000u ? quiet_nan : rounded);
}

static inline float dtype_from_f16(uint16_t f16)
{
    uint32_t magnitude = (uint32_t)(f16 & 0x7fffu) << 13;
    /* The exponent field now counts from -127 instead of -15: 2^112 repairs it, for subnormals as well. */
    uint32_t finite = dtype_bits_of_float(dtype_float_of_bits(magnitude) * 0x1p112f);
    uint32_t bits = magnitude >= 0x0f800000u ? magnitude | 0x7f800000u : finite;
    return dtype_float_of_bits(bits | (uint32_t)(f16 & 0x8000u) << 16);
}

static inline uint16_t dtype_to_f16(float value)
{
    uint32_t bits = dtype_bits_of_float(value);
    uint32_t magnitude = bits & 0x7fffffffu;
    uint32_t normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13;
    /* The last place of 0.5 is 2^-24, the unit of f16 subnormals: the addition rounds them as wanted. */
    uint32_t subnormal =
        dtype_bits_of_float(dtype_float_of_bits(magnitude) + 0.5f) - dtype_bits_of_float(0.5f);
    uint32_t special = magnitude > 0x7f800000u ? 0x7e00u | (magnitude >> 13 & 0x3ffu) : 0x7c00u;
    uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
    /* From 65520 on the nearest f16 is infinity. */
    uint32_t result = magnitude >= 0x477ff000u ? special : finite;
    return (uint16_t)(result | (bits >> 16 & 0x8000u));
}

/* n elements of src as fp32 in dst, and back with one rounding. dst and src do not overlap. dtype is EPD_F32,
 * EPD_BF16 or EPD_F16. */
void dtype_load(float *restrict dst, const void *restrict src, enum epd_dtype dtype, size_t n);
void dtype_store(void *restrict dst, const float *restrict src, enum epd_dtype dtype, size_t n);

/* Dot product of two rows in fp32, always summed in the same order. */
float dtype_dot(const void *a, const void *b, enum epd_dtype dtype, size_t n);

/* n elements of src as fp32: src itself when it is fp32, else buffer, filled. */
static inline const float *dtype_view(const void *src, enum epd_dtype dtype, size_t n, float *buffer)
{
    if (dtype == EPD_F32)
        return src;
    dtype_load(buffer, src, dtype, n);
    return buffer;
}

#endif
