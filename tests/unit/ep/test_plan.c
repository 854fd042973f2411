/* What plan_create and plan_join refuse, and in which words. */
#include <stdlib.h>
#include <string.h>

#include "tests/unit/ep/layer.h"

#define COUNT(array) (sizeof(array) / sizeof *(array))

static const struct message_group_config config = {
    .n_experts = 4,
    .top_k = 2,
    .hidden = 8,
    .ffn = 16,
    .max_tokens = 10,
    .capacity_rows = 40,
    .alignment = 4,
    .dtype = EPD_BF16,
    .overflow = EPD_OVERFLOW_ERROR,
};

/* T = 6, L = 2 on two ranks; a tensor per role. */
struct world {
    struct harness harness;
    struct crew crew;
    struct draft *draft; /* of the next attempt */
    struct slab x, topk_idx, topk_weights, recv_x, y, out, dout, dy, dx, d_weights, d_recv_weights, m_splits,
        offsets, w1, w2, gradient;
    struct slab a, b, c, splits3, c_tall;
};

static void world_init(struct world *world)
{
    harness_open(&world->harness, 2, 0);
    crew_init(&world->crew, &world->harness, &config, 2, 1 << 20);
    struct client *client = &world->crew.clients[0];
    world->draft = values_alloc(1, sizeof *world->draft);
    world->x = client_take(client, EPD_BF16, 2, 6, 8, 0);
    world->topk_idx = client_take(client, EPD_I32, 2, 6, 2, 0);
    world->topk_weights = client_take(client, EPD_F32, 2, 6, 2, 0);
    world->recv_x = client_take(client, EPD_BF16, 2, 40, 8, 0);
    world->y = client_take(client, EPD_BF16, 2, 40, 8, 0);
    world->out = client_take(client, EPD_BF16, 2, 6, 8, 0);
    world->dout = client_take(client, EPD_BF16, 2, 6, 8, 0);
    world->dy = client_take(client, EPD_BF16, 2, 40, 8, 0);
    world->dx = client_take(client, EPD_BF16, 2, 6, 8, 0);
    world->d_weights = client_take(client, EPD_F32, 2, 6, 2, 0);
    world->d_recv_weights = client_take(client, EPD_F32, 1, 40, 0, 0);
    world->m_splits = client_take(client, EPD_I64, 1, 2, 0, 0);
    world->offsets = client_take(client, EPD_I64, 1, 3, 0, 0);
    world->w1 = client_take(client, EPD_BF16, 3, 2, 32, 8);
    world->w2 = client_take(client, EPD_BF16, 3, 2, 8, 16);
    world->gradient = client_take(client, EPD_F32, 3, 2, 32, 8);
    world->a = client_take(client, EPD_BF16, 2, 240, 16, 0);
    world->b = client_take(client, EPD_BF16, 3, 3, 24, 16);
    world->c = client_take(client, EPD_BF16, 2, 240, 24, 0);
    world->c_tall = client_take(client, EPD_BF16, 2, 241, 24, 0);
    world->splits3 = client_take(client, EPD_I64, 1, 3, 0, 0);
}

static void world_fini(struct world *world)
{
    free(world->draft);
    crew_fini(&world->crew);
    harness_close(&world->harness);
}

/* The draft as it is must be refused with these words. */
static void refused(struct world *world, enum epd_status status, const char *text)
{
    struct epd_error error;
    struct plan *plan = draft_create(world->draft, &world->crew, &error);
    ck_assert_msg(plan == NULL, "created, want: %s", text);
    ck_assert_msg(error.status == status && strcmp(error.text, text) == 0, "%s: %s, want %s: %s",
                  status_name(error.status), error.text, status_name(status), text);
}

static struct plan_binding *bound(struct world *world, enum epd_role role)
{
    for (uint32_t i = 0; i < world->draft->request.n_bindings; i++)
        if (world->draft->bindings[i].role == role)
            return &world->draft->bindings[i];
    ck_abort_msg("role %d is not bound", (int)role);
}

