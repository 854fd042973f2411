/* The connection's life against a daemon that the test plays: hello, loss, late replies, reconnect. Every
 * test ends with as many fds as it began with. */
#include <check.h>
#include <fcntl.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "client/deadline.h"
#include "client/group.h"
#include "tests/unit/client/fake_daemon.h"

static struct fake fake;
static int n_fds;
static int stop_reading[2];
static uint64_t n_read;

static void setup(void)
{
    n_fds = count_fds();
    fake_open(&fake);
}

static void teardown(void)
{
    fake_stop(&fake);
    ck_assert_int_eq(count_fds(), n_fds);
}

static enum epd_status try_open(uint32_t timeout_ms)
{
    const struct epd_open_options options = {
        .size = sizeof options, .socket_path = fake.path, .client_name = "test", .timeout_ms = timeout_ms};
    struct epd_client *client = NULL;
    enum epd_status status = epd_open(&options, &client);

    ck_assert(status == EPD_OK || client == NULL);
    epd_close(client);
    return status;
}

/* ---- hello ---- */

static void script_hello(struct fake *daemon)
{
    fake_accept(daemon);
    fake_expect(daemon, MESSAGE_HELLO);
    if (strcmp(daemon->last.hello.client_name, "test") != 0 || daemon->last.hello.major != EPD_PROTOCOL_MAJOR)
        abort();
    fake_answer_hello(daemon);
    if (!fake_peer_closed(daemon))
        abort();
}

START_TEST(open_agrees_with_the_daemon_and_close_hangs_up)
{
    struct epd_client_info info = {.size = sizeof info};

    fake_start(&fake, script_hello);
    struct epd_client *client = open_client(&fake);
    ck_assert_int_eq(epd_client_info(client, &info), EPD_OK);
    ck_assert_str_eq(info.daemon_version, "0.0.fake");
    ck_assert_uint_eq(info.session_id, 7);
    ck_assert_int_eq(info.backend, EPD_BACKEND_HOST);
    ck_assert_uint_eq(info.n_devices, 1);
    ck_assert_str_eq(info.devices[0].name, "host0");
    ck_assert_uint_eq(info.boot_id[0], 1);
    epd_close(client);
}
END_TEST

static void script_refuse(struct fake *daemon)
{
    fake_accept(daemon);
    fake_expect(daemon, MESSAGE_HELLO);
    fake_answer_error(daemon, EPD_VERSION_MISMATCH, "daemon 2.0, client 1.0");
}

START_TEST(open_reports_the_daemons_refusal_in_its_words)
{
    fake_start(&fake, script_refuse);
    ck_assert_int_eq(try_open(5000), EPD_VERSION_MISMATCH);
    ck_assert_str_eq(epd_error_text(), "daemon 2.0, client 1.0");
}
END_TEST

static void script_other_version(struct fake *daemon)
{
    struct message reply = {.kind = MESSAGE_REPLY_HELLO};

    fake_accept(daemon);
    fake_expect(daemon, MESSAGE_HELLO);
    reply.request_id = daemon->last.request_id;
    reply.reply_hello = (struct message_reply_hello){.major = 2,
                                                     .minor = 5,
                                                     .session_id = 1,
                                                     .boot_id = {1},
                                                     .epoch = 1,
                                                     .backend = EPD_BACKEND_HOST,
                                                     .page_bytes = sizeof(struct page),
                                                     .n_devices = 1};
    fake_send(daemon, &reply, -1);
}

START_TEST(open_names_both_versions_when_they_do_not_meet)
{
    fake_start(&fake, script_other_version);
    ck_assert_int_eq(try_open(5000), EPD_VERSION_MISMATCH);
    ck_assert_str_eq(epd_error_text(), "the daemon speaks protocol 2.5, this library 1.0");
}
END_TEST

static void script_full(struct fake *daemon)
{
    fake_accept(daemon);
    fake_notice(daemon, EPD_QUOTA, "64 connections of uid 0, at most 64");
    fake_hang_up(daemon);
}

START_TEST(open_reads_the_notice_of_a_daemon_that_closes_before_the_hello)
{
    fake_start(&fake, script_full);
    ck_assert_int_eq(try_open(5000), EPD_QUOTA);
    ck_assert_str_eq(epd_error_text(), "closed by the daemon: 64 connections of uid 0, at most 64");
}
END_TEST

