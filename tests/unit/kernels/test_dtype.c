/* Conversions of the host kernels against the definition of the formats, and the scratch they go through. */
#include <math.h>
#include <stdlib.h>

#include "kernels/host/dtype.h"
#include "kernels/host/scratch.h"
#include "tests/reference/values.h"
#include "tests/unit/kernels/suite.h"

static const enum epd_dtype half_dtypes[] = {EPD_BF16, EPD_F16};

START_TEST(every_half_pattern_loads_as_its_value)
{
    uint16_t *patterns = values_alloc(65536, sizeof(uint16_t));
    float *loaded = values_alloc(65536, sizeof(float));
    for (uint32_t i = 0; i < 65536; i++)
        patterns[i] = (uint16_t)i;
    for (int d = 0; d < 2; d++) {
        double *want = values_decoded(half_dtypes[d], patterns, 65536);
        dtype_load(loaded, patterns, half_dtypes[d], 65536);
        for (uint32_t i = 0; i < 65536; i++) {
            if (isnan(want[i]))
                ck_assert_msg(isnan(loaded[i]), "%s %04x: %g is no NaN", dtype_name(half_dtypes[d]), i,
                              loaded[i]);
            else
                ck_assert_msg(loaded[i] == want[i] && !signbit(loaded[i]) == !signbit(want[i]),
                              "%s %04x: %g, want %g", dtype_name(half_dtypes[d]), i, loaded[i], want[i]);
        }
        free(want);
    }
    free(patterns);
    free(loaded);
}
END_TEST

START_TEST(every_half_pattern_survives_load_and_store)
{
    for (int d = 0; d < 2; d++) {
        for (uint32_t i = 0; i < 65536; i++) {
            uint16_t pattern = (uint16_t)i, stored;
            float value;
            dtype_load(&value, &pattern, half_dtypes[d], 1);
            dtype_store(&stored, &value, half_dtypes[d], 1);
            if (isnan(value))
                continue;
            ck_assert_msg(stored == pattern, "%s %04x came back as %04x", dtype_name(half_dtypes[d]), i,
                          stored);
        }
    }
}
END_TEST

static void check_store(enum epd_dtype dtype, uint32_t bits)
{
    float value = dtype_float_of_bits(bits);
    uint16_t stored, want;
    double exact = value;
    dtype_store(&stored, &value, dtype, 1);
    values_encode(dtype, &want, &exact, 1);
    ck_assert_msg(stored == want, "%s of %a is %04x, want %04x", dtype_name(dtype), value, stored, want);
}

START_TEST(store_rounds_to_nearest_with_ties_to_even)
{
    uint64_t seed = 5;
    for (int d = 0; d < 2; d++) {
        /* Around every value, every midpoint of two values, and the ends of the range. */
        for (uint32_t i = 0; i < 65536; i++) {
            uint16_t pattern = (uint16_t)i;
            float value;
            dtype_load(&value, &pattern, half_dtypes[d], 1);
            uint32_t bits = dtype_bits_of_float(value),
                     half_step = half_dtypes[d] == EPD_BF16 ? 0x8000 : 0x1000;
            for (int off = -1; off <= 1 && isfinite(value); off++)
                for (int steps = 0; steps < 2; steps++) {
                    uint32_t near = bits + (uint32_t)off + (uint32_t)steps * half_step;
                    if (isfinite(dtype_float_of_bits(near)))
                        check_store(half_dtypes[d], near);
                }
        }
        for (int i = 0; i < 200000; i++) {
            uint32_t bits = (uint32_t)values_random(&seed);
            if (!isnan(dtype_float_of_bits(bits)))
                check_store(half_dtypes[d], bits);
        }
        /* Numbers around the subnormals of f16. */
        for (int i = 0; i < 200000; i++)
            check_store(half_dtypes[d], dtype_bits_of_float((float)values_uniform(&seed, -0x1p-13, 0x1p-13)));
    }
}
END_TEST

