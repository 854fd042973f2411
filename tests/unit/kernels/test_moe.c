/* The whole layer, forward and backward, put together from the host kernels stage by stage as the pipeline of
 * ep does, against the reference that is written per token: gradients of x, topk_weights, w1, b1, w2, b2. */
#include <stdlib.h>
#include <string.h>

#include "tests/unit/kernels/suite.h"
#include "tests/unit/kernels/world.h"

/* Buffers of one rank; slots unless said otherwise. */
struct layer_rank {
    void *recv_x, *preact, *act, *y;     /* [C, H] [C, 2F] [C, F] [C, H] */
    void *dy, *d_act, *d_preact, *dx;    /* [C, H] [C, F] [C, 2F] [C, H] */
    float *recv_weights, *d_row_weights; /* [C] */
    float *dw1, *db1, *dw2, *db2;        /* of the local experts */
};

struct layer {
    struct world world;
    enum epd_dtype dtype;
    size_t hidden, ffn, n_local;
    struct layer_rank ranks[REFERENCE_MAX_RANKS];
    void *out[REFERENCE_MAX_RANKS], *dx[REFERENCE_MAX_RANKS], *d_weights[REFERENCE_MAX_RANKS]; /* per token */
};

static void *poisoned(size_t n, enum epd_dtype dtype)
{
    void *memory = values_alloc(n, dtype_bytes(dtype));
    values_poison(memory, n * dtype_bytes(dtype));
    return memory;
}

static void layer_init(struct layer *layer, const struct op_case *op_case)
{
    *layer = (struct layer){.dtype = op_case->dtype, .hidden = op_case->hidden, .ffn = op_case->ffn};
    world_init(&layer->world, op_case);
    layer->n_local = layer->world.inputs.n_local_experts;
    size_t rows = world_buffer_rows(&layer->world), hidden = layer->hidden, ffn = layer->ffn;
    for (uint32_t r = 0; r < op_case->world_size; r++) {
        layer->ranks[r] = (struct layer_rank){
            .recv_x = poisoned(rows * hidden, layer->dtype),
            .preact = poisoned(rows * 2 * ffn, layer->dtype),
            .act = poisoned(rows * ffn, layer->dtype),
            .y = poisoned(rows * hidden, layer->dtype),
            .dy = poisoned(rows * hidden, layer->dtype),
            .d_act = poisoned(rows * ffn, layer->dtype),
            .d_preact = poisoned(rows * 2 * ffn, layer->dtype),
            .dx = poisoned(rows * hidden, layer->dtype),
            .recv_weights = poisoned(rows, EPD_F32),
            .d_row_weights = poisoned(rows, EPD_F32),
            .dw1 = poisoned(layer->n_local * 2 * ffn * hidden, EPD_F32),
            .db1 = poisoned(layer->n_local * 2 * ffn, EPD_F32),
            .dw2 = poisoned(layer->n_local * hidden * ffn, EPD_F32),
            .db2 = poisoned(layer->n_local * hidden, EPD_F32),
        };
    }
    world_token_buffers(&layer->world, layer->dtype, hidden, layer->out);
    world_token_buffers(&layer->world, layer->dtype, hidden, layer->dx);
    world_token_buffers(&layer->world, EPD_F32, op_case->top_k, layer->d_weights);
}

static void layer_fini(struct layer *layer)
{
    for (uint32_t r = 0; r < layer->world.op_case->world_size; r++) {
        struct layer_rank *rank = &layer->ranks[r];
        void *owned[] = {rank->recv_x,       rank->preact,       rank->act, rank->y,   rank->dy,  rank->d_act,
                         rank->d_preact,     rank->dx,           rank->dw1, rank->db1, rank->dw2, rank->db2,
                         rank->recv_weights, rank->d_row_weights};
        for (size_t i = 0; i < sizeof(owned) / sizeof(owned[0]); i++)
            free(owned[i]);
    }
    world_free_buffers(&layer->world, layer->out);
    world_free_buffers(&layer->world, layer->dx);
    world_free_buffers(&layer->world, layer->d_weights);
    world_fini(&layer->world);
}

/* The part of a weight tensor [E, per_expert] that lives on a rank. */
static const void *local_part(const struct layer *layer, uint32_t rank, const void *all, size_t per_expert)
{
    return all ? (const char *)all + rank * layer->n_local * per_expert * dtype_bytes(layer->dtype) : NULL;
}

