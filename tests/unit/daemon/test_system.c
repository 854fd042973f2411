/* What the daemon has of the system, part by part: log lines, recorder and its files, processes, ports. */
#include <fcntl.h>
#include <glob.h>
#include <jansson.h>
#include <netinet/in.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <termios.h>
#include <unistd.h>

#include "daemon/dump_file.h"
#include "daemon/log.h"
#include "daemon/peer.h"
#include "daemon/process.h"
#include "daemon/recorder.h"
#include "daemon/tcp_port.h"
#include "tests/unit/daemon/suite.h"

static struct epd_error error;

static int count_lines(int fd)
{
    char text[65536];
    ssize_t n = pread(fd, text, sizeof(text) - 1, 0);
    int lines = 0;
    for (ssize_t i = 0; i < n; i++)
        lines += text[i] == '\n';
    return lines;
}

START_TEST(log_is_limited_per_key_and_says_what_it_left_out)
{
    char path[] = "/tmp/epd-log-XXXXXX", text[4096] = "";
    int fd = mkstemp(path);
    struct log log;
    log_init(&log, "worker", LOG_INFO, fd);
    for (int i = 0; i < 100; i++)
        (void)log_limited(&log, LOG_WARN, "a", 1000, "line %d", i);
    ck_assert_int_eq(count_lines(fd), LOG_BURST);
    ck_assert_int_eq(log_limited(&log, LOG_WARN, "b", 1000, "other key"), 1);
    ck_assert_int_eq(log_limited(&log, LOG_WARN, "a", 1000 + LOG_WINDOW_NS, "again"), 1);
    ck_assert_int_eq(count_lines(fd), LOG_BURST + 2);
    ck_assert_int_gt(pread(fd, text, sizeof(text) - 1, 0), 0);
    char part[32];
    snprintf(part, sizeof(part), "again left_out %d", 100 - LOG_BURST);
    ck_assert_ptr_nonnull(strstr(text, part));
    ck_assert_uint_eq(log.n_suppressed, 100 - LOG_BURST);
    log_write(&log, LOG_DEBUG, "below the level");
    log_write(&log, LOG_INFO, "a client's\nbytes \x1b[31m stay on one line");
    ck_assert_int_eq(count_lines(fd), LOG_BURST + 3);
    char large[2000];
    memset(large, 'x', sizeof(large) - 1);
    large[sizeof(large) - 1] = 0;
    log_write(&log, LOG_INFO, "%s", large);
    ck_assert_int_eq(count_lines(fd), LOG_BURST + 4);
    close(fd);
    log_write(&log, LOG_INFO, "nobody can read this");
    ck_assert_uint_eq(log.n_unwritten, 1);
    unlink(path);
}
END_TEST

/* The pipe is shared with others, who may fill it between a look and a write: what the log writes to must not wait, and what
 * the others write to stays as it is. */
START_TEST(a_full_pipe_makes_no_line_wait)
{
    struct log log;
    int ends[2];
    char drain[65536];
    ck_assert_int_eq(pipe(ends), 0);
    log_init(&log, "test", LOG_INFO, ends[1]);
    ck_assert_int_ge(log.copy, 0);
    ck_assert_int_ne(fcntl(log.copy, F_GETFL) & O_NONBLOCK, 0);
    ck_assert_int_eq(fcntl(ends[1], F_GETFL) & O_NONBLOCK, 0);
    log_write(&log, LOG_INFO, "first");
    memset(drain, 'x', sizeof(drain));
    while (write(log.copy, drain, 64) > 0) /* as somebody else would */
        continue;
    log_write(&log, LOG_INFO, "lost");
    ck_assert_uint_eq(log.n_unwritten, 1);
    ck_assert_int_gt(read(ends[0], drain, sizeof(drain)), 0);
    ck_assert_ptr_nonnull(memmem(drain, sizeof(drain), "first", 5));
    log_write(&log, LOG_INFO, "last");
    ck_assert_uint_eq(log.n_unwritten, 1);
    log_fini(&log);

    /* Where it belongs to another user it cannot be opened again: the write itself does not wait, or is not made. */
    log_init(&log, "test", LOG_INFO, ends[1]);
    close(log.copy);
    log.copy = -1;
    const int other = fcntl(ends[1], F_DUPFD_CLOEXEC, 0);
    ck_assert_int_eq(fcntl(other, F_SETFL, O_NONBLOCK), 0);
    while (write(other, drain, 64) > 0)
        continue;
    ck_assert_int_eq(fcntl(other, F_SETFL, 0), 0);
    alarm(10);
    for (int i = 0; i < 1000; i++)
        log_write(&log, LOG_INFO, "lost too");
    alarm(0);
    ck_assert_uint_ge(log.n_unwritten, 990);
    close(other);
    close(ends[0]);
    close(ends[1]);
}
END_TEST

