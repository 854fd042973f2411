/* Rows 5, 7, 9 and 28 of the faults: the worker is killed, loses its context, loses its supervisor. */
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/wait.h>

#include "proto/status.h"
#include "tests/fault/control.h"
#include "tests/fault/spawn.h"
#include "tests/gpu/fault/suites.h"

#define N_WORKER_KILLS 3
#define TEAM_MS        30000
#define ANSWER_MS      100
#define SLACK_MIB      32 /* less than the ballast of one rank */

/* Wrong results end a rank with 2; a stream that hangs, the test. */
static void expect_survived(struct team *team)
{
    unsigned n_told = 0;
    atomic_store(&fixture.board->stop, 1);
    const unsigned n_failed = team_wait(team, TEAM_MS);
    if (n_failed)
        daemon_print_log(&fixture.daemon);
    ck_assert_uint_eq(n_failed, 0);
    for (unsigned rank = 0; rank < team->world; rank++)
        for (int status = 0; status < BOARD_N_STATUSES; status++) {
            const int n = atomic_load(&fixture.board->ranks[rank].n_ended[status]);
            n_told += n > 0;
            if (n)
                printf("rank %u: %d steps ended %s, %d recoveries\n", rank, n,
                       status_name((enum epd_status)status),
                       atomic_load(&fixture.board->ranks[rank].n_recovered));
        }
    ck_assert_uint_gt(n_told, 0);
}

START_TEST(a_worker_killed_in_flight_is_replaced_and_no_stream_hangs)
{
    board_reset(fixture.board);
    struct team team = fixture_team("survivor", "survivor", fixture.world, 0);
    team_start(&team);
    team_wait_steps(&team, fixture.board, 3);
    for (int n = 0; n < N_WORKER_KILLS; n++) {
        const pid_t worker = daemon_worker(&fixture.daemon);
        const double begin = now_ms();
        sleep_ms(n * 7 % 20);
        ck_assert_int_gt(worker, 0);
        kill(worker, SIGKILL);
        (void)daemon_wait_worker(&fixture.daemon, worker);
        team_wait_steps(&team, fixture.board, 3);
        printf("worker killed: served again after %.0f ms\n", now_ms() - begin);
    }
    expect_survived(&team);
}
END_TEST

START_TEST(a_worker_killed_while_nobody_asks_is_replaced)
{
    const pid_t worker = daemon_worker(&fixture.daemon);
    ck_assert_int_gt(worker, 0);
    kill(worker, SIGKILL);
    (void)daemon_wait_worker(&fixture.daemon, worker);
    expect_role("steps", fixture.world);
}
END_TEST

/* Of callers of the control socket until the next worker serves: the longest that one had to wait, and how many were told
 * that it starts. */
static double slowest_answer(pid_t worker, int *n_starting)
{
    const double until = now_ms() + TEAM_MS;
    double slowest = 0;
    int served = 0;
    for (; !served && now_ms() < until; sleep_ms(5)) {
        double elapsed_ms;
        json_t *status = control_ask(fixture.daemon.control_path, CONTROL_STATUS, &elapsed_ms);
        const char *state = json_string_value(json_object_get(status, "worker"));
        const long long pid = control_number(status, "pid");
        *n_starting += state && strcmp(state, "starting") == 0;
        slowest = elapsed_ms > slowest ? elapsed_ms : slowest;
        served = pid > 0 && pid != worker;
        json_decref(status);
    }
    ck_assert_msg(served, "no worker serves");
    return slowest;
}

/* Row 28: a start with CUDA takes a second and more. */
START_TEST(the_control_socket_answers_while_a_worker_is_replaced)
{
    const pid_t worker = daemon_worker(&fixture.daemon);
    int n_starting = 0;
    ck_assert_int_gt(worker, 0);
    kill(worker, SIGKILL);
    const double slowest = slowest_answer(worker, &n_starting);
    printf("answered after at most %.1f ms, %d times that the next one starts\n", slowest, n_starting);
    fflush(stdout);
    ck_assert_int_gt(n_starting, 0);
    ck_assert(slowest < ANSWER_MS);
}
END_TEST

