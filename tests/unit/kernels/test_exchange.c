/* Dispatch, combine and the scalars of the slots, in every case of the table, against the reference. */
#include <stdlib.h>
#include <string.h>

#include "tests/unit/kernels/suite.h"
#include "tests/unit/kernels/world.h"

/* Runs a check on every case, with the routing already done. */
static void for_every_case(void (*check)(struct world *world))
{
    for (size_t c = 0; c < n_op_cases; c++) {
        struct world world;
        world_init(&world, &op_cases[c]);
        world_route(&world);
        check(&world);
        world_fini(&world);
    }
}

static const char *name_of(const struct world *world)
{
    return world->op_case->name;
}

static size_t row_bytes(const struct world *world)
{
    return world->op_case->hidden * dtype_bytes(world->op_case->dtype);
}

static void check_tail(const struct world *world, uint32_t r, const void *buffer, size_t bytes_per_row)
{
    size_t used = world_used_rows(world, r), rows = world_buffer_rows(world);
    ck_assert_msg(values_poisoned((const char *)buffer + used * bytes_per_row, (rows - used) * bytes_per_row),
                  "%s: rank %u: rows past offsets[L] were written", name_of(world), r);
}

/* Fills the rows that belong to a token with random values; padding and tail keep their poison. */
static void fill_real_rows(const struct world *world, enum epd_dtype dtype, size_t width,
                           void *const *buffers)
{
    uint64_t seed = 31;
    for (uint32_t r = 0; r < world->op_case->world_size; r++) {
        const struct reference_rank *rank = &world->reference.ranks[r];
        for (uint32_t l = 0; l < world->inputs.n_local_experts; l++)
            values_fill(dtype, (char *)buffers[r] + (size_t)rank->offsets[l] * width * dtype_bytes(dtype),
                        (size_t)rank->m_splits[l] * width, -1, 1, &seed);
    }
}

/* The buffers as the reference takes them; the NaNs of padding never enter a sum of the reference. */
static void decode_slots(const struct world *world, enum epd_dtype dtype, size_t width, void *const *buffers,
                         double **doubles)
{
    for (uint32_t r = 0; r < world->op_case->world_size; r++)
        doubles[r] = values_decoded(dtype, buffers[r], world_buffer_rows(world) * width);
}

static void check_tokens(const struct world *world, enum epd_dtype dtype, size_t width, void *const *got,
                         double *const *want, struct tolerance tolerance)
{
    char text[VALUES_TEXT_BYTES];
    for (uint32_t r = 0; r < world->op_case->world_size; r++) {
        size_t n = world->inputs.shape.n_tokens[r] * width;
        ck_assert_msg(values_match(dtype, got[r], want[r], n, tolerance, text), "%s: rank %u: %s",
                      name_of(world), r, text);
    }
}

START_TEST(dispatch_orders_rows_by_expert_then_rank_then_token)
{
    struct world world;
    world_init(&world, op_case_named("uniform f32")); /* four ranks, no padding */
    void *recv_x[REFERENCE_MAX_RANKS];
    world_route(&world);
    world_slot_buffers(&world, EPD_F32, world.op_case->hidden, recv_x);
    world_dispatch(&world, WORLD_X, 0, recv_x, NULL);
    for (uint32_t r = 0; r < world.op_case->world_size; r++) {
        int64_t last_expert = -1, last_source = -1;
        for (size_t row = 0; row < world_used_rows(&world, r); row++) {
            int64_t source = world.ranks[r].routing.source[row];
            int64_t slots = (int64_t)world.op_case->max_tokens * world.op_case->top_k;
            int64_t expert = world.inputs.topk_idx[source / slots][source % slots];
            ck_assert_int_eq(expert / world.inputs.n_local_experts, r);
            ck_assert(expert > last_expert || (expert == last_expert && source > last_source));
            last_expert = expert;
            last_source = source;
        }
    }
    world_free_buffers(&world, recv_x);
    world_fini(&world);
}
END_TEST

