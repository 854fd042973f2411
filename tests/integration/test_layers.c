/* Whole MoE layers through a real daemon: every rank a process, every op case, forward and backward, against
 * the float64 reference. */
#include <check.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tests/integration/fabric/fabric_process.h"
#include "tests/integration/layer.h"
#include "tests/reference/values.h"

static struct fabric_process fabric;

/* Reference values of all ranks; only this rank's are compared. */
struct expected {
    struct reference_routing routing;
    double *x[REFERENCE_MAX_RANKS], *weights[REFERENCE_MAX_RANKS], *dout[REFERENCE_MAX_RANKS];
    double *out[REFERENCE_MAX_RANKS], *dx[REFERENCE_MAX_RANKS], *d_weights[REFERENCE_MAX_RANKS];
    double *w1, *b1, *w2, *b2, *dw1, *db1, *dw2, *db2;
};

static void expected_tokens(struct expected *e, const struct op_case *c, const struct op_inputs *in)
{
    for (uint32_t r = 0; r < c->world_size; r++) {
        size_t t = in->shape.n_tokens[r];
        e->x[r] = values_decoded(c->dtype, in->x[r], t * c->hidden);
        e->dout[r] = values_decoded(c->dtype, in->dout[r], t * c->hidden);
        e->weights[r] = values_decoded(EPD_F32, in->topk_weights[r], t * c->top_k);
        e->out[r] = values_alloc_doubles(t * c->hidden);
        e->dx[r] = values_alloc_doubles(t * c->hidden);
        e->d_weights[r] = values_alloc_doubles(t * c->top_k);
    }
}

static void expected_init(struct expected *e, const struct op_case *c, const struct op_inputs *in)
{
    size_t n1 = (size_t)c->n_experts * 2 * c->ffn, n2 = (size_t)c->n_experts * c->hidden;
    *e = (struct expected){0};
    reference_route(&e->routing, &in->shape, in->topk_idx);
    expected_tokens(e, c, in);
    e->w1 = values_decoded(c->dtype, in->w1, n1 * c->hidden);
    e->w2 = values_decoded(c->dtype, in->w2, n2 * c->ffn);
    e->b1 = c->biased ? values_decoded(c->dtype, in->b1, n1) : NULL;
    e->b2 = c->biased ? values_decoded(c->dtype, in->b2, n2) : NULL;
    e->dw1 = values_alloc_doubles(n1 * c->hidden);
    e->dw2 = values_alloc_doubles(n2 * c->ffn);
    e->db1 = c->biased ? values_alloc_doubles(n1) : NULL;
    e->db2 = c->biased ? values_alloc_doubles(n2) : NULL;
    struct reference_layer layer = {c->activation, e->w1, e->b1, e->w2, e->b2};
    struct reference_gradients gradients = {e->dx, e->d_weights, e->dw1, e->db1, e->dw2, e->db2};
    reference_moe_forward(&e->routing, &layer, e->x, e->weights, e->out);
    reference_moe_backward(&e->routing, &layer, e->x, e->weights, e->dout, &gradients);
}

static void expected_fini(struct expected *e, const struct op_case *c)
{
    for (uint32_t r = 0; r < c->world_size; r++) {
        free(e->x[r]), free(e->weights[r]), free(e->dout[r]);
        free(e->out[r]), free(e->dx[r]), free(e->d_weights[r]);
    }
    free(e->w1), free(e->b1), free(e->w2), free(e->b2), free(e->dw1), free(e->db1), free(e->dw2),
        free(e->db2);
    reference_routing_fini(&e->routing);
}

/* Gradients of weights are compared expert by expert: that is the scale a tolerance can speak of. */
static void expect_experts(const struct layer *layer, const char *what, const struct layer_tensor *got,
                           const double *want_all)
{
    if (got->tensor.role == EPD_ROLE_UNSPECIFIED)
        return;
    size_t n = got->n / layer->n_local_experts;
    for (uint32_t l = 0; l < layer->n_local_experts; l++) {
        struct layer_tensor one = *got;
        one.data = (char *)got->data + l * n * dtype_bytes(got->tensor.dtype);
        layer_expect(layer, what, &one, want_all + (layer->rank->rank * layer->n_local_experts + l) * n, n);
    }
}

