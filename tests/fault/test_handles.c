/* Clients that hand over or name what they may not: fds, memory, ranges, ids, a page full of garbage. The one that does it is
 * closed or answered with an error; the ranks beside it never notice and nothing leaks. */
#include <check.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <unistd.h>

#include "proto/codec.h"
#include "tests/fault/control.h"
#include "tests/fault/suite.h"
#include "tests/fault/undisturbed.h"
#include "tests/fault/wire.h"
#include "tests/reference/values.h"

#define SEED 12

static struct undisturbed here;
static struct wire wire; /* large */

static void start(void)
{
    undisturbed_open(&here);
}

static void stop(void)
{
    undisturbed_close(&here);
}

/* ---- fds ---- */

START_TEST(an_unexpected_fd_and_more_than_one_fd_close_the_session_and_none_stays_open)
{
    struct message hello = {.kind = MESSAGE_HELLO, .hello = {.major = EPD_PROTOCOL_MAJOR}};
    struct epd_error error;
    unsigned char datagram[256];
    size_t bytes;
    int fds[200];
    for (int i = 0; i < 200; i++)
        fds[i] = open("/dev/null", O_RDWR | O_CLOEXEC);
    ck_assert_int_eq(wire_connect(&wire, here.daemon.socket_path), 0);
    ck_assert_int_eq(wire_call(&wire, &hello, fds[0]), EPD_PROTOCOL); /* Hello takes none */
    wire_close(&wire);
    hello.request_id = 1;
    ck_assert_int_eq(codec_encode(&hello, datagram, &bytes, &error), EPD_OK);
    static const unsigned counts[] = {2, 3, 16, 200};
    for (int round = 0; round < 20; round++) {
        ck_assert_int_eq(wire_connect(&wire, here.daemon.socket_path), 0);
        ck_assert_int_eq(wire_send_bytes(&wire, datagram, bytes, fds, counts[round % 4]), 0);
        ck_assert_int_eq(wire_wait_end(&wire), EPD_PROTOCOL);
        wire_close(&wire);
    }
    /* many sent before the daemon can close: they die with the socket's queue */
    ck_assert_int_eq(wire_connect(&wire, here.daemon.socket_path), 0);
    for (int i = 0; i < 20; i++)
        (void)!wire_send_bytes(&wire, datagram, bytes, fds, 1);
    ck_assert_int_eq(wire_wait_end(&wire), EPD_PROTOCOL);
    wire_close(&wire);
    for (int i = 0; i < 200; i++)
        close(fds[i]);
}
END_TEST

/* Everything that is an fd and no sealed memfd. */
static int wrong_fd(int n)
{
    int pair[2];
    switch (n) {
    case 0:
        return open("/dev/null", O_RDWR);
    case 1:
        return open("/dev/zero", O_RDWR);
    case 2:
        return open("/tmp", O_RDONLY | O_DIRECTORY);
    case 3:
        return open("/proc/self/exe", O_RDONLY);
    case 4:
        return open("/tmp", O_RDWR | O_TMPFILE, 0600);
    case 5:
        return epoll_create1(0);
    case 6:
        return dup(wire.socket); /* the daemon gets an fd to its own client's end */
    case 7:
        if (pipe(pair) != 0)
            return -1;
        close(pair[1]);
        return pair[0];
    case 8:
        return memfd_create("no seals possible", MFD_CLOEXEC);
    default:
        return -1;
    }
}

START_TEST(a_wrong_kind_of_fd_is_refused_and_the_session_lives)
{
    wire_open(&wire, here.daemon.socket_path);
    const uint64_t group = wire_join_alone(&wire, "fds");
    int fd;
    for (int n = 0; (fd = wrong_fd(n)) >= 0; n++) {
        struct message message = wire_register_message(group, 0, 4096);
        enum epd_status status = wire_call(&wire, &message, fd);
        ck_assert_msg(status == EPD_INVALID_ARGUMENT, "fd %d: %s %s", n, status_name(status), wire.why);
        close(fd);
    }
    struct message none = wire_register_message(group, 0, 4096);
    ck_assert_int_eq(wire_call(&wire, &none, -1), EPD_INVALID_ARGUMENT);
    struct message stats = {.kind = MESSAGE_STATS};
    ck_assert_int_eq(wire_call(&wire, &stats, -1), EPD_OK);
    wire_close(&wire);
}
END_TEST

