/* The product tables of op_cases.h: grouped GEMMs and activations. */
#include <stdio.h>

#include "tests/reference/op_cases.h"
#include "tests/reference/values.h"

struct gemm_sizes {
    uint32_t n_groups;
    int64_t n_rows;
    uint32_t k, n;
    enum gemm_split split;
    uint32_t alignment;
    int heavy;
};

static const struct gemm_sizes gemm_sizes[] = {
    {1, 127, 128, 512, GEMM_SPLIT_EVEN, 0, 0},       {8, 15, 128, 512, GEMM_SPLIT_RANDOM, 0, 0},
    {8, 1027, 128, 512, GEMM_SPLIT_RANDOM, 16, 0},   {16, 10027, 128, 512, GEMM_SPLIT_RANDOM, 128, 1},
    {4, 0, 64, 48, GEMM_SPLIT_EVEN, 1, 0},           {1, 1, 1, 1, GEMM_SPLIT_EVEN, 1, 0},
    {3, 31, 33, 31, GEMM_SPLIT_LAST_EMPTY, 16, 0},   {5, 33, 31, 127, GEMM_SPLIT_ALL_TO_ONE, 0, 0},
    {4, 127, 127, 33, GEMM_SPLIT_RANDOM, 128, 0},    {2, 4095, 31, 33, GEMM_SPLIT_EVEN, 1, 0},
    {3, 240, 64, 600, GEMM_SPLIT_EVEN, 1, 0},        /* more than one block of columns */
    {6, 1600, 72, 40, GEMM_SPLIT_ALL_TO_ONE, 16, 0}, /* more than one block of rows in one group */
};
#define N_GEMM_SIZES (sizeof(gemm_sizes) / sizeof(gemm_sizes[0]))

/* What of a case is not its size. An output "as input" has the dtype of the operands. */
struct gemm_variant {
    enum epd_gemm_layout layout;
    int c_fp32;
    enum { NO_BIAS, BIAS_AS_INPUT, BIAS_FP32 } bias;
    int accumulate, parts;
    int heavy_too;
};

static const struct gemm_variant gemm_variants[] = {
    {EPD_GEMM_TN, 0, NO_BIAS, 0, 0, 0},       {EPD_GEMM_TN, 0, BIAS_AS_INPUT, 0, 1, 1},
    {EPD_GEMM_TN, 1, BIAS_FP32, 0, 0, 0},     {EPD_GEMM_NN, 0, NO_BIAS, 0, 0, 1},
    {EPD_GEMM_NN, 1, NO_BIAS, 0, 1, 0},       {EPD_GEMM_NT, 1, NO_BIAS, 0, 0, 0},
    {EPD_GEMM_NT, 1, BIAS_FP32, 1, 0, 1},     {EPD_GEMM_NT, 0, BIAS_AS_INPUT, 1, 1, 0},
    {EPD_GEMM_NT, 0, BIAS_AS_INPUT, 0, 0, 0},
};
#define N_GEMM_VARIANTS (sizeof(gemm_variants) / sizeof(gemm_variants[0]))

static const enum epd_dtype float_dtypes[] = {EPD_F32, EPD_BF16, EPD_F16};
#define N_FLOAT_DTYPES 3

static int in_table(const struct gemm_sizes *sizes, const struct gemm_variant *variant, enum epd_dtype dtype)
{
    if (sizes->heavy && (!variant->heavy_too || dtype == EPD_F16))
        return 0;
    return !(variant->c_fp32 && dtype == EPD_F32 && variant->layout != EPD_GEMM_NT);
}

int gemm_case_at(size_t idx, struct gemm_case *gemm_case)
{
    for (size_t i = 0; i < N_GEMM_SIZES * N_GEMM_VARIANTS * N_FLOAT_DTYPES; i++) {
        const struct gemm_sizes *sizes = &gemm_sizes[i / (N_GEMM_VARIANTS * N_FLOAT_DTYPES)];
        const struct gemm_variant *variant = &gemm_variants[i / N_FLOAT_DTYPES % N_GEMM_VARIANTS];
        enum epd_dtype dtype = float_dtypes[i % N_FLOAT_DTYPES];
        if (!in_table(sizes, variant, dtype) || idx-- > 0)
            continue;
        /* fp32 operands with a half-width gradient: the one output that is narrower than its input. */
        int narrow = dtype == EPD_F32 && variant->layout == EPD_GEMM_NT && !variant->c_fp32;
        enum epd_dtype as_input = narrow ? EPD_BF16 : dtype;
        *gemm_case = (struct gemm_case){
            .layout = variant->layout,
            .dtype = dtype,
            .dtype_c = variant->c_fp32 ? EPD_F32 : as_input,
            .dtype_bias = variant->bias == BIAS_FP32       ? EPD_F32
                          : variant->bias == BIAS_AS_INPUT ? as_input
                                                           : EPD_DTYPE_UNSPECIFIED,
            .n_groups = sizes->n_groups,
            .n = sizes->n,
            .k = sizes->k,
            .n_rows = sizes->n_rows,
            .split = sizes->split,
            .alignment = sizes->alignment,
            .accumulate = variant->accumulate,
            .parts = variant->parts,
        };
        return 1;
    }
    return 0;
}

