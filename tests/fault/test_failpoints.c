/* The daemon fails, stalls or dies at each of its failpoints (daemon/failpoint.h). Built with EPD_FAILPOINTS
 * only. */
#include <check.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>

#include "tests/fault/baseline.h"
#include "tests/fault/control.h"
#include "tests/fault/spawn.h"
#include "tests/fault/suite.h"
#include "tests/fault/wire.h"
#include "tests/fault/workload.h"

#define EXIT_GAVE_UP 4
#define N_STEPS      6
#define STALL_MS     "40"

static struct daemon_process epd_daemon;

/* A daemon whose worker acts at one place: "plan_ready=error@2". */
static void start_with(const char *point, const char *action)
{
    char text[128];
    const char *const fast[] = {
        "--restart-first", "1ms", "--restart-max", "1ms", "--restart-limit", "0", NULL};
    snprintf(text, sizeof text, "%s=%s", point, action);
    setenv("EPD_FAILPOINTS", text, 1);
    daemon_start(&epd_daemon, 2, fast);
    unsetenv("EPD_FAILPOINTS");
}

static void steps_rank(const struct rank *rank)
{
    struct workload w;
    workload_open(&w, rank, &workload_case, 0);
    for (int i = 0; i < N_STEPS; i++)
        RANK_CHECK(workload_step(&w) == EPD_OK);
    workload_close(&w);
}

/* ---- error ---- */

/* Tries a whole life; the places a request passes fail once, on the first try of it. */
static void once_failing_rank(const struct rank *rank)
{
    struct workload w;
    enum epd_status status = EPD_OK;
    for (int i = 0; i < 4; i++) {
        status = workload_try(&w, rank, &workload_case, 2000);
        if (status == EPD_OK)
            break;
        /* the one who met it, and the other, who is left alone in the group */
        RANK_CHECK(status == EPD_SYSTEM || status == EPD_PEER_LOST || status == EPD_TIMEOUT);
        RANK_CHECK(status != EPD_SYSTEM || strstr(w.error, "failpoint") != NULL);
    }
    RANK_CHECK(status == EPD_OK);
    status = EPD_OK;
    int n_failed = 0;
    for (int i = 0; i < N_STEPS; i++) {
        status = workload_step(&w);
        RANK_CHECK(status == EPD_OK || status == EPD_SYSTEM || status == EPD_TIMEOUT ||
                   status == EPD_SEQ_MISMATCH);
        n_failed += status != EPD_OK;
    }
    RANK_CHECK(n_failed <= 1 && status == EPD_OK);
    workload_close(&w);
}

START_TEST(a_failure_at_any_place_is_an_error_reply_and_the_next_try_works)
{
    static const char *const points[] = {"hello_reply", "group_open",  "buffer_ready",
                                         "plan_ready",  "step_submit", "step_done"};
    for (size_t i = 0; i < sizeof(points) / sizeof(points[0]); i++) {
        struct baseline before;
        start_with(points[i], i == 0 ? "error@3" : "error@1"); /* the harness says Hello, too */
        pid_t worker = daemon_worker(&epd_daemon);
        ck_assert_msg(ranks_run(epd_daemon.socket_path, "once", 2, once_failing_rank, NULL) == 0,
                      "failpoint %s", points[i]);
        baseline_take(&before, &epd_daemon);
        ck_assert_int_eq(before.buffers + before.plans + before.groups + before.heap_bytes, 0);
        ck_assert_int_eq(daemon_worker(&epd_daemon), worker);
        daemon_stop(&epd_daemon);
    }
}
END_TEST

/* One rank's launch is refused before it is gathered: the other one must not wait for ever. */
static void refused_launch_rank(const struct rank *rank)
{
    struct workload w;
    int n_bad = 0;
    workload_open(&w, rank, &workload_case, 500);
    for (int i = 0; i < N_STEPS; i++)
        n_bad += workload_step(&w) != EPD_OK;
    RANK_CHECK(n_bad <= 2);
    workload_close(&w);
}

START_TEST(a_launch_that_is_refused_does_not_hang_the_other_rank)
{
    start_with("launch_received", "error@3");
    ck_assert_uint_eq(ranks_run(epd_daemon.socket_path, "refused", 2, refused_launch_rank, NULL), 0);
    daemon_stop(&epd_daemon);
}
END_TEST

