/* Single ops through a real daemon: dispatch, grouped GEMM, activation and combine chained by the client give
 * the bits of moe_forward; identity experts; d_weights; several plans in flight; the zero-copy contract as
 * the stats tell it. */
#include <check.h>
#include <jansson.h>
#include <stdlib.h>
#include <string.h>

#include "tests/integration/fabric/fabric_process.h"
#include "tests/integration/layer.h"
#include "tests/reference/values.h"

static struct fabric_process fabric;

static const struct op_case *case_named(const char *name)
{
    for (size_t i = 0; i < n_op_cases; i++)
        if (strcmp(op_cases[i].name, name) == 0)
            return &op_cases[i];
    ck_abort_msg("no op case \"%s\"", name);
    return NULL;
}

static void start(void)
{
    fabric_start(&fabric, fabric_wanted(), 4, NULL);
}

static void stop(void)
{
    fabric_stop(&fabric);
}

static void run(const char *name, rank_function function)
{
    const struct op_case *op_case = case_named(name);
    unsigned n_failed = fabric_run(&fabric, name, op_case->world_size, function, op_case);
    ck_assert_uint_eq(n_failed, 0);
}

static struct layer_tensor as_role(struct layer_tensor tensor, enum epd_role role)
{
    tensor.tensor.role = role;
    return tensor;
}

/* dispatch -> TN -> activation -> TN -> combine, all plans of the client. */
struct chain {
    struct layer_tensor x, idx, weights, recv_x, splits, offsets, w1, b1, w2, b2, preact, act, y, out;
    struct epd_plan *dispatch, *gemm1, *activation, *gemm2, *combine;
};

static void chain_open(struct chain *c, struct layer *layer)
{
    c->x = layer_input(layer, EPD_ROLE_X);
    c->idx = layer_input(layer, EPD_ROLE_TOPK_IDX);
    c->weights = layer_input(layer, EPD_ROLE_TOPK_WEIGHTS);
    c->w1 = layer_input(layer, EPD_ROLE_W1), c->b1 = layer_input(layer, EPD_ROLE_B1);
    c->w2 = layer_input(layer, EPD_ROLE_W2), c->b2 = layer_input(layer, EPD_ROLE_B2);
    c->recv_x = layer_output(layer, EPD_ROLE_RECV_X);
    c->splits = layer_output(layer, EPD_ROLE_M_SPLITS);
    c->offsets = layer_output(layer, EPD_ROLE_OFFSETS);
    c->preact = layer_output(layer, EPD_ROLE_PREACT);
    c->act = layer_output(layer, EPD_ROLE_ACT);
    c->y = layer_output(layer, EPD_ROLE_Y);
    c->out = layer_output(layer, EPD_ROLE_OUT);
}

static struct epd_plan *chain_gemm(struct layer *layer, struct chain *c, struct layer_tensor a,
                                   struct layer_tensor b, struct layer_tensor bias, struct layer_tensor y)
{
    struct epd_plan_options options = {.op = EPD_OP_GROUPED_GEMM, .layout = EPD_GEMM_TN};
    if (bias.tensor.role != EPD_ROLE_UNSPECIFIED)
        bias = as_role(bias, EPD_ROLE_BIAS);
    struct layer_tensor tensors[] = {
        as_role(a, EPD_ROLE_A), as_role(b, EPD_ROLE_B), bias, as_role(y, EPD_ROLE_C), c->splits, c->offsets};
    return layer_plan(layer, options, tensors, 6);
}

static void chain_plans(struct chain *c, struct layer *layer)
{
    struct epd_plan_options options = {.op = EPD_OP_DISPATCH};
    struct layer_tensor dispatch[] = {c->x, c->idx, c->weights, c->recv_x, c->splits, c->offsets};
    c->dispatch = layer_plan(layer, options, dispatch, 6);
    c->gemm1 = chain_gemm(layer, c, c->recv_x, c->w1, c->b1, c->preact);
    options = (struct epd_plan_options){.op = EPD_OP_ACTIVATION};
    struct layer_tensor activation[] = {c->preact, c->act, c->splits, c->offsets};
    c->activation = layer_plan(layer, options, activation, 4);
    c->gemm2 = chain_gemm(layer, c, c->act, c->w2, c->b2, c->y);
    options = (struct epd_plan_options){.op = EPD_OP_COMBINE, .context = c->dispatch};
    struct layer_tensor combine[] = {c->y, c->weights, c->out};
    c->combine = layer_plan(layer, options, combine, 3);
}

