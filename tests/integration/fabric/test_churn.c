/* Workers of a fabric that are killed again and again, under groups that begin anew all the time. */
#include <check.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "tests/integration/fabric/fabric_ranks.h"
#include "tests/reference/op_cases.h"
#include "tests/reference/values.h"

static struct fabric_process fabric;

#define CHAOS_MS           6000
#define FABRIC_CHAOS_RANKS 8

/* Of a group, shared by its ranks and the test. */
struct chaos {
    atomic_ulong n_launched[FABRIC_CHAOS_RANKS]; /* counted before each launch */
    atomic_ulong n_good;
};

static void chaos_read(struct chaos *chaos, unsigned world_size, unsigned long *n_launched)
{
    for (unsigned r = 0; r < world_size; r++)
        n_launched[r] = atomic_load(&chaos->n_launched[r]);
}

/* 1 if it went well; n_launched is what was so before it. */
static int chaos_step(struct chaos *chaos, const struct rank *rank, struct epd_plan *plan,
                      unsigned long *n_launched)
{
    chaos_read(chaos, rank->world_size, n_launched);
    atomic_fetch_add(&chaos->n_launched[rank->rank], 1);
    return epd_plan_launch(plan, NULL) == EPD_OK && epd_plan_wait(plan, 0) == EPD_OK;
}

/* Joins, steps, and begins anew whatever happens. What went well was right: a barrier lets nobody through before all have come,
 * so since this rank launched the step before (or joined), every other one has launched. */
static void chaos_rank(const struct rank *rank)
{
    const struct op_case *c = op_case_named(FABRIC_CASE);
    struct chaos *chaos = *(struct chaos *const *)rank->arg;
    const long until_ms = fabric_now_ms() + CHAOS_MS;
    for (int round = 0; fabric_now_ms() < until_ms; round++) {
        struct layer layer = {.op_case = c, .rank = rank};
        struct epd_open_options open_options = {
            .size = sizeof(open_options), .socket_path = rank->socket_path, .timeout_ms = 5000};
        struct epd_plan *plan = NULL;
        struct epd_plan_options options = {.size = sizeof(options), .op = EPD_OP_BARRIER};
        op_inputs_init(&layer.inputs, c);
        struct epd_group_options join = layer_group_options(&layer);
        unsigned long before[FABRIC_CHAOS_RANKS], now[FABRIC_CHAOS_RANKS];
        chaos_read(chaos, rank->world_size, before);
        if (epd_open(&open_options, &layer.client) == EPD_OK &&
            epd_group_join(layer.client, &join, &layer.group) == EPD_OK &&
            epd_plan_create(layer.group, &options, &plan) == EPD_OK)
            while (fabric_now_ms() < until_ms && chaos_step(chaos, rank, plan, now)) {
                for (unsigned r = 0; r < rank->world_size; r++)
                    RANK_CHECK(atomic_load(&chaos->n_launched[r]) > before[r]);
                memcpy(before, now, sizeof(before));
                atomic_fetch_add(&chaos->n_good, 1);
            }
        epd_close(layer.client);
        op_inputs_fini(&layer.inputs);
        fabric_sleep_ms(5);
    }
}

/* Kills workers while two groups of two nodes each begin anew all the time; then all is as before. */
static void kill_workers(unsigned n_nodes, const unsigned nodes[2][2])
{
    static const char *const restless[] = {"--node-dead", FABRIC_NODE_DEAD,  "--join", "1s", "--plan",
                                           "1s",          "--restart-limit", "0",      NULL};
    struct rank_team teams[2];
    struct chaos *chaos[2];
    unsigned n_killed = 0;
    uint64_t seed = 42;
    ck_assert_uint_le(fabric_world_size(), FABRIC_CHAOS_RANKS);
    fabric_start(&fabric, n_nodes, 2, restless);
    for (int i = 0; i < 2; i++) {
        chaos[i] = mmap(NULL, sizeof(*chaos[i]), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
        ck_assert(chaos[i] != MAP_FAILED);
        fabric_ranks_start_on(&fabric, &teams[i], nodes[i], 2, i ? "other" : "one", fabric_world_size(),
                              chaos_rank, &chaos[i]);
    }
    for (const long until_ms = fabric_now_ms() + CHAOS_MS; fabric_now_ms() < until_ms;) {
        fabric_sleep_ms((long)(values_random(&seed) % 600));
        const pid_t worker = daemon_worker(&fabric.nodes[values_random(&seed) % n_nodes]);
        if (worker > 0)
            n_killed += kill(worker, SIGKILL) == 0;
    }
    for (int i = 0; i < 2; i++)
        ck_assert_uint_eq(ranks_wait(&teams[i], 60), 0);
    printf("%u workers killed, %lu and %lu steps went well\n", n_killed, atomic_load(&chaos[0]->n_good),
           atomic_load(&chaos[1]->n_good));
    ck_assert_uint_gt(n_killed, 0);
    ck_assert_uint_gt(atomic_load(&chaos[0]->n_good) + atomic_load(&chaos[1]->n_good), 0);
    for (unsigned node = 0; node < n_nodes; node++)
        daemon_wait_worker(&fabric.nodes[node], 0);
    for (int i = 0; i < 2; i++) {
        fabric_ranks_start_on(&fabric, &teams[i], nodes[i], 2, i ? "other" : "one", fabric_world_size(),
                              fabric_healthy_rank, NULL);
        const unsigned n_failed = ranks_wait(&teams[i], 60);
        if (n_failed)
            fabric_print_logs(&fabric);
        ck_assert_uint_eq(n_failed, 0);
    }
    unsigned n_own_ends = 0; /* workers that ended by themselves, not by the kills above */
    for (unsigned node = 0; node < n_nodes; node++)
        n_own_ends += fabric_log_count(&fabric, node, "signal 6") +
                      fabric_log_count(&fabric, node, "signal 11") +
                      fabric_log_count(&fabric, node, "worker fails");
    if (n_own_ends)
        fabric_print_logs(&fabric);
    ck_assert_uint_eq(n_own_ends, 0);
    fabric_stop(&fabric);
}

START_TEST(workers_that_are_killed_again_and_again_leave_a_fabric_that_works)
{
    kill_workers(2, (const unsigned[2][2]){{0, 1}, {0, 1}});
}
END_TEST

START_TEST(workers_of_groups_with_a_node_in_common_may_be_killed_too)
{
    kill_workers(3, (const unsigned[2][2]){{2, 1}, {0, 2}});
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("churn");
    TCase *tests = tcase_create("churn");
    tcase_set_timeout(tests, 120);
    tcase_add_test(tests, workers_that_are_killed_again_and_again_leave_a_fabric_that_works);
    tcase_add_test(tests, workers_of_groups_with_a_node_in_common_may_be_killed_too);
    suite_add_tcase(suite, tests);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_ENV);
    int n_failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return n_failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
