#include "tests/unit/ep/layer.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Address space of one client; what is used of it is touched. */
#define CLIENT_BYTES (256u << 20)

static const void *local_part(const struct layer *layer, uint32_t rank, const void *all, size_t per_expert)
{
    return (const char *)all + rank * layer->n_local * per_expert * dtype_bytes(layer->op_case->dtype);
}

static void put_inputs(struct layer *layer, uint32_t r)
{
    const struct op_case *c = layer->op_case;
    const struct op_inputs *in = &layer->inputs;
    struct client *client = &layer->crew.clients[r];
    struct layer_inputs *rank = &layer->ranks[r];
    int64_t t = layer->n_tokens[r], h = c->hidden, f = c->ffn, n = (int64_t)layer->n_local;
    rank->x = client_put(client, c->dtype, 2, t, h, 0, in->x[r]);
    rank->dout = client_put(client, c->dtype, 2, t, h, 0, in->dout[r]);
    rank->topk_idx = client_put(client, c->idx_dtype, 2, t, c->top_k, 0, in->topk_typed[r]);
    rank->topk_weights = client_put(client, EPD_F32, 2, t, c->top_k, 0, in->topk_weights[r]);
    rank->w1 = client_put(client, c->dtype, 3, n, 2 * f, h,
                          local_part(layer, r, in->w1, 2 * layer->ffn * layer->hidden));
    rank->w2 =
        client_put(client, c->dtype, 3, n, h, f, local_part(layer, r, in->w2, layer->hidden * layer->ffn));
    if (!c->biased)
        return;
    rank->b1 = client_put(client, c->dtype, 2, n, 2 * f, 0, local_part(layer, r, in->b1, 2 * layer->ffn));
    rank->b2 = client_put(client, c->dtype, 2, n, h, 0, local_part(layer, r, in->b2, layer->hidden));
}

void layer_init(struct layer *layer, struct harness *harness, const struct op_case *op_case)
{
    if (getenv("EPD_TEST_VERBOSE")) /* what hangs is the last one named */
        (void)fprintf(stderr, "case %s\n", op_case->name);
    *layer = (struct layer){.op_case = op_case, .hidden = op_case->hidden, .ffn = op_case->ffn};
    op_inputs_init(&layer->inputs, op_case);
    layer->n_local = layer->inputs.n_local_experts;
    struct message_group_config config = {
        .n_experts = op_case->n_experts,
        .top_k = op_case->top_k,
        .hidden = op_case->hidden,
        .ffn = op_case->ffn,
        .max_tokens = op_case->max_tokens ? op_case->max_tokens : 1,
        .capacity_rows = op_case->capacity == OP_CAPACITY_AMPLE ? 0 : layer->inputs.shape.capacity_rows,
        .alignment = op_case->alignment,
        .dtype = op_case->dtype,
        .overflow = op_case->overflow,
    };
    crew_init(&layer->crew, harness, &config, op_case->world_size, CLIENT_BYTES);
    layer->inputs.shape.capacity_rows = team_capacity_rows(layer->crew.team);
    reference_route(&layer->routing, &layer->inputs.shape, layer->inputs.topk_idx);
    for (uint32_t r = 0; r < op_case->world_size; r++) {
        size_t t = layer->inputs.shape.n_tokens[r];
        layer->n_tokens[r] = (uint32_t)t;
        layer->x[r] = values_decoded(op_case->dtype, layer->inputs.x[r], t * layer->hidden);
        layer->dout[r] = values_decoded(op_case->dtype, layer->inputs.dout[r], t * layer->hidden);
        layer->weights[r] = values_decoded(EPD_F32, layer->inputs.topk_weights[r], t * op_case->top_k);
        put_inputs(layer, r);
        if (layer->routing.ranks[r].needed_rows > layer->inputs.shape.capacity_rows &&
            op_case->overflow == EPD_OVERFLOW_ERROR)
            layer->status = EPD_CAPACITY_OVERFLOW;
    }
}

void layer_fini(struct layer *layer)
{
    for (uint32_t r = 0; r < layer->op_case->world_size; r++) {
        free(layer->x[r]);
        free(layer->dout[r]);
        free(layer->weights[r]);
    }
    crew_fini(&layer->crew);
    reference_routing_fini(&layer->routing);
    op_inputs_fini(&layer->inputs);
}

