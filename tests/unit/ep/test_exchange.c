/* dispatch, combine and their backward forms through plans, against the reference. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tests/unit/ep/harness_memory.h"
#include "tests/unit/ep/layer.h"

#define COUNT(array) (sizeof(array) / sizeof *(array))

struct exchange_rank {
    struct slab recv_x, recv_weights, m_splits, offsets;
    struct slab y, out, dy, d_weights_y, d_recv_x, d_recv_weights, dx, d_weights;
};

struct exchange {
    struct layer layer;
    struct exchange_rank ranks[HARNESS_MAX_RANKS];
    struct crew_plan dispatch, combine, combine_bwd, dispatch_bwd;
    int64_t capacity;
};

/* Values of slots that a client would compute: random, of the case's dtype. */
static struct slab take_random(struct client *client, enum epd_dtype dtype, int64_t n_rows, int64_t n_columns,
                               uint64_t seed)
{
    struct slab slab = client_take(client, dtype, n_columns ? 2 : 1, n_rows, n_columns, 0);
    values_fill(dtype, slab.data, slab.bytes / dtype_bytes(dtype), -1.0, 1.0, &seed);
    return slab;
}

static void take_tensors(struct exchange *exchange)
{
    const struct op_case *c = exchange->layer.op_case;
    int64_t n = (int64_t)exchange->layer.n_local, capacity = exchange->capacity, h = c->hidden;
    for (uint32_t r = 0; r < c->world_size; r++) {
        struct client *client = &exchange->layer.crew.clients[r];
        int64_t t = exchange->layer.n_tokens[r];
        exchange->ranks[r] = (struct exchange_rank){
            .recv_x = client_take(client, c->dtype, 2, capacity, h, 0),
            .recv_weights = client_take(client, EPD_F32, 1, capacity, 0, 0),
            .m_splits = client_take(client, EPD_I64, 1, n, 0, 0),
            .offsets = client_take(client, EPD_I64, 1, n + 1, 0, 0),
            .y = take_random(client, c->dtype, capacity, h, 11 + r),
            .out = client_take(client, c->dtype, 2, t, h, 0),
            .dy = client_take(client, c->dtype, 2, capacity, h, 0),
            .d_weights_y = client_take(client, EPD_F32, 2, t, c->top_k, 0),
            .d_recv_x = take_random(client, c->dtype, capacity, h, 31 + r),
            .d_recv_weights = take_random(client, EPD_F32, capacity, 0, 51 + r),
            .dx = client_take(client, c->dtype, 2, t, h, 0),
            .d_weights = client_take(client, EPD_F32, 2, t, c->top_k, 0),
        };
    }
}

struct bound {
    enum epd_role role;
    const struct slab *slab;
};

static void draft_op(struct draft *draft, struct crew *crew, uint32_t rank, enum epd_op op,
                     const struct crew_plan *context, const struct bound *bound)
{
    draft_init(draft, crew, rank, op);
    draft->request.context = context ? context->plans[rank] : NULL;
    for (; bound->role; bound++)
        draft_bind(draft, crew, bound->role, bound->slab);
}