static void check_sources(const struct world *world, uint32_t r)
{
    const struct op_case *op_case = world->op_case;
    for (size_t row = 0; row < world_used_rows(world, r); row++) {
        struct reference_source want = world->reference.ranks[r].source[row];
        int64_t slot =
            want.rank * op_case->max_tokens * op_case->top_k + want.token * op_case->top_k + want.k;
        ck_assert_int_eq(world->ranks[r].routing.source[row], want.rank < 0 ? -1 : slot);
    }
    check_tail(world, r, world->ranks[r].routing.source, sizeof(int32_t));
}

static void check_dispatched(struct world *world, void *const *recv_x, void *const *recv_weights,
                             double *const *want_x, double *const *want_weights)
{
    struct tolerance exact = {0};
    char text[VALUES_TEXT_BYTES];
    for (uint32_t r = 0; r < world->op_case->world_size; r++) {
        size_t used = world_used_rows(world, r), n = used * world->op_case->hidden;
        ck_assert_msg(values_match(world->op_case->dtype, recv_x[r], want_x[r], n, exact, text),
                      "%s: rank %u x: %s", name_of(world), r, text);
        ck_assert_msg(values_match(EPD_F32, recv_weights[r], want_weights[r], used, exact, text),
                      "%s: rank %u weights: %s", name_of(world), r, text);
        check_tail(world, r, recv_x[r], row_bytes(world));
        check_tail(world, r, recv_weights[r], sizeof(float));
        check_sources(world, r);
    }
}

static void dispatch_case(struct world *world)
{
    void *recv_x[REFERENCE_MAX_RANKS], *recv_weights[REFERENCE_MAX_RANKS];
    double *want_x[REFERENCE_MAX_RANKS], *want_weights[REFERENCE_MAX_RANKS];
    world_slot_doubles(world, world->op_case->hidden, want_x);
    world_slot_doubles(world, 1, want_weights);
    reference_dispatch(&world->reference, world->x, world->weights, 0, want_x, want_weights);
    for (int repeat = 0; repeat < SUITE_REPEATS; repeat++) {
        world_slot_buffers(world, world->op_case->dtype, world->op_case->hidden, recv_x);
        world_slot_buffers(world, EPD_F32, 1, recv_weights);
        world_dispatch(world, WORLD_X, 0, recv_x, (float *const *)recv_weights);
        check_dispatched(world, recv_x, recv_weights, want_x, want_weights);
        world_free_buffers(world, recv_x);
        world_free_buffers(world, recv_weights);
    }
    world_free_doubles(world, want_x);
    world_free_doubles(world, want_weights);
}

START_TEST(dispatch_moves_payload_weights_and_sources_exactly_and_leaves_the_tail)
{
    for_every_case(dispatch_case);
}
END_TEST

static void scaled_dispatch_case(struct world *world)
{
    void *dy[REFERENCE_MAX_RANKS];
    double *want[REFERENCE_MAX_RANKS];
    char text[VALUES_TEXT_BYTES];
    world_slot_doubles(world, world->op_case->hidden, want);
    world_slot_buffers(world, world->op_case->dtype, world->op_case->hidden, dy);
    reference_dispatch(&world->reference, world->dout, world->weights, 1, want, NULL);
    world_dispatch(world, WORLD_DOUT, 1, dy, NULL);
    for (uint32_t r = 0; r < world->op_case->world_size; r++) {
        size_t n = world_used_rows(world, r) * world->op_case->hidden;
        ck_assert_msg(
            values_match(world->op_case->dtype, dy[r], want[r], n, tolerance_of(world->op_case->dtype), text),
            "%s: rank %u: %s", name_of(world), r, text);
        check_tail(world, r, dy[r], row_bytes(world));
        /* Sources were not asked for. */
        ck_assert(
            values_poisoned(world->ranks[r].routing.source, world_buffer_rows(world) * sizeof(int32_t)));
    }
    world_free_buffers(world, dy);
    world_free_doubles(world, want);
}