void layer_reroute(struct layer *layer, uint64_t seed)
{
    const struct op_case *c = layer->op_case;
    for (uint32_t r = 0; r < c->world_size; r++)
        for (size_t t = 0; t < layer->n_tokens[r]; t++)
            for (uint32_t k = 0; k < c->top_k; k++) {
                /* Distinct experts: a random first one, then every (E / K)th. */
                int64_t *idx = layer->inputs.topk_idx[r] + t * c->top_k;
                idx[k] = k ? (idx[0] + k * (c->n_experts / c->top_k)) % c->n_experts
                           : (int64_t)(values_random(&seed) % c->n_experts);
            }
    op_inputs_retype(&layer->inputs, c);
    for (uint32_t r = 0; r < c->world_size; r++)
        memcpy(layer->ranks[r].topk_idx.data, layer->inputs.topk_typed[r], layer->ranks[r].topk_idx.bytes);
    reference_routing_fini(&layer->routing);
    reference_route(&layer->routing, &layer->inputs.shape, layer->inputs.topk_idx);
}

void layer_take_outputs(struct layer *layer, struct layer_outputs *outputs)
{
    const struct op_case *c = layer->op_case;
    int64_t h = c->hidden, f = c->ffn, n = (int64_t)layer->n_local;
    for (uint32_t r = 0; r < c->world_size; r++) {
        struct client *client = &layer->crew.clients[r];
        int64_t t = layer->n_tokens[r];
        outputs[r] = (struct layer_outputs){
            .out = client_take(client, c->dtype, 2, t, h, 0),
            .m_splits = client_take(client, EPD_I64, 1, n, 0, 0),
            .dx = client_take(client, c->dtype, 2, t, h, 0),
            .d_weights = client_take(client, EPD_F32, 2, t, c->top_k, 0),
            .dw1 = client_take(client, EPD_F32, 3, n, 2 * f, h),
            .db1 = client_take(client, EPD_F32, 2, n, 2 * f, 0),
            .dw2 = client_take(client, EPD_F32, 3, n, h, f),
            .db2 = client_take(client, EPD_F32, 2, n, h, 0),
        };
    }
}

void layer_poison_outputs(struct layer *layer, const struct layer_outputs *outputs)
{
    for (uint32_t r = 0; r < layer->op_case->world_size; r++) {
        const struct layer_outputs *o = &outputs[r];
        const struct slab *slabs[] = {&o->out, &o->m_splits, &o->dx,  &o->d_weights,
                                      &o->dw1, &o->db1,      &o->dw2, &o->db2};
        for (size_t i = 0; i < sizeof slabs / sizeof *slabs; i++)
            slab_poison(slabs[i]);
    }
}

/* One tensor, or its parts. */
static void bind_weights(struct draft *draft, struct layer *layer, int parts, enum epd_role role,
                         const struct slab *slab)
{
    if (!parts) {
        draft_bind(draft, &layer->crew, role, slab);
        return;
    }
    uint32_t n = (uint32_t)slab->shape[0];
    for (uint32_t i = 0; i < n; i++) {
        uint32_t idx = n - 1 - i; /* in any order */
        struct slab part = *slab;
        part.n_dims = 2;
        part.shape[0] = slab->shape[1];
        part.shape[1] = slab->shape[2];
        part.offset += slab->bytes / n * idx;
        draft_bind_part(draft, &layer->crew, role, idx, n, &part);
    }
}

void layer_forward_plan(struct layer *layer, struct layer_modes modes, const struct layer_outputs *outputs,
                        struct crew_plan *plan)
{
    struct draft *drafts = values_alloc(HARNESS_MAX_RANKS, sizeof *drafts);
    struct crew *crew = &layer->crew;
    for (uint32_t r = 0; r < crew->world_size; r++) {
        struct draft *draft = &drafts[r];
        const struct layer_inputs *in = &layer->ranks[r];
        draft_init(draft, crew, r, EPD_OP_MOE_FORWARD);
        draft->request.activation = layer->op_case->activation;
        draft->request.saved = modes.saved;
        draft->request.crossing = modes.crossing;
        draft_bind(draft, crew, EPD_ROLE_X, &in->x);
        draft_bind(draft, crew, EPD_ROLE_TOPK_IDX, &in->topk_idx);
        draft_bind(draft, crew, EPD_ROLE_TOPK_WEIGHTS, &in->topk_weights);
        bind_weights(draft, layer, modes.parts, EPD_ROLE_W1, &in->w1);
        bind_weights(draft, layer, modes.parts, EPD_ROLE_W2, &in->w2);
        if (layer->op_case->biased) {
            draft_bind(draft, crew, EPD_ROLE_B1, &in->b1);
            draft_bind(draft, crew, EPD_ROLE_B2, &in->b2);
        }
        draft_bind(draft, crew, EPD_ROLE_OUT, &outputs[r].out);
        draft_bind(draft, crew, EPD_ROLE_M_SPLITS, &outputs[r].m_splits);
    }
    crew_plan_create(plan, crew, drafts, crew->world_size);
    free(drafts);
}

