#include "kernels/host/dtype.h"

#include <assert.h>

/* Independent partial sums of a dot product: it vectorises, and the order of the sum is fixed all the same.
 */
#define DOT_LANES 16
#define DOT_BLOCK 256

void dtype_load(float *restrict dst, const void *restrict src, enum epd_dtype dtype, size_t n)
{
    const uint16_t *half = src;
    switch (dtype) {
    case EPD_F32:
        memcpy(dst, src, n * sizeof(float));
        return;
    case EPD_BF16:
        for (size_t i = 0; i < n; i++)
            dst[i] = dtype_from_bf16(half[i]);
        return;
    case EPD_F16:
        for (size_t i = 0; i < n; i++)
            dst[i] = dtype_from_f16(half[i]);
        return;
    default:
        assert(!"a float dtype");
    }
}

void dtype_store(void *restrict dst, const float *restrict src, enum epd_dtype dtype, size_t n)
{
    uint16_t *half = dst;
    switch (dtype) {
    case EPD_F32:
        memcpy(dst, src, n * sizeof(float));
        return;
    case EPD_BF16:
        for (size_t i = 0; i < n; i++)
            half[i] = dtype_to_bf16(src[i]);
        return;
    case EPD_F16:
        for (size_t i = 0; i < n; i++)
            half[i] = dtype_to_f16(src[i]);
        return;
    default:
        assert(!"a float dtype");
    }
}

static void dot_block(float *restrict lanes, const float *restrict a, const float *restrict b, size_t n)
{
    size_t i = 0;
    for (; i + DOT_LANES <= n; i += DOT_LANES)
        for (size_t lane = 0; lane < DOT_LANES; lane++)
            lanes[lane] += a[i + lane] * b[i + lane];
    for (size_t lane = 0; i < n; i++, lane++)
        lanes[lane] += a[i] * b[i];
}

float dtype_dot(const void *a, const void *b, enum epd_dtype dtype, size_t n)
{
    float lanes[DOT_LANES] = {0}, a_block[DOT_BLOCK], b_block[DOT_BLOCK];
    size_t element = dtype_bytes(dtype);
    for (size_t i = 0; i < n; i += DOT_BLOCK) {
        size_t width = n - i < DOT_BLOCK ? n - i : DOT_BLOCK;
        const float *a_values = dtype_view((const char *)a + i * element, dtype, width, a_block);
        const float *b_values = dtype_view((const char *)b + i * element, dtype, width, b_block);
        dot_block(lanes, a_values, b_values, width);
    }
    for (size_t width = DOT_LANES / 2; width > 0; width /= 2)
        for (size_t lane = 0; lane < width; lane++)
            lanes[lane] += lanes[lane + width];
    return lanes[0];
}