struct layer_test {
    const struct op_case *op_case;
    enum epd_saved saved;
    int delay_wgrad;
};

enum { X, IDX, WEIGHTS, W1, B1, W2, B2, OUT, SPLITS, N_FORWARD };
enum { DOUT, BW1, BW2, BB2, DX, D_WEIGHTS, DW1, DB1, DW2, DB2, N_BACKWARD };

static void make_forward_tensors(struct layer *layer, struct layer_tensor *f)
{
    static const enum epd_role roles[] = {EPD_ROLE_X,  EPD_ROLE_TOPK_IDX, EPD_ROLE_TOPK_WEIGHTS,
                                          EPD_ROLE_W1, EPD_ROLE_B1,       EPD_ROLE_W2,
                                          EPD_ROLE_B2};
    for (int i = X; i <= B2; i++)
        f[i] = layer_input(layer, roles[i]);
    f[OUT] = layer_output(layer, EPD_ROLE_OUT);
    f[SPLITS] = layer_output(layer, EPD_ROLE_M_SPLITS);
}

static void make_backward_tensors(struct layer *layer, const struct layer_tensor *f, struct layer_tensor *b)
{
    static const enum epd_role roles[] = {EPD_ROLE_DX,  EPD_ROLE_D_WEIGHTS, EPD_ROLE_DW1,
                                          EPD_ROLE_DB1, EPD_ROLE_DW2,       EPD_ROLE_DB2};
    b[DOUT] = layer_input(layer, EPD_ROLE_DOUT);
    b[BW1] = f[W1], b[BW2] = f[W2], b[BB2] = f[B2];
    for (int i = DX; i <= DB2; i++)
        b[i] = layer_output(layer, roles[i - DX]);
}

static int is_overflow_error(const struct op_case *c)
{
    return c->capacity == OP_CAPACITY_SHORT && c->overflow == EPD_OVERFLOW_ERROR;
}

static void check_forward(struct layer *layer, const struct expected *e, struct epd_plan *forward,
                          struct layer_tensor *f)
{
    uint32_t r = layer->rank->rank;
    enum epd_status status = layer_step(forward);
    RANK_CHECK(status == (is_overflow_error(layer->op_case) ? EPD_CAPACITY_OVERFLOW : EPD_OK));
    layer_expect(layer, "out", &f[OUT], e->out[r], f[OUT].n);
    RANK_CHECK(memcmp(f[SPLITS].data, e->routing.ranks[r].m_splits, f[SPLITS].n * sizeof(int64_t)) == 0);
    void *first = malloc(f[OUT].n * dtype_bytes(f[OUT].tensor.dtype) + 1);
    for (int repeat = 0; repeat < 4 && status == EPD_OK; repeat++) {
        size_t bytes = f[OUT].n * dtype_bytes(f[OUT].tensor.dtype);
        memcpy(first, f[OUT].data, bytes);
        values_poison(f[OUT].data, bytes);
        RANK_CHECK(layer_step(forward) == EPD_OK);
        RANK_CHECK(memcmp(first, f[OUT].data, bytes) == 0);
    }
    free(first);
}

static void check_backward(const struct layer *layer, const struct expected *e, const struct layer_tensor *b)
{
    uint32_t r = layer->rank->rank;
    layer_expect(layer, "dx", &b[DX], e->dx[r], b[DX].n);
    layer_expect(layer, "d_weights", &b[D_WEIGHTS], e->d_weights[r], b[D_WEIGHTS].n);
    expect_experts(layer, "dw1", &b[DW1], e->dw1);
    expect_experts(layer, "db1", &b[DB1], e->db1);
    expect_experts(layer, "dw2", &b[DW2], e->dw2);
    expect_experts(layer, "db2", &b[DB2], e->db2);
}

