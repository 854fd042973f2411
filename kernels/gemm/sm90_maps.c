/* Tensor maps of the engine sm90: what the copy engine reads and writes, and in which boxes. */
#include "kernels/cuda/error.h"
#include "kernels/gemm/check.h"
#include "kernels/gemm/sm90_plan.h"

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

enum epd_status sm90_maps_load(encode_tiled_fn *encode, struct epd_error *error)
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
        return error_set(error, cuda_error_status((int)result),
                         "cuTensorMapEncodeTiled: error %d for a %u-dimensional view at %p", (int)result,
                         view->n_dims, view->base);
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
    if (is_gated(problem))
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

/* [rows, 2, F]: `box` token rows of gate or up columns, 32 to a warpgroup that made both, 64 to one that takes both in. */
static struct map_view preact_view(const struct gemm_problem *problem, const void *base, uint32_t box)
{
    cuuint64_t ffn = is_gated(problem) ? problem->shape.n / 2 : problem->shape.k;
    return (struct map_view){
        .base = base,
        .dtype = problem->shape.dtype,
        .narrow = is_gated(problem),
        .n_dims = 3,
        .dims = {ffn, 2, (cuuint64_t)problem->max_rows},
        .strides = {ffn * 2, ffn * 4},
        .box = {is_gated(problem) ? 32 : 64, 1, box},
    };
}

/* c of TN and NN, 16 bits: `box` token rows of 64 columns leave at a time. */
static struct map_view tokens_out_view(const struct gemm_problem *problem, const void *base, uint32_t box)
{
    cuuint64_t columns = problem->shape.layout == EPD_GEMM_TN ? problem->shape.n : problem->shape.k;
    cuuint64_t rows = (cuuint64_t)problem->max_rows;
    if (problem->activation)
        return preact_view(problem, base, box);
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
    cuuint64_t ffn = is_gated(problem) ? problem->shape.n / 2 : problem->shape.k;
    return (struct map_view){
        .base = base,
        .dtype = problem->shape.dtype,
        .narrow = is_gated(problem),
        .n_dims = 2,
        .dims = {ffn, (cuuint64_t)problem->max_rows},
        .strides = {ffn * 2},
        .box = {is_gated(problem) ? 32 : 64, box},
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

enum epd_status sm90_map_inputs(struct gemm_engine_plan *plan, const struct gemm_launch *launch,
                                struct epd_error *error)
{
    const struct gemm_args *args = &launch->args;
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
    if (status == EPD_OK)
        status = map_once(plan, &b_view, &plan->mapped_b, &plan->args.b, error);
    if (status != EPD_OK || !is_backward(&plan->problem) || plan->problem.max_rows == 0)
        return status;
    struct map_view preact = preact_view(&plan->problem, launch->preact, 64);
    return map_once(plan, &preact, &plan->mapped_preact, &plan->args.preact, error);
}

/* Only what the copy engine writes: f32 rows of TN and NN go by plain stores. */
enum epd_status sm90_map_outputs(struct gemm_engine_plan *plan, const struct gemm_launch *launch,
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
    if (problem->shape.dtype_c != EPD_F32 && writes_c(problem)) {
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
