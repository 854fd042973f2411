#include <stdlib.h>
#include <string.h>

#include "tests/reference/reference.h"
#include "tests/reference/values.h"

static uint32_t local_experts(const struct reference_shape *shape)
{
    return shape->n_experts / shape->world_size;
}

static void check_topk(struct reference_rank *rank, const struct reference_shape *shape, uint32_t n_tokens,
                       const int64_t *topk_idx)
{
    rank->bad = (struct reference_bad_routing){.token = -1};
    for (int64_t token = 0; token < n_tokens; token++) {
        for (int64_t k = 0; k < shape->top_k; k++) {
            int64_t i = token * shape->top_k + k, value = topk_idx[i];
            int in_range = value >= 0 && value < shape->n_experts, repeated = 0;
            for (int64_t before = token * shape->top_k; before < i; before++)
                repeated |= in_range && topk_idx[before] == value;
            rank->expert[i] = in_range && !repeated ? value : -1;
            rank->row[i] = -1;
            if (value != -1 && rank->expert[i] < 0 && rank->bad.token < 0)
                rank->bad = (struct reference_bad_routing){
                    .token = token, .got = value, .expert = repeated ? value : -1};
        }
    }
}

/* Gives (token, k) of `from` the next row of `to`, if there is room. */
static void place_row(struct reference_routing *routing, uint32_t to, uint32_t from, int64_t i, int64_t row)
{
    struct reference_rank *receiver = &routing->ranks[to];
    if (row >= routing->shape.capacity_rows) {
        receiver->dropped_rows++;
        return;
    }
    int64_t top_k = routing->shape.top_k;
    routing->ranks[from].row[i] = row;
    receiver->source[row] = (struct reference_source){.rank = from, .token = i / top_k, .k = i % top_k};
}

/* Rows for one expert in the order of rank and token; returns how many there are, kept or not. */
static int64_t place_expert(struct reference_routing *routing, uint32_t expert, uint32_t to,
                            int64_t first_row)
{
    int64_t n = 0;
    for (uint32_t from = 0; from < routing->shape.world_size; from++) {
        int64_t n_slots = (int64_t)routing->shape.n_tokens[from] * routing->shape.top_k;
        for (int64_t i = 0; i < n_slots; i++)
            if (routing->ranks[from].expert[i] == expert)
                place_row(routing, to, from, i, first_row + n++);
    }
    return n;
}

static void lay_out_rank(struct reference_routing *routing, uint32_t to)
{
    const struct reference_shape *shape = &routing->shape;
    struct reference_rank *rank = &routing->ranks[to];
    int64_t capacity = shape->capacity_rows, end = 0;
    rank->needed_rows = rank->dropped_rows = 0;
    for (uint32_t local = 0; local < local_experts(shape); local++) {
        int64_t first = rank->needed_rows, dropped_before = rank->dropped_rows;
        int64_t rows = place_expert(routing, to * local_experts(shape) + local, to, first);
        rank->m_splits[local] = rows - (rank->dropped_rows - dropped_before);
        rank->offsets[local] = first < capacity ? first : capacity;
        rank->needed_rows += (rows + shape->alignment - 1) / shape->alignment * shape->alignment;
    }
    end = rank->needed_rows < capacity ? rank->needed_rows : capacity;
    rank->offsets[local_experts(shape)] = end;
}

void reference_route(struct reference_routing *routing, const struct reference_shape *shape,
                     int64_t *const *topk_idx)
{
    *routing = (struct reference_routing){.shape = *shape};
    for (uint32_t r = 0; r < shape->world_size; r++) {
        struct reference_rank *rank = &routing->ranks[r];
        size_t n = (size_t)shape->n_tokens[r] * shape->top_k;
        rank->expert = values_alloc(n, sizeof(int64_t));
        rank->row = values_alloc(n, sizeof(int64_t));
        rank->m_splits = values_alloc(local_experts(shape), sizeof(int64_t));
        rank->offsets = values_alloc(local_experts(shape) + 1, sizeof(int64_t));
        rank->source = values_alloc((size_t)shape->capacity_rows, sizeof(*rank->source));
        for (int64_t row = 0; row < shape->capacity_rows; row++)
            rank->source[row] = (struct reference_source){.rank = -1, .token = -1, .k = -1};
        check_topk(rank, shape, shape->n_tokens[r], topk_idx[r]);
    }
    for (uint32_t r = 0; r < shape->world_size; r++)
        lay_out_rank(routing, r);
}

