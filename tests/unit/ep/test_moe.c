/* Whole layers, forward and backward, on one to eight devices, against the reference. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tests/unit/ep/layer.h"

#define COUNT(array) (sizeof(array) / sizeof *(array))

/* Forward, backward and what they leave, on n_devices. */
static void run_case_in(const struct op_case *op_case, uint32_t n_devices, struct layer_modes modes,
                        int imports)
{
    struct harness harness;
    struct layer layer;
    struct layer_outputs outputs[HARNESS_MAX_RANKS];
    struct crew_plan forward, backward;
    struct outcome outcome;
    harness_open(&harness, n_devices, 0);
    harness.imports = imports;
    layer_init(&layer, &harness, op_case);
    layer_take_outputs(&layer, outputs);
    layer_forward_plan(&layer, modes, outputs, &forward);
    layer_backward_plan(&layer, modes, outputs, &forward, &backward);
    launch(&forward, layer.n_tokens, &outcome);
    for (uint32_t r = 0; r < op_case->world_size; r++) {
        ck_assert_msg(outcome.ranks[r].status == layer.status, "%s: %s", op_case->name,
                      outcome.entries[r].text);
        ck_assert_int_eq(outcome.ranks[r].needed_rows, layer.routing.ranks[r].needed_rows);
        ck_assert_int_eq(outcome.ranks[r].dropped_rows, layer.routing.ranks[r].dropped_rows);
        ck_assert_uint_eq(outcome.ranks[r].copied_bytes, 0);
    }
    /* Defined also where rows were left out. */
    layer_check_forward(&layer, outputs);
    if (layer.status) {
        launch_expect(&backward, layer.n_tokens, EPD_INVALID_ARGUMENT);
    } else {
        launch_expect(&backward, layer.n_tokens, EPD_OK);
        layer_check_backward(&layer, outputs);
    }
    crew_plan_destroy(&backward);
    crew_plan_destroy(&forward);
    layer_fini(&layer);
    harness_close(&harness);
}

static void run_case(const struct op_case *op_case, uint32_t n_devices, struct layer_modes modes)
{
    run_case_in(op_case, n_devices, modes, 0);
}

START_TEST(a_layer_works_in_imported_memory)
{
    run_case_in(op_case_named("uniform f32"), 2, (struct layer_modes){.saved = EPD_SAVED_CONTEXT}, 1);
    run_case_in(op_case_named("eight ranks"), 3, (struct layer_modes){.saved = EPD_SAVED_RECOMPUTE}, 1);
}
END_TEST

START_TEST(a_layer_and_its_gradients_match_the_reference_in_every_case)
{
    unsigned n_run = 0;
    for (size_t i = 0; i < n_op_cases; i++) {
        if (!harness_spans(op_cases[i].world_size))
            continue;
        run_case(&op_cases[i], op_cases[i].world_size,
                 (struct layer_modes){.saved = EPD_SAVED_CONTEXT,
                                      .parts = i % 3 == 1 && op_cases[i].n_experts < 32});
        n_run++;
    }
    printf("%u of %zu cases\n", n_run, n_op_cases);
    ck_assert_uint_gt(n_run, 0);
}
END_TEST

START_TEST(a_layer_that_recomputes_matches_the_reference)
{
    const char *names[] = {
        "no tokens at all", "uniform f32",      "uniform f16",     "odd sizes bf16", "zipf",
        "overflow drop",    "zero tokens rank", "receives nothing"};
    for (size_t i = 0; i < COUNT(names); i++)
        run_case(op_case_named(names[i]), 2, (struct layer_modes){.saved = EPD_SAVED_RECOMPUTE});
}
END_TEST

START_TEST(any_number_of_ranks_works_on_any_number_of_devices)
{
    const uint32_t n_ranks[] = {1, 2, 4, 8}, n_devices[] = {1, 2, 4, 8};
    for (size_t i = 0; i < COUNT(n_ranks); i++)
        for (size_t j = 0; j < COUNT(n_devices); j++) {
            struct op_case op_case = *op_case_named("uniform f32");
            op_case.world_size = n_ranks[i];
            op_case.max_tokens = 33;
            run_case(&op_case, n_devices[j], (struct layer_modes){.saved = EPD_SAVED_CONTEXT});
        }
}
END_TEST

/* Runs forward and backward, wgrad too where it is delayed. */
static void run_into(struct layer *layer, struct layer_modes modes, const struct layer_outputs *outputs)
{
    struct crew_plan forward, backward, wgrad;
    layer_forward_plan(layer, modes, outputs, &forward);
    layer_backward_plan(layer, modes, outputs, &forward, &backward);
    launch_expect(&forward, layer->n_tokens, EPD_OK);
    launch_expect(&backward, layer->n_tokens, EPD_OK);
    for (uint32_t r = 0; modes.delay_wgrad && r < layer->crew.world_size; r++) {
        layer_wgrad_plan(layer, modes, outputs, &backward, r, &wgrad);
        launch_expect(&wgrad, &layer->n_tokens[r], EPD_OK);
        launch_expect(&wgrad, &layer->n_tokens[r], EPD_INVALID_ARGUMENT);
        crew_plan_destroy(&wgrad);
    }
    crew_plan_destroy(&backward);
    crew_plan_destroy(&forward);
}

