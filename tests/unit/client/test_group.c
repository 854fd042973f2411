/* Groups and buffers against a daemon that the test plays: what is asked, and what is refused before. */
#include <check.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "client/deadline.h"
#include "tests/unit/client/group_fixture.h"

/* ---- groups ---- */

static void script_group(struct fake *daemon)
{
    fake_session(daemon);
    const struct message_group_join *join = &daemon->last.group_join;
    script_must(strcmp(join->name, "g") == 0 && join->world_size == 1 && join->rank == 0 &&
                !join->has_device);
    script_must(join->config.alignment == 1 && join->config.overflow == EPD_OVERFLOW_ERROR);
    script_must(join->config.n_experts == 4 && join->config.dtype == EPD_F32 &&
                join->config.capacity_rows == 0);
    fake_expect(daemon, MESSAGE_GROUP_LEAVE);
    script_must(daemon->last.group_leave.id == 100);
    fake_answer_ok(daemon);
}

START_TEST(join_fills_in_the_defaults_and_leave_tells_the_daemon)
{
    struct epd_group_info info = {.size = sizeof info};

    start(script_group);
    ck_assert_int_eq(epd_group_info(group, &info), EPD_OK);
    ck_assert_uint_eq(info.n_local_experts, 4);
    ck_assert_int_eq(info.capacity_rows, 64);
    ck_assert_uint_eq(info.device_uuid[0], 9);
    epd_group_leave(group);
}
END_TEST

static void script_session_only(struct fake *daemon)
{
    fake_session(daemon);
    script_must(fake_peer_closed(daemon));
    script_must(daemon->n_goodbyes == 1); /* a client that closes leaves its groups on purpose */
}

START_TEST(join_refuses_what_the_wire_would_refuse_before_it_asks)
{
    struct epd_group_options options = {.size = sizeof options, .name = "h", .world_size = 3, .n_experts = 4};
    struct epd_group *other;

    start(script_session_only);
    ck_assert_int_eq(epd_group_join(client, &options, &other), EPD_INVALID_ARGUMENT);
    ck_assert_ptr_nonnull(strstr(epd_error_text(), "n_experts"));
    options.name = NULL;
    ck_assert_int_eq(epd_group_join(client, &options, &other), EPD_INVALID_ARGUMENT);
    ck_assert_str_eq(epd_error_text(), "epd_group_options name: NULL");
    options.size = 0;
    ck_assert_int_eq(epd_group_join(client, &options, &other), EPD_INVALID_ARGUMENT);
}
END_TEST

static int may_end[2];

static void script_reads_no_more(struct fake *daemon)
{
    char any;

    fake_session(daemon);
    script_must(read(may_end[0], &any, 1) == 1);
}

/* The client's socket: the daemon's own is bound to the path, not connected to it. */
static int socket_to(const char *path)
{
    for (int fd = 3; fd < 256; fd++) {
        struct sockaddr_un peer = {0};
        socklen_t bytes = sizeof peer;
        if (getpeername(fd, (struct sockaddr *)&peer, &bytes) == 0 && peer.sun_family == AF_UNIX &&
            bytes > sizeof peer.sun_family && strcmp(peer.sun_path, path) == 0)
            return fd;
    }
    return -1;
}

START_TEST(close_does_not_wait_for_a_daemon_that_reads_nothing)
{
    ck_assert_int_eq(pipe2(may_end, O_CLOEXEC), 0);
    start(script_reads_no_more);
    const int socket = socket_to(fake.path);
    ck_assert_int_ge(socket, 0);
    while (send(socket, "full", 4, MSG_DONTWAIT | MSG_NOSIGNAL) == 4)
        continue;
    const uint64_t deadline_ns = deadline_after_ms(5000);
    epd_close(client);
    ck_assert_uint_lt(deadline_after_ms(1), deadline_ns);
    client = NULL;
    ck_assert_int_eq(write(may_end[1], "", 1), 1);
    pthread_join(fake.thread, NULL);
    fake.script = NULL;
    close(may_end[0]);
    close(may_end[1]);
}
END_TEST

/* ---- buffers ---- */

