#include "tests/unit/kernels/world.h"

#include <check.h>
#include <stdlib.h>

static void init_routing(struct world *world, struct routing *routing)
{
    const struct op_case *op_case = world->op_case;
    size_t n_slots = (size_t)op_case->max_tokens * op_case->top_k, n_local = world->inputs.n_local_experts;
    *routing = (struct routing){
        .expert = values_alloc(n_slots, sizeof(int32_t)),
        .row = values_alloc(n_slots, sizeof(int32_t)),
        .counts = values_alloc((size_t)op_case->world_size * op_case->n_experts, sizeof(int32_t)),
        .source = values_alloc(world_buffer_rows(world), sizeof(int32_t)),
        .m_splits = values_alloc(n_local, sizeof(int64_t)),
        .offsets = values_alloc(n_local + 1, sizeof(int64_t)),
        .needed_rows = values_alloc(1, sizeof(int64_t)),
        .dropped_rows = values_alloc(1, sizeof(int64_t)),
    };
}

static void poison_routing(const struct world *world, const struct routing *routing)
{
    const struct op_case *op_case = world->op_case;
    size_t n_slots = (size_t)op_case->max_tokens * op_case->top_k, n_local = world->inputs.n_local_experts;
    values_poison(routing->expert, n_slots * sizeof(int32_t));
    values_poison(routing->row, n_slots * sizeof(int32_t));
    values_poison(routing->counts, (size_t)op_case->world_size * op_case->n_experts * sizeof(int32_t));
    values_poison(routing->m_splits, n_local * sizeof(int64_t));
    values_poison(routing->offsets, (n_local + 1) * sizeof(int64_t));
    values_poison(routing->needed_rows, sizeof(int64_t));
    values_poison(routing->dropped_rows, sizeof(int64_t));
}

static void fini_routing(const struct routing *routing)
{
    free(routing->expert);
    free(routing->row);
    free(routing->counts);
    free(routing->source);
    free(routing->m_splits);
    free(routing->offsets);
    free(routing->needed_rows);
    free(routing->dropped_rows);
}

void world_init(struct world *world, const struct op_case *op_case)
{
    *world = (struct world){.op_case = op_case};
    op_inputs_init(&world->inputs, op_case);
    reference_route(&world->reference, &world->inputs.shape, world->inputs.topk_idx);
    for (uint32_t r = 0; r < op_case->world_size; r++) {
        size_t n_tokens = world->inputs.shape.n_tokens[r], n_values = n_tokens * op_case->hidden;
        init_routing(world, &world->ranks[r].routing);
        world->x[r] = values_decoded(op_case->dtype, world->inputs.x[r], n_values);
        world->dout[r] = values_decoded(op_case->dtype, world->inputs.dout[r], n_values);
        world->weights[r] = values_decoded(EPD_F32, world->inputs.topk_weights[r], n_tokens * op_case->top_k);
    }
}

void world_fini(struct world *world)
{
    for (uint32_t r = 0; r < world->op_case->world_size; r++) {
        fini_routing(&world->ranks[r].routing);
        free(world->x[r]);
        free(world->dout[r]);
        free(world->weights[r]);
    }
    host_scratch_fini(&world->scratch);
    reference_routing_fini(&world->reference);
    op_inputs_fini(&world->inputs);
}

struct exchange_shape world_shape(const struct world *world, uint32_t rank)
{
    const struct op_case *op_case = world->op_case;
    return (struct exchange_shape){
        .world_size = op_case->world_size,
        .rank = rank,
        .n_experts = op_case->n_experts,
        .n_local_experts = world->inputs.n_local_experts,
        .top_k = op_case->top_k,
        .hidden = op_case->hidden,
        .max_tokens = op_case->max_tokens,
        .alignment = op_case->alignment,
        .capacity_rows = world->inputs.shape.capacity_rows,
        .n_tokens = world->inputs.shape.n_tokens[rank],
    };
}

struct row_groups world_groups(const struct world *world, uint32_t rank)
{
    return (struct row_groups){
        .n_groups = world->inputs.n_local_experts,
        .m_splits = world->ranks[rank].routing.m_splits,
        .offsets = world->ranks[rank].routing.offsets,
        .max_rows = world->inputs.shape.capacity_rows,
    };
}

size_t world_buffer_rows(const struct world *world)
{
    return (size_t)world->inputs.shape.capacity_rows + WORLD_GUARD_ROWS;
}

size_t world_used_rows(const struct world *world, uint32_t rank)
{
    return (size_t)world->reference.ranks[rank].offsets[world->inputs.n_local_experts];
}

static void *poisoned(size_t n, size_t element_bytes)
{
    void *memory = values_alloc(n, element_bytes);
    values_poison(memory, n * element_bytes);
    return memory;
}

void world_slot_buffers(const struct world *world, enum epd_dtype dtype, size_t width, void **buffers)
{
    for (uint32_t r = 0; r < world->op_case->world_size; r++)
        buffers[r] = poisoned(world_buffer_rows(world) * width, dtype_bytes(dtype));
}

void world_token_buffers(const struct world *world, enum epd_dtype dtype, size_t width, void **buffers)
{
    for (uint32_t r = 0; r < world->op_case->world_size; r++)
        buffers[r] = poisoned(world->inputs.shape.n_tokens[r] * width, dtype_bytes(dtype));
}

void world_free_buffers(const struct world *world, void **buffers)
{
    for (uint32_t r = 0; r < world->op_case->world_size; r++)
        free(buffers[r]);
}