static void dispatch(struct world *world)
{
    draft_init(world->draft, &world->crew, 0, EPD_OP_DISPATCH);
    draft_bind(world->draft, &world->crew, EPD_ROLE_X, &world->x);
    draft_bind(world->draft, &world->crew, EPD_ROLE_TOPK_IDX, &world->topk_idx);
    draft_bind(world->draft, &world->crew, EPD_ROLE_RECV_X, &world->recv_x);
}

static void gemm(struct world *world)
{
    draft_init(world->draft, &world->crew, 0, EPD_OP_GROUPED_GEMM);
    world->draft->request.layout = EPD_GEMM_TN;
    draft_bind(world->draft, &world->crew, EPD_ROLE_M_SPLITS, &world->splits3);
    draft_bind(world->draft, &world->crew, EPD_ROLE_A, &world->a);
    draft_bind(world->draft, &world->crew, EPD_ROLE_B, &world->b);
    draft_bind(world->draft, &world->crew, EPD_ROLE_C, &world->c);
}

static void forward(struct world *world)
{
    draft_init(world->draft, &world->crew, 0, EPD_OP_MOE_FORWARD);
    world->draft->request.activation = EPD_SWIGLU;
    draft_bind(world->draft, &world->crew, EPD_ROLE_X, &world->x);
    draft_bind(world->draft, &world->crew, EPD_ROLE_TOPK_IDX, &world->topk_idx);
    draft_bind(world->draft, &world->crew, EPD_ROLE_TOPK_WEIGHTS, &world->topk_weights);
    draft_bind(world->draft, &world->crew, EPD_ROLE_W1, &world->w1);
    draft_bind(world->draft, &world->crew, EPD_ROLE_W2, &world->w2);
    draft_bind(world->draft, &world->crew, EPD_ROLE_OUT, &world->out);
}

START_TEST(wrong_shapes_and_dtypes_are_named)
{
    struct world world;
    world_init(&world);
    dispatch(&world);
    bound(&world, EPD_ROLE_X)->shape[0] = 11;
    refused(&world, EPD_INVALID_SHAPE, "dispatch x: rows 11, want 0..10 (max_tokens of the group)");
    dispatch(&world);
    bound(&world, EPD_ROLE_X)->shape[1] = 7;
    refused(&world, EPD_INVALID_SHAPE, "dispatch x: columns 7, want 8 (hidden)");
    dispatch(&world);
    bound(&world, EPD_ROLE_X)->n_dims = 1;
    refused(&world, EPD_INVALID_SHAPE, "dispatch x: 1 dimensions, want 2");
    dispatch(&world);
    bound(&world, EPD_ROLE_X)->dtype = EPD_F32;
    refused(&world, EPD_INVALID_DTYPE, "dispatch x: dtype f32, want bf16");
    dispatch(&world);
    bound(&world, EPD_ROLE_TOPK_IDX)->shape[0] = 5;
    refused(&world, EPD_INVALID_SHAPE, "dispatch topk_idx: rows 5, want 6 (T of the plan)");
    dispatch(&world);
    bound(&world, EPD_ROLE_TOPK_IDX)->dtype = EPD_F32;
    refused(&world, EPD_INVALID_DTYPE, "dispatch topk_idx: dtype f32, want i32 or i64");
    dispatch(&world);
    bound(&world, EPD_ROLE_RECV_X)->shape[0] = 41;
    refused(&world, EPD_INVALID_SHAPE, "dispatch recv_x: rows 41, want 40 (capacity)");
    gemm(&world);
    *bound(&world, EPD_ROLE_C) = (struct plan_binding){.role = EPD_ROLE_C,
                                                       .memory = world.crew.clients[0].memory,
                                                       .offset = world.c_tall.offset,
                                                       .dtype = EPD_BF16,
                                                       .n_dims = 2,
                                                       .shape = {241, 24}};
    refused(&world, EPD_INVALID_SHAPE, "grouped_gemm c: rows 241, want 240 (max_rows)");
    gemm(&world);
    bound(&world, EPD_ROLE_B)->shape[2] = 15;
    refused(&world, EPD_INVALID_SHAPE, "grouped_gemm b: columns 15, want 16 (K)");
    gemm(&world);
    bound(&world, EPD_ROLE_B)->shape[0] = 2;
    refused(&world, EPD_INVALID_SHAPE, "grouped_gemm b: experts 2, want 3 (groups)");
    gemm(&world);
    bound(&world, EPD_ROLE_A)->dtype = EPD_I32;
    refused(&world, EPD_INVALID_DTYPE, "grouped_gemm a: dtype i32, want f32, bf16 or f16");
    gemm(&world);
    bound(&world, EPD_ROLE_C)->dtype = EPD_F16;
    refused(&world, EPD_INVALID_DTYPE, "grouped_gemm c: dtype f16, want bf16 or f32");
    gemm(&world);
    bound(&world, EPD_ROLE_A)->shape[0] = -1;
    refused(&world, EPD_INVALID_SHAPE, "grouped_gemm a: rows -1, want 0..2147483647 (max_rows)");
    world_fini(&world);
}
END_TEST