/* ---- clients that die while the daemon is at that place ---- */

/* Lives until its parent kills it. */
static void endless_rank(const struct rank *rank)
{
    struct workload w;
    enum epd_status status = EPD_PEER_LOST;
    for (;;) {
        while (status == EPD_OK)
            status = workload_step(&w);
        if (rank->rank == 0) /* the survivor is told, and tries again in the next group */
            RANK_CHECK(status == EPD_PEER_LOST || status == EPD_IN_USE || status == EPD_OK);
        status = workload_try(&w, rank, &workload_case, 0);
        if (status == EPD_IN_USE)
            sleep_ms(1);
    }
}

START_TEST(a_client_killed_while_the_daemon_is_at_any_place_leaves_nothing)
{
    static const char *const points[] = {"session_open", "hello_reply",     "group_open",  "buffer_ready",
                                         "plan_ready",   "launch_received", "step_submit", "step_done"};
    for (size_t i = 0; i < sizeof(points) / sizeof(points[0]); i++) {
        struct baseline before;
        start_with(points[i], "sleep:" STALL_MS);
        ck_assert_uint_eq(ranks_run(epd_daemon.socket_path, "warm", 2, steps_rank, NULL), 0);
        baseline_take(&before, &epd_daemon);
        for (int n = 0; n < 3; n++) {
            struct rank_team team;
            ranks_start(&team, epd_daemon.socket_path, "stalled", 2, endless_rank, NULL);
            sleep_ms(200 + 113 * n);
            kill(team.pids[1], SIGKILL);
            sleep_ms(50);
            kill(team.pids[0], SIGKILL);
            ck_assert_uint_eq(ranks_wait(&team, 60), 2);
        }
        ck_assert_msg(baseline_wait(&before, &epd_daemon) >= 0, "failpoint %s", points[i]);
        ck_assert_uint_eq(ranks_run(epd_daemon.socket_path, "after", 2, steps_rank, NULL), 0);
        daemon_stop(&epd_daemon);
    }
}
END_TEST

/* ---- the worker dies at that place ---- */

static int is_loss(enum epd_status status)
{
    return status == EPD_RESTARTED || status == EPD_DISCONNECTED || status == EPD_PEER_LOST;
}

/* Good steps of each rank, in all lives of the worker. */
struct progress {
    atomic_int n_good[2];
};

static int both_through(struct progress *progress)
{
    return atomic_load(&progress->n_good[0]) >= N_STEPS && atomic_load(&progress->n_good[1]) >= N_STEPS;
}

/* Any call may find the worker gone, in any of its lives; the steps that end EPD_OK are right. Neither rank
 * leaves before both are through. */
static void persistent_rank(const struct rank *rank)
{
    struct progress *progress = *(struct progress *const *)rank->arg;
    while (!both_through(progress)) {
        struct workload w;
        enum epd_status status = workload_try(&w, rank, &workload_case, 3000);
        RANK_CHECK(status == EPD_OK || status == EPD_IN_USE || is_loss(status));
        if (status != EPD_OK) {
            sleep_ms(1);
            continue;
        }
        while (status == EPD_OK && !both_through(progress)) {
            status = workload_step(&w);
            if (status == EPD_OK)
                atomic_fetch_add(&progress->n_good[rank->rank], 1);
        }
        RANK_CHECK(status == EPD_OK || is_loss(status));
        workload_close(&w);
    }
}

