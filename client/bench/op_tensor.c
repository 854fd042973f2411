#include <stdlib.h>
#include <string.h>

#include "client/bench/fill.h"
#include "client/bench/op_impl.h"

/* Element bytes of any dtype that the ops take. */
static uint64_t element_bytes(enum epd_dtype dtype)
{
    return dtype == EPD_I64 ? 8 : dtype == EPD_F32 || dtype == EPD_I32 ? 4 : 2;
}

static int on_gpu(const struct op *op)
{
    return op->gpu.state != NULL;
}

static enum epd_status gpu_check(struct op *op, enum epd_status status)
{
    if (status != EPD_OK)
        (void)snprintf(op->text, sizeof(op->text), "%s", op->gpu.text);
    return status;
}

static enum epd_status own_memory(struct op *op, uint64_t bytes, struct epd_buffer **buffer)
{
    void *data = NULL;
    enum epd_status status = gpu_check(op, gpu_alloc(&op->gpu, bytes, &data));
    if (status != EPD_OK)
        return status;
    op->own_bytes += (double)bytes;
    return op_check(op, "registering", epd_buffer_register_cuda(op->group, data, bytes, buffer));
}

enum epd_status op_tensor(struct op *op, enum epd_role role, enum epd_dtype dtype, struct shape shape)
{
    struct epd_tensor *tensor = &op->tensors[role];
    *tensor = (struct epd_tensor){.role = role, .dtype = dtype, .n_dims = shape.n_dims};
    uint64_t bytes = element_bytes(dtype);
    for (uint32_t i = 0; i < 3; i++) {
        tensor->shape[i] = i < shape.n_dims ? shape.d[i] : 1;
        bytes *= (uint64_t)tensor->shape[i];
    }
    if (on_gpu(op) && !op->job->heap_memory)
        return own_memory(op, bytes, &tensor->buffer);
    return op_check(op, "allocating", epd_buffer_alloc(op->group, bytes, &tensor->buffer));
}

enum epd_status op_input(struct op *op, enum epd_role role, struct shape shape, float scale)
{
    const enum epd_dtype dtype = op->job->dtype;
    const uint64_t seed = 1000003ull * (uint64_t)role + op->rank;
    enum epd_status status = op_tensor(op, role, dtype, shape);
    if (status != EPD_OK)
        return status;
    struct epd_buffer *buffer = op->tensors[role].buffer;
    const uint64_t n = epd_buffer_bytes(buffer) / element_bytes(dtype);
    if (on_gpu(op))
        return gpu_check(op, gpu_fill(&op->gpu, epd_buffer_data(buffer), n, dtype, scale, seed));
    fill_values(epd_buffer_data(buffer), n, dtype, scale, seed);
    return EPD_OK;
}

static enum epd_status put(struct op *op, enum epd_role role, const void *values)
{
    const struct epd_buffer *buffer = op->tensors[role].buffer;
    if (on_gpu(op))
        return gpu_check(op, gpu_upload(&op->gpu, epd_buffer_data(buffer), values, epd_buffer_bytes(buffer)));
    memcpy(epd_buffer_data(buffer), values, epd_buffer_bytes(buffer));
    return EPD_OK;
}

static enum epd_status put_routing(struct op *op)
{
    const size_t n = (size_t)op->job->n_tokens * op->job->top_k;
    int32_t *experts = calloc(n, sizeof(*experts));
    float *weights = calloc(n, sizeof(*weights));
    enum epd_status status = experts && weights ? EPD_OK : EPD_NO_MEMORY;
    if (status == EPD_OK)
        status = fill_routing(op->job, op->rank, experts, weights);
    if (status == EPD_OK)
        status = put(op, EPD_ROLE_TOPK_IDX, experts);
    if (status == EPD_OK)
        status = put(op, EPD_ROLE_TOPK_WEIGHTS, weights);
    free(experts);
    free(weights);
    return status;
}

enum epd_status op_routing(struct op *op)
{
    const struct job *job = op->job;
    const struct shape shape = {2, {job->n_tokens, job->top_k, 0}};
    enum epd_status status =
        op_input(op, EPD_ROLE_X, (struct shape){2, {job->n_tokens, job->hidden, 0}}, 1.0f);
    if (status == EPD_OK)
        status = op_tensor(op, EPD_ROLE_TOPK_IDX, EPD_I32, shape);
    if (status == EPD_OK)
        status = op_tensor(op, EPD_ROLE_TOPK_WEIGHTS, EPD_F32, shape);
    return status == EPD_OK ? put_routing(op) : status;
}

enum epd_status op_even_splits(struct op *op, int64_t n_rows)
{
    const int64_t n_local = op->group_info.n_local_experts;
    enum epd_status status = op_tensor(op, EPD_ROLE_M_SPLITS, EPD_I64, (struct shape){1, {n_local, 0, 0}});
    if (status != EPD_OK)
        return status;
    int64_t *splits = calloc((size_t)n_local, sizeof(*splits));
    if (!splits)
        return EPD_NO_MEMORY;
    for (int64_t l = 0; l < n_local; l++)
        splits[l] = n_rows * (l + 1) / n_local - n_rows * l / n_local;
    status = put(op, EPD_ROLE_M_SPLITS, splits);
    free(splits);
    return status;
}