static void chain_rank(const struct rank *rank)
{
    struct layer layer;
    struct chain c;
    layer_open(&layer, rank, rank->arg);
    chain_open(&c, &layer);
    chain_plans(&c, &layer);
    /* all five in flight at once: launches of one group run in their order */
    struct epd_plan *plans[] = {c.dispatch, c.gemm1, c.activation, c.gemm2, c.combine};
    for (int i = 0; i < 5; i++)
        RANK_CHECK(epd_plan_launch(plans[i], NULL) == EPD_OK);
    for (int i = 0; i < 5; i++)
        RANK_CHECK(epd_plan_wait(plans[i], 0) == EPD_OK);
    struct layer_tensor out = layer_output(&layer, EPD_ROLE_OUT);
    struct layer_tensor whole[] = {c.x, c.idx, c.weights, c.w1, c.b1, c.w2, c.b2, out};
    struct epd_plan_options options = {.op = EPD_OP_MOE_FORWARD};
    struct epd_plan *forward = layer_plan(&layer, options, whole, 8);
    RANK_CHECK(layer_step(forward) == EPD_OK);
    RANK_CHECK(memcmp(out.data, c.out.data, out.n * dtype_bytes(out.tensor.dtype)) == 0);
    /* rows past the last slab belong to nobody and stay as they were */
    const int64_t *offsets = c.offsets.data;
    size_t row_bytes = layer.op_case->hidden * dtype_bytes(layer.op_case->dtype);
    size_t used = (size_t)offsets[layer.n_local_experts];
    size_t tail = ((size_t)layer.capacity_rows - used) * row_bytes;
    RANK_CHECK(values_poisoned((char *)c.recv_x.data + used * row_bytes, tail));
    RANK_CHECK(values_poisoned((char *)c.y.data + used * row_bytes, tail));
    layer_close(&layer);
}

START_TEST(chained_ops_give_the_bits_of_moe_forward)
{
    run("uniform f32", chain_rank);
    run("uniform bf16", chain_rank);
    run("uniform f16", chain_rank);
    run("zero tokens rank", chain_rank);
    run("empty experts bf16", chain_rank);
}
END_TEST

/* Identity experts: combine of recv_x without weights gives (number of routed k) x; dispatch_bwd is the same
 * sum; d_weights of combine_bwd over Y = recv_x is <dout, x>; DY holds w dout. */
static void identity_rank(const struct rank *rank)
{
    struct layer layer;
    layer_open(&layer, rank, rank->arg);
    uint32_t h = layer.op_case->hidden, k = layer.op_case->top_k;
    struct layer_tensor x = layer_input(&layer, EPD_ROLE_X), idx = layer_input(&layer, EPD_ROLE_TOPK_IDX);
    struct layer_tensor weights = layer_input(&layer, EPD_ROLE_TOPK_WEIGHTS),
                        dout = layer_input(&layer, EPD_ROLE_DOUT);
    struct layer_tensor recv_x = layer_output(&layer, EPD_ROLE_RECV_X),
                        splits = layer_output(&layer, EPD_ROLE_M_SPLITS);
    struct layer_tensor out = layer_output(&layer, EPD_ROLE_OUT), dx = layer_output(&layer, EPD_ROLE_DX);
    struct layer_tensor dy = layer_output(&layer, EPD_ROLE_DY),
                        d_weights = layer_output(&layer, EPD_ROLE_D_WEIGHTS);
    struct epd_plan *dispatch = layer_plan(&layer, (struct epd_plan_options){.op = EPD_OP_DISPATCH},
                                           (struct layer_tensor[]){x, idx, weights, recv_x, splits}, 5);
    struct epd_plan *combine =
        layer_plan(&layer, (struct epd_plan_options){.op = EPD_OP_COMBINE, .context = dispatch},
                   (struct layer_tensor[]){as_role(recv_x, EPD_ROLE_Y), out}, 2);
    struct epd_plan *dispatch_bwd =
        layer_plan(&layer, (struct epd_plan_options){.op = EPD_OP_DISPATCH_BWD, .context = dispatch},
                   (struct layer_tensor[]){as_role(recv_x, EPD_ROLE_D_RECV_X), dx}, 2);
    struct epd_plan *combine_bwd =
        layer_plan(&layer, (struct epd_plan_options){.op = EPD_OP_COMBINE_BWD, .context = dispatch},
                   (struct layer_tensor[]){dout, weights, as_role(recv_x, EPD_ROLE_Y), dy, d_weights}, 5);
    RANK_CHECK(layer_step(dispatch) == EPD_OK && layer_step(combine) == EPD_OK);
    RANK_CHECK(layer_step(dispatch_bwd) == EPD_OK && layer_step(combine_bwd) == EPD_OK);
    double *want_out = values_alloc_doubles(out.n), *want_weights = values_alloc_doubles(d_weights.n);
    double *x64 = values_decoded(layer.op_case->dtype, x.data, x.n);
    double *dout64 = values_decoded(layer.op_case->dtype, dout.data, dout.n);
    const int64_t *topk = layer.inputs.topk_idx[rank->rank];
    for (size_t t = 0; t < layer.n_tokens; t++) {
        for (size_t j = 0; j < k; j++) {
            for (size_t i = 0; i < h && topk[t * k + j] >= 0; i++) {
                want_out[t * h + i] += x64[t * h + i];
                want_weights[t * k + j] += x64[t * h + i] * dout64[t * h + i];
            }
        }
    }
    layer_expect(&layer, "combine of identity experts", &out, want_out, out.n);
    layer_expect(&layer, "dispatch_bwd of recv_x", &dx, want_out, dx.n);
    layer_expect(&layer, "d_weights of combine_bwd", &d_weights, want_weights, d_weights.n);
    free(want_out), free(want_weights), free(x64), free(dout64);
    layer_close(&layer);
}

