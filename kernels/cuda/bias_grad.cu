/* dbias_l[n] (+)= sum over rows m of group l of w[m] dy[m, n], summed in fp64 in the order of the rows within
 * eight slices and then over the slices: always the same bits. Reads every row of dy once: memory-bound. */
extern "C" {
#include "kernels/cuda/cuda.h"
}
#include "kernels/cuda/exchange.cuh"

static constexpr uint32_t LANES = 32, SLICES = 8, COLUMNS = 8;
static constexpr uint32_t BLOCK_COLUMNS = LANES * COLUMNS;

struct group_span {
    int64_t first_row, n_rows;
};

/* The same clamps as the host's group cursor; got: what had to be clamped, or 0. */
static __device__ group_span span_clamped(int64_t first, int64_t split, int64_t max_rows, bool *bad,
                                          int64_t *got)
{
    group_span span = {first, split};
    *bad = false;
    if (first < 0 || first > max_rows) {
        *bad = true;
        *got = first;
        span.first_row = first < 0 ? 0 : max_rows;
    }
    if (split < 0 || split > max_rows - span.first_row) {
        if (!*bad)
            *got = split < 0                            ? split
                   : split > INT64_MAX - span.first_row ? INT64_MAX
                                                        : span.first_row + split;
        *bad = true;
        span.n_rows = split < 0 ? 0 : max_rows - span.first_row;
    }
    return span;
}

/* One thread. The first group that is bad is recorded, by the first block of the last group, which sees all.
 */
static __device__ group_span span_find(const struct bias_grad_args &a, uint32_t group, bool records)
{
    group_span span = {0, 0};
    for (uint32_t l = a.groups.offsets && !records ? group : 0; l <= group; l++) {
        bool bad;
        int64_t got = 0;
        int64_t first = a.groups.offsets ? a.groups.offsets[l] : span.first_row + span.n_rows;
        span = span_clamped(first, a.groups.m_splits[l], a.groups.max_rows, &bad, &got);
        if (!bad || !records || !a.error || a.error->status != 0)
            continue;
        a.error->status = EPD_BAD_SPLITS;
        a.error->expert = (int32_t)l;
        a.error->token = -1;
        a.error->got = got;
        a.error->allowed = a.groups.max_rows;
    }
    return span;
}

static __device__ __forceinline__ double dbias_load(const struct bias_grad_args &a, size_t at)
{
    if (a.dtype_dbias == EPD_F32)
        return static_cast<const float *>(a.dbias)[at];
    if (a.dtype_dbias == EPD_BF16)
        return __bfloat162float(static_cast<const __nv_bfloat16 *>(a.dbias)[at]);
    return __half2float(static_cast<const __half *>(a.dbias)[at]);
}

static __device__ __forceinline__ void dbias_store(const struct bias_grad_args &a, size_t at, double sum)
{
    if (a.dtype_dbias == EPD_F32)
        static_cast<float *>(a.dbias)[at] = (float)sum;
    else if (a.dtype_dbias == EPD_BF16)
        static_cast<__nv_bfloat16 *>(a.dbias)[at] = __float2bfloat16_rn((float)sum);
    else
        static_cast<__half *>(a.dbias)[at] = __float2half_rn((float)sum);
}

template <typename E>
static __device__ void slice_add(const struct bias_grad_args &a, const group_span &span, uint32_t column,
                                 uint32_t slice, double *sums)
{
    const E *dy = static_cast<const E *>(a.dy);
    for (int64_t row = span.first_row + slice; row < span.first_row + span.n_rows; row += SLICES) {
        double weight = a.row_weights ? a.row_weights[row] : 1.0;
        const E *from = dy + (size_t)row * a.n + column;
        float values[COLUMNS];
#pragma unroll
        for (uint32_t i = 0; i < COLUMNS; i += vec16<E>::LANES)
            vec16<E>::unpack(load_once(reinterpret_cast<const uint4 *>(from + i)), values + i);
#pragma unroll
        for (uint32_t i = 0; i < COLUMNS; i++)
            sums[i] += weight * values[i];
    }
}

template <typename E>
static __global__ void __launch_bounds__(LANES *SLICES)
    bias_grad_kernel(const __grid_constant__ bias_grad_args a)
{
    __shared__ double slices[SLICES][BLOCK_COLUMNS];
    __shared__ group_span shared_span;
    uint32_t group = blockIdx.y, lane = threadIdx.x % LANES, slice = threadIdx.x / LANES;
    uint32_t column = blockIdx.x * BLOCK_COLUMNS + lane * COLUMNS;
    if (threadIdx.x == 0)
        shared_span = span_find(a, group, blockIdx.x == 0 && group == a.groups.n_groups - 1);
    __syncthreads();
    group_span span = shared_span;
    double sums[COLUMNS] = {0};
    if (column < a.n)
        slice_add<E>(a, span, column, slice, sums);
    for (uint32_t i = 0; i < COLUMNS; i++)
        slices[slice][lane * COLUMNS + i] = sums[i];
    __syncthreads();
    uint32_t own = blockIdx.x * BLOCK_COLUMNS + threadIdx.x;
    if (own >= a.n || (span.n_rows == 0 && a.accumulate))
        return;
    size_t at = (size_t)group * a.n + own;
    double sum = 0.0;
    for (uint32_t i = 0; i < SLICES; i++)
        sum += slices[i][threadIdx.x];
    dbias_store(a, at, a.accumulate ? sum + dbias_load(a, at) : sum);
}

static const void *kernel_of(enum epd_dtype dtype)
{
    switch (dtype) {
    case EPD_BF16:
        return reinterpret_cast<const void *>(bias_grad_kernel<__nv_bfloat16>);
    case EPD_F16:
        return reinterpret_cast<const void *>(bias_grad_kernel<__half>);
    case EPD_F32:
        return reinterpret_cast<const void *>(bias_grad_kernel<float>);
    default:
        return NULL;
    }
}

extern "C" enum epd_status cuda_bias_grad_load(struct epd_error *error)
{
    const enum epd_dtype dtypes[] = {EPD_BF16, EPD_F16, EPD_F32};
    enum epd_status status = EPD_OK;
    for (size_t i = 0; i < sizeof(dtypes) / sizeof(dtypes[0]) && status == EPD_OK; i++)
        status = kernel_load(kernel_of(dtypes[i]), 0, "bias_grad", error);
    return status;
}

extern "C" enum epd_status cuda_bias_grad_launch(const struct bias_grad_args *args,
                                                 struct CUstream_st *stream, struct epd_error *error)
{
    const void *kernel = kernel_of(args->dtype);
    if (!kernel)
        return error_set(error, EPD_INVALID_DTYPE, "bias_grad dy: %s", dtype_name(args->dtype));
    if (args->n == 0 || args->n % COLUMNS != 0)
        return error_set(error, EPD_INVALID_SHAPE, "bias_grad n: %u, want a multiple of %u", args->n,
                         COLUMNS);
    if (!aligned16(args->dy))
        return error_set(error, EPD_INVALID_ALIGNMENT, "bias_grad: dy wants 16-byte alignment");
    if (args->groups.n_groups == 0)
        return EPD_OK;
    struct bias_grad_args copy = *args;
    void *arguments[] = {&copy};
    dim3 grid((args->n + BLOCK_COLUMNS - 1) / BLOCK_COLUMNS, args->groups.n_groups);
    return cuda_check(cudaLaunchKernel(kernel, grid, dim3(LANES * SLICES), arguments, 0, stream), "bias_grad",
                      error);
}
