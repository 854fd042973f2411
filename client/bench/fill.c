#include "client/bench/fill.h"

#include <string.h>

static uint64_t next_random(uint64_t *state)
{
    uint64_t value = *state += 0x9e3779b97f4a7c15u;
    value = (value ^ value >> 32) * 0xd6e8feb86659fd93u;
    value = (value ^ value >> 32) * 0xd6e8feb86659fd93u;
    return value ^ value >> 32;
}

/* The upper half of the fp32 bits: exact, because values have at most seven significant bits. */
static uint16_t to_bf16(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof(bits));
    return (uint16_t)(bits >> 16);
}

/* For normal numbers in range with at most eleven significant bits. */
static uint16_t to_f16(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof(bits));
    if (value == 0)
        return (uint16_t)(bits >> 16 & 0x8000);
    return (uint16_t)((bits >> 16 & 0x8000) | (((bits >> 23 & 0xff) - 112) << 10) | (bits >> 13 & 0x3ff));
}

void fill_values(void *data, size_t n, enum epd_dtype dtype, float scale, uint64_t seed)
{
    for (size_t i = 0; i < n; i++) {
        /* 64 to 127 over 128, with a sign: no zeros, no denormals in any dtype. */
        const uint64_t random = next_random(&seed);
        const float size = (float)(64 + (random >> 8) % 64) / 128.0f * scale;
        const float value = random & 1 ? size : -size;
        if (dtype == EPD_F32)
            ((float *)data)[i] = value;
        else
            ((uint16_t *)data)[i] = dtype == EPD_BF16 ? to_bf16(value) : to_f16(value);
    }
}

static int contains(const int32_t *experts, uint32_t n, int32_t expert)
{
    for (uint32_t i = 0; i < n; i++)
        if (experts[i] == expert)
            return 1;
    return 0;
}

void fill_routing(int32_t *topk_idx, float *topk_weights, uint32_t n_tokens, uint32_t n_experts,
                  uint32_t top_k, uint64_t seed)
{
    for (size_t t = 0; t < n_tokens; t++) {
        int32_t *experts = topk_idx + t * top_k;
        for (uint32_t k = 0; k < top_k; k++) {
            do
                experts[k] = (int32_t)(next_random(&seed) % n_experts);
            while (contains(experts, k, experts[k]));
            topk_weights[t * top_k + k] = 1.0f / (float)top_k;
        }
    }
}
