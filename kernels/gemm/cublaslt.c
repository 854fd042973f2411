/* The engine `cublaslt`: one cuBLASLt matmul per group, on any GPU. The splits are copied to the host, so a launch waits
 * for the stream and cannot be captured. Everything but the row counts of the layouts is made once. Lane thread.
 *
 * cuBLASLt is column-major: a row-major [r, c] matrix is its [c, r] with leading dimension c. Per group therefore
 *   TN  Yt[N, m]  = W[K, N]t  X[K, m]       A = W transposed, B = X
 *   NN  dXt[K, m] = W[K, N]   dY[N, m]      A = W, B = dY
 *   NT  dWt[K, N] = X[K, m]   dY[N, m]t     A = X, B = dY transposed; dbias[N] = dY[N, m] ones[m] */
#include <stdlib.h>

#include "kernels/gemm/check.h"
#include "kernels/gemm/cublaslt_check.h"
#include "kernels/gemm/engine.h"

struct gemm_engine_plan {
    struct gemm_problem problem;
    cublasLtHandle_t handle;
    cublasLtMatmulDesc_t desc, desc_sums;
    cublasLtMatrixLayout_t a, b, c;    /* of the product; rows and columns that are m are set per group */
    cublasLtMatrixLayout_t ones, sums; /* dbias */
    void *workspace;                   /* owned, device */
    void *ones_data;                   /* owned, device, [max_rows] ones of the inputs' dtype */
    int64_t *counts;                   /* owned, pinned: m_splits [L], then offsets [L + 1] */
    const void **b_parts;              /* owned, pinned, [L] */
    void **c_parts;                    /* owned, pinned, [L] */
};

static int refuse(struct epd_error *reason, const char *text, long long got)
{
    return cublaslt_refuse(reason, "cublaslt", text, got);
}

static int cublaslt_supports(const struct gemm_problem *problem, int device_idx, struct epd_error *reason)
{
    const struct gemm_shape *shape = &problem->shape;
    (void)device_idx;
    if (!cublaslt_takes(shape, "cublaslt", reason))
        return 0;
    if (problem->n_groups == 0)
        return refuse(reason, "there must be a group", 0);
    if (problem->activation || problem->row_weights)
        return refuse(reason, "no fused activation or row weights", problem->activation);
    if (shape->layout == EPD_GEMM_TN && shape->dtype_bias && shape->dtype_bias != shape->dtype_c)
        return refuse(reason, "bias must have the output's dtype", shape->dtype_bias);
    if (shape->layout == EPD_GEMM_NT && shape->dtype_bias && shape->dtype_bias != shape->dtype &&
        shape->dtype_bias != EPD_F32)
        return refuse(reason, "dbias must have the inputs' dtype or f32", shape->dtype_bias);
    return 1;
}

static enum epd_status set_transpose(cublasLtMatmulDesc_t desc, cublasLtMatmulDescAttributes_t which,
                                     struct epd_error *error)
{
    cublasOperation_t transpose = CUBLAS_OP_T;
    return cublaslt_check(cublasLtMatmulDescSetAttribute(desc, which, &transpose, sizeof(transpose)),
                          "cublasLtMatmulDescSetAttribute", error);
}

static enum epd_status make_desc(cublasLtMatmulDesc_t *desc, struct epd_error *error)
{
    return cublaslt_check(cublasLtMatmulDescCreate(desc, CUBLAS_COMPUTE_32F, CUDA_R_32F),
                          "cublasLtMatmulDescCreate", error);
}

static enum epd_status make_layout(cublasLtMatrixLayout_t *layout, enum epd_dtype dtype, uint64_t rows,
                                   uint64_t columns, struct epd_error *error)
{
    return cublaslt_check(
        cublasLtMatrixLayoutCreate(layout, cublaslt_type(dtype), rows, columns, (int64_t)rows),
        "cublasLtMatrixLayoutCreate", error);
}

