/* epd-bench: the formulas it reports by, its statistics, its inputs. */
#include <check.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "client/bench/fill.h"
#include "client/bench/job.h"
#include "client/bench/sample.h"

static struct job standard_job(const char *name, enum job_op op, enum epd_dtype dtype)
{
    struct job job = {.op = op, .dtype = dtype, .n_ranks = 4};
    ck_assert_int_eq(job_take_case(&job, name), 1);
    return job;
}

START_TEST(formulas_of_a_standard_case_match_a_calculation_by_hand)
{
    struct job job = standard_job("mixtral", JOB_DISPATCH, EPD_BF16);
    /* Top-2 of 4 ranks reaches 4 (1 - (3/4)^2) = 1.75 ranks, 3 of 4 of them elsewhere. */
    ck_assert_double_eq_tol(job_wire_bytes(&job), 4096.0 * 4096 * 2 * 1.75 * 0.75, 1);
    job.op = JOB_MOE_FORWARD;
    ck_assert_double_eq_tol(job_wire_bytes(&job), 2 * 4096.0 * 4096 * 2 * 1.75 * 0.75, 1);
    ck_assert_double_eq_tol(job_flops(&job), 2.0 * 4096 * 2 * 3 * 4096 * 14336, 1);
    job.op = JOB_MOE_BACKWARD;
    ck_assert_double_eq_tol(job_flops(&job), 4.0 * 4096 * 2 * 3 * 4096 * 14336, 1);
    job.n_ranks = 1;
    ck_assert_double_eq(job_wire_bytes(&job), 0);
    ck_assert_int_eq(job_take_case(&job, "nonsense"), 0);
}
END_TEST

START_TEST(quantiles_are_values_that_were_measured)
{
    double samples[] = {5, 1, 4, 2, 3};
    sample_sort(samples, 5);
    ck_assert_double_eq(sample_quantile(samples, 5, 0.5), 3);
    ck_assert_double_eq(sample_quantile(samples, 5, 0.99), 5);
    ck_assert_double_eq(sample_quantile(samples, 5, 0), 1);
    ck_assert_double_eq(sample_quantile(samples, 1, 0.99), 1);
}
END_TEST

START_TEST(routing_never_names_an_expert_twice)
{
    int32_t experts[64 * 8];
    float weights[64 * 8];
    fill_routing(experts, weights, 64, 8, 8, 3);
    for (int t = 0; t < 64; t++) {
        unsigned seen = 0;
        for (int k = 0; k < 8; k++) {
            ck_assert_int_ge(experts[t * 8 + k], 0);
            ck_assert_int_lt(experts[t * 8 + k], 8);
            seen |= 1u << experts[t * 8 + k];
        }
        ck_assert_uint_eq(seen, 0xff);
    }
}
END_TEST

/* fp16 to fp32 for normal numbers. */
static float from_f16(uint16_t half)
{
    const float size = ldexpf((float)(1024 + (half & 0x3ff)), (half >> 10 & 31) - 25);
    return half & 0x8000 ? -size : size;
}

START_TEST(inputs_are_the_same_numbers_in_every_dtype)
{
    float exact[256];
    uint16_t bf16[256], f16[256];
    fill_values(exact, 256, EPD_F32, 1.0f / 64, 9);
    fill_values(bf16, 256, EPD_BF16, 1.0f / 64, 9);
    fill_values(f16, 256, EPD_F16, 1.0f / 64, 9);
    for (int i = 0; i < 256; i++) {
        const uint32_t bits = (uint32_t)bf16[i] << 16;
        float widened;
        memcpy(&widened, &bits, sizeof(widened));
        ck_assert(widened == exact[i]);
        ck_assert(from_f16(f16[i]) == exact[i]);
        ck_assert(fabsf(exact[i]) < 1.0f / 64 && exact[i] != 0);
    }
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("bench parts");
    TCase *tcase = tcase_create("all");
    tcase_add_test(tcase, formulas_of_a_standard_case_match_a_calculation_by_hand);
    tcase_add_test(tcase, quantiles_are_values_that_were_measured);
    tcase_add_test(tcase, routing_never_names_an_expert_twice);
    tcase_add_test(tcase, inputs_are_the_same_numbers_in_every_dtype);
    suite_add_tcase(suite, tcase);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_ENV);
    const int n_failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return n_failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