START_TEST(identity_experts_sum_to_k_times_x)
{
    run("uniform f32", identity_rank);
    run("some missing f32", identity_rank);
    run("uniform bf16", identity_rank);
    run("receives nothing", identity_rank);
}
END_TEST

/* The same plan again with other routing: another step's counts must not shine through. */
static void reroute_rank(const struct rank *rank)
{
    struct layer layer;
    struct chain c;
    layer_open(&layer, rank, rank->arg);
    chain_open(&c, &layer);
    struct layer_tensor whole[] = {c.x, c.idx, c.weights, c.w1, c.b1, c.w2, c.b2, c.out};
    struct epd_plan *forward =
        layer_plan(&layer, (struct epd_plan_options){.op = EPD_OP_MOE_FORWARD}, whole, 8);
    size_t bytes = c.out.n * dtype_bytes(c.out.tensor.dtype);
    void *first = values_alloc(bytes + 1, 1);
    RANK_CHECK(layer_step(forward) == EPD_OK);
    memcpy(first, c.out.data, bytes);
    size_t idx_bytes = c.idx.n * dtype_bytes(c.idx.tensor.dtype);
    void *saved_idx = values_alloc(idx_bytes + 1, 1);
    memcpy(saved_idx, c.idx.data, idx_bytes);
    memset(c.idx.data, 0xff, idx_bytes); /* -1: nobody is routed */
    RANK_CHECK(layer_step(forward) == EPD_OK);
    for (size_t i = 0; i < bytes; i++)
        RANK_CHECK(((char *)c.out.data)[i] == 0);
    memcpy(c.idx.data, saved_idx, idx_bytes);
    RANK_CHECK(layer_step(forward) == EPD_OK);
    RANK_CHECK(memcmp(first, c.out.data, bytes) == 0);
    free(first), free(saved_idx);
    layer_close(&layer);
}

START_TEST(relaunch_with_other_routing_forgets_the_last_step)
{
    run("uniform f32", reroute_rank);
    run("many experts", reroute_rank);
}
END_TEST

/* Fewer tokens in one launch than the plan was made for. */
static void fewer_tokens_rank(const struct rank *rank)
{
    struct layer layer;
    struct chain c;
    layer_open(&layer, rank, rank->arg);
    chain_open(&c, &layer);
    struct layer_tensor whole[] = {c.x, c.idx, c.weights, c.w1, c.b1, c.w2, c.b2, c.out};
    struct epd_plan *forward =
        layer_plan(&layer, (struct epd_plan_options){.op = EPD_OP_MOE_FORWARD}, whole, 8);
    size_t row_bytes = layer.op_case->hidden * dtype_bytes(layer.op_case->dtype);
    RANK_CHECK(layer_step(forward) == EPD_OK);
    void *first = values_alloc(c.out.n + 1, dtype_bytes(c.out.tensor.dtype));
    memcpy(first, c.out.data, layer.n_tokens * row_bytes);
    values_poison(c.out.data, layer.n_tokens * row_bytes);
    RANK_CHECK(epd_plan_set_tokens(forward, layer.n_tokens + 1) == EPD_INVALID_ARGUMENT);
    uint32_t fewer = rank->rank == 0 ? 0 : layer.n_tokens / 2;
    RANK_CHECK(epd_plan_set_tokens(forward, fewer) == EPD_OK);
    RANK_CHECK(layer_step(forward) == EPD_OK);
    /* not the same bits: how a GEMM splits its rows may depend on how many there are */
    double *want = values_decoded(c.out.tensor.dtype, first, (size_t)fewer * layer.op_case->hidden);
    layer_expect(&layer, "out of fewer tokens", &c.out, want, (size_t)fewer * layer.op_case->hidden);
    free(want);
    RANK_CHECK(values_poisoned((char *)c.out.data + fewer * row_bytes, (layer.n_tokens - fewer) * row_bytes));
    free(first);
    layer_close(&layer);
}

