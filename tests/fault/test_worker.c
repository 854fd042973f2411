/* The worker dies: idle, in flight, again and again, faster than anybody looks, at every start. Clients learn
 * it by their streams ending and by the boot id, go on by themselves, and no result is wrongly good. */
#include <check.h>
#include <glob.h>
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

#define N_KILLS        8
#define RECOVER_MS     20000
#define EXIT_GAVE_UP   4
#define EXIT_CONFIG    2
#define N_GOOD_BETWEEN 3 /* steps that both ranks make after each recovery */

static struct daemon_process epd_daemon;

static void start(void)
{
    const char *const fast[] = {"--restart-first",
                                "1ms",
                                "--restart-max",
                                "1ms",
                                "--restart-limit",
                                "0",
                                "--warn",
                                "1s",
                                "--stuck",
                                "3s",
                                NULL};
    daemon_start(&epd_daemon, 2, fast);
}

static void stop(void)
{
    daemon_stop(&epd_daemon);
}

struct load {
    atomic_int n_kills;        /* by the test, so far */
    atomic_int finish;         /* after this one the ranks end */
    atomic_ulong n_good[2];    /* steps, of all lives */
    atomic_int n_recovered[2]; /* lives of the worker seen through */
    atomic_int n_restarted[2]; /* launches that ended EPD_RESTARTED */
};

/* The connection was lost; PEER_LOST is the other rank's word that its own recovery begins. */
static int is_loss(enum epd_status status)
{
    return status == EPD_RESTARTED || status == EPD_DISCONNECTED || status == EPD_PEER_LOST;
}

static void recover(struct workload *w, struct load *load)
{
    const unsigned r = w->layer.rank->rank;
    struct epd_client_info old = {.size = sizeof(old)}, now = {.size = sizeof(now)};
    enum epd_status status;
    RANK_CHECK(epd_client_info(w->layer.client, &old) == EPD_OK || is_loss(EPD_RESTARTED));
    for (int i = 0; i < 20; i++) { /* the worker may be killed again during it */
        status = epd_recover(w->layer.client, RECOVER_MS);
        if (status == EPD_OK)
            break;
        RANK_CHECK(is_loss(status));
    }
    RANK_CHECK(status == EPD_OK);
    RANK_CHECK(epd_client_info(w->layer.client, &now) == EPD_OK);
    atomic_fetch_add(&load->n_recovered[r], 1);
}

static void loaded_rank(const struct rank *rank)
{
    struct load *load = *(struct load *const *)rank->arg;
    struct workload w;
    workload_open(&w, rank, &workload_case, 0);
    for (;;) {
        enum epd_status status = workload_step(&w);
        if (status == EPD_OK) {
            atomic_fetch_add(&load->n_good[rank->rank], 1);
        } else if (status == EPD_PEER_LOST && atomic_load(&load->finish)) {
            break; /* the other one has finished */
        } else {
            RANK_CHECK(is_loss(status));
            if (status == EPD_RESTARTED)
                atomic_fetch_add(&load->n_restarted[rank->rank], 1);
            recover(&w, load);
        }
        if (atomic_load(&load->finish) && status == EPD_OK)
            break;
    }
    workload_close(&w);
}

static void wait_for_steps(struct load *load, unsigned long n)
{
    for (unsigned r = 0; r < 2; r++) {
        const unsigned long want = atomic_load(&load->n_good[r]) + n;
        for (int waited = 0; atomic_load(&load->n_good[r]) < want; waited++) {
            if (waited > 60000)
                daemon_print_log(&epd_daemon);
            ck_assert_msg(waited < 60000, "rank %u is stuck after kill %d", r, atomic_load(&load->n_kills));
            sleep_ms(1);
        }
    }
}

