/* Rows between tokens and slots: dispatch_push there, combine and its relatives back. Every function walks
 * this rank's tokens in order and reads or writes the slots of the ranks their experts live on. */
#include <string.h>

#include "kernels/host/dtype.h"
#include "kernels/host/scratch.h"

/* Columns that combine sums at a time: small enough that the sums stay in the first-level cache over all k.
 */
#define COMBINE_BLOCK 1024

struct slot {
    uint32_t rank;
    int64_t row; /* -1: (t, k) has none */
};

static struct slot slot_of(const struct exchange_shape *shape, const struct routing *routing, size_t i)
{
    if (routing->row[i] < 0)
        return (struct slot){.row = -1};
    return (struct slot){.rank = (uint32_t)routing->expert[i] / shape->n_local_experts,
                         .row = routing->row[i]};
}

static const void *row_at(const void *base, int64_t row, size_t row_bytes)
{
    return (const char *)base + (size_t)row * row_bytes;
}

static float weight_at(const struct tensor *weights, size_t i)
{
    return weights->data ? ((const float *)weights->data)[i] : 1.0f;
}

static void clear_padding(const struct dispatch_args *args)
{
    const struct exchange_shape *shape = &args->shape;
    const struct routing *routing = &args->routing;
    size_t row_bytes = shape->hidden * dtype_bytes(args->x.dtype);
    for (uint32_t local = 0; local < shape->n_local_experts; local++) {
        int64_t first = routing->offsets[local] + routing->m_splits[local];
        int64_t n = routing->offsets[local + 1] - first;
        if (n <= 0)
            continue;
        memset((char *)args->recv_x[shape->rank] + (size_t)first * row_bytes, 0, (size_t)n * row_bytes);
        if (args->recv_weights[shape->rank])
            memset(args->recv_weights[shape->rank] + first, 0, (size_t)n * sizeof(float));
        if (args->recv_source[shape->rank])
            memset(args->recv_source[shape->rank] + first, 0xff, (size_t)n * sizeof(int32_t)); /* -1 */
    }
}

/* What dispatch_push knows of one token: its row as it came, and as fp32 when it is to be scaled. */
struct push_row {
    const void *bytes;
    const float *values; /* NULL: copied unscaled */
    float *scaled;       /* [H] to compute in */
};

static void push_one(const struct dispatch_args *args, size_t i, const struct push_row *row)
{
    const struct exchange_shape *shape = &args->shape;
    struct slot slot = slot_of(shape, &args->routing, i);
    if (slot.row < 0)
        return;
    size_t hidden = shape->hidden, row_bytes = hidden * dtype_bytes(args->x.dtype);
    float weight = weight_at(&args->topk_weights, i);
    char *dst = (char *)args->recv_x[slot.rank] + (size_t)slot.row * row_bytes;
    if (row->values) {
        for (size_t h = 0; h < hidden; h++)
            row->scaled[h] = weight * row->values[h];
        dtype_store(dst, row->scaled, args->x.dtype, hidden);
    } else {
        memcpy(dst, row->bytes, row_bytes);
    }
    if (args->recv_weights[slot.rank])
        args->recv_weights[slot.rank][slot.row] = weight;
    if (args->recv_source[slot.rank])
        args->recv_source[slot.rank][slot.row] =
            (int32_t)((size_t)shape->rank * shape->max_tokens * shape->top_k + i);
}

enum epd_status host_dispatch_push(const struct dispatch_args *args, struct host_scratch *scratch)
{
    const struct exchange_shape *shape = &args->shape;
    size_t hidden = shape->hidden, row_bytes = hidden * dtype_bytes(args->x.dtype);
    int scaled = args->scaled && args->topk_weights.data;
    float *floats = NULL;
    if (scaled) {
        enum epd_status status = host_scratch_acquire(scratch, 2 * hidden, &floats);
        if (status != EPD_OK)
            return status;
    }
    clear_padding(args);
    for (uint32_t token = 0; token < shape->n_tokens; token++) {
        struct push_row row = {.bytes = row_at(args->x.data, token, row_bytes)};
        if (scaled) {
            row.values = dtype_view(row.bytes, args->x.dtype, hidden, floats);
            row.scaled = floats + hidden;
        }
        for (uint32_t k = 0; k < shape->top_k; k++)
            push_one(args, (size_t)token * shape->top_k + k, &row);
    }
    return EPD_OK;
}

