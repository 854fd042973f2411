/* Small parts by themselves: ids, quotas, counters, queues, sets, watches, failpoints. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "daemon/failpoint.h"
#include "daemon/histogram.h"
#include "daemon/launch_queue.h"
#include "daemon/loop_watch.h"
#include "daemon/number_set.h"
#include "daemon/quota.h"
#include "daemon/registry.h"
#include "daemon/stats.h"
#include "tests/unit/daemon/suite.h"

static struct epd_error error;

START_TEST(ids_grow_and_are_never_used_again)
{
    struct registry registry;
    uint64_t ids[1000], last = 0;
    int objects[1000];
    registry_init(&registry, 0);
    for (int i = 0; i < 1000; i++) {
        ck_assert_int_eq(registry_add(&registry, REGISTRY_BUFFER, 7, &objects[i], &ids[i], &error), EPD_OK);
        ck_assert_uint_gt(ids[i], last);
        last = ids[i];
    }
    for (int i = 0; i < 1000; i += 3)
        registry_remove(&registry, REGISTRY_BUFFER, ids[i]);
    for (int i = 0; i < 1000; i++)
        ck_assert_ptr_eq(registry_find(&registry, REGISTRY_BUFFER, ids[i]), i % 3 ? &objects[i] : NULL);
    uint64_t id;
    ck_assert_int_eq(registry_add(&registry, REGISTRY_BUFFER, 7, objects, &id, &error), EPD_OK);
    ck_assert_uint_eq(id, 1001);
    registry_remove(&registry, REGISTRY_BUFFER, id);
    for (int i = 0; i < 1000; i++)
        registry_remove(&registry, REGISTRY_BUFFER, ids[i]);
    ck_assert_uint_eq(registry_count(&registry, REGISTRY_BUFFER), 0);
    registry_fini(&registry);
}
END_TEST

START_TEST(unknown_foreign_and_stale_ids_are_told_apart)
{
    struct registry registry;
    uint64_t id;
    int object;
    void *found = NULL;
    registry_init(&registry, 3);
    ck_assert_int_eq(registry_add(&registry, REGISTRY_PLAN, 7, &object, &id, &error), EPD_OK);
    ck_assert_uint_eq(id, 3 * REGISTRY_IDS_PER_WORKER + 1);
    ck_assert_int_eq(registry_find_owned(&registry, REGISTRY_PLAN, id, 7, &found, &error), EPD_OK);
    ck_assert_ptr_eq(found, &object);
    ck_assert_int_eq(registry_find_owned(&registry, REGISTRY_PLAN, id, 8, &found, &error), EPD_FOREIGN_ID);
    ck_assert_int_eq(registry_find_owned(&registry, REGISTRY_BUFFER, id, 7, &found, &error), EPD_UNKNOWN_ID);
    ck_assert_int_eq(registry_find_owned(&registry, REGISTRY_PLAN, 5, 7, &found, &error), EPD_STALE_EPOCH);
    ck_assert_int_eq(registry_find_owned(&registry, REGISTRY_PLAN, 0, 7, &found, &error), EPD_UNKNOWN_ID);
    registry_remove(&registry, REGISTRY_PLAN, id);
    registry_fini(&registry);
}
END_TEST

START_TEST(quotas_of_session_and_uid_hold_and_are_given_back)
{
    struct accounts accounts;
    struct config config;
    struct quota a, b, c;
    config_init(&config);
    config.heap_per_session = 100;
    config.heap_per_uid = 150;
    config.sessions_per_uid = 2;
    quota_init(&accounts);
    ck_assert_int_eq(quota_open(&accounts, &config, 5, &a, &error), EPD_OK);
    ck_assert_int_eq(quota_open(&accounts, &config, 5, &b, &error), EPD_OK);
    ck_assert_int_eq(quota_open(&accounts, &config, 5, &c, &error), EPD_QUOTA);
    ck_assert_ptr_nonnull(strstr(error.text, "sessions of uid 5: 2 held, 1 more wanted, at most 2"));
    ck_assert_int_eq(quota_take(&accounts, &config, &a, QUOTA_HEAP_BYTES, 101, &error), EPD_QUOTA);
    ck_assert_int_eq(quota_take(&accounts, &config, &a, QUOTA_HEAP_BYTES, 100, &error), EPD_OK);
    ck_assert_uint_eq(quota_left(&config, &a, QUOTA_HEAP_BYTES), 0);
    ck_assert_int_eq(quota_take(&accounts, &config, &b, QUOTA_HEAP_BYTES, 51, &error), EPD_QUOTA);
    ck_assert_ptr_nonnull(strstr(error.text, "heap_bytes of uid 5: 100 held, 51 more wanted, at most 150"));
    ck_assert_int_eq(quota_take(&accounts, &config, &b, QUOTA_HEAP_BYTES, UINT64_MAX, &error), EPD_QUOTA);
    ck_assert_int_eq(quota_take(&accounts, &config, &b, QUOTA_IMPORTED_BYTES, UINT64_MAX / 2, &error),
                     EPD_OK);
    quota_give(&b, QUOTA_IMPORTED_BYTES, UINT64_MAX / 2);
    quota_give(&a, QUOTA_HEAP_BYTES, 100);
    ck_assert_int_eq(quota_take(&accounts, &config, &b, QUOTA_HEAP_BYTES, 100, &error), EPD_OK);
    quota_give(&b, QUOTA_HEAP_BYTES, 100);
    ck_assert_uint_eq(accounts.n_hits[QUOTA_HEAP_BYTES], 3);
    quota_close(&accounts, &a);
    quota_close(&accounts, &b);
    ck_assert(list_empty(&accounts.list) && accounts.n_sessions == 0);
}
END_TEST

START_TEST(without_a_limit_a_sum_is_still_a_number)
{
    const uint64_t max_sum = UINT64_MAX - (1ull << 60);
    struct accounts accounts;
    struct config config;
    struct quota a, b;
    config_init(&config);
    quota_init(&accounts);
    ck_assert_int_eq(quota_open(&accounts, &config, 5, &a, &error), EPD_OK);
    ck_assert_int_eq(quota_open(&accounts, &config, 5, &b, &error), EPD_OK);
    ck_assert_int_eq(quota_take(&accounts, &config, &a, QUOTA_HEAP_BYTES, max_sum - 1, &error), EPD_OK);
    ck_assert_int_eq(quota_take(&accounts, &config, &a, QUOTA_HEAP_BYTES, 2, &error), EPD_QUOTA);
    ck_assert_int_eq(quota_take(&accounts, &config, &b, QUOTA_HEAP_BYTES, 2, &error), EPD_QUOTA);
    quota_count(&b, QUOTA_HEAP_BYTES, 4096); /* it is there already */
    ck_assert_int_eq(quota_check(&accounts, &config, &b, QUOTA_HEAP_BYTES, &error), EPD_QUOTA);
    ck_assert_str_eq(error.text,
                     "heap_bytes of uid 5: 17293822569102708734 held, at most 17293822569102704639");
    quota_give(&a, QUOTA_HEAP_BYTES, max_sum - 1);
    ck_assert_int_eq(quota_check(&accounts, &config, &b, QUOTA_HEAP_BYTES, &error), EPD_OK);
    quota_give(&b, QUOTA_HEAP_BYTES, 4096);
    quota_close(&accounts, &a);
    quota_close(&accounts, &b);
}
END_TEST

