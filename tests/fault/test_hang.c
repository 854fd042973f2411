/* The worker lives and its loop does not come round: its supervisor ends it, says so, counts it and starts another. Whoever
 * was held from outside together with the supervisor, or by a debugger, is left alone. */
#include <check.h>
#include <glob.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/wait.h>

#include "tests/fault/control.h"
#include "tests/fault/spawn.h"
#include "tests/fault/suite.h"
#include "tests/fault/wire.h"
#include "tests/integration/daemon_process.h"

#define DEADLINE    "800ms"
#define DEADLINE_MS 800
#define LONG_MS     20000

static struct daemon_process epd_daemon;

static void start_with(const char *deadline)
{
    const char *const flags[] = {
        "--loop-deadline", deadline, "--restart-first", "1ms", "--restart-limit", "0", NULL};
    daemon_start(&epd_daemon, 1, flags);
}

static void ask_and_expect(const char *key, long long want)
{
    json_t *status = control_ask(epd_daemon.control_path, CONTROL_STATUS, NULL);
    ck_assert_int_eq(control_number(status, key), want);
    json_decref(status);
}

/* What the supervisor answers in the worker's place, waited for. */
static int says_stuck(void)
{
    for (int waited = 0; waited < LONG_MS; waited += 5, sleep_ms(5)) {
        json_t *status = control_ask(epd_daemon.control_path, CONTROL_STATUS, NULL);
        const char *worker = json_string_value(json_object_get(status, "worker"));
        const int stuck = worker && strcmp(worker, "stuck") == 0;
        json_decref(status);
        if (stuck)
            return 1;
    }
    return 0;
}

START_TEST(a_stopped_worker_is_ended_counted_and_replaced_and_its_record_kept)
{
    static struct wire wire;
    char pattern[160];
    glob_t found;
    start_with(DEADLINE);
    wire_open(&wire, epd_daemon.socket_path);
    struct message plan = wire_barrier_message(wire_join_alone(&wire, "recorded"));
    ck_assert_int_eq(wire_call(&wire, &plan, -1), EPD_OK);
    const struct message_reply_plan reply = wire.reply.reply_plan;
    ck_assert_int_eq(wire_launch(&wire, &reply, 1), 0);
    ck_assert_int_eq(wire_done(&wire, &reply), EPD_OK);
    const pid_t worker = daemon_worker(&epd_daemon);
    ck_assert_int_eq(kill(worker, SIGSTOP), 0);
    ck_assert(says_stuck());
    ck_assert_int_eq(wire_wait_end(&wire), EPD_DISCONNECTED);
    (void)daemon_wait_worker(&epd_daemon, worker);
    ck_assert(file_wait(epd_daemon.log_path, "loop has not come round for_ms", LONG_MS));
    ck_assert(file_wait(epd_daemon.log_path, "loop stuck for", LONG_MS));
    ck_assert(file_contains(epd_daemon.log_path, "state T"));
    snprintf(pattern, sizeof pattern, "%s/epd-dump-%d-*Z-1-end.json", epd_daemon.directory,
             (int)epd_daemon.pid);
    for (int waited = 0; glob(pattern, 0, NULL, &found) != 0; waited += 5, sleep_ms(5))
        ck_assert_msg(waited < LONG_MS, "no %s", pattern);
    globfree(&found);
    wire_close(&wire);
    wire_open(&wire, epd_daemon.socket_path);
    (void)wire_join_alone(&wire, "again");
    wire_close(&wire);
    ask_and_expect("hangs", 1);
    ask_and_expect("generation", 1);
    daemon_stop(&epd_daemon);
}
END_TEST

