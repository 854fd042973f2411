/* The reference itself: number formats at known patterns, gradients against differences of the forward pass,
 * the table of cases against its promises. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "tests/unit/kernels/suite.h"
#include "tests/unit/kernels/world.h"

START_TEST(formats_have_the_bits_of_their_definition)
{
    double values[] = {1.0, -2.0, 0.0, 65504.0, 0x1p-14, 0x1p-24, 0x1.8p-25, 0x1p-25, INFINITY};
    uint16_t f16[] = {0x3c00, 0xc000, 0, 0x7bff, 0x0400, 0x0001, 0x0001, 0x0000, 0x7c00}, bits[9];
    values_encode(EPD_F16, bits, values, 9);
    ck_assert_mem_eq(bits, f16, sizeof(f16));
    double wide[] = {1.0, -2.0, 0x1.01p0, 0x1.03p0, 3.5e38, 0x1p-133, -0.0};
    uint16_t bf16[] = {0x3f80, 0xc000, 0x3f80, 0x3f82, 0x7f80, 0x0001, 0x8000};
    values_encode(EPD_BF16, bits, wide, 7);
    ck_assert_mem_eq(bits, bf16, sizeof(bf16));
}
END_TEST

START_TEST(every_half_pattern_decodes_and_encodes_to_itself)
{
    enum epd_dtype dtypes[] = {EPD_BF16, EPD_F16};
    for (int d = 0; d < 2; d++) {
        for (uint32_t i = 0; i < 65536; i++) {
            uint16_t pattern = (uint16_t)i, back;
            double value;
            values_decode(dtypes[d], &value, &pattern, 1);
            values_encode(dtypes[d], &back, &value, 1);
            ck_assert_msg(isnan(value) || back == pattern, "%s %04x: %04x", dtype_name(dtypes[d]), i, back);
        }
    }
}
END_TEST

START_TEST(a_nan_or_a_deviation_never_matches)
{
    float got[] = {1, NAN, 3};
    double want[] = {1, NAN, 3}, off[] = {1, 2, 3};
    char text[VALUES_TEXT_BYTES];
    struct tolerance loose = {.rtol = 1, .atol = 1e300};
    ck_assert(!values_match(EPD_F32, got, want, 3, loose, text));
    ck_assert(!values_match(EPD_F32, got, off, 3, loose, text));
    got[1] = 2.00001f;
    ck_assert(!values_match(EPD_F32, got, off, 3, (struct tolerance){.rtol = 1.3e-6}, text));
    ck_assert(values_match(EPD_F32, got, off, 3, (struct tolerance){.rtol = 1.3e-5}, text));
}
END_TEST

START_TEST(slopes_of_the_gates_are_their_derivatives)
{
    for (enum epd_activation kind = EPD_SWIGLU; kind <= EPD_RELU2; kind++) {
        for (double g = -6.03; g < 6; g += 0.11) {
            double h = 1e-6, slope = (reference_gate(kind, g + h) - reference_gate(kind, g - h)) / (2 * h);
            ck_assert_double_eq_tol(reference_gate_slope(kind, g), slope, 1e-8);
        }
    }
}
END_TEST

/* A layer in doubles whose loss <dout, out> can be taken again after one input was moved. */
struct loss {
    struct world world;
    struct reference_layer layer;
    double *out[REFERENCE_MAX_RANKS];
    double *w1, *b1, *w2, *b2;
};

static void loss_init(struct loss *loss, const struct op_case *op_case)
{
    size_t n_experts = op_case->n_experts, hidden = op_case->hidden, ffn = op_case->ffn;
    world_init(&loss->world, op_case);
    const struct op_inputs *inputs = &loss->world.inputs;
    loss->w1 = values_decoded(op_case->dtype, inputs->w1, n_experts * 2 * ffn * hidden);
    loss->w2 = values_decoded(op_case->dtype, inputs->w2, n_experts * hidden * ffn);
    loss->b1 = values_decoded(op_case->dtype, inputs->b1, n_experts * 2 * ffn);
    loss->b2 = values_decoded(op_case->dtype, inputs->b2, n_experts * hidden);
    loss->layer = (struct reference_layer){
        .kind = op_case->activation, .w1 = loss->w1, .b1 = loss->b1, .w2 = loss->w2, .b2 = loss->b2};
    world_token_doubles(&loss->world, hidden, loss->out);
}