START_TEST(control_sessions_do_not_count_against_ranks)
{
    struct accounts accounts;
    struct config config;
    struct quota rank, control;
    config_init(&config);
    config.sessions = 1;
    quota_init(&accounts);
    ck_assert_int_eq(quota_open(&accounts, &config, 5, &rank, &error), EPD_OK);
    ck_assert_int_eq(quota_open_control(&accounts, &control, &error), EPD_OK);
    quota_close(&accounts, &control);
    quota_close(&accounts, &rank);
}
END_TEST

START_TEST(quantiles_are_within_an_eighth)
{
    static struct histogram histogram;
    ck_assert_uint_eq(histogram_quantile(&histogram, 0.5), 0);
    for (uint64_t i = 1; i <= 100000; i++)
        histogram_add(&histogram, i);
    const double p50 = (double)histogram_quantile(&histogram, 0.5),
                 p99 = (double)histogram_quantile(&histogram, 0.99);
    ck_assert_double_ge(p50, 50000);
    ck_assert_double_le(p50, 50000 * 1.125);
    ck_assert_double_ge(p99, 99000);
    ck_assert_double_le(p99, 100000);
    ck_assert_uint_eq(histogram_quantile(&histogram, 1.0), 100000);
    histogram_add(&histogram, UINT64_MAX);
    ck_assert_uint_eq(histogram_quantile(&histogram, 1.0), UINT64_MAX);
}
END_TEST

