/* Gated activations forward and backward against the reference, in every case of the table. */
#include <stdlib.h>
#include <string.h>

#include "kernels/host/host.h"
#include "tests/reference/op_cases.h"
#include "tests/reference/values.h"
#include "tests/unit/kernels/suite.h"

#define MAX_GROUPS 16
#define GUARD_ROWS 2

/* One case with its memory: inputs are poison outside the groups, outputs poison everywhere. */
struct fixture {
    struct activation_case test_case;
    int64_t m_splits[MAX_GROUPS], offsets[MAX_GROUPS + 1];
    size_t n_rows; /* guard rows included */
    void *preact, *d_act, *dy, *bias2;
    float *row_weights;
    double *preact_values, *d_act_values, *dy_values, *bias2_values, *weight_values;
    struct kernel_error error;
};

static void *poisoned(size_t n, enum epd_dtype dtype)
{
    void *memory = values_alloc(n, dtype_bytes(dtype));
    values_poison(memory, n * dtype_bytes(dtype));
    return memory;
}

/* [rows, width] with random numbers in the rows of the groups. */
static void *input_rows(const struct fixture *f, enum epd_dtype dtype, size_t width, double bound,
                        uint64_t *seed)
{
    char *memory = poisoned(f->n_rows * width, dtype);
    for (uint32_t l = 0; l < f->test_case.n_groups; l++)
        values_fill(dtype, memory + (size_t)f->offsets[l] * width * dtype_bytes(dtype),
                    (size_t)f->m_splits[l] * width, -bound, bound, seed);
    return memory;
}

static int fixture_init(struct fixture *f, size_t idx)
{
    *f = (struct fixture){0};
    if (!activation_case_at(idx, &f->test_case))
        return 0;
    const struct activation_case *c = &f->test_case;
    uint64_t seed = idx;
    f->n_rows =
        (size_t)op_split_rows(c->split, c->n_groups, c->n_rows, c->alignment, f->m_splits, f->offsets) +
        GUARD_ROWS;
    f->preact = input_rows(f, c->dtype, 2 * c->ffn, 4, &seed);
    f->d_act = input_rows(f, c->dtype, c->ffn, 1, &seed);
    f->dy = input_rows(f, c->dtype, c->hidden, 1, &seed);
    f->row_weights = input_rows(f, EPD_F32, 1, 1, &seed);
    f->bias2 = values_alloc(c->n_groups * c->hidden, dtype_bytes(c->dtype));
    values_fill(c->dtype, f->bias2, c->n_groups * c->hidden, -1, 1, &seed);
    f->preact_values = values_decoded(c->dtype, f->preact, f->n_rows * 2 * c->ffn);
    f->d_act_values = values_decoded(c->dtype, f->d_act, f->n_rows * c->ffn);
    f->dy_values = values_decoded(c->dtype, f->dy, f->n_rows * c->hidden);
    f->bias2_values = values_decoded(c->dtype, f->bias2, c->n_groups * c->hidden);
    f->weight_values = values_decoded(EPD_F32, f->row_weights, f->n_rows);
    return 1;
}

static void fixture_fini(struct fixture *f)
{
    void *owned[] = {f->preact,        f->d_act,        f->dy,        f->bias2,        f->row_weights,
                     f->preact_values, f->d_act_values, f->dy_values, f->bias2_values, f->weight_values};
    for (size_t i = 0; i < sizeof(owned) / sizeof(owned[0]); i++)
        free(owned[i]);
}

static struct row_groups groups_of(const struct fixture *f)
{
    return (struct row_groups){.n_groups = f->test_case.n_groups,
                               .m_splits = f->m_splits,
                               .offsets = f->test_case.alignment ? f->offsets : NULL,
                               .max_rows = (int64_t)f->n_rows - GUARD_ROWS};
}

static struct reference_groups reference_groups_of(const struct fixture *f)
{
    return (struct reference_groups){
        .n_groups = f->test_case.n_groups, .m_splits = f->m_splits, .offsets = f->offsets};
}

static int in_group(const struct fixture *f, size_t row)
{
    for (uint32_t l = 0; l < f->test_case.n_groups; l++)
        if ((int64_t)row >= f->offsets[l] && (int64_t)row < f->offsets[l] + f->m_splits[l])
            return 1;
    return 0;
}

/* Rows of the groups match, all other rows still are poison. */
static void check_rows(const struct fixture *f, const char *what, enum epd_dtype dtype, const void *got,
                       const double *want, size_t width, struct tolerance tolerance)
{
    char text[VALUES_TEXT_BYTES];
    size_t row_bytes = width * dtype_bytes(dtype);
    for (size_t row = 0; row < f->n_rows; row++) {
        const char *at = (const char *)got + row * row_bytes;
        if (!in_group(f, row))
            ck_assert_msg(values_poisoned(at, row_bytes), "%s: row %zu of no group was written", what, row);
        else
            ck_assert_msg(values_match(dtype, at, want + row * width, width, tolerance, text),
                          "%s %s %s ffn %u row %zu: %s", what, activation_name(f->test_case.kind),
                          dtype_name(dtype), f->test_case.ffn, row, text);
    }
}