static void run_gemm(struct layer *layer, uint32_t rank, struct gemm_args args, size_t n, size_t k)
{
    args.shape.dtype = layer->dtype;
    args.shape.n = (uint32_t)n;
    args.shape.k = (uint32_t)k;
    if (!args.shape.dtype_c)
        args.shape.dtype_c = layer->dtype;
    args.groups = world_groups(&layer->world, rank);
    args.error = &layer->world.ranks[rank].error;
    ck_assert_int_eq(host_gemm(&args, &layer->world.scratch), EPD_OK);
}

static struct gemm_args fprop(const struct layer *layer, const void *x, const void *w, const void *bias,
                              void *y)
{
    return (struct gemm_args){.shape = {.layout = EPD_GEMM_TN, .dtype_bias = bias ? layer->dtype : 0},
                              .a = x,
                              .b = w,
                              .bias = bias,
                              .c = y};
}

static void experts_forward(struct layer *layer, uint32_t r)
{
    const struct op_inputs *inputs = &layer->world.inputs;
    struct layer_rank *rank = &layer->ranks[r];
    size_t hidden = layer->hidden, ffn = layer->ffn;
    const void *w1 = local_part(layer, r, inputs->w1, 2 * ffn * hidden);
    const void *w2 = local_part(layer, r, inputs->w2, hidden * ffn);
    const void *b1 = local_part(layer, r, inputs->b1, 2 * ffn),
               *b2 = local_part(layer, r, inputs->b2, hidden);
    struct activation_args activation = {
        .groups = world_groups(&layer->world, r),
        .kind = layer->world.op_case->activation,
        .dtype = layer->dtype,
        .ffn = (uint32_t)ffn,
        .preact = rank->preact,
        .act = rank->act,
        .error = &layer->world.ranks[r].error,
    };
    run_gemm(layer, r, fprop(layer, rank->recv_x, w1, b1, rank->preact), 2 * ffn, hidden);
    ck_assert_int_eq(host_activation(&activation), EPD_OK);
    run_gemm(layer, r, fprop(layer, rank->act, w2, b2, rank->y), hidden, ffn);
}

/* One member of every rank's buffers as the array the world functions take. */
#define EACH_RANK(layer, array, member)                                                                      \
    for (uint32_t rank_idx = 0; rank_idx < (layer)->world.op_case->world_size; rank_idx++)                   \
    (array)[rank_idx] = (layer)->ranks[rank_idx].member

static void layer_forward(struct layer *layer)
{
    void *recv_x[REFERENCE_MAX_RANKS], *y[REFERENCE_MAX_RANKS];
    float *recv_weights[REFERENCE_MAX_RANKS];
    EACH_RANK(layer, recv_x, recv_x);
    EACH_RANK(layer, recv_weights, recv_weights);
    EACH_RANK(layer, y, y);
    world_route(&layer->world);
    world_dispatch(&layer->world, WORLD_X, 0, recv_x, recv_weights);
    for (uint32_t r = 0; r < layer->world.op_case->world_size; r++)
        experts_forward(layer, r);
    world_combine(&layer->world, y, 1, layer->out);
}

static void activation_backward(struct layer *layer, uint32_t r)
{
    struct layer_rank *rank = &layer->ranks[r];
    const void *b2 = local_part(layer, r, layer->world.inputs.b2, layer->hidden);
    struct activation_bwd_args args = {
        .groups = world_groups(&layer->world, r),
        .kind = layer->world.op_case->activation,
        .dtype = layer->dtype,
        .ffn = (uint32_t)layer->ffn,
        .preact = rank->preact,
        .d_act = rank->d_act,
        .row_weights = rank->recv_weights,
        .d_preact = rank->d_preact,
        .weighted_act = rank->d_act,
        .d_row_weights = rank->d_row_weights,
        .dy = b2 ? rank->dy : NULL,
        .bias2 = b2,
        .hidden = (uint32_t)layer->hidden,
        .error = &layer->world.ranks[r].error,
    };
    ck_assert_int_eq(host_activation_bwd(&args), EPD_OK);
}

static struct gemm_args wgrad(const void *dy, const void *x, float *dw, float *dbias)
{
    return (struct gemm_args){
        .shape = {.layout = EPD_GEMM_NT, .dtype_c = EPD_F32, .dtype_bias = dbias ? EPD_F32 : 0},
        .a = dy,
        .b = x,
        .c = dw,
        .dbias = dbias};
}