static int make_memfd(off_t bytes, int seals)
{
    int fd = memfd_create("mine", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    ck_assert_int_eq(ftruncate(fd, bytes), 0);
    if (seals)
        ck_assert_int_eq(fcntl(fd, F_ADD_SEALS, seals), 0);
    return fd;
}

START_TEST(a_memfd_that_could_shrink_or_is_too_short_or_read_only_is_refused)
{
    static const struct {
        off_t file_bytes;
        int seals;
        uint64_t offset, bytes;
        enum epd_status want;
    } rows[] = {
        {65536, 0, 0, 65536, EPD_INVALID_ARGUMENT},
        {65536, F_SEAL_GROW, 0, 65536, EPD_INVALID_ARGUMENT},
        {65536, F_SEAL_SHRINK | F_SEAL_WRITE, 0, 65536, EPD_INVALID_ARGUMENT},
        {65536, F_SEAL_SHRINK, 0, 65537, EPD_OUT_OF_RANGE},
        {65536, F_SEAL_SHRINK, 65536, 1, EPD_OUT_OF_RANGE},
        {65536, F_SEAL_SHRINK, INT64_MAX - 1, 1, EPD_OUT_OF_RANGE},
        {65536, F_SEAL_SHRINK, 0, INT64_MAX, EPD_OUT_OF_RANGE},
        {0, F_SEAL_SHRINK, 0, 1, EPD_OUT_OF_RANGE},
        {65536, F_SEAL_SHRINK, 100, 65436, EPD_OK},
    };
    wire_open(&wire, here.daemon.socket_path);
    const uint64_t group = wire_join_alone(&wire, "memfds");
    for (size_t i = 0; i < sizeof(rows) / sizeof(rows[0]); i++) {
        int fd = make_memfd(rows[i].file_bytes, rows[i].seals);
        struct message message = wire_register_message(group, rows[i].offset, rows[i].bytes);
        enum epd_status status = wire_call(&wire, &message, fd);
        ck_assert_msg(status == rows[i].want, "row %zu: %s %s", i, status_name(status), wire.why);
        close(fd);
    }
    wire_close(&wire);
}
END_TEST

START_TEST(a_memfd_of_huge_pages_is_refused)
{
    const off_t bytes = 1 << 30; /* a multiple of every page size */
    int fd = memfd_create("huge", MFD_CLOEXEC | MFD_ALLOW_SEALING | MFD_HUGETLB);
    if (fd < 0) {
        ck_assert_msg(errno == EINVAL || errno == ENOSYS || errno == EOPNOTSUPP || errno == ENOENT, "%s",
                      strerror(errno));
        printf("SKIP: no huge pages in this kernel: %s\n", strerror(errno));
        return;
    }
    ck_assert(ftruncate(fd, bytes) == 0 && fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK) == 0);
    wire_open(&wire, here.daemon.socket_path);
    struct message message = wire_register_message(wire_join_alone(&wire, "huge"), 0, 4096);
    ck_assert_int_eq(wire_call(&wire, &message, fd), EPD_INVALID_ARGUMENT);
    ck_assert_msg(strstr(wire.why, "huge pages") != NULL, "%s", wire.why);
    wire_close(&wire);
    close(fd);
}
END_TEST

/* What the daemon gives away cannot be pulled from under it. */
START_TEST(the_daemons_own_memory_cannot_be_truncated_by_its_clients)
{
    ck_assert_int_eq(wire_connect(&wire, here.daemon.socket_path), 0);
    ck_assert_int_eq(wire_hello(&wire), EPD_OK);
    ck_assert_int_ne(ftruncate(wire.reply_fd, 0), 0); /* session page */
    const uint64_t group = wire_join_alone(&wire, "truncate");
    struct message alloc = wire_alloc_message(group, 65536), stats = {.kind = MESSAGE_STATS};
    ck_assert_int_eq(wire_call(&wire, &alloc, -1), EPD_OK);
    ck_assert_int_ne(ftruncate(wire.reply_fd, 0), 0); /* a buffer */
    ck_assert_int_ne(ftruncate(wire.reply_fd, 4096), 0);
    ck_assert_int_eq(wire_call(&wire, &stats, -1), EPD_OK);
    ck_assert_int_ne(ftruncate(wire.reply_fd, 0), 0); /* a document */
    wire_close(&wire);
}
END_TEST

/* ---- ids and ranges ---- */

static void expect(struct message message, enum epd_status want, const char *what)
{
    enum epd_status status = wire_call(&wire, &message, -1);
    ck_assert_msg(status == want, "%s: want %s, got %s: %s", what, status_name(want), status_name(status),
                  wire.why);
}

