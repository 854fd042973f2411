/* What the two engines over cuBLASLt say alike: its results as statuses, dtypes in its words, shapes it does not take. Any thread. */
#ifndef EPD_KERNELS_GEMM_CUBLASLT_CHECK_H
#define EPD_KERNELS_GEMM_CUBLASLT_CHECK_H

/* Its header declares a function without a prototype. */
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wstrict-prototypes"
#include <cublasLt.h>
#pragma GCC diagnostic pop

#include "kernels/gemm/engine.h"

#define CUBLASLT_WORKSPACE_BYTES (32u << 20) /* what cuBLAS itself recommends on Hopper */

EPD_MUST_CHECK enum epd_status cublaslt_check(cublasStatus_t result, const char *what,
                                              struct epd_error *error);
/* Of F32, BF16 and F16. */
cudaDataType_t cublaslt_type(enum epd_dtype dtype);
/* 0, and *reason names the engine, what it wants and what it got: EPD_UNSUPPORTED. */
int cublaslt_refuse(struct epd_error *reason, const char *engine, const char *text, long long got);
/* Dtypes, layout and sizes that both take; else as cublaslt_refuse. */
int cublaslt_takes(const struct gemm_shape *shape, const char *engine, struct epd_error *reason);

#endif