START_TEST(store_keeps_every_nan_a_nan)
{
    static const uint32_t nans[] = {0x7f800001, 0x7fc00000, 0xff800001, 0xffffffff, 0x7fffffff, 0x7f80ffff};
    for (int d = 0; d < 2; d++) {
        for (size_t i = 0; i < sizeof(nans) / sizeof(nans[0]); i++) {
            float value = dtype_float_of_bits(nans[i]), back;
            uint16_t stored;
            dtype_store(&stored, &value, half_dtypes[d], 1);
            dtype_load(&back, &stored, half_dtypes[d], 1);
            ck_assert_msg(isnan(back), "%s of %08x is %04x", dtype_name(half_dtypes[d]), nans[i], stored);
        }
    }
}
END_TEST

START_TEST(f16_overflows_to_infinity_from_65520_on)
{
    float values[] = {65504.0f, 65519.0f, 65520.0f, 1e30f, INFINITY, -65520.0f};
    uint16_t want[] = {0x7bff, 0x7bff, 0x7c00, 0x7c00, 0x7c00, 0xfc00}, stored[6];
    dtype_store(stored, values, EPD_F16, 6);
    for (int i = 0; i < 6; i++)
        ck_assert_uint_eq(stored[i], want[i]);
}
END_TEST

START_TEST(dot_product_matches_double_for_every_length)
{
    uint64_t seed = 9;
    enum epd_dtype dtypes[] = {EPD_F32, EPD_BF16, EPD_F16};
    for (int d = 0; d < 3; d++) {
        float a[600], b[600];
        values_fill(dtypes[d], a, 600, -1, 1, &seed);
        values_fill(dtypes[d], b, 600, -1, 1, &seed);
        double *a_values = values_decoded(dtypes[d], a, 600), *b_values = values_decoded(dtypes[d], b, 600);
        double want = 0;
        for (size_t n = 0; n <= 600; n++) {
            ck_assert_double_eq_tol(dtype_dot(a, b, dtypes[d], n), want,
                                    tolerance_sum(EPD_F32, n, 0.33).atol);
            if (n < 600)
                want += a_values[n] * b_values[n];
        }
        free(a_values);
        free(b_values);
    }
}
END_TEST

START_TEST(scratch_grows_and_is_reused)
{
    struct host_scratch scratch = {0};
    float *small, *large, *again;
    ck_assert_int_eq(host_scratch_acquire(&scratch, 10, &small), EPD_OK);
    ck_assert_int_eq(host_scratch_acquire(&scratch, 100000, &large), EPD_OK);
    values_poison(large, 100000 * sizeof(float));
    ck_assert_int_eq(host_scratch_acquire(&scratch, 500, &again), EPD_OK);
    ck_assert_ptr_eq(again, large);
    ck_assert_uint_eq((uintptr_t)large % 64, 0);
    host_scratch_fini(&scratch);
    ck_assert_ptr_null(scratch.data);
}
END_TEST

START_TEST(scratch_beyond_memory_is_refused_and_keeps_what_it_had)
{
    struct host_scratch scratch = {0};
    float *small, *huge = NULL;
    ck_assert_int_eq(host_scratch_acquire(&scratch, 10, &small), EPD_OK);
    ck_assert_int_eq(host_scratch_acquire(&scratch, SIZE_MAX / 2, &huge), EPD_NO_MEMORY);
    ck_assert_ptr_null(huge);
    ck_assert_ptr_eq(scratch.data, small);
    host_scratch_fini(&scratch);
}
END_TEST

int main(void)
{
    const TTest *const tests[] = {
        every_half_pattern_loads_as_its_value,
        every_half_pattern_survives_load_and_store,
        store_rounds_to_nearest_with_ties_to_even,
        store_keeps_every_nan_a_nan,
        f16_overflows_to_infinity_from_65520_on,
        dot_product_matches_double_for_every_length,
        scratch_grows_and_is_reused,
        scratch_beyond_memory_is_refused_and_keeps_what_it_had,
    };
    return suite_run("kernels dtype", tests, sizeof(tests) / sizeof(tests[0]));
}
