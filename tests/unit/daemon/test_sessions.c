/* Connections and what ends them, with a real daemon: every close hits one client only. */
#include <check.h>
#include <fcntl.h>
#include <jansson.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

#include "daemon/reserve.h"
#include "proto/packet.h"
#include "tests/unit/daemon/epd_process.h"
#include "tests/unit/daemon/raw_client.h"

static struct epd_process epd;
static struct raw_client clients[3];
static struct raw_client *const all[] = {&clients[0], &clients[1], &clients[2]};
static struct raw_plan plans[2];
static uint64_t seq;

/* Two ranks that work, before and after what the test does to a third client. */
static void step(void)
{
    seq++;
    for (int rank = 0; rank < 2; rank++)
        raw_launch(all[rank], &plans[rank], seq);
    for (int rank = 0; rank < 2; rank++)
        ck_assert_int_eq(raw_done(all[rank], &plans[rank], ""), EPD_OK);
}

static void start_with(const char *const *flags)
{
    epd_start(&epd, flags);
    for (int i = 0; i < 3; i++)
        raw_open(&clients[i], epd.socket);
    raw_barrier_all(all, 2, raw_join_all(all, 2, "g"), plans);
    seq = 0;
    step();
}

static void start(void)
{
    static const char *const flags[] = {"--hello", "200ms", NULL};
    start_with(flags);
}

static void stop(void)
{
    for (int i = 0; i < 3; i++)
        raw_close(&clients[i]);
    epd_stop(&epd);
}

/* The third client has been closed for this reason; the stats say so, and the others never noticed. */
static void expect_closed(enum epd_status status, const char *part, const char *reason)
{
    raw_expect_closed(all[2], status, part);
    step();
    char *text = raw_control(epd.control, CONTROL_STATS);
    json_t *document = json_loads(text, 0, NULL);
    json_t *closed = json_object_get(json_object_get(document, "sessions"), "closed");
    ck_assert_int_eq(json_integer_value(json_object_get(closed, reason)), 1);
    json_decref(document);
    free(text);
}

START_TEST(garbage_closes_only_its_sender)
{
    raw_send_bytes(all[2], "\xff\xff\xff\xff garbage", 12, -1);
    expect_closed(EPD_PROTOCOL, "", "bad_frame");
}
END_TEST

START_TEST(oversized_datagram_closes_only_its_sender)
{
    static char large[EPD_MAX_DATAGRAM_BYTES + 1];
    int bytes = 4 << 20;
    ck_assert_int_eq(setsockopt(clients[2].fd, SOL_SOCKET, SO_SNDBUF, &bytes, sizeof(bytes)), 0);
    raw_send_bytes(all[2], large, sizeof(large), -1);
    expect_closed(EPD_PROTOCOL, "longer", "oversized");
}
END_TEST

START_TEST(unexpected_fd_closes_only_its_sender)
{
    raw_send(all[2], raw_join("x", 1, 0), STDIN_FILENO);
    expect_closed(EPD_PROTOCOL, "group_join", "unexpected_fd");
}
END_TEST

