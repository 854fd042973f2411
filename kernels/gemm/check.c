#include "kernels/gemm/check.h"

enum epd_status gemm_check_cuda(cudaError_t result, const char *what, struct epd_error *error)
{
    if (result == cudaSuccess)
        return EPD_OK;
    enum epd_status status = result == cudaErrorMemoryAllocation ? EPD_NO_MEMORY : EPD_CUDA;
    return error_set(error, status, "%s: %s (%s)", what, cudaGetErrorString(result),
                     cudaGetErrorName(result));
}