static void add_weighted(float *restrict sum, const float *restrict y, float weight, size_t n, int first)
{
    if (first) {
        for (size_t i = 0; i < n; i++)
            sum[i] = weight * y[i];
    } else {
        for (size_t i = 0; i < n; i++)
            sum[i] += weight * y[i];
    }
}

/* Columns column .. column + n - 1 of out[token]. */
static void combine_block(const struct combine_args *args, uint32_t token, size_t column, size_t n,
                          float *floats)
{
    const struct exchange_shape *shape = &args->shape;
    enum epd_dtype dtype = args->out.dtype;
    size_t element = dtype_bytes(dtype), row_bytes = shape->hidden * element;
    char *out = (char *)args->out.data + token * row_bytes + column * element;
    float *sum = dtype == EPD_F32 ? (float *)(void *)out : floats;
    int first = 1;
    for (uint32_t k = 0; k < shape->top_k; k++) {
        size_t i = (size_t)token * shape->top_k + k;
        struct slot slot = slot_of(shape, &args->routing, i);
        if (slot.row < 0)
            continue;
        const char *y = (const char *)row_at(args->y[slot.rank], slot.row, row_bytes) + column * element;
        const float *values = dtype_view(y, dtype, n, floats + COMBINE_BLOCK);
        add_weighted(sum, values, weight_at(&args->topk_weights, i), n, first);
        first = 0;
    }
    if (first)
        memset(out, 0, n * element);
    else if (dtype != EPD_F32)
        dtype_store(out, sum, dtype, n);
}

enum epd_status host_combine(const struct combine_args *args, struct host_scratch *scratch)
{
    const struct exchange_shape *shape = &args->shape;
    float *floats;
    enum epd_status status = host_scratch_acquire(scratch, 2 * COMBINE_BLOCK, &floats);
    if (status != EPD_OK)
        return status;
    for (uint32_t token = 0; token < shape->n_tokens; token++) {
        for (size_t column = 0; column < shape->hidden; column += COMBINE_BLOCK) {
            size_t left = shape->hidden - column;
            combine_block(args, token, column, left < COMBINE_BLOCK ? left : COMBINE_BLOCK, floats);
        }
    }
    return EPD_OK;
}

enum epd_status host_gather_scalars(const struct gather_scalars_args *args)
{
    const struct exchange_shape *shape = &args->shape;
    size_t n = (size_t)shape->n_tokens * shape->top_k;
    for (size_t i = 0; i < n; i++) {
        struct slot slot = slot_of(shape, &args->routing, i);
        float value = slot.row < 0 ? 0.0f : args->value[slot.rank][slot.row];
        args->out[i] = args->accumulate ? args->out[i] + value : value;
    }
    return EPD_OK;
}

enum epd_status host_weight_grad(const struct weight_grad_args *args)
{
    const struct exchange_shape *shape = &args->shape;
    enum epd_dtype dtype = args->dout.dtype;
    size_t row_bytes = shape->hidden * dtype_bytes(dtype);
    size_t n = (size_t)shape->n_tokens * shape->top_k;
    for (size_t i = 0; i < n; i++) {
        struct slot slot = slot_of(shape, &args->routing, i);
        if (slot.row < 0) {
            args->out[i] = 0.0f;
            continue;
        }
        const void *dout = row_at(args->dout.data, (int64_t)(i / shape->top_k), row_bytes);
        args->out[i] = dtype_dot(dout, row_at(args->y[slot.rank], slot.row, row_bytes), dtype, shape->hidden);
    }
    return EPD_OK;
}
