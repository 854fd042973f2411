/* train_moe: numbers on their way between fp32 and half precision. */
#include <check.h>
#include <math.h>
#include <stdlib.h>

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

int main(void)
{
    Suite *suite = suite_create("train staging");
    TCase *tcase = tcase_create("all");
    tcase_add_test(tcase, every_half_survives_the_way_to_fp32_and_back);
    tcase_add_test(tcase, numbers_between_halves_go_to_the_nearest_even);
    suite_add_tcase(suite, tcase);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_ENV);
    const int n_failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return n_failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