static void experts_backward(struct layer *layer, uint32_t r)
{
    const struct op_inputs *inputs = &layer->world.inputs;
    struct layer_rank *rank = &layer->ranks[r];
    size_t hidden = layer->hidden, ffn = layer->ffn;
    struct gemm_args dgrad2 = {.shape = {.layout = EPD_GEMM_NN},
                               .a = rank->dy,
                               .b = local_part(layer, r, inputs->w2, hidden * ffn),
                               .c = rank->d_act};
    struct gemm_args dgrad1 = {.shape = {.layout = EPD_GEMM_NN},
                               .a = rank->d_preact,
                               .b = local_part(layer, r, inputs->w1, 2 * ffn * hidden),
                               .c = rank->dx};
    struct bias_grad_args db2 = {
        .groups = world_groups(&layer->world, r),
        .dtype = layer->dtype,
        .dtype_dbias = EPD_F32,
        .n = (uint32_t)hidden,
        .dy = rank->dy,
        .row_weights = rank->recv_weights,
        .dbias = rank->db2,
        .error = &layer->world.ranks[r].error,
    };
    run_gemm(layer, r, dgrad2, hidden, ffn);
    activation_backward(layer, r);
    run_gemm(layer, r, wgrad(rank->dy, rank->d_act, rank->dw2, NULL), hidden, ffn);
    ck_assert_int_eq(host_bias_grad(&db2), EPD_OK);
    run_gemm(layer, r, dgrad1, 2 * ffn, hidden);
    run_gemm(layer, r, wgrad(rank->d_preact, rank->recv_x, rank->dw1, rank->db1), 2 * ffn, hidden);
}

static void layer_backward(struct layer *layer)
{
    void *dy[REFERENCE_MAX_RANKS], *dx[REFERENCE_MAX_RANKS];
    float *d_row_weights[REFERENCE_MAX_RANKS];
    EACH_RANK(layer, dy, dy);
    EACH_RANK(layer, dx, dx);
    EACH_RANK(layer, d_row_weights, d_row_weights);
    world_dispatch(&layer->world, WORLD_DOUT, 0, dy, NULL);
    for (uint32_t r = 0; r < layer->world.op_case->world_size; r++)
        experts_backward(layer, r);
    world_combine(&layer->world, dx, 0, layer->dx);
    world_gather(&layer->world, d_row_weights, 0, (float *const *)layer->d_weights);
}

/* The answers of the reference. */
struct answers {
    struct reference_layer layer;
    double *w1, *b1, *w2, *b2;
    double *out[REFERENCE_MAX_RANKS], *dx[REFERENCE_MAX_RANKS], *d_weights[REFERENCE_MAX_RANKS];
    double *dw1, *db1, *dw2, *db2;
};

static void answers_init(struct answers *answers, const struct world *world)
{
    const struct op_case *c = world->op_case;
    const struct op_inputs *inputs = &world->inputs;
    size_t n_w1 = (size_t)c->n_experts * 2 * c->ffn * c->hidden, n_w2 = n_w1 / 2;
    size_t n_b1 = (size_t)c->n_experts * 2 * c->ffn, n_b2 = (size_t)c->n_experts * c->hidden;
    *answers = (struct answers){
        .w1 = values_decoded(c->dtype, inputs->w1, n_w1),
        .w2 = values_decoded(c->dtype, inputs->w2, n_w2),
        .b1 = inputs->b1 ? values_decoded(c->dtype, inputs->b1, n_b1) : NULL,
        .b2 = inputs->b2 ? values_decoded(c->dtype, inputs->b2, n_b2) : NULL,
        .dw1 = values_alloc_doubles(n_w1),
        .dw2 = values_alloc_doubles(n_w2),
        .db1 = values_alloc_doubles(n_b1),
        .db2 = values_alloc_doubles(n_b2),
    };
    answers->layer = (struct reference_layer){
        .kind = c->activation, .w1 = answers->w1, .b1 = answers->b1, .w2 = answers->w2, .b2 = answers->b2};
    world_token_doubles(world, c->hidden, answers->out);
    world_token_doubles(world, c->hidden, answers->dx);
    world_token_doubles(world, c->top_k, answers->d_weights);
    struct reference_gradients gradients = {.dx = answers->dx,
                                            .d_weights = answers->d_weights,
                                            .dw1 = answers->dw1,
                                            .db1 = answers->db1,
                                            .dw2 = answers->dw2,
                                            .db2 = answers->db2};
    reference_moe_forward(&world->reference, &answers->layer, world->x, world->weights, answers->out);
    reference_moe_backward(&world->reference, &answers->layer, world->x, world->weights, world->dout,
                           &gradients);
}

static void answers_fini(struct answers *answers, const struct world *world)
{
    double *owned[] = {answers->w1,  answers->b1,  answers->w2,  answers->b2,
                       answers->dw1, answers->db1, answers->dw2, answers->db2};
    for (size_t i = 0; i < sizeof(owned) / sizeof(owned[0]); i++)
        free(owned[i]);
    world_free_doubles(world, answers->out);
    world_free_doubles(world, answers->dx);
    world_free_doubles(world, answers->d_weights);
}