START_TEST(a_daemon_that_is_stopped_with_its_supervisor_goes_on_as_if_nothing_had_been)
{
    start_with(DEADLINE);
    const pid_t worker = daemon_worker(&epd_daemon);
    for (int n = 0; n < 3; n++) {
        ck_assert_int_eq(kill(worker, SIGSTOP), 0);
        sleep_ms(DEADLINE_MS / 4); /* a question is open */
        ck_assert_int_eq(kill(epd_daemon.pid, SIGSTOP), 0);
        sleep_ms(3 * DEADLINE_MS);
        ck_assert_int_eq(kill(epd_daemon.pid, SIGCONT), 0);
        sleep_ms(DEADLINE_MS / 20);
        ck_assert_int_eq(kill(worker, SIGCONT), 0);
        ask_and_expect("pid", worker);
        sleep_ms(DEADLINE_MS / 2);
    }
    ask_and_expect("hangs", 0);
    ck_assert(!file_contains(epd_daemon.log_path, "loop stuck"));
    daemon_stop(&epd_daemon);
}
END_TEST

START_TEST(a_worker_in_a_debugger_is_left_alone)
{
    int status = 0;
    start_with(DEADLINE);
    const pid_t worker = daemon_worker(&epd_daemon);
    if (ptrace(PTRACE_ATTACH, worker, NULL, NULL) != 0) {
        daemon_stop(&epd_daemon);
        puts("skipped: no process may be traced here");
        return;
    }
    ck_assert_int_eq(waitpid(worker, &status, __WALL), worker);
    sleep_ms(3 * DEADLINE_MS);
    ck_assert_int_eq((int)ptrace(PTRACE_DETACH, worker, NULL, NULL), 0);
    ask_and_expect("pid", worker);
    ask_and_expect("hangs", 0);
    daemon_stop(&epd_daemon);
}
END_TEST

START_TEST(without_a_deadline_nobody_looks)
{
    start_with("0s");
    const pid_t worker = daemon_worker(&epd_daemon);
    ck_assert_int_eq(kill(worker, SIGSTOP), 0);
    sleep_ms(2 * DEADLINE_MS);
    ck_assert_int_eq(kill(worker, SIGCONT), 0);
    ask_and_expect("pid", worker);
    ask_and_expect("hangs", 0);
    daemon_stop(&epd_daemon);
}
END_TEST

#ifdef EPD_FAILPOINTS
START_TEST(a_loop_that_blocks_again_and_again_is_ended_each_time)
{
    char command[128];
    setenv("EPD_FAILPOINTS", "loop=sleep:60000@2", 1);
    start_with(DEADLINE);
    unsetenv("EPD_FAILPOINTS");
    ck_assert(file_wait(epd_daemon.log_path, "hangs 3", LONG_MS));
    ck_assert(file_contains(epd_daemon.log_path, "loop_deadline_ms 800 state S"));
    kill(epd_daemon.pid, SIGTERM);
    (void)spawn_wait(epd_daemon.pid, LONG_MS); /* the newest worker may hang just then: it is killed */
    snprintf(command, sizeof command, "rm -r %s", epd_daemon.directory);
    ck_assert_int_eq(system(command), 0);
}
END_TEST

/* Two seconds are no hang where three are allowed. */
START_TEST(a_loop_that_comes_round_in_time_is_only_warned_of)
{
    setenv("EPD_FAILPOINTS", "loop=sleep:2200@2", 1);
    start_with("3s");
    unsetenv("EPD_FAILPOINTS");
    const pid_t worker = daemon_worker(&epd_daemon);
    ck_assert(file_wait(epd_daemon.log_path, "loop comes round again after_ms", LONG_MS));
    ck_assert(file_contains(epd_daemon.log_path, "loop has not come round for_ms"));
    ask_and_expect("pid", worker);
    ask_and_expect("hangs", 0);
    daemon_stop(&epd_daemon);
}
END_TEST
#endif

int main(void)
{
    const TTest *const tests[] = {
        a_stopped_worker_is_ended_counted_and_replaced_and_its_record_kept,
        a_daemon_that_is_stopped_with_its_supervisor_goes_on_as_if_nothing_had_been,
        a_worker_in_a_debugger_is_left_alone,
        without_a_deadline_nobody_looks,
#ifdef EPD_FAILPOINTS
        a_loop_that_blocks_again_and_again_is_ended_each_time,
        a_loop_that_comes_round_in_time_is_only_warned_of,
#endif
    };
    return suite_run("hang", tests, SUITE_COUNT(tests), NULL, NULL);
}
