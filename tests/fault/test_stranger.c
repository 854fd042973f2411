/* Another uid at the door. Needs root to become somebody else; elsewhere it is skipped (exit code 77). */
#include <check.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "daemon/log.h"
#include "tests/fault/baseline.h"
#include "tests/fault/bystander.h"
#include "tests/fault/control.h"
#include "tests/fault/spawn.h"
#include "tests/fault/suite.h"
#include "tests/fault/wire.h"

#define STRANGER_UID 65534
#define N_KNOCKS     50
#define SKIPPED      77
#define MAX_LINES    (LOG_BURST + 1)

static struct daemon_process epd_daemon;

/* Runs a function as another user; its exit code. */
static int as_stranger(void (*function)(void))
{
    pid_t pid = fork();
    if (pid == 0) {
        if (setgid(STRANGER_UID) != 0 || setuid(STRANGER_UID) != 0)
            _exit(1);
        function();
        _exit(0);
    }
    return spawn_wait(pid, 30000);
}

static void knock(void)
{
    static struct wire wire;
    for (int n = 0; n < N_KNOCKS; n++) {
        if (wire_connect(&wire, epd_daemon.socket_path) != 0)
            _exit(2);
        if (wire_hello(&wire) != EPD_PERMISSION || !strstr(wire.why, "65534"))
            _exit(3);
        wire_close(&wire);
    }
}

static void knock_through_the_library(void)
{
    struct epd_open_options options = {.size = sizeof(options), .socket_path = epd_daemon.socket_path};
    struct epd_client *client;
    if (epd_open(&options, &client) != EPD_PERMISSION)
        _exit(2);
}

START_TEST(a_uid_that_is_not_allowed_is_told_so_counted_and_logged_a_few_times)
{
    struct bystander bystander;
    struct baseline before;
    daemon_start(&epd_daemon, 2, (const char *const[]){"--socket-mode", "0666", "--allow-uids", "0", NULL});
    ck_assert_int_eq(chmod(epd_daemon.directory, 0711), 0);
    bystander_start(&bystander, epd_daemon.socket_path);
    baseline_take(&before, &epd_daemon);
    ck_assert_int_eq(as_stranger(knock), 0);
    ck_assert_int_eq(as_stranger(knock_through_the_library), 0);
    ck_assert_int_ge(baseline_wait(&before, &epd_daemon), 0);
    json_t *stats = control_ask(epd_daemon.control_path, CONTROL_STATS, NULL);
    ck_assert_int_eq(control_number(stats, "sessions.refused"), N_KNOCKS + 1);
    ck_assert_int_gt(control_number(stats, "log_suppressed"), 0);
    json_decref(stats);
    const int n_lines = file_count(epd_daemon.log_path, "connection refused");
    ck_assert_int_ge(n_lines, 1);
    ck_assert_int_le(n_lines, MAX_LINES);
    bystander_stop(&bystander);
    daemon_stop(&epd_daemon);
}
END_TEST

START_TEST(the_mode_of_the_socket_keeps_strangers_out_by_default)
{
    daemon_start(&epd_daemon, 2, NULL);
    ck_assert_int_eq(chmod(epd_daemon.directory, 0711), 0);
    ck_assert_int_eq(as_stranger(knock_through_the_library), 0);
    daemon_stop(&epd_daemon);
}
END_TEST

/* Groups of one name of two users are two groups, and nobody can take part in another user's. */
static void join_as_stranger(void)
{
    static struct wire wire;
    wire_open(&wire, epd_daemon.socket_path);
    struct message join = wire_join_message("bystander", 1, 0);
    if (wire_call(&wire, &join, -1) != EPD_OK)
        _exit(2);
    wire_close(&wire);
}

/* Sees its own group, and none of the other uid's. */
static void look_as_stranger(void)
{
    static struct wire wire;
    struct message stats = {.kind = MESSAGE_STATS};
    if (wire_connect(&wire, epd_daemon.socket_path) != 0 || wire_hello(&wire) != EPD_OK)
        _exit(2);
    (void)wire_join_alone(&wire, "own");
    if (wire_call(&wire, &stats, -1) != EPD_OK || lseek(wire.reply_fd, 0, SEEK_SET) != 0)
        _exit(3);
    json_t *document = json_loadfd(wire.reply_fd, 0, NULL);
    const json_t *groups = json_object_get(document, "groups");
    if (json_array_size(groups) != 1)
        _exit(4);
    const char *name = json_string_value(json_object_get(json_array_get(groups, 0), "name"));
    if (!name || strcmp(name, "own") != 0)
        _exit(5);
    json_decref(document);
    wire_close(&wire);
}

START_TEST(a_rank_is_told_nothing_of_the_groups_of_another_uid)
{
    struct bystander bystander;
    daemon_start(&epd_daemon, 2, (const char *const[]){"--socket-mode", "0666", NULL});
    ck_assert_int_eq(chmod(epd_daemon.directory, 0711), 0);
    bystander_start(&bystander, epd_daemon.socket_path);
    ck_assert_int_eq(as_stranger(look_as_stranger), 0);
    bystander_stop(&bystander);
    daemon_stop(&epd_daemon);
}
END_TEST

START_TEST(a_group_name_belongs_to_its_uid)
{
    struct bystander bystander;
    daemon_start(&epd_daemon, 2, (const char *const[]){"--socket-mode", "0666", NULL});
    ck_assert_int_eq(chmod(epd_daemon.directory, 0711), 0);
    bystander_start(&bystander, epd_daemon.socket_path);
    ck_assert_int_eq(as_stranger(join_as_stranger), 0);
    bystander_stop(&bystander);
    daemon_stop(&epd_daemon);
}
END_TEST

int main(void)
{
    const TTest *const tests[] = {
        a_uid_that_is_not_allowed_is_told_so_counted_and_logged_a_few_times,
        the_mode_of_the_socket_keeps_strangers_out_by_default,
        a_group_name_belongs_to_its_uid,
        a_rank_is_told_nothing_of_the_groups_of_another_uid,
    };
    if (geteuid() != 0) {
        puts("skipped: only root can become another user");
        return SKIPPED;
    }
    return suite_run("stranger", tests, SUITE_COUNT(tests), NULL, NULL);
}