/* The deviation comes from intermediates in `chain`, the result itself is of dtype `dtype`. */
static void check_chain(const struct layer *layer, const char *what, size_t index, enum epd_dtype dtype,
                        const void *got, const double *want, size_t n)
{
    char text[VALUES_TEXT_BYTES];
    struct tolerance tolerance = tolerance_chain(layer->dtype, want, n);
    ck_assert_msg(values_match(dtype, got, want, n, tolerance, text), "%s: %s of %zu: %s",
                  layer->world.op_case->name, what, index, text);
}

static void check_forward(const struct layer *layer, const struct answers *answers)
{
    for (uint32_t r = 0; r < layer->world.op_case->world_size; r++)
        check_chain(layer, "out", r, layer->dtype, layer->out[r], answers->out[r],
                    layer->world.inputs.shape.n_tokens[r] * layer->hidden);
}

static void check_backward(const struct layer *layer, const struct answers *answers)
{
    const struct op_case *c = layer->world.op_case;
    size_t n_w1 = 2 * layer->ffn * layer->hidden, n_w2 = n_w1 / 2, n_b1 = 2 * layer->ffn,
           n_b2 = layer->hidden;
    for (uint32_t r = 0; r < c->world_size; r++) {
        size_t n_tokens = layer->world.inputs.shape.n_tokens[r];
        check_chain(layer, "dx", r, layer->dtype, layer->dx[r], answers->dx[r], n_tokens * layer->hidden);
        check_chain(layer, "d_weights", r, EPD_F32, layer->d_weights[r], answers->d_weights[r],
                    n_tokens * c->top_k);
    }
    for (size_t e = 0; e < c->n_experts; e++) {
        const struct layer_rank *rank = &layer->ranks[e / layer->n_local];
        size_t local = e % layer->n_local;
        check_chain(layer, "dw1", e, EPD_F32, rank->dw1 + local * n_w1, answers->dw1 + e * n_w1, n_w1);
        check_chain(layer, "db1", e, EPD_F32, rank->db1 + local * n_b1, answers->db1 + e * n_b1, n_b1);
        check_chain(layer, "dw2", e, EPD_F32, rank->dw2 + local * n_w2, answers->dw2 + e * n_w2, n_w2);
        check_chain(layer, "db2", e, EPD_F32, rank->db2 + local * n_b2, answers->db2 + e * n_b2, n_b2);
    }
}

START_TEST(a_layer_and_its_gradients_match_the_reference_in_every_case)
{
    for (size_t i = 0; i < n_op_cases; i++) {
        struct layer layer;
        struct answers answers;
        layer_init(&layer, &op_cases[i]);
        answers_init(&answers, &layer.world);
        layer_forward(&layer);
        check_forward(&layer, &answers);
        layer_backward(&layer);
        check_backward(&layer, &answers);
        answers_fini(&answers, &layer.world);
        layer_fini(&layer);
    }
}
END_TEST

START_TEST(a_repeated_layer_gives_the_same_bits)
{
    const char *names[] = {"uniform f32", "uniform bf16", "uniform f16", "overflow drop bf16"};
    for (size_t i = 0; i < 4; i++) {
        struct layer first, layer;
        layer_init(&first, op_case_named(names[i]));
        layer_forward(&first);
        layer_backward(&first);
        layer_init(&layer, op_case_named(names[i]));
        for (int repeat = 1; repeat < SUITE_REPEATS; repeat++) {
            layer_forward(&layer);
            layer_backward(&layer);
            for (uint32_t r = 0; r < layer.world.op_case->world_size; r++) {
                size_t n = layer.world.inputs.shape.n_tokens[r] * layer.hidden,
                       bytes = n * dtype_bytes(layer.dtype);
                ck_assert(!memcmp(layer.out[r], first.out[r], bytes));
                ck_assert(!memcmp(layer.dx[r], first.dx[r], bytes));
                ck_assert(!memcmp(layer.ranks[r].dw1, first.ranks[r].dw1,
                                  layer.n_local * 2 * layer.ffn * layer.hidden * sizeof(float)));
            }
        }
        layer_fini(&first);
        layer_fini(&layer);
    }
}
END_TEST

int main(void)
{
    const TTest *const tests[] = {
        a_layer_and_its_gradients_match_the_reference_in_every_case,
        a_repeated_layer_gives_the_same_bits,
    };
    return suite_run("kernels moe", tests, sizeof(tests) / sizeof(tests[0]));
}
