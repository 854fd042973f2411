/* Stages 1 and 2 of an exchange: who gets how many rows, and where each (token, k) goes. */
#include <string.h>

#include "kernels/host/record.h"
#include "kernels/host/scratch.h"

static int64_t topk_value(const struct tensor *topk_idx, size_t i)
{
    return topk_idx->dtype == EPD_I64 ? ((const int64_t *)topk_idx->data)[i]
                                      : ((const int32_t *)topk_idx->data)[i];
}

static void record_bad_routing(const struct route_args *args, uint32_t token, int32_t expert, int64_t got)
{
    struct kernel_error seen = {
        .status = EPD_BAD_ROUTING,
        .rank = args->shape.rank,
        .expert = expert,
        .token = (int32_t)token,
        .got = got,
        .allowed = (int64_t)args->shape.n_experts - 1,
    };
    record_keep_first(args->error, &seen);
}

/* The expert of (token, k), or -1; `earlier` are the experts of the same token before k. */
static int32_t checked_expert(const struct route_args *args, uint32_t token, uint32_t k,
                              const int32_t *earlier)
{
    int64_t value = topk_value(&args->topk_idx, (size_t)token * args->shape.top_k + k);
    if (value == -1)
        return -1;
    if (value < 0 || value >= args->shape.n_experts) {
        record_bad_routing(args, token, -1, value);
        return -1;
    }
    for (uint32_t i = 0; i < k; i++) {
        if (earlier[i] == value) {
            record_bad_routing(args, token, (int32_t)value, value);
            return -1;
        }
    }
    return (int32_t)value;
}

void host_route_check(const struct route_args *args, int32_t *counts)
{
    const struct exchange_shape *shape = &args->shape;
    memset(counts, 0, shape->n_experts * sizeof *counts);
    for (uint32_t token = 0; token < shape->n_tokens; token++) {
        int32_t *experts = args->routing.expert + (size_t)token * shape->top_k;
        for (uint32_t k = 0; k < shape->top_k; k++) {
            experts[k] = checked_expert(args, token, k, experts);
            if (experts[k] >= 0)
                counts[experts[k]]++;
        }
    }
}

enum epd_status host_route_count(const struct route_args *args, struct host_scratch *scratch)
{
    const struct exchange_shape *shape = &args->shape;
    size_t counts_bytes = shape->n_experts * sizeof(int32_t);
    float *floats;
    enum epd_status status = host_scratch_acquire(scratch, shape->n_experts, &floats);
    if (status != EPD_OK)
        return status;
    int32_t *counts = (int32_t *)(void *)floats;

    host_route_check(args, counts);
    for (uint32_t rank = 0; rank < shape->world_size; rank++)
        memcpy(args->counts[rank] + (size_t)shape->rank * shape->n_experts, counts, counts_bytes);
    return EPD_OK;
}

static int64_t rows_of_expert(const struct route_args *args, uint32_t expert, uint32_t n_ranks)
{
    int64_t rows = 0;
    for (uint32_t rank = 0; rank < n_ranks; rank++)
        rows += args->routing.counts[(size_t)rank * args->shape.n_experts + expert];
    return rows;
}

static int64_t aligned_rows(const struct exchange_shape *shape, int64_t rows)
{
    int64_t mask = (int64_t)shape->alignment - 1;
    return (rows + mask) & ~mask;
}

static int64_t min_rows(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

/* This rank as a receiver: its slabs, cut at the capacity. */
void host_route_slabs(const struct route_args *args, const int64_t *all_rows)
{
    const struct exchange_shape *shape = &args->shape;
    const struct routing *routing = &args->routing;
    int64_t capacity = shape->capacity_rows;
    int64_t next = 0, dropped = 0;
    for (uint32_t local = 0; local < shape->n_local_experts; local++) {
        int64_t rows = all_rows[local];
        int64_t first = min_rows(next, capacity);
        int64_t kept = min_rows(rows, capacity - first);
        routing->offsets[local] = first;
        routing->m_splits[local] = kept;
        dropped += rows - kept;
        next += aligned_rows(shape, rows);
    }
    routing->offsets[shape->n_local_experts] = min_rows(next, capacity);
    *routing->needed_rows = next;
    *routing->dropped_rows = dropped;
    if (next > capacity) {
        struct kernel_error seen = {
            .status = EPD_CAPACITY_OVERFLOW,
            .rank = shape->rank,
            .expert = -1,
            .token = -1,
            .got = next,
            .allowed = capacity,
        };
        record_keep_first(args->error, &seen);
    }
}

/* next_row[e]: where the first row that this rank sends to expert e goes in the slabs of e's rank. The slabs
 * of every rank begin at row 0 and follow each other in the order of its experts. */
static void find_first_rows(const struct route_args *args, int64_t *next_row)
{
    const struct exchange_shape *shape = &args->shape;
    int64_t slab = 0;
    for (uint32_t expert = 0; expert < shape->n_experts; expert++) {
        if (expert % shape->n_local_experts == 0)
            slab = 0;
        next_row[expert] = slab + rows_of_expert(args, expert, shape->rank);
        slab += aligned_rows(shape, rows_of_expert(args, expert, shape->world_size));
    }
}

enum epd_status host_route_layout(const struct route_args *args, struct host_scratch *scratch)
{
    const struct exchange_shape *shape = &args->shape;
    float *floats;
    enum epd_status status =
        host_scratch_acquire(scratch, shape->n_experts * (sizeof(int64_t) / sizeof(float)), &floats);
    if (status != EPD_OK)
        return status;
    int64_t *next_row = (int64_t *)(void *)floats;

    for (uint32_t local = 0; local < shape->n_local_experts; local++)
        next_row[local] =
            rows_of_expert(args, shape->rank * shape->n_local_experts + local, shape->world_size);
    host_route_slabs(args, next_row);
    find_first_rows(args, next_row);
    size_t n = (size_t)shape->n_tokens * shape->top_k;
    for (size_t i = 0; i < n; i++) {
        int32_t expert = args->routing.expert[i];
        int64_t row = expert < 0 ? -1 : next_row[expert]++;
        args->routing.row[i] = row < shape->capacity_rows ? (int32_t)row : -1;
    }
    return EPD_OK;
}
