/* The engine `sm90`: checks and launches of the kernels in sm90_*.cu. Lane thread. */
#include <stdlib.h>

#include "kernels/gemm/check.h"
#include "kernels/gemm/sm90_plan.h"

#define MAX_GROUPS 1024
#define MAX_ROWS   (INT32_MAX - 1024)

static int refuse(struct epd_error *reason, enum epd_status status, const char *text, long long got)
{
    error_set(reason, status, "sm90: %s, got %lld", text, got);
    return 0;
}

static int shape_supported(const struct gemm_problem *problem, struct epd_error *reason)
{
    const struct gemm_shape *shape = &problem->shape;
    if (shape->dtype != EPD_BF16 && shape->dtype != EPD_F16)
        return refuse(reason, EPD_UNSUPPORTED, "inputs must be bf16 or f16", shape->dtype);
    if (shape->n == 0 || shape->n % 8 != 0)
        return refuse(reason, EPD_UNSUPPORTED, "n must be a positive multiple of 8", shape->n);
    if (shape->k == 0 || shape->k % 8 != 0)
        return refuse(reason, EPD_UNSUPPORTED, "k must be a positive multiple of 8", shape->k);
    if (shape->n > (1u << 24) || shape->k > (1u << 24))
        return refuse(reason, EPD_UNSUPPORTED, "n and k must be at most 2^24",
                      shape->n > shape->k ? shape->n : shape->k);
    int same_or_f32 = shape->dtype_c == shape->dtype || shape->dtype_c == EPD_F32;
    int nt_output = shape->layout == EPD_GEMM_NT && (shape->dtype_c == EPD_BF16 || shape->dtype_c == EPD_F16);
    if (!same_or_f32 && !nt_output)
        return refuse(reason, EPD_UNSUPPORTED, "output must have the inputs' dtype or f32", shape->dtype_c);
    if (problem->n_groups == 0 || problem->n_groups > MAX_GROUPS)
        return refuse(reason, EPD_UNSUPPORTED, "groups must be 1..1024", problem->n_groups);
    if (problem->max_rows < 0 || problem->max_rows > MAX_ROWS)
        return refuse(reason, EPD_UNSUPPORTED, "rows must fit 31 bits", (long long)problem->max_rows);
    return 1;
}

static int fused_supported(const struct gemm_problem *problem, struct epd_error *reason)
{
    const struct gemm_shape *shape = &problem->shape;
    if (problem->d_row_weights && !is_backward(problem))
        return refuse(reason, EPD_UNSUPPORTED, "d_row_weights go with NN and an activation only",
                      problem->activation);
    if (problem->row_weights && shape->layout == EPD_GEMM_NT)
        return refuse(reason, EPD_UNSUPPORTED, "row weights go with TN and NN only", shape->layout);
    if (!problem->activation)
        return 1;
    if (shape->layout == EPD_GEMM_NT)
        return refuse(reason, EPD_UNSUPPORTED, "an activation goes with TN and NN only", shape->layout);
    if (shape->layout == EPD_GEMM_TN && shape->n % 16 != 0)
        return refuse(reason, EPD_UNSUPPORTED, "with an activation n must be a multiple of 16", shape->n);
    if (shape->dtype_c != shape->dtype)
        return refuse(reason, EPD_UNSUPPORTED, "with an activation the output has the inputs' dtype",
                      shape->dtype_c);
    return 1;
}

static int sm90_supports(const struct gemm_problem *problem, int device_idx, struct epd_error *reason)
{
    int major = 0, minor = 0;
    if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device_idx) != cudaSuccess ||
        cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device_idx) != cudaSuccess)
        return refuse(reason, EPD_INVALID_DEVICE, "no such device", device_idx);
    if (major != 9 || minor != 0)
        return refuse(reason, EPD_UNSUPPORTED, "needs compute capability 9.0", major * 10 + minor);
    return shape_supported(problem, reason) && fused_supported(problem, reason);
}

