#include "tests/reference/op_cases.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tests/reference/values.h"

/* Rows of the table: name, dtype, index dtype, R, E, K, T, H, F, alignment, tokens, pattern, capacity,
 * overflow, activation, biased. */
#define CASE(id, data, index, r, e, k, t, h, f, align, tok, pat, cap, over, act, bias)                       \
    {                                                                                                        \
        .name = id, .dtype = EPD_##data, .idx_dtype = EPD_##index, .world_size = r, .n_experts = e,          \
        .top_k = k, .max_tokens = t, .hidden = h, .ffn = f, .alignment = align, .tokens = OP_TOKENS_##tok,   \
        .pattern = OP_##pat, .capacity = OP_CAPACITY_##cap, .overflow = EPD_OVERFLOW_##over,                 \
        .activation = EPD_##act, .biased = bias,                                                             \
    }

/* clang-format off */
const struct op_case op_cases[] = {
    CASE("smallest",            F32,  I64, 1,  1, 1,    1,   8,  8,   1, EQUAL,     UNIFORM,       AMPLE, ERROR, SWIGLU, 0),
    CASE("no tokens at all",    F32,  I64, 2,  4, 2,    0,  32, 16,   1, EQUAL,     UNIFORM,       AMPLE, ERROR, SWIGLU, 1),
    CASE("one rank",            F32,  I32, 1,  8, 2,   33,  64, 48,  16, EQUAL,     UNIFORM,       AMPLE, ERROR, SWIGLU, 1),
    CASE("one rank bf16",       BF16, I64, 1,  8, 8,   31,  64, 48,   1, EQUAL,     UNIFORM,       EXACT, ERROR, GEGLU,  0),
    CASE("uniform f32",         F32,  I64, 4, 16, 2,  127,  64, 48,   1, EQUAL,     UNIFORM,       EXACT, ERROR, SWIGLU, 1),
    CASE("uniform bf16",        BF16, I32, 4, 16, 2,  127,  64, 48,  16, EQUAL,     UNIFORM,       EXACT, ERROR, SWIGLU, 1),
    CASE("uniform f16",         F16,  I64, 4, 16, 2,  127,  64, 48, 128, EQUAL,     UNIFORM,       EXACT, ERROR, SWIGLU, 1),
    CASE("top-1",               BF16, I32, 2,  8, 1,  127, 128, 64, 128, EQUAL,     UNIFORM,       AMPLE, ERROR, SWIGLU, 0),
    CASE("top-8",               BF16, I64, 4, 32, 8,   33, 128, 32,  16, EQUAL,     UNIFORM,       AMPLE, ERROR, SWIGLU, 0),
    CASE("top-8 of 8",          F32,  I32, 2,  8, 8,   31,  40, 24,  16, EQUAL,     UNIFORM,       AMPLE, ERROR, RELU2,  1),
    CASE("odd sizes",           F32,  I32, 3,  9, 2,   31,  33, 31,   1, UNEVEN,    UNIFORM,       AMPLE, ERROR, SWIGLU, 1),
    CASE("odd sizes bf16",      BF16, I64, 3,  9, 3,   33,  31, 33,  16, UNEVEN,    UNIFORM,       AMPLE, ERROR, GEGLU,  1),
    CASE("wide rows",           F32,  I64, 2,  4, 2,   31, 2056, 8,   1, EQUAL,     UNIFORM,       AMPLE, ERROR, SWIGLU, 0),
    CASE("wide rows bf16",      BF16, I64, 2,  4, 2,   31, 2056, 8,  16, EQUAL,     UNIFORM,       AMPLE, ERROR, SWIGLU, 0),
    CASE("many tokens",         F32,  I32, 2,  8, 2, 4095,  32, 16,   1, EQUAL,     UNIFORM,       EXACT, ERROR, SWIGLU, 1),
    CASE("many tokens bf16",    BF16, I64, 2,  8, 2, 4095,  32, 16, 128, EQUAL,     ZIPF,          AMPLE, ERROR, SWIGLU, 0),
    CASE("many experts",        BF16, I64, 4, 256, 8, 127,  32,  8,  16, EQUAL,     UNIFORM,       AMPLE, ERROR, SWIGLU, 0),
    CASE("eight ranks",         F16,  I32, 8, 64, 4,   33,  64, 16,  16, UNEVEN,    ZIPF,          AMPLE, ERROR, SWIGLU, 0),
    CASE("all to one f32",      F32,  I64, 4,  8, 1,  127,  64, 32,   1, EQUAL,     ALL_TO_ONE,    EXACT, ERROR, SWIGLU, 1),
    CASE("all to one bf16",     BF16, I64, 4,  8, 2,  127,  64, 32, 128, EQUAL,     ALL_TO_ONE,    EXACT, ERROR, SWIGLU, 1),
    CASE("none routed",         BF16, I64, 2,  8, 2,   33,  64, 32, 128, EQUAL,     NONE,          AMPLE, ERROR, SWIGLU, 1),
    CASE("none routed f32",     F32,  I32, 2,  8, 2,   33,  64, 32,   1, EQUAL,     NONE,          AMPLE, ERROR, SWIGLU, 1),
    CASE("zipf",                F32,  I64, 4, 16, 4,  127,  64, 32,  16, UNEVEN,    ZIPF,          AMPLE, ERROR, GEGLU,  1),
    CASE("some missing f32",    F32,  I32, 4, 16, 2,  127,  64, 32,  16, EQUAL,     SOME_MISSING,  AMPLE, ERROR, SWIGLU, 1),
    CASE("some missing bf16",   BF16, I64, 4, 16, 8,   33,  64, 32,   1, EQUAL,     SOME_MISSING,  AMPLE, ERROR, RELU2,  0),
    CASE("zero tokens rank",    F32,  I64, 4,  8, 2,   33,  64, 32,   1, ZERO_RANK, UNIFORM,       AMPLE, ERROR, SWIGLU, 1),
    CASE("zero tokens bf16",    BF16, I32, 2,  8, 2,  127,  64, 32, 128, ZERO_RANK, UNIFORM,       AMPLE, ERROR, SWIGLU, 0),
    CASE("empty experts",       F32,  I64, 2,  8, 2,  127,  64, 32,  16, EQUAL,     EMPTY_EXPERTS, AMPLE, ERROR, SWIGLU, 1),
    CASE("empty experts bf16",  BF16, I64, 4, 32, 2,   31,  64, 32,   1, EQUAL,     EMPTY_EXPERTS, AMPLE, ERROR, SWIGLU, 1),
    CASE("receives nothing",    F32,  I64, 4,  8, 2,   33,  64, 32,  16, EQUAL,     SILENT_RANK,   EXACT, ERROR, SWIGLU, 1),
    CASE("receives nothing 16", F16,  I64, 2,  4, 1,   33,  64, 32,   1, EQUAL,     SILENT_RANK,   EXACT, DROP,  SWIGLU, 1),
    CASE("overflow error",      F32,  I64, 4, 16, 2,  127,  64, 32,   1, EQUAL,     UNIFORM,       SHORT, ERROR, SWIGLU, 1),
    CASE("overflow drop",       F32,  I64, 4, 16, 2,  127,  64, 32,   1, EQUAL,     UNIFORM,       SHORT, DROP,  SWIGLU, 1),
    CASE("overflow drop bf16",  BF16, I32, 2,  8, 2,   33,  64, 32,  16, EQUAL,     ZIPF,          SHORT, DROP,  SWIGLU, 0),
    CASE("overflow all to one", BF16, I64, 4,  8, 8,   31,  64, 32, 128, EQUAL,     ALL_TO_ONE,    SHORT, DROP,  SWIGLU, 0),
    CASE("overflow error 1",    F16,  I32, 2,  2, 1,    1,  32, 16,   1, EQUAL,     ALL_TO_ONE,    SHORT, ERROR, SWIGLU, 0),
};
/* clang-format on */
const size_t n_op_cases = sizeof(op_cases) / sizeof(op_cases[0]);

