/* Grouped GEMMs of all layouts, dtypes and shapes of the table against the reference; splits that lie. */
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/host/host.h"
#include "tests/reference/op_cases.h"
#include "tests/reference/values.h"
#include "tests/unit/kernels/suite.h"

#define MAX_GROUPS 16
#define GUARD_ROWS 2
/* Cases with more multiplications than this run twice instead of SUITE_REPEATS times. */
#define HEAVY_PRODUCTS 200000000

/* One case with its memory. a, and b of NT, are poison outside the groups. */
struct fixture {
    struct gemm_case test_case;
    int64_t m_splits[MAX_GROUPS], offsets[MAX_GROUPS + 1];
    size_t n_rows, n_a, n_b, n_c, n_bias; /* rows with guard rows; elements */
    void *a, *b, *c, *c_before, *bias, *bias_before;
    const void *b_parts[MAX_GROUPS];
    void *c_parts[MAX_GROUPS];
    double *want_c, *want_bias;
    struct kernel_error error;
    struct host_scratch scratch;
};

static void *filled(enum epd_dtype dtype, size_t n, uint64_t *seed)
{
    void *memory = values_alloc(n, dtype_bytes(dtype));
    values_fill(dtype, memory, n, -1, 1, seed);
    return memory;
}

static void *filled_rows(const struct fixture *f, size_t width, uint64_t *seed)
{
    enum epd_dtype dtype = f->test_case.dtype;
    char *memory = values_alloc(f->n_rows * width, dtype_bytes(dtype));
    values_poison(memory, f->n_rows * width * dtype_bytes(dtype));
    for (uint32_t l = 0; l < f->test_case.n_groups; l++)
        values_fill(dtype, memory + (size_t)f->offsets[l] * width * dtype_bytes(dtype),
                    (size_t)f->m_splits[l] * width, -1, 1, seed);
    return memory;
}

static int in_group(const struct fixture *f, size_t row)
{
    for (uint32_t l = 0; l < f->test_case.n_groups; l++)
        if ((int64_t)row >= f->offsets[l] && (int64_t)row < f->offsets[l] + f->m_splits[l])
            return 1;
    return 0;
}

/* What c and bias hold before: poison, except where NT accumulates and where TN reads its bias. */
static void init_outputs(struct fixture *f, uint64_t *seed)
{
    const struct gemm_case *c = &f->test_case;
    size_t c_bytes = f->n_c * dtype_bytes(c->dtype_c), bias_bytes = f->n_bias * dtype_bytes(c->dtype_bias);
    f->c = values_alloc(f->n_c, dtype_bytes(c->dtype_c));
    f->c_before =
        c->accumulate ? filled(c->dtype_c, f->n_c, seed) : values_alloc(f->n_c, dtype_bytes(c->dtype_c));
    if (!c->accumulate)
        values_poison(f->c_before, c_bytes);
    if (!f->n_bias)
        return;
    f->bias = values_alloc(f->n_bias, dtype_bytes(c->dtype_bias));
    f->bias_before = filled(c->dtype_bias, f->n_bias, seed);
    if (c->layout == EPD_GEMM_NT && !c->accumulate)
        values_poison(f->bias_before, bias_bytes);
}

static void compute_reference(struct fixture *f)
{
    const struct gemm_case *c = &f->test_case;
    struct reference_groups groups = {
        .n_groups = c->n_groups, .m_splits = f->m_splits, .offsets = f->offsets};
    double *a = values_decoded(c->dtype, f->a, f->n_a), *b = values_decoded(c->dtype, f->b, f->n_b);
    f->want_c =
        c->accumulate ? values_decoded(c->dtype_c, f->c_before, f->n_c) : values_alloc_doubles(f->n_c);
    f->want_bias = f->n_bias && (c->accumulate || c->layout == EPD_GEMM_TN)
                       ? values_decoded(c->dtype_bias, f->bias_before, f->n_bias)
                       : values_alloc_doubles(f->n_bias);
    double *bias = f->n_bias ? f->want_bias : NULL;
    if (c->layout == EPD_GEMM_TN)
        reference_gemm_tn(&groups, c->n, c->k, a, b, bias, f->want_c);
    else if (c->layout == EPD_GEMM_NN)
        reference_gemm_nn(&groups, c->n, c->k, a, b, f->want_c);
    else
        reference_gemm_nt(&groups, c->n, c->k, a, b, c->accumulate, f->want_c, bias);
    free(a);
    free(b);
}