static struct message gemm_message(uint64_t group, uint64_t a, uint64_t b, uint64_t c, uint64_t splits,
                                   struct message_binding bindings[4])
{
    const struct message_binding rows[4] = {
        {.role = EPD_ROLE_A, .buffer_id = a, .dtype = EPD_F32, .n_dims = 2, .shape = {7, 16}},
        {.role = EPD_ROLE_B, .buffer_id = b, .dtype = EPD_F32, .n_dims = 3, .shape = {2, 8, 16}},
        {.role = EPD_ROLE_C, .buffer_id = c, .dtype = EPD_F32, .n_dims = 2, .shape = {7, 8}},
        {.role = EPD_ROLE_M_SPLITS, .buffer_id = splits, .dtype = EPD_I64, .n_dims = 1, .shape = {2}}};
    memcpy(bindings, rows, sizeof rows);
    return (struct message){.kind = MESSAGE_PLAN_CREATE,
                            .plan_create = {.group_id = group,
                                            .op = EPD_OP_GROUPED_GEMM,
                                            .layout = EPD_GEMM_TN,
                                            .n_bindings = 4,
                                            .bindings = bindings}};
}

START_TEST(ranges_that_leave_or_wrap_around_a_buffer_are_refused)
{
    struct message_binding b[4];
    wire_open(&wire, here.daemon.socket_path);
    const uint64_t group = wire_join_alone(&wire, "ranges");
    expect(wire_alloc_message(group, 4096), EPD_OK, "alloc");
    const uint64_t id = wire.reply.reply_buffer.buffer_id;
    expect(wire_alloc_message(group, INT64_MAX), EPD_INVALID_ARGUMENT, "alloc of everything");
    expect(wire_alloc_message(group, (uint64_t)1 << 62), EPD_NO_MEMORY, "alloc of a lot");
    static const uint64_t offsets[] = {4096, 4096 - 7 * 16 * 4 + 4, INT64_MAX - 511, (uint64_t)1 << 62};
    for (size_t i = 0; i < sizeof(offsets) / sizeof(offsets[0]); i++) {
        struct message plan = gemm_message(group, id, id, id, id, b);
        b[0].offset = offsets[i];
        expect(plan, EPD_OUT_OF_RANGE, "binding offset");
    }
    struct message plan = gemm_message(group, id, id, id, id, b);
    b[0].shape[0] = 1 << 24;
    ck_assert_int_ne(wire_call(&wire, &plan, -1), EPD_OK);
    wire_close(&wire);
}
END_TEST

START_TEST(ids_of_others_of_nobody_and_given_back_twice_are_refused)
{
    static struct wire other;
    struct message_binding b[4];
    wire_open(&wire, here.daemon.socket_path);
    wire_open(&other, here.daemon.socket_path);
    const uint64_t group = wire_join_alone(&wire, "mine"), theirs = wire_join_alone(&other, "theirs");
    expect(wire_alloc_message(group, 4096), EPD_OK, "alloc");
    const uint64_t id = wire.reply.reply_buffer.buffer_id;
    struct message alloc = wire_alloc_message(theirs, 4096), plan = wire_barrier_message(theirs);
    ck_assert_int_eq(wire_call(&other, &alloc, -1), EPD_OK);
    const uint64_t their_buffer = other.reply.reply_buffer.buffer_id;
    ck_assert_int_eq(wire_call(&other, &plan, -1), EPD_OK);
    const struct message_reply_plan their_plan = other.reply.reply_plan;

    expect(wire_alloc_message(theirs, 4096), EPD_FOREIGN_ID, "alloc in another's group");
    expect(wire_barrier_message(theirs), EPD_FOREIGN_ID, "plan in another's group");
    expect(wire_id_message(MESSAGE_GROUP_LEAVE, theirs), EPD_FOREIGN_ID, "leave for another");
    expect(wire_id_message(MESSAGE_BUFFER_RELEASE, their_buffer), EPD_FOREIGN_ID, "release for another");
    expect(wire_id_message(MESSAGE_PLAN_DESTROY, their_plan.plan_id), EPD_FOREIGN_ID, "destroy for another");
    expect(gemm_message(group, id, their_buffer, id, id, b), EPD_FOREIGN_ID, "another's buffer in a plan");
    expect(wire_id_message(MESSAGE_BUFFER_RELEASE, UINT64_MAX), EPD_UNKNOWN_ID, "largest id");
    expect(wire_id_message(MESSAGE_GROUP_LEAVE, 12345), EPD_UNKNOWN_ID, "group of nobody");

    expect(gemm_message(group, id, id, id, id, b), EPD_OK, "plan");
    const uint64_t bound = wire.reply.reply_plan.plan_id;
    expect(wire_id_message(MESSAGE_BUFFER_RELEASE, id), EPD_IN_USE, "release in use");
    expect(wire_id_message(MESSAGE_PLAN_DESTROY, bound), EPD_OK, "destroy");
    expect(wire_id_message(MESSAGE_PLAN_DESTROY, bound), EPD_UNKNOWN_ID, "destroy again");
    expect(wire_id_message(MESSAGE_BUFFER_RELEASE, id), EPD_OK, "release");
    expect(wire_id_message(MESSAGE_BUFFER_RELEASE, id), EPD_UNKNOWN_ID, "release again");

    (void)!wire_launch(&wire, &their_plan, 0); /* another's plan: there is no flag to answer on */
    ck_assert_int_ne(wire_wait_end(&wire), EPD_TIMEOUT);
    ck_assert_int_eq(wire_launch(&other, &their_plan, 1), 0);
    ck_assert_int_eq(wire_done(&other, &their_plan), EPD_OK);
    wire_close(&wire);
    wire_close(&other);
}
END_TEST