START_TEST(activation_matches_the_reference_in_every_case)
{
    struct fixture f;
    for (size_t idx = 0; fixture_init(&f, idx); idx++) {
        const struct activation_case *c = &f.test_case;
        size_t n = f.n_rows * c->ffn, n_bytes = n * dtype_bytes(c->dtype);
        void *act = poisoned(n, c->dtype), *first = values_alloc(n_bytes, 1);
        double *want = values_alloc_doubles(n);
        struct reference_groups groups = reference_groups_of(&f);
        reference_activation(&groups, c->kind, c->ffn, f.preact_values, c->weighted ? f.weight_values : NULL,
                             want);
        struct activation_args args = {
            .groups = groups_of(&f),
            .kind = c->kind,
            .dtype = c->dtype,
            .ffn = c->ffn,
            .preact = f.preact,
            .act = act,
            .row_weights = c->weighted ? f.row_weights : NULL,
            .error = &f.error,
        };
        for (int repeat = 0; repeat < SUITE_REPEATS; repeat++) {
            values_poison(act, n_bytes);
            ck_assert_int_eq(host_activation(&args), EPD_OK);
            if (repeat == 0)
                memcpy(first, act, n_bytes);
            ck_assert(!memcmp(first, act, n_bytes));
        }
        check_rows(&f, "act", c->dtype, act, want, c->ffn, tolerance_of(c->dtype));
        ck_assert_uint_eq(f.error.status, 0);
        free(act);
        free(first);
        free(want);
        fixture_fini(&f);
    }
}
END_TEST

/* What the backward pass writes, and what it should have written. */
struct backward {
    void *d_preact, *weighted_act;
    float *d_row_weights;
    double *want_d_preact, *want_weighted_act, *want_d_row_weights;
};

static void backward_init(struct backward *b, const struct fixture *f)
{
    const struct activation_case *c = &f->test_case;
    size_t n = f->n_rows * c->ffn;
    *b = (struct backward){
        .d_preact = poisoned(2 * n, c->dtype),
        .weighted_act = poisoned(n, c->dtype),
        .d_row_weights = poisoned(f->n_rows, EPD_F32),
        .want_d_preact = values_alloc_doubles(2 * n),
        .want_weighted_act = values_alloc_doubles(n),
        .want_d_row_weights = values_alloc_doubles(f->n_rows),
    };
    struct reference_groups groups = reference_groups_of(f);
    struct reference_activation_bwd args = {
        .kind = c->kind,
        .ffn = c->ffn,
        .hidden = c->hidden,
        .preact = f->preact_values,
        .d_act = f->d_act_values,
        .row_weights = c->weighted ? f->weight_values : NULL,
        .dy = c->biased ? f->dy_values : NULL,
        .bias2 = c->biased ? f->bias2_values : NULL,
        .d_preact = b->want_d_preact,
        .weighted_act = b->want_weighted_act,
        .d_row_weights = b->want_d_row_weights,
    };
    reference_activation_bwd(&groups, &args);
}

static void backward_fini(struct backward *b)
{
    void *owned[] = {b->d_preact,      b->weighted_act,      b->d_row_weights,
                     b->want_d_preact, b->want_weighted_act, b->want_d_row_weights};
    for (size_t i = 0; i < sizeof(owned) / sizeof(owned[0]); i++)
        free(owned[i]);
}

static struct activation_bwd_args backward_args(struct fixture *f, const struct backward *b)
{
    const struct activation_case *c = &f->test_case;
    return (struct activation_bwd_args){
        .groups = groups_of(f),
        .kind = c->kind,
        .dtype = c->dtype,
        .ffn = c->ffn,
        .preact = f->preact,
        .d_act = f->d_act,
        .row_weights = c->weighted ? f->row_weights : NULL,
        .d_preact = b->d_preact,
        .weighted_act = b->weighted_act,
        .d_row_weights = b->d_row_weights,
        .dy = c->biased ? f->dy : NULL,
        .bias2 = c->biased ? f->bias2 : NULL,
        .hidden = c->hidden,
        .error = &f->error,
    };
}

static void check_backward(const struct fixture *f, const struct backward *b, const void *d_preact,
                           const void *weighted_act)
{
    const struct activation_case *c = &f->test_case;
    struct tolerance one = tolerance_of(c->dtype);
    check_rows(f, "d_preact", c->dtype, d_preact, b->want_d_preact, 2 * c->ffn, one);
    check_rows(f, "weighted_act", c->dtype, weighted_act, b->want_weighted_act, c->ffn, one);
    check_rows(f, "d_row_weights", EPD_F32, b->d_row_weights, b->want_d_row_weights, 1,
               tolerance_sum(EPD_F32, c->ffn + c->hidden, 3));
}