static void script_buffers(struct fake *daemon)
{
    fake_session(daemon);
    fake_expect(daemon, MESSAGE_BUFFER_ALLOC);
    script_must(daemon->last.buffer_alloc.group_id == 100 && daemon->last.buffer_alloc.bytes == 5000);
    fake_answer_buffer(daemon);
    fake_expect(daemon, MESSAGE_BUFFER_RELEASE);
    script_must(daemon->last.buffer_release.id == 101);
    fake_answer_ok(daemon);
    fake_expect(daemon, MESSAGE_BUFFER_REGISTER);
    script_must(daemon->last.buffer_register.kind == EPD_MEMORY_MEMFD && daemon->last_fd >= 0);
    script_must(daemon->last.buffer_register.offset == 4100 && daemon->last.buffer_register.bytes == 100);
    script_must(pwrite(daemon->last_fd, "daemon", 7, 4100) == 7);
    fake_answer_buffer(daemon);
    fake_expect(daemon, MESSAGE_BUFFER_RELEASE);
    fake_answer_error(daemon, EPD_IN_USE, "busy here");
    script_must(fake_peer_closed(daemon));
}

static int sealed_memfd(off_t bytes, int seals)
{
    int fd = memfd_create("test", MFD_CLOEXEC | MFD_ALLOW_SEALING);

    ck_assert_int_ge(fd, 0);
    ck_assert_int_eq(ftruncate(fd, bytes), 0);
    ck_assert_int_eq(fcntl(fd, F_ADD_SEALS, seals), 0);
    return fd;
}

START_TEST(buffers_are_the_daemons_or_the_clients_memory)
{
    struct epd_buffer *buffer;
    int fd = sealed_memfd(8192, F_SEAL_SHRINK);

    start(script_buffers);
    ck_assert_int_eq(epd_buffer_alloc(group, 5000, &buffer), EPD_OK);
    ck_assert_uint_eq(epd_buffer_bytes(buffer), 5000);
    memset(epd_buffer_data(buffer), 1, 5000);
    ck_assert_int_eq(epd_buffer_release(buffer), EPD_OK);
    ck_assert_int_eq(epd_buffer_register_memfd(group, fd, 4100, 100, &buffer), EPD_OK);
    ck_assert_str_eq(epd_buffer_data(buffer), "daemon"); /* what the daemon wrote through its own fd */
    ck_assert_int_eq(epd_buffer_release(buffer), EPD_IN_USE);
    ck_assert_str_eq(epd_error_text(), "busy here");
    close(fd);
}
END_TEST

START_TEST(memfds_that_could_lose_pages_or_are_too_short_are_refused)
{
    struct epd_buffer *buffer;
    int open_fd = sealed_memfd(8192, F_SEAL_GROW);
    int fd = sealed_memfd(8192, F_SEAL_SHRINK);

    start(script_session_only);
    ck_assert_int_eq(epd_buffer_register_memfd(group, open_fd, 0, 8192, &buffer), EPD_INVALID_ARGUMENT);
    ck_assert_ptr_nonnull(strstr(epd_error_text(), "want F_SEAL_SHRINK"));
    ck_assert_int_eq(epd_buffer_register_memfd(group, fd, 4096, 4097, &buffer), EPD_OUT_OF_RANGE);
    ck_assert_int_eq(epd_buffer_register_memfd(group, fd, UINT64_MAX, 2, &buffer), EPD_OUT_OF_RANGE);
    ck_assert_int_eq(epd_buffer_register_memfd(group, 0, 0, 1, &buffer), EPD_INVALID_ARGUMENT);
    ck_assert_int_eq(epd_buffer_register_memfd(group, fd, 0, 0, &buffer), EPD_INVALID_ARGUMENT);
    ck_assert_int_eq(epd_buffer_register_cuda(group, &fd, 8, &buffer), EPD_UNSUPPORTED);
    ck_assert_ptr_nonnull(strstr(epd_error_text(), "host backend"));
    close(open_fd);
    close(fd);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("client groups");
    TCase *cases = tcase_create("fake daemon");

    tcase_add_checked_fixture(cases, setup, teardown);
    tcase_set_timeout(cases, 30);
    tcase_add_test(cases, join_fills_in_the_defaults_and_leave_tells_the_daemon);
    tcase_add_test(cases, join_refuses_what_the_wire_would_refuse_before_it_asks);
    tcase_add_test(cases, close_does_not_wait_for_a_daemon_that_reads_nothing);
    tcase_add_test(cases, buffers_are_the_daemons_or_the_clients_memory);
    tcase_add_test(cases, memfds_that_could_lose_pages_or_are_too_short_are_refused);
    suite_add_tcase(suite, cases);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int n_failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return n_failed != 0;
}