START_TEST(scaled_dispatch_sends_weighted_gradients_and_zero_padding)
{
    for_every_case(scaled_dispatch_case);
}
END_TEST

static void combine_case(struct world *world)
{
    enum epd_dtype dtype = world->op_case->dtype;
    size_t hidden = world->op_case->hidden;
    void *y[REFERENCE_MAX_RANKS], *out[REFERENCE_MAX_RANKS], *first[REFERENCE_MAX_RANKS];
    double *y_values[REFERENCE_MAX_RANKS], *want[REFERENCE_MAX_RANKS];
    world_slot_buffers(world, dtype, hidden, y);
    fill_real_rows(world, dtype, hidden, y);
    decode_slots(world, dtype, hidden, y, y_values);
    world_token_doubles(world, hidden, want);
    for (int weighted = 0; weighted < 2; weighted++) {
        reference_combine(&world->reference, y_values, weighted ? world->weights : NULL, want);
        world_token_buffers(world, dtype, hidden, first);
        world_combine(world, y, weighted, first);
        check_tokens(world, dtype, hidden, first, want, tolerance_sum(dtype, world->op_case->top_k, 0.6));
        for (int repeat = 1; repeat < SUITE_REPEATS; repeat++) {
            world_token_buffers(world, dtype, hidden, out);
            world_combine(world, y, weighted, out);
            for (uint32_t r = 0; r < world->op_case->world_size; r++)
                ck_assert(!memcmp(out[r], first[r], world->inputs.shape.n_tokens[r] * row_bytes(world)));
            world_free_buffers(world, out);
        }
        world_free_buffers(world, first);
    }
    world_free_buffers(world, y);
    world_free_doubles(world, y_values);
    world_free_doubles(world, want);
}

START_TEST(combine_matches_the_reference_and_ignores_rows_of_nobody)
{
    for_every_case(combine_case);
}
END_TEST

START_TEST(a_token_without_rows_combines_to_zeros)
{
    for (size_t c = 0; c < n_op_cases; c++) {
        if (op_cases[c].pattern != OP_NONE)
            continue;
        struct world world;
        void *y[REFERENCE_MAX_RANKS], *out[REFERENCE_MAX_RANKS];
        world_init(&world, &op_cases[c]);
        world_route(&world);
        world_slot_buffers(&world, op_cases[c].dtype, op_cases[c].hidden, y);
        world_token_buffers(&world, op_cases[c].dtype, op_cases[c].hidden, out);
        world_combine(&world, y, 1, out);
        for (uint32_t r = 0; r < op_cases[c].world_size; r++)
            for (size_t i = 0; i < world.inputs.shape.n_tokens[r] * row_bytes(&world); i++)
                ck_assert_int_eq(((char *)out[r])[i], 0);
        world_free_buffers(&world, y);
        world_free_buffers(&world, out);
        world_fini(&world);
    }
}
END_TEST

/* Experts that do nothing give back K times the token, up to what the capacity left out. */
static void identity_case(struct world *world)
{
    enum epd_dtype dtype = world->op_case->dtype;
    size_t hidden = world->op_case->hidden, top_k = world->op_case->top_k;
    void *recv_x[REFERENCE_MAX_RANKS], *out[REFERENCE_MAX_RANKS];
    double *want[REFERENCE_MAX_RANKS];
    world_slot_buffers(world, dtype, hidden, recv_x);
    world_token_buffers(world, dtype, hidden, out);
    world_token_doubles(world, hidden, want);
    world_dispatch(world, WORLD_X, 0, recv_x, NULL);
    world_combine(world, recv_x, 0, out);
    for (uint32_t r = 0; r < world->op_case->world_size; r++)
        for (size_t i = 0; i < world->inputs.shape.n_tokens[r] * top_k; i++)
            for (size_t h = 0; world->reference.ranks[r].row[i] >= 0 && h < hidden; h++)
                want[r][i / top_k * hidden + h] += world->x[r][i / top_k * hidden + h];
    check_tokens(world, dtype, hidden, out, want, tolerance_of(dtype));
    world_free_buffers(world, recv_x);
    world_free_buffers(world, out);
    world_free_doubles(world, want);
}

