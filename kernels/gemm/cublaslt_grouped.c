/* The engine `cublaslt_grouped`: one cuBLASLt matmul for all groups, whose sizes and pointers it reads from device memory
 * (grouped layouts). Lane thread. Never run: compiled against newer headers, its tables tested, no machine had the library.
 *
 * Grouped layouts came with cuBLASLt 13.2 for other chips; compute capability 9.0 needs 13.4. This file is compiled only
 * where the headers have them (gemm_engines_absent says so elsewhere). The library is asked as well: the binary may meet
 * an older one than it was built with, so its new function is a weak symbol.
 *
 * Limits of the library: no bias and nothing fused, 16-byte alignment; up to 13.7 a workspace that two layouts share
 * hangs at the second replay of a graph, so every plan has its own. */
#include <stdlib.h>

#include "kernels/gemm/check.h"
#include "kernels/gemm/cublaslt_check.h"
#include "kernels/gemm/cublaslt_groups.h"
#include "kernels/gemm/engine.h"

static int refuse(struct epd_error *reason, const char *text, long long got)
{
    return cublaslt_refuse(reason, "cublaslt_grouped", text, got);
}

#pragma weak cublasLtGroupedMatrixLayoutCreate

#define LEAST_VERSION       130200u
#define LEAST_VERSION_SM_90 130400u
#define MAX_GROUPS          1024u

struct gemm_engine_plan {
    struct gemm_problem problem;
    cublasLtHandle_t handle;
    cublasLtMatmulDesc_t desc;
    cublasLtMatrixLayout_t a, b, c;
    cublasLtMatmulAlgo_t algorithm;
    struct cublaslt_tables tables; /* in table_memory */
    void *table_memory;            /* owned, device */
    void *workspace;               /* owned, device */
};

static int library_supports(int device_idx, struct epd_error *reason)
{
    int major = 0;
    size_t version = cublasLtGetVersion();
    if (!cublasLtGroupedMatrixLayoutCreate || version < LEAST_VERSION)
        return refuse(reason, "grouped layouts need cuBLASLt 130200", (long long)version);
    if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device_idx) != cudaSuccess)
        return refuse(reason, "no such device", device_idx);
    if (major < 9)
        return refuse(reason, "needs compute capability 9.0", major * 10);
    if (major == 9 && version < LEAST_VERSION_SM_90)
        return refuse(reason, "compute capability 9.0 needs cuBLASLt 130400", (long long)version);
    return 1;
}

static int grouped_supports(const struct gemm_problem *problem, int device_idx, struct epd_error *reason)
{
    const struct gemm_shape *shape = &problem->shape;
    if (!library_supports(device_idx, reason))
        return 0;
    if (!cublaslt_takes(shape, "cublaslt_grouped", reason))
        return 0;
    if (problem->n_groups == 0 || problem->n_groups > MAX_GROUPS)
        return refuse(reason, "groups must be 1..1024", problem->n_groups);
    if (problem->max_rows > INT32_MAX)
        return refuse(reason, "rows must fit 31 bits", (long long)problem->max_rows);
    if (problem->activation || problem->row_weights || shape->dtype_bias)
        return refuse(reason, "no bias, fused activation or row weights", problem->activation);
    return 1;
}

static enum epd_status make_layout(const struct gemm_engine_plan *plan,
                                   const struct cublaslt_operand *operand, enum epd_dtype dtype,
                                   cublasLtMatrixLayout_t *layout, struct epd_error *error)
{
    return cublaslt_check(cublasLtGroupedMatrixLayoutCreate(layout, cublaslt_type(dtype),
                                                            (int)plan->problem.n_groups, operand->rows,
                                                            operand->cols, operand->rows),
                          "cublasLtGroupedMatrixLayoutCreate", error);
}

static enum epd_status make_layouts(struct gemm_engine_plan *plan, struct epd_error *error)
{
    const struct gemm_shape *shape = &plan->problem.shape;
    enum epd_status status = make_layout(plan, &plan->tables.a, shape->dtype, &plan->a, error);
    if (status == EPD_OK)
        status = make_layout(plan, &plan->tables.b, shape->dtype, &plan->b, error);
    return status == EPD_OK ? make_layout(plan, &plan->tables.c, shape->dtype_c, &plan->c, error) : status;
}