static void script_no_page(struct fake *daemon)
{
    struct message reply = {.kind = MESSAGE_REPLY_HELLO};

    fake_accept(daemon);
    fake_expect(daemon, MESSAGE_HELLO);
    reply.request_id = daemon->last.request_id;
    reply.reply_hello = (struct message_reply_hello){.major = EPD_PROTOCOL_MAJOR,
                                                     .session_id = 1,
                                                     .boot_id = {1},
                                                     .epoch = 1,
                                                     .backend = EPD_BACKEND_HOST,
                                                     .page_bytes = sizeof(struct page),
                                                     .n_devices = 1};
    fake_send(daemon, &reply, -1);
}

START_TEST(open_refuses_a_hello_without_its_page)
{
    fake_start(&fake, script_no_page);
    ck_assert_int_eq(try_open(5000), EPD_PROTOCOL);
    ck_assert_ptr_nonnull(strstr(epd_error_text(), "session page"));
}
END_TEST

static void script_short_page(struct fake *daemon)
{
    struct message reply = {.kind = MESSAGE_REPLY_HELLO};
    int fd = memfd_create("short", MFD_CLOEXEC | MFD_ALLOW_SEALING);

    if (fd < 0 || ftruncate(fd, 4096) < 0)
        abort();
    fake_accept(daemon);
    fake_expect(daemon, MESSAGE_HELLO);
    reply.request_id = daemon->last.request_id;
    reply.reply_hello = (struct message_reply_hello){.major = EPD_PROTOCOL_MAJOR,
                                                     .session_id = 1,
                                                     .boot_id = {1},
                                                     .epoch = 1,
                                                     .backend = EPD_BACKEND_HOST,
                                                     .page_bytes = sizeof(struct page),
                                                     .n_devices = 1};
    fake_send(daemon, &reply, fd);
    close(fd);
}

START_TEST(open_refuses_a_page_that_could_shrink_or_is_too_short)
{
    fake_start(&fake, script_short_page);
    ck_assert_int_eq(try_open(5000), EPD_PROTOCOL);
}
END_TEST

static void script_restarting(struct fake *daemon)
{
    for (int i = 0; i < 2; i++) {
        fake_accept(daemon);
        fake_hang_up(daemon);
    }
    script_hello(daemon);
}

START_TEST(open_tries_again_while_the_daemon_hangs_up_before_it_answers)
{
    fake_start(&fake, script_restarting);
    ck_assert_int_eq(try_open(5000), EPD_OK);
}
END_TEST

static void script_silent(struct fake *daemon)
{
    fake_accept(daemon);
    fake_expect(daemon, MESSAGE_HELLO);
    if (!fake_peer_closed(daemon))
        abort();
}

START_TEST(open_ends_at_its_timeout_when_the_daemon_is_silent)
{
    fake_start(&fake, script_silent);
    ck_assert_int_eq(try_open(60), EPD_DISCONNECTED);
    ck_assert_ptr_nonnull(strstr(epd_error_text(), "did not answer the hello in time"));
}
END_TEST

/* ---- loss ---- */

static void script_die_in_call(struct fake *daemon)
{
    fake_accept(daemon);
    fake_expect(daemon, MESSAGE_HELLO);
    fake_answer_hello(daemon);
    fake_expect(daemon, MESSAGE_STATS);
    fake_hang_up(daemon);
}

START_TEST(call_in_flight_ends_restarted_while_somebody_still_listens)
{
    char *json;

    fake_start(&fake, script_die_in_call);
    struct epd_client *client = open_client(&fake);
    ck_assert_int_eq(epd_stats(client, &json), EPD_RESTARTED);
    ck_assert_ptr_nonnull(strstr(epd_error_text(), "epd_reconnect()"));
    ck_assert_int_eq(epd_stats(client, &json), EPD_RESTARTED);
    epd_close(client);
}
END_TEST

static void script_die_for_good(struct fake *daemon)
{
    fake_accept(daemon);
    fake_expect(daemon, MESSAGE_HELLO);
    fake_answer_hello(daemon);
    fake_expect(daemon, MESSAGE_STATS);
    fake_stop_listening(daemon);
    fake_hang_up(daemon);
}

START_TEST(call_in_flight_ends_disconnected_when_nobody_listens)
{
    char *json;

    fake_start(&fake, script_die_for_good);
    struct epd_client *client = open_client(&fake);
    ck_assert_int_eq(epd_stats(client, &json), EPD_DISCONNECTED);
    ck_assert_int_eq(epd_reconnect(client, 50), EPD_DISCONNECTED);
    epd_close(client);
}
END_TEST

static void script_evict(struct fake *daemon)
{
    fake_session(daemon);
    fake_expect(daemon, MESSAGE_STATS);
    fake_notice(daemon, EPD_EVICTED, "by root: too slow");
    fake_hang_up(daemon);
}

