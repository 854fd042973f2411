#include "kernels/gemm/engine.h"

extern const struct gemm_engine gemm_engine_sm90;
extern const struct gemm_engine gemm_engine_cublaslt_grouped;
extern const struct gemm_engine gemm_engine_cublaslt;

const struct gemm_engine *const gemm_engines[] = {
    &gemm_engine_sm90,
    &gemm_engine_cublaslt,
#ifdef EPD_CUBLASLT_GROUPED
    &gemm_engine_cublaslt_grouped, /* no machine with such a library has run it: by name, or where nothing else can */
#endif
    NULL,
};

const struct gemm_engine_absent gemm_engines_absent[] = {
#ifndef EPD_CUBLASLT_GROUPED
    {"cublaslt_grouped",
     "the cuBLASLt headers of this build have no grouped layouts, 13.2 and later have them"},
#endif
    {NULL, NULL},
};
