/* Processes that come and go: clients killed while idle, a killed worker, a second daemon, several groups at
 * once, many sessions. Resources go back to where they were. */
#include <check.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <time.h>

#include "tests/integration/daemon_process.h"
#include "tests/integration/layer.h"

#define RECLAIM_DEADLINE_MS 1000
#define N_KILLED_CLIENTS    50
#define N_SESSIONS          500

static struct daemon_process epd_daemon;

static const struct op_case tiny = {.name = "tiny",
                                    .dtype = EPD_F32,
                                    .idx_dtype = EPD_I32,
                                    .world_size = 2,
                                    .n_experts = 4,
                                    .top_k = 1,
                                    .max_tokens = 4,
                                    .hidden = 8,
                                    .ffn = 8,
                                    .alignment = 1,
                                    .tokens = OP_TOKENS_EQUAL,
                                    .pattern = OP_UNIFORM,
                                    .capacity = OP_CAPACITY_AMPLE,
                                    .overflow = EPD_OVERFLOW_ERROR,
                                    .activation = EPD_SWIGLU};

static void start(void)
{
    daemon_start(&epd_daemon, 2, NULL);
}

static void stop(void)
{
    daemon_stop(&epd_daemon);
}

static void sleep_ms(long ms)
{
    struct timespec t = {.tv_sec = ms / 1000, .tv_nsec = ms % 1000 * 1000000};
    nanosleep(&t, NULL);
}

/* Waits until the worker has no more fds than before; fails after the time a reclaim may take. */
static void expect_fds_back(pid_t worker, int n_before)
{
    int waited = 0;
    while (process_fds(worker) > n_before) {
        ck_assert_msg(waited < RECLAIM_DEADLINE_MS, "worker has %d fds, had %d", process_fds(worker),
                      n_before);
        sleep_ms(10);
        waited += 10;
    }
}

static void killed_rank(const struct rank *rank)
{
    struct layer layer;
    layer_open(&layer, rank, &tiny);
    (void)layer_output(&layer, EPD_ROLE_OUT);
    kill(getpid(), SIGKILL);
}

START_TEST(clients_killed_while_idle_leave_nothing_behind)
{
    pid_t worker = daemon_worker(&epd_daemon);
    int n_before = process_fds(worker);
    for (int i = 0; i < N_KILLED_CLIENTS; i++)
        ck_assert_uint_eq(ranks_run(epd_daemon.socket_path, "killed", 2, killed_rank, NULL), 2);
    expect_fds_back(worker, n_before);
    ck_assert_int_eq(daemon_worker(&epd_daemon), worker);
}
END_TEST

static void working_rank(const struct rank *rank)
{
    struct layer layer;
    layer_open(&layer, rank, &tiny);
    struct epd_plan *plan = layer_plan(&layer, (struct epd_plan_options){.op = EPD_OP_BARRIER}, NULL, 0);
    for (int i = 0; i < 200; i++)
        RANK_CHECK(layer_step(plan) == EPD_OK);
    epd_plan_destroy(plan);
    epd_group_leave(layer.group);
    layer_close(&layer);
}

START_TEST(several_groups_work_side_by_side)
{
    struct rank_team teams[4];
    static const char *const names[4] = {"a", "b", "c", "d"};
    int n_before = process_fds(daemon_worker(&epd_daemon));
    for (int i = 0; i < 4; i++)
        ranks_start(&teams[i], epd_daemon.socket_path, names[i], 2, working_rank, NULL);
    for (int i = 0; i < 4; i++)
        ck_assert_uint_eq(ranks_wait(&teams[i], 60), 0);
    expect_fds_back(daemon_worker(&epd_daemon), n_before);
}
END_TEST

