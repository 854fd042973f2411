/* Clients that break the rules of the wire: bytes, sizes, states, versions, numbers. Only the one that does it is closed or
 * answered with an error; the ranks beside it never notice and nothing leaks. */
#include <check.h>
#include <fcntl.h>
#include <string.h>
#include <unistd.h>

#include "proto/codec.h"
#include "tests/fault/control.h"
#include "tests/fault/suite.h"
#include "tests/fault/undisturbed.h"
#include "tests/fault/wire.h"
#include "tests/golden/samples.h"
#include "tests/reference/values.h"

#define N_RANDOM_DATAGRAMS 1500
#define SEED               12

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
        try_datagram(n % 5 ? here.daemon.socket_path : here.daemon.control_path, n % 5 && n % 3, datagram,
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
            try_datagram(here.daemon.socket_path, 1, datagram, cut);
            if (kind != MESSAGE_CONTROL)
                try_datagram(here.daemon.control_path, 0, datagram, cut);
        }
    }
}
END_TEST

START_TEST(an_oversized_datagram_closes_its_session_with_the_reason)
{
    static unsigned char datagram[EPD_MAX_DATAGRAM_BYTES + 1];
    wire_open(&wire, here.daemon.socket_path);
    ck_assert_int_eq(wire_send_bytes(&wire, datagram, sizeof datagram, NULL, 0), 0);
    ck_assert_int_eq(wire_wait_end(&wire), EPD_PROTOCOL);
    ck_assert_msg(strstr(wire.why, "longer") != NULL, "%s", wire.why);
    wire_close(&wire);
    json_t *stats = control_ask(here.daemon.control_path, CONTROL_STATS, NULL);
    ck_assert_int_eq(control_number(stats, "sessions.closed.oversized"), 1);
    json_decref(stats);
}
END_TEST

START_TEST(a_datagram_of_zero_length_ends_only_its_sender)
{
    int null = open("/dev/null", O_RDWR | O_CLOEXEC);
    wire_open(&wire, here.daemon.socket_path);
    ck_assert_int_eq(wire_send_bytes(&wire, "", 0, NULL, 0), 0);
    ck_assert_int_eq(wire_wait_end(&wire), EPD_DISCONNECTED);
    wire_close(&wire);
    wire_open(&wire, here.daemon.socket_path);
    ck_assert_int_eq(wire_send_bytes(&wire, "", 0, &null, 1), 0);
    ck_assert_int_eq(wire_wait_end(&wire), EPD_DISCONNECTED);
    wire_close(&wire);
    close(null);
}
END_TEST

/* ---- states and versions ---- */

static enum epd_status call_once(struct message *message, int greeted)
{
    ck_assert_int_eq(wire_connect(&wire, here.daemon.socket_path), 0);
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
    ck_assert_int_eq(wire_connect(&wire, here.daemon.control_path), 0);
    ck_assert_int_eq(wire_call(&wire, &stats, -1), EPD_PROTOCOL);
    wire_close(&wire);
}
END_TEST

static enum epd_status greet_as(uint32_t major, uint32_t minor)
{
    struct message hello = {.kind = MESSAGE_HELLO, .hello = {.major = major, .minor = minor}};
    ck_assert_int_eq(wire_connect(&wire, here.daemon.socket_path), 0);
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
        ck_assert_int_eq(wire_connect(&wire, here.daemon.socket_path), 0);
        ck_assert_int_eq(
            wire_send_bytes(&wire, datagram, bytes + (newer ? sizeof unknown_field : 0), NULL, 0), 0);
        ck_assert_int_eq(wire_receive(&wire, WIRE_DEADLINE_MS), WIRE_MESSAGE);
        ck_assert_msg(wire.reply.kind == MESSAGE_REPLY_HELLO, "newer %d: %s", newer, wire.why);
        ck_assert_uint_eq(wire.reply.reply_hello.major, EPD_PROTOCOL_MAJOR);
        wire_close(&wire);
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
        wire_open(&wire, here.daemon.socket_path);
        ck_assert_int_eq(wire_send_bytes(&wire, rows[i].bytes, rows[i].n, NULL, 0), 0);
        ck_assert_int_eq(wire_wait_end(&wire), EPD_PROTOCOL);
        ck_assert_msg(strncmp(wire.why, rows[i].field, strcspn(rows[i].field, " ")) == 0, "%s: %s",
                      rows[i].field, wire.why);
        wire_close(&wire);
    }
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
        numbers_out_of_the_schemas_range_close_the_session_with_the_field,
    };
    return suite_run("hostile", tests, SUITE_COUNT(tests), start, stop);
}