START_TEST(evicted_client_learns_the_reason_from_every_call)
{
    struct epd_group_info info = {.size = sizeof info};
    struct epd_plan *plan;
    char *json;

    fake_start(&fake, script_evict);
    struct epd_client *client = open_client(&fake);
    struct epd_group *group = join_group(client);
    ck_assert_int_eq(epd_stats(client, &json), EPD_EVICTED);
    ck_assert_str_eq(epd_error_text(), "closed by the daemon: by root: too slow");
    ck_assert_int_eq(epd_group_info(group, &info), EPD_EVICTED);
    ck_assert_int_eq(
        epd_plan_create(group, &(struct epd_plan_options){.size = sizeof(struct epd_plan_options)}, &plan),
        EPD_EVICTED);
    epd_group_leave(group);
    epd_close(client);
}
END_TEST

static void script_closed_word(struct fake *daemon)
{
    fake_accept(daemon);
    fake_expect(daemon, MESSAGE_HELLO);
    fake_answer_hello(daemon);
    fake_expect(daemon, MESSAGE_STATS);
    atomic_store(&daemon->page->closed, EPD_DRAINING);
    fake_hang_up(daemon);
}

START_TEST(closed_word_of_the_page_says_why_when_the_notice_was_lost)
{
    char *json;

    fake_start(&fake, script_closed_word);
    struct epd_client *client = open_client(&fake);
    ck_assert_int_eq(epd_stats(client, &json), EPD_DRAINING);
    epd_close(client);
}
END_TEST

static void script_unread_then_evict(struct fake *daemon)
{
    fake_session(daemon);
    fake_expect(daemon, MESSAGE_PLAN_CREATE);
    fake_answer_plan(daemon, 3);
    /* The launch stays unread in the socket, so closing it resets the connection. */
    struct pollfd launch = {.fd = daemon->socket, .events = POLLIN};
    if (poll(&launch, 1, -1) != 1)
        abort();
    fake_notice(daemon, EPD_EVICTED, "with a launch unread");
    fake_hang_up(daemon);
}

START_TEST(notice_is_read_although_the_daemon_closed_with_messages_unread)
{
    fake_start(&fake, script_unread_then_evict);
    struct epd_client *client = open_client(&fake);
    struct epd_plan *plan = create_barrier(join_group(client));
    ck_assert_int_eq(epd_plan_launch(plan, NULL), EPD_OK);
    ck_assert_int_eq(epd_plan_wait(plan, 0), EPD_EVICTED);
    ck_assert_ptr_nonnull(strstr(epd_error_text(), "with a launch unread"));
    epd_close(client);
}
END_TEST

static void script_garbage(struct fake *daemon)
{
    fake_accept(daemon);
    fake_expect(daemon, MESSAGE_HELLO);
    fake_answer_hello(daemon);
    fake_expect(daemon, MESSAGE_STATS);
    if (write(daemon->socket, "\xff\xff\xff", 3) != 3)
        abort();
    if (!fake_peer_closed(daemon))
        abort();
}

START_TEST(daemon_that_breaks_the_protocol_is_left)
{
    char *json;

    fake_start(&fake, script_garbage);
    struct epd_client *client = open_client(&fake);
    ck_assert_int_eq(epd_stats(client, &json), EPD_PROTOCOL);
    epd_close(client);
}
END_TEST

/* ---- replies ---- */

static void script_stats(struct fake *daemon)
{
    struct message reply = {.kind = MESSAGE_REPLY_DOCUMENT};
    static const char text[] = "{\"launches\": 3}";
    int fd = memfd_create("stats", MFD_CLOEXEC);

    if (fd < 0 || write(fd, text, sizeof text - 1) != sizeof text - 1)
        abort();
    fake_accept(daemon);
    fake_expect(daemon, MESSAGE_HELLO);
    fake_answer_hello(daemon);
    for (uint64_t bytes = sizeof text - 1; bytes <= sizeof text; bytes++) {
        fake_expect(daemon, MESSAGE_STATS);
        reply.request_id = daemon->last.request_id;
        reply.reply_document.bytes = bytes;
        fake_send(daemon, &reply, fd);
    }
    close(fd);
}

START_TEST(stats_are_a_text_and_a_document_that_is_too_short_is_an_error)
{
    char *json;

    fake_start(&fake, script_stats);
    struct epd_client *client = open_client(&fake);
    ck_assert_int_eq(epd_stats(client, &json), EPD_OK);
    ck_assert_str_eq(json, "{\"launches\": 3}");
    epd_free(json);
    ck_assert_int_eq(epd_stats(client, &json), EPD_PROTOCOL);
    ck_assert_ptr_nonnull(strstr(epd_error_text(), "end after 15 of 16 bytes"));
    epd_close(client);
}
END_TEST

