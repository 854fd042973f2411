/* Clients that break the rules of the wire: bytes, sizes, states, fds, ids, versions. Only the one that does
 * it is closed or answered with an error; the ranks beside it never notice and nothing leaks. */
#include <check.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include "proto/codec.h"
#include "tests/fault/baseline.h"
#include "tests/fault/bystander.h"
#include "tests/fault/control.h"
#include "tests/fault/suite.h"
#include "tests/fault/wire.h"
#include "tests/golden/samples.h"
#include "tests/reference/values.h"

#define N_RANDOM_DATAGRAMS 1500
#define SEED               12

static struct daemon_process epd_daemon;
static struct bystander bystander;
static struct baseline before;
static struct wire wire; /* large */

/* Every test here runs beside two working ranks and ends at the baseline. */
static void start(void)
{
    const char *const quiet[] = {"--log-level", "warn", NULL};
    daemon_start(&epd_daemon, 2, quiet);
    bystander_start(&bystander, epd_daemon.socket_path);
    wire_open(&wire, epd_daemon.socket_path);
    (void)wire_join_alone(&wire, "warm");
    wire_close(&wire);
    baseline_take(&before, &epd_daemon);
}

static void stop(void)
{
    ck_assert_int_ge(baseline_wait(&before, &epd_daemon), 0);
    bystander_stop(&bystander);
    daemon_stop(&epd_daemon);
}

/* ---- bytes ---- */

/* One datagram to a fresh session, and whatever follows: replies, an error, the end - but no silence when a
 * question that decodes gets none. The session then hangs up. */
static void try_datagram(const char *path, int greeted, const void *datagram, size_t bytes)
{
    ck_assert_int_eq(wire_connect(&wire, path), 0);
    if (greeted)
        ck_assert_int_eq(wire_hello(&wire), EPD_OK);
    if (wire_send_bytes(&wire, datagram, bytes, NULL, 0) == 0)
        while (wire_receive(&wire, 1) == WIRE_MESSAGE)
            ;
    wire_close(&wire);
}

static void random_bytes(unsigned char *datagram, size_t *bytes, uint64_t *seed)
{
    *bytes = 1 + values_random(seed) % (values_random(seed) % 8 ? 64 : 4096);
    for (size_t i = 0; i < *bytes; i++)
        datagram[i] = (unsigned char)values_random(seed);
}

/* A message of the schema with a few bytes changed, cut or repeated. */
static void mutated_bytes(unsigned char *datagram, size_t *bytes, uint64_t *seed)
{
    static struct sample sample;
    struct epd_error error;
    sample_typical((enum message_kind)(1 + values_random(seed) % MESSAGE_CONTROL), &sample);
    ck_assert_int_eq(codec_encode(&sample.message, datagram, bytes, &error), EPD_OK);
    for (unsigned n = 1 + (unsigned)(values_random(seed) % 4); n; n--)
        datagram[values_random(seed) % *bytes] ^= (unsigned char)(1u << values_random(seed) % 8);
    if (values_random(seed) % 4 == 0)
        *bytes = 1 + values_random(seed) % *bytes;
}

START_TEST(random_and_mutated_datagrams_end_only_their_sender)
{
    static unsigned char datagram[EPD_MAX_DATAGRAM_BYTES];
    uint64_t seed = SEED;
    for (int n = 0; n < N_RANDOM_DATAGRAMS / SANITIZER_FACTOR; n++) {
        size_t bytes;
        if (n % 2)
            random_bytes(datagram, &bytes, &seed);
        else
            mutated_bytes(datagram, &bytes, &seed);
        try_datagram(n % 5 ? epd_daemon.socket_path : epd_daemon.control_path, n % 5 && n % 3, datagram,
                     bytes);
    }
}
END_TEST

START_TEST(every_cut_of_every_message_is_refused_or_answered)
{
    static struct sample sample;
    static unsigned char datagram[EPD_MAX_DATAGRAM_BYTES];
    struct epd_error error;
    for (int kind = MESSAGE_NONE + 1; kind < MESSAGE_KIND_COUNT; kind++) {
        size_t bytes;
        sample_typical((enum message_kind)kind, &sample);
        if (sample.message.kind == MESSAGE_CONTROL && sample.message.control.verb == CONTROL_DRAIN)
            sample.message.control.verb = CONTROL_STATUS; /* the daemon is to stay */
        ck_assert_int_eq(codec_encode(&sample.message, datagram, &bytes, &error), EPD_OK);
        const size_t step = bytes > 64 ? bytes / 32 : 1;
        for (size_t cut = 1; cut <= bytes; cut += step) {
            try_datagram(epd_daemon.socket_path, 1, datagram, cut);
            if (kind != MESSAGE_CONTROL)
                try_datagram(epd_daemon.control_path, 0, datagram, cut);
        }
    }
}
END_TEST