static enum epd_status prepare_kernels(struct gemm_engine_plan *plan, struct epd_error *error)
{
    const struct gemm_shape *shape = &plan->problem.shape;
    size_t smem_bytes = sm90_smem_bytes(plan->config.n_stages, plan->config.stage_bytes);
    uint32_t *n_clusters = &plan->args.n_clusters;
    cudaError_t result = cudaErrorInvalidValue;
    if (shape->layout == EPD_GEMM_TN)
        result = sm90_tn_prepare(shape->dtype, plan->problem.activation != EPD_ACTIVATION_UNSPECIFIED,
                                 smem_bytes, n_clusters);
    else if (is_backward(&plan->problem))
        result = sm90_backward_prepare(shape->dtype, smem_bytes, n_clusters);
    else if (shape->layout == EPD_GEMM_NN)
        result = sm90_nn_prepare(shape->dtype, smem_bytes, n_clusters);
    else if (shape->layout == EPD_GEMM_NT)
        result = sm90_nt_prepare(shape->dtype, smem_bytes, n_clusters);
    if (result == cudaSuccess && plan->problem.pointer_parts)
        result = sm90_parts_prepare();
    return gemm_check_cuda(result, "load of the sm90 kernels", error);
}

static void fill_args(struct gemm_engine_plan *plan)
{
    const struct gemm_problem *problem = &plan->problem;
    const struct gemm_shape *shape = &problem->shape;
    struct sm90_args *args = &plan->args;
    args->max_rows = problem->max_rows;
    args->n_groups = problem->n_groups;
    args->outer = shape->layout == EPD_GEMM_NN ? shape->k : shape->n;
    args->inner = shape->layout == EPD_GEMM_NT ? shape->k : 0;
    args->reduction = shape->layout == EPD_GEMM_TN ? shape->k : shape->layout == EPD_GEMM_NN ? shape->n : 0;
    args->tile_inner = plan->config.tile_inner;
    args->box_rows = plan->config.box_rows;
    args->n_stages = plan->config.n_stages;
    args->stage_bytes = plan->config.stage_bytes;
    args->dtype_c = shape->dtype_c;
    args->dtype_bias = shape->dtype_bias;
    args->accumulate = shape->layout == EPD_GEMM_NT && shape->accumulate;
    args->activation = problem->activation;
}

/* From the device's pool, for giving that back waits for nothing: cudaFree of other memory waits for whatever runs
 * on the device, and what runs may be waiting for a client. */
static enum epd_status take_device(void **data, size_t bytes, const char *what, struct epd_error *error)
{
    return gemm_check_cuda(cudaMallocAsync(data, bytes, cudaStreamLegacy), what, error);
}

static void give_back_device(void *data)
{
    if (data)
        (void)cudaFreeAsync(data, cudaStreamLegacy);
}

static void sm90_destroy(struct gemm_engine_plan *plan)
{
    if (!plan)
        return;
    give_back_device(plan->args.counters);
    give_back_device(plan->part_maps);
    give_back_device(plan->args.row_sums);
    free(plan);
}

/* At least one byte, so that there is a pointer. */
static size_t row_sums_bytes(const struct gemm_problem *problem)
{
    return ((size_t)problem->shape.k + 63) / 64 * (size_t)problem->max_rows * sizeof(float) + 1;
}

static enum epd_status allocate_device(struct gemm_engine_plan *plan, struct epd_error *error)
{
    const struct gemm_problem *problem = &plan->problem;
    if (take_device((void **)&plan->args.counters, sizeof(struct sm90_counters), "sm90 counters", error) ||
        gemm_check_cuda(
            cudaMemsetAsync(plan->args.counters, 0, sizeof(struct sm90_counters), cudaStreamLegacy),
            "sm90 counters", error))
        return error->status;
    if (is_backward(problem) && problem->d_row_weights &&
        take_device((void **)&plan->args.row_sums, row_sums_bytes(problem), "sm90 sums of rows", error))
        return error->status;
    if (problem->pointer_parts &&
        take_device((void **)&plan->part_maps, problem->n_groups * sizeof(CUtensorMap), "sm90 tensor maps",
                    error))
        return error->status;
    /* The streams that use them do not wait for this one. */
    return gemm_check_cuda(cudaStreamSynchronize(cudaStreamLegacy), "sm90 plan", error);
}