START_TEST(identity_experts_give_back_the_token_once_per_row)
{
    for_every_case(identity_case);
}
END_TEST

static void weight_grad_case(struct world *world)
{
    enum epd_dtype dtype = world->op_case->dtype;
    size_t hidden = world->op_case->hidden, top_k = world->op_case->top_k;
    void *y[REFERENCE_MAX_RANKS], *out[REFERENCE_MAX_RANKS];
    double *y_values[REFERENCE_MAX_RANKS], *want[REFERENCE_MAX_RANKS];
    world_slot_buffers(world, dtype, hidden, y);
    fill_real_rows(world, dtype, hidden, y);
    decode_slots(world, dtype, hidden, y, y_values);
    world_token_doubles(world, top_k, want);
    world_token_buffers(world, EPD_F32, top_k, out);
    reference_weight_grad(&world->reference, world->dout, y_values, want);
    world_weight_grad(world, y, (float *const *)out);
    check_tokens(world, EPD_F32, top_k, out, want, tolerance_sum(EPD_F32, hidden, 0.33));
    world_free_buffers(world, y);
    world_free_buffers(world, out);
    world_free_doubles(world, y_values);
    world_free_doubles(world, want);
}

START_TEST(weight_gradient_is_the_dot_product_with_the_answer)
{
    for_every_case(weight_grad_case);
}
END_TEST

static void gather_case(struct world *world)
{
    size_t top_k = world->op_case->top_k;
    void *value[REFERENCE_MAX_RANKS], *out[REFERENCE_MAX_RANKS];
    double *value_doubles[REFERENCE_MAX_RANKS], *want[REFERENCE_MAX_RANKS];
    struct tolerance exact = {0};
    world_slot_buffers(world, EPD_F32, 1, value);
    fill_real_rows(world, EPD_F32, 1, value);
    decode_slots(world, EPD_F32, 1, value, value_doubles);
    world_token_doubles(world, top_k, want);
    world_token_buffers(world, EPD_F32, top_k, out);
    reference_gather(&world->reference, value_doubles, want);
    world_gather(world, (float *const *)value, 0, (float *const *)out);
    check_tokens(world, EPD_F32, top_k, out, want, exact);
    world_gather(world, (float *const *)value, 1, (float *const *)out);
    for (uint32_t r = 0; r < world->op_case->world_size; r++)
        for (size_t i = 0; i < world->inputs.shape.n_tokens[r] * top_k; i++)
            want[r][i] *= 2;
    check_tokens(world, EPD_F32, top_k, out, want, exact);
    world_free_buffers(world, value);
    world_free_buffers(world, out);
    world_free_doubles(world, value_doubles);
    world_free_doubles(world, want);
}

START_TEST(scalars_of_slots_come_back_to_their_tokens)
{
    for_every_case(gather_case);
}
END_TEST

int main(void)
{
    const TTest *const tests[] = {
        dispatch_orders_rows_by_expert_then_rank_then_token,
        dispatch_moves_payload_weights_and_sources_exactly_and_leaves_the_tail,
        scaled_dispatch_sends_weighted_gradients_and_zero_padding,
        combine_matches_the_reference_and_ignores_rows_of_nobody,
        a_token_without_rows_combines_to_zeros,
        identity_experts_give_back_the_token_once_per_row,
        weight_gradient_is_the_dot_product_with_the_answer,
        scalars_of_slots_come_back_to_their_tokens,
    };
    return suite_run("kernels exchange", tests, sizeof(tests) / sizeof(tests[0]));
}
