/* Another uid at the door. Needs root to become somebody else; elsewhere it is skipped (exit code 77). */
#include <check.h>
#include <fcntl.h>
#include <signal.h>
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
#define OTHER_UID    65533
#define N_KNOCKS     50
#define SKIPPED      77
#define MAX_LINES    (LOG_BURST + 1)

static struct daemon_process epd_daemon;

/* Runs a function as another user; its exit code. */
static int as_user(uid_t uid, void (*function)(void))
{
    pid_t pid = fork();
    if (pid == 0) {
        if (setgid(uid) != 0 || setuid(uid) != 0)
            _exit(1);
        function();
        _exit(0);
    }
    return spawn_wait(pid, 30000);
}

static int as_stranger(void (*function)(void))
{
    return as_user(STRANGER_UID, function);
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

/* The place that another uid's group of the same name waits for, and one rank too many for it. */
static void be_refused_as_stranger(void)
{
    static struct wire wire;
    wire_open(&wire, epd_daemon.socket_path);
    (void)wire_join_alone(&wire, "own");
    struct message join = wire_join_message("waiting", 2, 1);
    if (wire_call(&wire, &join, -1) != EPD_QUOTA)
        _exit(2);
    wire_close(&wire);
}

/* Its own uid's rank that is refused ends the join of those that wait for it; another uid's does not. */
START_TEST(a_rank_that_is_refused_ends_the_join_of_its_own_uid_only)
{
    static struct wire wire, second;
    daemon_start(&epd_daemon, 2,
                 (const char *const[]){"--socket-mode", "0666", "--groups-per-session", "1", NULL});
    ck_assert_int_eq(chmod(epd_daemon.directory, 0711), 0);
    wire_open(&wire, epd_daemon.socket_path);
    struct message join = wire_join_message("waiting", 2, 0);
    ck_assert_int_eq(wire_send(&wire, &join, -1), 0);
    ck_assert_int_eq(as_stranger(be_refused_as_stranger), 0);
    ck_assert_int_eq(wire_receive(&wire, 100), WIRE_NOTHING);
    wire_open(&second, epd_daemon.socket_path);
    (void)wire_join_alone(&second, "own");
    struct message refused = wire_join_message("waiting", 2, 1);
    ck_assert_int_eq(wire_call(&second, &refused, -1), EPD_QUOTA);
    ck_assert_int_eq(wire_answer(&wire), EPD_QUOTA);
    ck_assert_msg(strstr(wire.why, "group waiting: rank 1 was refused: groups of this session") != NULL, "%s",
                  wire.why);
    wire_close(&second);
    wire_close(&wire);
    daemon_stop(&epd_daemon);
}
END_TEST

#define N_PLACES 64  /* of the control socket */
#define N_UNREAD 512 /* more than a socket takes, fewer than close a session that does not read */

static void fill_places(struct wire *places)
{
    for (int n = 0; n < N_PLACES; n++)
        if (wire_connect(&places[n], epd_daemon.control_path) != 0)
            _exit(2);
}

/* Asks for more than it reads, so that the daemon has something to say on every place. */
static void hold_places_busy(void)
{
    struct wire *places = calloc(N_PLACES, sizeof *places);
    struct message evict = {.kind = MESSAGE_CONTROL, .control = {.verb = CONTROL_EVICT, .session_id = 1}};
    fill_places(places);
    for (int n = 0; n < N_PLACES; n++)
        for (int i = 0; i < N_UNREAD; i++)
            (void)wire_send(&places[n], &evict, -1);
    if (creat("busy", 0600) < 0)
        _exit(3);
    sleep_ms(60000);
}

static void ask_once(void)
{
    json_t *status = control_ask(epd_daemon.control_path, CONTROL_STATUS, NULL);
    if (!status)
        _exit(2);
    json_decref(status);
}

START_TEST(idle_control_sessions_make_room_for_who_comes)
{
    struct wire *places = calloc(N_PLACES, sizeof *places);
    daemon_start(&epd_daemon, 1, (const char *const[]){"--control-mode", "0666", NULL});
    ck_assert_int_eq(chmod(epd_daemon.directory, 0711), 0);
    fill_places(places);
    struct message status = {.kind = MESSAGE_CONTROL, .control = {.verb = CONTROL_STATUS}};
    ck_assert_int_eq(wire_call(&places[0], &status, -1),
                     EPD_OK); /* now it is not the one that was idle for longest */
    ck_assert_int_eq(as_stranger(ask_once), 0);
    ck_assert_int_eq(wire_wait_end(&places[1]), EPD_QUOTA);
    ck_assert(strstr(places[1].why, "its place on the control socket was needed") != NULL);
    wire_close(&places[1]);
    ck_assert_int_eq(wire_connect(&places[1], epd_daemon.control_path), 0); /* the place that it has left */
    ask_once();
    ck_assert_int_eq(wire_wait_end(&places[2]), EPD_QUOTA);
    ck_assert_int_eq(wire_call(&places[0], &status, -1), EPD_OK);
    for (int n = 0; n < N_PLACES; n++)
        wire_close(&places[n]);
    free(places);
    daemon_stop(&epd_daemon);
}
END_TEST

/* One that does hold all of them in earnest keeps nobody out. */
START_TEST(who_holds_all_places_of_the_control_socket_keeps_nobody_out)
{
    daemon_start(&epd_daemon, 1, (const char *const[]){"--control-mode", "0666", NULL});
    ck_assert_int_eq(chmod(epd_daemon.directory, 0777), 0);
    pid_t holder = fork();
    if (holder == 0) {
        if (chdir(epd_daemon.directory) != 0 || setgid(STRANGER_UID) != 0 || setuid(STRANGER_UID) != 0)
            _exit(1);
        hold_places_busy();
        _exit(0);
    }
    char busy[128];
    snprintf(busy, sizeof busy, "%s/busy", epd_daemon.directory);
    for (int waited = 0; access(busy, F_OK) != 0; waited++, sleep_ms(1))
        ck_assert_int_lt(waited, 30000);
    ck_assert_int_eq(as_user(OTHER_UID, ask_once), 0); /* also one that is nobody special */
    for (int n = 0; n < 3; n++)
        ask_once();
    static struct wire place; /* and none is free */
    ck_assert_int_eq(wire_connect(&place, epd_daemon.control_path), 0);
    ck_assert_int_ne(as_stranger(ask_once), 0);
    ask_once();
    wire_close(&place);
    kill(holder, SIGKILL);
    (void)spawn_wait(holder, 30000);
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
        a_rank_that_is_refused_ends_the_join_of_its_own_uid_only,
        idle_control_sessions_make_room_for_who_comes,
        who_holds_all_places_of_the_control_socket_keeps_nobody_out,
    };
    if (geteuid() != 0) {
        puts("skipped: only root can become another user");
        return SKIPPED;
    }
    return suite_run("stranger", tests, SUITE_COUNT(tests), NULL, NULL);
}
