/* Rows 17 and 18 of the faults: handles that are not what they say, memory that is not there. */
#include <signal.h>

#include "tests/fault/baseline.h"
#include "tests/fault/spawn.h"
#include "tests/gpu/fault/suites.h"

#define TEAM_MS 30000

START_TEST(handles_that_are_stale_or_garbage_are_refused_or_opened_as_what_they_are)
{
    struct baseline before;
    expect_role("steps", 1);
    baseline_take(&before, &fixture.daemon);
    expect_role("handles", 1);
    ck_assert_int_ge(fixture_reclaimed(&before), 0);
}
END_TEST

START_TEST(memory_of_a_gpu_that_the_daemon_does_not_have_is_refused_with_both_names)
{
    struct daemon_process one;
    board_reset(fixture.board);
    fixture_start(&one, (const char *const[]){"--devices", "0", NULL});
    struct team team = fixture_team("invisible", "invisible", 1, 0);
    team.socket_path = one.socket_path;
    ck_assert_uint_eq(team_run(&team), 0);
    daemon_stop(&one);
}
END_TEST

START_TEST(an_address_used_again_is_never_the_memory_before)
{
    expect_role("reuse", 1);
}
END_TEST

START_TEST(a_gpu_without_memory_refuses_the_request_and_nothing_else)
{
    struct baseline before;
    board_reset(fixture.board);
    struct team large = fixture_team("large", "large", 1, 0), hog = fixture_team("hog", "hog", 1, 1);
    team_start(&large);
    team_wait_ready(&large, fixture.board, 1);
    baseline_take(&before, &fixture.daemon);
    team_start(&hog);
    team_wait_ready(&hog, fixture.board, 1);
    atomic_store(&fixture.board->release, 1);
    team_wait_ready(&large, fixture.board, 2);
    ck_assert_int_ge(fixture_reclaimed(&before), 0); /* twenty refusals have kept nothing */
    team_kill(&hog, 0);
    ck_assert_uint_eq(team_wait(&large, TEAM_MS), 0);
    expect_role("steps", fixture.world);
}
END_TEST

void add_memory_tests(TCase *cases)
{
    suite_add(cases, handles_that_are_stale_or_garbage_are_refused_or_opened_as_what_they_are);
    suite_add_on(cases, 2, memory_of_a_gpu_that_the_daemon_does_not_have_is_refused_with_both_names);
    suite_add(cases, an_address_used_again_is_never_the_memory_before);
    suite_add(cases, a_gpu_without_memory_refuses_the_request_and_nothing_else);
}