static void create_plans(struct exchange *exchange)
{
    struct crew *crew = &exchange->layer.crew;
    struct draft *drafts = values_alloc(4 * HARNESS_MAX_RANKS, sizeof *drafts);
    struct draft *d[4];
    for (int i = 0; i < 4; i++)
        d[i] = drafts + i * HARNESS_MAX_RANKS;
    for (uint32_t r = 0; r < crew->world_size; r++) {
        const struct layer_inputs *in = &exchange->layer.ranks[r];
        const struct exchange_rank *x = &exchange->ranks[r];
        draft_op(&d[0][r], crew, r, EPD_OP_DISPATCH, NULL,
                 (struct bound[]){{EPD_ROLE_X, &in->x},
                                  {EPD_ROLE_TOPK_IDX, &in->topk_idx},
                                  {EPD_ROLE_TOPK_WEIGHTS, &in->topk_weights},
                                  {EPD_ROLE_RECV_X, &x->recv_x},
                                  {EPD_ROLE_RECV_WEIGHTS, &x->recv_weights},
                                  {EPD_ROLE_M_SPLITS, &x->m_splits},
                                  {EPD_ROLE_OFFSETS, &x->offsets},
                                  {0}});
    }
    crew_plan_create(&exchange->dispatch, crew, d[0], crew->world_size);
    for (uint32_t r = 0; r < crew->world_size; r++) {
        const struct layer_inputs *in = &exchange->layer.ranks[r];
        const struct exchange_rank *x = &exchange->ranks[r];
        draft_op(&d[1][r], crew, r, EPD_OP_COMBINE, &exchange->dispatch,
                 (struct bound[]){{EPD_ROLE_Y, &x->y},
                                  {EPD_ROLE_TOPK_WEIGHTS, &in->topk_weights},
                                  {EPD_ROLE_OUT, &x->out},
                                  {0}});
        draft_op(&d[2][r], crew, r, EPD_OP_COMBINE_BWD, &exchange->dispatch,
                 (struct bound[]){{EPD_ROLE_DOUT, &in->dout},
                                  {EPD_ROLE_TOPK_WEIGHTS, &in->topk_weights},
                                  {EPD_ROLE_DY, &x->dy},
                                  {EPD_ROLE_Y, &x->y},
                                  {EPD_ROLE_D_WEIGHTS, &x->d_weights_y},
                                  {0}});
        draft_op(&d[3][r], crew, r, EPD_OP_DISPATCH_BWD, &exchange->dispatch,
                 (struct bound[]){{EPD_ROLE_D_RECV_X, &x->d_recv_x},
                                  {EPD_ROLE_DX, &x->dx},
                                  {EPD_ROLE_D_RECV_WEIGHTS, &x->d_recv_weights},
                                  {EPD_ROLE_D_WEIGHTS, &x->d_weights},
                                  {0}});
    }
    crew_plan_create(&exchange->combine, crew, d[1], crew->world_size);
    crew_plan_create(&exchange->combine_bwd, crew, d[2], crew->world_size);
    crew_plan_create(&exchange->dispatch_bwd, crew, d[3], crew->world_size);
    free(drafts);
}

static void exchange_init(struct exchange *exchange, struct harness *harness, const struct op_case *op_case)
{
    layer_init(&exchange->layer, harness, op_case);
    exchange->capacity = team_capacity_rows(exchange->layer.crew.team);
    take_tensors(exchange);
    create_plans(exchange);
}

static void exchange_fini(struct exchange *exchange)
{
    crew_plan_destroy(&exchange->combine);
    crew_plan_destroy(&exchange->combine_bwd);
    crew_plan_destroy(&exchange->dispatch_bwd);
    crew_plan_destroy(&exchange->dispatch);
    layer_fini(&exchange->layer);
}

/* One array of doubles per rank. */
struct doubles {
    double *of[HARNESS_MAX_RANKS];
};

static struct doubles slot_doubles(const struct exchange *exchange, size_t width)
{
    struct doubles doubles = {{NULL}};
    for (uint32_t r = 0; r < exchange->layer.op_case->world_size; r++)
        doubles.of[r] = values_alloc_doubles((size_t)exchange->capacity * width);
    return doubles;
}

static struct doubles token_doubles(const struct exchange *exchange, size_t width)
{
    struct doubles doubles = {{NULL}};
    for (uint32_t r = 0; r < exchange->layer.op_case->world_size; r++)
        doubles.of[r] = values_alloc_doubles(exchange->layer.n_tokens[r] * width);
    return doubles;
}

static double *decoded(const struct slab *slab)
{
    return values_decoded(slab->dtype, slab->data, slab->bytes / dtype_bytes(slab->dtype));
}

static void free_doubles(const struct exchange *exchange, struct doubles *doubles)
{
    for (uint32_t r = 0; r < exchange->layer.op_case->world_size; r++)
        free(doubles->of[r]);
}

static void check(const struct exchange *exchange, const char *what, uint32_t rank, const struct slab *got,
                  const double *want, size_t n, struct tolerance tolerance)
{
    char text[VALUES_TEXT_BYTES];
    ck_assert_msg(values_match(got->dtype, got->data, want, n, tolerance, text), "%s: %s of rank %u: %s",
                  exchange->layer.op_case->name, what, rank, text);
}

