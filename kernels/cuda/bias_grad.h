/* bias_grad of kernels.h on CUDA; threads and streams as in cuda.h. n a multiple of 8, dy 16-byte aligned. */
#ifndef EPD_KERNELS_CUDA_BIAS_GRAD_H
#define EPD_KERNELS_CUDA_BIAS_GRAD_H

#include "kernels/kernels.h"

struct CUstream_st;

/* Besides cuda_kernels_load, once per device. */
EPD_MUST_CHECK enum epd_status cuda_bias_grad_load(struct epd_error *error);
EPD_MUST_CHECK enum epd_status cuda_bias_grad_launch(const struct bias_grad_args *args,
                                                     struct CUstream_st *stream, struct epd_error *error);

#endif