START_TEST(ranges_alignment_and_devices_are_checked)
{
    struct world world;
    world_init(&world);
    dispatch(&world);
    bound(&world, EPD_ROLE_X)->offset = (1 << 20) - 95;
    refused(&world, EPD_OUT_OF_RANGE, "dispatch x: offset 1048481 bytes 96, the buffer has 1048576");
    dispatch(&world);
    bound(&world, EPD_ROLE_X)->offset = UINT64_MAX;
    refused(&world, EPD_OUT_OF_RANGE,
            "dispatch x: offset 18446744073709551615 bytes 96, the buffer has 1048576");
    dispatch(&world);
    bound(&world, EPD_ROLE_X)->offset = 257;
    refused(&world, EPD_INVALID_ALIGNMENT, "dispatch x: offset 257, want a multiple of 2");
    dispatch(&world);
    bound(&world, EPD_ROLE_X)->memory = NULL;
    refused(&world, EPD_INVALID_ARGUMENT, "dispatch x: no buffer");
    dispatch(&world);
    bound(&world, EPD_ROLE_X)->memory = world.crew.clients[1].memory;
    refused(&world, EPD_INVALID_DEVICE, "dispatch x: on device 1, want device 0 of the rank");
    gemm(&world);
    bound(&world, EPD_ROLE_A)->shape[0] = INT32_MAX;
    refused(&world, EPD_OUT_OF_RANGE,
            "grouped_gemm a: offset 12800 bytes 68719476704, the buffer has 1048576");
    world_fini(&world);
}
END_TEST

START_TEST(roles_lists_and_companions_are_checked)
{
    struct world world;
    world_init(&world);
    dispatch(&world);
    draft_bind(world.draft, &world.crew, EPD_ROLE_W1, &world.w1);
    refused(&world, EPD_INVALID_ARGUMENT, "dispatch takes no w1");
    dispatch(&world);
    draft_bind(world.draft, &world.crew, EPD_ROLE_X, &world.x);
    refused(&world, EPD_INVALID_ARGUMENT, "dispatch x: bound twice");
    dispatch(&world);
    world.draft->request.n_bindings--;
    refused(&world, EPD_INVALID_ARGUMENT, "dispatch: recv_x is not bound");
    dispatch(&world);
    bound(&world, EPD_ROLE_X)->n_parts = 1;
    refused(&world, EPD_INVALID_ARGUMENT, "dispatch x[0]: comes as one tensor, not as a list");

    struct slab part = world.w1;
    part.n_dims = 2;
    part.shape[0] = 32;
    part.shape[1] = 8;
    forward(&world);
    *bound(&world, EPD_ROLE_W1) =
        world.draft->bindings[--world.draft->request.n_bindings]; /* out takes its place */
    draft_bind_part(world.draft, &world.crew, EPD_ROLE_W1, 0, 2, &part);
    refused(&world, EPD_INVALID_ARGUMENT, "moe_forward w1: 1 parts of a list of 2");
    draft_bind_part(world.draft, &world.crew, EPD_ROLE_W1, 0, 2, &part);
    refused(&world, EPD_INVALID_ARGUMENT, "moe_forward w1[0]: bound twice");
    world.draft->bindings[world.draft->request.n_bindings - 1].part_idx = 2;
    refused(&world, EPD_INVALID_ARGUMENT,
            "moe_forward w1[2]: part 2 of a list of 2, want a list of 2 (local experts)");
    world.draft->bindings[world.draft->request.n_bindings - 1].part_idx = 1;
    world.draft->bindings[world.draft->request.n_bindings - 1].n_parts = 0;
    refused(&world, EPD_INVALID_ARGUMENT, "moe_forward w1: bound twice");
    world.draft->bindings[world.draft->request.n_bindings - 1].n_parts = 3;
    refused(&world, EPD_INVALID_ARGUMENT, "moe_forward w1: bound twice");
    world_fini(&world);
}
END_TEST