START_TEST(an_oversized_datagram_closes_its_session_with_the_reason)
{
    static unsigned char datagram[EPD_MAX_DATAGRAM_BYTES + 1];
    wire_open(&wire, epd_daemon.socket_path);
    ck_assert_int_eq(wire_send_bytes(&wire, datagram, sizeof datagram, NULL, 0), 0);
    ck_assert_int_eq(wire_wait_end(&wire), EPD_PROTOCOL);
    ck_assert_msg(strstr(wire.why, "longer") != NULL, "%s", wire.why);
    wire_close(&wire);
    json_t *stats = control_ask(epd_daemon.control_path, CONTROL_STATS, NULL);
    ck_assert_int_eq(control_number(stats, "sessions.closed.oversized"), 1);
    json_decref(stats);
}
END_TEST

START_TEST(a_datagram_of_zero_length_ends_only_its_sender)
{
    int null = open("/dev/null", O_RDWR | O_CLOEXEC);
    wire_open(&wire, epd_daemon.socket_path);
    ck_assert_int_eq(wire_send_bytes(&wire, "", 0, NULL, 0), 0);
    ck_assert_int_eq(wire_wait_end(&wire), EPD_DISCONNECTED);
    wire_close(&wire);
    wire_open(&wire, epd_daemon.socket_path);
    ck_assert_int_eq(wire_send_bytes(&wire, "", 0, &null, 1), 0);
    ck_assert_int_eq(wire_wait_end(&wire), EPD_DISCONNECTED);
    wire_close(&wire);
    close(null);
}
END_TEST

/* ---- states and versions ---- */

static enum epd_status call_once(struct message *message, int greeted)
{
    ck_assert_int_eq(wire_connect(&wire, epd_daemon.socket_path), 0);
    if (greeted)
        ck_assert_int_eq(wire_hello(&wire), EPD_OK);
    enum epd_status status = wire_call(&wire, message, -1);
    wire_close(&wire);
    return status;
}

START_TEST(messages_out_of_their_state_close_the_session)
{
    struct message join = wire_join_message("state", 1, 0), stats = {.kind = MESSAGE_STATS};
    struct message control = {.kind = MESSAGE_CONTROL, .control = {.verb = CONTROL_STATUS}};
    struct message hello = {.kind = MESSAGE_HELLO, .hello = {.major = EPD_PROTOCOL_MAJOR}};
    ck_assert_int_eq(call_once(&join, 0), EPD_PROTOCOL);    /* before Hello */
    ck_assert_int_eq(call_once(&hello, 1), EPD_PROTOCOL);   /* a second one */
    ck_assert_int_eq(call_once(&control, 1), EPD_PROTOCOL); /* on the wrong socket */
    ck_assert_int_eq(wire_connect(&wire, epd_daemon.control_path), 0);
    ck_assert_int_eq(wire_call(&wire, &stats, -1), EPD_PROTOCOL);
    wire_close(&wire);
}
END_TEST

static enum epd_status greet_as(uint32_t major, uint32_t minor)
{
    struct message hello = {.kind = MESSAGE_HELLO, .hello = {.major = major, .minor = minor}};
    ck_assert_int_eq(wire_connect(&wire, epd_daemon.socket_path), 0);
    return wire_call(&wire, &hello, -1);
}

START_TEST(another_minor_version_is_negotiated_and_another_major_refused_with_both)
{
    ck_assert_int_eq(greet_as(EPD_PROTOCOL_MAJOR, 77), EPD_OK); /* a newer client */
    ck_assert_uint_eq(wire.reply.reply_hello.minor, EPD_PROTOCOL_MINOR);
    wire_close(&wire);
    for (uint32_t major = EPD_PROTOCOL_MAJOR + 1; major < 4; major++) {
        char want[32];
        snprintf(want, sizeof want, "%u.9", major);
        ck_assert_int_eq(greet_as(major, 9), EPD_VERSION_MISMATCH);
        ck_assert_msg(strstr(wire.why, want) && strstr(wire.why, "1.0"), "%s", wire.why);
        ck_assert_int_eq(wire_wait_end(&wire), EPD_VERSION_MISMATCH);
        wire_close(&wire);
    }
}
END_TEST

/* hello.bin of an earlier build, byte for byte; and the Hello of a later one, with a field that nobody here
 * knows (number 2047, a varint). */