const struct op_case *op_case_named(const char *name)
{
    for (size_t i = 0; i < n_op_cases; i++)
        if (!strcmp(op_cases[i].name, name))
            return &op_cases[i];
    fprintf(stderr, "no op case is named \"%s\"\n", name);
    abort();
}

static uint32_t tokens_of_rank(const struct op_case *op_case, uint32_t rank)
{
    switch (op_case->tokens) {
    case OP_TOKENS_UNEVEN:
        return op_case->max_tokens * (rank + 1) / op_case->world_size;
    case OP_TOKENS_ZERO_RANK:
        return rank + 1 == op_case->world_size ? 0 : op_case->max_tokens;
    default:
        return op_case->max_tokens;
    }
}

static int64_t draw_expert(const struct op_case *op_case, uint64_t *seed)
{
    uint32_t n_experts = op_case->n_experts, n_local = n_experts / op_case->world_size;
    double harmonic = 0, sum = 0;
    switch (op_case->pattern) {
    case OP_ZIPF:
        for (uint32_t e = 0; e < n_experts; e++)
            harmonic += 1.0 / (e + 1);
        double mark = values_uniform(seed, 0, harmonic);
        for (uint32_t e = 0; e < n_experts; e++) {
            sum += 1.0 / (e + 1);
            if (mark < sum)
                return e;
        }
        return n_experts - 1;
    case OP_EMPTY_EXPERTS:
        return (int64_t)(values_random(seed) % ((n_experts + 1) / 2) * 2);
    case OP_SILENT_RANK:
        return (int64_t)(values_random(seed) % (n_experts - n_local));
    default:
        return (int64_t)(values_random(seed) % n_experts);
    }
}