START_TEST(modes_and_contexts_are_checked)
{
    struct world world;
    struct epd_error error;
    world_init(&world);
    dispatch(&world);
    world.draft->request.op = EPD_OP_COUNT;
    refused(&world, EPD_INVALID_ARGUMENT, "op 12 is unknown");
    dispatch(&world);
    world.draft->request.rank = 2;
    refused(&world, EPD_INVALID_ARGUMENT, "dispatch: rank 2, want 0..1");
    dispatch(&world);
    world.draft->request.flag_idx = EPD_PAGE_MAX_PLANS;
    refused(&world, EPD_INVALID_ARGUMENT, "dispatch: flag 512, want 0..511 of a page");
    dispatch(&world);
    world.draft->request.saved = EPD_SAVED_CONTEXT;
    refused(&world, EPD_INVALID_ARGUMENT, "dispatch: saved mode 1, want 0");
    dispatch(&world);
    world.draft->request.accumulate = 1;
    refused(&world, EPD_INVALID_ARGUMENT, "dispatch cannot accumulate: only weight gradients can");
    dispatch(&world);
    world.draft->request.delay_wgrad = 1;
    refused(&world, EPD_INVALID_ARGUMENT, "dispatch cannot delay weight gradients: only moe_backward can");
    world.draft->request.delay_wgrad = 0;
    world.draft->request.crossing = (enum epd_crossing)3;
    refused(&world, EPD_INVALID_ARGUMENT, "dispatch: crossing 3, want 0..2");
    world.draft->request.crossing = EPD_CROSSING_UNSPECIFIED;
    forward(&world);
    world.draft->request.activation = 9;
    refused(&world, EPD_INVALID_ARGUMENT, "moe_forward: activation 9, want swiglu, geglu or relu2");
    gemm(&world);
    world.draft->request.layout = 4;
    refused(&world, EPD_INVALID_ARGUMENT, "grouped_gemm: layout 4, want TN, NN or NT");
    forward(&world);
    world.draft->request.saved = EPD_SAVED_CONTEXT;
    world.draft->request.saved_budget_bytes = 3000;
    refused(&world, EPD_QUOTA, "moe_forward: saved context of 3328 bytes, the budget has 3000");

    dispatch(&world);
    struct plan *dispatched = draft_create(world.draft, &world.crew, &error);
    ck_assert_ptr_nonnull(dispatched);
    forward(&world);
    struct plan *forwarded = draft_create(world.draft, &world.crew, &error);
    ck_assert_ptr_nonnull(forwarded);
    ck_assert_uint_eq(plan_saved_bytes(forwarded), 0);
    ck_assert_int_eq(plan_op(forwarded), EPD_OP_MOE_FORWARD);
    dispatch(&world);
    world.draft->request.context = dispatched;
    refused(&world, EPD_INVALID_ARGUMENT, "dispatch takes no context plan");

    draft_init(world.draft, &world.crew, 0, EPD_OP_COMBINE_BWD);
    draft_bind(world.draft, &world.crew, EPD_ROLE_DOUT, &world.dout);
    draft_bind(world.draft, &world.crew, EPD_ROLE_DY, &world.dy);
    draft_bind(world.draft, &world.crew, EPD_ROLE_D_WEIGHTS, &world.d_weights);
    refused(&world, EPD_INVALID_ARGUMENT, "combine_bwd: no context plan, want one of dispatch");
    world.draft->request.context = forwarded;
    refused(&world, EPD_INVALID_ARGUMENT, "combine_bwd: context plan is a moe_forward, want a dispatch");
    world.draft->request.context = dispatched;
    refused(&world, EPD_INVALID_ARGUMENT, "combine_bwd d_weights: needs y too");
    world.draft->request.rank = 1;
    refused(&world, EPD_INVALID_ARGUMENT,
            "combine_bwd: context plan is of another group or rank (0, want 1)");
    draft_init(world.draft, &world.crew, 0, EPD_OP_MOE_BACKWARD);
    draft_bind(world.draft, &world.crew, EPD_ROLE_DOUT, &world.dout);
    world.draft->request.context = forwarded;
    refused(&world, EPD_INVALID_ARGUMENT,
            "moe_backward: its moe_forward plan saves nothing, want saved context or recompute");
    harness_destroy_plan(&world.harness, dispatched);
    harness_destroy_plan(&world.harness, forwarded);

    forward(&world);
    world.draft->request.saved = EPD_SAVED_CONTEXT;
    forwarded = draft_create(world.draft, &world.crew, &error);
    ck_assert_uint_eq(plan_saved_bytes(forwarded),
                      3328); /* 40 rows of 8 and of 32 bf16, each part rounded up */
    draft_init(world.draft, &world.crew, 0, EPD_OP_MOE_BACKWARD);
    draft_bind(world.draft, &world.crew, EPD_ROLE_DOUT, &world.dout);
    draft_bind(world.draft, &world.crew, EPD_ROLE_DW1, &world.gradient);
    world.draft->request.context = forwarded;
    world.draft->request.activation = EPD_GEGLU;
    refused(&world, EPD_INVALID_ARGUMENT, "moe_backward: activation geglu, its moe_forward plan has swiglu");
    world.draft->request.activation = 0;
    world.draft->request.delay_wgrad = 1;
    refused(&world, EPD_INVALID_ARGUMENT,
            "moe_backward delays the weight gradients: bind dw1, db1, dw2, db2 to a moe_wgrad plan");
    world.draft->request.delay_wgrad = 0;
    struct plan *backward = draft_create(world.draft, &world.crew, &error);
    ck_assert_ptr_nonnull(backward);
    draft_init(world.draft, &world.crew, 0, EPD_OP_MOE_WGRAD);
    world.draft->request.context = backward;
    refused(&world, EPD_INVALID_ARGUMENT,
            "moe_wgrad: its moe_backward plan does not delay the weight gradients");
    harness_destroy_plan(&world.harness, backward);
    harness_destroy_plan(&world.harness, forwarded);
    world_fini(&world);
}
END_TEST