static const struct tolerance exact = {0, 0};

/* Payload to the bit, padding zero, the tail as it was. */
static void check_slots(const struct exchange *exchange, const char *what, uint32_t rank,
                        const struct slab *got, const double *want, size_t width, struct tolerance tolerance)
{
    const struct reference_rank *routed = &exchange->layer.routing.ranks[rank];
    size_t n = (size_t)routed->offsets[exchange->layer.n_local] * width;
    check(exchange, what, rank, got, want, n, tolerance);
    size_t written = n * dtype_bytes(got->dtype);
    ck_assert_msg(values_poisoned((char *)got->data + written, got->bytes - written),
                  "%s: %s of rank %u: written behind the slabs", exchange->layer.op_case->name, what, rank);
}

static void check_dispatch(const struct exchange *exchange)
{
    const struct layer *layer = &exchange->layer;
    struct doubles recv_x = slot_doubles(exchange, layer->hidden), recv_weights = slot_doubles(exchange, 1);
    reference_dispatch(&layer->routing, (double *const *)layer->x, (double *const *)layer->weights, 0,
                       recv_x.of, recv_weights.of);
    for (uint32_t r = 0; r < layer->op_case->world_size; r++) {
        const struct exchange_rank *x = &exchange->ranks[r];
        check_slots(exchange, "recv_x", r, &x->recv_x, recv_x.of[r], layer->hidden, exact);
        check_slots(exchange, "recv_weights", r, &x->recv_weights, recv_weights.of[r], 1, exact);
        ck_assert(!memcmp(x->m_splits.data, layer->routing.ranks[r].m_splits, x->m_splits.bytes));
        ck_assert(!memcmp(x->offsets.data, layer->routing.ranks[r].offsets, x->offsets.bytes));
    }
    free_doubles(exchange, &recv_x);
    free_doubles(exchange, &recv_weights);
}

static void check_rest(const struct exchange *exchange)
{
    const struct layer *layer = &exchange->layer;
    const struct op_case *c = layer->op_case;
    size_t h = layer->hidden, k = c->top_k;
    struct doubles y = {{NULL}}, d_recv_x = y, d_recv_weights = y;
    struct doubles out = token_doubles(exchange, h), d_weights_y = token_doubles(exchange, k);
    struct doubles dx = token_doubles(exchange, h), d_weights = token_doubles(exchange, k);
    struct doubles dy = slot_doubles(exchange, h);
    for (uint32_t r = 0; r < c->world_size; r++) {
        y.of[r] = decoded(&exchange->ranks[r].y);
        d_recv_x.of[r] = decoded(&exchange->ranks[r].d_recv_x);
        d_recv_weights.of[r] = decoded(&exchange->ranks[r].d_recv_weights);
    }
    reference_combine(&layer->routing, y.of, (double *const *)layer->weights, out.of);
    reference_dispatch(&layer->routing, (double *const *)layer->dout, (double *const *)layer->weights, 1,
                       dy.of, NULL);
    reference_weight_grad(&layer->routing, (double *const *)layer->dout, y.of, d_weights_y.of);
    reference_combine(&layer->routing, d_recv_x.of, NULL, dx.of);
    reference_gather(&layer->routing, d_recv_weights.of, d_weights.of);
    for (uint32_t r = 0; r < c->world_size; r++) {
        const struct exchange_rank *x = &exchange->ranks[r];
        size_t t = layer->n_tokens[r];
        check(exchange, "out", r, &x->out, out.of[r], t * h,
              harness_combine_tolerance(c->dtype, (uint32_t)k, c->world_size));
        check(exchange, "d_weights", r, &x->d_weights_y, d_weights_y.of[r], t * k,
              tolerance_sum(EPD_F32, h, 0.6));
        check(exchange, "dx", r, &x->dx, dx.of[r], t * h,
              harness_combine_tolerance(c->dtype, (uint32_t)k, c->world_size));
        check(exchange, "d_weights of dispatch", r, &x->d_weights, d_weights.of[r], t * k, exact);
        check_slots(exchange, "dy", r, &x->dy, dy.of[r], h, tolerance_of(c->dtype));
    }
    struct doubles *all[] = {&y, &d_recv_x, &d_recv_weights, &out, &d_weights_y, &dx, &d_weights, &dy};
    for (size_t i = 0; i < COUNT(all); i++)
        free_doubles(exchange, all[i]);
}