START_TEST(two_fds_close_only_their_sender)
{
    char byte = 0;
    union {
        struct cmsghdr header;
        char room[CMSG_SPACE(2 * sizeof(int))];
    } control;
    memset(&control, 0, sizeof(control));
    struct iovec data = {&byte, 1};
    struct msghdr message = {
        .msg_iov = &data, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof(control)};
    struct cmsghdr *header = CMSG_FIRSTHDR(&message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(2 * sizeof(int));
    const int fds[2] = {0, 1};
    memcpy(CMSG_DATA(header), fds, sizeof(fds));
    ck_assert_int_eq(sendmsg(clients[2].fd, &message, 0), 1);
    expect_closed(EPD_PROTOCOL, "", "bad_fds");
}
END_TEST

START_TEST(second_hello_closes)
{
    raw_send(all[2], (struct message){.kind = MESSAGE_HELLO, .hello = {.major = 1, .client_name = "again"}},
             -1);
    expect_closed(EPD_PROTOCOL, "hello in state open", "bad_state");
}
END_TEST

START_TEST(request_before_hello_closes)
{
    raw_close(all[2]);
    raw_connect(all[2], epd.socket);
    raw_send(all[2], raw_join("x", 1, 0), -1);
    expect_closed(EPD_PROTOCOL, "group_join in state opening", "bad_state");
}
END_TEST

START_TEST(silence_instead_of_hello_closes)
{
    raw_close(all[2]);
    raw_connect(all[2], epd.socket);
    expect_closed(EPD_TIMEOUT, "no Hello", "hello_timeout");
}
END_TEST

START_TEST(other_major_version_is_told_both_versions)
{
    raw_close(all[2]);
    raw_connect(all[2], epd.socket);
    raw_send(all[2],
             (struct message){.kind = MESSAGE_HELLO, .hello = {.major = 9, .minor = 3, .client_name = "new"}},
             -1);
    raw_expect_error(all[2], EPD_VERSION_MISMATCH, "client speaks 9.3");
    expect_closed(EPD_VERSION_MISMATCH, "speaks 1.0", "version");
}
END_TEST

START_TEST(launch_of_anothers_plan_closes)
{
    raw_launch(all[2], &(struct raw_plan){.plan_id = plans[0].plan_id, .shape_hash = 1}, 1);
    expect_closed(EPD_UNKNOWN_ID, "belongs to another session", "bad_launch");
}
END_TEST

START_TEST(evicted_client_is_told_why)
{
    static struct raw_client control;
    raw_connect(&control, epd.control);
    struct message evict = {
        .kind = MESSAGE_CONTROL,
        .control = {.verb = CONTROL_EVICT, .session_id = clients[2].session_id, .reason = "maintenance"}};
    raw_send(&control, evict, -1);
    raw_expect(&control, MESSAGE_REPLY_OK);
    raw_send(&control, evict, -1);
    raw_expect_error(&control, EPD_UNKNOWN_ID, "does not exist");
    raw_close(&control);
    expect_closed(EPD_EVICTED, "maintenance", "evicted");
    ck_assert_uint_eq(atomic_load(&clients[2].page->closed), EPD_EVICTED);
}
END_TEST

START_TEST(reader_that_never_reads_is_closed)
{
    struct message unknown = {.kind = MESSAGE_PLAN_DESTROY, .plan_destroy = {.id = 999}};
    struct epd_error error = {0};
    size_t bytes = 0;
    static unsigned char datagram[EPD_MAX_DATAGRAM_BYTES];
    unknown.request_id = 1;
    ck_assert_int_eq(codec_encode(&unknown, datagram, &bytes, &error), EPD_OK);
    ck_assert_int_eq(fcntl(clients[2].fd, F_SETFL, O_NONBLOCK), 0);
    enum packet_result result = PACKET_OK;
    for (int i = 0; i < 200000 && (result == PACKET_OK || result == PACKET_AGAIN); i++) {
        result = packet_send(clients[2].fd, datagram, bytes, -1);
        if (result == PACKET_AGAIN)
            usleep(100);
    }
    ck_assert_int_ne(result, PACKET_OK);
    ck_assert_int_ne(result, PACKET_AGAIN);
    step();
}
END_TEST

START_TEST(drain_lets_a_started_step_end_and_exits_with_0)
{
    seq++;
    raw_launch(all[0], &plans[0], seq);
    raw_expect_silence(all[0], 50);
    kill(epd.pid, SIGTERM);
    raw_expect_silence(all[2], 100); /* the step waits for rank 1, the daemon for the step */
    raw_send(all[2], raw_join("late", 1, 0), -1);
    raw_expect_error(all[2], EPD_DRAINING, "no new groups");
    raw_launch(all[1], &plans[1], seq);
    ck_assert_int_eq(raw_done(all[0], &plans[0], ""), EPD_OK);
    ck_assert_int_eq(raw_done(all[1], &plans[1], ""), EPD_OK);
    for (int i = 0; i < 3; i++)
        raw_expect_closed(all[i], EPD_DRAINING, "");
    ck_assert_int_eq(epd_wait(&epd), 0);
    ck_assert_int_ne(access(epd.socket, F_OK), 0);
    epd_clean(&epd);
    for (int i = 0; i < 3; i++)
        raw_close(&clients[i]);
}
END_TEST

START_TEST(second_term_ends_at_once)
{
    seq++;
    raw_launch(all[0], &plans[0], seq);
    raw_expect_silence(all[0], 50);
    kill(epd.pid, SIGTERM);
    raw_expect_silence(all[2], 100);
    kill(epd.pid, SIGTERM);
    ck_assert_int_eq(raw_done(all[0], &plans[0], "the daemon ends"), EPD_DRAINING);
    ck_assert_int_eq(epd_wait(&epd), 0);
    epd_clean(&epd);
    for (int i = 0; i < 3; i++)
        raw_close(&clients[i]);
}
END_TEST

START_TEST(full_launch_window_pauses_reading_and_loses_nothing)
{
    static const char *const flags[] = {"--launches-per-rank", "4", NULL};
    start_with(flags);
    const uint64_t n = 40;
    for (uint64_t i = 1; i <= n; i++) {
        raw_launch(all[0], &plans[0], seq + i);
        usleep(100);
    }
    raw_expect_silence(all[0], 50);
    struct page_plan *flags0 = &clients[0].page->plans[plans[0].flag_idx];
    const uint64_t before = atomic_load(&flags0->completed);
    for (uint64_t i = 1; i <= n; i++)
        raw_launch(all[1], &plans[1], seq + i);
    for (int waited = 0; atomic_load(&flags0->completed) < before + n; waited++) {
        ck_assert_int_lt(waited, RAW_DEADLINE_MS);
        usleep(1000);
    }
    stop();
}
END_TEST

START_TEST(sessions_beyond_the_limit_are_told)
{
    static const char *const flags[] = {"--sessions-per-uid", "4", NULL};
    start_with(flags);
    static struct raw_client fourth, fifth;
    raw_open(&fourth, epd.socket);
    raw_connect(&fifth, epd.socket);
    raw_expect_closed(&fifth, EPD_QUOTA, "sessions of uid");
    raw_close(&fourth);
    raw_close(&fifth);
    usleep(100000); /* the daemon hears of the end */
    raw_open(&fifth, epd.socket);
    raw_close(&fifth);
    step();
    stop();
}
END_TEST

START_TEST(ranks_that_use_up_every_fd_do_not_lock_people_out)
{
    enum { N_CROWD = 24 };
    static struct raw_client crowd[N_CROWD], people[3];
    start_with(NULL);
    char *text = raw_control(epd.control, CONTROL_STATS);
    json_t *document = json_loads(text, 0, NULL);
    const rlim_t fds = (rlim_t)json_integer_value(json_object_get(document, "fds"));
    json_decref(document);
    free(text);
    const pid_t worker = (pid_t)epd_status_number(&epd, "pid");
    usleep(100000); /* the daemon hears of the ends of these control sessions */
    struct rlimit few = {.rlim_cur = fds + RESERVE_FDS + 8, .rlim_max = 4096};
    ck_assert_int_eq(prlimit(worker, RLIMIT_NOFILE, &few, NULL), 0);
    for (int i = 0; i < N_CROWD; i++)
        raw_connect(&crowd[i], epd.socket);
    raw_expect_closed(&crowd[N_CROWD - 1], EPD_QUOTA, "no fds left for ranks");
    few.rlim_cur--; /* a session takes two: one may be left over */
    ck_assert_int_eq(prlimit(worker, RLIMIT_NOFILE, &few, NULL), 0);
    raw_send(all[2], raw_join("more", 1, 0), -1);
    raw_expect_error(all[2], EPD_QUOTA, "no fds left for ranks");
    for (int i = 0; i < 3; i++) /* some stay, others come */
        raw_connect(&people[i], epd.control);
    for (int verb = CONTROL_STATUS; verb < CONTROL_VERB_COUNT; verb++)
        if (verb != CONTROL_DRAIN && verb != CONTROL_EVICT)
            free(raw_control(epd.control, (enum control_verb)verb));
    step(); /* who is in works on */
    for (int i = 0; i < N_CROWD; i++)
        raw_close(&crowd[i]);
    for (int i = 0; i < 3; i++)
        raw_close(&people[i]);
    usleep(100000); /* the daemon hears of the end */
    raw_open(&crowd[0], epd.socket);
    raw_close(&crowd[0]);
    stop();
}
END_TEST

START_TEST(uid_that_is_not_allowed_is_told)
{
    static const char *const flags[] = {"--allow-uids", "54321", NULL};
    epd_start(&epd, flags);
    raw_connect(all[0], epd.socket);
    raw_expect_closed(all[0], EPD_PERMISSION, "allow_uids");
    raw_close(all[0]);
    epd_stop(&epd);
}
END_TEST

START_TEST(every_control_document_is_json_with_a_header)
{
    for (int verb = CONTROL_STATUS; verb < CONTROL_VERB_COUNT; verb++) {
        if (verb == CONTROL_DRAIN || verb == CONTROL_EVICT)
            continue;
        char *text = raw_control(epd.control, (enum control_verb)verb);
        json_t *document = json_loads(text, 0, NULL);
        ck_assert_msg(json_is_string(json_object_get(document, "boot_id")) &&
                          json_is_integer(json_object_get(document, "uptime_ms")),
                      "%s", text);
        json_decref(document);
        free(text);
    }
}
END_TEST

static TCase *with_fixture(Suite *suite, const char *name, void (*setup)(void), void (*teardown)(void))
{
    TCase *tcase = tcase_create(name);
    tcase_add_checked_fixture(tcase, setup, teardown);
    tcase_set_timeout(tcase, 30);
    suite_add_tcase(suite, tcase);
    return tcase;
}

int main(void)
{
    Suite *suite = suite_create("daemon_sessions");
    TCase *ends = with_fixture(suite, "ends", start, stop);
    tcase_add_test(ends, garbage_closes_only_its_sender);
    tcase_add_test(ends, oversized_datagram_closes_only_its_sender);
    tcase_add_test(ends, unexpected_fd_closes_only_its_sender);
    tcase_add_test(ends, two_fds_close_only_their_sender);
    tcase_add_test(ends, second_hello_closes);
    tcase_add_test(ends, request_before_hello_closes);
    tcase_add_test(ends, silence_instead_of_hello_closes);
    tcase_add_test(ends, other_major_version_is_told_both_versions);
    tcase_add_test(ends, launch_of_anothers_plan_closes);
    tcase_add_test(ends, evicted_client_is_told_why);
    tcase_add_test(ends, reader_that_never_reads_is_closed);
    tcase_add_test(ends, every_control_document_is_json_with_a_header);
    TCase *drains = with_fixture(suite, "drains", start, NULL);
    tcase_add_test(drains, drain_lets_a_started_step_end_and_exits_with_0);
    tcase_add_test(drains, second_term_ends_at_once);
    TCase *limits = with_fixture(suite, "limits", NULL, NULL);
    tcase_add_test(limits, full_launch_window_pauses_reading_and_loses_nothing);
    tcase_add_test(limits, sessions_beyond_the_limit_are_told);
    tcase_add_test(limits, ranks_that_use_up_every_fd_do_not_lock_people_out);
    tcase_add_test(limits, uid_that_is_not_allowed_is_told);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int n_failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return n_failed != 0;
}
