#include "kernels/host/partial.h"

#include "kernels/host/dtype.h"
#include "kernels/host/scratch.h"

static void add_rows(const struct combine_args *args, uint32_t token, float *restrict sum, float *floats)
{
    const struct exchange_shape *shape = &args->shape;
    const struct routing *routing = &args->routing;
    const float *weights = args->topk_weights.data;
    size_t hidden = shape->hidden, row_bytes = hidden * dtype_bytes(args->out.dtype);
    int first = 1;
    for (uint32_t k = 0; k < shape->top_k; k++) {
        size_t i = (size_t)token * shape->top_k + k;
        if (routing->row[i] < 0)
            continue;
        uint32_t rank = (uint32_t)routing->expert[i] / shape->n_local_experts;
        const char *y = (const char *)args->y[rank] + (size_t)routing->row[i] * row_bytes;
        const float *values = dtype_view(y, args->out.dtype, hidden, floats);
        float weight = weights ? weights[i] : 1.0f;
        for (size_t h = 0; h < hidden; h++)
            sum[h] = first ? weight * values[h] : sum[h] + weight * values[h];
        first = 0;
    }
    if (first)
        memset(sum, 0, hidden * sizeof *sum);
}

enum epd_status host_combine_partial(const struct combine_args *args, float *sums,
                                     struct host_scratch *scratch)
{
    size_t hidden = args->shape.hidden;
    float *floats;
    enum epd_status status = host_scratch_acquire(scratch, hidden, &floats);
    if (status != EPD_OK)
        return status;
    for (uint32_t token = 0; token < args->shape.n_tokens; token++)
        add_rows(args, token, sums + token * hidden, floats);
    return EPD_OK;
}

enum epd_status host_add_partials(const struct partial_sums *parts, uint32_t n_parts,
                                  const struct tensor *out, struct host_scratch *scratch)
{
    size_t hidden = (size_t)out->shape[1], row_bytes = hidden * dtype_bytes(out->dtype);
    uint32_t at[EPD_MAX_RANKS] = {0};
    float *sum;
    enum epd_status status = host_scratch_acquire(scratch, hidden, &sum);
    if (status != EPD_OK)
        return status;
    for (int64_t token = 0; token < out->shape[0]; token++) {
        int first = 1;
        for (uint32_t i = 0; i < n_parts; i++) {
            const struct partial_sums *part = &parts[i];
            if (at[i] >= part->n || (part->tokens && part->tokens[at[i]] != token))
                continue;
            const float *add = part->sums + (size_t)at[i]++ * hidden;
            for (size_t h = 0; h < hidden; h++)
                sum[h] = first ? add[h] : sum[h] + add[h];
            first = 0;
        }
        if (first)
            memset(sum, 0, hidden * sizeof *sum);
        dtype_store((char *)out->data + (size_t)token * row_bytes, sum, out->dtype, hidden);
    }
    return EPD_OK;
}