/* A terminal of another user cannot be opened again either; whoever has stopped its output is not waited for. */
START_TEST(a_terminal_that_takes_nothing_makes_no_line_wait)
{
    struct log log;
    const int screen = posix_openpt(O_RDWR | O_NOCTTY | O_CLOEXEC);
    ck_assert_int_ge(screen, 0);
    ck_assert_int_eq(grantpt(screen) | unlockpt(screen), 0);
    const int terminal = open(ptsname(screen), O_RDWR | O_NOCTTY | O_CLOEXEC);
    ck_assert_int_ge(terminal, 0);
    log_init(&log, "test", LOG_INFO, terminal);
    ck_assert_int_ge(log.copy, 0);
    ck_assert_int_eq(tcflow(terminal, TCOOFF), 0);
    alarm(10);
    log_write(&log, LOG_INFO, "lost");
    ck_assert_uint_eq(log.n_unwritten, 1);
    log_fini(&log);
    log_write(&log, LOG_INFO, "lost too");
    alarm(0);
    ck_assert_uint_eq(log.n_unwritten, 2);
    close(terminal);
    close(screen);
}
END_TEST

START_TEST(a_name_is_one_word_of_a_log_line_whatever_is_in_it)
{
    struct log_word word;
    char longest[EPD_MAX_NAME_BYTES];
    ck_assert_str_eq(log_word(&word, "moe-layer.7"), "moe-layer.7");
    ck_assert_str_eq(log_word(&word, "x broken reason lies"), "x\\x20broken\\x20reason\\x20lies");
    ck_assert_str_eq(log_word(&word, "\\x20\n"), "\\x5cx20\\x0a");
    ck_assert_str_eq(log_word(&word, ""), "");
    memset(longest, ' ', sizeof(longest));
    longest[sizeof(longest) - 1] = 0;
    ck_assert_uint_eq(strlen(log_word(&word, longest)), 4 * (sizeof(longest) - 1));
}
END_TEST

START_TEST(recorder_keeps_the_newest_steps_and_names_missing_ranks)
{
    struct recorder recorder;
    int fd;
    ck_assert_int_eq(recorder_create(&fd, &error), EPD_OK);
    ck_assert_int_eq(recorder_open(&recorder, fd, &error), EPD_OK);
    recorder_clear(&recorder);
    const uint64_t first = recorder_begin(&recorder)->serial;
    for (int i = 0; i < RECORDER_N_ENTRIES; i++) {
        struct recorder_entry *entry = recorder_begin(&recorder);
        entry->group_id = 3;
        entry->ordinal = (uint64_t)i + 1;
        entry->world_size = 4;
        entry->arrived = 0xb;
        entry->op = EPD_OP_DISPATCH;
        entry->state = RECORDER_GATHERING;
    }
    ck_assert_ptr_null(recorder_find(&recorder, first));
    ck_assert_ptr_nonnull(recorder_find(&recorder, first + 1));
    json_t *ops = recorder_document(&recorder, 0);
    ck_assert_uint_eq(json_array_size(ops), RECORDER_N_ENTRIES);
    json_t *missing = json_object_get(json_array_get(ops, 5), "missing");
    ck_assert_uint_eq(json_array_size(missing), 1);
    ck_assert_int_eq(json_integer_value(json_array_get(missing, 0)), 2);
    json_decref(ops);
    recorder_close(&recorder);
    close(fd);
}
END_TEST

static uint32_t count_dumps(const char *directory)
{
    char pattern[96];
    glob_t found;
    snprintf(pattern, sizeof(pattern), "%s/epd-dump-*.json", directory);
    const uint32_t n = glob(pattern, 0, NULL, &found) == 0 ? (uint32_t)found.gl_pathc : 0;
    globfree(&found);
    return n;
}

static void remove_folder(const char *directory)
{
    char command[96];
    snprintf(command, sizeof(command), "rm -r %s", directory);
    ck_assert_int_eq(system(command), 0);
}

