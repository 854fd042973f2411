/* The committed datagrams decode to what they were made from and encode to the same bytes: the wire does not
 * drift. */
#include <check.h>
#include <stdio.h>
#include <stdlib.h>

#include "tests/golden/samples.h"
#include "tests/unit/proto/suite.h"

static size_t read_golden(enum message_kind kind, unsigned char *datagram)
{
    char path[4096];

    snprintf(path, sizeof path, "%s/%s.bin", EPD_GOLDEN_DIR, message_kind_name(kind));
    FILE *file = fopen(path, "rb");
    ck_assert_msg(file != NULL, "%s cannot be opened", path);
    size_t bytes = fread(datagram, 1, EPD_MAX_DATAGRAM_BYTES, file);
    fclose(file);
    return bytes;
}

START_TEST(golden_datagrams_decode_to_the_message_they_were_made_from)
{
    enum message_kind kind = (enum message_kind)_i;
    static unsigned char datagram[EPD_MAX_DATAGRAM_BYTES];
    static struct sample sample;
    struct arena arena;
    struct message message;
    struct epd_error error;
    size_t bytes = read_golden(kind, datagram);

    ck_assert_int_eq(arena_init(&arena, EPD_MAX_ARENA_BYTES), EPD_OK);
    sample_typical(kind, &sample);
    enum epd_status status = codec_decode(sample_side(kind), datagram, bytes, &arena, &message, &error);
    ck_assert_msg(status == EPD_OK, "%s: %s", message_kind_name(kind), error.text);
    ck_assert_msg(sample_equal(&message, &sample.message), "%s decodes differently", message_kind_name(kind));
    arena_fini(&arena);
}
END_TEST

START_TEST(messages_encode_to_the_golden_bytes)
{
    enum message_kind kind = (enum message_kind)_i;
    static unsigned char golden[EPD_MAX_DATAGRAM_BYTES], datagram[EPD_MAX_DATAGRAM_BYTES];
    static struct sample sample;
    struct epd_error error;
    size_t want = read_golden(kind, golden), bytes;

    sample_typical(kind, &sample);
    ck_assert_int_eq(codec_encode(&sample.message, datagram, &bytes, &error), EPD_OK);
    ck_assert_uint_eq(bytes, want);
    ck_assert_mem_eq(datagram, golden, want);
}
END_TEST

int main(void)
{
    TCase *tcase = tcase_create("golden");

    tcase_add_loop_test(tcase, golden_datagrams_decode_to_the_message_they_were_made_from, MESSAGE_NONE + 1,
                        MESSAGE_KIND_COUNT);
    tcase_add_loop_test(tcase, messages_encode_to_the_golden_bytes, MESSAGE_NONE + 1, MESSAGE_KIND_COUNT);
    return suite_run("golden", tcase);
}