static enum epd_status sm90_create(const struct gemm_problem *problem, int device_idx,
                                   struct gemm_engine_plan **out, struct epd_error *error)
{
    int n_sms = 0;
    if (!sm90_supports(problem, device_idx, error))
        return error->status;
    enum epd_status status =
        gemm_check_cuda(cudaDeviceGetAttribute(&n_sms, cudaDevAttrMultiProcessorCount, device_idx),
                        "multiprocessor count", error);
    if (status != EPD_OK)
        return status;
    /* Tensor maps want 64-byte aligned memory. */
    struct gemm_engine_plan *plan = aligned_alloc(64, (sizeof(*plan) + 63) / 64 * 64);
    if (!plan)
        return error_set(error, EPD_NO_MEMORY, "sm90: no memory for a plan of %zu bytes", sizeof(*plan));
    *plan = (struct gemm_engine_plan){.problem = *problem};
    plan->config = sm90_config_choose(problem, (uint32_t)n_sms / 2);
    fill_args(plan);
    status = sm90_maps_load(&plan->encode, error);
    if (status == EPD_OK)
        status = prepare_kernels(plan, error);
    if (status == EPD_OK)
        status = allocate_device(plan, error);
    if (status != EPD_OK) {
        sm90_destroy(plan);
        return status;
    }
    *out = plan;
    return EPD_OK;
}

static enum epd_status check_pointer(const void *pointer, const char *name, struct epd_error *error)
{
    if (!pointer)
        return error_set(error, EPD_INVALID_ARGUMENT, "grouped_gemm %s: missing", name);
    if ((uintptr_t)pointer % 16 != 0)
        return error_set(error, EPD_INVALID_ALIGNMENT, "grouped_gemm %s: address %p, want a multiple of 16",
                         name, pointer);
    return EPD_OK;
}

/* Without rows (max_rows 0) every pointer but the gradients that NT must zero may be missing. */
static enum epd_status check_launch(const struct gemm_engine_plan *plan, const struct gemm_launch *launch,
                                    struct epd_error *error)
{
    const struct gemm_args *args = &launch->args;
    const struct gemm_problem *problem = &plan->problem;
    int nt = problem->shape.layout == EPD_GEMM_NT;
    if (problem->max_rows == 0)
        return nt && !problem->pointer_parts ? check_pointer(args->c, "c", error) : EPD_OK;
    enum epd_status status = check_pointer(args->a, "a", error);
    if (status == EPD_OK && (nt || !problem->pointer_parts))
        status = check_pointer(args->b, "b", error);
    if (status == EPD_OK && problem->pointer_parts &&
        !(nt ? (const void *)args->c_parts : (const void *)args->b_parts))
        return error_set(error, EPD_INVALID_ARGUMENT, "grouped_gemm %s: the plan wants %u pointers",
                         nt ? "c" : "b", problem->n_groups);
    if (status == EPD_OK && !(nt && problem->pointer_parts) && writes_c(problem))
        status = check_pointer(args->c, "c", error);
    if (status == EPD_OK && problem->activation)
        status = check_pointer(launch->act, "act", error);
    if (status == EPD_OK && is_backward(problem))
        status = check_pointer(launch->preact, "preact", error);
    if (status == EPD_OK && problem->d_row_weights && !launch->d_row_weights)
        return error_set(error, EPD_INVALID_ARGUMENT, "grouped_gemm d_row_weights: missing");
    if (status == EPD_OK && problem->row_weights && !launch->row_weights)
        return error_set(error, EPD_INVALID_ARGUMENT, "grouped_gemm row_weights: missing");
    if (status == EPD_OK && args->groups.n_groups != problem->n_groups)
        return error_set(error, EPD_INVALID_SHAPE, "grouped_gemm groups: %u, want %u", args->groups.n_groups,
                         problem->n_groups);
    if (status == EPD_OK && args->groups.max_rows > problem->max_rows)
        return error_set(error, EPD_INVALID_SHAPE, "grouped_gemm rows: %lld, want at most %lld",
                         (long long)args->groups.max_rows, (long long)problem->max_rows);
    return status;
}

