/* Groups over two nodes: messages of a fixed size; and ranks that fail in the midst of a step, behind every swap of every
 * op, several ranks to a lane. Nobody may wait for anybody: the step ends at once on all nodes, names the rank, and the next
 * one goes well. */
#include <stdlib.h>
#include <string.h>

#include "ep/clock.h"
#include "ep/hop.h"
#include "ep/hop_frame.h"
#include "tests/unit/ep/layer.h"

#define COUNT(array) (sizeof(array) / sizeof *(array))
/* Far less than the limit of a swap (60 s in the harness). */
#define STEP_LIMIT_NS 20000000000ull

/* ---- swaps, looked at on their way ---- */

enum epd_status __real_rails_swap(struct rails *rails, uint32_t rank_idx, struct transport_part *parts,
                                  struct epd_error *error);
enum epd_status __wrap_rails_swap(struct rails *rails, uint32_t rank_idx, struct transport_part *parts,
                                  struct epd_error *error);

/* The rank whose swaps are counted, and which of them, from 0, brings it a message that is none. */
static struct {
    const struct rails *rails;
    uint32_t rank_idx;
    _Atomic int n_seen;
    int spoilt; /* -1: none */
} watch;

enum epd_status __wrap_rails_swap(struct rails *rails, uint32_t rank_idx, struct transport_part *parts,
                                  struct epd_error *error)
{
    enum epd_status status = __real_rails_swap(rails, rank_idx, parts, error);
    if (rails != watch.rails || rank_idx != watch.rank_idx)
        return status;
    if (atomic_fetch_add(&watch.n_seen, 1) == watch.spoilt)
        for (uint32_t node = 0; node < 2; node++)
            if (parts[node].received_bytes >= sizeof(struct hop_head))
                ((struct hop_head *)parts[node].receive)->magic = 0;
    return status;
}

static void watch_rank(const struct crew *crew, uint32_t rank, int spoilt)
{
    const uint32_t n_here = crew->world_size / crew->n_nodes;
    watch.rails = crew->rails[rank / n_here];
    watch.rank_idx = rank % n_here;
    watch.spoilt = spoilt;
    atomic_store(&watch.n_seen, 0);
}

/* ---- plans ---- */

/* Tensors of one rank: all that any of the ops takes besides the layer's inputs. */
struct tensors {
    struct slab recv_x, y, out, dy, d_weights, d_recv_x, d_recv_weights, dx;
};

enum optional { WEIGHTS = 1, D_WEIGHTS = 2 };

/* An op, and how often its ranks swap before they agree. */
struct hop_case {
    const char *name;
    enum epd_op op;
    unsigned roles; /* of enum optional */
    int n_swaps;
};

static const struct hop_case cases[] = {
    {"dispatch", EPD_OP_DISPATCH, WEIGHTS, 1},
    {"combine", EPD_OP_COMBINE, 0, 1},
    {"weighted combine", EPD_OP_COMBINE, WEIGHTS, 2},
    {"combine_bwd", EPD_OP_COMBINE_BWD, WEIGHTS, 1},
    {"combine_bwd with d_weights", EPD_OP_COMBINE_BWD, WEIGHTS | D_WEIGHTS, 2},
    {"dispatch_bwd", EPD_OP_DISPATCH_BWD, 0, 1},
    {"dispatch_bwd with d_weights", EPD_OP_DISPATCH_BWD, D_WEIGHTS, 2},
};

static void take_tensors(struct layer *layer, struct tensors *tensors)
{
    const struct op_case *c = layer->op_case;
    const int64_t rows = team_capacity_rows(layer->crew.team), h = c->hidden, k = c->top_k;
    for (uint32_t r = 0; r < c->world_size; r++) {
        struct client *client = &layer->crew.clients[r];
        const int64_t t = layer->n_tokens[r];
        uint64_t seed = 11 + r;
        tensors[r] = (struct tensors){.recv_x = client_take(client, c->dtype, 2, rows, h, 0),
                                      .y = client_take(client, c->dtype, 2, rows, h, 0),
                                      .out = client_take(client, c->dtype, 2, t, h, 0),
                                      .dy = client_take(client, c->dtype, 2, rows, h, 0),
                                      .d_weights = client_take(client, EPD_F32, 2, t, k, 0),
                                      .d_recv_x = client_take(client, c->dtype, 2, rows, h, 0),
                                      .d_recv_weights = client_take(client, EPD_F32, 1, rows, 0, 0),
                                      .dx = client_take(client, c->dtype, 2, t, h, 0)};
        struct slab *inputs[] = {&tensors[r].y, &tensors[r].d_recv_x, &tensors[r].d_recv_weights};
        for (size_t i = 0; i < COUNT(inputs); i++)
            values_fill(inputs[i]->dtype, inputs[i]->data, inputs[i]->bytes / dtype_bytes(inputs[i]->dtype),
                        -1.0, 1.0, &seed);
    }
}