START_TEST(a_worker_that_dies_at_any_place_is_replaced_and_ranks_get_through)
{
    /* the n-th hit is one that a life reaches, but not the first, so that the next worker gets further */
    static const struct {
        const char *point, *action;
    } rows[] = {{"session_open", "kill@4"},  {"hello_reply", "kill@3"}, {"group_open", "kill@2"},
                {"buffer_ready", "kill@17"}, {"plan_ready", "kill@3"},  {"launch_received", "kill@15"},
                {"step_submit", "kill@8"},   {"step_done", "kill@8"},   {"buffer_ready", "abort@17"}};
    struct progress *progress =
        mmap(NULL, sizeof *progress, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    for (size_t i = 0; i < sizeof(rows) / sizeof(rows[0]); i++) {
        start_with(rows[i].point, rows[i].action);
        pid_t worker = daemon_worker(&epd_daemon);
        for (int n = 0; n < 3; n++) {
            memset(progress, 0, sizeof *progress);
            ck_assert_msg(ranks_run(epd_daemon.socket_path, "kill", 2, persistent_rank, &progress) == 0,
                          "failpoint %s round %d", rows[i].point, n);
        }
        for (int waited = 0; daemon_worker(&epd_daemon) == worker; waited++) {
            ck_assert_msg(waited < 5000, "failpoint %s was not met", rows[i].point);
            sleep_ms(1);
        }
        (void)daemon_wait_worker(&epd_daemon, worker);
        sleep_ms(100);
        daemon_stop(&epd_daemon);
    }
}
END_TEST

START_TEST(a_worker_that_fails_at_every_start_is_given_up_at_the_limit)
{
    char log[96], socket[96], control[96], directory[] = "/tmp/epd-fault-XXXXXX", command[64];
    ck_assert_ptr_nonnull(mkdtemp(directory));
    snprintf(log, sizeof log, "%s/log", directory);
    snprintf(socket, sizeof socket, "%s/epd.sock", directory);
    snprintf(control, sizeof control, "%s/control.sock", directory);
    const char *const arguments[] = {"--backend",
                                     "host",
                                     "--socket",
                                     socket,
                                     "--control-socket",
                                     control,
                                     "--restart-first",
                                     "5ms",
                                     "--restart-max",
                                     "20ms",
                                     "--restart-limit",
                                     "4",
                                     NULL};
    setenv("EPD_FAILPOINTS", "worker_start=error", 1);
    ck_assert_int_eq(spawn_wait(spawn_epd(arguments, log), 30000), EXIT_GAVE_UP);
    ck_assert_int_eq(file_count(log, "worker cannot start: failpoint worker_start"), 4);
    ck_assert_int_eq(file_count(log, "worker restarts in_ms"), 3);
    setenv("EPD_FAILPOINTS", "nonsense", 1); /* a configuration that cannot work is not tried again */
    ck_assert_int_eq(spawn_wait(spawn_epd(arguments, log), 30000), 2);
    unsetenv("EPD_FAILPOINTS");
    snprintf(command, sizeof command, "rm -r %s", directory);
    ck_assert_int_eq(system(command), 0);
}
END_TEST

/* On a machine with many GPUs a start takes seconds. Who waited for it would wait for longer than NOT_WAITED_MS; a busy
 * machine lets nobody wait that long. */
#define START_MS      "1500"
#define NOT_WAITED_MS 750
START_TEST(while_the_next_worker_starts_the_control_socket_answers_all_the_same)
{
    start_with("worker_start", "sleep:" START_MS);
    const pid_t worker = daemon_worker(&epd_daemon);
    int n_starting = 0, n_silent = 0;
    ck_assert_int_gt(worker, 0);
    kill(worker, SIGKILL);
    const double begin = now_ms();
    while (now_ms() - begin < 1000) {
        double elapsed_ms;
        json_t *status = control_ask(epd_daemon.control_path, CONTROL_STATUS, &elapsed_ms);
        const char *state = json_string_value(json_object_get(status, "worker"));
        ck_assert_msg(status != NULL, "no answer after %.1f ms", elapsed_ms);
        n_starting += state && strcmp(state, "starting") == 0;
        json_decref(status);
        ck_assert_msg(elapsed_ms < NOT_WAITED_MS, "answered after %.1f ms", elapsed_ms);
        sleep_ms(10);
    }
    ck_assert_int_gt(n_starting, 0);
    /* somebody who calls and says nothing */
    static struct wire silent;
    ck_assert_int_eq(wire_connect(&silent, epd_daemon.control_path), 0);
    double elapsed_ms;
    json_t *status = control_ask(epd_daemon.control_path, CONTROL_STATUS, &elapsed_ms);
    n_silent += status != NULL;
    json_decref(status);
    wire_close(&silent);
    ck_assert_msg(n_silent && elapsed_ms < NOT_WAITED_MS, "answered after %.1f ms", elapsed_ms);
    wire_open(&silent, epd_daemon.socket_path); /* it serves */
    wire_close(&silent);
    daemon_stop(&epd_daemon);
}
END_TEST

/* The answer that tells a rank of it must not take away what the daemon is still busy with. */
START_TEST(a_device_that_is_lost_amid_a_request_ends_the_worker_in_order)
{
    static const char *const points[] = {"group_open", "buffer_ready", "plan_ready"};
    static struct wire ranks[2];
    for (size_t i = 0; i < sizeof(points) / sizeof(points[0]); i++) {
        start_with(points[i], "lost");
        const pid_t worker = daemon_worker(&epd_daemon);
        struct message joins[] = {wire_join_message("lost", 2, 0), wire_join_message("lost", 2, 1)};
        for (int rank = 0; rank < 2; rank++) {
            wire_open(&ranks[rank], epd_daemon.socket_path);
            ck_assert_int_eq(wire_send(&ranks[rank], &joins[rank], -1), 0);
        }
        enum epd_status got[2] = {wire_answer(&ranks[0]), wire_answer(&ranks[1])};
        if (i > 0) {
            ck_assert(got[0] == EPD_OK && got[1] == EPD_OK);
            const uint64_t group = ranks[0].reply.reply_group.group_id;
            for (int rank = 0; rank < 2; rank++) {
                struct message request =
                    i == 1 ? wire_alloc_message(group, 4096) : wire_barrier_message(group);
                (void)wire_send(&ranks[rank], &request, -1); /* the first may have ended it already */
            }
            for (int rank = 0; rank < 2; rank++)
                got[rank] = wire_answer(&ranks[rank]);
        }
        ck_assert_msg(got[0] == EPD_CUDA || got[1] == EPD_CUDA, "%s: %s, %s", points[i], status_name(got[0]),
                      status_name(got[1]));
        (void)daemon_wait_worker(&epd_daemon, worker);
        for (int rank = 0; rank < 2; rank++)
            wire_close(&ranks[rank]);
        json_t *status = control_ask(epd_daemon.control_path, CONTROL_STATUS, NULL);
        ck_assert_str_eq(json_string_value(json_object_get(status, "last_exit")), "exit code 3");
        json_decref(status);
        daemon_stop(&epd_daemon);
    }
}
END_TEST

START_TEST(a_daemon_that_is_stopped_while_its_worker_starts_has_done_nothing_wrong)
{
    start_with("worker_start", "sleep:" START_MS);
    const pid_t worker = daemon_worker(&epd_daemon);
    kill(worker, SIGKILL);
    (void)daemon_wait_worker(&epd_daemon, worker);
    daemon_stop(&epd_daemon); /* wants the exit code 0 */
}
END_TEST

/* It drains, but stalls: the supervisor does not wait for ever. */
START_TEST(a_worker_that_dies_while_it_drains_still_ends_the_daemon)
{
    start_with("drain", "kill");
    int status;
    kill(epd_daemon.pid, SIGTERM);
    ck_assert_int_eq(waitpid(epd_daemon.pid, &status, 0), epd_daemon.pid);
    ck_assert(WIFEXITED(status) && WEXITSTATUS(status) == 1);
}
END_TEST

int main(void)
{
    const TTest *const tests[] = {
        a_failure_at_any_place_is_an_error_reply_and_the_next_try_works,
        a_launch_that_is_refused_does_not_hang_the_other_rank,
        a_client_killed_while_the_daemon_is_at_any_place_leaves_nothing,
        a_worker_that_dies_at_any_place_is_replaced_and_ranks_get_through,
        a_worker_that_fails_at_every_start_is_given_up_at_the_limit,
        while_the_next_worker_starts_the_control_socket_answers_all_the_same,
        a_device_that_is_lost_amid_a_request_ends_the_worker_in_order,
        a_daemon_that_is_stopped_while_its_worker_starts_has_done_nothing_wrong,
        a_worker_that_dies_while_it_drains_still_ends_the_daemon,
    };
    return suite_run("failpoints", tests, SUITE_COUNT(tests), NULL, NULL);
}
