#define EPD_TESTS_GPU_BACKEND_EXPERT_CASES
#include "tests/gpu/backend/expert_cases.h"

static uint32_t rounded_up(uint32_t n)
{
    return (n + 7) / 8 * 8;
}

int cuda_gemm_case_at(size_t idx, struct gemm_case *gemm_case)
{
    for (size_t i = 0; gemm_case_at(i, gemm_case); i++) {
        if (gemm_case->dtype == EPD_F32 || idx-- > 0)
            continue;
        gemm_case->n = rounded_up(gemm_case->n);
        gemm_case->k = rounded_up(gemm_case->k);
        return 1;
    }
    return 0;
}

int cuda_activation_case_at(size_t idx, struct activation_case *activation_case)
{
    for (size_t i = 0; activation_case_at(i, activation_case); i++) {
        if (activation_case->dtype == EPD_F32 || idx-- > 0)
            continue;
        activation_case->ffn = rounded_up(activation_case->ffn);
        return 1;
    }
    return 0;
}
