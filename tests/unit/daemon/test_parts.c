/* Small parts by themselves: ids, quotas, counters, log limits, queues, recorder, failpoints. */
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
#include <unistd.h>

#include "daemon/dump_file.h"
#include "daemon/failpoint.h"
#include "daemon/histogram.h"
#include "daemon/launch_queue.h"
#include "daemon/log.h"
#include "daemon/peer.h"
#include "daemon/process.h"
#include "daemon/quota.h"
#include "daemon/recorder.h"
#include "daemon/registry.h"
#include "daemon/stats.h"
#include "daemon/tcp_port.h"
#include "tests/unit/daemon/suite.h"

static struct epd_error error;

START_TEST(ids_grow_and_are_never_used_again)
{
    struct registry registry;
    uint64_t ids[1000], last = 0;
    int objects[1000];
    registry_init(&registry, 0);
    for (int i = 0; i < 1000; i++) {
        ck_assert_int_eq(registry_add(&registry, REGISTRY_BUFFER, 7, &objects[i], &ids[i], &error), EPD_OK);
        ck_assert_uint_gt(ids[i], last);
        last = ids[i];
    }
    for (int i = 0; i < 1000; i += 3)
        registry_remove(&registry, REGISTRY_BUFFER, ids[i]);
    for (int i = 0; i < 1000; i++)
        ck_assert_ptr_eq(registry_find(&registry, REGISTRY_BUFFER, ids[i]), i % 3 ? &objects[i] : NULL);
    uint64_t id;
    ck_assert_int_eq(registry_add(&registry, REGISTRY_BUFFER, 7, objects, &id, &error), EPD_OK);
    ck_assert_uint_eq(id, 1001);
    registry_remove(&registry, REGISTRY_BUFFER, id);
    for (int i = 0; i < 1000; i++)
        registry_remove(&registry, REGISTRY_BUFFER, ids[i]);
    ck_assert_uint_eq(registry_count(&registry, REGISTRY_BUFFER), 0);
    registry_fini(&registry);
}
END_TEST

START_TEST(unknown_foreign_and_stale_ids_are_told_apart)
{
    struct registry registry;
    uint64_t id;
    int object;
    void *found = NULL;
    registry_init(&registry, 3);
    ck_assert_int_eq(registry_add(&registry, REGISTRY_PLAN, 7, &object, &id, &error), EPD_OK);
    ck_assert_uint_eq(id, 3 * REGISTRY_IDS_PER_WORKER + 1);
    ck_assert_int_eq(registry_find_owned(&registry, REGISTRY_PLAN, id, 7, &found, &error), EPD_OK);
    ck_assert_ptr_eq(found, &object);
    ck_assert_int_eq(registry_find_owned(&registry, REGISTRY_PLAN, id, 8, &found, &error), EPD_FOREIGN_ID);
    ck_assert_int_eq(registry_find_owned(&registry, REGISTRY_BUFFER, id, 7, &found, &error), EPD_UNKNOWN_ID);
    ck_assert_int_eq(registry_find_owned(&registry, REGISTRY_PLAN, 5, 7, &found, &error), EPD_STALE_EPOCH);
    ck_assert_int_eq(registry_find_owned(&registry, REGISTRY_PLAN, 0, 7, &found, &error), EPD_UNKNOWN_ID);
    registry_remove(&registry, REGISTRY_PLAN, id);
    registry_fini(&registry);
}
END_TEST

START_TEST(quotas_of_session_and_uid_hold_and_are_given_back)
{
    struct accounts accounts;
    struct config config;
    struct quota a, b, c;
    config_init(&config);
    config.heap_per_session = 100;
    config.heap_per_uid = 150;
    config.sessions_per_uid = 2;
    quota_init(&accounts);
    ck_assert_int_eq(quota_open(&accounts, &config, 5, &a, &error), EPD_OK);
    ck_assert_int_eq(quota_open(&accounts, &config, 5, &b, &error), EPD_OK);
    ck_assert_int_eq(quota_open(&accounts, &config, 5, &c, &error), EPD_QUOTA);
    ck_assert_ptr_nonnull(strstr(error.text, "sessions of uid 5: 2 held, 1 more wanted, at most 2"));
    ck_assert_int_eq(quota_take(&accounts, &config, &a, QUOTA_HEAP_BYTES, 101, &error), EPD_QUOTA);
    ck_assert_int_eq(quota_take(&accounts, &config, &a, QUOTA_HEAP_BYTES, 100, &error), EPD_OK);
    ck_assert_uint_eq(quota_left(&config, &a, QUOTA_HEAP_BYTES), 0);
    ck_assert_int_eq(quota_take(&accounts, &config, &b, QUOTA_HEAP_BYTES, 51, &error), EPD_QUOTA);
    ck_assert_ptr_nonnull(strstr(error.text, "heap_bytes of uid 5: 100 held, 51 more wanted, at most 150"));
    ck_assert_int_eq(quota_take(&accounts, &config, &b, QUOTA_HEAP_BYTES, UINT64_MAX, &error), EPD_QUOTA);
    ck_assert_int_eq(quota_take(&accounts, &config, &b, QUOTA_IMPORTED_BYTES, UINT64_MAX / 2, &error),
                     EPD_OK);
    quota_give(&b, QUOTA_IMPORTED_BYTES, UINT64_MAX / 2);
    quota_give(&a, QUOTA_HEAP_BYTES, 100);
    ck_assert_int_eq(quota_take(&accounts, &config, &b, QUOTA_HEAP_BYTES, 100, &error), EPD_OK);
    quota_give(&b, QUOTA_HEAP_BYTES, 100);
    ck_assert_uint_eq(accounts.n_hits[QUOTA_HEAP_BYTES], 3);
    quota_close(&accounts, &a);
    quota_close(&accounts, &b);
    ck_assert(list_empty(&accounts.list) && accounts.n_sessions == 0);
}
END_TEST

