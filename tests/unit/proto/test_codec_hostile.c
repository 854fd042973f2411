/* Datagrams of a peer that is broken or means harm: cut, random, stuffed, deep. Nothing may crash, read past
 * the end, or take more memory than the arena. */
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "tests/golden/samples.h"
#include "tests/unit/proto/suite.h"

/* Memory that ends where an unreadable page begins: a read past the datagram is a fault. */
struct guarded {
    unsigned char *map, *end;
    size_t map_bytes;
};

static void guarded_init(struct guarded *guarded)
{
    size_t page = (size_t)sysconf(_SC_PAGESIZE);

    guarded->map_bytes = EPD_MAX_DATAGRAM_BYTES + page;
    guarded->map = mmap(NULL, guarded->map_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    ck_assert_ptr_ne(guarded->map, MAP_FAILED);
    guarded->end = guarded->map + EPD_MAX_DATAGRAM_BYTES;
    ck_assert_int_eq(mprotect(guarded->end, page, PROT_NONE), 0);
}

static void guarded_fini(struct guarded *guarded)
{
    munmap(guarded->map, guarded->map_bytes);
}

static enum epd_status decode_guarded(struct guarded *guarded, enum codec_side side, const void *datagram,
                                      size_t bytes, struct arena *arena, struct message *message)
{
    struct epd_error error = {0};

    memcpy(guarded->end - bytes, datagram, bytes);
    enum epd_status status = codec_decode(side, guarded->end - bytes, bytes, arena, message, &error);
    ck_assert(status == EPD_OK || status == EPD_PROTOCOL);
    if (status != EPD_OK) {
        ck_assert_int_eq(message->kind, MESSAGE_NONE);
        ck_assert(error.text[0] != 0 && strlen(error.text) < sizeof error.text);
    }
    return status;
}

START_TEST(datagrams_cut_at_every_byte_do_no_harm)
{
    enum message_kind kind = (enum message_kind)_i;
    static struct sample sample;
    static unsigned char datagram[EPD_MAX_DATAGRAM_BYTES];
    struct guarded guarded;
    struct arena arena;
    struct message message;
    struct epd_error error;
    size_t bytes;

    guarded_init(&guarded);
    ck_assert_int_eq(arena_init(&arena, EPD_MAX_ARENA_BYTES), EPD_OK);
    for (int most = 0; most < 2; most++) {
        if (most)
            sample_most(kind, &sample);
        else
            sample_typical(kind, &sample);
        ck_assert_int_eq(codec_encode(&sample.message, datagram, &bytes, &error), EPD_OK);
        /* Every cut of small datagrams; of a large one each of the first and last, and some between. */
        for (size_t cut = 0; cut < bytes; cut += cut < 2000 || bytes - cut < 2000 ? 1 : 61) {
            enum epd_status status =
                decode_guarded(&guarded, sample_side(kind), datagram, cut, &arena, &message);
            /* Where a cut falls between two fields the rest may be a message, but never the same one. */
            ck_assert(status != EPD_OK || !sample_equal(&message, &sample.message));
        }
    }
    arena_fini(&arena);
    guarded_fini(&guarded);
}
END_TEST

/* xorshift64: the same bytes in every run. */
static uint64_t next_random(uint64_t *state)
{
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    return *state;
}

START_TEST(random_bytes_do_no_harm)
{
    struct guarded guarded;
    struct arena arena;
    struct message message;
    unsigned char datagram[256];
    uint64_t random = 0x9e3779b97f4a7c15;

    guarded_init(&guarded);
    ck_assert_int_eq(arena_init(&arena, EPD_MAX_ARENA_BYTES), EPD_OK);
    for (int i = 0; i < 100000; i++) {
        size_t bytes = next_random(&random) % sizeof datagram;
        for (size_t b = 0; b < bytes; b++)
            datagram[b] = (unsigned char)next_random(&random);
        (void)decode_guarded(&guarded, (enum codec_side)(1 + i % 3), datagram, bytes, &arena, &message);
    }
    arena_fini(&arena);
    guarded_fini(&guarded);
}
END_TEST

/* Changes, inserts or deletes one to four bytes. */
static size_t mutate(unsigned char *datagram, size_t bytes, uint64_t *random)
{
    for (uint64_t n = 1 + next_random(random) % 4; n > 0 && bytes > 1; n--) {
        size_t at = next_random(random) % bytes;

        switch (next_random(random) % 4) {
        case 0:
            datagram[at] = (unsigned char)next_random(random);
            break;
        case 1:
            datagram[at] ^= (unsigned char)(1u << (next_random(random) % 8));
            break;
        case 2:
            memmove(datagram + at + 1, datagram + at, bytes - at);
            datagram[at] = (unsigned char)next_random(random);
            bytes++;
            break;
        case 3:
            memmove(datagram + at, datagram + at + 1, bytes - at - 1);
            bytes--;
            break;
        }
    }
    return bytes;
}

START_TEST(what_passes_after_mutation_is_a_whole_message)
{
    static struct sample samples[MESSAGE_KIND_COUNT];
    static unsigned char datagram[EPD_MAX_DATAGRAM_BYTES + 8], again[EPD_MAX_DATAGRAM_BYTES];
    struct guarded guarded;
    struct arena arena, second_arena;
    struct message message, second;
    struct epd_error error;
    uint64_t random = 0x2545f4914f6cdd1d;
    int n_passed = 0;

    guarded_init(&guarded);
    ck_assert_int_eq(arena_init(&arena, EPD_MAX_ARENA_BYTES), EPD_OK);
    ck_assert_int_eq(arena_init(&second_arena, EPD_MAX_ARENA_BYTES), EPD_OK);
    for (int kind = 1; kind < MESSAGE_KIND_COUNT; kind++)
        sample_typical((enum message_kind)kind, &samples[kind]);
    for (int i = 0; i < 100000; i++) {
        enum message_kind kind = (enum message_kind)(1 + i % (MESSAGE_KIND_COUNT - 1));
        size_t bytes;

        ck_assert_int_eq(codec_encode(&samples[kind].message, datagram, &bytes, &error), EPD_OK);
        bytes = mutate(datagram, bytes, &random);
        if (decode_guarded(&guarded, sample_side(kind), datagram, bytes, &arena, &message) != EPD_OK)
            continue;
        n_passed++;
        ck_assert_msg(codec_encode(&message, again, &bytes, &error) == EPD_OK, "%s", error.text);
        ck_assert_int_eq(codec_decode(sample_side(kind), again, bytes, &second_arena, &second, &error),
                         EPD_OK);
        ck_assert(sample_equal(&message, &second));
    }
    ck_assert_int_gt(n_passed, 1000); /* else this test would test nothing */
    arena_fini(&second_arena);
    arena_fini(&arena);
    guarded_fini(&guarded);
}
END_TEST

START_TEST(fields_of_a_newer_version_are_skipped)
{
    static struct sample sample;
    unsigned char datagram[512];
    struct arena arena;
    struct message message;
    struct epd_error error;
    size_t bytes;
    /* fields 100 to 103: varint, 64 bits, 3 bytes, 32 bits */
    static const unsigned char newer[] = {0xa0, 0x06, 0x05, 0xa9, 0x06, 1,   2,    3,    4, 5, 6, 7, 8,
                                          0xb2, 0x06, 0x03, 'n',  'e',  'w', 0xbd, 0x06, 1, 2, 3, 4};

    ck_assert_int_eq(arena_init(&arena, EPD_MAX_ARENA_BYTES), EPD_OK);
    sample_typical(MESSAGE_LAUNCH, &sample);
    ck_assert_int_eq(codec_encode(&sample.message, datagram, &bytes, &error), EPD_OK);
    /* Once inside the body, whose length is in the second byte, and once after it. */
    memcpy(datagram + bytes, newer, sizeof newer);
    datagram[1] = (unsigned char)(datagram[1] + sizeof newer);
    bytes += sizeof newer;
    memcpy(datagram + bytes, newer, sizeof newer);
    bytes += sizeof newer;
    ck_assert_int_eq(codec_decode(CODEC_FROM_CLIENT, datagram, bytes, &arena, &message, &error), EPD_OK);
    ck_assert(sample_equal(&message, &sample.message));
    arena_fini(&arena);
}
END_TEST

/* Repeats a field up to 64 KiB and expects the arena, not the heap, to end it. */
static void expect_exhausted(const unsigned char *field, size_t field_bytes)
{
    static unsigned char datagram[EPD_MAX_DATAGRAM_BYTES];
    struct guarded guarded;
    struct arena arena;
    struct message message;
    struct epd_error error;
    size_t bytes = 0;

    guarded_init(&guarded);
    ck_assert_int_eq(arena_init(&arena, EPD_MAX_ARENA_BYTES), EPD_OK);
    for (; bytes + field_bytes <= sizeof datagram; bytes += field_bytes)
        memcpy(datagram + bytes, field, field_bytes);
    memcpy(guarded.end - bytes, datagram, bytes);
    ck_assert_int_eq(codec_decode(CODEC_FROM_CLIENT, guarded.end - bytes, bytes, &arena, &message, &error),
                     EPD_PROTOCOL);
    ck_assert_msg(strstr(error.text, "bytes need more than 262144 to unpack") != NULL, "%s", error.text);
    ck_assert_uint_le(arena.peak, arena.size);

    /* The next datagram finds a clean arena. */
    static struct sample sample;
    sample_typical(MESSAGE_LAUNCH, &sample);
    ck_assert_int_eq(codec_encode(&sample.message, datagram, &bytes, &error), EPD_OK);
    ck_assert_int_eq(codec_decode(CODEC_FROM_CLIENT, datagram, bytes, &arena, &message, &error), EPD_OK);
    arena_fini(&arena);
    guarded_fini(&guarded);
}

START_TEST(a_datagram_stuffed_with_unknown_fields_ends_at_the_arena)
{
    expect_exhausted((const unsigned char[]){0x60, 0x01}, 2); /* field 12, varint 1 */
}
END_TEST

START_TEST(a_datagram_stuffed_with_bodies_ends_at_the_arena)
{
    expect_exhausted((const unsigned char[]){0x5a, 0x00}, 2); /* empty stats */
}
END_TEST

START_TEST(a_plan_stuffed_with_tensors_ends_at_the_arena)
{
    static unsigned char body[32000];
    unsigned char datagram[sizeof body + 8] = {0x08, 0x01, 0x4a,
                                               0x80, 0xfa, 0x01}; /* plan_create, 32000 bytes */
    struct arena arena;
    struct message message;
    struct epd_error error;

    for (size_t i = 0; i < sizeof body; i += 2)
        body[i] = 0x4a; /* an empty tensor */
    memcpy(datagram + 6, body, sizeof body);
    ck_assert_int_eq(arena_init(&arena, EPD_MAX_ARENA_BYTES), EPD_OK);
    ck_assert_int_eq(codec_decode(CODEC_FROM_CLIENT, datagram, sizeof body + 6, &arena, &message, &error),
                     EPD_PROTOCOL);
    ck_assert_str_eq(error.text, "datagram: 32006 bytes need more than 262144 to unpack");
    ck_assert_uint_eq(message.request_id, 1);
    arena_fini(&arena);
}
END_TEST

START_TEST(deep_nesting_does_not_reach_the_stack)
{
    /* Each level of a length-delimited field 4 around the next: the schema knows one level, the rest is
     * bytes. */
    static unsigned char datagram[EPD_MAX_DATAGRAM_BYTES];
    struct guarded guarded;
    struct arena arena;
    struct message message;

    guarded_init(&guarded);
    ck_assert_int_eq(arena_init(&arena, EPD_MAX_ARENA_BYTES), EPD_OK);
    for (unsigned field = 1; field < 40; field++) {
        size_t at = sizeof datagram;

        while (at >= 6) {
            size_t length = sizeof datagram - at;
            unsigned char header[6];
            size_t n = 0;

            if (field > 15) {
                header[n++] = (unsigned char)(0x80 | ((field << 3 | 2) & 0x7f));
                header[n++] = (unsigned char)((field << 3 | 2) >> 7);
            } else {
                header[n++] = (unsigned char)(field << 3 | 2);
            }
            for (; length >= 0x80; length >>= 7)
                header[n++] = (unsigned char)(length | 0x80);
            header[n++] = (unsigned char)length;
            at -= n;
            memcpy(datagram + at, header, n);
        }
        for (int side = CODEC_FROM_CLIENT; side <= CODEC_FROM_DAEMON; side++)
            (void)decode_guarded(&guarded, (enum codec_side)side, datagram + at, sizeof datagram - at, &arena,
                                 &message);
    }
    arena_fini(&arena);
    guarded_fini(&guarded);
}
END_TEST

START_TEST(a_small_arena_refuses_a_good_message)
{
    static struct sample sample;
    static unsigned char datagram[EPD_MAX_DATAGRAM_BYTES];
    struct arena arena;
    struct message message;
    struct epd_error error;
    size_t bytes;

    sample_most(MESSAGE_PLAN_CREATE, &sample);
    ck_assert_int_eq(codec_encode(&sample.message, datagram, &bytes, &error), EPD_OK);
    for (size_t arena_bytes = 16; arena_bytes < EPD_MAX_ARENA_BYTES; arena_bytes += arena_bytes / 3 + 16) {
        ck_assert_int_eq(arena_init(&arena, arena_bytes), EPD_OK);
        enum epd_status status = codec_decode(CODEC_FROM_CLIENT, datagram, bytes, &arena, &message, &error);
        ck_assert(status == EPD_OK || (status == EPD_PROTOCOL && strstr(error.text, "to unpack") != NULL));
        ck_assert(status == EPD_OK || arena.exhausted);
        arena_fini(&arena);
    }
}
END_TEST

int main(void)
{
    TCase *tcase = tcase_create("codec_hostile");

    tcase_add_loop_test(tcase, datagrams_cut_at_every_byte_do_no_harm, MESSAGE_NONE + 1, MESSAGE_KIND_COUNT);
    tcase_add_test(tcase, random_bytes_do_no_harm);
    tcase_add_test(tcase, what_passes_after_mutation_is_a_whole_message);
    tcase_add_test(tcase, fields_of_a_newer_version_are_skipped);
    tcase_add_test(tcase, a_datagram_stuffed_with_unknown_fields_ends_at_the_arena);
    tcase_add_test(tcase, a_datagram_stuffed_with_bodies_ends_at_the_arena);
    tcase_add_test(tcase, a_plan_stuffed_with_tensors_ends_at_the_arena);
    tcase_add_test(tcase, deep_nesting_does_not_reach_the_stack);
    tcase_add_test(tcase, a_small_arena_refuses_a_good_message);
    return suite_run("codec_hostile", tcase);
}