START_TEST(steps_are_counted_by_op_and_failure)
{
    static struct stats stats;
    struct step_rank_result ranks[2] = {
        {.status = EPD_OK,
         .rows = 5,
         .wire_bytes = 64,
         .network_bytes = 96,
         .flops = 1000,
         .phase_ns = {[EPD_PHASE_GEMM] = 30}},
        {.status = EPD_CAPACITY_OVERFLOW, .rows = 7, .dropped_rows = 2, .phase_ns = {[EPD_PHASE_GEMM] = 40}}};
    const struct step_result result = {.n_ranks = 2, .ranks = ranks};
    stats_count_step(&stats, EPD_OP_MOE_FORWARD, &result, 12, 100, 200);
    stats_count_failed(&stats, EPD_OP_MOE_FORWARD, EPD_TIMEOUT, 1);
    const struct stats_op *op = &stats.ops[EPD_OP_MOE_FORWARD];
    ck_assert_uint_eq(op->launches, 3);
    ck_assert_uint_eq(op->failed, 2);
    ck_assert_uint_eq(op->tokens, 12);
    ck_assert_uint_eq(op->rows, 12);
    ck_assert_uint_eq(op->dropped_rows, 2);
    ck_assert_uint_eq(op->wire_bytes, 64);
    ck_assert_uint_eq(op->network_bytes, 96);
    ck_assert_uint_eq(op->phase_ns[EPD_PHASE_GEMM], 70);
    ck_assert_uint_eq(op->run_ns.count, 1);
    ck_assert_uint_eq(stats.failed_launches[EPD_TIMEOUT], 1);
    ck_assert_uint_eq(stats.failed_launches[EPD_CAPACITY_OVERFLOW], 1);
    stats_count_error(&stats, (enum epd_status)4000);
    ck_assert_uint_eq(stats.errors[EPD_INTERNAL], 1);
}
END_TEST

START_TEST(load_knows_the_busiest_expert)
{
    struct load load;
    const int64_t rows[4] = {10, 0, 30, 0};
    ck_assert_int_eq(load_init(&load, 4, &error), EPD_OK);
    load_count(&load, NULL, 0);
    load_count(&load, rows, 4);
    ck_assert_double_eq_tol(load.imbalance_last, 3.0, 1e-9);
    ck_assert_uint_eq(load_hottest(&load), 2);
    ck_assert_uint_eq(load.n_steps, 1);
    load_fini(&load);
}
END_TEST