/* Layouts with m = 1; set_rows gives each group's. */
static enum epd_status make_layouts(struct gemm_engine_plan *plan, struct epd_error *error)
{
    const struct gemm_shape *shape = &plan->problem.shape;
    int tn = shape->layout == EPD_GEMM_TN, nt = shape->layout == EPD_GEMM_NT;
    enum epd_status status = make_layout(&plan->a, shape->dtype, shape->k, nt ? 1 : shape->n, error);
    if (status == EPD_OK)
        status = make_layout(&plan->b, shape->dtype, tn ? shape->k : shape->n, 1, error);
    if (status == EPD_OK)
        status = make_layout(&plan->c, shape->dtype_c, tn ? shape->n : shape->k, nt ? shape->n : 1, error);
    if (status == EPD_OK && nt && shape->dtype_bias)
        status = make_layout(&plan->ones, shape->dtype, 1, 1, error);
    if (status == EPD_OK && nt && shape->dtype_bias)
        status = make_layout(&plan->sums, shape->dtype_bias, shape->n, 1, error);
    return status;
}

static enum epd_status make_descs(struct gemm_engine_plan *plan, struct epd_error *error)
{
    const struct gemm_shape *shape = &plan->problem.shape;
    enum epd_status status = make_desc(&plan->desc, error);
    if (status == EPD_OK && shape->layout == EPD_GEMM_TN)
        status = set_transpose(plan->desc, CUBLASLT_MATMUL_DESC_TRANSA, error);
    if (status == EPD_OK && shape->layout == EPD_GEMM_NT)
        status = set_transpose(plan->desc, CUBLASLT_MATMUL_DESC_TRANSB, error);
    if (status == EPD_OK && shape->layout == EPD_GEMM_TN && shape->dtype_bias) {
        cublasLtEpilogue_t epilogue = CUBLASLT_EPILOGUE_BIAS;
        status = cublaslt_check(cublasLtMatmulDescSetAttribute(plan->desc, CUBLASLT_MATMUL_DESC_EPILOGUE,
                                                               &epilogue, sizeof(epilogue)),
                                "cublasLtMatmulDescSetAttribute", error);
    }
    if (status == EPD_OK && shape->layout == EPD_GEMM_NT && shape->dtype_bias)
        status = make_desc(&plan->desc_sums, error);
    /* ones lie as [1, m]: transposed they are the column the product wants. */
    if (status == EPD_OK && plan->desc_sums)
        status = set_transpose(plan->desc_sums, CUBLASLT_MATMUL_DESC_TRANSB, error);
    return status;
}

static enum epd_status allocate(struct gemm_engine_plan *plan, struct epd_error *error)
{
    const struct gemm_problem *problem = &plan->problem;
    uint32_t groups = problem->n_groups;
    enum epd_status status =
        gemm_check_cuda(cudaMalloc(&plan->workspace, CUBLASLT_WORKSPACE_BYTES), "cublaslt workspace", error);
    if (status == EPD_OK)
        status = gemm_check_cuda(
            cudaMallocHost((void **)&plan->counts, (2 * (size_t)groups + 1) * sizeof(*plan->counts)),
            "cublaslt splits", error);
    if (status == EPD_OK)
        status = gemm_check_cuda(cudaMallocHost((void **)&plan->b_parts, groups * sizeof(*plan->b_parts)),
                                 "cublaslt pointers", error);
    if (status == EPD_OK)
        status = gemm_check_cuda(cudaMallocHost((void **)&plan->c_parts, groups * sizeof(*plan->c_parts)),
                                 "cublaslt pointers", error);
    return status;
}

static enum epd_status make_ones(struct gemm_engine_plan *plan, struct epd_error *error)
{
    size_t n = plan->problem.max_rows > 0 ? (size_t)plan->problem.max_rows : 1;
    uint16_t one = plan->problem.shape.dtype == EPD_F16 ? 0x3c00 : 0x3f80;
    uint16_t *host = malloc(n * sizeof(*host));
    if (!host)
        return error_set(error, EPD_NO_MEMORY, "cublaslt: no memory for %zu ones", n);
    for (size_t i = 0; i < n; i++)
        host[i] = one;
    enum epd_status status =
        gemm_check_cuda(cudaMalloc(&plan->ones_data, n * sizeof(*host)), "cublaslt ones", error);
    if (status == EPD_OK)
        status = gemm_check_cuda(cudaMemcpy(plan->ones_data, host, n * sizeof(*host), cudaMemcpyHostToDevice),
                                 "cublaslt ones", error);
    free(host);
    return status;
}

