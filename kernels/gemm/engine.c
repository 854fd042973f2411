#include "kernels/gemm/engine.h"

extern const struct gemm_engine gemm_engine_sm90;
extern const struct gemm_engine gemm_engine_cublaslt;

const struct gemm_engine *const gemm_engines[] = {&gemm_engine_sm90, &gemm_engine_cublaslt, NULL};
