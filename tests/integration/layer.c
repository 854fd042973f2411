#include "tests/integration/layer.h"

#include <stdlib.h>
#include <string.h>

#include "tests/reference/values.h"

struct epd_group_options layer_group_options(const struct layer *layer)
{
    const struct op_case *op_case = layer->op_case;
    return (struct epd_group_options){
        .size = sizeof(struct epd_group_options),
        .name = layer->rank->group_name,
        .world_size = op_case->world_size,
        .rank = layer->rank->rank,
        .n_experts = op_case->n_experts,
        .top_k = op_case->top_k,
        .hidden = op_case->hidden,
        .ffn = op_case->ffn,
        .max_tokens = op_case->max_tokens > 0 ? op_case->max_tokens : 1,
        .capacity_rows = layer->inputs.shape.capacity_rows > 0 ? layer->inputs.shape.capacity_rows : 1,
        .alignment = op_case->alignment,
        .dtype = op_case->dtype,
        .overflow = op_case->overflow,
        .n_nodes = layer->rank->n_nodes,
    };
}

void layer_open(struct layer *layer, const struct rank *rank, const struct op_case *op_case)
{
    *layer = (struct layer){.op_case = op_case, .rank = rank};
    op_inputs_init(&layer->inputs, op_case);
    layer->n_tokens = layer->inputs.shape.n_tokens[rank->rank];
    layer->n_local_experts = layer->inputs.n_local_experts;
    struct epd_open_options open_options = {.size = sizeof(open_options), .socket_path = rank->socket_path};
    RANK_CHECK(epd_open(&open_options, &layer->client) == EPD_OK);
    struct epd_group_options options = layer_group_options(layer);
    RANK_CHECK(epd_group_join(layer->client, &options, &layer->group) == EPD_OK);
    struct epd_group_info info = {.size = sizeof(info)};
    RANK_CHECK(epd_group_info(layer->group, &info) == EPD_OK);
    RANK_CHECK(info.n_local_experts == layer->n_local_experts);
    RANK_CHECK(info.first_expert == rank->rank * layer->n_local_experts);
    layer->capacity_rows = info.capacity_rows;
}

void layer_close(struct layer *layer)
{
    epd_close(layer->client);
    op_inputs_fini(&layer->inputs);
}

struct layer_tensor layer_tensor(struct layer *layer, enum epd_role role, enum epd_dtype dtype,
                                 const int64_t *shape, uint32_t n_dims, const void *source)
{
    struct layer_tensor t = {.tensor = {.role = role, .dtype = dtype, .n_dims = n_dims}, .n = 1};
    for (uint32_t i = 0; i < n_dims; i++) {
        t.tensor.shape[i] = shape[i];
        t.n *= (size_t)shape[i];
    }
    size_t bytes = t.n * dtype_bytes(dtype);
    RANK_CHECK(epd_buffer_alloc(layer->group, bytes > 0 ? bytes : 16, &t.tensor.buffer) == EPD_OK);
    t.data = epd_buffer_data(t.tensor.buffer);
    RANK_CHECK(t.data != NULL);
    if (source)
        memcpy(t.data, source, bytes);
    else
        values_poison(t.data, bytes);
    return t;
}

void layer_tensor_release(struct layer_tensor *t)
{
    RANK_CHECK(epd_buffer_release(t->tensor.buffer) == EPD_OK);
    t->tensor.buffer = NULL;
}

static const char *part_of(const struct layer *layer, const void *all, int64_t elements_per_expert)
{
    size_t bytes = (size_t)elements_per_expert * dtype_bytes(layer->op_case->dtype);
    return (const char *)all + layer->rank->rank * layer->n_local_experts * bytes;
}

struct layer_tensor layer_input(struct layer *layer, enum epd_role role)
{
    const struct op_case *c = layer->op_case;
    const struct op_inputs *in = &layer->inputs;
    uint32_t r = layer->rank->rank;
    int64_t t = layer->n_tokens, k = c->top_k, h = c->hidden, f = c->ffn, l = layer->n_local_experts;
    switch (role) {
    case EPD_ROLE_X:
        return layer_tensor(layer, role, c->dtype, (int64_t[]){t, h}, 2, in->x[r]);
    case EPD_ROLE_DOUT:
        return layer_tensor(layer, role, c->dtype, (int64_t[]){t, h}, 2, in->dout[r]);
    case EPD_ROLE_TOPK_IDX:
        return layer_tensor(layer, role, c->idx_dtype, (int64_t[]){t, k}, 2, in->topk_typed[r]);
    case EPD_ROLE_TOPK_WEIGHTS:
        return layer_tensor(layer, role, EPD_F32, (int64_t[]){t, k}, 2, in->topk_weights[r]);
    case EPD_ROLE_W1:
        return layer_tensor(layer, role, c->dtype, (int64_t[]){l, 2 * f, h}, 3,
                            part_of(layer, in->w1, 2 * f * h));
    case EPD_ROLE_W2:
        return layer_tensor(layer, role, c->dtype, (int64_t[]){l, h, f}, 3, part_of(layer, in->w2, h * f));
    case EPD_ROLE_B1:
        if (!c->biased)
            return (struct layer_tensor){0};
        return layer_tensor(layer, role, c->dtype, (int64_t[]){l, 2 * f}, 2, part_of(layer, in->b1, 2 * f));
    case EPD_ROLE_B2:
        if (!c->biased)
            return (struct layer_tensor){0};
        return layer_tensor(layer, role, c->dtype, (int64_t[]){l, h}, 2, part_of(layer, in->b2, h));
    default:
        RANK_CHECK(!"no such input");
        return (struct layer_tensor){0};
    }
}