static int fixture_init(struct fixture *f, size_t idx)
{
    *f = (struct fixture){0};
    if (!gemm_case_at(idx, &f->test_case))
        return 0;
    const struct gemm_case *c = &f->test_case;
    uint64_t seed = idx;
    size_t weights = (size_t)c->n_groups * c->n * c->k;
    f->n_rows = (size_t)gemm_case_rows(c, f->m_splits, f->offsets) + GUARD_ROWS;
    f->n_bias = c->dtype_bias ? (size_t)c->n_groups * c->n : 0;
    f->n_a = f->n_rows * (c->layout == EPD_GEMM_TN ? c->k : c->n);
    f->n_b = c->layout == EPD_GEMM_NT ? f->n_rows * c->k : weights;
    f->n_c = c->layout == EPD_GEMM_NT ? weights : f->n_rows * (c->layout == EPD_GEMM_TN ? c->n : c->k);
    f->a = filled_rows(f, f->n_a / f->n_rows, &seed);
    f->b = c->layout == EPD_GEMM_NT ? filled_rows(f, c->k, &seed) : filled(c->dtype, weights, &seed);
    init_outputs(f, &seed);
    for (uint32_t l = 0; l < c->n_groups; l++) {
        size_t at = (size_t)l * c->n * c->k;
        /* Weights of a group without rows are never looked at. */
        f->b_parts[l] = f->m_splits[l] ? (char *)f->b + at * dtype_bytes(c->dtype) : NULL;
        f->c_parts[l] = (char *)f->c + at * dtype_bytes(c->dtype_c);
    }
    compute_reference(f);
    return 1;
}

static void fixture_fini(struct fixture *f)
{
    void *owned[] = {f->a, f->b, f->c, f->c_before, f->bias, f->bias_before, f->want_c, f->want_bias};
    for (size_t i = 0; i < sizeof(owned) / sizeof(owned[0]); i++)
        free(owned[i]);
    host_scratch_fini(&f->scratch);
}

static struct gemm_args args_of(struct fixture *f)
{
    const struct gemm_case *c = &f->test_case;
    int nt = c->layout == EPD_GEMM_NT;
    return (struct gemm_args){
        .shape = {.layout = c->layout,
                  .dtype = c->dtype,
                  .dtype_c = c->dtype_c,
                  .dtype_bias = c->dtype_bias,
                  .n = c->n,
                  .k = c->k,
                  .accumulate = c->accumulate},
        .groups = {.n_groups = c->n_groups,
                   .m_splits = f->m_splits,
                   .offsets = c->alignment ? f->offsets : NULL,
                   .max_rows = (int64_t)f->n_rows - GUARD_ROWS},
        .a = f->a,
        .b = c->parts && !nt ? NULL : f->b,
        .b_parts = c->parts && !nt ? f->b_parts : NULL,
        .c = c->parts && nt ? NULL : f->c,
        .c_parts = c->parts && nt ? f->c_parts : NULL,
        .bias = nt ? NULL : f->bias,
        .dbias = nt ? f->bias : NULL,
        .error = &f->error,
    };
}

static void run(struct fixture *f)
{
    const struct gemm_case *c = &f->test_case;
    struct gemm_args args = args_of(f);
    memcpy(f->c, f->c_before, f->n_c * dtype_bytes(c->dtype_c));
    if (f->n_bias)
        memcpy(f->bias, f->bias_before, f->n_bias * dtype_bytes(c->dtype_bias));
    ck_assert_int_eq(host_gemm(&args, &f->scratch), EPD_OK);
}

/* Rows of c against the reference; rows of no group still hold what they held. */
static void check_row_output(const struct fixture *f, const char *name)
{
    const struct gemm_case *c = &f->test_case;
    size_t width = f->n_c / f->n_rows, row_bytes = width * dtype_bytes(c->dtype_c);
    struct tolerance tolerance = tolerance_sum(c->dtype_c, c->layout == EPD_GEMM_TN ? c->k : c->n, 0.33);
    char text[VALUES_TEXT_BYTES];
    for (size_t row = 0; row < f->n_rows; row++) {
        const char *got = (const char *)f->c + row * row_bytes;
        if (!in_group(f, row))
            ck_assert_msg(values_poisoned(got, row_bytes), "%s: row %zu of no group was written", name, row);
        else
            ck_assert_msg(values_match(c->dtype_c, got, f->want_c + row * width, width, tolerance, text),
                          "%s row %zu: %s", name, row, text);
    }
}