static void join_refused(struct plan *const *plans, uint32_t n, enum epd_status status, const char *text)
{
    struct plan_set *set;
    struct epd_error error;
    ck_assert_int_eq(plan_join(plans, n, &set, &error), status);
    ck_assert_str_eq(error.text, text);
}

/* A combine plan of a rank; T = 0, so that no tensor of tokens needs memory. */
static struct plan *combine_of(struct world *world, uint32_t rank, struct plan *context, int weighted)
{
    struct epd_error error;
    struct slab y = client_take(&world->crew.clients[rank], EPD_BF16, 2, 40, 8, 0);
    const struct slab weights = {.dtype = EPD_F32, .n_dims = 2, .shape = {0, 2}};
    const struct slab out = {.dtype = EPD_BF16, .n_dims = 2, .shape = {0, 8}};
    draft_init(world->draft, &world->crew, rank, EPD_OP_COMBINE);
    world->draft->request.context = context;
    draft_bind(world->draft, &world->crew, EPD_ROLE_Y, &y);
    draft_bind(world->draft, &world->crew, EPD_ROLE_OUT, &out);
    bound(world, EPD_ROLE_OUT)->memory = NULL;
    if (weighted)
        draft_bind(world->draft, &world->crew, EPD_ROLE_TOPK_WEIGHTS, &weights);
    struct plan *plan = draft_create(world->draft, &world->crew, &error);
    ck_assert_msg(plan != NULL, "%s", error.text);
    return plan;
}