static void restarted_rank(const struct rank *rank)
{
    struct layer layer;
    pid_t worker = *(const pid_t *)rank->arg;
    layer_open(&layer, rank, &tiny);
    struct epd_client_info before = {.size = sizeof(before)}, after = {.size = sizeof(after)};
    RANK_CHECK(epd_client_info(layer.client, &before) == EPD_OK);
    struct epd_plan *plan = layer_plan(&layer, (struct epd_plan_options){.op = EPD_OP_BARRIER}, NULL, 0);
    if (rank->rank == 0) {
        RANK_CHECK(epd_plan_launch(plan, NULL) == EPD_OK); /* in flight: rank 1 never comes */
        sleep_ms(100);
        kill(worker, SIGKILL);
        RANK_CHECK(epd_plan_wait(plan, 0) == EPD_RESTARTED);
    } else {
        sleep_ms(500);
    }
    RANK_CHECK(epd_plan_launch(plan, NULL) == EPD_RESTARTED);
    epd_close(layer.client);
    struct epd_open_options options = {.size = sizeof(options), .socket_path = rank->socket_path};
    RANK_CHECK(epd_open(&options, &layer.client) == EPD_OK);
    RANK_CHECK(epd_client_info(layer.client, &after) == EPD_OK);
    RANK_CHECK(memcmp(before.boot_id, after.boot_id, sizeof(before.boot_id)) != 0);
    layer_close(&layer);
}

START_TEST(a_killed_worker_comes_back_and_clients_are_told)
{
    pid_t worker = daemon_worker(&epd_daemon);
    ck_assert_uint_eq(ranks_run(epd_daemon.socket_path, "restart", 2, restarted_rank, &worker), 0);
    pid_t new_worker = daemon_wait_worker(&epd_daemon, worker);
    ck_assert_int_ne(new_worker, worker);
    ck_assert_uint_eq(ranks_run(epd_daemon.socket_path, "restart", 2, working_rank, NULL), 0);
}
END_TEST

START_TEST(a_second_daemon_on_the_same_socket_is_refused_and_the_first_unharmed)
{
    pid_t pid = fork();
    if (pid == 0) {
        freopen("/dev/null", "w", stderr);
        execl(EPD_BINARY, EPD_BINARY, "--backend", "host", "--socket", epd_daemon.socket_path,
              "--control-socket", epd_daemon.control_path, (char *)NULL);
        _exit(0);
    }
    int status = 0;
    ck_assert_int_eq(waitpid(pid, &status, 0), pid);
    ck_assert(WIFEXITED(status) && WEXITSTATUS(status) != 0);
    ck_assert_uint_eq(ranks_run(epd_daemon.socket_path, "first", 2, working_rank, NULL), 0);
}
END_TEST

START_TEST(the_worker_ends_with_its_supervisor)
{
    pid_t worker = daemon_worker(&epd_daemon);
    kill(epd_daemon.pid, SIGKILL);
    waitpid(epd_daemon.pid, NULL, 0);
    for (int waited = 0; kill(worker, 0) == 0; waited += 10) {
        ck_assert_msg(waited < 5000, "worker %d outlives its supervisor", (int)worker);
        sleep_ms(10);
    }
    /* the sockets and the lock that are left do not keep a new daemon from starting */
    struct daemon_process old = epd_daemon;
    epd_daemon.pid = fork();
    if (epd_daemon.pid == 0) {
        execl(EPD_BINARY, EPD_BINARY, "--backend", "host", "--devices", "2", "--socket", old.socket_path,
              "--control-socket", old.control_path, (char *)NULL);
        _exit(127);
    }
    daemon_wait_worker(&epd_daemon, 0);
    ck_assert_uint_eq(ranks_run(epd_daemon.socket_path, "again", 2, working_rank, NULL), 0);
}
END_TEST

START_TEST(five_hundred_idle_sessions_are_held_and_given_back)
{
    static struct epd_client *clients[N_SESSIONS];
    struct rlimit limit;
    pid_t worker = daemon_worker(&epd_daemon);
    int n_before = process_fds(worker);
    getrlimit(RLIMIT_NOFILE, &limit);
    limit.rlim_cur = limit.rlim_max;
    setrlimit(RLIMIT_NOFILE, &limit);
    struct epd_open_options options = {.size = sizeof(options), .socket_path = epd_daemon.socket_path};
    for (int i = 0; i < N_SESSIONS; i++)
        ck_assert_msg(epd_open(&options, &clients[i]) == EPD_OK, "session %d: %s", i, epd_error_text());
    for (int i = 0; i < N_SESSIONS; i++)
        epd_close(clients[i]);
    expect_fds_back(worker, n_before);
}
END_TEST

