/* Neither encoding nor decoding touches the heap: this program's malloc counts. */
#include <stdlib.h>

#include "tests/golden/samples.h"
#include "tests/unit/proto/suite.h"

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define COUNTS_MALLOC 0 /* the sanitizer owns malloc */
#else
#define COUNTS_MALLOC 1

static size_t n_mallocs;

/* glibc lets a program define these for itself and all its libraries. */
void *__libc_malloc(size_t bytes);
void *__libc_calloc(size_t n, size_t bytes);
void *__libc_realloc(void *memory, size_t bytes);

void *malloc(size_t bytes)
{
    n_mallocs++;
    return __libc_malloc(bytes);
}

void *calloc(size_t n, size_t bytes)
{
    n_mallocs++;
    return __libc_calloc(n, bytes);
}

void *realloc(void *memory, size_t bytes)
{
    n_mallocs++;
    return __libc_realloc(memory, bytes);
}

START_TEST(no_kind_of_message_touches_the_heap)
{
    enum message_kind kind = (enum message_kind)_i;
    static struct sample sample;
    static unsigned char datagram[EPD_MAX_DATAGRAM_BYTES];
    struct arena arena;
    struct message message;
    struct epd_error error;
    size_t bytes;

    ck_assert_int_eq(arena_init(&arena, EPD_MAX_ARENA_BYTES), EPD_OK);
    sample_most(kind, &sample);
    size_t before = n_mallocs;
    enum epd_status encoded = codec_encode(&sample.message, datagram, &bytes, &error);
    enum epd_status decoded = codec_decode(sample_side(kind), datagram, bytes, &arena, &message, &error);
    size_t after = n_mallocs;
    ck_assert_int_eq(encoded, EPD_OK);
    ck_assert_int_eq(decoded, EPD_OK);
    ck_assert_uint_eq(after, before);
    free(malloc(1));
    ck_assert_uint_gt(n_mallocs, before); /* it does count */
    arena_fini(&arena);
}
END_TEST
#endif

int main(void)
{
    TCase *tcase = tcase_create("codec_allocations");

#if COUNTS_MALLOC
    tcase_add_loop_test(tcase, no_kind_of_message_touches_the_heap, MESSAGE_NONE + 1, MESSAGE_KIND_COUNT);
#endif
    return suite_run("codec_allocations", tcase);
}