START_TEST(a_worker_killed_in_flight_again_and_again_is_replaced_and_the_ranks_go_on_by_themselves)
{
    struct rank_team team;
    struct load *load = mmap(NULL, sizeof *load, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    ranks_start(&team, epd_daemon.socket_path, "load", 2, loaded_rank, &load);
    wait_for_steps(load, 1);
    for (int n = 0; n < N_KILLS; n++) {
        pid_t worker = daemon_worker(&epd_daemon);
        sleep_ms(n * 7 % 20);
        atomic_fetch_add(&load->n_kills, 1);
        ck_assert_int_gt(worker, 0);
        kill(worker, SIGKILL);
        (void)daemon_wait_worker(&epd_daemon, worker);
        wait_for_steps(load, N_GOOD_BETWEEN);
    }
    atomic_store(&load->finish, 1);
    ck_assert_uint_eq(ranks_wait(&team, 60), 0);
    ck_assert_int_gt(atomic_load(&load->n_restarted[0]) + atomic_load(&load->n_restarted[1]), 0);
    json_t *status = control_ask(epd_daemon.control_path, CONTROL_STATUS, NULL);
    ck_assert_int_ge(control_number(status, "generation"), N_KILLS);
    ck_assert(strstr(json_string_value(json_object_get(status, "last_exit")), "signal 9") != NULL);
    json_decref(status);
}
END_TEST

START_TEST(a_restart_faster_than_any_timer_is_noticed_by_the_boot_id)
{
    struct epd_open_options options = {.size = sizeof(options), .socket_path = epd_daemon.socket_path};
    struct epd_client_info old = {.size = sizeof(old)}, now = {.size = sizeof(now)};
    struct epd_client *client;
    ck_assert_int_eq(epd_open(&options, &client), EPD_OK);
    ck_assert_int_eq(epd_client_info(client, &old), EPD_OK);
    for (int n = 0; n < 5; n++) {
        pid_t worker = daemon_worker(&epd_daemon);
        ck_assert_int_gt(worker, 0);
        kill(worker, SIGKILL);
        (void)daemon_wait_worker(&epd_daemon, worker);
        enum epd_status status =
            EPD_OK; /* the watcher may need a moment, but nobody has to wait for a timer */
        for (int i = 0; i < 5000 && status == EPD_OK; i++) {
            char *text = NULL;
            status = epd_stats(client, &text);
            epd_free(status == EPD_OK ? text : NULL);
            sleep_ms(status == EPD_OK);
        }
        ck_assert_int_eq(status, EPD_RESTARTED);
        ck_assert_int_eq(epd_reconnect(client, RECOVER_MS), EPD_OK);
        ck_assert_int_eq(epd_client_info(client, &now), EPD_OK);
        ck_assert_int_ne(memcmp(old.boot_id, now.boot_id, sizeof old.boot_id), 0);
        ck_assert_uint_gt(now.epoch, old.epoch);
        old = now;
    }
    epd_close(client);
}
END_TEST

/* Ids of the worker before: told apart from ids that never were. */
START_TEST(ids_of_an_earlier_worker_are_called_stale)
{
    static struct wire wire;
    wire_open(&wire, epd_daemon.socket_path);
    const uint64_t group = wire_join_alone(&wire, "stale");
    struct message alloc = wire_alloc_message(group, 4096);
    ck_assert_int_eq(wire_call(&wire, &alloc, -1), EPD_OK);
    const uint64_t buffer = wire.reply.reply_buffer.buffer_id;
    wire_close(&wire);
    pid_t worker = daemon_worker(&epd_daemon);
    ck_assert_int_gt(worker, 0);
    kill(worker, SIGKILL);
    (void)daemon_wait_worker(&epd_daemon, worker);
    wire_open(&wire, epd_daemon.socket_path);
    struct message release = wire_id_message(MESSAGE_BUFFER_RELEASE, buffer);
    ck_assert_int_eq(wire_call(&wire, &release, -1), EPD_STALE_EPOCH);
    alloc = wire_alloc_message(group, 4096);
    ck_assert_int_eq(wire_call(&wire, &alloc, -1), EPD_STALE_EPOCH);
    wire_close(&wire);
}
END_TEST

/* ---- a worker that cannot live ---- */

static void fill_paths(struct daemon_process *daemon)
{
    snprintf(daemon->directory, sizeof(daemon->directory), "/tmp/epd-fault-XXXXXX");
    ck_assert_ptr_nonnull(mkdtemp(daemon->directory));
    snprintf(daemon->socket_path, sizeof(daemon->socket_path), "%s/epd.sock", daemon->directory);
    snprintf(daemon->control_path, sizeof(daemon->control_path), "%s/control.sock", daemon->directory);
    snprintf(daemon->log_path, sizeof(daemon->log_path), "%s/log", daemon->directory);
}

static void remove_paths(const struct daemon_process *daemon)
{
    char command[128];
    snprintf(command, sizeof command, "rm -r %s", daemon->directory);
    ck_assert_int_eq(system(command), 0);
}

/* Kills every worker that it sees until the supervisor has gone. */
START_TEST(a_worker_that_always_dies_is_restarted_with_backoff_and_given_up_at_the_limit)
{
    struct daemon_process d;
    fill_paths(&d);
    const char *const arguments[] = {"--backend",
                                     "host",
                                     "--socket",
                                     d.socket_path,
                                     "--control-socket",
                                     d.control_path,
                                     "--restart-first",
                                     "20ms",
                                     "--restart-max",
                                     "80ms",
                                     "--restart-limit",
                                     "5",
                                     NULL};
    const double begin = now_ms();
    d.pid = spawn_epd(arguments, d.log_path);
    int code = -1, status;
    for (int waited = 0; waited < 60000; waited++) {
        pid_t worker = daemon_worker(&d);
        if (worker > 0)
            kill(worker, SIGKILL);
        if (waitpid(d.pid, &status, WNOHANG) == d.pid) {
            code = WEXITSTATUS(status);
            break;
        }
        sleep_ms(1);
    }
    ck_assert_int_eq(code, EXIT_GAVE_UP);
    ck_assert_int_eq(file_count(d.log_path, "worker restarts in_ms"), 4);
    ck_assert_int_eq(file_count(d.log_path, "restarts in_ms 20 failures 1"), 1);
    ck_assert_int_eq(file_count(d.log_path, "restarts in_ms 40 failures 2"), 1);
    ck_assert_int_eq(file_count(d.log_path, "restarts in_ms 80 failures 3"), 1);
    ck_assert_int_eq(file_count(d.log_path, "restarts in_ms 80 failures 4"), 1);
    ck_assert(now_ms() - begin > 20 + 40 + 80 + 80); /* it did wait */
    remove_paths(&d);
}
END_TEST

START_TEST(while_no_worker_runs_the_control_socket_says_why_and_ranks_wait)
{
    struct daemon_process d;
    fill_paths(&d);
    const char *const arguments[] = {
        "--backend",       "host", "--socket", d.socket_path, "--control-socket", d.control_path,
        "--restart-first", "3s",   NULL};
    d.pid = spawn_epd(arguments, d.log_path);
    pid_t worker = daemon_wait_worker(&d, 0);
    ck_assert(file_wait(d.log_path, "worker ready", 20000));
    ck_assert_int_gt(worker, 0);
    kill(worker, SIGKILL);
    ck_assert(file_wait(d.log_path, "worker restarts in_ms", 5000));
    json_t *status = control_ask(d.control_path, CONTROL_STATUS, NULL);
    ck_assert_str_eq(json_string_value(json_object_get(status, "worker")), "waiting");
    ck_assert_int_eq(control_number(status, "failures"), 1);
    ck_assert_int_gt(control_number(status, "restart_in_ms"), 0);
    ck_assert(strstr(json_string_value(json_object_get(status, "last_exit")), "signal 9") != NULL);
    json_decref(status);
    ck_assert_ptr_null(control_ask(d.control_path, CONTROL_STATS, NULL));
    /* a rank that comes now is served by the next worker */
    struct epd_open_options options = {
        .size = sizeof(options), .socket_path = d.socket_path, .timeout_ms = RECOVER_MS};
    struct epd_client *client;
    ck_assert_int_eq(epd_open(&options, &client), EPD_OK);
    epd_close(client);
    kill(d.pid, SIGTERM);
    ck_assert_int_eq(spawn_wait(d.pid, 20000), 0);
    remove_paths(&d);
}
END_TEST

START_TEST(a_worker_that_cannot_run_with_its_configuration_is_not_restarted)
{
    struct daemon_process d;
    fill_paths(&d);
    const char *const arguments[] = {"--backend",        "cuda",         "--socket", d.socket_path,
                                     "--control-socket", d.control_path, NULL};
    int code = spawn_wait(spawn_epd(arguments, d.log_path), 20000);
    ck_assert_int_eq(code, EXIT_CONFIG);
    ck_assert(file_contains(d.log_path, "backend cuda cannot run here"));
    ck_assert(!file_contains(d.log_path, "restarts in_ms"));
    remove_paths(&d);
}
END_TEST

/* Number of steps in the first dump that the daemon's directory holds; -1: there is none that is whole. */
static int steps_in_dump(const struct daemon_process *daemon)
{
    char pattern[160];
    glob_t found;
    snprintf(pattern, sizeof pattern, "%s/epd-dump-%d-*.json", daemon->directory, (int)daemon->pid);
    json_t *dump = glob(pattern, 0, NULL, &found) == 0 ? json_load_file(found.gl_pathv[0], 0, NULL) : NULL;
    const json_t *ops = json_object_get(dump, "ops");
    const int n = ops ? (int)json_array_size(ops) : -1;
    json_decref(dump);
    globfree(&found);
    return n;
}

/* By the supervisor, beside its work; the worker could not. */
START_TEST(what_a_killed_worker_did_last_is_written_down)
{
    static struct wire wire;
    wire_open(&wire, epd_daemon.socket_path);
    struct message plan = wire_barrier_message(wire_join_alone(&wire, "recorded"));
    ck_assert_int_eq(wire_call(&wire, &plan, -1), EPD_OK);
    const struct message_reply_plan reply = wire.reply.reply_plan;
    ck_assert_int_eq(wire_launch(&wire, &reply, 1), 0);
    ck_assert_int_eq(wire_done(&wire, &reply), EPD_OK);
    ck_assert_int_eq(steps_in_dump(&epd_daemon), -1);
    kill(daemon_worker(&epd_daemon), SIGKILL);
    int n = -1;
    for (int waited = 0; (n = steps_in_dump(&epd_daemon)) < 0 && waited < RECOVER_MS; waited += 5)
        sleep_ms(5);
    ck_assert_int_eq(n, 1);
    ck_assert(file_wait(epd_daemon.log_path, "because worker ended by signal 9", RECOVER_MS));
    wire_close(&wire);
}
END_TEST

/* The end of the first worker has its own file, also when the next worker writes one. */
START_TEST(records_of_one_worker_after_the_other_are_all_kept)
{
    static struct wire wire, peer;
    for (int worker = 1; worker <= 2; worker++) {
        char pattern[160];
        glob_t found;
        const pid_t pid = daemon_worker(&epd_daemon);
        wire_open(&wire, epd_daemon.socket_path);
        wire_open(&peer, epd_daemon.socket_path);
        struct message join[] = {wire_join_message("missed", 2, 0), wire_join_message("missed", 2, 1)};
        ck_assert_int_eq(wire_send(&wire, &join[0], -1), 0);
        ck_assert_int_eq(wire_call(&peer, &join[1], -1), EPD_OK);
        ck_assert_int_eq(wire_answer(&wire), EPD_OK);
        struct message plan = wire_barrier_message(peer.reply.reply_group.group_id);
        struct message same = plan;
        ck_assert_int_eq(wire_send(&wire, &plan, -1), 0);
        ck_assert_int_eq(wire_call(&peer, &same, -1), EPD_OK);
        ck_assert_int_eq(wire_answer(&wire), EPD_OK);
        const struct message_reply_plan reply = wire.reply.reply_plan;
        ck_assert_int_eq(wire_launch(&wire, &reply, 1), 0);
        ck_assert_int_eq(wire_done(&wire, &reply), EPD_TIMEOUT); /* its peer does not come: the first dump */
        snprintf(pattern, sizeof pattern, "%s/epd-dump-%d-*Z-%d-1.json", epd_daemon.directory,
                 (int)epd_daemon.pid, worker);
        for (int waited = 0; glob(pattern, 0, NULL, &found) != 0; waited += 5, sleep_ms(5))
            ck_assert_msg(waited < RECOVER_MS, "no %s", pattern);
        globfree(&found);
        kill(pid, SIGKILL);
        snprintf(pattern, sizeof pattern, "%s/epd-dump-%d-*Z-%d-end.json", epd_daemon.directory,
                 (int)epd_daemon.pid, worker);
        for (int waited = 0; glob(pattern, 0, NULL, &found) != 0; waited += 5, sleep_ms(5))
            ck_assert_msg(waited < RECOVER_MS, "no %s", pattern);
        globfree(&found);
        (void)daemon_wait_worker(&epd_daemon, pid);
        wire_close(&wire);
        wire_close(&peer);
    }
    char pattern[160];
    glob_t found;
    snprintf(pattern, sizeof pattern, "%s/epd-dump-*.json", epd_daemon.directory);
    ck_assert_int_eq(glob(pattern, 0, NULL, &found), 0);
    ck_assert_uint_eq(found.gl_pathc, 4);
    globfree(&found);
}
END_TEST

int main(void)
{
    const TTest *const tests[] = {
        a_worker_killed_in_flight_again_and_again_is_replaced_and_the_ranks_go_on_by_themselves,
        a_restart_faster_than_any_timer_is_noticed_by_the_boot_id,
        ids_of_an_earlier_worker_are_called_stale,
        a_worker_that_always_dies_is_restarted_with_backoff_and_given_up_at_the_limit,
        while_no_worker_runs_the_control_socket_says_why_and_ranks_wait,
        a_worker_that_cannot_run_with_its_configuration_is_not_restarted,
        what_a_killed_worker_did_last_is_written_down,
        records_of_one_worker_after_the_other_are_all_kept,
    };
    return suite_run("worker", tests, SUITE_COUNT(tests), start, stop);
}
