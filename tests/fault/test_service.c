/* The service itself: sockets and their directories, strangers, forks, signals, broken configurations, a
 * closed or full standard error, a clock that jumps. */
#include <check.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>

#include "tests/fault/baseline.h"
#include "tests/fault/bystander.h"
#include "tests/fault/control.h"
#include "tests/fault/spawn.h"
#include "tests/fault/suite.h"
#include "tests/fault/wire.h"
#include "tests/fault/workload.h"

#define EXIT_FAILED 1
#define N_STEPS     5
#define STOP_MS     30000

static struct daemon_process epd_daemon;

static void steps_rank(const struct rank *rank)
{
    struct workload w;
    workload_open(&w, rank, &workload_case, 0);
    for (int i = 0; i < N_STEPS; i++)
        RANK_CHECK(workload_step(&w) == EPD_OK);
    workload_close(&w);
}

static void expect_serving(const char *name)
{
    unsigned n_failed = ranks_run(epd_daemon.socket_path, name, 2, steps_rank, NULL);
    if (n_failed)
        daemon_print_log(&epd_daemon);
    ck_assert_uint_eq(n_failed, 0);
}

static void fill_paths(void)
{
    snprintf(epd_daemon.directory, sizeof(epd_daemon.directory), "/tmp/epd-fault-XXXXXX");
    ck_assert_ptr_nonnull(mkdtemp(epd_daemon.directory));
    snprintf(epd_daemon.socket_path, sizeof(epd_daemon.socket_path), "%s/epd.sock", epd_daemon.directory);
    snprintf(epd_daemon.control_path, sizeof(epd_daemon.control_path), "%s/control.sock",
             epd_daemon.directory);
    snprintf(epd_daemon.log_path, sizeof(epd_daemon.log_path), "%s/log", epd_daemon.directory);
}

static void remove_paths(void)
{
    char command[128];
    snprintf(command, sizeof command, "rm -r %s", epd_daemon.directory);
    ck_assert_int_eq(system(command), 0);
}

/* ---- paths ---- */

/* Starts epd on this socket; it must refuse with the code and a log line that contains the reason. */
static void expect_refused(const char *socket_path, const char *reason)
{
    char log[128];
    snprintf(log, sizeof log, "%s/refused.log", epd_daemon.directory);
    (void)unlink(log);
    const char *const arguments[] = {
        "--backend", "host", "--socket", socket_path, "--control-socket", epd_daemon.control_path, NULL};
    int code = spawn_wait(spawn_epd(arguments, log), STOP_MS);
    ck_assert_msg(code == EXIT_FAILED || code == 2, "%s: exit code %d", reason, code);
    ck_assert_msg(file_contains(log, reason), "the log does not say \"%s\"", reason);
}

START_TEST(unsafe_and_impossible_socket_paths_are_refused_with_the_reason)
{
    char path[256], other[256], lock[300];
    fill_paths();
    snprintf(path, sizeof path, "%s/open", epd_daemon.directory);
    ck_assert_int_eq(mkdir(path, 0755), 0);
    ck_assert_int_eq(chmod(path, 0777), 0);
    snprintf(other, sizeof other, "%s/open/epd.sock", epd_daemon.directory);
    expect_refused(other, "lets others write");
    ck_assert_int_eq(chmod(path, 0770), 0);
    expect_refused(other, "lets others write");

    snprintf(path, sizeof path, "%s/plain.sock", epd_daemon.directory);
    close(open(path, O_WRONLY | O_CREAT, 0600));
    expect_refused(path, "not a socket");
    struct stat info;
    ck_assert_int_eq(stat(path, &info), 0); /* and it is still there */

    snprintf(path, sizeof path, "%s/linked.sock", epd_daemon.directory);
    snprintf(lock, sizeof lock, "%s.lock", path);
    snprintf(other, sizeof other, "%s/victim", epd_daemon.directory);
    ck_assert_int_eq(symlink(other, lock), 0);
    expect_refused(path, "symbolic link");
    ck_assert_int_ne(stat(other, &info), 0); /* nothing was made through the link */
    ck_assert_int_eq(unlink(lock), 0);
    close(open(other, O_WRONLY | O_CREAT, 0600));
    ck_assert_int_eq(link(other, lock), 0);
    expect_refused(path, "one name");

    snprintf(path, sizeof path, "%s/%0120d", epd_daemon.directory, 7);
    expect_refused(path, "at most 107");
    snprintf(path, sizeof path, "%s/no/such/epd.sock", epd_daemon.directory);
    expect_refused(path, "cannot be made");
    snprintf(path, sizeof path, "%s/", epd_daemon.directory);
    expect_refused(path, "file name is missing");
    remove_paths();
}
END_TEST