static void crash_worker(void)
{
    const int n_crashes = atomic_load(&fixture.shim->n_crashes);
    atomic_store(&fixture.shim->crash_device, 0);
    for (int waited = 0; atomic_load(&fixture.shim->n_crashes) == n_crashes; waited++) {
        ck_assert_int_lt(waited, 10000);
        sleep_ms(1);
    }
}

START_TEST(a_lost_context_in_flight_ends_the_worker_and_the_ranks_go_on_with_the_next)
{
    board_reset(fixture.board);
    struct team team = fixture_team("survivor", "context", fixture.world, 0);
    team_start(&team);
    team_wait_steps(&team, fixture.board, 3);
    const pid_t worker = daemon_worker(&fixture.daemon);
    const double begin = now_ms();
    crash_worker();
    (void)daemon_wait_worker(&fixture.daemon, worker);
    team_wait_steps(&team, fixture.board, 3);
    printf("context lost: served again after %.0f ms\n", now_ms() - begin);
    expect_survived(&team);
}
END_TEST

START_TEST(a_lost_context_is_found_out_by_itself_and_the_next_worker_serves)
{
    const pid_t worker = daemon_worker(&fixture.daemon);
    const double begin = now_ms();
    crash_worker();
    (void)daemon_wait_worker(&fixture.daemon, worker);
    printf("context lost while nobody asked: the next worker after %.0f ms\n", now_ms() - begin);
    expect_role("patient", fixture.world);
}
END_TEST

/* Whatever it is that a call of CUDA waits for. */
START_TEST(a_lane_that_stands_in_a_call_is_told_of_and_costs_a_restart)
{
    struct daemon_process one;
    board_reset(fixture.board);
    fixture_start(&one, (const char *const[]){"--warn", "1s", "--loop-deadline", "3s", NULL});
    struct team team = fixture_team("survivor", "standing", fixture.world, 0);
    team.socket_path = one.socket_path;
    team_start(&team);
    team_wait_steps(&team, fixture.board, 3);
    const pid_t worker = daemon_worker(&one);
    ck_assert_int_gt(worker, 0);
    const double begin = now_ms();
    atomic_store(&fixture.shim->hold_worker, worker);
    (void)daemon_wait_worker(&one, worker);
    const double ended_ms = now_ms() - begin;
    team_wait_steps(&team, fixture.board, 3);
    printf("a lane that stood still: the next worker after %.0f ms, good steps after %.0f\n", ended_ms,
           now_ms() - begin);
    const int said = file_contains(one.log_path, "its lane stands at") &&
                     file_contains(one.log_path, "its lane has not gone on for");
    if (!said)
        daemon_print_log(&one);
    ck_assert(said);
    expect_survived(&team);
    daemon_stop(&one);
}
END_TEST

START_TEST(a_killed_supervisor_leaves_no_gpu_memory_taken)
{
    struct daemon_process other;
    board_reset(fixture.board);
    const long free_mib = fixture_free_mib();
    fixture_start(&other, NULL);
    struct team team = fixture_team("idle", "orphans", fixture.world, 0);
    team.socket_path = other.socket_path;
    team_start(&team);
    team_wait_ready(&team, fixture.board, 1);
    const pid_t worker = daemon_worker(&other);
    ck_assert_int_gt(worker, 0);
    kill(other.pid, SIGKILL);
    waitpid(other.pid, NULL, 0);
    for (int waited = 0; kill(worker, 0) == 0 && waited < 5000; waited++)
        sleep_ms(1);
    for (unsigned rank = 0; rank < team.world; rank++)
        team_kill(&team, rank);
    fixture_expect_free(free_mib, SLACK_MIB);
}
END_TEST

void add_worker_tests(TCase *cases)
{
    suite_add(cases, a_worker_killed_in_flight_is_replaced_and_no_stream_hangs);
    suite_add(cases, a_worker_killed_while_nobody_asks_is_replaced);
    suite_add(cases, the_control_socket_answers_while_a_worker_is_replaced);
    suite_add(cases, a_lost_context_in_flight_ends_the_worker_and_the_ranks_go_on_with_the_next);
    suite_add(cases, a_lost_context_is_found_out_by_itself_and_the_next_worker_serves);
    suite_add(cases, a_lane_that_stands_in_a_call_is_told_of_and_costs_a_restart);
    suite_add(cases, a_killed_supervisor_leaves_no_gpu_memory_taken);
}