START_TEST(launch_queue_keeps_order_while_it_grows_and_wraps)
{
    struct launch_queue queue = {0};
    uint64_t in = 0, out = 0;
    for (int round = 0; round < 50; round++) {
        for (int i = 0; i < 7; i++) {
            const struct launch launch = {.seq = in++, .n_left = 1};
            ck_assert_int_eq(launch_queue_append(&queue, &launch, &error), EPD_OK);
        }
        for (int i = 0; i < 5; i++) {
            ck_assert_uint_eq(launch_queue_first(&queue)->seq, out++);
            ck_assert_int_eq(launch_queue_pop(&queue), 1);
        }
    }
    while (queue.count) {
        ck_assert_uint_eq(launch_queue_first(&queue)->seq, out++);
        (void)launch_queue_pop(&queue);
    }
    ck_assert_uint_eq(in, out);
    ck_assert_ptr_null(launch_queue_first(&queue));
    const struct launch armed = {.seq = 4, .n_left = 3};
    ck_assert_int_eq(launch_queue_append(&queue, &armed, &error), EPD_OK);
    ck_assert_int_eq(launch_queue_pop(&queue), 0);
    ck_assert_uint_eq(launch_queue_first(&queue)->seq, 5);
    launch_queue_fini(&queue);
}
END_TEST

START_TEST(failpoints_are_parsed_and_refused)
{
    struct failpoints points;
    ck_assert_int_eq(failpoint_parse(&points, NULL, &error), EPD_OK);
    ck_assert_int_eq(failpoint_parse(&points, "step_submit=error@2,drain=sleep:5", &error), EPD_OK);
    ck_assert_uint_eq(points.n_points, 2);
    ck_assert_uint_eq(points.points[1].sleep_ms, 5);
    ck_assert_int_eq(failpoint_parse(&points, "x=explode", &error), EPD_INVALID_ARGUMENT);
    ck_assert_int_eq(failpoint_parse(&points, "x", &error), EPD_INVALID_ARGUMENT);
#ifdef EPD_FAILPOINTS
    ck_assert_int_eq(failpoint_parse(&points, "p=error@2", &error), EPD_OK);
    ck_assert_int_eq(failpoint_hit(&points, "p", &error), EPD_OK);
    ck_assert_int_eq(failpoint_hit(&points, "p", &error), EPD_SYSTEM);
    ck_assert_int_eq(failpoint_hit(&points, "p", &error), EPD_OK);
    ck_assert_int_eq(failpoint_hit(&points, "q", &error), EPD_OK);
#endif
}
END_TEST

START_TEST(a_set_of_numbers_is_named_within_its_room)
{
    char text[40];
    number_set_name(0, text, sizeof(text));
    ck_assert_str_eq(text, "");
    number_set_name(1ull << 63 | 1, text, sizeof(text));
    ck_assert_str_eq(text, " 0 63");
    number_set_name(0x6f, text, sizeof(text));
    ck_assert_str_eq(text, " 0..3 5 6");
    number_set_name(UINT64_MAX, text, sizeof(text));
    ck_assert_str_eq(text, " 0..63");
    number_set_name(0x5555555555555555ull, text, sizeof(text));
    ck_assert_str_eq(text, " 0 2 4 6 8 10 12 14 16 18 20 and more");
    for (unsigned first = 0; first < 64; first++) /* never past its end, never a number cut in two */
        for (size_t bytes = 32; bytes < sizeof(text); bytes++) {
            char larger[128];
            const uint64_t set = 0x5db6d5bb6d5b6db5ull << first;
            memset(text, 'x', sizeof(text));
            number_set_name(set, text, bytes);
            number_set_name(set, larger, sizeof(larger));
            ck_assert_uint_lt(strlen(text), bytes);
            const char *more = strstr(text, " and more");
            const size_t length = more ? (size_t)(more - text) : strlen(text);
            ck_assert(strncmp(text, larger, length) == 0);
            ck_assert(larger[length] == (more ? ' ' : 0));
        }
}
END_TEST

#define AT(ms) ((uint64_t)(ms)*1000000u)

