#include "staging.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "device.h"

static int is_half(enum epd_dtype dtype)
{
    return dtype == EPD_BF16 || dtype == EPD_F16;
}

static size_t element_bytes(enum epd_dtype dtype)
{
    return is_half(dtype) ? 2 : 4;
}

enum epd_status staging_init(struct staging *staging, struct epd_buffer *buffer, enum epd_dtype dtype,
                             size_t n, int on_gpu)
{
    *staging = (struct staging){.buffer = buffer, .dtype = dtype, .n = n, .on_gpu = on_gpu};
    if (!on_gpu && !is_half(dtype)) {
        staging->values = epd_buffer_data(buffer);
        return EPD_OK;
    }
    staging->owns_values = 1;
    staging->values = calloc(n, 4);
    staging->packed = calloc(n, element_bytes(dtype));
    if (staging->values && staging->packed)
        return EPD_OK;
    staging_fini(staging);
    return EPD_NO_MEMORY;
}

void staging_fini(struct staging *staging)
{
    if (staging->owns_values)
        free(staging->values);
    free(staging->packed);
    *staging = (struct staging){0};
}

static enum epd_status move(const struct staging *staging, void *to, const void *from)
{
    const size_t n_bytes = staging->n * element_bytes(staging->dtype);
    if (staging->on_gpu)
        return device_copy(to, from, n_bytes);
    memcpy(to, from, n_bytes);
    return EPD_OK;
}

enum epd_status staging_push(const struct staging *staging)
{
    if (!staging->packed)
        return EPD_OK;
    if (!is_half(staging->dtype))
        return move(staging, epd_buffer_data(staging->buffer), staging->values);
    const float *values = staging->values;
    uint16_t *packed = staging->packed;
    for (size_t i = 0; i < staging->n; i++)
        packed[i] = staging->dtype == EPD_BF16 ? staging_to_bf16(values[i]) : staging_to_f16(values[i]);
    return move(staging, epd_buffer_data(staging->buffer), packed);
}

enum epd_status staging_pull(const struct staging *staging)
{
    if (!staging->packed)
        return EPD_OK;
    if (!is_half(staging->dtype))
        return move(staging, staging->values, epd_buffer_data(staging->buffer));
    enum epd_status status = move(staging, staging->packed, epd_buffer_data(staging->buffer));
    float *values = staging->values;
    const uint16_t *packed = staging->packed;
    for (size_t i = 0; status == EPD_OK && i < staging->n; i++)
        values[i] = staging->dtype == EPD_BF16 ? staging_from_bf16(packed[i]) : staging_from_f16(packed[i]);
    return status;
}

void staging_scale(const struct staging *staging, float factor)
{
    float *values = staging->values;
    for (size_t i = 0; i < staging->n; i++)
        values[i] *= factor;
}

uint16_t staging_to_bf16(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof(bits));
    if (isnan(value))
        return (uint16_t)(bits >> 16 | 0x40);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

float staging_from_bf16(uint16_t half)
{
    const uint32_t bits = (uint32_t)half << 16;
    float value;
    memcpy(&value, &bits, sizeof(value));
    return value;
}

/* Through a multiple of the smallest step of the number's binade, which rounds to even. */
uint16_t staging_to_f16(float value)
{
    const uint16_t sign = signbit(value) ? 0x8000 : 0;
    const float size = fabsf(value);
    if (isnan(value))
        return sign | 0x7e00;
    if (size >= 65520.0f)
        return sign | 0x7c00;
    int exponent = 0;
    (void)frexpf(size, &exponent); /* size = m * 2^exponent, m in [1/2, 1) */
    const int binade = size < 0x1p-14f ? -14 : exponent - 1;
    const float steps = nearbyintf(ldexpf(size, 10 - binade)); /* 0 to 2048 */
    /* A carry into the next binade is an addition to the exponent's bits. */
    return (uint16_t)(sign + ((unsigned)(binade + 14) << 10) + (unsigned)steps);
}

float staging_from_f16(uint16_t half)
{
    const int exponent = half >> 10 & 31;
    const float fraction = (float)(half & 0x3ff);
    float size;
    if (exponent == 31)
        size = fraction != 0 ? NAN : INFINITY;
    else if (exponent == 0)
        size = ldexpf(fraction, -24);
    else
        size = ldexpf(fraction + 1024, exponent - 25);
    return half & 0x8000 ? -size : size;
}
