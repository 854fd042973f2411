/* Views of memory as the kernels see it. A view owns nothing; the memory outlives the launch by contract of the
 * caller (ep). Any thread. */
#ifndef EPD_KERNELS_TENSOR_H
#define EPD_KERNELS_TENSOR_H

#include <stdint.h>

#include "proto/words.h"

#define EPD_MAX_DIMS  3
#define EPD_MAX_RANKS 64

/* Row-major, contiguous. shape[i] for i >= n_dims is 1. data may be NULL only when the tensor has no element. */
struct tensor {
    void *data; /* borrowed */
    enum epd_dtype dtype;
    uint32_t n_dims;
    int64_t shape[EPD_MAX_DIMS];
};

/* What a kernel met and clamped. One per rank and step, zeroed before the step; the record with the smallest token
 * index is kept, so that the report is the same in every run. status 0 = nothing happened. */
struct kernel_error {
    uint32_t status; /* EPD_BAD_ROUTING, EPD_BAD_SPLITS, EPD_CAPACITY_OVERFLOW */
    uint32_t rank;   /* where it was seen; for an overflow the rank that receives */
    int32_t expert;  /* -1 if none */
    int32_t token;   /* -1 if none */
    int64_t got;
    int64_t allowed;
};

#endif