static void check_gradients(const struct fixture *f, const char *name)
{
    const struct gemm_case *c = &f->test_case;
    char text[VALUES_TEXT_BYTES];
    for (uint32_t l = 0; l < c->n_groups; l++) {
        size_t n = (size_t)c->n * c->k, m = (size_t)f->m_splits[l];
        struct tolerance exact = {0}, sum = tolerance_sum(c->dtype_c, m, 0.33);
        const char *got = (const char *)f->c + l * n * dtype_bytes(c->dtype_c);
        ck_assert_msg(values_match(c->dtype_c, got, f->want_c + l * n, n, m ? sum : exact, text),
                      "%s group %u: %s", name, l, text);
        if (!f->n_bias)
            continue;
        sum = tolerance_sum(c->dtype_bias, m, 0.58);
        got = (const char *)f->bias + l * c->n * dtype_bytes(c->dtype_bias);
        ck_assert_msg(values_match(c->dtype_bias, got, f->want_bias + l * c->n, c->n, m ? sum : exact, text),
                      "%s dbias of group %u: %s", name, l, text);
    }
}

static void check_repeats(struct fixture *f, const char *name)
{
    const struct gemm_case *c = &f->test_case;
    size_t c_bytes = f->n_c * dtype_bytes(c->dtype_c), bias_bytes = f->n_bias * dtype_bytes(c->dtype_bias);
    int n_runs = c->n_rows * c->n * c->k > HEAVY_PRODUCTS ? 2 : SUITE_REPEATS;
    void *first = values_alloc(c_bytes, 1), *first_bias = values_alloc(bias_bytes, 1);
    memcpy(first, f->c, c_bytes);
    if (bias_bytes)
        memcpy(first_bias, f->bias, bias_bytes);
    for (int i = 1; i < n_runs; i++) {
        run(f);
        ck_assert_msg(!memcmp(first, f->c, c_bytes), "%s: other bits in run %d", name, i + 1);
        ck_assert(!bias_bytes || !memcmp(first_bias, f->bias, bias_bytes));
    }
    free(first);
    free(first_bias);
}

static void check_layout(enum epd_gemm_layout layout)
{
    struct gemm_case peek;
    for (size_t idx = 0; gemm_case_at(idx, &peek); idx++) {
        struct fixture f;
        char name[GEMM_CASE_TEXT_BYTES];
        if (peek.layout != layout)
            continue;
        ck_assert(fixture_init(&f, idx));
        gemm_case_text(&f.test_case, name);
        run(&f);
        ck_assert_uint_eq(f.error.status, 0);
        if (layout == EPD_GEMM_NT)
            check_gradients(&f, name);
        else
            check_row_output(&f, name);
        check_repeats(&f, name);
        fixture_fini(&f);
    }
}

START_TEST(fprop_matches_the_reference_in_every_case)
{
    check_layout(EPD_GEMM_TN);
}
END_TEST

START_TEST(dgrad_matches_the_reference_in_every_case)
{
    check_layout(EPD_GEMM_NN);
}
END_TEST

START_TEST(wgrad_matches_the_reference_in_every_case)
{
    check_layout(EPD_GEMM_NT);
}
END_TEST

START_TEST(wgrad_of_no_rows_is_zero_or_leaves_the_accumulator_alone)
{
    int64_t m_splits[2] = {0, 0};
    uint16_t dw[2 * 6], dbias[2 * 2];
    struct kernel_error error = {0};
    struct host_scratch scratch = {0};
    struct gemm_args args = {
        .shape = {.layout = EPD_GEMM_NT,
                  .dtype = EPD_BF16,
                  .dtype_c = EPD_BF16,
                  .dtype_bias = EPD_BF16,
                  .n = 2,
                  .k = 3,
                  .accumulate = 1},
        .groups = {.n_groups = 2, .m_splits = m_splits, .max_rows = 0},
        .c = dw,
        .dbias = dbias,
        .error = &error,
    };
    values_poison(dw, sizeof(dw));
    values_poison(dbias, sizeof(dbias));
    ck_assert_int_eq(host_gemm(&args, &scratch), EPD_OK);
    ck_assert(values_poisoned(dw, sizeof(dw)) && values_poisoned(dbias, sizeof(dbias)));
    args.shape.accumulate = 0;
    ck_assert_int_eq(host_gemm(&args, &scratch), EPD_OK);
    for (int i = 0; i < 12; i++)
        ck_assert_uint_eq(dw[i], 0);
    for (int i = 0; i < 4; i++)
        ck_assert_uint_eq(dbias[i], 0);
    host_scratch_fini(&scratch);
}
END_TEST

