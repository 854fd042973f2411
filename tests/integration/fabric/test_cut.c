/* Nodes in network namespaces of their own, so that one can be cut off. Exits with 77, which is "skipped", where they
 * cannot be made (root and iproute2). */
#include <check.h>
#include <stdlib.h>

#include "tests/integration/fabric/fabric_ranks.h"
#include "tests/reference/op_cases.h"

#define SKIPPED 77

static struct fabric_process fabric;

START_TEST(a_node_that_is_cut_off_is_named_soon_after)
{
    struct rank_team team;
    fabric_start_in_namespaces(&fabric, 3, 1, fabric_quick);
    ck_assert_uint_eq(fabric_run(&fabric, "whole", 3, fabric_healthy_rank, op_case_named("odd sizes")), 0);
    fabric_stop(&fabric);
    fabric_start_in_namespaces(&fabric, 2, 2, fabric_quick);
    fabric_ranks_start(&fabric, &team, "spanning", fabric_world_size(), fabric_until_lost_rank, "node 1");
    fabric_await_group(&fabric, 1, "spanning", "open");
    fabric_cut(&fabric, 1, 1);
    fabric_ranks_end(&fabric, &team, fabric_world_size() / 2);
    fabric_cut(&fabric, 1, 0);
    fabric_wait_complete(&fabric, 2);
    ck_assert_uint_eq(fabric_run(&fabric, "again", fabric_world_size(), fabric_healthy_rank, NULL), 0);
    fabric_stop(&fabric);
}
END_TEST

/* Of three nodes; the places in the group are not the numbers that are told. */
START_TEST(a_node_of_some_that_is_cut_off_is_named_by_its_number)
{
    static const unsigned nodes[] = {0, 2}, others[] = {1, 0};
    struct rank_team team, other;
    fabric_start_in_namespaces(&fabric, 3, 2, fabric_quick);
    fabric_ranks_start_on(&fabric, &team, nodes, 2, "some", fabric_world_size(), fabric_until_lost_rank,
                          "node 2");
    fabric_await_group(&fabric, 2, "some", "open");
    fabric_cut(&fabric, 2, 1);
    fabric_ranks_end(&fabric, &team, fabric_world_size() / 2);
    fabric_ranks_start_on(&fabric, &other, others, 2, "others", fabric_world_size(), fabric_healthy_rank,
                          NULL);
    ck_assert_uint_eq(ranks_wait(&other, 60), 0);
    fabric_cut(&fabric, 2, 0);
    fabric_wait_complete(&fabric, 2);
    fabric_ranks_start_on(&fabric, &team, nodes, 2, "some", fabric_world_size(), fabric_healthy_rank, NULL);
    ck_assert_uint_eq(ranks_wait(&team, 60), 0);
    fabric_stop(&fabric);
}
END_TEST

int main(void)
{
    if (!fabric_namespaces_open()) {
        printf("skipped: no network namespaces can be made here\n");
        return SKIPPED;
    }
    Suite *suite = suite_create("fabric_cut");
    TCase *tests = tcase_create("fabric_cut");
    tcase_set_timeout(tests, 120);
    tcase_add_test(tests, a_node_that_is_cut_off_is_named_soon_after);
    tcase_add_test(tests, a_node_of_some_that_is_cut_off_is_named_by_its_number);
    suite_add_tcase(suite, tests);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_ENV);
    int n_failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    fabric_namespaces_close(); /* those of a test that failed, which is a child of this process */
    return n_failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