START_TEST(every_exchange_matches_the_reference_in_every_case)
{
    unsigned n_run = 0;
    for (size_t i = 0; i < n_op_cases; i++) {
        struct harness harness;
        struct exchange exchange;
        struct outcome outcome;
        if (!harness_spans(op_cases[i].world_size))
            continue;
        n_run++;
        harness_open(&harness, 1 + i % 3, 0);
        exchange_init(&exchange, &harness, &op_cases[i]);
        const struct layer *layer = &exchange.layer;
        launch(&exchange.dispatch, layer->n_tokens, &outcome);
        for (uint32_t r = 0; r < op_cases[i].world_size; r++)
            ck_assert_int_eq(outcome.ranks[r].status, layer->status);
        check_dispatch(&exchange);
        enum epd_status rest = layer->status ? EPD_INVALID_ARGUMENT : EPD_OK;
        launch_expect(&exchange.combine, layer->n_tokens, rest);
        launch_expect(&exchange.combine_bwd, layer->n_tokens, rest);
        launch_expect(&exchange.dispatch_bwd, layer->n_tokens, rest);
        if (!rest)
            check_rest(&exchange);
        exchange_fini(&exchange);
        harness_close(&harness);
    }
    printf("%u of %zu cases\n", n_run, n_op_cases);
    ck_assert_uint_gt(n_run, 0);
}
END_TEST

/* With Y only where the gradient of the weights is wanted, and with DY where Y lies. */
static void combine_bwd_plan(struct exchange *exchange, int with_weights, int in_place,
                             struct crew_plan *plan)
{
    struct crew *crew = &exchange->layer.crew;
    struct draft *drafts = values_alloc(HARNESS_MAX_RANKS, sizeof *drafts);
    for (uint32_t r = 0; r < crew->world_size; r++) {
        const struct layer_inputs *in = &exchange->layer.ranks[r];
        const struct exchange_rank *x = &exchange->ranks[r];
        draft_op(&drafts[r], crew, r, EPD_OP_COMBINE_BWD, &exchange->dispatch,
                 (struct bound[]){{EPD_ROLE_DOUT, &in->dout},
                                  {EPD_ROLE_TOPK_WEIGHTS, &in->topk_weights},
                                  {EPD_ROLE_DY, in_place ? &x->y : &x->dy},
                                  {0}});
        if (with_weights) {
            draft_bind(&drafts[r], crew, EPD_ROLE_Y, &x->y);
            draft_bind(&drafts[r], crew, EPD_ROLE_D_WEIGHTS, &x->d_weights_y);
        }
    }
    crew_plan_create(plan, crew, drafts, crew->world_size);
    free(drafts);
}

static void *copied(const void *data, size_t bytes)
{
    return memcpy(values_alloc(bytes + 1, 1), data, bytes);
}

START_TEST(combine_bwd_gives_the_same_bits_without_the_gradient_of_weights_and_in_the_place_of_y)
{
    struct harness harness;
    struct exchange exchange;
    struct crew_plan alone, in_place;
    harness_open(&harness, 4, 0);
    exchange_init(&exchange, &harness, op_case_named("uniform bf16"));
    const struct layer *layer = &exchange.layer;
    combine_bwd_plan(&exchange, 0, 0, &alone);
    combine_bwd_plan(&exchange, 1, 1, &in_place);
    launch_expect(&exchange.dispatch, layer->n_tokens, EPD_OK);
    launch_expect(&exchange.combine_bwd, layer->n_tokens, EPD_OK);
    void *dy[HARNESS_MAX_RANKS], *d_weights[HARNESS_MAX_RANKS];
    for (uint32_t r = 0; r < layer->op_case->world_size; r++) {
        const struct exchange_rank *x = &exchange.ranks[r];
        dy[r] = copied(x->dy.data, x->dy.bytes);
        d_weights[r] = copied(x->d_weights_y.data, x->d_weights_y.bytes);
        slab_poison(&x->dy);
        slab_poison(&x->d_weights_y);
    }
    launch_expect(&alone, layer->n_tokens, EPD_OK);
    launch_expect(&in_place, layer->n_tokens, EPD_OK);
    for (uint32_t r = 0; r < layer->op_case->world_size; r++) {
        const struct exchange_rank *x = &exchange.ranks[r];
        size_t written = (size_t)layer->routing.ranks[r].offsets[layer->n_local] * layer->hidden *
                         dtype_bytes(layer->op_case->dtype);
        ck_assert(!memcmp(dy[r], x->dy.data, x->dy.bytes));
        ck_assert(!memcmp(dy[r], x->y.data, written));
        ck_assert(!memcmp(d_weights[r], x->d_weights_y.data, x->d_weights_y.bytes));
        free(dy[r]);
        free(d_weights[r]);
    }
    crew_plan_destroy(&in_place);
    crew_plan_destroy(&alone);
    exchange_fini(&exchange);
    harness_close(&harness);
}
END_TEST

