/* epd-bench: the formulas it reports by, its statistics, its inputs. */
#include <check.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "client/bench/counted.h"
#include "client/bench/fill.h"
#include "client/bench/job.h"
#include "client/bench/sample.h"
#include "client/bench/traffic.h"

static struct job standard_job(const char *name, enum job_op op, enum epd_dtype dtype)
{
    struct job job = {.op = op, .dtype = dtype, .n_ranks = 4};
    ck_assert_int_eq(job_take_case(&job, name), 1);
    return job;
}

START_TEST(work_of_a_standard_case_matches_a_calculation_by_hand)
{
    struct job job = standard_job("mixtral", JOB_MOE_FORWARD, EPD_BF16);
    ck_assert_double_eq_tol(job_flops(&job), 2.0 * 4096 * 2 * 3 * 4096 * 14336, 1);
    job.op = JOB_MOE_BACKWARD;
    ck_assert_double_eq_tol(job_flops(&job), 4.0 * 4096 * 2 * 3 * 4096 * 14336, 1);
    ck_assert_int_eq(job_take_case(&job, "nonsense"), 0);
}
END_TEST

/* Two of eight experts miss a given rank of four with C(6,2) / C(8,2) = 15/28: a token goes to 13/7 ranks, 3/4 of them others. */
START_TEST(traffic_is_what_the_drawn_routing_sends)
{
    struct traffic traffic;
    struct job job = standard_job("mixtral", JOB_DISPATCH, EPD_BF16);
    const double row_bytes = 4096 * 2, remote_rows = 4096 * 13.0 / 7 * 0.75;
    ck_assert_int_eq(traffic_count(&job, &traffic), EPD_OK);
    ck_assert_double_eq_tol(traffic.wire_bytes / (remote_rows * row_bytes), 1, 0.03);
    ck_assert_double_eq_tol(traffic.moved_bytes / (4096 * 13.0 / 7 * row_bytes), 1, 0.03);
    ck_assert_double_eq_tol(traffic.rows / (4096 * 2), 1, 0.03);
    const double one_way = traffic.wire_bytes;
    job.op = JOB_MOE_FORWARD;
    ck_assert_int_eq(traffic_count(&job, &traffic), EPD_OK);
    ck_assert_double_eq(traffic.wire_bytes, 2 * one_way);
    job.op = JOB_GROUPED_GEMM;
    ck_assert_int_eq(traffic_count(&job, &traffic), EPD_OK);
    ck_assert_double_eq(traffic.moved_bytes, 0);
    job = standard_job("mixtral", JOB_DISPATCH, EPD_BF16);
    job.n_ranks = 1;
    ck_assert_int_eq(traffic_count(&job, &traffic), EPD_OK);
    ck_assert_double_eq(traffic.wire_bytes, 0);
    ck_assert_double_eq(traffic.moved_bytes, 4096 * row_bytes);
}
END_TEST

/* With two nodes of two ranks: two of eight experts miss a node's four with C(4,2) / C(8,2) = 3/14, so 11/14 of the tokens cross, and
 * as many come. */
