/* A kernel that keeps a stream busy for a while, so that the host can be ahead of the GPU when the measured
 * part begins. */
#ifndef EPD_TESTS_GPU_EXCHANGE_GATE_H
#define EPD_TESTS_GPU_EXCHANGE_GATE_H

#include <cuda_runtime_api.h>

void gate_load(void);
void gate_launch(cudaStream_t stream, unsigned milliseconds);

#endif