/* The end of one worker, and the dumps of the next. */
START_TEST(dumps_are_never_written_over_and_the_oldest_go)
{
    struct recorder recorder;
    struct config config;
    struct dump_file file, end;
    struct stat info;
    char directory[] = "/tmp/epd-unit-XXXXXX", stranger[64];
    int fd;
    ck_assert_ptr_nonnull(mkdtemp(directory));
    ck_assert_int_eq(recorder_create(&fd, &error), EPD_OK);
    ck_assert_int_eq(recorder_open(&recorder, fd, &error), EPD_OK);
    recorder_clear(&recorder);
    config_init(&config);
    snprintf(config.control_socket, sizeof(config.control_socket), "%s/epd-control.sock", directory);
    snprintf(stranger, sizeof(stranger), "%s/epd-dump-12-keep.json", directory);
    close(open(stranger, O_CREAT | O_WRONLY, 0600));
    dump_file_init(&end, &config, 1, 1, 0);
    ck_assert_msg(dump_file_write(&end, &recorder, &error) == EPD_OK, "%s", error.text);
    ck_assert_int_eq(stat(end.path, &info), 0);
    ck_assert_uint_eq(info.st_mode & 0777, 0600);
    for (uint32_t worker = 2; worker < 5; worker++)
        for (uint32_t number = 0; number < 3; number++) {
            dump_file_init(&file, &config, 1, worker, number);
            ck_assert_msg(dump_file_write(&file, &recorder, &error) == EPD_OK, "%s", error.text);
            ck_assert_int_eq(stat(file.path, &info), 0);
            if (worker == 2)
                ck_assert_int_eq(stat(end.path, &info), 0);
        }
    ck_assert_uint_eq(count_dumps(directory), DUMP_FILE_MAX + 1);
    ck_assert_int_eq(stat(stranger, &info), 0);
    for (int i = 0; i < DUMP_FILE_MAX; i++) { /* of tomorrow: the clock has been set back */
        char later[96];
        snprintf(later, sizeof(later), "%s/epd-dump-1-99990101T000000Z-4-%d.json", directory, i + 4);
        close(open(later, O_CREAT | O_WRONLY, 0600));
    }
    dump_file_init(&file, &config, 1, 5, 1);
    ck_assert_msg(dump_file_write(&file, &recorder, &error) == EPD_OK, "%s", error.text);
    ck_assert_int_eq(stat(file.path, &info), 0);
    ck_assert_uint_eq(count_dumps(directory), DUMP_FILE_MAX + 1);
    snprintf(config.dump_directory, sizeof(config.dump_directory), "/nonexistent");
    dump_file_init(&file, &config, 1, 1, 1);
    ck_assert_int_eq(dump_file_write(&file, &recorder, &error), EPD_SYSTEM);
    recorder_close(&recorder);
    close(fd);
    remove_folder(directory);
}
END_TEST

/* What is watched is a process that has connected, whichever way the kernel offers. */
static void expect_death_is_seen(enum peer_watch watch)
{
    int pair[2];
    ck_assert_int_eq(socketpair(AF_UNIX, SOCK_SEQPACKET, 0, pair), 0);
    struct ucred peer;
    socklen_t bytes = sizeof(peer);
    ck_assert_int_eq(getsockopt(pair[0], SOL_SOCKET, SO_PEERCRED, &peer, &bytes), 0);
    ck_assert_int_eq(peer.pid, getpid());
    if (watch == PEER_WATCH_PID) { /* a process that we can end */
        peer.pid = fork();
        if (peer.pid == 0) {
            (void)pause();
            _exit(0);
        }
    }
    int pidfd = -1;
    ck_assert_int_eq(peer_open(pair[0], &peer, &watch, &pidfd, &error), EPD_OK);
    ck_assert_int_ge(pidfd, 0);
    struct pollfd poll_fd = {.fd = pidfd, .events = POLLIN};
    ck_assert_int_eq(poll(&poll_fd, 1, 20), 0);
    if (watch == PEER_WATCH_PID) {
        ck_assert_int_eq(kill(peer.pid, SIGKILL), 0);
        ck_assert_int_eq(poll(&poll_fd, 1, 5000), 1);
        ck_assert_int_eq(waitpid(peer.pid, NULL, 0), peer.pid);
        int gone = -1;
        ck_assert_int_eq(peer_open(pair[0], &peer, &watch, &gone, &error), EPD_DISCONNECTED);
        ck_assert_int_eq(gone, -1);
    }
    (void)close(pidfd);
    (void)close(pair[0]);
    (void)close(pair[1]);
}

