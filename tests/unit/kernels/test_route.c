/* Stages 1 and 2 against the reference routing, in every case of the table; bad routing and overflow. */
#include <stdlib.h>
#include <string.h>

#include "tests/unit/kernels/suite.h"
#include "tests/unit/kernels/world.h"

static void check_slots(const struct world *world, uint32_t r)
{
    const struct reference_rank *want = &world->reference.ranks[r];
    const struct routing *got = &world->ranks[r].routing;
    uint32_t top_k = world->op_case->top_k;
    for (size_t i = 0; i < (size_t)world->inputs.shape.n_tokens[r] * top_k; i++) {
        ck_assert_msg(got->expert[i] == want->expert[i] && got->row[i] == want->row[i],
                      "%s: rank %u token %zu k %zu: expert %d row %d, want %lld %lld", world->op_case->name,
                      r, i / top_k, i % top_k, got->expert[i], got->row[i], (long long)want->expert[i],
                      (long long)want->row[i]);
    }
}

static void check_slabs(const struct world *world, uint32_t r)
{
    const struct reference_rank *want = &world->reference.ranks[r];
    const struct routing *got = &world->ranks[r].routing;
    size_t n_local = world->inputs.n_local_experts;
    const char *name = world->op_case->name;
    ck_assert_msg(!memcmp(got->m_splits, want->m_splits, n_local * sizeof(int64_t)), "%s: m_splits", name);
    ck_assert_msg(!memcmp(got->offsets, want->offsets, (n_local + 1) * sizeof(int64_t)), "%s: offsets", name);
    ck_assert_msg(*got->needed_rows == want->needed_rows, "%s: rank %u needs %lld, want %lld", name, r,
                  (long long)*got->needed_rows, (long long)want->needed_rows);
    ck_assert_msg(*got->dropped_rows == want->dropped_rows, "%s: rank %u drops %lld, want %lld", name, r,
                  (long long)*got->dropped_rows, (long long)want->dropped_rows);
}

/* The record of an overflow names the rank that receives; without one there is none. */
static void check_overflow_record(const struct world *world, uint32_t r)
{
    const struct kernel_error *error = &world->ranks[r].error;
    int64_t needed = world->reference.ranks[r].needed_rows, capacity = world->inputs.shape.capacity_rows;
    if (needed <= capacity) {
        ck_assert_msg(error->status == 0, "%s: rank %u records %u", world->op_case->name, r, error->status);
        return;
    }
    ck_assert_uint_eq(error->status, EPD_CAPACITY_OVERFLOW);
    ck_assert_uint_eq(error->rank, r);
    ck_assert_int_eq(error->expert, -1);
    ck_assert_int_eq(error->token, -1);
    ck_assert_int_eq(error->got, needed);
    ck_assert_int_eq(error->allowed, capacity);
}

START_TEST(routing_matches_the_reference_in_every_case)
{
    for (size_t c = 0; c < n_op_cases; c++) {
        struct world world;
        world_init(&world, &op_cases[c]);
        for (int repeat = 0; repeat < SUITE_REPEATS; repeat++) {
            world_route(&world);
            for (uint32_t r = 0; r < op_cases[c].world_size; r++) {
                check_slots(&world, r);
                check_slabs(&world, r);
                check_overflow_record(&world, r);
            }
        }
        world_fini(&world);
    }
}
END_TEST

START_TEST(counts_of_all_ranks_agree_and_are_complete)
{
    struct world world;
    world_init(&world, op_case_named("zipf"));
    world_route(&world);
    size_t n = (size_t)world.op_case->world_size * world.op_case->n_experts;
    int64_t total = 0, routed = 0;
    for (size_t i = 0; i < n; i++)
        total += world.ranks[0].routing.counts[i];
    for (uint32_t r = 0; r < world.op_case->world_size; r++) {
        ck_assert_mem_eq(world.ranks[r].routing.counts, world.ranks[0].routing.counts, n * sizeof(int32_t));
        routed += world.inputs.shape.n_tokens[r] * world.op_case->top_k;
    }
    ck_assert_int_eq(total, routed);
    world_fini(&world);
}
END_TEST

START_TEST(short_capacity_leaves_out_exactly_one_row)
{
    struct world world;
    world_init(&world, op_case_named("overflow drop"));
    world_route(&world);
    int64_t dropped = 0, without_row = 0;
    for (uint32_t r = 0; r < world.op_case->world_size; r++) {
        dropped += *world.ranks[r].routing.dropped_rows;
        for (size_t i = 0; i < (size_t)world.inputs.shape.n_tokens[r] * world.op_case->top_k; i++)
            without_row += world.ranks[r].routing.expert[i] >= 0 && world.ranks[r].routing.row[i] < 0;
    }
    ck_assert_int_eq(dropped, 1);
    ck_assert_int_eq(without_row, 1);
    world_fini(&world);
}
END_TEST

