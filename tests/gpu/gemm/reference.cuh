/* Slow and evidently right: what the engines are compared with, in float64 on the GPU, one thread per element. */
#ifndef EPD_TESTS_GPU_GEMM_REFERENCE_CUH
#define EPD_TESTS_GPU_GEMM_REFERENCE_CUH

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "kernels/gemm/engine.h"

static __host__ __device__ inline double load_element(const void *base, enum epd_dtype dtype, size_t idx)
{
    if (dtype == EPD_F32)
        return ((const float *)base)[idx];
    if (dtype == EPD_F16)
        return __half2float(((const __half *)base)[idx]);
    return __bfloat162float(((const __nv_bfloat16 *)base)[idx]);
}

static __device__ inline uint32_t mix(uint32_t x)
{
    x ^= x >> 16;
    x *= 0x7feb352du;
    x ^= x >> 15;
    x *= 0x846ca68bu;
    return x ^ x >> 16;
}

/* Sum of four uniforms: near normal, deviation `scale`. */
static __global__ void fill_random(void *data, enum epd_dtype dtype, size_t n, uint32_t seed, float scale)
{
    for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < n;
         i += (size_t)gridDim.x * blockDim.x) {
        uint32_t h = mix((uint32_t)i * 2654435761u + seed), g = mix(h + (uint32_t)(i >> 32) + 17);
        float sum = (h & 0xffff) + (h >> 16) + (g & 0xffff) + (g >> 16);
        float value = (sum / 65536.0f - 2.0f) * 1.7320508f * scale;
        if (dtype == EPD_F32)
            ((float *)data)[i] = value;
        else if (dtype == EPD_F16)
            ((__half *)data)[i] = __float2half(value);
        else
            ((__nv_bfloat16 *)data)[i] = __float2bfloat16(value);
    }
}

/* Rows that belong to no group become NaN. */
static __global__ void poison_rows(uint16_t *data, size_t columns, const int *group_of_row, int64_t rows)
{
    for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < columns * rows;
         i += (size_t)gridDim.x * blockDim.x)
        if (group_of_row[i / columns] < 0)
            data[i] = 0xffff;
}

struct reference_args {
    struct gemm_shape shape;
    const void *a, *b, *bias;
    const float *row_weights;
    const int *group_of_row;     /* [max_rows], -1 outside */
    const int64_t *first, *rows; /* [L] */
    int64_t max_rows;
    uint32_t n_groups;
};

/* TN and NN: out[m, outer], NaN outside the groups. */
static __global__ void reference_rows(struct reference_args args, double *out)
{
    uint32_t n = args.shape.n, k = args.shape.k, tn = args.shape.layout == EPD_GEMM_TN;
    uint32_t outer = tn ? n : k, reduction = tn ? k : n;
    for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < (size_t)outer * args.max_rows;
         i += (size_t)gridDim.x * blockDim.x) {
        size_t row = i / outer, column = i % outer;
        int group = args.group_of_row[row];
        double sum = 0.0;
        for (uint32_t r = 0; group >= 0 && r < reduction; r++)
            sum += load_element(args.a, args.shape.dtype, row * reduction + r) *
                   load_element(args.b, args.shape.dtype,
                                (size_t)group * n * k + (tn ? column * k + r : (size_t)r * k + column));
        if (group >= 0 && args.bias)
            sum += load_element(args.bias, args.shape.dtype_bias, (size_t)group * n + column);
        if (group >= 0 && args.row_weights)
            sum *= args.row_weights[row];
        out[i] = group >= 0 ? sum : nan("");
    }
}

/* NT: out[L, N, K] (column K: dbias when k_is_ones). */
static __global__ void reference_groups(struct reference_args args, double *out, int sums)
{
    size_t n = args.shape.n, k = sums ? 1 : args.shape.k;
    for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < n * k * args.n_groups;
         i += (size_t)gridDim.x * blockDim.x) {
        size_t group = i / (n * k), row = i / k % n, column = i % k;
        double sum = 0.0;
        for (int64_t m = args.first[group]; m < args.first[group] + args.rows[group]; m++)
            sum += load_element(args.a, args.shape.dtype, m * n + row) *
                   (sums ? 1.0 : load_element(args.b, args.shape.dtype, m * k + column));
        out[i] = sum;
    }
}

#endif