static void run_backward(struct layer *layer, const struct layer_test *test, const struct expected *e,
                         struct epd_plan *forward, struct layer_tensor *b)
{
    struct epd_plan_options options = {
        .op = EPD_OP_MOE_BACKWARD, .context = forward, .delay_wgrad = test->delay_wgrad};
    uint32_t n_direct = test->delay_wgrad ? DW1 : N_BACKWARD;
    struct epd_plan *backward = layer_plan(layer, options, b, n_direct);
    RANK_CHECK(layer_step(backward) == EPD_OK);
    struct epd_plan *wgrad = NULL;
    if (test->delay_wgrad) {
        RANK_CHECK(values_poisoned(b[DW2].data, b[DW2].n * sizeof(float)));
        options = (struct epd_plan_options){.op = EPD_OP_MOE_WGRAD, .context = backward};
        wgrad = layer_plan(layer, options, b + DW1, N_BACKWARD - DW1);
        RANK_CHECK(layer_step(wgrad) == EPD_OK);
    }
    check_backward(layer, e, b);
    epd_plan_destroy(wgrad);
    epd_plan_destroy(backward);
}

static void layer_rank(const struct rank *rank)
{
    const struct layer_test *test = rank->arg;
    struct layer layer;
    struct expected e;
    struct layer_tensor f[N_FORWARD], b[N_BACKWARD];
    layer_open(&layer, rank, test->op_case);
    expected_init(&e, test->op_case, &layer.inputs);
    make_forward_tensors(&layer, f);
    make_backward_tensors(&layer, f, b);
    struct epd_plan_options options = {.op = EPD_OP_MOE_FORWARD, .saved = test->saved};
    struct epd_plan *forward = layer_plan(&layer, options, f, N_FORWARD);
    check_forward(&layer, &e, forward, f);
    if (test->saved != EPD_SAVED_NONE && !is_overflow_error(test->op_case))
        run_backward(&layer, test, &e, forward, b);
    epd_plan_destroy(forward);
    expected_fini(&e, test->op_case);
    layer_close(&layer);
}

static void run_all_cases(enum epd_saved saved, int delay_wgrad)
{
    unsigned n_run = 0;
    for (size_t i = 0; i < n_op_cases; i++) {
        struct layer_test test = {&op_cases[i], saved, delay_wgrad};
        char name[64];
        if (op_cases[i].world_size > MAX_TEST_RANKS || op_cases[i].world_size % fabric.n_group_nodes)
            continue;
        snprintf(name, sizeof(name), "layer-%zu-%d-%d", i, (int)saved, delay_wgrad);
        unsigned n_failed = fabric_run(&fabric, name, op_cases[i].world_size, layer_rank, &test);
        ck_assert_msg(n_failed == 0, "case \"%s\": %u ranks failed", op_cases[i].name, n_failed);
        n_run++;
    }
    printf("%u of %zu cases on %u of %u nodes\n", n_run, n_op_cases, fabric.n_group_nodes, fabric.n_nodes);
    ck_assert_uint_gt(n_run, 0);
}

static void with_devices(unsigned n_devices, enum epd_saved saved, int delay_wgrad)
{
    fabric_start(&fabric, fabric_wanted(), n_devices, NULL);
    run_all_cases(saved, delay_wgrad);
    fabric_stop(&fabric);
}

START_TEST(layers_with_saved_context_match_the_reference_on_four_devices)
{
    with_devices(4, EPD_SAVED_CONTEXT, 0);
}
END_TEST

START_TEST(layers_that_recompute_match_the_reference_on_one_device)
{
    with_devices(1, EPD_SAVED_RECOMPUTE, 0);
}
END_TEST

START_TEST(layers_with_delayed_wgrad_match_the_reference_on_eight_devices)
{
    with_devices(8, EPD_SAVED_CONTEXT, 1);
}
END_TEST

START_TEST(layers_for_inference_match_the_reference_on_two_devices)
{
    with_devices(2, EPD_SAVED_NONE, 0);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("layers");
    TCase *tests = tcase_create("layers");
    tcase_set_timeout(tests, 600);
    tcase_add_test(tests, layers_with_saved_context_match_the_reference_on_four_devices);
    tcase_add_test(tests, layers_that_recompute_match_the_reference_on_one_device);
    if (fabric_wanted() == 1) { /* what these add does not depend on nodes */
        tcase_add_test(tests, layers_with_delayed_wgrad_match_the_reference_on_eight_devices);
        tcase_add_test(tests, layers_for_inference_match_the_reference_on_two_devices);
    }
    suite_add_tcase(suite, tests);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int n_failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return n_failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