/* A session in two groups binds a plan of the one to a buffer of the other, and leaves that one first. */
START_TEST(a_buffer_lives_as_long_as_a_plan_of_another_group_is_bound_to_it)
{
    struct message_binding b[4];
    for (int round = 0; round < 3; round++) {
        wire_open(&wire, here.daemon.socket_path);
        const uint64_t first = wire_join_alone(&wire, "first"), second = wire_join_alone(&wire, "second");
        expect(wire_alloc_message(first, 4096), EPD_OK, "alloc");
        const uint64_t id = wire.reply.reply_buffer.buffer_id;
        expect(gemm_message(second, id, id, id, id, b), EPD_OK, "plan over the other group's buffer");
        const struct message_reply_plan plan = wire.reply.reply_plan;
        expect(wire_id_message(MESSAGE_GROUP_LEAVE, first), EPD_OK, "leave");
        expect(wire_id_message(MESSAGE_BUFFER_RELEASE, id), EPD_UNKNOWN_ID, "release of a buffer that went");
        expect(wire_alloc_message(second, 4096), EPD_OK, "alloc of memory that was free");
        wire.last_seq = 0; /* of the second group */
        ck_assert_int_eq(wire_launch(&wire, &plan, 1), 0);
        ck_assert_int_eq(wire_done(&wire, &plan), EPD_OK); /* splits are zero */
        if (round == 0)
            expect(wire_id_message(MESSAGE_PLAN_DESTROY, plan.plan_id), EPD_OK, "destroy");
        if (round == 1)
            expect(wire_id_message(MESSAGE_GROUP_LEAVE, second), EPD_OK, "leave");
        wire_close(&wire);
        ck_assert_int_ge(baseline_wait(&here.before, &here.daemon), 0);
    }
}
END_TEST

/* The page is the client's to write: the daemon may not trust a byte of it. */
START_TEST(a_page_full_of_garbage_harms_only_its_owner)
{
    wire_open(&wire, here.daemon.socket_path);
    const uint64_t group = wire_join_alone(&wire, "page");
    struct message plan = wire_barrier_message(group);
    ck_assert_int_eq(wire_call(&wire, &plan, -1), EPD_OK);
    const struct message_reply_plan reply = wire.reply.reply_plan;
    uint64_t seed = SEED;
    for (int n = 0; n < 200; n++) {
        unsigned char *bytes = (unsigned char *)wire.page;
        for (size_t i = 0; i < sizeof(struct page); i += 1 + values_random(&seed) % 64)
            bytes[i] = (unsigned char)values_random(&seed);
        atomic_store(&wire.page->plans[reply.flag_idx].ready, 1);
        struct message launch = {.kind = MESSAGE_LAUNCH,
                                 .launch = {.plan_id = reply.plan_id,
                                            .seq = n % 7 ? ++wire.last_seq : values_random(&seed),
                                            .n_tokens = n % 5 ? 0 : 1 << 20,
                                            .shape_hash = n % 3 ? reply.shape_hash : values_random(&seed),
                                            .n_repeats = n % 11 ? 1 : 1000}};
        if (n % 11 == 0)
            wire.last_seq += 999;
        if (wire_send(&wire, &launch, -1) != 0)
            break;
    }
    wire_close(&wire);
}
END_TEST