void reference_routing_fini(struct reference_routing *routing)
{
    for (uint32_t r = 0; r < routing->shape.world_size; r++) {
        struct reference_rank *rank = &routing->ranks[r];
        free(rank->expert);
        free(rank->row);
        free(rank->m_splits);
        free(rank->offsets);
        free(rank->source);
    }
}

void reference_dispatch(const struct reference_routing *routing, double *const *x, double *const *weights,
                        int scaled, double *const *recv_x, double *const *recv_weights)
{
    const struct reference_shape *shape = &routing->shape;
    for (uint32_t r = 0; r < shape->world_size; r++) {
        const struct reference_rank *rank = &routing->ranks[r];
        for (int64_t row = 0; row < rank->offsets[local_experts(shape)]; row++) {
            struct reference_source source = rank->source[row];
            double weight = 0;
            if (source.rank >= 0)
                weight = weights ? weights[source.rank][source.token * shape->top_k + source.k] : 1;
            for (uint32_t h = 0; h < shape->hidden; h++) {
                double value = source.rank < 0 ? 0 : x[source.rank][source.token * shape->hidden + h];
                recv_x[r][row * shape->hidden + h] = scaled ? weight * value : value;
            }
            if (recv_weights)
                recv_weights[r][row] = weight;
        }
    }
}

/* The row of y that answers (token, k) of a rank; NULL if there is none. */
static const double *answer(const struct reference_routing *routing, uint32_t rank, size_t i, size_t width,
                            double *const *y)
{
    int64_t row = routing->ranks[rank].row[i];
    if (row < 0)
        return NULL;
    return y[routing->ranks[rank].expert[i] / local_experts(&routing->shape)] + (size_t)row * width;
}

void reference_combine(const struct reference_routing *routing, double *const *y, double *const *weights,
                       double *const *out)
{
    const struct reference_shape *shape = &routing->shape;
    size_t hidden = shape->hidden;
    for (uint32_t r = 0; r < shape->world_size; r++) {
        memset(out[r], 0, shape->n_tokens[r] * hidden * sizeof(double));
        for (size_t i = 0; i < (size_t)shape->n_tokens[r] * shape->top_k; i++) {
            const double *row = answer(routing, r, i, hidden, y);
            for (size_t h = 0; row && h < hidden; h++)
                out[r][i / shape->top_k * hidden + h] += (weights ? weights[r][i] : 1) * row[h];
        }
    }
}

void reference_weight_grad(const struct reference_routing *routing, double *const *dout, double *const *y,
                           double *const *out)
{
    const struct reference_shape *shape = &routing->shape;
    size_t hidden = shape->hidden;
    for (uint32_t r = 0; r < shape->world_size; r++) {
        for (size_t i = 0; i < (size_t)shape->n_tokens[r] * shape->top_k; i++) {
            const double *row = answer(routing, r, i, hidden, y);
            out[r][i] = 0;
            for (size_t h = 0; row && h < hidden; h++)
                out[r][i] += dout[r][i / shape->top_k * hidden + h] * row[h];
        }
    }
}

void reference_gather(const struct reference_routing *routing, double *const *value, double *const *out)
{
    const struct reference_shape *shape = &routing->shape;
    for (uint32_t r = 0; r < shape->world_size; r++) {
        for (size_t i = 0; i < (size_t)shape->n_tokens[r] * shape->top_k; i++) {
            const double *scalar = answer(routing, r, i, 1, value);
            out[r][i] = scalar ? *scalar : 0;
        }
    }
}