/* Lines of the daemon's log that hold the text, waited for until there is one or a reclaim takes too long. */
static int lines_of_log(const char *text)
{
    int n = 0;
    for (int waited = 0; !n && waited < RECLAIM_DEADLINE_MS; waited += 10, sleep_ms(10)) {
        FILE *log = fopen(epd_daemon.log_path, "r");
        char line[1024];
        ck_assert_ptr_nonnull(log);
        while (fgets(line, sizeof(line), log))
            n += strstr(line, text) != NULL;
        fclose(log);
    }
    return n;
}

/* Both leave when all is done. */
static void barrier_rank(const struct rank *rank)
{
    struct layer layer;
    struct epd_plan *plan = NULL;
    const struct epd_plan_options options = {.size = sizeof(options), .op = EPD_OP_BARRIER};
    layer_open(&layer, rank, &tiny);
    RANK_CHECK(epd_plan_create(layer.group, &options, &plan) == EPD_OK);
    RANK_CHECK(layer_step(plan) == EPD_OK);
    layer_close(&layer);
}

static void leaving_rank(const struct rank *rank)
{
    struct layer layer;
    struct epd_plan *plan = NULL;
    const struct epd_plan_options options = {.size = sizeof(options), .op = EPD_OP_BARRIER};
    layer_open(&layer, rank, &tiny);
    RANK_CHECK(epd_plan_create(layer.group, &options, &plan) == EPD_OK);
    RANK_CHECK(layer_step(plan) == EPD_OK);
    if (rank->rank == 1 && *(const int *)rank->arg)
        epd_group_leave(layer.group);
    if (rank->rank == 1) {
        layer_close(&layer);
        return;
    }
    RANK_CHECK(layer_step(plan) == EPD_PEER_LOST); /* it has to wait for rank 1: it is told why it cannot */
    RANK_CHECK(strstr(epd_error_text(), "rank 1") != NULL && strstr(epd_error_text(), "it has left") != NULL);
    layer_close(&layer);
}

START_TEST(a_group_that_a_rank_leaves_is_closed_and_one_whose_rank_dies_is_broken)
{
    for (int leaves = 0; leaves < 2; leaves++)
        ck_assert_uint_eq(
            ranks_run(epd_daemon.socket_path, leaves ? "left" : "ended", 2, leaving_rank, &leaves), 0);
    (void)ranks_run(epd_daemon.socket_path, "died", 2, killed_rank, NULL);
    ck_assert_int_eq(lines_of_log("broken name died"), 1);
    ck_assert_int_eq(lines_of_log("closed name left") + lines_of_log("broken name left"), 1);
    ck_assert_int_eq(lines_of_log("closed name ended") + lines_of_log("broken name ended"), 1);
    ck_assert_uint_eq(ranks_run(epd_daemon.socket_path, "idle", 2, barrier_rank, NULL), 0);
    ck_assert_int_eq(lines_of_log("closed name idle"), 1);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("lifecycle");
    TCase *tests = tcase_create("lifecycle");
    tcase_set_timeout(tests, 120);
    tcase_add_checked_fixture(tests, start, stop);
    tcase_add_test(tests, clients_killed_while_idle_leave_nothing_behind);
    tcase_add_test(tests, several_groups_work_side_by_side);
    tcase_add_test(tests, a_killed_worker_comes_back_and_clients_are_told);
    tcase_add_test(tests, a_second_daemon_on_the_same_socket_is_refused_and_the_first_unharmed);
    tcase_add_test(tests, the_worker_ends_with_its_supervisor);
    tcase_add_test(tests, a_group_that_a_rank_leaves_is_closed_and_one_whose_rank_dies_is_broken);
    tcase_add_test(tests, five_hundred_idle_sessions_are_held_and_given_back);
    suite_add_tcase(suite, tests);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int n_failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return n_failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