static void bind_case(struct draft *draft, struct layer *layer, uint32_t rank, const struct tensors *t,
                      const struct hop_case *c)
{
    const struct layer_inputs *in = &layer->ranks[rank];
    const int weights = c->roles & WEIGHTS, d_weights = c->roles & D_WEIGHTS;
    const struct {
        enum epd_op op;
        int wanted;
        enum epd_role role;
        const struct slab *slab;
    } all[] = {
        {EPD_OP_DISPATCH, 1, EPD_ROLE_X, &in->x},
        {EPD_OP_DISPATCH, 1, EPD_ROLE_TOPK_IDX, &in->topk_idx},
        {EPD_OP_DISPATCH, weights, EPD_ROLE_TOPK_WEIGHTS, &in->topk_weights},
        {EPD_OP_DISPATCH, 1, EPD_ROLE_RECV_X, &t->recv_x},
        {EPD_OP_COMBINE, 1, EPD_ROLE_Y, &t->y},
        {EPD_OP_COMBINE, weights, EPD_ROLE_TOPK_WEIGHTS, &in->topk_weights},
        {EPD_OP_COMBINE, 1, EPD_ROLE_OUT, &t->out},
        {EPD_OP_COMBINE_BWD, 1, EPD_ROLE_DOUT, &in->dout},
        {EPD_OP_COMBINE_BWD, weights, EPD_ROLE_TOPK_WEIGHTS, &in->topk_weights},
        {EPD_OP_COMBINE_BWD, 1, EPD_ROLE_DY, &t->dy},
        {EPD_OP_COMBINE_BWD, d_weights, EPD_ROLE_Y, &t->y},
        {EPD_OP_COMBINE_BWD, d_weights, EPD_ROLE_D_WEIGHTS, &t->d_weights},
        {EPD_OP_DISPATCH_BWD, 1, EPD_ROLE_D_RECV_X, &t->d_recv_x},
        {EPD_OP_DISPATCH_BWD, 1, EPD_ROLE_DX, &t->dx},
        {EPD_OP_DISPATCH_BWD, d_weights, EPD_ROLE_D_RECV_WEIGHTS, &t->d_recv_weights},
        {EPD_OP_DISPATCH_BWD, d_weights, EPD_ROLE_D_WEIGHTS, &t->d_weights},
    };
    for (size_t i = 0; i < COUNT(all); i++)
        if (all[i].op == c->op && all[i].wanted)
            draft_bind(draft, &layer->crew, all[i].role, all[i].slab);
}

static void create_crossing(struct layer *layer, const struct tensors *tensors, const struct hop_case *c,
                            enum epd_crossing crossing, const struct crew_plan *context,
                            struct crew_plan *plan)
{
    struct draft *drafts = values_alloc(HARNESS_MAX_RANKS, sizeof *drafts);
    for (uint32_t r = 0; r < layer->crew.world_size; r++) {
        draft_init(&drafts[r], &layer->crew, r, c->op);
        drafts[r].request.context = context ? context->plans[r] : NULL;
        drafts[r].request.crossing = crossing;
        bind_case(&drafts[r], layer, r, &tensors[r], c);
    }
    crew_plan_create(plan, &layer->crew, drafts, layer->crew.world_size);
    free(drafts);
}

static void create_case(struct layer *layer, const struct tensors *tensors, const struct hop_case *c,
                        const struct crew_plan *context, struct crew_plan *plan)
{
    create_crossing(layer, tensors, c, EPD_CROSSING_UNSPECIFIED, context, plan);
}

/* ---- static messages ---- */

static uint64_t section(uint64_t bytes)
{
    return (bytes + 63) / 64 * 64;
}

/* T of the plan that routes: of all ranks' the most. */
static uint64_t most_tokens(const struct layer *layer)
{
    uint64_t most = 0;
    for (uint32_t r = 0; r < layer->op_case->world_size; r++)
        most = layer->n_tokens[r] > most ? layer->n_tokens[r] : most;
    return most;
}

