/* The plans of many ranks that epd-bench --op plan-scale builds, and that its checks look. */
#include <check.h>
#include <stdlib.h>

#include "client/bench/plan_scale.h"
#include "client/bench/plan_world.h"

#define N_RANKS  96u /* more than a daemon takes; nodes whose number is no power of two */
#define N_TOKENS 33u
#define TOP_K    3u

static struct plan_world world;
static struct epd_error error;

static void open_world(double capacity_factor)
{
    ck_assert_msg(
        plan_world_init(&world, N_RANKS, 2 * N_RANKS, N_TOKENS, TOP_K, 64, capacity_factor, &error) == EPD_OK,
        "%s", error.text);
    uint64_t seed = 3;
    for (size_t t = 0; t < (size_t)N_RANKS * N_TOKENS; t++) {
        seed = seed * 6364136223846793005u + 1442695040888963407u;
        for (uint32_t k = 0; k < TOP_K; k++)
            world.topk_idx[t * TOP_K + k] = (int32_t)(((seed >> 33) + k * 61) % (2 * N_RANKS));
    }
}

START_TEST(plans_of_more_ranks_than_a_daemon_takes_are_whole)
{
    open_world(2);
    ck_assert_int_eq(plan_world_plan(&world, &error), EPD_OK);
    ck_assert_msg(plan_world_check(&world, &error) == EPD_OK, "%s", error.text);
    uint64_t n_sent = 0;
    for (uint32_t rank = 0; rank < N_RANKS; rank++)
        for (uint32_t node = 0; node < N_RANKS / PLAN_RANKS_PER_NODE; node++)
            n_sent += world.n_sent[(size_t)rank * (N_RANKS / PLAN_RANKS_PER_NODE) + node];
    ck_assert_uint_gt(n_sent, 0);
    ck_assert_uint_le(n_sent, (uint64_t)N_RANKS * N_TOKENS * TOP_K);
    plan_world_fini(&world);
}
END_TEST

START_TEST(rows_over_the_capacity_are_left_out_and_counted)
{
    int64_t n_dropped = 0;
    open_world(0.8);
    ck_assert_int_eq(plan_world_plan(&world, &error), EPD_OK);
    ck_assert_msg(plan_world_check(&world, &error) == EPD_OK, "%s", error.text);
    for (uint32_t rank = 0; rank < N_RANKS; rank++)
        n_dropped += world.dropped_rows[rank];
    ck_assert_int_gt(n_dropped, 0);
    plan_world_fini(&world);
}
END_TEST

START_TEST(a_plan_that_is_wrong_is_noticed)
{
    open_world(2);
    ck_assert_int_eq(plan_world_plan(&world, &error), EPD_OK);
    int32_t *owner = world.owner; /* of expert 0: at least two rows */
    ck_assert_int_ge(world.m_splits[0], 2);
    const int32_t first = owner[0];
    owner[0] = owner[1];
    ck_assert_int_eq(plan_world_check(&world, &error), EPD_INTERNAL); /* in two slots */
    owner[1] = first;
    ck_assert_int_eq(plan_world_check(&world, &error), EPD_INTERNAL); /* in another order */
    owner[1] = owner[0], owner[0] = first;
    ck_assert_int_eq(plan_world_check(&world, &error), EPD_OK);
    world.m_splits[1]++;
    ck_assert_int_eq(plan_world_check(&world, &error), EPD_INTERNAL);
    world.m_splits[1]--;
    world.schedule[0] = world.schedule[1];
    ck_assert_int_eq(plan_world_check(&world, &error), EPD_INTERNAL);
    world.topk_idx[5] = 2 * N_RANKS;
    ck_assert_int_eq(plan_world_plan(&world, &error), EPD_BAD_ROUTING);
    plan_world_fini(&world);
}
END_TEST

/* 160 times is what ranks * log(ranks) grows from 16 to 1,024. */
START_TEST(planning_that_grows_faster_than_ranks_times_their_logarithm_is_noticed)
{
    struct plan_scale_growth growth = plan_scale_growth(2, 300);
    ck_assert_double_eq_tol(growth.time, 150, 1e-9);
    ck_assert_double_eq_tol(growth.sizes, 160, 1e-9);
    ck_assert_int_eq(plan_scale_too_fast(&growth), 0);
    growth = plan_scale_growth(2, 2 * 64 * 64);
    ck_assert_int_eq(plan_scale_too_fast(&growth), 1);
    growth = plan_scale_growth(0, 1); /* below what the clock can tell */
    ck_assert_int_eq(plan_scale_too_fast(&growth), 1);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("bench plan");
    TCase *tcase = tcase_create("all");
    tcase_add_test(tcase, plans_of_more_ranks_than_a_daemon_takes_are_whole);
    tcase_add_test(tcase, rows_over_the_capacity_are_left_out_and_counted);
    tcase_add_test(tcase, a_plan_that_is_wrong_is_noticed);
    tcase_add_test(tcase, planning_that_grows_faster_than_ranks_times_their_logarithm_is_noticed);
    suite_add_tcase(suite, tcase);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_ENV);
    const int n_failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return n_failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