static enum epd_status make_desc(struct gemm_engine_plan *plan, struct epd_error *error)
{
    cublasOperation_t transpose = CUBLAS_OP_T;
    enum epd_gemm_layout layout = plan->problem.shape.layout;
    cublasStatus_t result = cublasLtMatmulDescCreate(&plan->desc, CUBLAS_COMPUTE_32F, CUDA_R_32F);
    if (result == CUBLAS_STATUS_SUCCESS && layout == EPD_GEMM_TN)
        result = cublasLtMatmulDescSetAttribute(plan->desc, CUBLASLT_MATMUL_DESC_TRANSA, &transpose,
                                                sizeof(transpose));
    if (result == CUBLAS_STATUS_SUCCESS && layout == EPD_GEMM_NT)
        result = cublasLtMatmulDescSetAttribute(plan->desc, CUBLASLT_MATMUL_DESC_TRANSB, &transpose,
                                                sizeof(transpose));
    return cublaslt_check(result, "cublasLtMatmulDescCreate", error);
}

/* What the library cannot know: sizes in an average step. */
static cublasStatus_t set_averages(const struct gemm_problem *problem, cublasLtMatmulPreference_t preference)
{
    const struct gemm_shape *shape = &problem->shape;
    int64_t expected = problem->expected_rows ? problem->expected_rows : problem->max_rows;
    uint32_t m = expected > problem->n_groups ? (uint32_t)(expected / problem->n_groups) : 1;
    int tn = shape->layout == EPD_GEMM_TN, nt = shape->layout == EPD_GEMM_NT;
    uint32_t rows = tn ? shape->n : shape->k, cols = nt ? shape->n : m,
             reduction = nt   ? m
                         : tn ? shape->k
                              : shape->n;
    uint64_t workspace = CUBLASLT_WORKSPACE_BYTES;
    cublasStatus_t result = cublasLtMatmulPreferenceSetAttribute(
        preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &workspace, sizeof(workspace));
    if (result == CUBLAS_STATUS_SUCCESS)
        result = cublasLtMatmulPreferenceSetAttribute(
            preference, CUBLASLT_MATMUL_PREF_GROUPED_DESC_D_AVERAGE_ROWS, &rows, sizeof(rows));
    if (result == CUBLAS_STATUS_SUCCESS)
        result = cublasLtMatmulPreferenceSetAttribute(
            preference, CUBLASLT_MATMUL_PREF_GROUPED_DESC_D_AVERAGE_COLS, &cols, sizeof(cols));
    if (result == CUBLAS_STATUS_SUCCESS)
        result = cublasLtMatmulPreferenceSetAttribute(
            preference, CUBLASLT_MATMUL_PREF_GROUPED_AVERAGE_REDUCTION_DIM, &reduction, sizeof(reduction));
    return result;
}

static enum epd_status choose_algorithm(struct gemm_engine_plan *plan, struct epd_error *error)
{
    cublasLtMatmulPreference_t preference = NULL;
    cublasLtMatmulHeuristicResult_t found;
    int n_found = 0;
    cublasStatus_t result = cublasLtMatmulPreferenceCreate(&preference);
    if (result == CUBLAS_STATUS_SUCCESS)
        result = set_averages(&plan->problem, preference);
    if (result == CUBLAS_STATUS_SUCCESS)
        result = cublasLtMatmulAlgoGetHeuristic(plan->handle, plan->desc, plan->a, plan->b, plan->c, plan->c,
                                                preference, 1, &found, &n_found);
    if (preference)
        cublasLtMatmulPreferenceDestroy(preference);
    if (result != CUBLAS_STATUS_SUCCESS)
        return cublaslt_check(result, "cublasLtMatmulAlgoGetHeuristic of grouped layouts", error);
    if (n_found == 0)
        return error_set(error, EPD_UNSUPPORTED,
                         "cublaslt_grouped: the library has no algorithm for the problem");
    plan->algorithm = found.algo;
    return EPD_OK;
}

static enum epd_status allocate(struct gemm_engine_plan *plan, struct epd_error *error)
{
    size_t bytes = cublaslt_tables_carve(&plan->tables, plan->problem.n_groups, NULL);
    enum epd_status status =
        gemm_check_cuda(cudaMalloc(&plan->table_memory, bytes), "cublaslt_grouped tables", error);
    if (status != EPD_OK)
        return status;
    (void)cublaslt_tables_carve(&plan->tables, plan->problem.n_groups, plan->table_memory);
    status = gemm_check_cuda(cublaslt_groups_prepare(), "load of the table kernels", error);
    if (status == EPD_OK)
        status = gemm_check_cuda(cudaMalloc(&plan->workspace, CUBLASLT_WORKSPACE_BYTES),
                                 "cublaslt_grouped workspace", error);
    return status;
}