START_TEST(activation_backward_matches_the_reference_in_every_case)
{
    struct fixture f;
    for (size_t idx = 0; fixture_init(&f, idx); idx++) {
        struct backward b;
        backward_init(&b, &f);
        struct activation_bwd_args args = backward_args(&f, &b);
        for (int repeat = 0; repeat < 2; repeat++)
            ck_assert_int_eq(host_activation_bwd(&args), EPD_OK);
        check_backward(&f, &b, b.d_preact, b.weighted_act);
        backward_fini(&b);
        fixture_fini(&f);
    }
}
END_TEST

START_TEST(activation_backward_may_write_over_its_inputs)
{
    struct fixture f;
    for (size_t idx = 0; fixture_init(&f, idx); idx++) {
        struct backward b;
        backward_init(&b, &f);
        struct activation_bwd_args args = backward_args(&f, &b);
        args.d_preact = f.preact;
        args.weighted_act = f.d_act;
        ck_assert_int_eq(host_activation_bwd(&args), EPD_OK);
        check_backward(&f, &b, f.preact, f.d_act);
        backward_fini(&b);
        fixture_fini(&f);
    }
}
END_TEST

START_TEST(optional_outputs_of_activation_backward_may_be_left_out)
{
    struct fixture f;
    ck_assert(fixture_init(&f, 3));
    struct backward b;
    backward_init(&b, &f);
    struct activation_bwd_args args = backward_args(&f, &b);
    args.weighted_act = NULL;
    args.d_row_weights = NULL;
    ck_assert_int_eq(host_activation_bwd(&args), EPD_OK);
    check_rows(&f, "d_preact", f.test_case.dtype, b.d_preact, b.want_d_preact, 2 * f.test_case.ffn,
               tolerance_of(f.test_case.dtype));
    backward_fini(&b);
    fixture_fini(&f);
}
END_TEST

START_TEST(activation_of_extreme_gates_stays_finite)
{
    float preact[] = {-1e4f, -88.0f, 88.0f, 1e4f, 1.0f, 1.0f, 1.0f, 1.0f}, act[4];
    double want[] = {0, 0, 88, 1e4};
    int64_t m_splits = 1;
    struct kernel_error error = {0};
    char text[VALUES_TEXT_BYTES];
    for (enum epd_activation kind = EPD_SWIGLU; kind <= EPD_GEGLU; kind++) {
        struct activation_args args = {
            .groups = {.n_groups = 1, .m_splits = &m_splits, .max_rows = 1},
            .kind = kind,
            .dtype = EPD_F32,
            .ffn = 4,
            .preact = preact,
            .act = act,
            .error = &error,
        };
        ck_assert_int_eq(host_activation(&args), EPD_OK);
        ck_assert_msg(values_match(EPD_F32, act, want, 4, tolerance_of(EPD_F32), text), "%s", text);
    }
}
END_TEST

START_TEST(splits_past_the_buffer_are_clamped_and_recorded)
{
    float preact[2 * 4] = {1, 1, 1, 1, 1, 1, 1, 1}, act[4 + 1];
    int64_t m_splits[] = {2, -5, 3, INT64_MAX};
    struct kernel_error error = {.rank = 6};
    values_poison(act, sizeof(act));
    struct activation_args args = {
        .groups = {.n_groups = 4, .m_splits = m_splits, .max_rows = 4},
        .kind = EPD_RELU2,
        .dtype = EPD_F32,
        .ffn = 1,
        .preact = preact,
        .act = act,
        .error = &error,
    };
    ck_assert_int_eq(host_activation(&args), EPD_OK);
    for (int row = 0; row < 4; row++)
        ck_assert_float_eq(act[row], 1);
    ck_assert(values_poisoned(act + 4, sizeof(float)));
    ck_assert_uint_eq(error.status, EPD_BAD_SPLITS);
    ck_assert_uint_eq(error.rank, 6);
    ck_assert_int_eq(error.expert, 1);
    ck_assert_int_eq(error.got, -5);
    ck_assert_int_eq(error.allowed, 4);
}
END_TEST

int main(void)
{
    const TTest *const tests[] = {
        activation_matches_the_reference_in_every_case,
        activation_backward_matches_the_reference_in_every_case,
        activation_backward_may_write_over_its_inputs,
        optional_outputs_of_activation_backward_may_be_left_out,
        activation_of_extreme_gates_stays_finite,
        splits_past_the_buffer_are_clamped_and_recorded,
    };
    return suite_run("kernels activation", tests, sizeof(tests) / sizeof(tests[0]));
}