START_TEST(a_stale_socket_is_replaced_and_the_files_have_their_modes_from_the_start)
{
    struct stat info;
    struct wire *stale = malloc(sizeof *stale);
    daemon_start(&epd_daemon, 2, (const char *const[]){"--socket-mode", "0640", NULL});
    ck_assert_int_eq(stat(epd_daemon.socket_path, &info), 0);
    ck_assert_uint_eq(info.st_mode & 07777, 0640);
    ck_assert_int_eq(stat(epd_daemon.control_path, &info), 0);
    ck_assert_uint_eq(info.st_mode & 07777, 0600);
    /* killed with its worker: sockets and lock files stay behind */
    pid_t worker = daemon_worker(&epd_daemon);
    kill(epd_daemon.pid, SIGKILL);
    waitpid(epd_daemon.pid, NULL, 0);
    while (kill(worker, 0) == 0)
        sleep_ms(5);
    ck_assert_int_eq(wire_connect(stale, epd_daemon.socket_path), ECONNREFUSED);
    free(stale);
    const char *const again[] = {"--backend",
                                 "host",
                                 "--devices",
                                 "2",
                                 "--socket",
                                 epd_daemon.socket_path,
                                 "--control-socket",
                                 epd_daemon.control_path,
                                 NULL};
    epd_daemon.pid = spawn_epd(again, epd_daemon.log_path);
    (void)daemon_wait_worker(&epd_daemon, 0);
    expect_serving("again");
    daemon_stop(&epd_daemon);
}
END_TEST

/* ---- signals ---- */

struct drained {
    atomic_int n_good[2];
    atomic_int n_drained[2];
};

static void drained_rank(const struct rank *rank)
{
    struct drained *shared = *(struct drained *const *)rank->arg;
    struct workload w;
    enum epd_status status;
    workload_open(&w, rank, &workload_case, 0);
    while ((status = workload_step(&w)) == EPD_OK)
        atomic_fetch_add(&shared->n_good[rank->rank], 1);
    RANK_CHECK(status == EPD_DRAINING);
    atomic_fetch_add(&shared->n_drained[rank->rank], 1);
    workload_close(&w);
}

