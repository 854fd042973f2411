/* What the .cu files of the benchmark share; C++ only. */
#ifndef EPD_BENCH_GPU_CHECK_H
#define EPD_BENCH_GPU_CHECK_H

#include <cuda_runtime_api.h>

#include "client/bench/gpu.h"

/* EPD_OK for cudaSuccess; else the status, with what and CUDA's own text in gpu->text. */
enum epd_status gpu_fail(struct gpu *gpu, cudaError_t error, const char *what);
/* Makes the device with this UUID current. */
enum epd_status gpu_select(struct gpu *gpu, const uint8_t uuid[16], int *ordinal);

#endif