static void script_wrong_kind(struct fake *daemon)
{
    fake_accept(daemon);
    fake_expect(daemon, MESSAGE_HELLO);
    fake_answer_hello(daemon);
    fake_expect(daemon, MESSAGE_STATS);
    fake_answer_ok(daemon);
    fake_expect(daemon, MESSAGE_STATS);
    fake_answer_error(daemon, EPD_DRAINING, "no more");
}

START_TEST(reply_of_another_kind_is_an_error_of_that_call_only)
{
    char *json;

    fake_start(&fake, script_wrong_kind);
    struct epd_client *client = open_client(&fake);
    ck_assert_int_eq(epd_stats(client, &json), EPD_PROTOCOL);
    ck_assert_str_eq(epd_error_text(), "the daemon answered reply_ok, want reply_document");
    ck_assert_int_eq(epd_stats(client, &json), EPD_DRAINING);
    ck_assert_str_eq(epd_error_text(), "no more");
    epd_close(client);
}
END_TEST

static void script_late_buffer(struct fake *daemon)
{
    fake_session(daemon);
    fake_expect(daemon, MESSAGE_BUFFER_ALLOC);
    struct message asked = daemon->last;
    fake_expect(daemon, MESSAGE_STATS); /* the first caller has given up */
    uint64_t stats_id = daemon->last.request_id;
    daemon->last = asked;
    fake_answer_buffer(daemon);
    fake_expect(daemon, MESSAGE_BUFFER_RELEASE);
    if (daemon->last.buffer_release.id != daemon->next_id - 1)
        abort();
    fake_answer_ok(daemon);
    daemon->last.request_id = stats_id;
    fake_answer_error(daemon, EPD_UNSUPPORTED, "after the late one");
}

START_TEST(buffer_that_comes_after_its_caller_gave_up_is_given_back)
{
    struct message request = {.kind = MESSAGE_BUFFER_ALLOC};
    struct inbox_item reply;
    struct epd_error error;
    char *json;

    fake_start(&fake, script_late_buffer);
    struct epd_client *client = open_client(&fake);
    struct epd_group *group = join_group(client);
    request.buffer_alloc = (struct message_buffer_alloc){.group_id = group->reply.group_id, .bytes = 64};
    ck_assert_int_eq(group_call(group, &request, -1, MESSAGE_REPLY_BUFFER, 30, &reply, &error), EPD_TIMEOUT);
    ck_assert_ptr_nonnull(strstr(error.text, "did not answer buffer_alloc within 30 ms"));
    ck_assert_int_eq(epd_stats(client, &json), EPD_UNSUPPORTED);
    epd_close(client);
}
END_TEST

static void script_read_nothing(struct fake *daemon)
{
    fake_accept(daemon);
    fake_expect(daemon, MESSAGE_HELLO);
    fake_answer_hello(daemon);
    char any;
    if (read(stop_reading[0], &any, 1) != 1) /* until the test has seen the timeout */
        abort();
    while (!fake_peer_closed(daemon))
        n_read++;
}

START_TEST(launch_that_finds_no_room_ends_at_its_timeout_and_takes_no_number)
{
    const struct connection_config config = {.path = fake.path,
                                             .client_name = "test",
                                             .deadline_ns = deadline_after_ms(5000),
                                             .send_timeout_ms = 50};
    struct message_launch launch = {.plan_id = 1, .n_repeats = 1};
    struct connection *connection;
    struct epd_error error;
    uint64_t last_seq = 0;
    enum epd_status status;

    n_read = 0;
    ck_assert_int_eq(pipe2(stop_reading, O_CLOEXEC), 0);
    fake_start(&fake, script_read_nothing);
    ck_assert_int_eq(connection_open(&config, &connection, &error), EPD_OK);
    do
        status = connection_launch(connection, &launch, &last_seq, &error);
    while (status == EPD_OK);
    ck_assert_int_eq(status, EPD_TIMEOUT);
    ck_assert_ptr_nonnull(strstr(error.text, "took no message for 50 ms; nothing was sent"));
    ck_assert_int_eq(connection_check(connection, &error), EPD_OK); /* it may read again one day */
    ck_assert_int_eq(write(stop_reading[1], "", 1), 1);
    connection_release(connection);
    pthread_join(fake.thread, NULL);
    fake.script = NULL;
    close(stop_reading[0]);
    close(stop_reading[1]);
    ck_assert_uint_gt(last_seq, 0);
    ck_assert_uint_eq(n_read, last_seq); /* what got a number arrived */
}
END_TEST

