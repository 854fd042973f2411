/* The table of op cases that every backend runs against the float64 reference, and the inputs of each case. A
 * case is fully determined by its row: the same case gives the same bytes on every backend.
 *
 * Three tables: whole layers with their exchange (op_case), grouped GEMMs (gemm_case), activations
 * (activation_case). */
#ifndef EPD_TESTS_REFERENCE_OP_CASES_H
#define EPD_TESTS_REFERENCE_OP_CASES_H

#include <stddef.h>
#include <stdint.h>

#include "tests/reference/reference.h"

/* Tokens per rank. */
enum op_tokens {
    OP_TOKENS_EQUAL,     /* every rank max_tokens */
    OP_TOKENS_UNEVEN,    /* rank r: max_tokens * (r + 1) / R */
    OP_TOKENS_ZERO_RANK, /* the last rank none, the others max_tokens */
};

enum op_pattern {
    OP_UNIFORM,       /* K distinct experts, each equally likely */
    OP_ALL_TO_ONE,    /* expert 0 (and 1 .. K - 1 for k > 0) for every token */
    OP_NONE,          /* every index -1 */
    OP_ZIPF,          /* expert e with weight 1 / (e + 1) */
    OP_SOME_MISSING,  /* uniform, every index -1 with probability 1/4 */
    OP_EMPTY_EXPERTS, /* uniform over the even experts only */
    OP_SILENT_RANK,   /* uniform over the experts of all ranks but the last, which receives nothing */
};

enum op_capacity {
    OP_CAPACITY_AMPLE, /* room to spare */
    OP_CAPACITY_EXACT, /* the largest need of any rank */
    OP_CAPACITY_SHORT, /* one real row less than in the fullest rank: each rank as full leaves out one row */
};

struct op_case {
    const char *name;
    enum epd_dtype dtype, idx_dtype;
    uint32_t world_size, n_experts, top_k, max_tokens, hidden, ffn, alignment;
    enum op_tokens tokens;
    enum op_pattern pattern;
    enum op_capacity capacity;
    enum epd_overflow overflow; /* what a plan would be created with; kernels do the same in both */
    enum epd_activation activation;
    int biased;
};

extern const struct op_case op_cases[];
extern const size_t n_op_cases;
/* The case of that name; ends the test program if there is none. */
const struct op_case *op_case_named(const char *name);

/* Inputs of one case, owned; typed as a caller would give them. Elements of x, weights and dout are uniform
 * in [-1, 1), of w1 and w2 so scaled that pre-activations and outputs are of size 1. */
struct op_inputs {
    struct reference_shape shape; /* with the capacity of the case */
    uint32_t n_local_experts;
    int64_t *topk_idx[REFERENCE_MAX_RANKS];   /* [T, K] as the reference takes them */
    void *topk_typed[REFERENCE_MAX_RANKS];    /* [T, K] of idx_dtype */
    float *topk_weights[REFERENCE_MAX_RANKS]; /* [T, K] */
    void *x[REFERENCE_MAX_RANKS];             /* [T, H] */
    void *dout[REFERENCE_MAX_RANKS];          /* [T, H] */
    void *w1, *b1, *w2, *b2; /* [E, 2F, H] [E, 2F] [E, H, F] [E, H]; b1, b2 NULL if not biased */
};

void op_inputs_init(struct op_inputs *inputs, const struct op_case *op_case);
void op_inputs_fini(struct op_inputs *inputs);
/* Writes topk_idx anew into topk_typed, after a test changed it. */
void op_inputs_retype(struct op_inputs *inputs, const struct op_case *op_case);

enum gemm_split {
    GEMM_SPLIT_EVEN,       /* remainder to the last */
    GEMM_SPLIT_RANDOM,     /* uneven, zeros likely */
    GEMM_SPLIT_LAST_EMPTY, /* even over all but the last */
    GEMM_SPLIT_ALL_TO_ONE, /* all rows in the middle group */
};

struct gemm_case {
    enum epd_gemm_layout layout;
    enum epd_dtype dtype, dtype_c, dtype_bias; /* dtype_bias unspecified: no bias or dbias */
    uint32_t n_groups, n, k;
    int64_t n_rows; /* sum of the splits */
    enum gemm_split split;
    uint32_t alignment; /* of the slabs; 0: packed, no offsets given */
    int accumulate, parts;
};

/* Case number idx of the product of shapes, dtypes and variants; 0 past the end. Heavy shapes come in bf16
 * and f32 and in one variant per layout. */
int gemm_case_at(size_t idx, struct gemm_case *gemm_case);
/* "TN bf16->f32 bias f32 groups 8 rows 1027 n 512 k 128 split 1 align 16 accumulate 0 parts 0". */
#define GEMM_CASE_TEXT_BYTES 160
void gemm_case_text(const struct gemm_case *gemm_case, char text[GEMM_CASE_TEXT_BYTES]);
/* m_splits [L], offsets [L + 1]; returns offsets[L]. */
int64_t gemm_case_rows(const struct gemm_case *gemm_case, int64_t *m_splits, int64_t *offsets);

struct activation_case {
    enum epd_activation kind;
    enum epd_dtype dtype;
    uint32_t n_groups, ffn, hidden;
    int64_t n_rows;
    enum gemm_split split;
    uint32_t alignment;
    int weighted, biased;
};

int activation_case_at(size_t idx, struct activation_case *activation_case);

/* Rows split over groups in a pattern and laid out with an alignment (0: packed); returns offsets[n_groups].
 */
int64_t op_split_rows(enum gemm_split split, uint32_t n_groups, int64_t n_rows, uint32_t alignment,
                      int64_t *m_splits, int64_t *offsets);

#endif