/* Y = X W^T on one column, so that row m of Y is X[m] if it is in a group. */
static void check_bad_splits(const int64_t *m_splits, const int64_t *offsets, uint32_t n_groups,
                             const int *written, struct kernel_error want)
{
    float x[4] = {1, 2, 3, 4}, w[4] = {1, 1, 1, 1}, y[5];
    struct kernel_error error = {.rank = 2};
    struct host_scratch scratch = {0};
    values_poison(y, sizeof(y));
    struct gemm_args args = {
        .shape = {.layout = EPD_GEMM_TN, .dtype = EPD_F32, .dtype_c = EPD_F32, .n = 1, .k = 1},
        .groups = {.n_groups = n_groups, .m_splits = m_splits, .offsets = offsets, .max_rows = 4},
        .a = x,
        .b = w,
        .c = y,
        .error = &error,
    };
    ck_assert_int_eq(host_gemm(&args, &scratch), EPD_OK);
    for (int row = 0; row < 5; row++) {
        if (row < 4 && written[row])
            ck_assert_float_eq(y[row], x[row]);
        else
            ck_assert(values_poisoned(&y[row], sizeof(float)));
    }
    ck_assert_uint_eq(error.status, EPD_BAD_SPLITS);
    ck_assert_uint_eq(error.rank, 2);
    ck_assert_int_eq(error.expert, want.expert);
    ck_assert_int_eq(error.token, -1);
    ck_assert_int_eq(error.got, want.got);
    ck_assert_int_eq(error.allowed, 4);
    host_scratch_fini(&scratch);
}

START_TEST(a_negative_split_counts_as_none_and_is_recorded)
{
    int64_t m_splits[] = {1, -3, 2};
    int written[] = {1, 1, 1, 0};
    check_bad_splits(m_splits, NULL, 3, written, (struct kernel_error){.expert = 1, .got = -3});
}
END_TEST

START_TEST(splits_past_the_rows_are_cut_and_the_first_is_recorded)
{
    int64_t m_splits[] = {3, 2, INT64_MAX, 1};
    int written[] = {1, 1, 1, 1};
    check_bad_splits(m_splits, NULL, 4, written, (struct kernel_error){.expert = 1, .got = 5});
    int64_t huge[] = {2, INT64_MAX};
    check_bad_splits(huge, NULL, 2, written, (struct kernel_error){.expert = 1, .got = INT64_MAX});
}
END_TEST

START_TEST(offsets_outside_the_rows_are_clamped_and_recorded)
{
    int64_t m_splits[] = {1, 1, 1}, offsets[] = {3, 9, 0, 1};
    int written[] = {1, 0, 0, 1};
    check_bad_splits(m_splits, offsets, 3, written, (struct kernel_error){.expert = 1, .got = 9});
    int64_t negative[] = {-7, 2, 3, 4};
    int written_again[] = {1, 0, 1, 1};
    check_bad_splits(m_splits, negative, 3, written_again, (struct kernel_error){.expert = 0, .got = -7});
}
END_TEST