/* Each may be asked for, and together they are more than a number holds. */
START_TEST(sizes_whose_sum_overflows_are_refused_one_by_one)
{
    wire_open(&wire, here.daemon.socket_path);
    const uint64_t group = wire_join_alone(&wire, "sum");
    for (int n = 0; n < 4; n++) {
        struct message alloc = wire_alloc_message(group, INT64_MAX);
        ck_assert_int_eq(wire_send(&wire, &alloc, -1), 0);
    }
    for (int n = 0; n < 4; n++) {
        ck_assert_int_eq(wire_receive(&wire, WIRE_DEADLINE_MS), WIRE_MESSAGE);
        ck_assert_int_eq(wire.reply.kind, MESSAGE_REPLY_ERROR);
    }
    struct message small = wire_alloc_message(group, 4096);
    ck_assert_msg(wire_call(&wire, &small, -1) == EPD_OK, "%s", wire.why);
    wire_close(&wire);
}
END_TEST

/* While such sizes are asked for a plan is made, and what it holds is counted beside them, whether or not it may be. */
START_TEST(what_a_plan_holds_is_counted_beside_sizes_that_nobody_has)
{
    struct message_binding bindings[] = {
        {.role = EPD_ROLE_X, .offset = 65536, .dtype = EPD_F32, .n_dims = 2, .shape = {8, 32}},
        {.role = EPD_ROLE_TOPK_IDX, .dtype = EPD_I64, .n_dims = 2, .shape = {8, 2}},
        {.role = EPD_ROLE_RECV_X, .offset = 4096, .dtype = EPD_F32, .n_dims = 2, .shape = {64, 32}},
        {.role = EPD_ROLE_M_SPLITS, .offset = 2048, .dtype = EPD_I64, .n_dims = 1, .shape = {4}}};
    wire_open(&wire, here.daemon.socket_path);
    const uint64_t group = wire_join_alone(&wire, "beside");
    struct message buffer = wire_alloc_message(group, 72 * 1024), huge = wire_alloc_message(group, INT64_MAX);
    ck_assert_msg(wire_call(&wire, &buffer, -1) == EPD_OK, "%s", wire.why);
    json_t *clients = control_ask(here.daemon.control_path, CONTROL_CLIENTS, NULL);
    const long long held = control_sum(clients, "sessions", "heap_bytes");
    json_decref(clients);
    struct message rest = wire_alloc_message(group, INT64_MAX - (uint64_t)held);
    for (int i = 0; i < 4; i++)
        bindings[i].buffer_id = wire.reply.reply_buffer.buffer_id;
    struct message plan = {
        .kind = MESSAGE_PLAN_CREATE,
        .plan_create = {.group_id = group, .op = EPD_OP_DISPATCH, .n_bindings = 4, .bindings = bindings}};
    const pid_t worker = daemon_worker(&here.daemon);
    ck_assert_int_eq(kill(worker, SIGSTOP), 0); /* so that it reads all of them at once */
    ck_assert_int_eq(wire_send(&wire, &plan, -1), 0);
    ck_assert_int_eq(wire_send(&wire, &huge, -1), 0);
    ck_assert_int_eq(wire_send(&wire, &rest, -1), 0);
    ck_assert_int_eq(kill(worker, SIGCONT), 0);
    for (int n = 0; n < 3; n++)
        ck_assert_int_eq(wire_receive(&wire, WIRE_DEADLINE_MS), WIRE_MESSAGE);
    struct message small = wire_alloc_message(group, 4096);
    ck_assert_msg(wire_call(&wire, &small, -1) == EPD_OK, "%s", wire.why);
    ck_assert_int_eq(daemon_worker(&here.daemon), worker);
    wire_close(&wire);
}
END_TEST

int main(void)
{
    const TTest *const tests[] = {
        an_unexpected_fd_and_more_than_one_fd_close_the_session_and_none_stays_open,
        a_wrong_kind_of_fd_is_refused_and_the_session_lives,
        a_memfd_that_could_shrink_or_is_too_short_or_read_only_is_refused,
        a_memfd_of_huge_pages_is_refused,
        the_daemons_own_memory_cannot_be_truncated_by_its_clients,
        ranges_that_leave_or_wrap_around_a_buffer_are_refused,
        ids_of_others_of_nobody_and_given_back_twice_are_refused,
        a_buffer_lives_as_long_as_a_plan_of_another_group_is_bound_to_it,
        a_page_full_of_garbage_harms_only_its_owner,
        sizes_whose_sum_overflows_are_refused_one_by_one,
        what_a_plan_holds_is_counted_beside_sizes_that_nobody_has,
    };
    return suite_run("handles", tests, SUITE_COUNT(tests), start, stop);
}