static void cublaslt_destroy(struct gemm_engine_plan *plan)
{
    if (!plan)
        return;
    const cublasLtMatrixLayout_t layouts[] = {plan->a, plan->b, plan->c, plan->ones, plan->sums};
    for (size_t i = 0; i < sizeof(layouts) / sizeof(layouts[0]); i++)
        if (layouts[i])
            cublasLtMatrixLayoutDestroy(layouts[i]);
    if (plan->desc)
        cublasLtMatmulDescDestroy(plan->desc);
    if (plan->desc_sums)
        cublasLtMatmulDescDestroy(plan->desc_sums);
    if (plan->handle)
        cublasLtDestroy(plan->handle);
    cudaFree(plan->workspace);
    cudaFree(plan->ones_data);
    cudaFreeHost(plan->counts);
    cudaFreeHost(plan->b_parts);
    cudaFreeHost(plan->c_parts);
    free(plan);
}

static enum epd_status cublaslt_create(const struct gemm_problem *problem, int device_idx,
                                       struct gemm_engine_plan **out, struct epd_error *error)
{
    if (!cublaslt_supports(problem, device_idx, error))
        return error->status;
    struct gemm_engine_plan *plan = calloc(1, sizeof(*plan));
    if (!plan)
        return error_set(error, EPD_NO_MEMORY, "cublaslt: no memory for a plan of %zu bytes", sizeof(*plan));
    plan->problem = *problem;
    enum epd_status status = cublaslt_check(cublasLtCreate(&plan->handle), "cublasLtCreate", error);
    if (status == EPD_OK)
        status = make_descs(plan, error);
    if (status == EPD_OK)
        status = make_layouts(plan, error);
    if (status == EPD_OK)
        status = allocate(plan, error);
    if (status == EPD_OK && plan->desc_sums)
        status = make_ones(plan, error);
    if (status != EPD_OK) {
        cublaslt_destroy(plan);
        return status;
    }
    *out = plan;
    return EPD_OK;
}

/* Splits and pointers come to the host; this is the wait that the other engines do not have. */
static enum epd_status read_groups(struct gemm_engine_plan *plan, const struct gemm_args *args,
                                   cudaStream_t stream, struct epd_error *error)
{
    size_t n = plan->problem.n_groups;
    cudaError_t result = cudaMemcpyAsync(plan->counts, args->groups.m_splits, n * sizeof(int64_t),
                                         cudaMemcpyDeviceToHost, stream);
    if (result == cudaSuccess && args->groups.offsets)
        result = cudaMemcpyAsync(plan->counts + n, args->groups.offsets, (n + 1) * sizeof(int64_t),
                                 cudaMemcpyDeviceToHost, stream);
    if (result == cudaSuccess && args->b_parts)
        result =
            cudaMemcpyAsync(plan->b_parts, args->b_parts, n * sizeof(void *), cudaMemcpyDeviceToHost, stream);
    if (result == cudaSuccess && args->c_parts)
        result =
            cudaMemcpyAsync(plan->c_parts, args->c_parts, n * sizeof(void *), cudaMemcpyDeviceToHost, stream);
    if (result == cudaSuccess)
        result = cudaStreamSynchronize(stream);
    return gemm_check_cuda(result, "copy of m_splits", error);
}