/* ---- reconnect ---- */

static void script_two_lives(struct fake *daemon)
{
    fake_session(daemon);
    fake_expect(daemon, MESSAGE_BUFFER_ALLOC);
    fake_answer_buffer(daemon);
    fake_expect(daemon, MESSAGE_STATS);
    fake_hang_up(daemon);
    fake_accept(daemon); /* the client looks whether somebody is there */
    if (!fake_peer_closed(daemon))
        abort();
    fake_hang_up(daemon);
    daemon->boot = 2;
    fake_session(daemon);
    fake_expect(daemon, MESSAGE_GROUP_LEAVE);
    fake_answer_ok(daemon);
}

START_TEST(reconnect_goes_on_with_the_next_worker_and_old_objects_stay_restarted)
{
    struct epd_client_info info = {.size = sizeof info};
    struct epd_group_info group_info = {.size = sizeof group_info};
    struct epd_buffer *buffer;
    struct epd_plan *plan;
    char *json;

    fake_start(&fake, script_two_lives);
    struct epd_client *client = open_client(&fake);
    struct epd_group *old = join_group(client);
    ck_assert_int_eq(epd_reconnect(client, 1000), EPD_OK); /* nothing is lost: nothing to do */
    ck_assert_int_eq(epd_buffer_alloc(old, 4096, &buffer), EPD_OK);
    strcpy(epd_buffer_data(buffer), "kept");
    ck_assert_int_eq(epd_stats(client, &json), EPD_RESTARTED);
    ck_assert_int_eq(epd_reconnect(client, 5000), EPD_OK);
    ck_assert_int_eq(epd_client_info(client, &info), EPD_OK);
    ck_assert_uint_eq(info.boot_id[0], 2);
    ck_assert_int_eq(epd_group_info(old, &group_info), EPD_RESTARTED);
    ck_assert_int_eq(
        epd_plan_create(old, &(struct epd_plan_options){.size = sizeof(struct epd_plan_options)}, &plan),
        EPD_RESTARTED);
    ck_assert_str_eq(epd_buffer_data(buffer), "kept");
    ck_assert_int_eq(epd_buffer_release(buffer), EPD_OK);
    struct epd_group *group = join_group(client);
    ck_assert_int_eq(epd_group_info(group, &group_info), EPD_OK);
    epd_group_leave(group);
    epd_close(client); /* the old group too */
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("client session");
    TCase *cases = tcase_create("fake daemon");

    tcase_add_checked_fixture(cases, setup, teardown);
    tcase_set_timeout(cases, 30);
    tcase_add_test(cases, open_agrees_with_the_daemon_and_close_hangs_up);
    tcase_add_test(cases, open_reports_the_daemons_refusal_in_its_words);
    tcase_add_test(cases, open_names_both_versions_when_they_do_not_meet);
    tcase_add_test(cases, open_reads_the_notice_of_a_daemon_that_closes_before_the_hello);
    tcase_add_test(cases, open_refuses_a_hello_without_its_page);
    tcase_add_test(cases, open_refuses_a_page_that_could_shrink_or_is_too_short);
    tcase_add_test(cases, open_tries_again_while_the_daemon_hangs_up_before_it_answers);
    tcase_add_test(cases, open_ends_at_its_timeout_when_the_daemon_is_silent);
    tcase_add_test(cases, call_in_flight_ends_restarted_while_somebody_still_listens);
    tcase_add_test(cases, call_in_flight_ends_disconnected_when_nobody_listens);
    tcase_add_test(cases, evicted_client_learns_the_reason_from_every_call);
    tcase_add_test(cases, closed_word_of_the_page_says_why_when_the_notice_was_lost);
    tcase_add_test(cases, notice_is_read_although_the_daemon_closed_with_messages_unread);
    tcase_add_test(cases, daemon_that_breaks_the_protocol_is_left);
    tcase_add_test(cases, stats_are_a_text_and_a_document_that_is_too_short_is_an_error);
    tcase_add_test(cases, reply_of_another_kind_is_an_error_of_that_call_only);
    tcase_add_test(cases, buffer_that_comes_after_its_caller_gave_up_is_given_back);
    tcase_add_test(cases, launch_that_finds_no_room_ends_at_its_timeout_and_takes_no_number);
    tcase_add_test(cases, reconnect_goes_on_with_the_next_worker_and_old_objects_stay_restarted);
    suite_add_tcase(suite, cases);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int n_failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return n_failed != 0;
}
