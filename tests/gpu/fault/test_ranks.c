/* Rows 1, 2, 4, 23 and 24 of the faults: ranks that are killed, slow, out of order. */
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/wait.h>

#include "tests/fault/baseline.h"
#include "tests/fault/control.h"
#include "tests/fault/spawn.h"
#include "tests/gpu/fault/suites.h"

#define N_IDLE_ROUNDS  6
#define N_DEATHS       4
#define TEAM_MS        30000
#define BYSTANDER_SLOT 8
#define N_COMPARED     500
#define SLACK_MIB      32 /* less than the ballast of one rank */

static void kill_idle_team(void)
{
    struct team team = fixture_team("idle", "idle", fixture.world, 0);
    for (unsigned rank = 0; rank < team.world; rank++)
        atomic_store(&fixture.board->ranks[rank].ready, 0);
    team_start(&team);
    team_wait_ready(&team, fixture.board, 1);
    for (unsigned rank = 0; rank < team.world; rank++)
        kill(team.pids[rank], SIGKILL); /* all at once */
    for (unsigned rank = 0; rank < team.world; rank++)
        team_kill(&team, rank);
}

START_TEST(clients_killed_while_idle_leave_no_gpu_memory_and_nobody_notices)
{
    struct baseline before;
    board_reset(fixture.board);
    struct team bystander = fixture_team("bystander", "bystander", 2, BYSTANDER_SLOT);
    team_start(&bystander);
    team_wait_steps(&bystander, fixture.board, 3);
    kill_idle_team(); /* pools fill up */
    sleep_ms(300);
    baseline_take(&before, &fixture.daemon);
    const long free_mib = fixture_free_mib();
    double slowest = 0;
    for (int round = 0; round < N_IDLE_ROUNDS; round++) {
        kill_idle_team();
        const int ms = fixture_reclaimed(&before);
        ck_assert_int_ge(ms, 0);
        slowest = ms > slowest ? ms : slowest;
    }
    fixture_expect_free(free_mib, SLACK_MIB);
    printf("%d clients killed while idle, reclaimed in at most %.0f ms\n", N_IDLE_ROUNDS * (int)fixture.world,
           slowest);
    team_wait_steps(&bystander, fixture.board, 3);
    atomic_store(&fixture.board->stop, 1);
    ck_assert_uint_eq(team_wait(&bystander, TEAM_MS), 0);
}
END_TEST

/* What CUDA unmaps waits for whole devices, on which kernels wait for each other: steps go on beside it, and it is done. */
START_TEST(memory_that_is_taken_back_beside_steps_stops_nobody)
{
    struct baseline before;
    board_reset(fixture.board);
    struct team bystander = fixture_team("bystander", "bystander", 2, BYSTANDER_SLOT),
                churn = fixture_team("churn", "churn", fixture.world, 0);
    team_start(&bystander);
    team_wait_steps(&bystander, fixture.board, 20);
    ck_assert_uint_eq(team_run(&churn), 0); /* pools fill up */
    sleep_ms(300);
    baseline_take(&before, &fixture.daemon);
    double begin = now_ms();
    team_wait_steps(&bystander, fixture.board, N_COMPARED);
    const double alone_ms = now_ms() - begin;
    team_start(&churn);
    begin = now_ms();
    team_wait_steps(&bystander, fixture.board, N_COMPARED);
    const double beside_ms = now_ms() - begin;
    ck_assert_uint_eq(team_wait(&churn, TEAM_MS), 0);
    const int ms = fixture_reclaimed(&before);
    ck_assert_int_ge(ms, 0);
    printf("%d steps alone %.0f ms, beside registrations that come and go %.0f; unmapped after %d ms\n",
           N_COMPARED, alone_ms, beside_ms, ms);
    atomic_store(&fixture.board->stop, 1);
    ck_assert_uint_eq(team_wait(&bystander, TEAM_MS), 0);
}
END_TEST

START_TEST(a_client_killed_with_work_on_its_stream_is_named_and_the_others_streams_go_on)
{
    struct baseline before;
    expect_role("steps", fixture.world);
    baseline_take(&before, &fixture.daemon);
    board_reset(fixture.board);
    struct team team = fixture_team("queued", "queued", fixture.world, 0);
    team_start(&team);
    team_wait_ready(&team, fixture.board, 1);
    const double begin = now_ms();
    team_kill(&team, 1);
    ck_assert_uint_eq(team_wait(&team, TEAM_MS), 0);
    printf("a rank killed with launches queued: the others were through after %.0f ms\n", now_ms() - begin);
    ck_assert_int_ge(fixture_reclaimed(&before), 0);
    expect_role("steps", fixture.world);
}
END_TEST

static void expect_armed(struct team *armed)
{
    atomic_store(&fixture.board->ranks[armed->slot].ready, 0);
    team_start(armed);
    team_wait_ready(armed, fixture.board, 1);
}

/* On GPU 0. */
static void kill_one_idle(void)
{
    struct team idle = fixture_team("idle", "idle", 1, 2);
    atomic_store(&fixture.board->ranks[idle.slot].ready, 0);
    team_start(&idle);
    team_wait_ready(&idle, fixture.board, 1);
    team_kill(&idle, 0);
}