/* Puts values into rank 1's routing, runs, and compares with the reference, the record included. */
static void check_bad_values(const struct op_case *op_case, const size_t *slots, const int64_t *values,
                             size_t n)
{
    struct world world;
    world_init(&world, op_case);
    for (size_t i = 0; i < n; i++)
        world.inputs.topk_idx[1][slots[i]] = values[i];
    op_inputs_retype(&world.inputs, op_case);
    reference_routing_fini(&world.reference);
    reference_route(&world.reference, &world.inputs.shape, world.inputs.topk_idx);
    world_route(&world);

    for (uint32_t r = 0; r < op_case->world_size; r++)
        check_slots(&world, r);
    const struct kernel_error *got = &world.ranks[1].error;
    const struct reference_bad_routing *want = &world.reference.ranks[1].bad;
    ck_assert_uint_eq(got->status, EPD_BAD_ROUTING);
    ck_assert_uint_eq(got->rank, 1);
    ck_assert_int_eq(got->token, want->token);
    ck_assert_int_eq(got->expert, want->expert);
    ck_assert_int_eq(got->got, want->got);
    ck_assert_int_eq(got->allowed, (int64_t)op_case->n_experts - 1);
    world_fini(&world);
}

START_TEST(experts_out_of_range_become_minus_one_and_the_smallest_token_is_recorded)
{
    const struct op_case *wide = op_case_named("uniform f32"), *narrow = op_case_named("uniform bf16");
    size_t slots[] = {200, 41, 40, 7};
    int64_t values[] = {-2, 16, INT32_MAX, INT32_MIN};
    int64_t wide_values[] = {INT64_MAX, INT64_C(1) << 32, -2, INT64_MIN};
    for (size_t first = 0; first < 4; first++) {
        check_bad_values(narrow, slots + first, values + first, 4 - first);
        check_bad_values(wide, slots + first, wide_values + first, 4 - first);
    }
}
END_TEST

START_TEST(an_expert_named_twice_by_a_token_counts_once)
{
    size_t slots[] = {32, 33, 36};
    int64_t values[] = {3, 3, 99};
    check_bad_values(op_case_named("uniform f32"), slots, values, 3);
    size_t top8_slots[] = {8, 9, 15, 14};
    int64_t top8_values[] = {-1, 4, 4, 4};
    check_bad_values(op_case_named("top-8"), top8_slots, top8_values, 4);
}
END_TEST

START_TEST(a_bad_token_is_reported_rather_than_an_overflow)
{
    const struct op_case *op_case = op_case_named("overflow all to one");
    struct world world;
    world_init(&world, op_case);
    world.inputs.topk_idx[0][8] = 1000;
    op_inputs_retype(&world.inputs, op_case);
    world.inputs.shape.capacity_rows = 5;
    world_route(&world);
    ck_assert_uint_eq(world.ranks[0].error.status, EPD_BAD_ROUTING);
    ck_assert_int_eq(world.ranks[0].error.token, 1);
    ck_assert_uint_eq(world.ranks[1].error.status, EPD_CAPACITY_OVERFLOW);
    world_fini(&world);
}
END_TEST

START_TEST(a_capacity_of_no_rows_drops_everything)
{
    struct world world;
    world_init(&world, op_case_named("uniform f32"));
    world.inputs.shape.capacity_rows = 0;
    world_route(&world);
    for (uint32_t r = 0; r < world.op_case->world_size; r++) {
        const struct routing *routing = &world.ranks[r].routing;
        ck_assert_int_eq(routing->offsets[world.inputs.n_local_experts], 0);
        ck_assert_int_eq(*routing->dropped_rows, world.reference.ranks[r].needed_rows);
        for (size_t i = 0; i < (size_t)world.inputs.shape.n_tokens[r] * world.op_case->top_k; i++)
            ck_assert_int_eq(routing->row[i], -1);
    }
    world_fini(&world);
}
END_TEST

int main(void)
{
    const TTest *const tests[] = {
        routing_matches_the_reference_in_every_case,
        counts_of_all_ranks_agree_and_are_complete,
        short_capacity_leaves_out_exactly_one_row,
        experts_out_of_range_become_minus_one_and_the_smallest_token_is_recorded,
        an_expert_named_twice_by_a_token_counts_once,
        a_bad_token_is_reported_rather_than_an_overflow,
        a_capacity_of_no_rows_drops_everything,
    };
    return suite_run("kernels route", tests, sizeof(tests) / sizeof(tests[0]));
}