static int holds(const int64_t *experts, uint32_t n, int64_t expert)
{
    for (uint32_t i = 0; i < n; i++)
        if (experts[i] == expert)
            return 1;
    return 0;
}

/* K distinct experts by drawing again until they are. */
static void draw_token(const struct op_case *op_case, int64_t *experts, uint64_t *seed)
{
    for (uint32_t k = 0; k < op_case->top_k; k++) {
        do
            experts[k] = op_case->pattern == OP_ALL_TO_ONE ? (int64_t)k : draw_expert(op_case, seed);
        while (holds(experts, k, experts[k]));
    }
    for (uint32_t k = 0; k < op_case->top_k; k++)
        if (op_case->pattern == OP_NONE ||
            (op_case->pattern == OP_SOME_MISSING && values_random(seed) % 4 == 0))
            experts[k] = -1;
}

/* Capacity that leaves out exactly the last real row of the fullest rank, or none. */
static int64_t capacity_of(const struct op_case *op_case, const struct reference_routing *routing)
{
    uint32_t n_local = op_case->n_experts / op_case->world_size;
    int64_t largest_end = 0, largest_need = 0;
    for (uint32_t r = 0; r < op_case->world_size; r++) {
        const struct reference_rank *rank = &routing->ranks[r];
        for (uint32_t l = 0; l < n_local; l++)
            if (rank->m_splits[l] > 0 && rank->offsets[l] + rank->m_splits[l] > largest_end)
                largest_end = rank->offsets[l] + rank->m_splits[l];
        if (rank->needed_rows > largest_need)
            largest_need = rank->needed_rows;
    }
    if (op_case->capacity == OP_CAPACITY_AMPLE)
        return largest_need + 2 * op_case->alignment;
    return op_case->capacity == OP_CAPACITY_EXACT ? largest_need : largest_end - 1;
}

static void choose_capacity(struct op_inputs *inputs, const struct op_case *op_case)
{
    struct reference_routing routing;
    inputs->shape.capacity_rows = (int64_t)op_case->world_size * op_case->max_tokens * op_case->top_k +
                                  (int64_t)op_case->n_experts * op_case->alignment;
    reference_route(&routing, &inputs->shape, inputs->topk_idx);
    inputs->shape.capacity_rows = capacity_of(op_case, &routing);
    reference_routing_fini(&routing);
}