/* Starts of packed groups, and rows cut to the buffer as the device engines cut them. */
static enum epd_status place_groups(struct gemm_engine_plan *plan, const struct gemm_args *args,
                                    cudaStream_t stream, struct epd_error *error)
{
    uint32_t n = plan->problem.n_groups;
    int64_t *rows = plan->counts, *first = plan->counts + n, next = 0, limit = args->groups.max_rows;
    struct kernel_error seen = {.status = EPD_OK};
    for (uint32_t i = 0; i < n; i++) {
        int64_t got = rows[i];
        if (!args->groups.offsets)
            first[i] = next;
        int inside = first[i] >= 0 && first[i] <= limit;
        int64_t room = inside ? limit - first[i] : 0;
        rows[i] = got < 0 ? 0 : got > room ? room : got;
        next += rows[i];
        if (rows[i] != got && seen.status == EPD_OK)
            seen = (struct kernel_error){
                .status = EPD_BAD_SPLITS, .expert = (int32_t)i, .token = -1, .got = got, .allowed = room};
    }
    if (seen.status == EPD_OK || !args->error)
        return EPD_OK;
    return gemm_check_cuda(cudaMemcpyAsync(args->error, &seen, sizeof(seen), cudaMemcpyHostToDevice, stream),
                           "record of bad splits", error);
}

static cublasStatus_t set_extent(cublasLtMatrixLayout_t layout, cublasLtMatrixLayoutAttribute_t which,
                                 uint64_t extent)
{
    return cublasLtMatrixLayoutSetAttribute(layout, which, &extent, sizeof(extent));
}

static const char *at(const void *base, int64_t element, enum epd_dtype dtype)
{
    return (const char *)base + element * (int64_t)dtype_bytes(dtype);
}

static enum epd_status multiply_rows(struct gemm_engine_plan *plan, const struct gemm_args *args,
                                     uint32_t group, cudaStream_t stream, struct epd_error *error)
{
    static const float one = 1.0f, zero = 0.0f;
    const struct gemm_shape *shape = &plan->problem.shape;
    int tn = shape->layout == EPD_GEMM_TN;
    int64_t m = plan->counts[group], first = plan->counts[plan->problem.n_groups + group];
    int64_t in = tn ? shape->k : shape->n, out = tn ? shape->n : shape->k, nk = (int64_t)shape->n * shape->k;
    if (m == 0)
        return EPD_OK;
    const void *w = args->b_parts ? plan->b_parts[group] : at(args->b, group * nk, shape->dtype);
    char *c = (char *)args->c + first * out * (int64_t)dtype_bytes(shape->dtype_c);
    cublasStatus_t result = set_extent(plan->b, CUBLASLT_MATRIX_LAYOUT_COLS, (uint64_t)m);
    if (result == CUBLAS_STATUS_SUCCESS)
        result = set_extent(plan->c, CUBLASLT_MATRIX_LAYOUT_COLS, (uint64_t)m);
    if (result == CUBLAS_STATUS_SUCCESS && tn && shape->dtype_bias) {
        const void *bias = at(args->bias, (int64_t)group * shape->n, shape->dtype_bias);
        result = cublasLtMatmulDescSetAttribute(plan->desc, CUBLASLT_MATMUL_DESC_BIAS_POINTER, &bias,
                                                sizeof(bias));
    }
    if (result == CUBLAS_STATUS_SUCCESS)
        result = cublasLtMatmul(plan->handle, plan->desc, &one, w, plan->a,
                                at(args->a, first * in, shape->dtype), plan->b, &zero, c, plan->c, c, plan->c,
                                NULL, plan->workspace, CUBLASLT_WORKSPACE_BYTES, stream);
    return cublaslt_check(result, "cublasLtMatmul", error);
}

static enum epd_status clear_gradients(struct gemm_engine_plan *plan, const struct gemm_args *args,
                                       uint32_t group, void *c, cudaStream_t stream, struct epd_error *error)
{
    const struct gemm_shape *shape = &plan->problem.shape;
    if (shape->accumulate)
        return EPD_OK;
    cudaError_t result =
        cudaMemsetAsync(c, 0, (size_t)shape->n * shape->k * dtype_bytes(shape->dtype_c), stream);
    size_t bytes = shape->n * dtype_bytes(shape->dtype_bias);
    if (result == cudaSuccess && shape->dtype_bias)
        result = cudaMemsetAsync((char *)args->dbias + group * bytes, 0, bytes, stream);
    return gemm_check_cuda(result, "zeros of an empty group", error);
}

