/* The supervisor: socket rules, one daemon per path, restarts, signals, activation. With the real epd. */
#include <fcntl.h>
#include <jansson.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include "daemon/endpoint.h"
#include "daemon/inherited.h"
#include "tests/unit/daemon/epd_process.h"
#include "tests/unit/daemon/raw_client.h"
#include "tests/unit/daemon/suite.h"

static struct epd_process epd;
static struct endpoint endpoint;
static struct epd_error error;

static void expect_refused(enum epd_status status, const char *part)
{
    ck_assert_int_eq(endpoint_open(&endpoint, epd.socket, 0660, "", &error), status);
    ck_assert_msg(strstr(error.text, part) != NULL, "got '%s', want '%s' in it", error.text, part);
}

START_TEST(socket_has_its_mode_and_goes_with_the_daemon)
{
    struct stat info;
    epd_prepare(&epd);
    ck_assert_int_eq(endpoint_open(&endpoint, epd.socket, 0640, "", &error), EPD_OK);
    ck_assert_int_eq(stat(epd.socket, &info), 0);
    ck_assert(S_ISSOCK(info.st_mode));
    ck_assert_uint_eq(info.st_mode & 07777, 0640);
    endpoint_close(&endpoint);
    ck_assert_int_ne(stat(epd.socket, &info), 0);
    endpoint_close(&endpoint);
    epd_clean(&epd);
}
END_TEST

START_TEST(stale_socket_and_lock_are_replaced)
{
    epd_prepare(&epd);
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    strcpy(address.sun_path, epd.socket);
    int fd = socket(AF_UNIX, SOCK_SEQPACKET, 0);
    ck_assert_int_eq(bind(fd, (struct sockaddr *)&address, sizeof(address)), 0);
    close(fd); /* as after a crash: the file stays */
    char lock[128];
    snprintf(lock, sizeof(lock), "%s.lock", epd.socket);
    close(open(lock, O_CREAT | O_WRONLY, 0600));
    ck_assert_msg(endpoint_open(&endpoint, epd.socket, 0660, "", &error) == EPD_OK, "%s", error.text);
    endpoint_close(&endpoint);
    epd_clean(&epd);
}
END_TEST

START_TEST(second_daemon_is_refused_and_the_first_unharmed)
{
    epd_start(&epd, NULL);
    struct epd_process second = epd;
    epd_spawn(&second, NULL);
    ck_assert_int_eq(epd_wait(&second), 1);
    char pid[32];
    snprintf(pid, sizeof(pid), "pid %d", (int)epd.pid);
    expect_refused(EPD_IN_USE, pid);
    ck_assert_int_gt(epd_status_number(&epd, "pid"), 0);
    epd_stop(&epd);
}
END_TEST

START_TEST(unsafe_places_are_refused)
{
    char lock[128];
    epd_prepare(&epd);
    chmod(epd.directory, 0777);
    expect_refused(EPD_PERMISSION, "lets others write");
    chmod(epd.directory, 01777);
    expect_refused(EPD_PERMISSION, "lets others write");
    chmod(epd.directory, 0700);
    snprintf(lock, sizeof(lock), "%s.lock", epd.socket);
    ck_assert_int_eq(symlink("/etc/passwd", lock), 0);
    expect_refused(EPD_PERMISSION, "is a symbolic link");
    unlink(lock);
    ck_assert_int_eq(symlink("elsewhere", epd.socket), 0);
    expect_refused(EPD_INVALID_ARGUMENT, "not a socket");
    unlink(epd.socket);
    close(open(epd.socket, O_CREAT | O_WRONLY, 0600));
    expect_refused(EPD_INVALID_ARGUMENT, "not a socket");
    unlink(epd.socket);
    ck_assert_int_eq(endpoint_open(&endpoint, epd.socket, 0660, "no-such-group", &error),
                     EPD_INVALID_ARGUMENT);
    epd_clean(&epd);
}
END_TEST

START_TEST(path_of_108_bytes_is_refused)
{
    char path[160];
    epd_prepare(&epd);
    memset(path, 'x', sizeof(path));
    memcpy(path, epd.directory, strlen(epd.directory));
    path[strlen(epd.directory)] = '/';
    path[108] = 0;
    ck_assert_int_eq(endpoint_open(&endpoint, path, 0660, "", &error), EPD_INVALID_ARGUMENT);
    ck_assert_ptr_nonnull(strstr(error.text, "108 bytes, at most 107"));
    path[107] = 0;
    ck_assert_msg(endpoint_open(&endpoint, path, 0660, "", &error) == EPD_OK, "%s", error.text);
    endpoint_close(&endpoint);
    epd_clean(&epd);
}
END_TEST