void world_slot_doubles(const struct world *world, size_t width, double **buffers)
{
    for (uint32_t r = 0; r < world->op_case->world_size; r++)
        buffers[r] = values_alloc_doubles(world_buffer_rows(world) * width);
}

void world_token_doubles(const struct world *world, size_t width, double **buffers)
{
    for (uint32_t r = 0; r < world->op_case->world_size; r++)
        buffers[r] = values_alloc_doubles(world->inputs.shape.n_tokens[r] * width);
}

void world_free_doubles(const struct world *world, double **buffers)
{
    for (uint32_t r = 0; r < world->op_case->world_size; r++)
        free(buffers[r]);
}

struct tensor world_tensor(void *data, enum epd_dtype dtype, int64_t n_rows, int64_t n_columns)
{
    return (struct tensor){.data = data, .dtype = dtype, .n_dims = 2, .shape = {n_rows, n_columns, 1}};
}

struct route_args world_route_args(struct world *world, uint32_t rank)
{
    const struct op_case *op_case = world->op_case;
    int64_t n_tokens = world->inputs.shape.n_tokens[rank];
    struct route_args args = {
        .shape = world_shape(world, rank),
        .topk_idx =
            world_tensor(world->inputs.topk_typed[rank], op_case->idx_dtype, n_tokens, op_case->top_k),
        .routing = world->ranks[rank].routing,
        .error = &world->ranks[rank].error,
    };
    for (uint32_t r = 0; r < op_case->world_size; r++)
        args.counts[r] = world->ranks[r].routing.counts;
    return args;
}

void world_route(struct world *world)
{
    uint32_t world_size = world->op_case->world_size;
    for (uint32_t r = 0; r < world_size; r++) {
        poison_routing(world, &world->ranks[r].routing);
        values_poison(world->ranks[r].routing.source, world_buffer_rows(world) * sizeof(int32_t));
        world->ranks[r].error = (struct kernel_error){0};
    }
    for (uint32_t r = 0; r < world_size; r++) {
        struct route_args args = world_route_args(world, r);
        ck_assert_int_eq(host_route_count(&args, &world->scratch), EPD_OK);
    }
    for (uint32_t r = 0; r < world_size; r++) {
        struct route_args args = world_route_args(world, r);
        ck_assert_int_eq(host_route_layout(&args, &world->scratch), EPD_OK);
    }
}

static struct tensor weights_tensor(const struct world *world, uint32_t rank, int weighted)
{
    void *data = weighted ? world->inputs.topk_weights[rank] : NULL;
    return world_tensor(data, EPD_F32, world->inputs.shape.n_tokens[rank], world->op_case->top_k);
}

static struct tensor hidden_tensor(const struct world *world, uint32_t rank, void *data)
{
    return world_tensor(data, world->op_case->dtype, world->inputs.shape.n_tokens[rank],
                        world->op_case->hidden);
}

void world_dispatch(struct world *world, enum world_input input, int scaled, void *const *recv_x,
                    float *const *recv_weights)
{
    for (uint32_t r = 0; r < world->op_case->world_size; r++) {
        void *x = input == WORLD_X ? world->inputs.x[r] : world->inputs.dout[r];
        struct dispatch_args args = {
            .shape = world_shape(world, r),
            .routing = world->ranks[r].routing,
            .x = hidden_tensor(world, r, x),
            .topk_weights = weights_tensor(world, r, 1),
            .scaled = scaled,
        };
        for (uint32_t to = 0; to < world->op_case->world_size; to++) {
            args.recv_x[to] = recv_x[to];
            args.recv_weights[to] = recv_weights ? recv_weights[to] : NULL;
            args.recv_source[to] = input == WORLD_X ? world->ranks[to].routing.source : NULL;
        }
        ck_assert_int_eq(host_dispatch_push(&args, &world->scratch), EPD_OK);
    }
}

void world_combine(struct world *world, void *const *y, int weighted, void *const *out)
{
    for (uint32_t r = 0; r < world->op_case->world_size; r++) {
        struct combine_args args = {
            .shape = world_shape(world, r),
            .routing = world->ranks[r].routing,
            .topk_weights = weights_tensor(world, r, weighted),
            .out = hidden_tensor(world, r, out[r]),
        };
        for (uint32_t from = 0; from < world->op_case->world_size; from++)
            args.y[from] = y[from];
        ck_assert_int_eq(host_combine(&args, &world->scratch), EPD_OK);
    }
}

void world_weight_grad(struct world *world, void *const *y, float *const *out)
{
    for (uint32_t r = 0; r < world->op_case->world_size; r++) {
        struct weight_grad_args args = {
            .shape = world_shape(world, r),
            .routing = world->ranks[r].routing,
            .dout = hidden_tensor(world, r, world->inputs.dout[r]),
            .out = out[r],
        };
        for (uint32_t from = 0; from < world->op_case->world_size; from++)
            args.y[from] = y[from];
        ck_assert_int_eq(host_weight_grad(&args), EPD_OK);
    }
}

void world_gather(struct world *world, float *const *value, int accumulate, float *const *out)
{
    for (uint32_t r = 0; r < world->op_case->world_size; r++) {
        struct gather_scalars_args args = {
            .shape = world_shape(world, r),
            .routing = world->ranks[r].routing,
            .out = out[r],
            .accumulate = accumulate,
        };
        for (uint32_t from = 0; from < world->op_case->world_size; from++)
            args.value[from] = value[from];
        ck_assert_int_eq(host_gather_scalars(&args), EPD_OK);
    }
}