static enum epd_status multiply_gradients(struct gemm_engine_plan *plan, const struct gemm_args *args,
                                          uint32_t group, cudaStream_t stream, struct epd_error *error)
{
    static const float one = 1.0f, zero = 0.0f;
    const struct gemm_shape *shape = &plan->problem.shape;
    int64_t m = plan->counts[group], first = plan->counts[plan->problem.n_groups + group];
    int64_t nk = (int64_t)shape->n * shape->k;
    void *c = args->c_parts ? plan->c_parts[group]
                            : (char *)args->c + group * nk * (int64_t)dtype_bytes(shape->dtype_c);
    if (m == 0)
        return clear_gradients(plan, args, group, c, stream, error);
    const void *x = at(args->b, first * shape->k, shape->dtype),
               *dy = at(args->a, first * shape->n, shape->dtype);
    const float *beta = shape->accumulate ? &one : &zero;
    cublasStatus_t result = set_extent(plan->a, CUBLASLT_MATRIX_LAYOUT_COLS, (uint64_t)m);
    if (result == CUBLAS_STATUS_SUCCESS)
        result = set_extent(plan->b, CUBLASLT_MATRIX_LAYOUT_COLS, (uint64_t)m);
    if (result == CUBLAS_STATUS_SUCCESS)
        result = cublasLtMatmul(plan->handle, plan->desc, &one, x, plan->a, dy, plan->b, beta, c, plan->c, c,
                                plan->c, NULL, plan->workspace, CUBLASLT_WORKSPACE_BYTES, stream);
    if (result != CUBLAS_STATUS_SUCCESS || !shape->dtype_bias)
        return cublaslt_check(result, "cublasLtMatmul", error);
    char *sums = (char *)args->dbias + (size_t)group * shape->n * dtype_bytes(shape->dtype_bias);
    result = set_extent(plan->ones, CUBLASLT_MATRIX_LAYOUT_COLS, (uint64_t)m);
    if (result == CUBLAS_STATUS_SUCCESS)
        result = cublasLtMatmul(plan->handle, plan->desc_sums, &one, dy, plan->b, plan->ones_data, plan->ones,
                                beta, sums, plan->sums, sums, plan->sums, NULL, plan->workspace,
                                CUBLASLT_WORKSPACE_BYTES, stream);
    return cublaslt_check(result, "cublasLtMatmul of dbias", error);
}

static enum epd_status cublaslt_launch(struct gemm_engine_plan *plan, const struct gemm_launch *launch,
                                       struct CUstream_st *stream, struct epd_error *error)
{
    const struct gemm_args *args = &launch->args;
    if (args->groups.n_groups != plan->problem.n_groups || args->groups.max_rows > plan->problem.max_rows)
        return error_set(error, EPD_INVALID_SHAPE,
                         "grouped_gemm groups: %u of %lld rows, want %u of at most %lld",
                         args->groups.n_groups, (long long)args->groups.max_rows, plan->problem.n_groups,
                         (long long)plan->problem.max_rows);
    enum epd_status status = read_groups(plan, args, stream, error);
    if (status == EPD_OK)
        status = place_groups(plan, args, stream, error);
    for (uint32_t group = 0; group < plan->problem.n_groups && status == EPD_OK; group++)
        status = plan->problem.shape.layout == EPD_GEMM_NT
                     ? multiply_gradients(plan, args, group, stream, error)
                     : multiply_rows(plan, args, group, stream, error);
    return status;
}

const struct gemm_engine gemm_engine_cublaslt = {
    .name = "cublaslt",
    .splits_on_device = 0,
    .destroy_waits = 1,
    .supports = cublaslt_supports,
    .create = cublaslt_create,
    .launch = cublaslt_launch,
    .destroy = cublaslt_destroy,
};
