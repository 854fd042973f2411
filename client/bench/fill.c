#include "client/bench/fill.h"

#include <math.h>
#include <stdlib.h>
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

/* What a rank draws experts from: cumulated chances in the order of popularity. */
struct popularity {
    double *until;  /* [n_experts] owned; NULL: all equally likely */
    int32_t *order; /* [n_experts] owned: expert by popularity, the same on every rank */
    uint32_t n_experts;
};

static void popularity_fini(struct popularity *popularity)
{
    free(popularity->until);
    free(popularity->order);
}

static enum epd_status popularity_init(struct popularity *popularity, uint32_t n_experts, double zipf)
{
    uint64_t seed = n_experts;
    double sum = 0;
    *popularity = (struct popularity){.n_experts = n_experts};
    if (zipf == 0)
        return EPD_OK;
    popularity->until = calloc(n_experts, sizeof(double));
    popularity->order = calloc(n_experts, sizeof(int32_t));
    if (!popularity->until || !popularity->order) {
        popularity_fini(popularity);
        return EPD_NO_MEMORY;
    }
    for (uint32_t i = 0; i < n_experts; i++) {
        const uint32_t other = (uint32_t)(next_random(&seed) % (i + 1));
        popularity->order[i] = popularity->order[other];
        popularity->order[other] = (int32_t)i;
        popularity->until[i] = sum += pow(i + 1.0, -zipf);
    }
    for (uint32_t i = 0; i < n_experts; i++)
        popularity->until[i] /= sum;
    return EPD_OK;
}

static int32_t draw(const struct popularity *popularity, uint64_t *seed)
{
    const uint64_t random = next_random(seed);
    uint32_t first = 0, last = popularity->n_experts - 1;
    if (!popularity->until)
        return (int32_t)(random % popularity->n_experts);
    const double at = (double)(random >> 11) * 0x1p-53;
    while (first < last) {
        const uint32_t middle = (first + last) / 2;
        if (popularity->until[middle] > at)
            last = middle;
        else
            first = middle + 1;
    }
    return popularity->order[first];
}

enum epd_status fill_routing(const struct job *job, uint32_t rank, int32_t *topk_idx, float *topk_weights)
{
    struct popularity popularity;
    uint64_t seed = rank;
    enum epd_status status = popularity_init(&popularity, job->n_experts, job->zipf);
    if (status != EPD_OK)
        return status;
    for (size_t t = 0; t < job->n_tokens; t++) {
        int32_t *experts = topk_idx + t * job->top_k;
        for (uint32_t k = 0; k < job->top_k; k++) {
            do
                experts[k] = draw(&popularity, &seed);
            while (contains(experts, k, experts[k]));
            if (topk_weights)
                topk_weights[t * job->top_k + k] = 1.0f / (float)job->top_k;
        }
    }
    popularity_fini(&popularity);
    return EPD_OK;
}
