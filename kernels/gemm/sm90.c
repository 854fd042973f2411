/* The engine `sm90`: checks, tensor maps and launches of the kernels in sm90_*.cu. Lane thread. */
#include <cuda.h>
#include <stdlib.h>

#include "kernels/gemm/check.h"
#include "kernels/gemm/engine.h"
#include "kernels/gemm/sm90_args.h"
#include "kernels/gemm/sm90_config.h"

#define MAX_GROUPS 1024
#define MAX_ROWS   (INT32_MAX - 1024)

typedef CUresult (*encode_tiled_fn)(CUtensorMap *, CUtensorMapDataType, cuuint32_t, void *,
                                    const cuuint64_t *, const cuuint64_t *, const cuuint32_t *,
                                    const cuuint32_t *, CUtensorMapInterleave, CUtensorMapSwizzle,
                                    CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

/* Launches of one plan share its counters: they may follow each other on a stream, not run side by side. */
struct gemm_engine_plan {
    struct gemm_problem problem;
    struct sm90_config config;
    struct sm90_args args; /* what does not change between launches; maps of the last pointers */
    const void *mapped_a;
    const void *mapped_b;
    const void *mapped_c;
    const void *mapped_act;
    CUtensorMap *part_maps; /* owned, device, [n_groups]; NULL without pointer_parts */
    encode_tiled_fn encode;
};

/* A view for the copy engine: dims and box innermost first, strides in bytes of every dimension but the first. */
struct map_view {
    const void *base;
    enum epd_dtype dtype;
    int narrow; /* rows of 64 bytes in shared memory, else of 128 */
    uint32_t n_dims;
    cuuint64_t dims[5];
    cuuint64_t strides[4];
    cuuint32_t box[5];
};

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
    if (problem->row_weights && shape->layout == EPD_GEMM_NT)
        return refuse(reason, EPD_UNSUPPORTED, "row weights go with TN and NN only", shape->layout);
    if (!problem->activation)
        return 1;
    if (shape->layout != EPD_GEMM_TN)
        return refuse(reason, EPD_UNSUPPORTED, "an activation goes with TN only", shape->layout);
    if (shape->n % 16 != 0)
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

static enum epd_status load_encode(encode_tiled_fn *encode, struct epd_error *error)
{
    void *entry = NULL;
    enum cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
    enum epd_status status = gemm_check_cuda(
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found),
        "cuTensorMapEncodeTiled", error);
    if (status != EPD_OK)
        return status;
    if (found != cudaDriverEntryPointSuccess || !entry)
        return error_set(error, EPD_UNSUPPORTED, "sm90: the driver has no cuTensorMapEncodeTiled");
    /* POSIX lets a data pointer become a function pointer this way; ISO C has no cast for it. */
    *(void **)encode = entry;
    return EPD_OK;
}