static struct plan *dispatch_of(struct world *world, uint32_t rank)
{
    struct epd_error error;
    struct slab recv_x = client_take(&world->crew.clients[rank], EPD_BF16, 2, 40, 8, 0);
    const struct slab x = {.dtype = EPD_BF16, .n_dims = 2, .shape = {0, 8}};
    const struct slab idx = {.dtype = EPD_I64, .n_dims = 2, .shape = {0, 2}};
    draft_init(world->draft, &world->crew, rank, EPD_OP_DISPATCH);
    draft_bind(world->draft, &world->crew, EPD_ROLE_X, &x);
    draft_bind(world->draft, &world->crew, EPD_ROLE_TOPK_IDX, &idx);
    bound(world, EPD_ROLE_X)->memory = bound(world, EPD_ROLE_TOPK_IDX)->memory = NULL;
    draft_bind(world->draft, &world->crew, EPD_ROLE_RECV_X, &recv_x);
    struct plan *plan = draft_create(world->draft, &world->crew, &error);
    ck_assert_msg(plan != NULL, "%s", error.text);
    return plan;
}

START_TEST(plans_of_a_set_must_agree)
{
    struct world world;
    struct epd_error error;
    struct plan_set *sets[2];
    world_init(&world);
    struct plan *first[2] = {dispatch_of(&world, 0), dispatch_of(&world, 1)};
    struct plan *second[2] = {dispatch_of(&world, 0), dispatch_of(&world, 1)};
    join_refused(first, 1, EPD_PLAN_MISMATCH, "dispatch: 1 plans, want 2");
    struct plan *swapped[2] = {first[1], first[0]};
    join_refused(swapped, 2, EPD_PLAN_MISMATCH, "dispatch: plan 0 is of another group or of rank 1");
    struct plan *early = combine_of(&world, 0, first[0], 0);
    struct plan *early_pair[2] = {early, combine_of(&world, 1, first[1], 0)};
    join_refused(early_pair, 2, EPD_PLAN_MISMATCH, "rank 0 combine: its context plan is not joined");
    ck_assert_int_eq(plan_join(first, 2, &sets[0], &error), EPD_OK);
    ck_assert_int_eq(plan_join(second, 2, &sets[1], &error), EPD_OK);
    ck_assert_uint_eq(plan_shape_hash(first[0]), plan_shape_hash(second[1]));

    struct plan *weighted = combine_of(&world, 1, first[1], 1), *other = combine_of(&world, 1, second[1], 0);
    struct plan *mixed[2] = {early, weighted};
    ck_assert_uint_ne(plan_shape_hash(early), plan_shape_hash(weighted));
    join_refused(mixed, 2, EPD_PLAN_MISMATCH,
                 "rank 1 combine: topk_weights is bound, rank 0 has it not bound");
    mixed[1] = other;
    join_refused(mixed, 2, EPD_PLAN_MISMATCH,
                 "rank 1 combine: its context plan belongs to other plans than rank 0's");
    mixed[1] = first[1];
    join_refused(mixed, 2, EPD_PLAN_MISMATCH, "rank 1 dispatch: op is dispatch, rank 0 has combine");

    struct plan *all[] = {early_pair[0], early_pair[1], weighted, other};
    for (size_t i = 0; i < COUNT(all); i++)
        harness_destroy_plan(&world.harness, all[i]);
    for (int i = 0; i < 2; i++) {
        harness_destroy_plan(&world.harness, first[i]);
        harness_destroy_plan(&world.harness, second[i]);
        plan_set_destroy(sets[i]);
    }
    world_fini(&world);
}
END_TEST