struct layer_tensor layer_output(struct layer *layer, enum epd_role role)
{
    const struct op_case *c = layer->op_case;
    int64_t t = layer->n_tokens, k = c->top_k, h = c->hidden, f = c->ffn, l = layer->n_local_experts;
    int64_t rows = layer->capacity_rows;
    switch (role) {
    case EPD_ROLE_OUT:
    case EPD_ROLE_DX:
        return layer_tensor(layer, role, c->dtype, (int64_t[]){t, h}, 2, NULL);
    case EPD_ROLE_D_WEIGHTS:
        return layer_tensor(layer, role, EPD_F32, (int64_t[]){t, k}, 2, NULL);
    case EPD_ROLE_RECV_X:
    case EPD_ROLE_Y:
    case EPD_ROLE_DY:
    case EPD_ROLE_D_RECV_X:
        return layer_tensor(layer, role, c->dtype, (int64_t[]){rows, h}, 2, NULL);
    case EPD_ROLE_PREACT:
    case EPD_ROLE_D_PREACT:
        return layer_tensor(layer, role, c->dtype, (int64_t[]){rows, 2 * f}, 2, NULL);
    case EPD_ROLE_ACT:
    case EPD_ROLE_D_ACT:
        return layer_tensor(layer, role, c->dtype, (int64_t[]){rows, f}, 2, NULL);
    case EPD_ROLE_RECV_WEIGHTS:
    case EPD_ROLE_D_RECV_WEIGHTS:
        return layer_tensor(layer, role, EPD_F32, (int64_t[]){rows}, 1, NULL);
    case EPD_ROLE_M_SPLITS:
        return layer_tensor(layer, role, EPD_I64, (int64_t[]){l}, 1, NULL);
    case EPD_ROLE_OFFSETS:
        return layer_tensor(layer, role, EPD_I64, (int64_t[]){l + 1}, 1, NULL);
    case EPD_ROLE_DW1:
        return layer_tensor(layer, role, EPD_F32, (int64_t[]){l, 2 * f, h}, 3, NULL);
    case EPD_ROLE_DW2:
        return layer_tensor(layer, role, EPD_F32, (int64_t[]){l, h, f}, 3, NULL);
    case EPD_ROLE_DB1:
        if (!c->biased)
            return (struct layer_tensor){0};
        return layer_tensor(layer, role, EPD_F32, (int64_t[]){l, 2 * f}, 2, NULL);
    case EPD_ROLE_DB2:
        if (!c->biased)
            return (struct layer_tensor){0};
        return layer_tensor(layer, role, EPD_F32, (int64_t[]){l, h}, 2, NULL);
    default:
        RANK_CHECK(!"no such output");
        return (struct layer_tensor){0};
    }
}

struct epd_plan *layer_plan(struct layer *layer, struct epd_plan_options options,
                            const struct layer_tensor *tensors, uint32_t n)
{
    struct epd_tensor list[32];
    struct epd_plan *plan = NULL;
    options.size = sizeof(options);
    options.activation = layer->op_case->activation;
    options.tensors = list;
    for (uint32_t i = 0; i < n; i++)
        if (tensors[i].tensor.role != EPD_ROLE_UNSPECIFIED)
            list[options.n_tensors++] = tensors[i].tensor;
    RANK_CHECK(epd_plan_create(layer->group, &options, &plan) == EPD_OK);
    return plan;
}

enum epd_status layer_step(struct epd_plan *plan)
{
    RANK_CHECK(epd_plan_launch(plan, NULL) == EPD_OK);
    return epd_plan_wait(plan, 0);
}

void layer_expect(const struct layer *layer, const char *what, const struct layer_tensor *got,
                  const double *want, size_t n)
{
    char text[VALUES_TEXT_BYTES];
    enum epd_dtype dtype = got->tensor.dtype;
    /* intermediates have the dtype of the case, whatever the result is stored in */
    struct tolerance tolerance = tolerance_chain(layer->op_case->dtype, want, n);
    if (!values_match(dtype, got->data, want, n, tolerance, text)) {
        fprintf(stderr, "case \"%s\" rank %u of %u: %s: %s\n", layer->op_case->name, layer->rank->rank,
                layer->rank->world_size, what, text);
        _exit(1);
    }
}