START_TEST(saved_recomputed_and_delayed_gradients_are_the_same_bits)
{
    const char *names[] = {"uniform f32", "uniform bf16", "odd sizes", "empty experts", "overflow drop"};
    for (size_t i = 0; i < COUNT(names); i++) {
        struct harness harness;
        struct layer layer;
        struct layer_outputs first[HARNESS_MAX_RANKS], other[HARNESS_MAX_RANKS];
        const struct layer_modes modes[] = {
            {.saved = EPD_SAVED_CONTEXT},
            {.saved = EPD_SAVED_RECOMPUTE},
            {.saved = EPD_SAVED_CONTEXT, .delay_wgrad = 1},
            {.saved = EPD_SAVED_RECOMPUTE, .delay_wgrad = 1},
            {.saved = EPD_SAVED_CONTEXT, .parts = 1},
            {.saved = EPD_SAVED_CONTEXT, .crossing = EPD_CROSSING_STATIC},
            {.saved = EPD_SAVED_RECOMPUTE, .crossing = EPD_CROSSING_STATIC},
        };
        harness_open(&harness, 3, 0);
        layer_init(&layer, &harness, op_case_named(names[i]));
        layer_take_outputs(&layer, first);
        layer_take_outputs(&layer, other);
        run_into(&layer, modes[0], first);
        for (size_t j = 0; j < COUNT(modes); j++) {
            layer_poison_outputs(&layer, other);
            run_into(&layer, modes[j], other);
            layer_check_same(&layer, first, other);
        }
        layer_fini(&layer);
        harness_close(&harness);
    }
}
END_TEST

START_TEST(three_contexts_interleave_with_their_backwards)
{
    enum { N = 3 };
    struct harness harness;
    struct layer layer;
    struct layer_outputs outputs[N][HARNESS_MAX_RANKS];
    struct crew_plan forward[N], backward[N];
    const struct layer_modes modes = {.saved = EPD_SAVED_CONTEXT};
    harness_open(&harness, 2, 0);
    struct op_case op_case = *op_case_named("uniform f32");
    op_case.capacity = OP_CAPACITY_AMPLE;
    layer_init(&layer, &harness, &op_case);
    for (int i = 0; i < N; i++) {
        layer_take_outputs(&layer, outputs[i]);
        layer_forward_plan(&layer, modes, outputs[i], &forward[i]);
        layer_backward_plan(&layer, modes, outputs[i], &forward[i], &backward[i]);
    }
    /* F0 F1 F2 B0 F0 B1 F1 B2 B0 B1: each backward sees the routing of its own forward. */
    const struct {
        int is_backward, idx;
        uint64_t seed;
    } steps[] = {{0, 0, 1}, {0, 1, 2}, {0, 2, 3}, {1, 0, 1}, {0, 0, 4},
                 {1, 1, 2}, {0, 1, 5}, {1, 2, 3}, {1, 0, 4}, {1, 1, 5}};
    for (size_t i = 0; i < COUNT(steps); i++) {
        int idx = steps[i].idx;
        layer_reroute(&layer, steps[i].seed);
        launch_expect(steps[i].is_backward ? &backward[idx] : &forward[idx], layer.n_tokens, EPD_OK);
        if (steps[i].is_backward)
            layer_check_backward(&layer, outputs[idx]);
        else
            layer_check_forward(&layer, outputs[idx]);
    }
    for (int i = 0; i < N; i++) {
        crew_plan_destroy(&backward[i]);
        crew_plan_destroy(&forward[i]);
    }
    layer_fini(&layer);
    harness_close(&harness);
}
END_TEST

START_TEST(gradients_accumulate_into_what_is_there)
{
    struct harness harness;
    struct layer layer;
    struct layer_outputs once[HARNESS_MAX_RANKS], twice[HARNESS_MAX_RANKS];
    harness_open(&harness, 2, 0);
    layer_init(&layer, &harness, op_case_named("uniform f32"));
    layer_take_outputs(&layer, once);
    layer_take_outputs(&layer, twice);
    run_into(&layer, (struct layer_modes){.saved = EPD_SAVED_CONTEXT}, once);
    for (uint32_t r = 0; r < layer.crew.world_size; r++) {
        memset(twice[r].dw1.data, 0, twice[r].dw1.bytes);
        memset(twice[r].db1.data, 0, twice[r].db1.bytes);
        memset(twice[r].dw2.data, 0, twice[r].dw2.bytes);
        memset(twice[r].db2.data, 0, twice[r].db2.bytes);
    }
    for (int i = 0; i < 2; i++)
        run_into(&layer, (struct layer_modes){.saved = EPD_SAVED_CONTEXT, .accumulate = 1}, twice);
    for (uint32_t r = 0; r < layer.crew.world_size; r++) {
        const struct slab *a[] = {&once[r].dw1, &once[r].db1, &once[r].dw2, &once[r].db2};
        const struct slab *b[] = {&twice[r].dw1, &twice[r].db1, &twice[r].dw2, &twice[r].db2};
        for (size_t i = 0; i < COUNT(a); i++)
            for (size_t j = 0; j < a[i]->bytes / sizeof(float); j++)
                ck_assert_float_eq_tol(((float *)b[i]->data)[j], 2 * ((float *)a[i]->data)[j], 1e-4);
    }
    layer_fini(&layer);
    harness_close(&harness);
}
END_TEST

int main(void)
{
    const TTest *const tests[] = {
        a_layer_and_its_gradients_match_the_reference_in_every_case,
        a_layer_that_recomputes_matches_the_reference,
        a_layer_works_in_imported_memory,
        any_number_of_ranks_works_on_any_number_of_devices,
        saved_recomputed_and_delayed_gradients_are_the_same_bits,
        three_contexts_interleave_with_their_backwards,
        gradients_accumulate_into_what_is_there,
    };
    return suite_run("ep moe", tests, COUNT(tests));
}