START_TEST(missing_directory_is_made)
{
    struct stat info;
    epd_prepare(&epd);
    snprintf(epd.socket, sizeof(epd.socket), "%s/run/epd.sock", epd.directory);
    ck_assert_int_eq(endpoint_open(&endpoint, epd.socket, 0660, "", &error), EPD_OK);
    ck_assert_int_eq(stat(epd.socket, &info), 0);
    endpoint_close(&endpoint);
    epd_clean(&epd);
}
END_TEST

START_TEST(killed_worker_is_replaced_and_ids_do_not_come_back)
{
    static struct raw_client before, after;
    epd_start(&epd, NULL);
    raw_open(&before, epd.socket);
    const uint64_t group_id = raw_join_all((struct raw_client *const[]){&before}, 1, "g");
    const long worker = epd_status_number(&epd, "pid");
    ck_assert_int_eq(kill((pid_t)worker, SIGKILL), 0);
    char byte;
    ck_assert_int_le(recv(before.fd, &byte, 1, 0), 0);
    raw_open(&after, epd.socket);
    ck_assert_mem_ne(before.boot_id, after.boot_id, EPD_BOOT_ID_BYTES);
    ck_assert_uint_gt(after.epoch, before.epoch);
    raw_send(&after, raw_barrier(group_id), -1);
    raw_expect_error(&after, EPD_STALE_EPOCH, "earlier worker");
    ck_assert_int_eq(epd_status_number(&epd, "generation"), 1);
    raw_close(&before);
    raw_close(&after);
    epd_stop(&epd);
}
END_TEST

START_TEST(killed_supervisor_takes_the_worker_with_it)
{
    epd_start(&epd, NULL);
    const pid_t worker = (pid_t)epd_status_number(&epd, "pid");
    kill(epd.pid, SIGKILL);
    ck_assert_int_eq(epd_wait(&epd), 128 + SIGKILL);
    for (int waited = 0; kill(worker, 0) == 0; waited++) {
        char path[64], state[256] = "";
        snprintf(path, sizeof(path), "/proc/%d/stat", (int)worker);
        FILE *file = fopen(path, "r");
        if (!file || !fgets(state, sizeof(state), file) ||
            strstr(state, ") Z")) { /* dead; its new parent may be slow */
            if (file)
                fclose(file);
            break;
        }
        fclose(file);
        ck_assert_int_lt(waited, 1000);
        usleep(1000);
    }
    usleep(200000); /* a dead main thread may leave others dying, which still hold the socket */
    struct epd_process again = epd; /* and its leftovers are no obstacle */
    epd_spawn(&again, NULL);
    ck_assert_int_gt(epd_status_number(&again, "pid"), 0);
    epd_stop(&again);
}
END_TEST

START_TEST(worker_that_cannot_run_ends_epd_with_2)
{
    static const char *const flags[] = {"--gemm-engine", "no-such-engine", NULL};
    epd_prepare(&epd);
    epd_spawn(&epd, flags);
    const int code = epd_wait(&epd);
    ck_assert_msg(code == 2, "code %d", code);
    epd_clean(&epd);
}
END_TEST

START_TEST(hup_reloads_and_a_broken_file_changes_nothing)
{
    char path[128];
    epd_prepare(&epd);
    snprintf(path, sizeof(path), "%s/epd.conf", epd.directory);
    const char *const flags[] = {"--config", path, NULL};
    const char *const texts[] = {"[timers]\nstuck = 30s\n", "[timers]\nstuck = 40s\n",
                                 "[timers]\nstuck = never\n"};
    const char *const want[] = {"30s", "40s", "40s"};
    for (int i = 0; i < 3; i++) {
        FILE *file = fopen(path, "w");
        fputs(texts[i], file);
        fclose(file);
        if (i == 0)
            epd_spawn(&epd, flags);
        else
            kill(epd.pid, SIGHUP);
        usleep(i ? 200000 : 0);
        char *text = raw_control(epd.control, CONTROL_STATUS), line[64];
        snprintf(line, sizeof(line), "\"key\":\"stuck\",\"value\":\"%s\"", want[i]);
        ck_assert_msg(strstr(text, line) != NULL, "round %d: %s", i, text);
        free(text);
    }
    epd_stop(&epd);
}
END_TEST

static int listen_at(const char *path)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    strcpy(address.sun_path, path);
    int fd = socket(AF_UNIX, SOCK_SEQPACKET, 0);
    ck_assert_int_eq(bind(fd, (struct sockaddr *)&address, sizeof(address)), 0);
    ck_assert_int_eq(listen(fd, 8), 0);
    return fd;
}