static void bind_gradients(struct draft *draft, struct layer *layer, int parts,
                           const struct layer_outputs *outputs)
{
    bind_weights(draft, layer, parts, EPD_ROLE_DW1, &outputs->dw1);
    bind_weights(draft, layer, parts, EPD_ROLE_DW2, &outputs->dw2);
    draft_bind(draft, &layer->crew, EPD_ROLE_DB1, &outputs->db1);
    draft_bind(draft, &layer->crew, EPD_ROLE_DB2, &outputs->db2);
}

void layer_backward_plan(struct layer *layer, struct layer_modes modes, const struct layer_outputs *outputs,
                         const struct crew_plan *forward, struct crew_plan *plan)
{
    struct draft *drafts = values_alloc(HARNESS_MAX_RANKS, sizeof *drafts);
    struct crew *crew = &layer->crew;
    for (uint32_t r = 0; r < crew->world_size; r++) {
        struct draft *draft = &drafts[r];
        draft_init(draft, crew, r, EPD_OP_MOE_BACKWARD);
        draft->request.context = forward->plans[r];
        draft->request.delay_wgrad = modes.delay_wgrad;
        draft->request.accumulate = modes.accumulate;
        draft_bind(draft, crew, EPD_ROLE_DOUT, &layer->ranks[r].dout);
        draft_bind(draft, crew, EPD_ROLE_DX, &outputs[r].dx);
        draft_bind(draft, crew, EPD_ROLE_D_WEIGHTS, &outputs[r].d_weights);
        if (!modes.delay_wgrad)
            bind_gradients(draft, layer, modes.parts, &outputs[r]);
    }
    crew_plan_create(plan, crew, drafts, crew->world_size);
    free(drafts);
}

void layer_wgrad_plan(struct layer *layer, struct layer_modes modes, const struct layer_outputs *outputs,
                      const struct crew_plan *backward, uint32_t rank, struct crew_plan *plan)
{
    struct draft *draft = values_alloc(1, sizeof *draft);
    draft_init(draft, &layer->crew, rank, EPD_OP_MOE_WGRAD);
    draft->request.context = backward->plans[rank];
    draft->request.accumulate = modes.accumulate;
    bind_gradients(draft, layer, modes.parts, &outputs[rank]);
    crew_plan_create(plan, &layer->crew, draft, 1);
    free(draft);
}

/* The deviation comes from intermediates in the case's dtype. */
static void check_chain(const struct layer *layer, const char *what, size_t index, const struct slab *slab,
                        size_t first, const double *want, size_t n)
{
    char text[VALUES_TEXT_BYTES];
    const char *got = (const char *)slab->data + first * dtype_bytes(slab->dtype);
    struct tolerance tolerance = tolerance_chain(layer->op_case->dtype, want, n);
    ck_assert_msg(values_match(slab->dtype, got, want, n, tolerance, text), "%s: %s of %zu: %s",
                  layer->op_case->name, what, index, text);
}

/* The weights as the reference takes them. */
struct answers {
    double *w1, *b1, *w2, *b2;
    struct reference_layer layer;
};

static void answers_init(struct answers *answers, const struct layer *layer)
{
    const struct op_case *c = layer->op_case;
    size_t n_w2 = (size_t)c->n_experts * c->hidden * c->ffn;
    answers->w1 = values_decoded(c->dtype, layer->inputs.w1, 2 * n_w2);
    answers->w2 = values_decoded(c->dtype, layer->inputs.w2, n_w2);
    answers->b1 =
        c->biased ? values_decoded(c->dtype, layer->inputs.b1, (size_t)c->n_experts * 2 * c->ffn) : NULL;
    answers->b2 =
        c->biased ? values_decoded(c->dtype, layer->inputs.b2, (size_t)c->n_experts * c->hidden) : NULL;
    answers->layer = (struct reference_layer){
        .kind = c->activation, .w1 = answers->w1, .b1 = answers->b1, .w2 = answers->w2, .b2 = answers->b2};
}

static void answers_fini(struct answers *answers)
{
    free(answers->w1);
    free(answers->b1);
    free(answers->w2);
    free(answers->b2);
}

static void token_doubles(const struct layer *layer, size_t width, double **buffers)
{
    for (uint32_t r = 0; r < layer->op_case->world_size; r++)
        buffers[r] = values_alloc_doubles(layer->n_tokens[r] * width);
}

static void free_doubles(const struct layer *layer, double **buffers)
{
    for (uint32_t r = 0; r < layer->op_case->world_size; r++)
        free(buffers[r]);
}