START_TEST(group_sizes_are_checked)
{
    struct harness harness;
    struct epd_error error;
    struct team *team;
    const uint32_t devices[2] = {0, 0}, bad_devices[2] = {0, 1};
    harness_open(&harness, 1, 0);
#define REFUSED(field, value, words)                                                                         \
    do {                                                                                                     \
        struct message_group_config bad = config;                                                            \
        bad.field = value;                                                                                   \
        ck_assert_int_ne(team_create(harness.node, &bad, 2, devices, &team, &error), EPD_OK);                \
        ck_assert_str_eq(error.text, words);                                                                 \
    } while (0)
    REFUSED(n_experts, 0, "group n_experts: 0, want 1..2048");
    REFUSED(n_experts, 5, "group n_experts: 5, want a multiple of world_size 2");
    REFUSED(top_k, 5, "group top_k: 5, want 1..4");
    REFUSED(hidden, 0, "group hidden: 0, want 1..1048576");
    REFUSED(ffn, (1u << 20) + 1, "group ffn: 1048577, want 0..1048576");
    REFUSED(max_tokens, 0, "group max_tokens: 0, want 1..16777216");
    REFUSED(alignment, 24, "group alignment: 24, want a power of two up to 4096");
    REFUSED(dtype, EPD_I32, "group dtype: i32, want f32, bf16 or f16");
    REFUSED(overflow, 0, "group overflow: 0, want 1 (error) or 2 (drop)");
    REFUSED(capacity_rows, -1,
            "group capacity_rows: -1, want 1..2147483647, or 0 for the most that can arrive (here 48)");
    ck_assert_int_eq(team_create(harness.node, &config, 2, bad_devices, &team, &error), EPD_INVALID_DEVICE);
    ck_assert_str_eq(error.text, "group rank 1: device 1, want 0..0");
    struct message_group_config automatic = config;
    automatic.capacity_rows = 0;
    ck_assert_int_eq(team_create(harness.node, &automatic, 2, devices, &team, &error), EPD_OK);
    ck_assert_int_eq(team_capacity_rows(team), 48); /* 10 x 2 x min(2, 2) + 2 x 3 = 46, rounded up to 4 */
    ck_assert_uint_eq(team_n_local_experts(team), 2);
    team_destroy(team);
    harness_close(&harness);
}
END_TEST

START_TEST(a_plan_that_finds_no_memory_leaves_nothing)
{
    struct harness harness;
    struct layer layer;
    struct layer_outputs outputs[HARNESS_MAX_RANKS];
    struct epd_error error;
    struct op_case op_case = *op_case_named("one rank");
    harness_open(&harness, 1, (256u << 20) + 100000);
    layer_init(&layer, &harness, &op_case);
    layer_take_outputs(&layer, outputs);
    struct draft *draft = values_alloc(1, sizeof *draft);
    draft_init(draft, &layer.crew, 0, EPD_OP_MOE_FORWARD);
    draft->request.activation = EPD_SWIGLU;
    draft->request.saved = EPD_SAVED_CONTEXT;
    const struct layer_inputs *in = &layer.ranks[0];
    draft_bind(draft, &layer.crew, EPD_ROLE_X, &in->x);
    draft_bind(draft, &layer.crew, EPD_ROLE_TOPK_IDX, &in->topk_idx);
    draft_bind(draft, &layer.crew, EPD_ROLE_W1, &in->w1);
    draft_bind(draft, &layer.crew, EPD_ROLE_W2, &in->w2);
    draft_bind(draft, &layer.crew, EPD_ROLE_OUT, &outputs[0].out);
    ck_assert_ptr_null(draft_create(draft, &layer.crew, &error));
    ck_assert_int_eq(error.status, EPD_NO_MEMORY);
    ck_assert_msg(strstr(error.text, "heap of device 0") != NULL, "%s", error.text);
    ck_assert_uint_eq(memory_references(layer.crew.clients[0].memory), 0);
    free(draft);
    layer_fini(&layer);
    harness_close(&harness);
}
END_TEST

int main(void)
{
    const TTest *const tests[] = {
        wrong_shapes_and_dtypes_are_named,
        ranges_alignment_and_devices_are_checked,
        roles_lists_and_companions_are_checked,
        modes_and_contexts_are_checked,
        plans_of_a_set_must_agree,
        group_sizes_are_checked,
        a_plan_that_finds_no_memory_leaves_nothing,
    };
    return suite_run("ep plan", tests, COUNT(tests));
}
