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

/* What a rank draws experts from: places 0..n_experts-1 in the order of popularity. */
struct popularity {
    double *tail;   /* [n_experts + 1] owned: chances of a place and all less popular ones, of any scale */
    int32_t *order; /* [n_experts] owned: expert of a place, the same on every rank */
    uint32_t n_experts;
};

static void popularity_fini(struct popularity *popularity)
{
    free(popularity->tail);
    free(popularity->order);
}

static enum epd_status popularity_init(struct popularity *popularity, uint32_t n_experts, double zipf)
{
    uint64_t seed = n_experts;
    *popularity = (struct popularity){.n_experts = n_experts};
    popularity->tail = calloc(n_experts + 1, sizeof(double));
    popularity->order = calloc(n_experts, sizeof(int32_t));
    if (!popularity->tail || !popularity->order) {
        popularity_fini(popularity);
        return EPD_NO_MEMORY;
    }
    for (uint32_t i = 0; i < n_experts; i++) {
        const uint32_t other = (uint32_t)(next_random(&seed) % (i + 1));
        popularity->order[i] = popularity->order[other];
        popularity->order[other] = (int32_t)i;
    }
    /* From the smallest, so that the smallest are not lost beside the largest. */
    for (uint32_t i = n_experts; i > 0; i--)
        popularity->tail[i - 1] = popularity->tail[i] + pow(i, -zipf);
    return EPD_OK;
}

/* The place from first to last - 1 at which the chances from first on exceed `at`. */
static uint32_t find_place(const double *tail, uint32_t first, uint32_t last, double at)
{
    const uint32_t start = first;
    while (last - first > 1) {
        const uint32_t middle = first + (last - first) / 2;
        if (tail[start] - tail[middle] > at)
            last = middle;
        else
            first = middle;
    }
    return first;
}

/* A place that is not among taken[n_taken], ascending, in proportion to its chance among those left. Between the taken places
 * lie gaps: the draw finds its gap, then its place in it. Rejecting taken places instead would never end where what is left has
 * next to no chance. */
static uint32_t draw_place(const struct popularity *popularity, const uint32_t *taken, uint32_t n_taken,
                           uint64_t *seed)
{
    const double *tail = popularity->tail;
    const double share = (double)(next_random(seed) >> 11) * 0x1p-53;
    double left = 0;
    for (uint32_t gap = 0, first = 0; gap <= n_taken; gap++) {
        const uint32_t last = gap < n_taken ? taken[gap] : popularity->n_experts;
        left += tail[first] - tail[last];
        first = last + 1;
    }
    double at = share * left;
    uint32_t place = 0;
    for (uint32_t gap = 0, first = 0; gap <= n_taken; gap++) {
        const uint32_t last = gap < n_taken ? taken[gap] : popularity->n_experts;
        if (first < last)
            place = find_place(tail, first, last, at);
        if (at < tail[first] - tail[last])
            break;
        at -= tail[first] - tail[last];
        first = last + 1;
    }
    return place;
}

/* Keeps taken[n_taken] ascending. */
static void take_place(uint32_t *taken, uint32_t n_taken, uint32_t place)
{
    uint32_t i = n_taken;
    for (; i > 0 && taken[i - 1] > place; i--)
        taken[i] = taken[i - 1];
    taken[i] = place;
}

static void draw_popular(const struct popularity *popularity, uint32_t top_k, int32_t *experts,
                         uint64_t *seed)
{
    uint32_t taken[JOB_MAX_TOP_K];
    for (uint32_t k = 0; k < top_k; k++) {
        const uint32_t place = draw_place(popularity, taken, k, seed);
        take_place(taken, k, place);
        experts[k] = popularity->order[place];
    }
}

static void draw_uniform(uint32_t n_experts, uint32_t top_k, int32_t *experts, uint64_t *seed)
{
    for (uint32_t k = 0; k < top_k; k++) {
        do
            experts[k] = (int32_t)(next_random(seed) % n_experts);
        while (contains(experts, k, experts[k]));
    }
}

enum epd_status fill_routing(const struct job *job, uint32_t rank, int32_t *topk_idx, float *topk_weights)
{
    struct popularity popularity = {0};
    uint64_t seed = rank;
    enum epd_status status = job->zipf > 0 ? popularity_init(&popularity, job->n_experts, job->zipf) : EPD_OK;
    if (status != EPD_OK)
        return status;
    for (size_t t = 0; t < job->n_tokens; t++) {
        int32_t *experts = topk_idx + t * job->top_k;
        if (job->zipf > 0)
            draw_popular(&popularity, job->top_k, experts, &seed);
        else
            draw_uniform(job->n_experts, job->top_k, experts, &seed);
        for (uint32_t k = 0; topk_weights && k < job->top_k; k++)
            topk_weights[t * job->top_k + k] = 1.0f / (float)job->top_k;
    }
    popularity_fini(&popularity);
    return EPD_OK;
}