START_TEST(sockets_from_the_service_manager_are_used_and_left)
{
    struct stat info;
    epd_prepare(&epd);
    const int rank = listen_at(epd.socket), control = listen_at(epd.control);
    epd.pid = fork();
    if (epd.pid == 0) {
        char pid[24];
        snprintf(pid, sizeof(pid), "%d", (int)getpid());
        dup2(rank, 20);
        dup2(control, 21);
        dup2(20, 3);
        dup2(21, 4);
        setenv("LISTEN_PID", pid, 1);
        setenv("LISTEN_FDS", "2", 1);
        setenv("LISTEN_FDNAMES", "epd:epd-control", 1);
        execl(EPD_BINARY, "epd", "--backend", "host", "--socket", epd.socket, "--control-socket", epd.control,
              NULL);
        _exit(127);
    }
    static struct raw_client client;
    raw_open(&client, epd.socket);
    raw_close(&client);
    ck_assert_int_gt(epd_status_number(&epd, "pid"), 0);
    kill(epd.pid, SIGTERM);
    ck_assert_int_eq(epd_wait(&epd), 0);
    ck_assert_int_eq(stat(epd.socket, &info), 0); /* not ours to remove */
    close(rank);
    close(control);
    epd_clean(&epd);
}
END_TEST

START_TEST(readiness_is_notified)
{
    epd_prepare(&epd);
    char path[128], text[256] = "";
    snprintf(path, sizeof(path), "%s/notify", epd.directory);
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    strcpy(address.sun_path, path);
    int fd = socket(AF_UNIX, SOCK_DGRAM, 0);
    ck_assert_int_eq(bind(fd, (struct sockaddr *)&address, sizeof(address)), 0);
    setenv("NOTIFY_SOCKET", path, 1);
    epd_spawn(&epd, NULL);
    ck_assert_int_gt(recv(fd, text, sizeof(text) - 1, 0), 0);
    ck_assert_ptr_nonnull(strstr(text, "READY=1"));
    close(fd);
    epd_stop(&epd);
}
END_TEST

/* A pipe and a socket that nobody reads, full. */
static void fill(int fd)
{
    static const char bytes[512];
    ck_assert_int_eq(fcntl(fd, F_SETFL, O_NONBLOCK), 0);
    while (write(fd, bytes, sizeof(bytes)) > 0)
        continue;
    while (write(fd, bytes, 1) > 0)
        continue;
    ck_assert_int_eq(fcntl(fd, F_SETFL, 0), 0);
}

START_TEST(a_reader_of_the_log_that_does_not_read_stops_nobody)
{
    for (int kind = 0; kind < 2; kind++) {
        int ends[2];
        const int own = dup(STDERR_FILENO);
        ck_assert_int_eq(kind ? socketpair(AF_UNIX, SOCK_STREAM, 0, ends) : pipe(ends), 0);
        fill(ends[1]);
        epd_prepare(&epd);
        dup2(ends[1], STDERR_FILENO);
        epd_spawn(&epd, NULL);
        dup2(own, STDERR_FILENO);
        ck_assert_int_gt(epd_status_number(&epd, "pid"), 0);
        epd_stop(&epd);
        close(own);
        close(ends[0]);
        close(ends[1]);
    }
}
END_TEST

START_TEST(a_service_manager_that_does_not_read_stops_nobody)
{
    epd_prepare(&epd);
    char path[128];
    snprintf(path, sizeof(path), "%s/notify", epd.directory);
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    strcpy(address.sun_path, path);
    int fd = socket(AF_UNIX, SOCK_DGRAM, 0), sender = socket(AF_UNIX, SOCK_DGRAM | SOCK_NONBLOCK, 0);
    ck_assert_int_eq(bind(fd, (struct sockaddr *)&address, sizeof(address)), 0);
    ck_assert_int_eq(connect(sender, (struct sockaddr *)&address, sizeof(address)), 0);
    while (send(sender, "X=1", 3, 0) > 0)
        continue;
    setenv("NOTIFY_SOCKET", path, 1);
    epd_spawn(&epd, NULL);
    unsetenv("NOTIFY_SOCKET");
    ck_assert_int_gt(epd_status_number(&epd, "pid"), 0);
    epd_stop(&epd);
    close(sender);
    close(fd);
}
END_TEST

/* Its worker reads nothing, and more than a socket takes is to be told to it. */
START_TEST(a_worker_that_does_not_read_does_not_stop_the_supervisor)
{
    static const char *const flags[] = {"--drain", "1ms", NULL};
    epd_start(&epd, flags);
    const pid_t worker = (pid_t)epd_status_number(&epd, "pid");
    ck_assert_int_eq(kill(worker, SIGSTOP), 0);
    for (int i = 0; i < 400; i++) {
        kill(epd.pid, SIGHUP);
        usleep(3000);
    }
    kill(epd.pid, SIGTERM);
    ck_assert_int_eq(epd_wait(&epd), 1); /* the worker has to be killed */
    epd_clean(&epd);
}
END_TEST

