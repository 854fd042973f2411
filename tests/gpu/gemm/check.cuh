/* A CUDA call that fails ends the program, exit code 2: tests and benchmarks here have no other use of it. */
#ifndef EPD_TESTS_GPU_GEMM_CHECK_CUH
#define EPD_TESTS_GPU_GEMM_CHECK_CUH

#include <cuda_runtime_api.h>
#include <stdio.h>
#include <stdlib.h>

#define CHECK(call)                                                                                          \
    do {                                                                                                     \
        cudaError_t result_ = (call);                                                                        \
        if (result_ != cudaSuccess) {                                                                        \
            printf("%s:%d %s: %s\n", __FILE__, __LINE__, #call, cudaGetErrorString(result_));                \
            exit(2);                                                                                         \
        }                                                                                                    \
    } while (0)

#endif