void layer_check_forward(const struct layer *layer, const struct layer_outputs *outputs)
{
    struct answers answers;
    double *out[HARNESS_MAX_RANKS];
    answers_init(&answers, layer);
    token_doubles(layer, layer->hidden, out);
    reference_moe_forward(&layer->routing, &answers.layer, layer->x, layer->weights, out);
    for (uint32_t r = 0; r < layer->op_case->world_size; r++) {
        check_chain(layer, "out", r, &outputs[r].out, 0, out[r], layer->n_tokens[r] * layer->hidden);
        ck_assert(!memcmp(outputs[r].m_splits.data, layer->routing.ranks[r].m_splits,
                          layer->n_local * sizeof(int64_t)));
    }
    free_doubles(layer, out);
    answers_fini(&answers);
}

void layer_check_backward(const struct layer *layer, const struct layer_outputs *outputs)
{
    const struct op_case *c = layer->op_case;
    size_t h = layer->hidden, f = layer->ffn;
    struct answers answers;
    double *dx[HARNESS_MAX_RANKS], *d_weights[HARNESS_MAX_RANKS];
    answers_init(&answers, layer);
    token_doubles(layer, h, dx);
    token_doubles(layer, c->top_k, d_weights);
    struct reference_gradients gradients = {
        .dx = dx,
        .d_weights = d_weights,
        .dw1 = values_alloc_doubles((size_t)c->n_experts * 2 * f * h),
        .db1 = values_alloc_doubles((size_t)c->n_experts * 2 * f),
        .dw2 = values_alloc_doubles((size_t)c->n_experts * h * f),
        .db2 = values_alloc_doubles((size_t)c->n_experts * h),
    };
    reference_moe_backward(&layer->routing, &answers.layer, layer->x, layer->weights, layer->dout,
                           &gradients);
    for (uint32_t r = 0; r < c->world_size; r++) {
        check_chain(layer, "dx", r, &outputs[r].dx, 0, dx[r], layer->n_tokens[r] * h);
        check_chain(layer, "d_weights", r, &outputs[r].d_weights, 0, d_weights[r],
                    layer->n_tokens[r] * c->top_k);
    }
    for (size_t e = 0; e < c->n_experts; e++) {
        const struct layer_outputs *o = &outputs[e / layer->n_local];
        size_t l = e % layer->n_local;
        check_chain(layer, "dw1", e, &o->dw1, l * 2 * f * h, gradients.dw1 + e * 2 * f * h, 2 * f * h);
        check_chain(layer, "db1", e, &o->db1, l * 2 * f, gradients.db1 + e * 2 * f, 2 * f);
        check_chain(layer, "dw2", e, &o->dw2, l * h * f, gradients.dw2 + e * h * f, h * f);
        check_chain(layer, "db2", e, &o->db2, l * h, gradients.db2 + e * h, h);
    }
    free(gradients.dw1);
    free(gradients.db1);
    free(gradients.dw2);
    free(gradients.db2);
    free_doubles(layer, dx);
    free_doubles(layer, d_weights);
    answers_fini(&answers);
}

static void check_same(const struct slab *a, const struct slab *b, const char *what, uint32_t rank)
{
    const size_t width = dtype_bytes(a->dtype), n = a->bytes / width;
    const char *one = a->data, *other = b->data;
    size_t n_differ = 0, first = 0;
    for (size_t i = n; i-- > 0;)
        if (memcmp(one + i * width, other + i * width, width)) {
            n_differ++;
            first = i;
        }
    if (!n_differ)
        return;
    double *x = values_decoded(a->dtype, one, n), *y = values_decoded(b->dtype, other, n);
    ck_abort_msg("%s of rank %u: %zu of %zu elements differ, the first is element %zu: %.9g and %.9g", what,
                 rank, n_differ, n, first, x[first], y[first]);
}

void layer_check_same(const struct layer *layer, const struct layer_outputs *a, const struct layer_outputs *b)
{
    for (uint32_t r = 0; r < layer->op_case->world_size; r++) {
        check_same(&a[r].out, &b[r].out, "out", r);
        check_same(&a[r].m_splits, &b[r].m_splits, "m_splits", r);
        check_same(&a[r].dx, &b[r].dx, "dx", r);
        check_same(&a[r].d_weights, &b[r].d_weights, "d_weights", r);
        check_same(&a[r].dw1, &b[r].dw1, "dw1", r);
        check_same(&a[r].db1, &b[r].db1, "db1", r);
        check_same(&a[r].dw2, &b[r].dw2, "dw2", r);
        check_same(&a[r].db2, &b[r].db2, "db2", r);
    }
}
