/* The arena is bounded, zeroed and aligned. */
#include <stdint.h>
#include <string.h>

#include "proto/arena.h"
#include "tests/unit/proto/suite.h"

static int all_zero(const unsigned char *bytes, size_t n)
{
    for (size_t i = 0; i < n; i++)
        if (bytes[i])
            return 0;
    return 1;
}

START_TEST(memory_is_aligned_and_zero_also_after_a_reset)
{
    struct arena arena;

    ck_assert_int_eq(arena_init(&arena, 4096), EPD_OK);
    for (int round = 0; round < 3; round++) {
        for (size_t bytes = 0; bytes < 60; bytes++) {
            unsigned char *memory = arena_alloc(&arena, bytes);
            ck_assert_ptr_nonnull(memory);
            ck_assert_uint_eq((uintptr_t)memory % 16, 0);
            ck_assert(all_zero(memory, bytes));
            memset(memory, 0xff, bytes);
        }
        arena_reset(&arena);
        ck_assert(all_zero(arena.data, arena.size));
    }
    arena_fini(&arena);
}
END_TEST

START_TEST(an_exhausted_arena_refuses_and_says_so)
{
    struct arena arena;

    ck_assert_int_eq(arena_init(&arena, 100), EPD_OK); /* 112: sizes are multiples of 16 */
    ck_assert_ptr_nonnull(arena_alloc(&arena, 97));
    ck_assert_int_eq(arena.exhausted, 0);
    ck_assert_ptr_null(arena_alloc(&arena, 1));
    ck_assert_ptr_null(arena_alloc(&arena, SIZE_MAX));
    ck_assert_ptr_null(arena_alloc(&arena, SIZE_MAX - 8));
    ck_assert_int_eq(arena.exhausted, 1);
    ck_assert_uint_eq(arena.peak, 112);
    arena_reset(&arena);
    ck_assert_int_eq(arena.exhausted, 0);
    ck_assert_uint_eq(arena.peak, 112);
    ck_assert_ptr_nonnull(arena_alloc(&arena, 112));
    ck_assert_ptr_null(arena_alloc(&arena, 1));
    arena_fini(&arena);
    arena_fini(&arena);
}
END_TEST

int main(void)
{
    TCase *tcase = tcase_create("arena");

    tcase_add_test(tcase, memory_is_aligned_and_zero_also_after_a_reset);
    tcase_add_test(tcase, an_exhausted_arena_refuses_and_says_so);
    return suite_run("arena", tcase);
}
