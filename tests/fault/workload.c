#include "tests/fault/workload.h"

#include <stdlib.h>
#include <string.h>

#include "tests/reference/values.h"

const struct op_case workload_case = {.name = "workload",
                                      .dtype = EPD_F32,
                                      .idx_dtype = EPD_I64,
                                      .world_size = 2,
                                      .n_experts = 4,
                                      .top_k = 2,
                                      .max_tokens = 8,
                                      .hidden = 32,
                                      .ffn = 16,
                                      .alignment = 1,
                                      .tokens = OP_TOKENS_EQUAL,
                                      .pattern = OP_UNIFORM,
                                      .capacity = OP_CAPACITY_AMPLE,
                                      .overflow = EPD_OVERFLOW_ERROR,
                                      .activation = EPD_SWIGLU,
                                      .biased = 1};

/* layer_tensor without its checks: the daemon may be lost at any call. */
static enum epd_status add_tensor(struct workload *w, struct layer_tensor *t, enum epd_role role,
                                  enum epd_dtype dtype, const int64_t shape[3], uint32_t n_dims,
                                  const void *source)
{
    *t = (struct layer_tensor){.tensor = {.role = role, .dtype = dtype, .n_dims = n_dims}, .n = 1};
    for (uint32_t i = 0; i < n_dims; i++) {
        t->tensor.shape[i] = shape[i];
        t->n *= (size_t)shape[i];
    }
    const size_t bytes = t->n * dtype_bytes(dtype);
    enum epd_status status = epd_buffer_alloc(w->layer.group, bytes, &t->tensor.buffer);
    if (status != EPD_OK)
        return status;
    t->data = epd_buffer_data(t->tensor.buffer);
    if (source)
        memcpy(t->data, source, bytes);
    return EPD_OK;
}

static const void *local_part(const struct workload *w, const void *all, int64_t elements_per_expert)
{
    return (const float *)all + (int64_t)w->layer.rank->rank * w->layer.n_local_experts * elements_per_expert;
}

static enum epd_status make_tensors(struct workload *w)
{
    const struct op_case *c = w->layer.op_case;
    const struct op_inputs *in = &w->layer.inputs;
    const uint32_t r = w->layer.rank->rank;
    const int64_t t = w->layer.n_tokens, k = c->top_k, h = c->hidden, f = c->ffn,
                  l = w->layer.n_local_experts;
    const struct {
        struct layer_tensor *tensor;
        enum epd_role role;
        enum epd_dtype dtype;
        int64_t shape[3];
        uint32_t n_dims;
        const void *source;
    } rows[] = {
        {&w->x, EPD_ROLE_X, c->dtype, {t, h}, 2, in->x[r]},
        {&w->idx, EPD_ROLE_TOPK_IDX, c->idx_dtype, {t, k}, 2, in->topk_typed[r]},
        {&w->weights, EPD_ROLE_TOPK_WEIGHTS, EPD_F32, {t, k}, 2, in->topk_weights[r]},
        {&w->w1, EPD_ROLE_W1, c->dtype, {l, 2 * f, h}, 3, local_part(w, in->w1, 2 * f * h)},
        {&w->b1, EPD_ROLE_B1, c->dtype, {l, 2 * f}, 2, local_part(w, in->b1, 2 * f)},
        {&w->w2, EPD_ROLE_W2, c->dtype, {l, h, f}, 3, local_part(w, in->w2, h * f)},
        {&w->b2, EPD_ROLE_B2, c->dtype, {l, h}, 2, local_part(w, in->b2, h)},
        {&w->out, EPD_ROLE_OUT, c->dtype, {t, h}, 2, NULL},
    };
    for (size_t i = 0; i < sizeof(rows) / sizeof(rows[0]); i++) {
        enum epd_status status = add_tensor(w, rows[i].tensor, rows[i].role, rows[i].dtype, rows[i].shape,
                                            rows[i].n_dims, rows[i].source);
        if (status != EPD_OK)
            return status;
    }
    return EPD_OK;
}

static enum epd_status make_plan(struct workload *w)
{
    const struct epd_tensor tensors[] = {w->x.tensor,  w->idx.tensor, w->weights.tensor, w->w1.tensor,
                                         w->b1.tensor, w->w2.tensor,  w->b2.tensor,      w->out.tensor};
    const struct epd_plan_options options = {.size = sizeof(options),
                                             .op = EPD_OP_MOE_FORWARD,
                                             .activation = w->layer.op_case->activation,
                                             .n_tensors = sizeof(tensors) / sizeof(tensors[0]),
                                             .tensors = tensors};
    return epd_plan_create(w->layer.group, &options, &w->forward);
}