START_TEST(peers_are_watched_by_socket_by_pid_or_not_at_all)
{
    expect_death_is_seen(PEER_WATCH_SOCKET); /* falls to the pid on an older kernel */
    expect_death_is_seen(PEER_WATCH_PID);
    const struct ucred hidden = {.pid = 0}; /* of another pid namespace */
    enum peer_watch watch = PEER_WATCH_PID;
    int pidfd = -1;
    ck_assert_int_eq(peer_open(-1, &hidden, &watch, &pidfd, &error), EPD_OK);
    ck_assert_int_eq(pidfd, -1);
    ck_assert_int_eq(watch, PEER_WATCH_PID); /* others may be seen */
    const struct ucred self = {.pid = getpid()};
    watch = PEER_WATCH_NONE;
    ck_assert_int_eq(peer_open(-1, &self, &watch, &pidfd, &error), EPD_OK);
    ck_assert_int_eq(pidfd, -1);
}
END_TEST

/* A killed process is ending for as long as the kernel takes down what it had, here until it is reaped. */
START_TEST(a_process_that_ends_is_told_from_one_that_lives)
{
    siginfo_t info;
    const pid_t pid = fork();
    if (pid == 0) {
        pause();
        _exit(0);
    }
    ck_assert_int_eq(process_ending(pid), 0);
    ck_assert_int_eq(process_ending(getpid()), 0);
    kill(pid, SIGKILL);
    ck_assert_int_eq(waitid(P_PID, (id_t)pid, &info, WEXITED | WNOWAIT), 0);
    ck_assert_int_eq(process_ending(pid), 1);
    ck_assert_int_eq(waitpid(pid, NULL, 0), pid);
    ck_assert_int_eq(process_ending(pid), 1);
}
END_TEST

START_TEST(ports_that_the_system_gives_away_are_known)
{
    static const struct {
        uint16_t port;
        const char *range, *reserved;
        int given_away;
    } cases[] = {
        {7741, "32768\t60999", "", 0},
        {32767, "32768\t60999", "", 0},
        {32768, "32768\t60999", "", 1},
        {60999, "32768\t60999", "", 1},
        {61000, "32768\t60999", "", 0},
        {40000, "32768\t60999", "40000", 0},
        {40000, "32768\t60999", "1,39999-40001,50000", 0},
        {40000, "32768\t60999", "39999,40001", 1},
        {40000, "", "", 0},
        {40000, "nonsense", "x", 0},
        {40000, "1 65535", "x", 1},
    };
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++)
        ck_assert_msg(tcp_port_is_given_away(cases[i].port, cases[i].range, cases[i].reserved) ==
                          cases[i].given_away,
                      "case %zu", i);
}
END_TEST

static void *close_soon(void *arg)
{
    usleep(300000);
    close(*(int *)arg);
    return NULL;
}

START_TEST(a_port_that_something_else_has_for_a_moment_is_waited_for)
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr = {htonl(INADDR_LOOPBACK)}};
    socklen_t bytes = sizeof(address);
    int fd = -1, holder = socket(AF_INET, SOCK_STREAM, 0);
    ck_assert_int_eq(bind(holder, (struct sockaddr *)&address, bytes), 0);
    ck_assert_int_eq(getsockname(holder, (struct sockaddr *)&address, &bytes), 0);
    ck_assert_int_eq(tcp_port_listen((struct sockaddr *)&address, bytes, 4, 60, &fd, &error), EPD_SYSTEM);
    ck_assert_ptr_nonnull(strstr(error.text, "tried for 60 ms"));
    ck_assert_int_eq(fd, -1);
    pthread_t thread;
    ck_assert_int_eq(pthread_create(&thread, NULL, close_soon, &holder), 0);
    ck_assert_msg(tcp_port_listen((struct sockaddr *)&address, bytes, 4, 5000, &fd, &error) == EPD_OK, "%s",
                  error.text);
    (void)pthread_join(thread, NULL);
    int client = socket(AF_INET, SOCK_STREAM, 0);
    ck_assert_int_eq(connect(client, (struct sockaddr *)&address, bytes), 0);
    close(client);
    close(fd);
}
END_TEST

int main(void)
{
    const TTest *const tests[] = {log_is_limited_per_key_and_says_what_it_left_out,
                                  a_full_pipe_makes_no_line_wait,
                                  a_terminal_that_takes_nothing_makes_no_line_wait,
                                  a_name_is_one_word_of_a_log_line_whatever_is_in_it,
                                  recorder_keeps_the_newest_steps_and_names_missing_ranks,
                                  dumps_are_never_written_over_and_the_oldest_go,
                                  peers_are_watched_by_socket_by_pid_or_not_at_all,
                                  a_process_that_ends_is_told_from_one_that_lives,
                                  ports_that_the_system_gives_away_are_known,
                                  a_port_that_something_else_has_for_a_moment_is_waited_for,
                                  NULL};
    return suite_run("daemon_system", tests, NULL, NULL);
}
