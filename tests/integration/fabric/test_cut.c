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
    fabric_sleep_ms(1000);
    fabric_cut(&fabric, 1, 1);
    fabric_ranks_end(&fabric, &team, fabric_world_size() / 2);
    fabric_cut(&fabric, 1, 0);
    fabric_wait_complete(&fabric, 2);
    ck_assert_uint_eq(fabric_run(&fabric, "again", fabric_world_size(), fabric_healthy_rank, NULL), 0);
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
    suite_add_tcase(suite, tests);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_ENV);
    int n_failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    fabric_namespaces_close(); /* those of a test that failed, which is a child of this process */
    return n_failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