static enum epd_status join(struct workload *w, uint32_t deadline_ms)
{
    struct epd_open_options open = {
        .size = sizeof(open), .socket_path = w->layer.rank->socket_path, .client_name = "workload"};
    enum epd_status status = epd_open(&open, &w->layer.client);
    if (status != EPD_OK)
        return status;
    struct epd_group_options options = layer_group_options(&w->layer);
    options.deadline_ms = deadline_ms;
    return epd_group_join(w->layer.client, &options, &w->layer.group);
}

enum epd_status workload_try(struct workload *w, const struct rank *rank, const struct op_case *op_case,
                             uint32_t deadline_ms)
{
    *w = (struct workload){.layer = {.op_case = op_case, .rank = rank}};
    op_inputs_init(&w->layer.inputs, op_case);
    w->layer.n_tokens = w->layer.inputs.shape.n_tokens[rank->rank];
    w->layer.n_local_experts = w->layer.inputs.n_local_experts;
    enum epd_status status = join(w, deadline_ms);
    if (status == EPD_OK)
        status = make_tensors(w);
    if (status == EPD_OK)
        status = make_plan(w);
    if (status != EPD_OK) {
        snprintf(w->error, sizeof w->error, "%s", epd_error_text());
        workload_close(w);
    }
    return status;
}

void workload_open(struct workload *w, const struct rank *rank, const struct op_case *op_case,
                   uint32_t deadline_ms)
{
    RANK_CHECK(workload_try(w, rank, op_case, deadline_ms) == EPD_OK);
}

void workload_close(struct workload *w)
{
    epd_close(w->layer.client);
    w->layer.client = NULL;
    op_inputs_fini(&w->layer.inputs);
    free(w->first);
    w->first = NULL;
}

/* ---- results ---- */

static void expect_reference(const struct workload *w)
{
    const struct op_case *c = w->layer.op_case;
    const struct op_inputs *in = &w->layer.inputs;
    const size_t n_experts = c->n_experts, h = c->hidden, f = c->ffn;
    double *x[REFERENCE_MAX_RANKS], *weights[REFERENCE_MAX_RANKS], *out[REFERENCE_MAX_RANKS];
    struct reference_routing routing;
    reference_route(&routing, &in->shape, in->topk_idx);
    for (uint32_t r = 0; r < c->world_size; r++) {
        const size_t t = in->shape.n_tokens[r];
        x[r] = values_decoded(c->dtype, in->x[r], t * h);
        weights[r] = values_decoded(EPD_F32, in->topk_weights[r], t * c->top_k);
        out[r] = values_alloc_doubles(t * h);
    }
    double *w1 = values_decoded(c->dtype, in->w1, n_experts * 2 * f * h);
    double *b1 = values_decoded(c->dtype, in->b1, n_experts * 2 * f);
    double *w2 = values_decoded(c->dtype, in->w2, n_experts * h * f);
    double *b2 = values_decoded(c->dtype, in->b2, n_experts * h);
    const struct reference_layer layer = {.kind = c->activation, .w1 = w1, .b1 = b1, .w2 = w2, .b2 = b2};
    reference_moe_forward(&routing, &layer, x, weights, out);
    char text[VALUES_TEXT_BYTES];
    const double *want = out[w->layer.rank->rank];
    if (!values_match(c->dtype, w->out.data, want, w->out.n, tolerance_chain(c->dtype, want, w->out.n),
                      text)) {
        fprintf(stderr, "rank %u: EPD_OK and a wrong result: %s\n", w->layer.rank->rank, text);
        _exit(WORKLOAD_WRONG);
    }
    for (uint32_t r = 0; r < c->world_size; r++)
        free(x[r]), free(weights[r]), free(out[r]);
    free(w1), free(b1), free(w2), free(b2);
    reference_routing_fini(&routing);
}

static void check_result(struct workload *w)
{
    const size_t bytes = w->out.n * dtype_bytes(w->out.tensor.dtype);
    if (!w->first) {
        expect_reference(w);
        w->first = values_alloc(bytes, 1);
        memcpy(w->first, w->out.data, bytes);
    } else if (memcmp(w->first, w->out.data, bytes) != 0) {
        fprintf(stderr, "rank %u: EPD_OK and other bits than in the first step\n", w->layer.rank->rank);
        _exit(WORKLOAD_WRONG);
    }
}

enum epd_status workload_launch(struct workload *w)
{
    values_poison(w->out.data, w->out.n * dtype_bytes(w->out.tensor.dtype));
    return epd_plan_launch(w->forward, NULL);
}

enum epd_status workload_wait(struct workload *w)
{
    enum epd_status status = epd_plan_wait(w->forward, 0);
    if (status == EPD_OK)
        check_result(w);
    return status;
}

enum epd_status workload_step(struct workload *w)
{
    enum epd_status status = workload_launch(w);
    return status == EPD_OK ? workload_wait(w) : status;
}