void gemm_case_text(const struct gemm_case *gemm_case, char text[GEMM_CASE_TEXT_BYTES])
{
    snprintf(text, GEMM_CASE_TEXT_BYTES,
             "%s %s->%s bias %s groups %u rows %lld n %u k %u split %d align %u accumulate %d parts %d",
             gemm_layout_name(gemm_case->layout), dtype_name(gemm_case->dtype),
             dtype_name(gemm_case->dtype_c), dtype_name(gemm_case->dtype_bias), gemm_case->n_groups,
             (long long)gemm_case->n_rows, gemm_case->n, gemm_case->k, (int)gemm_case->split,
             gemm_case->alignment, gemm_case->accumulate, gemm_case->parts);
}

/* Rows of group l out of `left` that are not given away yet. */
static int64_t rows_of_group(enum gemm_split split, uint32_t n_groups, int64_t n_rows, uint32_t group,
                             int64_t left, uint64_t *seed)
{
    uint32_t n_filled = split == GEMM_SPLIT_LAST_EMPTY && n_groups > 1 ? n_groups - 1 : n_groups;
    if (group >= n_filled)
        return 0;
    if (split == GEMM_SPLIT_ALL_TO_ONE)
        return group == n_groups / 2 ? n_rows : 0;
    if (group == n_filled - 1)
        return left;
    if (split != GEMM_SPLIT_RANDOM)
        return n_rows / n_filled;
    if (values_random(seed) % 4 == 0)
        return 0;
    int64_t drawn = (int64_t)(values_random(seed) % (uint64_t)(2 * n_rows / n_filled + 1));
    return drawn < left ? drawn : left;
}

int64_t op_split_rows(enum gemm_split split, uint32_t n_groups, int64_t n_rows, uint32_t alignment,
                      int64_t *m_splits, int64_t *offsets)
{
    uint64_t seed = 77 + (uint64_t)n_rows;
    int64_t left = n_rows, align = alignment ? alignment : 1;
    offsets[0] = 0;
    for (uint32_t l = 0; l < n_groups; l++) {
        m_splits[l] = rows_of_group(split, n_groups, n_rows, l, left, &seed);
        left -= m_splits[l];
        offsets[l + 1] = offsets[l] + (m_splits[l] + align - 1) / align * align;
    }
    return offsets[n_groups];
}

int64_t gemm_case_rows(const struct gemm_case *gemm_case, int64_t *m_splits, int64_t *offsets)
{
    return op_split_rows(gemm_case->split, gemm_case->n_groups, gemm_case->n_rows, gemm_case->alignment,
                         m_splits, offsets);
}

int activation_case_at(size_t idx, struct activation_case *activation_case)
{
    static const struct activation_case sizes[] = {
        {.n_groups = 1, .ffn = 1, .hidden = 1, .n_rows = 1, .split = GEMM_SPLIT_EVEN, .alignment = 1},
        {.n_groups = 4, .ffn = 32, .hidden = 16, .n_rows = 0, .split = GEMM_SPLIT_EVEN, .alignment = 16},
        {.n_groups = 3,
         .ffn = 33,
         .hidden = 31,
         .n_rows = 31,
         .split = GEMM_SPLIT_LAST_EMPTY,
         .alignment = 16},
        {.n_groups = 8, .ffn = 127, .hidden = 64, .n_rows = 127, .split = GEMM_SPLIT_RANDOM, .alignment = 0},
        {.n_groups = 5,
         .ffn = 1536,
         .hidden = 257,
         .n_rows = 33,
         .split = GEMM_SPLIT_ALL_TO_ONE,
         .alignment = 128},
        {.n_groups = 16,
         .ffn = 48,
         .hidden = 32,
         .n_rows = 4095,
         .split = GEMM_SPLIT_RANDOM,
         .alignment = 128},
    };
    static const enum epd_activation kinds[] = {EPD_SWIGLU, EPD_GEGLU, EPD_RELU2};
    size_t n_sizes = sizeof(sizes) / sizeof(sizes[0]);
    if (idx >= n_sizes * 3 * N_FLOAT_DTYPES * 2)
        return 0;
    *activation_case = sizes[idx % n_sizes];
    idx /= n_sizes;
    activation_case->kind = kinds[idx % 3];
    activation_case->dtype = float_dtypes[idx / 3 % N_FLOAT_DTYPES];
    activation_case->weighted = activation_case->biased = idx / 9 == 1;
    return 1;
}