static void loss_fini(struct loss *loss)
{
    free(loss->w1);
    free(loss->w2);
    free(loss->b1);
    free(loss->b2);
    world_free_doubles(&loss->world, loss->out);
    world_fini(&loss->world);
}

static double loss_value(struct loss *loss)
{
    const struct world *world = &loss->world;
    double sum = 0;
    reference_moe_forward(&world->reference, &loss->layer, world->x, world->weights, loss->out);
    for (uint32_t r = 0; r < world->op_case->world_size; r++)
        for (size_t i = 0; i < (size_t)world->inputs.shape.n_tokens[r] * world->op_case->hidden; i++)
            sum += loss->out[r][i] * world->dout[r][i];
    return sum;
}

/* Some elements of one input, by central differences. */
static void check_gradient(struct loss *loss, const char *what, double *values, const double *gradient,
                           size_t n)
{
    for (size_t i = 0; i < n; i += n / 7 + 1) {
        double before = values[i], h = 1e-5;
        values[i] = before + h;
        double above = loss_value(loss);
        values[i] = before - h;
        double below = loss_value(loss);
        values[i] = before;
        double want = (above - below) / (2 * h);
        ck_assert_msg(fabs(gradient[i] - want) <= 1e-6 * (1 + fabs(want)),
                      "%s[%zu]: %.9g, by differences %.9g", what, i, gradient[i], want);
    }
}

static void check_gradients_of(const char *name)
{
    struct loss loss;
    const struct op_case *op_case = op_case_named(name);
    size_t n_experts = op_case->n_experts, hidden = op_case->hidden, ffn = op_case->ffn,
           top_k = op_case->top_k;
    double *dx[REFERENCE_MAX_RANKS], *d_weights[REFERENCE_MAX_RANKS];
    loss_init(&loss, op_case);
    world_token_doubles(&loss.world, hidden, dx);
    world_token_doubles(&loss.world, top_k, d_weights);
    struct reference_gradients grads = {
        .dx = dx,
        .d_weights = d_weights,
        .dw1 = values_alloc_doubles(n_experts * 2 * ffn * hidden),
        .db1 = values_alloc_doubles(n_experts * 2 * ffn),
        .dw2 = values_alloc_doubles(n_experts * hidden * ffn),
        .db2 = values_alloc_doubles(n_experts * hidden),
    };
    reference_moe_backward(&loss.world.reference, &loss.layer, loss.world.x, loss.world.weights,
                           loss.world.dout, &grads);
    for (uint32_t r = 0; r < op_case->world_size; r++) {
        size_t n_tokens = loss.world.inputs.shape.n_tokens[r];
        check_gradient(&loss, "dx", loss.world.x[r], dx[r], n_tokens * hidden);
        check_gradient(&loss, "d_weights", loss.world.weights[r], d_weights[r], n_tokens * top_k);
    }
    check_gradient(&loss, "dw1", loss.w1, grads.dw1, n_experts * 2 * ffn * hidden);
    check_gradient(&loss, "db1", loss.b1, grads.db1, n_experts * 2 * ffn);
    check_gradient(&loss, "dw2", loss.w2, grads.dw2, n_experts * hidden * ffn);
    check_gradient(&loss, "db2", loss.b2, grads.db2, n_experts * hidden);
    free(grads.dw1);
    free(grads.db1);
    free(grads.dw2);
    free(grads.db2);
    world_free_doubles(&loss.world, dx);
    world_free_doubles(&loss.world, d_weights);
    loss_fini(&loss);
}

START_TEST(gradients_of_a_layer_are_the_differences_of_its_forward_pass)
{
    check_gradients_of("odd sizes");
    check_gradients_of("one rank");
    check_gradients_of("top-8 of 8");
    check_gradients_of("zero tokens rank");
}
END_TEST