static void grouped_destroy(struct gemm_engine_plan *plan)
{
    if (!plan)
        return;
    const cublasLtMatrixLayout_t layouts[] = {plan->a, plan->b, plan->c};
    for (size_t i = 0; i < sizeof(layouts) / sizeof(layouts[0]); i++)
        if (layouts[i])
            cublasLtMatrixLayoutDestroy(layouts[i]);
    if (plan->desc)
        cublasLtMatmulDescDestroy(plan->desc);
    if (plan->handle)
        cublasLtDestroy(plan->handle);
    cudaFree(plan->table_memory);
    cudaFree(plan->workspace);
    free(plan);
}

static enum epd_status grouped_create(const struct gemm_problem *problem, int device_idx,
                                      struct gemm_engine_plan **out, struct epd_error *error)
{
    if (!grouped_supports(problem, device_idx, error))
        return error->status;
    struct gemm_engine_plan *plan = calloc(1, sizeof(*plan));
    if (!plan)
        return error_set(error, EPD_NO_MEMORY, "cublaslt_grouped: no memory for a plan of %zu bytes",
                         sizeof(*plan));
    plan->problem = *problem;
    enum epd_status status = cublaslt_check(cublasLtCreate(&plan->handle), "cublasLtCreate", error);
    if (status == EPD_OK)
        status = allocate(plan, error);
    if (status == EPD_OK)
        status = make_desc(plan, error);
    if (status == EPD_OK)
        status = make_layouts(plan, error);
    if (status == EPD_OK)
        status = choose_algorithm(plan, error);
    if (status != EPD_OK) {
        grouped_destroy(plan);
        return status;
    }
    *out = plan;
    return EPD_OK;
}

static enum epd_status check_aligned(const void *pointer, const char *name, struct epd_error *error)
{
    if ((uintptr_t)pointer % 16 == 0)
        return EPD_OK;
    return error_set(error, EPD_INVALID_ALIGNMENT, "grouped_gemm %s: address %p, want a multiple of 16", name,
                     pointer);
}

static enum epd_status check_launch(const struct gemm_engine_plan *plan, const struct gemm_args *args,
                                    struct epd_error *error)
{
    if (args->groups.n_groups != plan->problem.n_groups || args->groups.max_rows > plan->problem.max_rows)
        return error_set(error, EPD_INVALID_SHAPE,
                         "grouped_gemm groups: %u of %lld rows, want %u of at most %lld",
                         args->groups.n_groups, (long long)args->groups.max_rows, plan->problem.n_groups,
                         (long long)plan->problem.max_rows);
    enum epd_status status = check_aligned(args->a, "a", error);
    if (status == EPD_OK)
        status = check_aligned(args->b, "b", error);
    return status == EPD_OK ? check_aligned(args->c, "c", error) : status;
}

static enum epd_status grouped_launch(struct gemm_engine_plan *plan, const struct gemm_launch *launch,
                                      struct CUstream_st *stream, struct epd_error *error)
{
    static const float one = 1.0f, zero = 0.0f;
    const struct gemm_args *args = &launch->args;
    if (check_launch(plan, args, error))
        return error->status;
    struct cublaslt_groups_args groups = {.gemm = *args, .tables = plan->tables};
    groups.gemm.shape = plan->problem.shape;
    if (gemm_check_cuda(cublaslt_groups_launch(&groups, stream), "launch of the table kernels", error))
        return error->status;
    const struct cublaslt_tables *tables = &plan->tables;
    const float *beta =
        plan->problem.shape.layout == EPD_GEMM_NT && plan->problem.shape.accumulate ? &one : &zero;
    return cublaslt_check(cublasLtMatmul(plan->handle, plan->desc, &one, tables->a.data, plan->a,
                                         tables->b.data, plan->b, beta, tables->c.data, plan->c,
                                         tables->c.data, plan->c, &plan->algorithm, plan->workspace,
                                         CUBLASLT_WORKSPACE_BYTES, stream),
                          "cublasLtMatmul of grouped layouts", error);
}

const struct gemm_engine gemm_engine_cublaslt_grouped = {
    .name = "cublaslt_grouped",
    .splits_on_device = 1,
    .destroy_waits = 1,
    .supports = grouped_supports,
    .create = grouped_create,
    .launch = grouped_launch,
    .destroy = grouped_destroy,
};