static void *fresh(enum epd_dtype dtype, size_t n, double bound, uint64_t *seed)
{
    void *data = values_alloc(n, dtype_bytes(dtype));
    values_fill(dtype, data, n, -bound, bound, seed);
    return data;
}

static void init_rank(struct op_inputs *inputs, const struct op_case *op_case, uint32_t rank, uint64_t *seed)
{
    size_t n_tokens = inputs->shape.n_tokens[rank], n_slots = n_tokens * op_case->top_k;
    inputs->topk_idx[rank] = values_alloc(n_slots, sizeof(int64_t));
    inputs->topk_typed[rank] = values_alloc(n_slots, sizeof(int64_t));
    for (size_t token = 0; token < n_tokens; token++)
        draw_token(op_case, inputs->topk_idx[rank] + token * op_case->top_k, seed);
    inputs->topk_weights[rank] = fresh(EPD_F32, n_slots, 1.0, seed);
    inputs->x[rank] = fresh(op_case->dtype, n_tokens * op_case->hidden, 1.0, seed);
    inputs->dout[rank] = fresh(op_case->dtype, n_tokens * op_case->hidden, 1.0, seed);
}

void op_inputs_retype(struct op_inputs *inputs, const struct op_case *op_case)
{
    for (uint32_t r = 0; r < op_case->world_size; r++) {
        for (size_t i = 0; i < (size_t)inputs->shape.n_tokens[r] * op_case->top_k; i++) {
            if (op_case->idx_dtype == EPD_I64)
                ((int64_t *)inputs->topk_typed[r])[i] = inputs->topk_idx[r][i];
            else
                ((int32_t *)inputs->topk_typed[r])[i] = (int32_t)inputs->topk_idx[r][i];
        }
    }
}

void op_inputs_init(struct op_inputs *inputs, const struct op_case *op_case)
{
    uint64_t seed = 1 + (uint64_t)(op_case - op_cases);
    size_t n_experts = op_case->n_experts, hidden = op_case->hidden, ffn = op_case->ffn;
    *inputs = (struct op_inputs){
        .n_local_experts = op_case->n_experts / op_case->world_size,
        .shape = {.world_size = op_case->world_size,
                  .n_experts = op_case->n_experts,
                  .top_k = op_case->top_k,
                  .hidden = op_case->hidden,
                  .ffn = op_case->ffn,
                  .alignment = op_case->alignment},
    };
    for (uint32_t r = 0; r < op_case->world_size; r++) {
        inputs->shape.n_tokens[r] = tokens_of_rank(op_case, r);
        init_rank(inputs, op_case, r, &seed);
    }
    op_inputs_retype(inputs, op_case);
    choose_capacity(inputs, op_case);
    /* A sum of n products of uniform [-1, 1) and [-b, b) has variance n b^2 / 9. */
    inputs->w1 = fresh(op_case->dtype, n_experts * 2 * ffn * hidden, 3 / sqrt((double)hidden), &seed);
    inputs->w2 = fresh(op_case->dtype, n_experts * hidden * ffn, 3 / sqrt((double)ffn), &seed);
    if (op_case->biased) {
        inputs->b1 = fresh(op_case->dtype, n_experts * 2 * ffn, 0.5, &seed);
        inputs->b2 = fresh(op_case->dtype, n_experts * hidden, 0.5, &seed);
    }
}

void op_inputs_fini(struct op_inputs *inputs)
{
    for (uint32_t r = 0; r < inputs->shape.world_size; r++) {
        free(inputs->topk_idx[r]);
        free(inputs->topk_typed[r]);
        free(inputs->topk_weights[r]);
        free(inputs->x[r]);
        free(inputs->dout[r]);
    }
    free(inputs->w1);
    free(inputs->b1);
    free(inputs->w2);
    free(inputs->b2);
}