/* As client/epd.h says, from one rank to one node. */
static uint64_t static_bytes(const struct layer *layer, const struct hop_case *op)
{
    const struct op_case *c = layer->op_case;
    const uint64_t t = most_tokens(layer), k = c->top_k, h = c->hidden;
    const uint64_t counts = section(4ull * c->n_experts) + section(4 * t * k), choices = section(4 * t * k);
    const uint64_t rows = section(t * h * dtype_bytes(c->dtype)), sums = section(4 * t * h);
    const uint64_t weights = op->roles & WEIGHTS ? choices : 0;
    const uint64_t d_weights = op->roles & D_WEIGHTS ? 64 + choices : 0;
    switch (op->op) {
    case EPD_OP_DISPATCH:
        return 64 + counts + weights + rows;
    case EPD_OP_COMBINE:
        return (weights ? 64 + weights : 0) + 64 + sums;
    case EPD_OP_COMBINE_BWD:
        return 64 + weights + rows + d_weights;
    default:
        return 64 + sums + d_weights;
    }
}

static uint64_t sent_by_node(const struct crew *crew, uint32_t node)
{
    struct rails_traffic traffic;
    rails_traffic(crew->rails[node], &traffic);
    return traffic.sent_bytes[1 - node];
}

/* What the op has written on a rank, behind each other; a copy. */
static char *copy_outputs(const struct tensors *t, size_t *bytes)
{
    const struct slab *outputs[] = {&t->recv_x, &t->out, &t->dy, &t->d_weights, &t->dx};
    *bytes = 0;
    for (size_t i = 0; i < COUNT(outputs); i++)
        *bytes += outputs[i]->bytes;
    char *copy = values_alloc(*bytes, 1), *at = copy;
    for (size_t i = 0; i < COUNT(outputs); i++) {
        memcpy(at, outputs[i]->data, outputs[i]->bytes);
        at += outputs[i]->bytes;
    }
    return copy;
}

static void poison_outputs(const struct tensors *t)
{
    const struct slab *outputs[] = {&t->recv_x, &t->out, &t->dy, &t->d_weights, &t->dx};
    for (size_t i = 0; i < COUNT(outputs); i++)
        slab_poison(outputs[i]);
}

static void run_and_keep(struct crew_plan *plan, const struct layer *layer, const struct tensors *tensors,
                         char **copies, size_t *bytes)
{
    for (uint32_t r = 0; r < plan->n; r++)
        poison_outputs(&tensors[r]);
    launch_expect(plan, layer->n_tokens, EPD_OK);
    for (uint32_t r = 0; r < plan->n; r++)
        copies[r] = copy_outputs(&tensors[r], &bytes[r]);
}

static void check_static_op(struct layer *layer, const struct tensors *tensors, const struct hop_case *op,
                            const struct crew_plan *context)
{
    struct crew_plan eager, fixed;
    char *want[HARNESS_MAX_RANKS], *got[HARNESS_MAX_RANKS];
    size_t bytes[HARNESS_MAX_RANKS];
    const uint32_t n = layer->crew.world_size;
    create_crossing(layer, tensors, op, EPD_CROSSING_EAGER, context, &eager);
    create_crossing(layer, tensors, op, EPD_CROSSING_STATIC, context, &fixed);
    uint64_t begun = sent_by_node(&layer->crew, 0);
    run_and_keep(&eager, layer, tensors, want, bytes);
    const uint64_t exact = sent_by_node(&layer->crew, 0) - begun;
    begun += exact;
    run_and_keep(&fixed, layer, tensors, got, bytes);
    const uint64_t sent = sent_by_node(&layer->crew, 0) - begun;
    for (uint32_t r = 0; r < n; r++) {
        ck_assert_msg(!memcmp(want[r], got[r], bytes[r]), "%s: rank %u", op->name, r);
        free(want[r]);
        free(got[r]);
    }
    ck_assert_msg(sent == n / 2 * (static_bytes(layer, op) + sizeof(struct hop_verdict)), "%s: %llu bytes",
                  op->name, (unsigned long long)sent);
    ck_assert_uint_lt(exact, sent);
    crew_plan_destroy(&fixed);
    crew_plan_destroy(&eager);
}

/* Plans for fewer tokens than the group allows. */
static void leave_few_tokens(struct layer *layer, struct tensors *tensors)
{
    for (uint32_t r = 0; r < layer->op_case->world_size; r++) {
        struct layer_inputs *in = &layer->ranks[r];
        struct tensors *t = &tensors[r];
        struct slab *all[] = {&in->x,        &in->topk_idx, &in->topk_weights, &in->dout, &t->out,
                              &t->d_weights, &t->dx};
        if (layer->n_tokens[r] <= 5 + r)
            continue;
        layer->n_tokens[r] = 5 + r;
        for (size_t i = 0; i < COUNT(all); i++) {
            all[i]->bytes = all[i]->bytes / (uint64_t)all[i]->shape[0] * layer->n_tokens[r];
            all[i]->shape[0] = layer->n_tokens[r];
        }
    }
}