START_TEST(without_a_limit_a_sum_is_still_a_number)
{
    struct accounts accounts;
    struct config config;
    struct quota a, b;
    config_init(&config);
    quota_init(&accounts);
    ck_assert_int_eq(quota_open(&accounts, &config, 5, &a, &error), EPD_OK);
    ck_assert_int_eq(quota_open(&accounts, &config, 5, &b, &error), EPD_OK);
    ck_assert_int_eq(quota_take(&accounts, &config, &a, QUOTA_HEAP_BYTES, UINT64_MAX - 1, &error), EPD_OK);
    ck_assert_int_eq(quota_take(&accounts, &config, &a, QUOTA_HEAP_BYTES, 2, &error), EPD_QUOTA);
    ck_assert_int_eq(quota_take(&accounts, &config, &b, QUOTA_HEAP_BYTES, 2, &error), EPD_QUOTA);
    quota_give(&a, QUOTA_HEAP_BYTES, UINT64_MAX - 1);
    quota_close(&accounts, &a);
    quota_close(&accounts, &b);
}
END_TEST

START_TEST(control_sessions_do_not_count_against_ranks)
{
    struct accounts accounts;
    struct config config;
    struct quota rank, control;
    config_init(&config);
    config.sessions = 1;
    quota_init(&accounts);
    ck_assert_int_eq(quota_open(&accounts, &config, 5, &rank, &error), EPD_OK);
    ck_assert_int_eq(quota_open_control(&accounts, &control, &error), EPD_OK);
    quota_close(&accounts, &control);
    quota_close(&accounts, &rank);
}
END_TEST

START_TEST(quantiles_are_within_an_eighth)
{
    static struct histogram histogram;
    ck_assert_uint_eq(histogram_quantile(&histogram, 0.5), 0);
    for (uint64_t i = 1; i <= 100000; i++)
        histogram_add(&histogram, i);
    const double p50 = (double)histogram_quantile(&histogram, 0.5),
                 p99 = (double)histogram_quantile(&histogram, 0.99);
    ck_assert_double_ge(p50, 50000);
    ck_assert_double_le(p50, 50000 * 1.125);
    ck_assert_double_ge(p99, 99000);
    ck_assert_double_le(p99, 100000);
    ck_assert_uint_eq(histogram_quantile(&histogram, 1.0), 100000);
    histogram_add(&histogram, UINT64_MAX);
    ck_assert_uint_eq(histogram_quantile(&histogram, 1.0), UINT64_MAX);
}
END_TEST

START_TEST(steps_are_counted_by_op_and_failure)
{
    static struct stats stats;
    struct step_rank_result ranks[2] = {
        {.status = EPD_OK,
         .rows = 5,
         .wire_bytes = 64,
         .network_bytes = 96,
         .flops = 1000,
         .phase_ns = {[EPD_PHASE_GEMM] = 30}},
        {.status = EPD_CAPACITY_OVERFLOW, .rows = 7, .dropped_rows = 2, .phase_ns = {[EPD_PHASE_GEMM] = 40}}};
    const struct step_result result = {.n_ranks = 2, .ranks = ranks};
    stats_count_step(&stats, EPD_OP_MOE_FORWARD, &result, 12, 100, 200);
    stats_count_failed(&stats, EPD_OP_MOE_FORWARD, EPD_TIMEOUT, 1);
    const struct stats_op *op = &stats.ops[EPD_OP_MOE_FORWARD];
    ck_assert_uint_eq(op->launches, 3);
    ck_assert_uint_eq(op->failed, 2);
    ck_assert_uint_eq(op->tokens, 12);
    ck_assert_uint_eq(op->rows, 12);
    ck_assert_uint_eq(op->dropped_rows, 2);
    ck_assert_uint_eq(op->wire_bytes, 64);
    ck_assert_uint_eq(op->network_bytes, 96);
    ck_assert_uint_eq(op->phase_ns[EPD_PHASE_GEMM], 70);
    ck_assert_uint_eq(op->run_ns.count, 1);
    ck_assert_uint_eq(stats.failed_launches[EPD_TIMEOUT], 1);
    ck_assert_uint_eq(stats.failed_launches[EPD_CAPACITY_OVERFLOW], 1);
    stats_count_error(&stats, (enum epd_status)4000);
    ck_assert_uint_eq(stats.errors[EPD_INTERNAL], 1);
}
END_TEST