/* A token once to each other rank that has one of its experts, and back: what ranks send in a dispatch, in a combine. */
static void count_wire(const struct layer *layer, uint64_t *dispatched, uint64_t *combined)
{
    const struct op_case *c = layer->op_case;
    const uint64_t row_bytes = c->hidden * dtype_bytes(c->dtype);
    for (uint32_t r = 0; r < c->world_size; r++)
        for (size_t t = 0; t < layer->n_tokens[r]; t++) {
            uint32_t ranks = 0;
            for (uint32_t k = 0; k < c->top_k; k++) {
                const int64_t expert = layer->routing.ranks[r].expert[t * c->top_k + k];
                if (expert >= 0)
                    ranks |= 1u << (size_t)expert / layer->n_local;
            }
            for (uint32_t to = 0; to < c->world_size; to++)
                if (to != r && ranks >> to & 1) {
                    dispatched[r] += row_bytes;
                    combined[to] += row_bytes;
                }
        }
}

/* network_bytes: on one node nothing crosses; else a rail carries at least the tokens that leave for another node and
 * those that come, each once. */
static void check_network(const struct exchange *exchange, const struct outcome *outcome)
{
    const struct layer *layer = &exchange->layer;
    const struct op_case *c = layer->op_case;
    const uint32_t n_nodes = layer->crew.n_nodes, n_here = c->world_size / n_nodes;
    uint64_t rail[HARNESS_MAX_RANKS] = {0}, all = 0, moved = 0;
    for (uint32_t r = 0; r < c->world_size; r++)
        for (size_t t = 0; t < layer->n_tokens[r]; t++) {
            uint32_t nodes = 0;
            for (uint32_t k = 0; k < c->top_k; k++) {
                const int64_t expert = layer->routing.ranks[r].expert[t * c->top_k + k];
                if (expert >= 0)
                    nodes |= 1u << (size_t)expert / layer->n_local / n_here;
            }
            for (uint32_t node = 0; node < n_nodes; node++)
                if (node != r / n_here && nodes >> node & 1) {
                    rail[r] += c->hidden * dtype_bytes(c->dtype);
                    rail[node * n_here + r % n_here] += c->hidden * dtype_bytes(c->dtype);
                }
        }
    for (uint32_t i = 0; i < n_nodes && n_nodes > 1; i++) {
        struct rails_traffic traffic;
        rails_traffic(layer->crew.rails[i], &traffic);
        for (uint32_t node = 0; node < n_nodes; node++)
            all += traffic.sent_bytes[node] + traffic.received_bytes[node];
    }
    for (uint32_t r = 0; r < c->world_size; r++) {
        ck_assert_uint_ge(outcome->ranks[r].network_bytes, rail[r]);
        ck_assert_int_eq(outcome->ranks[r].network_bytes > 0, n_nodes > 1);
        moved += outcome->ranks[r].network_bytes;
    }
    /* The first step of the group: nothing else has crossed but what the nodes agree with. */
    ck_assert_uint_le(moved, all);
}

