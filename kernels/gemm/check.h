/* Where errors of CUDA and cuBLASLt become ours: status and text, decided here and logged by nobody else. Any thread. */
#ifndef EPD_KERNELS_GEMM_CHECK_H
#define EPD_KERNELS_GEMM_CHECK_H

#include <cuda_runtime_api.h>

#include "proto/status.h"

/* EPD_OK, or EPD_CUDA (EPD_NO_MEMORY for an allocation) with "<what>: <CUDA's text>" in *error. */
EPD_MUST_CHECK enum epd_status gemm_check_cuda(cudaError_t result, const char *what, struct epd_error *error);

#endif