START_TEST(sigterm_under_load_ends_every_step_on_both_ranks_alike_and_exits_with_0)
{
    struct rank_team team;
    struct drained *shared =
        mmap(NULL, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    daemon_start(&epd_daemon, 2, (const char *const[]){"--drain", "20s", NULL});
    ranks_start(&team, epd_daemon.socket_path, "drain", 2, drained_rank, &shared);
    while (atomic_load(&shared->n_good[0]) < 20)
        sleep_ms(1);
    daemon_stop(&epd_daemon); /* SIGTERM, exit code 0 */
    ck_assert_uint_eq(ranks_wait(&team, 60), 0);
    ck_assert_int_eq(atomic_load(&shared->n_good[0]), atomic_load(&shared->n_good[1]));
    ck_assert_int_eq(atomic_load(&shared->n_drained[0]) + atomic_load(&shared->n_drained[1]), 2);
}
END_TEST

/* A step that never completes keeps a drain waiting; the second SIGTERM does not wait. */
static void half_step_rank(const struct rank *rank)
{
    struct workload w;
    workload_open(&w, rank, &workload_case, 60000);
    RANK_CHECK(workload_step(&w) == EPD_OK);
    if (rank->rank == 0) {
        RANK_CHECK(workload_launch(&w) == EPD_OK);
        atomic_store(*(atomic_int *const *)rank->arg, 1);
        RANK_CHECK(epd_plan_wait(w.forward, 0) == EPD_DRAINING);
    } else {
        while (epd_plan_wait(w.forward, 0) == EPD_OK) /* until the connection is gone */
            sleep_ms(5);
    }
    workload_close(&w);
}

START_TEST(a_second_sigterm_does_not_wait_for_a_step_that_never_comes)
{
    struct rank_team team;
    atomic_int *launched =
        mmap(NULL, sizeof *launched, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    daemon_start(&epd_daemon, 2, (const char *const[]){"--drain", "120s", NULL});
    ranks_start(&team, epd_daemon.socket_path, "half", 2, half_step_rank, &launched);
    while (!atomic_load(launched))
        sleep_ms(1);
    kill(epd_daemon.pid, SIGTERM);
    ck_assert(file_wait(epd_daemon.log_path, "worker draining", STOP_MS));
    sleep_ms(300);
    ck_assert_int_eq(waitpid(epd_daemon.pid, NULL, WNOHANG), 0); /* it does wait */
    daemon_stop(&epd_daemon);                                    /* the second one */
    ck_assert_uint_eq(ranks_wait(&team, 60), 0);
}
END_TEST

static void write_config(const char *path, const char *text)
{
    FILE *file = fopen(path, "w");
    ck_assert_ptr_nonnull(file);
    fputs(text, file);
    fclose(file);
}

static void expect_config(const char *key, const char *want)
{
    char value[64] = "";
    for (int waited = 0; waited < STOP_MS && strcmp(value, want) != 0; waited += 10) {
        json_t *status = control_ask(epd_daemon.control_path, CONTROL_STATUS, NULL), *item;
        size_t i;
        json_array_foreach (json_object_get(status, "config"), i, item) {
            if (strcmp(json_string_value(json_object_get(item, "key")), key) == 0)
                snprintf(value, sizeof value, "%s", json_string_value(json_object_get(item, "value")));
        }
        json_decref(status);
        sleep_ms(10);
    }
    ck_assert_str_eq(value, want);
}

START_TEST(sighup_takes_a_good_configuration_and_keeps_the_old_one_when_it_is_broken)
{
    static const char *const broken[] = {"[limits]\nsessions = many\n", "[limits]\nno_such_key = 1\n",
                                         "not an ini file\n", "[limits]\nsessions = 99999999999999999999\n",
                                         "[limits]\nsessions = 77\n[timers]\nwarn = 90s\n"};
    char path[256];
    fill_paths();
    snprintf(path, sizeof path, "%s/epd.conf", epd_daemon.directory);
    write_config(path, "[limits]\nsessions = 50\n");
    const char *const arguments[] = {"--config",
                                     path,
                                     "--backend",
                                     "host",
                                     "--devices",
                                     "2",
                                     "--socket",
                                     epd_daemon.socket_path,
                                     "--control-socket",
                                     epd_daemon.control_path,
                                     NULL};
    epd_daemon.pid = spawn_epd(arguments, epd_daemon.log_path);
    pid_t worker = daemon_wait_worker(&epd_daemon, 0);
    expect_config("sessions", "50");
    for (size_t i = 0; i < sizeof(broken) / sizeof(broken[0]); i++) {
        write_config(path, broken[i]);
        kill(epd_daemon.pid, SIGHUP);
        for (int waited = 0; file_count(epd_daemon.log_path, "config not reloaded") <= (int)i; waited += 5) {
            ck_assert_msg(waited < STOP_MS, "broken config %zu was not refused", i);
            sleep_ms(5);
        }
        expect_config("sessions", "50");
    }
    (void)unlink(path);
    kill(epd_daemon.pid, SIGHUP);
    ck_assert(file_wait(epd_daemon.log_path, "No such file", STOP_MS));
    write_config(path, "[limits]\nsessions = 60\n");
    kill(epd_daemon.pid, SIGHUP);
    expect_config("sessions", "60");
    ck_assert_int_eq(daemon_worker(&epd_daemon), worker);
    write_config(path, "garbage\n"); /* even a restart of the worker does not read it */
    kill(worker, SIGKILL);
    (void)daemon_wait_worker(&epd_daemon, worker);
    expect_config("sessions", "60");
    expect_serving("reload");
    kill(epd_daemon.pid, SIGTERM);
    ck_assert_int_eq(spawn_wait(epd_daemon.pid, STOP_MS), 0);
    remove_paths();
}
END_TEST

/* ---- where the log goes ---- */

static void exec_with_stderr(const char *stderr_path)
{
    if (stderr_path)
        dup2(open(stderr_path, O_WRONLY), STDERR_FILENO);
    else
        close(STDERR_FILENO), close(STDOUT_FILENO), close(STDIN_FILENO);
    execl(EPD_BINARY, EPD_BINARY, "--backend", "host", "--devices", "2", "--socket", epd_daemon.socket_path,
          "--control-socket", epd_daemon.control_path, "--dump-directory", "/proc/no/such/place", "--stuck",
          "200ms", "--warn", "50ms", (char *)NULL);
    _exit(127);
}

static void lonely_rank(const struct rank *rank)
{
    struct workload w;
    workload_open(&w, rank, &workload_case, 0);
    if (rank->rank == 0)
        RANK_CHECK(workload_step(&w) == EPD_TIMEOUT); /* writes a dump, or tries to */
    else
        sleep_ms(1000);
    workload_close(&w);
}

START_TEST(a_closed_or_full_standard_error_and_dumps_that_cannot_be_written_stop_nothing)
{
    static const char *const targets[] = {NULL, "/dev/full"};
    for (size_t i = 0; i < 2; i++) {
        fill_paths();
        epd_daemon.pid = fork();
        if (epd_daemon.pid == 0)
            exec_with_stderr(targets[i]);
        (void)daemon_wait_worker(&epd_daemon, 0);
        expect_serving("quiet");
        ck_assert_uint_eq(ranks_run(epd_daemon.socket_path, "lonely", 2, lonely_rank, NULL), 0);
        expect_serving("still");
        kill(epd_daemon.pid, SIGTERM);
        ck_assert_int_eq(spawn_wait(epd_daemon.pid, STOP_MS), 0);
        remove_paths();
    }
}
END_TEST

/* ---- forks and threads of a client ---- */

static void fork_rank(const struct rank *rank)
{
    struct workload w;
    workload_open(&w, rank, &workload_case, 0);
    RANK_CHECK(workload_step(&w) == EPD_OK);
    fflush(NULL);
    pid_t child = fork();
    if (child == 0) {
        struct epd_buffer *buffer;
        struct epd_client_info info = {.size = sizeof(info)};
        RANK_CHECK(epd_plan_launch(w.forward, NULL) == EPD_INVALID_ARGUMENT);
        RANK_CHECK(strstr(epd_error_text(), "fork") != NULL);
        RANK_CHECK(epd_plan_wait(w.forward, 0) == EPD_INVALID_ARGUMENT);
        RANK_CHECK(epd_buffer_alloc(w.layer.group, 64, &buffer) == EPD_INVALID_ARGUMENT);
        RANK_CHECK(epd_client_info(w.layer.client, &info) == EPD_INVALID_ARGUMENT);
        epd_plan_destroy(w.forward);
        epd_group_leave(w.layer.group);
        epd_close(w.layer.client);
        /* a client of its own is fine */
        struct epd_open_options options = {.size = sizeof(options), .socket_path = rank->socket_path};
        struct epd_client *own;
        RANK_CHECK(epd_open(&options, &own) == EPD_OK);
        epd_close(own);
        _exit(0);
    }
    int status;
    RANK_CHECK(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0);
    for (int i = 0; i < N_STEPS; i++)
        RANK_CHECK(workload_step(&w) == EPD_OK);
    workload_close(&w);
}

START_TEST(a_forked_child_gets_a_clear_error_and_does_not_end_its_parents_session)
{
    daemon_start(&epd_daemon, 2, NULL);
    ck_assert_uint_eq(ranks_run(epd_daemon.socket_path, "fork", 2, fork_rank, NULL), 0);
    daemon_stop(&epd_daemon);
}
END_TEST

static void *step_in_thread(void *arg)
{
    RANK_CHECK(workload_step(arg) == EPD_OK);
    return NULL;
}

static void thread_rank(const struct rank *rank)
{
    struct workload w;
    workload_open(&w, rank, &workload_case, 0);
    for (int i = 0; i < N_STEPS; i++) {
        pthread_t thread;
        RANK_CHECK(pthread_create(&thread, NULL, step_in_thread, &w) == 0);
        pthread_join(thread, NULL);
    }
    workload_close(&w);
}

START_TEST(every_step_may_come_from_another_thread)
{
    daemon_start(&epd_daemon, 2, NULL);
    ck_assert_uint_eq(ranks_run(epd_daemon.socket_path, "thread", 2, thread_rank, NULL), 0);
    daemon_stop(&epd_daemon);
}
END_TEST

int main(void)
{
    const TTest *const tests[] = {
        unsafe_and_impossible_socket_paths_are_refused_with_the_reason,
        a_stale_socket_is_replaced_and_the_files_have_their_modes_from_the_start,
        sigterm_under_load_ends_every_step_on_both_ranks_alike_and_exits_with_0,
        a_second_sigterm_does_not_wait_for_a_step_that_never_comes,
        sighup_takes_a_good_configuration_and_keeps_the_old_one_when_it_is_broken,
        a_closed_or_full_standard_error_and_dumps_that_cannot_be_written_stop_nothing,
        a_forked_child_gets_a_clear_error_and_does_not_end_its_parents_session,
        every_step_may_come_from_another_thread,
    };
    return suite_run("service", tests, SUITE_COUNT(tests), NULL, NULL);
}