/* Looks once a millisecond; the time at which the word came. 0: not until then. */
static uint64_t look_until(struct loop_watch *watch, enum loop_watch_word word, uint64_t from_ms,
                           uint64_t to_ms)
{
    for (uint64_t ms = from_ms; ms <= to_ms; ms++) {
        const enum loop_watch_word said = loop_watch_look(watch, AT(ms));
        if (said == LOOP_WATCH_ASK)
            loop_watch_asked(watch);
        if (said == word)
            return ms;
    }
    return 0;
}

START_TEST(a_loop_is_stuck_when_it_has_not_answered_while_we_ran)
{
    struct loop_watch watch;
    loop_watch_start(&watch, 1600, AT(1000));
    ck_assert_uint_eq(look_until(&watch, LOOP_WATCH_ASK, 1000, 2000), 1400);
    loop_watch_answered(&watch, AT(1401));
    ck_assert_uint_eq(look_until(&watch, LOOP_WATCH_SUSPECT, 1401, 4000), 2601); /* asked at 1801 */
    ck_assert_uint_eq(look_until(&watch, LOOP_WATCH_STUCK, 2602, 4000), 3401);

    loop_watch_start(&watch, 1600, AT(1000));
    (void)look_until(&watch, LOOP_WATCH_SUSPECT, 1000, 2500); /* waited 800 */
    loop_watch_answered(&watch, AT(2500));
    ck_assert_int_eq(watch.suspected, 0);
    ck_assert_uint_eq(look_until(&watch, LOOP_WATCH_STUCK, 2500, 4400), 0);

    /* The machine was suspended, and with it who looks: a day counts as two looks. */
    loop_watch_start(&watch, 1600, AT(1000));
    ck_assert_uint_eq(look_until(&watch, LOOP_WATCH_ASK, 1000, 1400), 1400);
    ck_assert_int_eq(loop_watch_look(&watch, AT(86400000)), LOOP_WATCH_FINE);
    ck_assert_uint_eq(watch.waited_ns, AT(200));

    /* A debugger. */
    for (uint64_t ms = 86400100; ms < 86500000; ms += 100) {
        loop_watch_excuse(&watch, AT(ms));
        ck_assert_int_eq(loop_watch_look(&watch, AT(ms)), LOOP_WATCH_FINE);
    }
    ck_assert_uint_eq(watch.waited_ns, AT(200));

    /* A shorter limit counts at once, none ends it; a question that cannot be put counts too. */
    loop_watch_limit(&watch, 200, AT(86500000));
    ck_assert_int_eq(loop_watch_look(&watch, AT(86500000)), LOOP_WATCH_STUCK);
    loop_watch_limit(&watch, 0, AT(86500001));
    ck_assert_uint_eq(watch.at_ns, UINT64_MAX);
    ck_assert_int_eq(loop_watch_look(&watch, AT(99999999)), LOOP_WATCH_FINE);
    loop_watch_start(&watch, 1600, AT(0));
    for (uint64_t ms = 400; ms < 1200; ms += 100)
        ck_assert_int_eq(loop_watch_look(&watch, AT(ms)), LOOP_WATCH_ASK);
    ck_assert_int_eq(loop_watch_look(&watch, AT(1200)), LOOP_WATCH_SUSPECT);
}
END_TEST

int main(void)
{
    const TTest *const tests[] = {ids_grow_and_are_never_used_again,
                                  unknown_foreign_and_stale_ids_are_told_apart,
                                  quotas_of_session_and_uid_hold_and_are_given_back,
                                  without_a_limit_a_sum_is_still_a_number,
                                  control_sessions_do_not_count_against_ranks,
                                  quantiles_are_within_an_eighth,
                                  steps_are_counted_by_op_and_failure,
                                  load_knows_the_busiest_expert,
                                  launch_queue_keeps_order_while_it_grows_and_wraps,
                                  failpoints_are_parsed_and_refused,
                                  a_set_of_numbers_is_named_within_its_room,
                                  a_loop_is_stuck_when_it_has_not_answered_while_we_ran,
                                  NULL};
    return suite_run("daemon_parts", tests, NULL, NULL);
}
