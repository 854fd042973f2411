/* Row 7 of the faults under MPS: the fault of any process on a GPU ends the contexts of all of them there. */
#include <stdio.h>

#include "tests/fault/spawn.h"
#include "tests/gpu/fault/suites.h"

#define BACK_MS 30000

START_TEST(the_fault_of_a_neighbour_costs_a_restart_and_new_clients_are_served)
{
    expect_role("steps", fixture.world);
    const pid_t worker = daemon_worker(&fixture.daemon);
    board_reset(fixture.board);
    const struct team crash = fixture_team("crash", "crash", 1, 0);
    ck_assert_uint_eq(team_run(&crash), 0);
    /* For a moment MPS refuses new processes on that GPU: the ranks' own trouble. */
    const double begin = now_ms();
    const struct team any = fixture_team("free", "free", 1, 0),
                      team = fixture_team("patient", "patient", fixture.world, 0);
    int n_tries = 1;
    for (; team_run(&any) != 0 && now_ms() - begin < BACK_MS; n_tries++)
        sleep_ms(100);
    const unsigned n_failed = team_run(&team);
    if (n_failed)
        daemon_print_log(&fixture.daemon);
    ck_assert_uint_eq(n_failed, 0);
    ck_assert_int_ne(daemon_worker(&fixture.daemon), worker);
    printf("a neighbour's fault under MPS: served again after %.0f ms, %d tries\n", now_ms() - begin,
           n_tries);
}
END_TEST

void add_mps_tests(TCase *cases)
{
    suite_add(cases, the_fault_of_a_neighbour_costs_a_restart_and_new_clients_are_served);
}