/* On the same GPUs, with the same lanes. */
START_TEST(a_client_that_announces_more_than_it_launches_delays_nobody)
{
    struct baseline before;
    board_reset(fixture.board);
    struct team bystander = fixture_team("bystander", "bystander", fixture.world, BYSTANDER_SLOT),
                armed = fixture_team("armed", "armed", 1, 0);
    team_start(&bystander);
    team_wait_steps(&bystander, fixture.board, 20);
    expect_armed(&armed); /* pools fill up */
    kill_one_idle();
    team_kill(&armed, 0);
    sleep_ms(300);
    baseline_take(&before, &fixture.daemon);
    double begin = now_ms();
    team_wait_steps(&bystander, fixture.board, N_COMPARED);
    const double alone_ms = now_ms() - begin;
    expect_armed(&armed);
    begin = now_ms();
    team_wait_steps(&bystander, fixture.board, N_COMPARED);
    const double beside_ms = now_ms() - begin;
    /* Nor does it keep the GPU from having back what others leave. */
    const long free_mib = fixture_free_mib();
    kill_one_idle();
    fixture_expect_free(free_mib, SLACK_MIB);
    begin = now_ms();
    team_kill(&armed, 0);
    team_wait_steps(&bystander, fixture.board, N_COMPARED);
    const double dropped_ms = now_ms() - begin;
    printf("%d steps alone %.0f ms, beside armed launches %.0f, while these are dropped %.0f\n", N_COMPARED,
           alone_ms, beside_ms, dropped_ms);
    /* Whether they stand still, for seconds: how much slower they are on a machine with others is printed. */
    ck_assert(beside_ms < 5000 + 5 * alone_ms && dropped_ms < 5000 + 5 * alone_ms);
    ck_assert_int_ge(fixture_reclaimed(&before), 0);
    atomic_store(&fixture.board->stop, 1);
    ck_assert_uint_eq(team_wait(&bystander, TEAM_MS), 0);
}
END_TEST

START_TEST(clients_killed_at_any_moment_of_a_step_are_named_and_the_next_group_works)
{
    struct baseline before;
    expect_role("steps", fixture.world);
    baseline_take(&before, &fixture.daemon);
    board_reset(fixture.board);
    struct team team = fixture_team("mortal", "mortal", fixture.world, 0);
    team_start(&team);
    for (int n = 0; n < N_DEATHS; n++) {
        const unsigned victim = 1 + (unsigned)n % (team.world - 1);
        team_wait_steps(&team, fixture.board, 3);
        sleep_ms(n * 7 % 20);
        team_kill(&team, victim);
        team_start_rank(&team, victim);
    }
    team_wait_steps(&team, fixture.board, 3);
    atomic_store(&fixture.board->stop, 1);
    ck_assert_uint_eq(team_wait(&team, TEAM_MS), 0);
    ck_assert_int_gt(atomic_load(&fixture.board->ranks[0].n_ended[EPD_PEER_LOST]), 0);
    ck_assert_int_ge(fixture_reclaimed(&before), 0);
}
END_TEST

START_TEST(a_slow_rank_below_the_deadline_succeeds_and_shows_as_the_straggler)
{
    board_reset(fixture.board);
    struct team team = fixture_team("slow", "slow", fixture.world, 0);
    team_start(&team);
    team_wait_ready(&team, fixture.board, 1);
    json_t *stats = control_ask(fixture.daemon.control_path, CONTROL_STATS, NULL), *item;
    long long came_last = 0, held_up_ns = 0;
    size_t i;
    json_array_foreach (json_object_get(stats, "groups"), i, item) {
        const json_t *straggler = json_array_get(json_object_get(item, "ranks"), 1);
        if (strcmp(json_string_value(json_object_get(item, "name")), "slow") != 0)
            continue;
        came_last = control_number(straggler, "came_last");
        held_up_ns = control_number(straggler, "held_up_ns");
    }
    json_decref(stats);
    atomic_store(&fixture.board->release, 1);
    ck_assert_uint_eq(team_wait(&team, TEAM_MS), 0);
    ck_assert_int_ge(came_last, 5);
    ck_assert_int_gt(held_up_ns, 1000000000);
}
END_TEST

START_TEST(ranks_that_call_in_another_order_learn_it_at_once)
{
    expect_role("order", 2);
}
END_TEST

START_TEST(steps_come_from_other_threads_and_not_from_forked_children)
{
    expect_role("elsewhere", 1);
}
END_TEST

void add_rank_tests(TCase *cases)
{
    suite_add(cases, clients_killed_while_idle_leave_no_gpu_memory_and_nobody_notices);
    suite_add(cases, memory_that_is_taken_back_beside_steps_stops_nobody);
    suite_add(cases, a_client_killed_with_work_on_its_stream_is_named_and_the_others_streams_go_on);
    suite_add(cases, a_client_that_announces_more_than_it_launches_delays_nobody);
    suite_add(cases, clients_killed_at_any_moment_of_a_step_are_named_and_the_next_group_works);
    suite_add(cases, a_slow_rank_below_the_deadline_succeeds_and_shows_as_the_straggler);
    suite_add(cases, ranks_that_call_in_another_order_learn_it_at_once);
    suite_add(cases, steps_come_from_other_threads_and_not_from_forked_children);
}
