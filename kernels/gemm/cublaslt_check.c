#include "kernels/gemm/cublaslt_check.h"

enum epd_status cublaslt_check(cublasStatus_t result, const char *what, struct epd_error *error)
{
    if (result == CUBLAS_STATUS_SUCCESS)
        return EPD_OK;
    /* Only what has met a lost context may end the worker. */
    enum epd_status status = result == CUBLAS_STATUS_ALLOC_FAILED    ? EPD_NO_MEMORY
                             : result == CUBLAS_STATUS_NOT_SUPPORTED ? EPD_UNSUPPORTED
                             : result == CUBLAS_STATUS_INVALID_VALUE ? EPD_INTERNAL
                                                                     : EPD_CUDA;
    return error_set(error, status, "%s: %s", what, cublasLtGetStatusString(result));
}

cudaDataType_t cublaslt_type(enum epd_dtype dtype)
{
    return dtype == EPD_F32 ? CUDA_R_32F : dtype == EPD_F16 ? CUDA_R_16F : CUDA_R_16BF;
}

int cublaslt_refuse(struct epd_error *reason, const char *engine, const char *text, long long got)
{
    error_set(reason, EPD_UNSUPPORTED, "%s: %s, got %lld", engine, text, got);
    return 0;
}

int cublaslt_takes(const struct gemm_shape *shape, const char *engine, struct epd_error *reason)
{
    if (shape->dtype != EPD_BF16 && shape->dtype != EPD_F16)
        return cublaslt_refuse(reason, engine, "inputs must be bf16 or f16", shape->dtype);
    if (shape->dtype_c != shape->dtype && shape->dtype_c != EPD_F32)
        return cublaslt_refuse(reason, engine, "output must have the inputs' dtype or f32", shape->dtype_c);
    if (shape->layout == EPD_GEMM_UNSPECIFIED || shape->layout > EPD_GEMM_NT)
        return cublaslt_refuse(reason, engine, "layout must be TN, NN or NT", shape->layout);
    if (shape->n == 0 || shape->n % 8 != 0 || shape->k == 0 || shape->k % 8 != 0)
        return cublaslt_refuse(reason, engine, "n and k must be positive multiples of 8",
                               shape->n == 0 || shape->n % 8 ? shape->n : shape->k);
    return 1;
}
