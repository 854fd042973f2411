#include "kernels/gemm/check.h"

#include "kernels/cuda/error.h"

enum epd_status gemm_check_cuda(cudaError_t result, const char *what, struct epd_error *error)
{
    if (result == cudaSuccess)
        return EPD_OK;
    return error_set(error, cuda_error_status((int)result), "%s: %s (%s)", what, cudaGetErrorString(result),
                     cudaGetErrorName(result));
}