static void check_static(const char *name, int few)
{
    struct harness harness;
    struct layer layer;
    struct tensors tensors[HARNESS_MAX_RANKS];
    struct crew_plan dispatch;
    harness_open(&harness, 2, 0);
    layer_init(&layer, &harness, op_case_named(name));
    take_tensors(&layer, tensors);
    if (few)
        leave_few_tokens(&layer, tensors);
    check_static_op(&layer, tensors, &cases[0], NULL);
    create_crossing(&layer, tensors, &cases[0], EPD_CROSSING_STATIC, NULL, &dispatch);
    launch_expect(&dispatch, layer.n_tokens, EPD_OK);
    for (size_t i = 1; i < COUNT(cases); i++)
        check_static_op(&layer, tensors, &cases[i], &dispatch);
    crew_plan_destroy(&dispatch);
    layer_fini(&layer);
    harness_close(&harness);
}

START_TEST(static_messages_bring_the_same_bits_in_as_many_bytes_as_the_formula_says)
{
    static const char *const names[] = {"uniform f32", "eight ranks", "zero tokens rank"};
    for (size_t n = 0; n < COUNT(names); n++)
        check_static(names[n], 0);
}
END_TEST

START_TEST(static_messages_are_as_long_as_the_largest_plan_of_all_ranks)
{
    check_static("uniform f32", 1);
    check_static("eight ranks", 1);
}
END_TEST

/* ---- beside other ops ---- */

/* rows x 2F to rows x F, of one group. */
static struct crew_plan create_local(struct layer *layer, uint32_t rank)
{
    static const int64_t m_splits[] = {8};
    static const float preact[8 * 32];
    struct client *client = &layer->crew.clients[rank];
    const struct slab splits = client_put(client, EPD_I64, 1, 1, 0, 0, m_splits);
    const struct slab from = client_put(client, EPD_F32, 2, 8, 32, 0, preact);
    const struct slab to = client_take(client, EPD_F32, 2, 8, 16, 0);
    struct crew_plan plan;
    struct draft *draft = values_alloc(1, sizeof *draft);
    draft_init(draft, &layer->crew, rank, EPD_OP_ACTIVATION);
    draft->request.activation = EPD_SWIGLU;
    draft_bind(draft, &layer->crew, EPD_ROLE_M_SPLITS, &splits);
    draft_bind(draft, &layer->crew, EPD_ROLE_PREACT, &from);
    draft_bind(draft, &layer->crew, EPD_ROLE_ACT, &to);
    crew_plan_create(&plan, &layer->crew, draft, 1);
    free(draft);
    return plan;
}

START_TEST(local_ops_of_one_rank_do_not_part_the_nodes)
{
    const uint32_t no_tokens = 0;
    struct harness harness;
    struct layer layer;
    struct tensors tensors[HARNESS_MAX_RANKS];
    struct crew_plan dispatch;
    harness_open(&harness, 2, 0);
    layer_init(&layer, &harness, op_case_named("uniform f32"));
    take_tensors(&layer, tensors);
    create_case(&layer, tensors, &cases[0], NULL, &dispatch);
    struct crew_plan local = create_local(&layer, 1);
    for (int i = 0; i < 3; i++) {
        launch_expect(&dispatch, layer.n_tokens, EPD_OK);
        launch_expect(&local, &no_tokens, EPD_OK);
    }
    crew_plan_destroy(&local);
    crew_plan_destroy(&dispatch);
    layer_fini(&layer);
    harness_close(&harness);
}
END_TEST

/* ---- failures ---- */

static void check_spoilt(struct crew_plan *plan, const uint32_t *n_tokens, const char *name, uint32_t rank,
                         int number)
{
    struct outcome outcome;
    watch_rank(plan->crew, rank, number);
    const uint64_t begun_ns = clock_now_ns();
    launch(plan, n_tokens, &outcome);
    ck_assert_msg(clock_now_ns() - begun_ns < STEP_LIMIT_NS, "%s: rank %u behind swap %d: nodes waited", name,
                  rank, number);
    for (uint32_t r = 0; r < plan->n; r++) {
        ck_assert_msg(outcome.ranks[r].status == (r == rank ? EPD_PROTOCOL : EPD_PEER_LOST),
                      "%s: rank %u behind swap %d: rank %u gets %s (%s)", name, rank, number, r,
                      status_name(outcome.ranks[r].status), outcome.entries[r].text);
        ck_assert_msg(outcome.entries[r].rank == (int)rank,
                      "%s: rank %u behind swap %d: rank %u is told of rank %d (%s)", name, rank, number, r,
                      outcome.entries[r].rank, outcome.entries[r].text);
    }
    watch_rank(plan->crew, rank, -1);
}