START_TEST(the_hello_of_an_older_and_of_a_newer_client_is_understood)
{
    static const unsigned char unknown_field[] = {0xf8, 0x7f, 0x2a};
    unsigned char datagram[512];
    FILE *file = fopen(GOLDEN_DIRECTORY "/hello.bin", "rb");
    ck_assert_ptr_nonnull(file);
    size_t bytes = fread(datagram, 1, sizeof datagram - sizeof unknown_field, file);
    fclose(file);
    memcpy(datagram + bytes, unknown_field, sizeof unknown_field);
    for (int newer = 0; newer < 2; newer++) {
        ck_assert_int_eq(wire_connect(&wire, epd_daemon.socket_path), 0);
        ck_assert_int_eq(
            wire_send_bytes(&wire, datagram, bytes + (newer ? sizeof unknown_field : 0), NULL, 0), 0);
        ck_assert_int_eq(wire_receive(&wire, WIRE_DEADLINE_MS), WIRE_MESSAGE);
        ck_assert_msg(wire.reply.kind == MESSAGE_REPLY_HELLO, "newer %d: %s", newer, wire.why);
        ck_assert_uint_eq(wire.reply.reply_hello.major, EPD_PROTOCOL_MAJOR);
        wire_close(&wire);
    }
}
END_TEST

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
    ck_assert_int_eq(wire_connect(&wire, epd_daemon.socket_path), 0);
    ck_assert_int_eq(wire_call(&wire, &hello, fds[0]), EPD_PROTOCOL); /* Hello takes none */
    wire_close(&wire);
    hello.request_id = 1;
    ck_assert_int_eq(codec_encode(&hello, datagram, &bytes, &error), EPD_OK);
    static const unsigned counts[] = {2, 3, 16, 200};
    for (int round = 0; round < 20; round++) {
        ck_assert_int_eq(wire_connect(&wire, epd_daemon.socket_path), 0);
        ck_assert_int_eq(wire_send_bytes(&wire, datagram, bytes, fds, counts[round % 4]), 0);
        ck_assert_int_eq(wire_wait_end(&wire), EPD_PROTOCOL);
        wire_close(&wire);
    }
    /* many sent before the daemon can close: they die with the socket's queue */
    ck_assert_int_eq(wire_connect(&wire, epd_daemon.socket_path), 0);
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
    wire_open(&wire, epd_daemon.socket_path);
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
    wire_open(&wire, epd_daemon.socket_path);
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
    wire_open(&wire, epd_daemon.socket_path);
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
    ck_assert_int_eq(wire_connect(&wire, epd_daemon.socket_path), 0);
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
    wire_open(&wire, epd_daemon.socket_path);
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
    wire_open(&wire, epd_daemon.socket_path);
    wire_open(&other, epd_daemon.socket_path);
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
        wire_open(&wire, epd_daemon.socket_path);
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
        ck_assert_int_ge(baseline_wait(&before, &epd_daemon), 0);
    }
}
END_TEST

/* Values that the encoder here refuses to send, as bytes: Datagram {request_id 1, <body> {field value}}. */
START_TEST(numbers_out_of_the_schemas_range_close_the_session_with_the_field)
{
    static const struct {
        const char *field;
        unsigned char bytes[24];
        size_t n;
    } rows[] = {
        {"hello major", {0x08, 1, 0x1a, 2, 0x08, 0}, 6},
        {"buffer_release id", {0x08, 1, 0x42, 2, 0x08, 0}, 6},
        {"buffer_alloc bytes",
         {0x08, 1, 0x32, 13, 0x08, 1, 0x10, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01},
         17},
        {"plan_create op", {0x08, 1, 0x4a, 4, 0x08, 1, 0x10, 99}, 8},
        {"launch n_repeats", {0x12, 2, 0x28, 0}, 4},
    };
    for (size_t i = 0; i < sizeof(rows) / sizeof(rows[0]); i++) {
        wire_open(&wire, epd_daemon.socket_path);
        ck_assert_int_eq(wire_send_bytes(&wire, rows[i].bytes, rows[i].n, NULL, 0), 0);
        ck_assert_int_eq(wire_wait_end(&wire), EPD_PROTOCOL);
        ck_assert_msg(strncmp(wire.why, rows[i].field, strcspn(rows[i].field, " ")) == 0, "%s: %s",
                      rows[i].field, wire.why);
        wire_close(&wire);
    }
}
END_TEST

/* The page is the client's to write: the daemon may not trust a byte of it. */
START_TEST(a_page_full_of_garbage_harms_only_its_owner)
{
    wire_open(&wire, epd_daemon.socket_path);
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
    wire_open(&wire, epd_daemon.socket_path);
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

int main(void)
{
    const TTest *const tests[] = {
        random_and_mutated_datagrams_end_only_their_sender,
        every_cut_of_every_message_is_refused_or_answered,
        an_oversized_datagram_closes_its_session_with_the_reason,
        a_datagram_of_zero_length_ends_only_its_sender,
        messages_out_of_their_state_close_the_session,
        another_minor_version_is_negotiated_and_another_major_refused_with_both,
        the_hello_of_an_older_and_of_a_newer_client_is_understood,
        an_unexpected_fd_and_more_than_one_fd_close_the_session_and_none_stays_open,
        a_wrong_kind_of_fd_is_refused_and_the_session_lives,
        a_memfd_that_could_shrink_or_is_too_short_or_read_only_is_refused,
        a_memfd_of_huge_pages_is_refused,
        the_daemons_own_memory_cannot_be_truncated_by_its_clients,
        ranges_that_leave_or_wrap_around_a_buffer_are_refused,
        ids_of_others_of_nobody_and_given_back_twice_are_refused,
        a_buffer_lives_as_long_as_a_plan_of_another_group_is_bound_to_it,
        numbers_out_of_the_schemas_range_close_the_session_with_the_field,
        a_page_full_of_garbage_harms_only_its_owner,
        sizes_whose_sum_overflows_are_refused_one_by_one,
    };
    return suite_run("hostile", tests, SUITE_COUNT(tests), start, stop);
}