static enum epd_status encode_map(const struct gemm_engine_plan *plan, const struct map_view *view,
                                  CUtensorMap *map, struct epd_error *error)
{
    static const cuuint32_t unit[5] = {1, 1, 1, 1, 1};
    CUtensorMapDataType type = view->dtype == EPD_F32   ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32
                               : view->dtype == EPD_F16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                                        : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
    CUtensorMapSwizzle swizzle = view->narrow ? CU_TENSOR_MAP_SWIZZLE_64B : CU_TENSOR_MAP_SWIZZLE_128B;
    CUresult result = plan->encode(map, type, view->n_dims, (void *)(uintptr_t)view->base, view->dims,
                                   view->strides, view->box, unit, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle,
                                   CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (result != CUDA_SUCCESS)
        return error_set(error, EPD_CUDA, "cuTensorMapEncodeTiled: error %d for a %u-dimensional view at %p",
                         (int)result, view->n_dims, view->base);
    return EPD_OK;
}

/* Rows of tokens, [max_rows, columns]; box of 64 columns. */
static struct map_view rows_view(const struct gemm_engine_plan *plan, const void *base, uint32_t columns)
{
    return (struct map_view){
        .base = base,
        .dtype = plan->problem.shape.dtype,
        .n_dims = 2,
        .dims = {columns, plan->problem.max_rows > 0 ? (cuuint64_t)plan->problem.max_rows : 1},
        .strides = {(cuuint64_t)columns * 2},
        .box = {64, plan->problem.shape.layout == EPD_GEMM_NT ? SM90_STEP : plan->config.box_rows},
    };
}

/* Weights [L, N, K], or one group's [N, K] when they come as parts. */
static struct map_view weights_view(const struct gemm_problem *problem, const void *base)
{
    cuuint64_t n = problem->shape.n, k = problem->shape.k,
               groups = problem->pointer_parts ? 1 : problem->n_groups;
    if (problem->activation)
        return (struct map_view){
            .base = base,
            .dtype = problem->shape.dtype,
            .n_dims = 5, /* k, row of 8, gate or up, block of 8 rows, group */
            .dims = {k, 8, 2, n / 16, groups},
            .strides = {k * 2, n / 2 * k * 2, 8 * k * 2, n * k * 2},
            .box = {64, 8, 2, SM90_OUTER_ROWS / 16, 1},
        };
    return (struct map_view){
        .base = base,
        .dtype = problem->shape.dtype,
        .n_dims = 3,
        .dims = {k, n, groups},
        .strides = {k * 2, n * k * 2},
        .box = {64, problem->shape.layout == EPD_GEMM_TN ? SM90_OUTER_ROWS : SM90_STEP, 1},
    };
}

/* c of TN and NN, 16 bits: `box` token rows of 64 columns leave at a time; of an activation's plan 32 gate or up
 * columns, [rows, 2, F]. */
static struct map_view tokens_out_view(const struct gemm_problem *problem, const void *base, uint32_t box)
{
    cuuint64_t columns = problem->shape.layout == EPD_GEMM_TN ? problem->shape.n : problem->shape.k;
    cuuint64_t rows = (cuuint64_t)problem->max_rows;
    if (problem->activation)
        return (struct map_view){
            .base = base,
            .dtype = problem->shape.dtype,
            .narrow = 1,
            .n_dims = 3,
            .dims = {columns / 2, 2, rows},
            .strides = {columns, columns * 2},
            .box = {32, 1, box},
        };
    return (struct map_view){
        .base = base,
        .dtype = problem->shape.dtype,
        .n_dims = 2,
        .dims = {columns, rows},
        .strides = {columns * 2},
        .box = {64, box},
    };
}

static struct map_view act_view(const struct gemm_problem *problem, const void *base, uint32_t box)
{
    return (struct map_view){
        .base = base,
        .dtype = problem->shape.dtype,
        .narrow = 1,
        .n_dims = 2,
        .dims = {problem->shape.n / 2, (cuuint64_t)problem->max_rows},
        .strides = {problem->shape.n},
        .box = {32, box},
    };
}

/* dW of NT: 16 rows of 128 bytes leave at a time. */
static struct map_view gradients_view(const struct gemm_problem *problem, const void *base)
{
    cuuint64_t n = problem->shape.n, k = problem->shape.k, bytes = dtype_bytes(problem->shape.dtype_c);
    return (struct map_view){
        .base = base,
        .dtype = problem->shape.dtype_c,
        .n_dims = 3,
        .dims = {k, n, problem->pointer_parts ? 1 : problem->n_groups},
        .strides = {k * bytes, n * k * bytes},
        .box = {(cuuint32_t)(128 / bytes), 16, 1},
    };
}

/* Encodes unless the pointer is that of the last launch. */
static enum epd_status map_once(const struct gemm_engine_plan *plan, const struct map_view *view,
                                const void **mapped, CUtensorMap *map, struct epd_error *error)
{
    if (view->base == *mapped)
        return EPD_OK;
    enum epd_status status = encode_map(plan, view, map, error);
    if (status == EPD_OK)
        *mapped = view->base;
    return status;
}

/* Two maps of one output: whole rounds of a tile, and eight rows for a ragged one. */
static enum epd_status map_twice(const struct gemm_engine_plan *plan, const struct map_view *whole,
                                 const struct map_view *rows, const void **mapped, CUtensorMap *whole_map,
                                 CUtensorMap *rows_map, struct epd_error *error)
{
    if (whole->base == *mapped)
        return EPD_OK;
    enum epd_status status = encode_map(plan, rows, rows_map, error);
    return status == EPD_OK ? map_once(plan, whole, mapped, whole_map, error) : status;
}

static enum epd_status map_inputs(struct gemm_engine_plan *plan, const struct gemm_args *args,
                                  struct epd_error *error)
{
    const struct gemm_shape *shape = &plan->problem.shape;
    int nt = shape->layout == EPD_GEMM_NT;
    /* Without a row nothing is read, but a map wants an address. */
    const void *none = plan->problem.max_rows == 0 ? plan->args.counters : NULL;
    const void *weights = plan->problem.pointer_parts ? (const void *)plan->part_maps : args->b;
    const void *a = nt ? args->a : weights, *b = nt ? args->b : args->a;
    a = a ? a : none;
    b = b ? b : none;
    struct map_view a_view = nt ? rows_view(plan, a, shape->n) : weights_view(&plan->problem, a);
    struct map_view b_view = rows_view(plan, b, shape->layout == EPD_GEMM_NN ? shape->n : shape->k);
    enum epd_status status = map_once(plan, &a_view, &plan->mapped_a, &plan->args.a, error);
    return status == EPD_OK ? map_once(plan, &b_view, &plan->mapped_b, &plan->args.b, error) : status;
}

/* Only what the copy engine writes: f32 rows of TN and NN go by plain stores. */
static enum epd_status map_outputs(struct gemm_engine_plan *plan, const struct gemm_launch *launch,
                                   struct epd_error *error)
{
    const struct gemm_problem *problem = &plan->problem;
    if (problem->shape.layout == EPD_GEMM_NT) {
        const void *c = problem->pointer_parts ? (const void *)plan->part_maps : launch->args.c;
        struct map_view view = gradients_view(problem, c);
        return map_once(plan, &view, &plan->mapped_c, &plan->args.c, error);
    }
    if (problem->max_rows == 0)
        return EPD_OK;
    enum epd_status status = EPD_OK;
    if (problem->shape.dtype_c != EPD_F32 && !(problem->activation && !problem->keep_preact)) {
        struct map_view whole = tokens_out_view(problem, launch->args.c, 64);
        struct map_view rows = tokens_out_view(problem, launch->args.c, 8);
        status = map_twice(plan, &whole, &rows, &plan->mapped_c, &plan->args.c, &plan->args.c_rows, error);
    }
    if (status == EPD_OK && problem->activation) {
        struct map_view whole = act_view(problem, launch->act, 64);
        struct map_view rows = act_view(problem, launch->act, 8);
        status =
            map_twice(plan, &whole, &rows, &plan->mapped_act, &plan->args.act, &plan->args.act_rows, error);
    }
    return status;
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

static void sm90_destroy(struct gemm_engine_plan *plan)
{
    if (!plan)
        return;
    cudaFree(plan->args.counters);
    cudaFree(plan->part_maps);
    free(plan);
}

static enum epd_status allocate_device(struct gemm_engine_plan *plan, struct epd_error *error)
{
    enum epd_status status = gemm_check_cuda(
        cudaMalloc((void **)&plan->args.counters, sizeof(struct sm90_counters)), "sm90 counters", error);
    if (status != EPD_OK)
        return status;
    status = gemm_check_cuda(cudaMemset(plan->args.counters, 0, sizeof(struct sm90_counters)),
                             "sm90 counters", error);
    if (status != EPD_OK || !plan->problem.pointer_parts)
        return status;
    return gemm_check_cuda(
        cudaMalloc((void **)&plan->part_maps, plan->problem.n_groups * sizeof(CUtensorMap)),
        "sm90 tensor maps", error);
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
    status = load_encode(&plan->encode, error);
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
    if (status == EPD_OK && !(nt && problem->pointer_parts) &&
        !(problem->activation && !problem->keep_preact))
        status = check_pointer(args->c, "c", error);
    if (status == EPD_OK && problem->activation)
        status = check_pointer(launch->act, "act", error);
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
                           cudaStream_t stream)
{
    enum epd_dtype dtype = plan->problem.shape.dtype;
    switch (plan->problem.shape.layout) {
    case EPD_GEMM_TN:
        return sm90_tn_launch(args, dtype, stream);
    case EPD_GEMM_NN:
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
        status = map_inputs(plan, given, error);
    if (status == EPD_OK)
        status = map_outputs(plan, launch, error);
    if (status != EPD_OK)
        return status;
    struct sm90_args args = plan->args;
    args.m_splits = given->groups.m_splits;
    args.offsets = given->groups.offsets;
    args.max_rows = given->groups.max_rows;
    args.c_data = problem->activation && !problem->keep_preact ? NULL : given->c;
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
    return gemm_check_cuda(enqueue(plan, &args, stream), "launch of the sm90 grouped gemm", error);
}

const struct gemm_engine gemm_engine_sm90 = {
    .name = "sm90",
    .splits_on_device = 1,
    .supports = sm90_supports,
    .create = sm90_create,
    .launch = sm90_launch,
    .destroy = sm90_destroy,
};