START_TEST(a_launch_with_fewer_tokens_leaves_the_other_rows_alone)
{
    run("uniform f32", fewer_tokens_rank);
}
END_TEST

/* Sum of every integer under `key` anywhere in the document. */
static long long sum_of(const json_t *value, const char *key, int *n_found)
{
    long long sum = 0;
    const char *name;
    json_t *item;
    size_t i;
    if (json_is_object(value)) {
        json_object_foreach ((json_t *)value, name, item) {
            if (strcmp(name, key) == 0 && json_is_integer(item)) {
                sum += json_integer_value(item);
                ++*n_found;
            }
            sum += sum_of(item, key, n_found);
        }
    }
    json_array_foreach (value, i, item)
        sum += sum_of(item, key, n_found);
    return sum;
}

static void copies_rank(const struct rank *rank)
{
    chain_rank(rank);
    struct epd_open_options options = {.size = sizeof(options), .socket_path = rank->socket_path};
    struct epd_client *client;
    char *text;
    int n_copies = 0, n_wire = 0;
    RANK_CHECK(epd_open(&options, &client) == EPD_OK);
    RANK_CHECK(epd_stats(client, &text) == EPD_OK);
    json_t *stats = json_loads(text, 0, NULL);
    RANK_CHECK(stats != NULL);
    RANK_CHECK(sum_of(stats, "copied_bytes", &n_copies) == 0 && n_copies > 0);
    RANK_CHECK(sum_of(stats, "wire_bytes", &n_wire) > 0);
    json_decref(stats);
    epd_free(text);
    epd_close(client);
}

START_TEST(no_payload_is_copied_between_buffers)
{
    run("uniform f32", copies_rank);
}
END_TEST

/* Weights as L parts in buffers of their own, and a grouped_gemm in each layout through the daemon. */
static void parts_rank(const struct rank *rank)
{
    enum { L = 3, N = 40, K = 24 };
    static const int64_t splits[L] = {5, 0, 7};
    struct layer layer;
    layer_open(&layer, rank, rank->arg);
    struct layer_tensor t[16];
    uint64_t seed = 7;
    int64_t m = 12;
    float x[12 * K], w[L * N * K], y[12 * N];
    values_fill(EPD_F32, x, 12 * K, -1, 1, &seed);
    values_fill(EPD_F32, w, L * N * K, -1, 1, &seed);
    t[0] = layer_tensor(&layer, EPD_ROLE_A, EPD_F32, (int64_t[]){m, K}, 2, x);
    t[1] = layer_tensor(&layer, EPD_ROLE_C, EPD_F32, (int64_t[]){m, N}, 2, NULL);
    t[2] = layer_tensor(&layer, EPD_ROLE_M_SPLITS, EPD_I64, (int64_t[]){L}, 1, splits);
    for (int l = 0; l < L; l++) {
        t[3 + l] = layer_tensor(&layer, EPD_ROLE_B, EPD_F32, (int64_t[]){N, K}, 2, w + l * N * K);
        t[3 + l].tensor.part_idx = (uint32_t)l;
        t[3 + l].tensor.n_parts = L;
    }
    struct epd_plan_options options = {.op = EPD_OP_GROUPED_GEMM, .layout = EPD_GEMM_TN};
    struct epd_plan *plan = layer_plan(&layer, options, t, 3 + L);
    RANK_CHECK(layer_step(plan) == EPD_OK);
    for (int i = 0; i < m; i++) {
        for (int j = 0; j < N; j++) {
            double sum = 0;
            for (int p = 0; p < K; p++)
                sum += (double)x[i * K + p] * w[((i < 5 ? 0 : 2) * N + j) * K + p];
            y[i * N + j] = (float)sum;
        }
    }
    double *want = values_decoded(EPD_F32, y, (size_t)m * N);
    layer_expect(&layer, "grouped_gemm with parts", &t[1], want, (size_t)m * N);
    free(want);
    layer_close(&layer);
}

START_TEST(weights_may_come_as_parts)
{
    run("one rank", parts_rank);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("ops");
    TCase *tests = tcase_create("ops");
    tcase_set_timeout(tests, 300);
    tcase_add_checked_fixture(tests, start, stop);
    tcase_add_test(tests, chained_ops_give_the_bits_of_moe_forward);
    tcase_add_test(tests, identity_experts_sum_to_k_times_x);
    tcase_add_test(tests, relaunch_with_other_routing_forgets_the_last_step);
    tcase_add_test(tests, a_launch_with_fewer_tokens_leaves_the_other_rows_alone);
    tcase_add_test(tests, no_payload_is_copied_between_buffers);
    tcase_add_test(tests, weights_may_come_as_parts);
    suite_add_tcase(suite, tests);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int n_failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return n_failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