START_TEST(load_knows_the_busiest_expert)
{
    struct load load;
    const int64_t rows[4] = {10, 0, 30, 0};
    ck_assert_int_eq(load_init(&load, 4, &error), EPD_OK);
    load_count(&load, NULL, 0);
    load_count(&load, rows, 4);
    ck_assert_double_eq_tol(load.imbalance_last, 3.0, 1e-9);
    ck_assert_uint_eq(load_hottest(&load), 2);
    ck_assert_uint_eq(load.n_steps, 1);
    load_fini(&load);
}
END_TEST

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

START_TEST(launch_queue_keeps_order_while_it_grows_and_wraps)
{
    struct launch_queue queue = {0};
    uint64_t in = 0, out = 0;
    for (int round = 0; round < 50; round++) {
        for (int i = 0; i < 7; i++) {
            const struct launch launch = {.seq = in++, .n_left = 1};
            ck_assert_int_eq(launch_queue_append(&queue, &launch, &error), EPD_OK);
        }
        for (int i = 0; i < 5; i++) {
            ck_assert_uint_eq(launch_queue_first(&queue)->seq, out++);
            ck_assert_int_eq(launch_queue_pop(&queue), 1);
        }
    }
    while (queue.count) {
        ck_assert_uint_eq(launch_queue_first(&queue)->seq, out++);
        (void)launch_queue_pop(&queue);
    }
    ck_assert_uint_eq(in, out);
    ck_assert_ptr_null(launch_queue_first(&queue));
    const struct launch armed = {.seq = 4, .n_left = 3};
    ck_assert_int_eq(launch_queue_append(&queue, &armed, &error), EPD_OK);
    ck_assert_int_eq(launch_queue_pop(&queue), 0);
    ck_assert_uint_eq(launch_queue_first(&queue)->seq, 5);
    launch_queue_fini(&queue);
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

START_TEST(failpoints_are_parsed_and_refused)
{
    struct failpoints points;
    ck_assert_int_eq(failpoint_parse(&points, NULL, &error), EPD_OK);
    ck_assert_int_eq(failpoint_parse(&points, "step_submit=error@2,drain=sleep:5", &error), EPD_OK);
    ck_assert_uint_eq(points.n_points, 2);
    ck_assert_uint_eq(points.points[1].sleep_ms, 5);
    ck_assert_int_eq(failpoint_parse(&points, "x=explode", &error), EPD_INVALID_ARGUMENT);
    ck_assert_int_eq(failpoint_parse(&points, "x", &error), EPD_INVALID_ARGUMENT);
#ifdef EPD_FAILPOINTS
    ck_assert_int_eq(failpoint_parse(&points, "p=error@2", &error), EPD_OK);
    ck_assert_int_eq(failpoint_hit(&points, "p", &error), EPD_OK);
    ck_assert_int_eq(failpoint_hit(&points, "p", &error), EPD_SYSTEM);
    ck_assert_int_eq(failpoint_hit(&points, "p", &error), EPD_OK);
    ck_assert_int_eq(failpoint_hit(&points, "q", &error), EPD_OK);
#endif
}
END_TEST

int main(void)
{
    const TTest *const tests[] = {ids_grow_and_are_never_used_again,
                                  unknown_foreign_and_stale_ids_are_told_apart,
                                  quotas_of_session_and_uid_hold_and_are_given_back,
                                  without_a_limit_a_sum_is_still_a_number,
                                  control_sessions_do_not_count_against_ranks,
                                  quantiles_are_within_an_eighth,
                                  steps_are_counted_by_op_and_failure,
                                  load_knows_the_busiest_expert,
                                  log_is_limited_per_key_and_says_what_it_left_out,
                                  a_name_is_one_word_of_a_log_line_whatever_is_in_it,
                                  launch_queue_keeps_order_while_it_grows_and_wraps,
                                  recorder_keeps_the_newest_steps_and_names_missing_ranks,
                                  dumps_are_never_written_over_and_the_oldest_go,
                                  peers_are_watched_by_socket_by_pid_or_not_at_all,
                                  a_process_that_ends_is_told_from_one_that_lives,
                                  ports_that_the_system_gives_away_are_known,
                                  a_port_that_something_else_has_for_a_moment_is_waited_for,
                                  failpoints_are_parsed_and_refused,
                                  NULL};
    return suite_run("daemon_parts", tests, NULL, NULL);
}