START_TEST(a_step_reports_rows_and_bytes)
{
    struct harness harness;
    struct exchange exchange;
    struct outcome outcome;
    harness_open(&harness, 2, 0);
    exchange_init(&exchange, &harness, op_case_named("uniform f32"));
    const struct layer *layer = &exchange.layer;
    const struct op_case *c = layer->op_case;
    int64_t rows_of_expert[64] = {0};
    uint64_t dispatched[HARNESS_MAX_RANKS] = {0}, combined[HARNESS_MAX_RANKS] = {0};
    count_wire(layer, dispatched, combined);
    for (uint32_t r = 0; r < c->world_size; r++)
        for (size_t i = 0; i < layer->n_tokens[r] * c->top_k; i++)
            rows_of_expert[layer->routing.ranks[r].expert[i]]++;
    launch(&exchange.dispatch, layer->n_tokens, &outcome);
    ck_assert(outcome.has_expert_rows);
    for (uint32_t e = 0; e < c->n_experts; e++)
        ck_assert_int_eq(outcome.expert_rows[e], rows_of_expert[e]);
    for (uint32_t r = 0; r < c->world_size; r++) {
        int64_t rows = 0;
        for (size_t l = 0; l < layer->n_local; l++)
            rows += rows_of_expert[r * layer->n_local + l];
        ck_assert_int_eq(outcome.ranks[r].rows, rows);
        ck_assert_uint_eq(outcome.ranks[r].wire_bytes, dispatched[r]);
        ck_assert_uint_eq(outcome.ranks[r].copied_bytes, 0);
    }
    check_network(&exchange, &outcome);
    launch(&exchange.combine, layer->n_tokens, &outcome);
    ck_assert(!outcome.has_expert_rows);
    for (uint32_t r = 0; r < c->world_size; r++)
        ck_assert_uint_eq(outcome.ranks[r].wire_bytes, combined[r]);
    exchange_fini(&exchange);
    harness_close(&harness);
}
END_TEST

START_TEST(a_step_of_fewer_tokens_leaves_the_rest_of_the_output_alone)
{
    struct harness harness;
    struct exchange exchange;
    harness_open(&harness, 2, 0);
    exchange_init(&exchange, &harness, op_case_named("some missing f32"));
    const struct layer *layer = &exchange.layer;
    uint32_t fewer[HARNESS_MAX_RANKS];
    for (uint32_t r = 0; r < layer->op_case->world_size; r++)
        fewer[r] = layer->n_tokens[r] - 30 * r - 37; /* none on the last */
    launch_expect(&exchange.dispatch, fewer, EPD_OK);
    launch_expect(&exchange.combine, fewer, EPD_OK);
    launch_expect(&exchange.combine_bwd, fewer, EPD_OK);
    launch_expect(&exchange.dispatch_bwd, fewer, EPD_OK);
    for (uint32_t r = 0; r < layer->op_case->world_size; r++) {
        const struct exchange_rank *x = &exchange.ranks[r];
        const struct slab *outputs[] = {&x->out, &x->dx, &x->d_weights, &x->d_weights_y};
        for (size_t i = 0; i < COUNT(outputs); i++) {
            size_t written = fewer[r] * outputs[i]->bytes / layer->n_tokens[r];
            ck_assert(!written || !values_poisoned(outputs[i]->data, written));
            ck_assert(values_poisoned((char *)outputs[i]->data + written, outputs[i]->bytes - written));
        }
    }
    /* The same contexts, other tokens: refused. */
    launch_expect(&exchange.combine, layer->n_tokens, EPD_INVALID_ARGUMENT);
    exchange_fini(&exchange);
    harness_close(&harness);
}
END_TEST

START_TEST(five_repeats_give_the_same_bits)
{
    struct harness harness;
    struct exchange exchange;
    harness_open(&harness, 4, 0);
    exchange_init(&exchange, &harness, op_case_named("uniform bf16"));
    const struct layer *layer = &exchange.layer;
    char *first[HARNESS_MAX_RANKS] = {NULL};
    for (int repeat = 0; repeat < 5; repeat++) {
        launch_expect(&exchange.dispatch, layer->n_tokens, EPD_OK);
        launch_expect(&exchange.combine, layer->n_tokens, EPD_OK);
        for (uint32_t r = 0; r < layer->op_case->world_size; r++) {
            const struct slab *out = &exchange.ranks[r].out;
            if (!repeat)
                first[r] = memcpy(values_alloc(out->bytes, 1), out->data, out->bytes);
            ck_assert(!memcmp(first[r], out->data, out->bytes));
            slab_poison(out);
        }
    }
    for (uint32_t r = 0; r < layer->op_case->world_size; r++)
        free(first[r]);
    exchange_fini(&exchange);
    harness_close(&harness);
}
END_TEST