/* Every rank behind every swap; before each, `before` runs, and well. */
static void check_op(struct crew_plan *before, struct crew_plan *plan, const uint32_t *n_tokens,
                     const char *name, int n_swaps)
{
    for (uint32_t rank = 0; rank < plan->n; rank++)
        for (int number = 0; number < n_swaps; number++) {
            if (before)
                launch_expect(before, n_tokens, EPD_OK);
            check_spoilt(plan, n_tokens, name, rank, number);
            if (before)
                launch_expect(before, n_tokens, EPD_OK);
            watch_rank(plan->crew, rank, -1);
            launch_expect(plan, n_tokens, EPD_OK);
            ck_assert_msg(atomic_load(&watch.n_seen) == n_swaps + 1,
                          "%s: %d swaps, want %d and the agreement", name, atomic_load(&watch.n_seen),
                          n_swaps);
        }
}

static void check_exchanges(const char *op_case, uint32_t n_devices)
{
    struct harness harness;
    struct layer layer;
    struct tensors tensors[HARNESS_MAX_RANKS];
    struct crew_plan dispatch, plan;
    harness_open(&harness, n_devices, 0);
    layer_init(&layer, &harness, op_case_named(op_case));
    take_tensors(&layer, tensors);
    create_case(&layer, tensors, &cases[0], NULL, &dispatch);
    check_op(NULL, &dispatch, layer.n_tokens, cases[0].name, cases[0].n_swaps);
    for (size_t i = 1; i < COUNT(cases); i++) {
        create_case(&layer, tensors, &cases[i], &dispatch, &plan);
        check_op(&dispatch, &plan, layer.n_tokens, cases[i].name, cases[i].n_swaps);
        crew_plan_destroy(&plan);
    }
    crew_plan_destroy(&dispatch);
    layer_fini(&layer);
    harness_close(&harness);
}

static void check_layer(const char *op_case, uint32_t n_devices, enum epd_saved saved, int n_backward)
{
    struct harness harness;
    struct layer layer;
    struct layer_outputs outputs[HARNESS_MAX_RANKS];
    struct crew_plan forward, backward;
    const struct layer_modes modes = {.saved = saved};
    harness_open(&harness, n_devices, 0);
    layer_init(&layer, &harness, op_case_named(op_case));
    layer_take_outputs(&layer, outputs);
    layer_forward_plan(&layer, modes, outputs, &forward);
    layer_backward_plan(&layer, modes, outputs, &forward, &backward);
    check_op(NULL, &forward, layer.n_tokens, "moe_forward", 2);
    check_op(&forward, &backward, layer.n_tokens, "moe_backward", n_backward);
    layer_poison_outputs(&layer, outputs);
    launch_expect(&forward, layer.n_tokens, EPD_OK);
    launch_expect(&backward, layer.n_tokens, EPD_OK);
    layer_check_forward(&layer, outputs);
    layer_check_backward(&layer, outputs);
    crew_plan_destroy(&backward);
    crew_plan_destroy(&forward);
    layer_fini(&layer);
    harness_close(&harness);
}

START_TEST(a_rank_that_fails_behind_any_swap_lets_nobody_wait)
{
    check_exchanges("uniform f32", 1); /* two ranks to a lane */
    check_exchanges("eight ranks", 2); /* two to each of two */
    check_exchanges("eight ranks", 1); /* four to one */
}
END_TEST

START_TEST(a_rank_that_fails_behind_any_swap_of_a_layer_lets_nobody_wait)
{
    check_layer("uniform f32", 1, EPD_SAVED_CONTEXT, 3);
    check_layer("eight ranks", 2, EPD_SAVED_RECOMPUTE, 4);
}
END_TEST

int main(void)
{
    const TTest *const tests[] = {
        static_messages_bring_the_same_bits_in_as_many_bytes_as_the_formula_says,
        static_messages_are_as_long_as_the_largest_plan_of_all_ranks,
        local_ops_of_one_rank_do_not_part_the_nodes,
        a_rank_that_fails_behind_any_swap_lets_nobody_wait,
        a_rank_that_fails_behind_any_swap_of_a_layer_lets_nobody_wait,
    };
    (void)setenv("EPD_TEST_NODES", "2", 1);
    return suite_run("ep hop", tests, COUNT(tests));
}
