/* The tables of grouped GEMMs and activations as the CUDA backend runs them: rows in bf16 and f16, sizes rounded up to what
 * its kernels take. Put in front of a test source that is written for the whole tables (tests/unit/ep/test_expert.c). */
#ifndef EPD_TESTS_GPU_BACKEND_EXPERT_CASES_H
#define EPD_TESTS_GPU_BACKEND_EXPERT_CASES_H

#include "tests/reference/op_cases.h"

int cuda_gemm_case_at(size_t idx, struct gemm_case *gemm_case);
int cuda_activation_case_at(size_t idx, struct activation_case *activation_case);

#ifndef EPD_TESTS_GPU_BACKEND_EXPERT_CASES
#define gemm_case_at       cuda_gemm_case_at
#define activation_case_at cuda_activation_case_at
#endif

#endif