START_TEST(bias_gradient_of_weighted_rows_matches_double)
{
    enum epd_dtype dtypes[] = {EPD_F32, EPD_BF16, EPD_F16};
    enum { ROWS = 300, N = 270, GROUPS = 5 };
    for (int i = 0; i < 3 * 2; i++) {
        enum epd_dtype dtype = dtypes[i % 3];
        int accumulate = i / 3;
        uint64_t seed = (uint64_t)i;
        int64_t m_splits[GROUPS], offsets[GROUPS + 1];
        size_t rows = (size_t)op_split_rows(GEMM_SPLIT_RANDOM, GROUPS, ROWS, 16, m_splits, offsets);
        void *dy = filled(dtype, rows * N, &seed), *dbias = filled(dtype, GROUPS * N, &seed);
        float *weights = filled(EPD_F32, rows, &seed);
        double *dy_values = values_decoded(dtype, dy, rows * N);
        double *want =
            accumulate ? values_decoded(dtype, dbias, GROUPS * N) : values_alloc_doubles(GROUPS * N);
        for (int l = 0; l < GROUPS; l++)
            for (int64_t row = offsets[l]; row < offsets[l] + m_splits[l]; row++)
                for (int n = 0; n < N; n++)
                    want[l * N + n] += weights[row] * dy_values[row * N + n];
        struct kernel_error error = {0};
        struct bias_grad_args args = {
            .groups = {.n_groups = GROUPS,
                       .m_splits = m_splits,
                       .offsets = offsets,
                       .max_rows = (int64_t)rows},
            .dtype = dtype,
            .dtype_dbias = dtype,
            .n = N,
            .dy = dy,
            .row_weights = weights,
            .dbias = dbias,
            .accumulate = accumulate,
            .error = &error,
        };
        char text[VALUES_TEXT_BYTES];
        ck_assert_int_eq(host_bias_grad(&args), EPD_OK);
        ck_assert_msg(values_match(dtype, dbias, want, GROUPS * N, tolerance_of(dtype), text), "%s", text);
        free(dy);
        free(dbias);
        free(weights);
        free(dy_values);
        free(want);
    }
}
END_TEST

/* A lane of its own: scratch and output, shared operands. */
struct lane {
    pthread_t thread;
    struct gemm_args args;
    struct kernel_error error;
    enum epd_status status;
};

static void *run_lane(void *data)
{
    struct lane *lane = data;
    struct host_scratch scratch = {0};
    lane->status = EPD_OK;
    for (int i = 0; i < 20 && lane->status == EPD_OK; i++)
        lane->status = host_gemm(&lane->args, &scratch);
    host_scratch_fini(&scratch);
    return NULL;
}

START_TEST(lanes_that_run_at_once_get_the_bits_of_one_alone)
{
    enum { LANES = 4 };
    struct gemm_case peek;
    for (size_t idx = 0; gemm_case_at(idx, &peek); idx++) {
        struct fixture f;
        struct lane lanes[LANES];
        if (peek.accumulate || peek.parts || peek.n_rows > 127)
            continue;
        ck_assert(fixture_init(&f, idx));
        run(&f);
        size_t c_bytes = f.n_c * dtype_bytes(f.test_case.dtype_c);
        for (int i = 0; i < LANES; i++) {
            lanes[i] = (struct lane){.args = args_of(&f)};
            lanes[i].args.c = values_alloc(c_bytes, 1);
            memcpy(lanes[i].args.c, f.c_before, c_bytes);
            lanes[i].args.dbias = NULL; /* shared by all, and not a matter of the CBLAS library */
            lanes[i].args.error = &lanes[i].error;
            ck_assert_int_eq(pthread_create(&lanes[i].thread, NULL, run_lane, &lanes[i]), 0);
        }
        for (int i = 0; i < LANES; i++) {
            pthread_join(lanes[i].thread, NULL);
            ck_assert_int_eq(lanes[i].status, EPD_OK);
            ck_assert_mem_eq(lanes[i].args.c, f.c, c_bytes);
            free(lanes[i].args.c);
        }
        fixture_fini(&f);
    }
}
END_TEST

int main(void)
{
    const TTest *const tests[] = {
        fprop_matches_the_reference_in_every_case,
        dgrad_matches_the_reference_in_every_case,
        wgrad_matches_the_reference_in_every_case,
        wgrad_of_no_rows_is_zero_or_leaves_the_accumulator_alone,
        a_negative_split_counts_as_none_and_is_recorded,
        splits_past_the_rows_are_cut_and_the_first_is_recorded,
        offsets_outside_the_rows_are_clamped_and_recorded,
        bias_gradient_of_weighted_rows_matches_double,
        lanes_that_run_at_once_get_the_bits_of_one_alone,
    };
    return suite_run("kernels gemm", tests, sizeof(tests) / sizeof(tests[0]));
}