#ifdef EPD_FAILPOINTS
START_TEST(worker_that_fails_at_every_start_is_tried_with_backoff_then_given_up)
{
    static const char *const flags[] = {"--restart-first", "300ms", "--restart-limit", "3", NULL};
    epd_prepare(&epd);
    setenv("EPD_FAILPOINTS", "worker_start=abort", 1);
    epd_spawn(&epd, flags);
    unsetenv("EPD_FAILPOINTS");
    char *text = raw_control(epd.control, CONTROL_STATUS); /* the supervisor answers while no worker runs */
    json_t *document = json_loads(text, 0, NULL);
    ck_assert_str_eq(json_string_value(json_object_get(document, "worker")), "waiting");
    ck_assert_int_ge(json_integer_value(json_object_get(document, "failures")), 1);
    ck_assert_ptr_nonnull(strstr(json_string_value(json_object_get(document, "last_exit")), "signal 6"));
    json_decref(document);
    free(text);
    ck_assert_int_eq(epd_wait(&epd), 4);
    epd_clean(&epd);
}
END_TEST

/* Restarted with growing pauses, though it takes longer than a healthy worker has to live; and told to whoever asks. */
START_TEST(worker_that_hangs_at_its_start_is_killed_started_again_and_given_up)
{
    static const char *const flags[] = {"--start-deadline",
                                        "400ms",
                                        "--restart-first",
                                        "300ms",
                                        "--restart-healthy",
                                        "1ms",
                                        "--restart-limit",
                                        "3",
                                        NULL};
    epd_prepare(&epd);
    setenv("EPD_FAILPOINTS", "worker_open=sleep:60000", 1);
    epd_spawn(&epd, flags);
    unsetenv("EPD_FAILPOINTS");
    char *text = raw_control(epd.control, CONTROL_STATUS);
    json_t *document = json_loads(text, 0, NULL);
    ck_assert_int_ge(json_integer_value(json_object_get(document, "generation")), 1);
    ck_assert_msg(strstr(json_string_value(json_object_get(document, "last_exit")),
                         "did not serve within 400 ms, killed") != NULL,
                  "%s", text);
    json_decref(document);
    free(text);
    ck_assert_int_eq(epd_wait(&epd), 4);
    epd_clean(&epd);
}
END_TEST

/* It has served nobody, so there is nothing to drain and nothing is lost. */
START_TEST(worker_that_hangs_at_its_start_is_not_waited_for_when_epd_is_to_end)
{
    epd_prepare(&epd);
    setenv("EPD_FAILPOINTS", "worker_open=sleep:60000", 1);
    epd_spawn(&epd, NULL);
    unsetenv("EPD_FAILPOINTS");
    for (int waited = 0; access(epd.control, F_OK) != 0; waited++) { /* from then on it hears signals */
        ck_assert_int_lt(waited, 10000);
        usleep(1000);
    }
    usleep(300000);
    kill(epd.pid, SIGTERM);
    ck_assert_int_eq(epd_wait(&epd), 0);
    epd_clean(&epd);
}
END_TEST
#endif

int main(void)
{
    const TTest *const tests[] = {socket_has_its_mode_and_goes_with_the_daemon,
                                  stale_socket_and_lock_are_replaced,
                                  second_daemon_is_refused_and_the_first_unharmed,
                                  unsafe_places_are_refused,
                                  path_of_108_bytes_is_refused,
                                  missing_directory_is_made,
                                  killed_worker_is_replaced_and_ids_do_not_come_back,
                                  killed_supervisor_takes_the_worker_with_it,
                                  worker_that_cannot_run_ends_epd_with_2,
                                  hup_reloads_and_a_broken_file_changes_nothing,
                                  sockets_from_the_service_manager_are_used_and_left,
                                  readiness_is_notified,
                                  a_reader_of_the_log_that_does_not_read_stops_nobody,
                                  a_service_manager_that_does_not_read_stops_nobody,
                                  a_worker_that_does_not_read_does_not_stop_the_supervisor,
#ifdef EPD_FAILPOINTS
                                  worker_that_fails_at_every_start_is_tried_with_backoff_then_given_up,
                                  worker_that_hangs_at_its_start_is_killed_started_again_and_given_up,
                                  worker_that_hangs_at_its_start_is_not_waited_for_when_epd_is_to_end,
#endif
                                  NULL};
    return suite_run("daemon_supervisor", tests, NULL, NULL);
}