/* The staged reference (dispatch, GEMMs, activation, combine) and the one written per token say the same. */
START_TEST(the_staged_reference_agrees_with_the_one_per_token)
{
    struct loss loss;
    const struct op_case *op_case = op_case_named("overflow drop");
    size_t hidden = op_case->hidden, ffn = op_case->ffn;
    double *recv_x[REFERENCE_MAX_RANKS], *preact[REFERENCE_MAX_RANKS], *act[REFERENCE_MAX_RANKS];
    double *y[REFERENCE_MAX_RANKS], *out[REFERENCE_MAX_RANKS];
    loss_init(&loss, op_case);
    world_slot_doubles(&loss.world, hidden, recv_x);
    world_slot_doubles(&loss.world, 2 * ffn, preact);
    world_slot_doubles(&loss.world, ffn, act);
    world_slot_doubles(&loss.world, hidden, y);
    world_token_doubles(&loss.world, hidden, out);
    const struct reference_routing *routing = &loss.world.reference;
    reference_dispatch(routing, loss.world.x, NULL, 0, recv_x, NULL);
    for (uint32_t r = 0; r < op_case->world_size; r++) {
        size_t first = (size_t)r * loss.world.inputs.n_local_experts;
        struct reference_groups groups = {.n_groups = loss.world.inputs.n_local_experts,
                                          .m_splits = routing->ranks[r].m_splits,
                                          .offsets = routing->ranks[r].offsets};
        reference_gemm_tn(&groups, 2 * op_case->ffn, op_case->hidden, recv_x[r],
                          loss.w1 + first * 2 * ffn * hidden, loss.b1 + first * 2 * ffn, preact[r]);
        reference_activation(&groups, op_case->activation, op_case->ffn, preact[r], NULL, act[r]);
        reference_gemm_tn(&groups, op_case->hidden, op_case->ffn, act[r], loss.w2 + first * hidden * ffn,
                          loss.b2 + first * hidden, y[r]);
    }
    reference_combine(routing, y, loss.world.weights, out);
    loss_value(&loss);
    for (uint32_t r = 0; r < op_case->world_size; r++)
        for (size_t i = 0; i < loss.world.inputs.shape.n_tokens[r] * hidden; i++)
            ck_assert_double_eq_tol(out[r][i], loss.out[r][i], 1e-12);
    world_free_doubles(&loss.world, recv_x);
    world_free_doubles(&loss.world, preact);
    world_free_doubles(&loss.world, act);
    world_free_doubles(&loss.world, y);
    world_free_doubles(&loss.world, out);
    loss_fini(&loss);
}
END_TEST

static int64_t rows_dropped(const struct world *world)
{
    int64_t dropped = 0;
    for (uint32_t r = 0; r < world->op_case->world_size; r++)
        dropped += world->reference.ranks[r].dropped_rows;
    return dropped;
}

START_TEST(cases_drop_rows_exactly_where_their_capacity_is_short)
{
    for (size_t c = 0; c < n_op_cases; c++) {
        struct world world;
        world_init(&world, &op_cases[c]);
        int64_t dropped = rows_dropped(&world), n_ranks = op_cases[c].world_size;
        if (op_cases[c].capacity == OP_CAPACITY_SHORT)
            ck_assert_msg(dropped >= 1 && dropped <= n_ranks, "%s drops %lld", op_cases[c].name,
                          (long long)dropped);
        else
            ck_assert_msg(dropped == 0, "%s drops %lld", op_cases[c].name, (long long)dropped);
        world_fini(&world);
    }
}
END_TEST

int main(void)
{
    const TTest *const tests[] = {
        formats_have_the_bits_of_their_definition,
        every_half_pattern_decodes_and_encodes_to_itself,
        a_nan_or_a_deviation_never_matches,
        slopes_of_the_gates_are_their_derivatives,
        gradients_of_a_layer_are_the_differences_of_its_forward_pass,
        the_staged_reference_agrees_with_the_one_per_token,
        cases_drop_rows_exactly_where_their_capacity_is_short,
    };
    return suite_run("reference", tests, sizeof(tests) / sizeof(tests[0]));
}