START_TEST(a_bad_index_fails_the_step_on_all_ranks_and_is_named)
{
    struct harness harness;
    struct exchange exchange;
    struct outcome outcome;
    harness_open(&harness, 2, 0);
    exchange_init(&exchange, &harness, op_case_named("uniform f32"));
    const struct layer *layer = &exchange.layer;
    int64_t *idx = layer->ranks[2].topk_idx.data;
    int64_t kept = idx[7 * 2 + 1];
    const struct {
        int64_t value;
        const char *text;
    } bad[] = {
        {16, "dispatch: topk_idx of rank 2 token 7: expert 16, want -1..15"},
        {INT64_MIN, "dispatch: topk_idx of rank 2 token 7: expert -9223372036854775808, want -1..15"},
        {idx[7 * 2], "twice"},
    };
    for (size_t i = 0; i < COUNT(bad); i++) {
        idx[7 * 2 + 1] = bad[i].value;
        launch(&exchange.dispatch, layer->n_tokens, &outcome);
        for (uint32_t r = 0; r < layer->op_case->world_size; r++) {
            ck_assert_int_eq(outcome.ranks[r].status, EPD_BAD_ROUTING);
            ck_assert_int_eq(outcome.ranks[r].record.token, 7);
            ck_assert_int_eq(outcome.entries[r].rank, 2);
            ck_assert_uint_eq(outcome.entries[r].phase, EPD_PHASE_ROUTE);
            ck_assert_msg(strstr(outcome.entries[r].text, bad[i].text) != NULL, "%s",
                          outcome.entries[r].text);
        }
        launch_expect(&exchange.combine, layer->n_tokens, EPD_INVALID_ARGUMENT);
    }
    idx[7 * 2 + 1] = kept;
    launch_expect(&exchange.dispatch, layer->n_tokens, EPD_OK);
    launch_expect(&exchange.combine, layer->n_tokens, EPD_OK);
    exchange_fini(&exchange);
    harness_close(&harness);
}
END_TEST

START_TEST(an_overflow_names_the_rank_and_its_rows)
{
    struct harness harness;
    struct exchange exchange;
    struct outcome outcome;
    char text[128];
    uint32_t full = 0;
    harness_open(&harness, 2, 0);
    exchange_init(&exchange, &harness, op_case_named("overflow error"));
    const struct reference_rank *ranks = exchange.layer.routing.ranks;
    while (ranks[full].needed_rows <= exchange.capacity)
        full++;
    snprintf(text, sizeof text, "dispatch: rank %u receives %lld rows, its capacity is %lld", full,
             (long long)ranks[full].needed_rows, (long long)exchange.capacity);
    launch(&exchange.dispatch, exchange.layer.n_tokens, &outcome);
    for (uint32_t r = 0; r < exchange.layer.op_case->world_size; r++) {
        ck_assert_int_eq(outcome.ranks[r].status, EPD_CAPACITY_OVERFLOW);
        ck_assert_int_eq(outcome.entries[r].rank, (int)full);
        ck_assert_str_eq(outcome.entries[r].text, text);
    }
    exchange_fini(&exchange);
    harness_close(&harness);
}
END_TEST

int main(void)
{
    const TTest *const tests[] = {
        every_exchange_matches_the_reference_in_every_case,
        combine_bwd_gives_the_same_bits_without_the_gradient_of_weights_and_in_the_place_of_y,
        a_step_reports_rows_and_bytes,
        a_step_of_fewer_tokens_leaves_the_rest_of_the_output_alone,
        five_repeats_give_the_same_bits,
        a_bad_index_fails_the_step_on_all_ranks_and_is_named,
        an_overflow_names_the_rank_and_its_rows,
    };
    return suite_run("ep exchange", tests, COUNT(tests));
}