START_TEST(between_nodes_a_token_counts_once_for_each)
{
    struct traffic traffic;
    struct job job = standard_job("mixtral", JOB_DISPATCH, EPD_BF16);
    ck_assert_int_eq(traffic_count(&job, &traffic), EPD_OK);
    ck_assert_double_eq(traffic.network_bytes, 0);
    job.n_nodes = 2;
    ck_assert_int_eq(traffic_count(&job, &traffic), EPD_OK);
    ck_assert_double_eq_tol(traffic.network_bytes / (2 * 4096 * 11.0 / 14 * 4096 * 2), 1, 0.03);
    const double one_way = traffic.network_bytes;
    job.op = JOB_MOE_FORWARD;
    ck_assert_int_eq(traffic_count(&job, &traffic), EPD_OK);
    ck_assert_double_eq(traffic.network_bytes, 2 * one_way);
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

static int descending(const void *left, const void *right)
{
    const double a = *(const double *)left, b = *(const double *)right;
    return (a < b) - (a > b);
}

/* With a popularity so uneven that the last of the eight has a chance of one in a thousand million. */
START_TEST(routing_never_names_an_expert_twice)
{
    struct job job = {.n_ranks = 1, .n_tokens = 64, .n_experts = 8, .top_k = 8};
    int32_t experts[64 * 8];
    float weights[64 * 8];
    job.zipf = _i;
    ck_assert_int_eq(fill_routing(&job, 3, experts, weights), EPD_OK);
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

/* Chances 1, 1/2, 1/3, 1/4 of 25/12, in an order that is the same on every rank. */
START_TEST(zipf_routing_has_one_order_of_popularity_on_all_ranks)
{
    struct job job = {.n_ranks = 2, .n_tokens = 40000, .n_experts = 4, .top_k = 1, .zipf = 1};
    static int32_t experts[2][40000];
    int n_rows[2][4] = {{0}}, order[4] = {0, 1, 2, 3};
    for (uint32_t rank = 0; rank < 2; rank++) {
        ck_assert_int_eq(fill_routing(&job, rank, experts[rank], NULL), EPD_OK);
        for (int t = 0; t < 40000; t++)
            n_rows[rank][experts[rank][t]]++;
    }
    ck_assert_int_ne(memcmp(experts[0], experts[1], sizeof(experts[0])), 0);
    for (int i = 0; i < 4; i++)
        for (int k = i + 1; k < 4; k++)
            if (n_rows[0][order[k]] > n_rows[0][order[i]]) {
                const int other = order[i];
                order[i] = order[k];
                order[k] = other;
            }
    for (int rank = 0; rank < 2; rank++)
        for (int i = 0; i < 4; i++)
            ck_assert_double_eq_tol(n_rows[rank][order[i]] / 40000.0, 12.0 / 25 / (i + 1), 0.01);
}
END_TEST

/* The i-th of four experts is among the two of a token when it comes first, or after one that is not it. */
START_TEST(zipf_routing_draws_further_experts_in_proportion_to_what_is_left)
{
    struct job job = {.n_ranks = 1, .n_tokens = 40000, .n_experts = 4, .top_k = 2, .zipf = 2};
    static int32_t experts[40000][2];
    const double chance[4] = {144.0 / 205, 36.0 / 205, 16.0 / 205, 9.0 / 205};
    double found[4] = {0};
    ck_assert_int_eq(fill_routing(&job, 0, experts[0], NULL), EPD_OK);
    for (int t = 0; t < 40000; t++)
        for (int k = 0; k < 2; k++)
            found[experts[t][k]] += 1.0 / 40000;
    qsort(found, 4, sizeof(found[0]), descending);
    for (int i = 0; i < 4; i++) {
        double among = chance[i];
        for (int first = 0; first < 4; first++)
            if (first != i)
                among += chance[first] * chance[i] / (1 - chance[first]);
        ck_assert_double_eq_tol(found[i], among, 0.01);
    }
}
END_TEST

/* What copied between two documents, of a job. */
static double copied(const char *before, const char *after, enum job_op op)
{
    const struct counted from = counted_in(before, op), to = counted_in(after, op);
    return counted_between(&from, &to).copied_bytes;
}

/* The daemon counts since it started, by its own names of the ops. */
START_TEST(what_a_job_did_is_what_the_daemon_counted_since_it_began)
{
    const char *before = "{\"ops\": [{\"op\": \"combine\", \"launches\": 4, \"copied_bytes\": 100, "
                         "\"network_bytes\": 1000}]}";
    const char *after = "{\"ops\": [{\"op\": \"dispatch\", \"copied_bytes\": 7}, {\"op\": \"combine\", "
                        "\"launches\": 6, \"copied_bytes\": 130, \"network_bytes\": 5000}]}";
    ck_assert_double_eq(copied(before, after, JOB_COMBINE), 30);
    ck_assert_double_eq(copied(before, after, JOB_COMBINE_WEIGHTED), 30);
    ck_assert_double_eq(copied(before, after, JOB_DISPATCH), 7);
    ck_assert_double_eq(copied(before, after, JOB_MOE_FORWARD), 0);
    ck_assert_double_eq(copied("not a document", after, JOB_COMBINE), -1);
    ck_assert_double_eq(copied(before, "not a document", JOB_COMBINE), -1);
    ck_assert_double_eq(copied("{\"ops\": [{\"op\": \"combine\"}]}", after, JOB_COMBINE), -1);
    const struct counted from = counted_in(before, JOB_COMBINE), to = counted_in(after, JOB_COMBINE);
    ck_assert_double_eq(counted_between(&from, &to).launches, 2);
    ck_assert_double_eq(counted_between(&from, &to).network_bytes, 4000);
    ck_assert_double_eq(counted_between(&to, &from).network_bytes, -1);
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
    tcase_add_test(tcase, work_of_a_standard_case_matches_a_calculation_by_hand);
    tcase_add_test(tcase, traffic_is_what_the_drawn_routing_sends);
    tcase_add_test(tcase, between_nodes_a_token_counts_once_for_each);
    tcase_add_test(tcase, quantiles_are_values_that_were_measured);
    tcase_add_loop_test(tcase, routing_never_names_an_expert_twice, 0, 11);
    tcase_add_test(tcase, zipf_routing_draws_further_experts_in_proportion_to_what_is_left);
    tcase_add_test(tcase, what_a_job_did_is_what_the_daemon_counted_since_it_began);
    tcase_add_test(tcase, zipf_routing_has_one_order_of_popularity_on_all_ranks);
    tcase_add_test(tcase, inputs_are_the_same_numbers_in_every_dtype);
    suite_add_tcase(suite, tcase);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_ENV);
    const int n_failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return n_failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
