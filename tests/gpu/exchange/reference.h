/* What the exchange must give, computed on the CPU in the plainest way, with the roundings that
 * kernels/cuda/cuda.h promises: results are compared bit by bit. */
#ifndef EPD_TESTS_GPU_EXCHANGE_REFERENCE_H
#define EPD_TESTS_GPU_EXCHANGE_REFERENCE_H

#include <string.h>

#include "tests/gpu/exchange/cluster.h"

struct rank_input {
    int64_t *topk_idx;   /* [max_tokens, K] */
    float *topk_weights; /* [max_tokens, K] */
    void *x, *dout;      /* [max_tokens, H] */
    void *y;             /* [C, H] */
};

struct rank_expected {
    int32_t *expert, *row; /* [max_tokens, K] */
    int32_t *counts;       /* [R, E] */
    int32_t *source;       /* [C] */
    int64_t *m_splits, *offsets;
    int64_t needed_rows, dropped_rows;
    struct kernel_error error;
};

static inline uint16_t bf16_of(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, 4);
    if (value != value)
        return 0x7fff;
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static inline float element_get(const void *data, size_t i, enum epd_dtype dtype)
{
    if (dtype == EPD_F32)
        return ((const float *)data)[i];
    if (dtype == EPD_F16)
        return (float)((const _Float16 *)data)[i];
    uint32_t bits = (uint32_t)((const uint16_t *)data)[i] << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

static inline void element_set(void *data, size_t i, enum epd_dtype dtype, float value)
{
    if (dtype == EPD_F32)
        ((float *)data)[i] = value;
    else if (dtype == EPD_F16)
        ((_Float16 *)data)[i] = (_Float16)value;
    else
        ((uint16_t *)data)[i] = bf16_of(value);
}

/* Fills expected[0 .. R). */
void reference_route(const struct problem *problem, const struct rank_input *input,
                     struct rank_expected *expected);
void reference_free(const struct problem *problem, struct rank_expected *expected);
/* One element row: out[token] of rank; weights NULL: all 1. */
void reference_combine_row(const struct problem *problem, const struct rank_input *input,
                           const struct rank_expected *expected, uint32_t rank, uint32_t token, int weighted,
                           void *out);
/* The same where the ranks lie on n_nodes nodes, by the roundings of ep/hop_cuda.h. */
void reference_hop_row(const struct problem *problem, const struct rank_input *input,
                       const struct rank_expected *expected, uint32_t n_nodes, uint32_t rank, uint32_t token,
                       int weighted, void *out);

#endif
