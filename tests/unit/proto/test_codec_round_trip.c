/* What is encoded comes back: every kind with typical, least and most values. */
#include <stdlib.h>
#include <string.h>

#include "proto/codec_wire.h"
#include "tests/golden/samples.h"
#include "tests/unit/proto/suite.h"

typedef void (*sample_fill)(enum message_kind kind, struct sample *sample);

static void expect_round_trip(enum message_kind kind, sample_fill fill)
{
    static struct sample sample;
    static unsigned char datagram[EPD_MAX_DATAGRAM_BYTES], again[EPD_MAX_DATAGRAM_BYTES];
    struct arena arena;
    struct message message;
    struct epd_error error;
    size_t bytes, again_bytes;

    memset(&message, 0xa5, sizeof message); /* nothing may be left of what was there before */
    ck_assert_int_eq(arena_init(&arena, EPD_MAX_ARENA_BYTES), EPD_OK);
    fill(kind, &sample);
    enum epd_status status = codec_encode(&sample.message, datagram, &bytes, &error);
    ck_assert_msg(status == EPD_OK, "%s does not encode: %s", message_kind_name(kind), error.text);
    status = codec_decode(sample_side(kind), datagram, bytes, &arena, &message, &error);
    ck_assert_msg(status == EPD_OK, "%s does not decode: %s", message_kind_name(kind), error.text);
    ck_assert_msg(sample_equal(&message, &sample.message), "%s comes back changed", message_kind_name(kind));
    ck_assert_int_eq(codec_encode(&message, again, &again_bytes, &error), EPD_OK);
    ck_assert_uint_eq(again_bytes, bytes);
    ck_assert_mem_eq(again, datagram, bytes);
    arena_fini(&arena);
}

START_TEST(typical_values_of_every_kind_come_back)
{
    expect_round_trip((enum message_kind)_i, sample_typical);
}
END_TEST

START_TEST(least_values_of_every_kind_come_back)
{
    expect_round_trip((enum message_kind)_i, sample_least);
}
END_TEST

START_TEST(most_values_of_every_kind_come_back)
{
    expect_round_trip((enum message_kind)_i, sample_most);
}
END_TEST

START_TEST(broken_runs_of_parts_keep_their_order)
{
    static const uint32_t parts[] = {0, 1, 5, 6, 7, 2, 2, 3};
    static struct sample sample;
    static unsigned char datagram[EPD_MAX_DATAGRAM_BYTES];
    struct arena arena;
    struct message message;
    struct epd_error error;
    size_t bytes;

    ck_assert_int_eq(arena_init(&arena, EPD_MAX_ARENA_BYTES), EPD_OK);
    sample_least(MESSAGE_PLAN_CREATE, &sample);
    for (uint32_t i = 0; i < sizeof parts / sizeof parts[0]; i++) {
        struct message_binding *binding = &sample.bindings[sample.message.plan_create.n_bindings++];
        binding->role = EPD_ROLE_W1;
        binding->n_parts = 8;
        binding->part_idx = parts[i];
        binding->buffer_id = i + 1;
        binding->dtype = i < 2 ? EPD_F32 : EPD_BF16;
        binding->n_dims = 2;
        binding->shape[0] = 3;
        binding->shape[1] = i == 7 ? 5 : 4;
    }
    ck_assert_int_eq(codec_encode(&sample.message, datagram, &bytes, &error), EPD_OK);
    ck_assert_int_eq(codec_decode(CODEC_FROM_CLIENT, datagram, bytes, &arena, &message, &error), EPD_OK);
    ck_assert(sample_equal(&message, &sample.message));
    arena_fini(&arena);
}
END_TEST

START_TEST(a_buffer_may_name_the_device_of_its_memfd)
{
    static struct sample sample;
    unsigned char datagram[512];
    struct arena arena;
    struct message message;
    struct epd_error error;
    size_t bytes;

    ck_assert_int_eq(arena_init(&arena, EPD_MAX_ARENA_BYTES), EPD_OK);
    sample_least(MESSAGE_BUFFER_REGISTER, &sample);
    sample.message.buffer_register.device_uuid[15] = 9;
    ck_assert_int_eq(codec_encode(&sample.message, datagram, &bytes, &error), EPD_OK);
    ck_assert_int_eq(codec_decode(CODEC_FROM_CLIENT, datagram, bytes, &arena, &message, &error), EPD_OK);
    ck_assert(sample_equal(&message, &sample.message));
    arena_fini(&arena);
}
END_TEST

/* With a request id it goes the way of all messages: two bytes of it, then the same. */
START_TEST(a_launch_has_the_bytes_of_the_general_packer)
{
    static const uint64_t values[] = {0, 1, 127, 128, 16383, 16384, 0xffffffff, 1ull << 56, UINT64_MAX};
    const size_t n = sizeof values / sizeof values[0];
    unsigned char quick[64], general[64];
    struct epd_error error;

    for (size_t i = 0; i < n * n; i++) {
        struct message message = {.kind = MESSAGE_LAUNCH,
                                  .launch = {.plan_id = values[i / n],
                                             .seq = values[i % n],
                                             .n_tokens = (uint32_t)values[(i + 3) % n],
                                             .shape_hash = values[(i / n + 5) % n],
                                             .n_repeats = (uint32_t)values[(i + 7) % n]}};
        size_t quick_bytes, general_bytes;

        ck_assert_int_eq(wire_encode(&message, quick, &quick_bytes, &error), EPD_OK);
        message.request_id = 1;
        ck_assert_int_eq(wire_encode(&message, general, &general_bytes, &error), EPD_OK);
        ck_assert_uint_eq(quick_bytes, general_bytes - 2);
        ck_assert_mem_eq(quick, general + 2, quick_bytes);
    }
}
END_TEST

int main(void)
{
    TCase *tcase = tcase_create("codec_round_trip");

    tcase_add_loop_test(tcase, typical_values_of_every_kind_come_back, MESSAGE_NONE + 1, MESSAGE_KIND_COUNT);
    tcase_add_loop_test(tcase, least_values_of_every_kind_come_back, MESSAGE_NONE + 1, MESSAGE_KIND_COUNT);
    tcase_add_loop_test(tcase, most_values_of_every_kind_come_back, MESSAGE_NONE + 1, MESSAGE_KIND_COUNT);
    tcase_add_test(tcase, broken_runs_of_parts_keep_their_order);
    tcase_add_test(tcase, a_buffer_may_name_the_device_of_its_memfd);
    tcase_add_test(tcase, a_launch_has_the_bytes_of_the_general_packer);
    return suite_run("codec_round_trip", tcase);
}