static cudaError_t enqueue(const struct gemm_engine_plan *plan, const struct sm90_args *args,
                           float *d_row_weights, cudaStream_t stream)
{
    enum epd_dtype dtype = plan->problem.shape.dtype;
    switch (plan->problem.shape.layout) {
    case EPD_GEMM_TN:
        return sm90_tn_launch(args, dtype, stream);
    case EPD_GEMM_NN:
        if (is_backward(&plan->problem))
            return sm90_backward_launch(args, dtype, args->row_sums ? d_row_weights : NULL, stream);
        return sm90_nn_launch(args, dtype, stream);
    case EPD_GEMM_NT:
        return sm90_nt_launch(args, dtype, stream);
    case EPD_GEMM_UNSPECIFIED:
        break;
    }
    return cudaErrorInvalidValue;
}

/* The pointers are in device memory, so their maps are made there, ahead of the product. */
static enum epd_status write_part_maps(const struct gemm_engine_plan *plan, const struct gemm_args *given,
                                       struct sm90_args *args, cudaStream_t stream, struct epd_error *error)
{
    int nt = plan->problem.shape.layout == EPD_GEMM_NT;
    const void *const *parts = nt ? (const void *const *)given->c_parts : given->b_parts;
    if (nt) {
        args->c_parts = given->c_parts;
        args->c_parts_map = plan->part_maps;
    } else {
        args->a_parts = plan->part_maps;
    }
    return gemm_check_cuda(
        sm90_parts_launch(nt ? &args->c : &args->a, parts, plan->problem.n_groups, plan->part_maps, stream),
        "launch of the tensor map kernel", error);
}

static enum epd_status sm90_launch(struct gemm_engine_plan *plan, const struct gemm_launch *launch,
                                   struct CUstream_st *stream, struct epd_error *error)
{
    const struct gemm_problem *problem = &plan->problem;
    const struct gemm_args *given = &launch->args;
    enum epd_status status = check_launch(plan, launch, error);
    if (status == EPD_OK)
        status = sm90_map_inputs(plan, launch, error);
    if (status == EPD_OK)
        status = sm90_map_outputs(plan, launch, error);
    if (status != EPD_OK)
        return status;
    struct sm90_args args = plan->args;
    args.m_splits = given->groups.m_splits;
    args.offsets = given->groups.offsets;
    args.max_rows = given->groups.max_rows;
    args.c_data = writes_c(problem) ? given->c : NULL;
    args.bias = problem->shape.dtype_bias ? given->bias : NULL;
    args.dbias = problem->shape.layout == EPD_GEMM_NT && problem->shape.dtype_bias ? given->dbias : NULL;
    args.act_data = launch->act;
    args.row_weights = problem->row_weights ? launch->row_weights : NULL;
    args.error = given->error;
    if (problem->pointer_parts) {
        status = write_part_maps(plan, given, &args, stream, error);
        if (status != EPD_OK)
            return status;
    }
    return gemm_check_cuda(enqueue(plan, &args, launch->d_row_weights, stream),
                           "launch of the sm90 grouped gemm", error);
}

const struct gemm_engine gemm_engine_sm90 = {
    .name = "sm90",
    .splits_on_device = 1,
    .supports = sm90_supports,
    .create = sm90_create,
    .launch = sm90_launch,
    .destroy = sm90_destroy,
};
