/* train_moe: numbers on their way between fp32 and half precision, and how far they may be off in the end. */
#include <check.h>
#include <math.h>
#include <stdlib.h>

#include "client/examples/train_moe/losses.h"
#include "client/examples/train_moe/staging.h"

START_TEST(every_half_survives_the_way_to_fp32_and_back)
{
    for (uint32_t bits = 0; bits < 0x10000; bits++) {
        const float from_bf16 = staging_from_bf16((uint16_t)bits),
                    from_f16 = staging_from_f16((uint16_t)bits);
        if (!isnan(from_bf16))
            ck_assert_uint_eq(staging_to_bf16(from_bf16), bits);
        else
            ck_assert(isnan(staging_from_bf16(staging_to_bf16(from_bf16))));
        if (!isnan(from_f16))
            ck_assert_uint_eq(staging_to_f16(from_f16), bits);
        else
            ck_assert(isnan(staging_from_f16(staging_to_f16(from_f16))));
    }
}
END_TEST

/* Between two neighbours: to the nearer one, from the middle to the even one. */
START_TEST(numbers_between_halves_go_to_the_nearest_even)
{
    for (uint32_t bits = 0; bits < 0x7bff; bits++) {
        const float low = staging_from_f16((uint16_t)bits), high = staging_from_f16((uint16_t)(bits + 1));
        const float middle = low + (high - low) / 2;
        ck_assert_uint_eq(staging_to_f16(middle), bits % 2 ? bits + 1 : bits);
        ck_assert_uint_eq(staging_to_f16(nextafterf(middle, low)), bits);
        ck_assert_uint_eq(staging_to_f16(nextafterf(middle, high)), bits + 1);
        ck_assert_uint_eq(staging_to_f16(-nextafterf(middle, high)), (bits + 1) | 0x8000);
    }
    for (uint32_t bits = 0x80; bits < 0x7f7f; bits++) {
        const float low = staging_from_bf16((uint16_t)bits), high = staging_from_bf16((uint16_t)(bits + 1));
        const float middle = low + (high - low) / 2;
        ck_assert_uint_eq(staging_to_bf16(middle), bits % 2 ? bits + 1 : bits);
        ck_assert_uint_eq(staging_to_bf16(nextafterf(middle, low)), bits);
        ck_assert_uint_eq(staging_to_bf16(nextafterf(middle, high)), bits + 1);
    }
    ck_assert(isinf(staging_from_f16(staging_to_f16(65520.0f))));
    ck_assert_float_eq(staging_from_f16(staging_to_f16(65519.0f)), 65504.0f);
}
END_TEST

/* Of what the example takes while the test counts. */
static int counting, n_taken, fail_at;

/* Not hidden: the linker finds the names in the sanitizers' libraries as well. */
__attribute__((visibility("default"))) void *__wrap_calloc(size_t n, size_t bytes);
__attribute__((visibility("default"))) void __wrap_free(void *memory);
void *__real_calloc(size_t n, size_t bytes);
void __real_free(void *memory);

void *__wrap_calloc(size_t n, size_t bytes)
{
    if (!counting)
        return __real_calloc(n, bytes);
    if (n_taken + 1 == fail_at)
        return NULL;
    n_taken++;
    return __real_calloc(n, bytes);
}

void __wrap_free(void *memory)
{
    n_taken -= counting && memory;
    __real_free(memory);
}

START_TEST(staging_without_memory_keeps_none)
{
    struct staging staging;
    for (fail_at = 1; fail_at <= 3; fail_at++) {
        n_taken = 0;
        counting = 1;
        const enum epd_status status = staging_init(&staging, NULL, EPD_F16, 100, 0);
        if (status == EPD_OK)
            staging_fini(&staging);
        counting = 0;
        ck_assert_int_eq(status, fail_at <= 2 ? EPD_NO_MEMORY : EPD_OK);
        ck_assert_int_eq(n_taken, 0);
    }
}
END_TEST

START_TEST(losses_may_differ_by_the_dtype_and_by_what_tokens_may_choose)
{
    struct settings settings = {.dtype = EPD_F32, .n_experts = 8, .top_k = 2};
    ck_assert_double_eq(losses_tolerance(&settings), 1e-4);
    settings.dtype = EPD_F16;
    const double choosing = losses_tolerance(&settings);
    settings.top_k = 8;
    const double f16 = losses_tolerance(&settings);
    settings.dtype = EPD_BF16;
    ck_assert_double_eq_tol(losses_tolerance(&settings), 8 * f16, 1e-9); /* three bits less */
    ck_assert_double_gt(choosing, losses_tolerance(&settings));
    settings.tolerance = 0.5;
    ck_assert_double_eq(losses_tolerance(&settings), 0.5);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("train staging");
    TCase *tcase = tcase_create("all");
    tcase_add_test(tcase, every_half_survives_the_way_to_fp32_and_back);
    tcase_add_test(tcase, numbers_between_halves_go_to_the_nearest_even);
    tcase_add_test(tcase, staging_without_memory_keeps_none);
    tcase_add_test(tcase, losses_may_differ_by_the_dtype_and_by_what_tokens_may_choose);
    suite_add_tcase(suite, tcase);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_ENV);
    const int n_failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return n_failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
