/* NN and the activation behind it, backward: d_act[m, F] = dY[m, H] W[H, F] per group stays in the registers, d_preact[m, 2F]
 * and the weighted activation[m, F] come out. Beside the product's own operands it moves 4F + 6F bytes a row; a pass of its
 * own moves 6F + 6F, and the product before it 2F. The rows' dot products leave in parts of 64 columns (F / 16 bytes a
 * row), added up in order by a small kernel behind: the same bits every time. */
#include "kernels/gemm/sm90_kernel.cuh"

template <bool F16> using backward = sm90::operation<EPD_GEMM_NN, F16, true>;

static constexpr int SUM_THREADS = 128, SUM_BLOCKS = 16;

struct sum_args {
    const float *parts; /* [n_parts, max_rows] */
    float *sums;        /* [max_rows] */
    const int64_t *m_splits, *offsets;
    int64_t max_rows;
    uint32_t n_parts;
};

/* First row of a group and its rows, clamped as the scheduler of the tiles clamps them. One thread. */
static __device__ longlong2 group_rows(const sum_args &a, uint32_t group)
{
    int64_t start = 0;
    for (uint32_t l = 0; l < group && !a.offsets; l++)
        start += max(int64_t(0), min(a.m_splits[l], a.max_rows));
    if (a.offsets)
        start = a.offsets[group];
    int64_t room = start >= 0 && start <= a.max_rows ? a.max_rows - start : 0;
    return make_longlong2(start, max(int64_t(0), min(a.m_splits[group], room)));
}

/* Block (x, group): every SUM_BLOCKS-th run of SUM_THREADS rows of the group. */
static __global__ void __launch_bounds__(SUM_THREADS) sum_parts(const __grid_constant__ sum_args a)
{
    __shared__ longlong2 rows;
    if (threadIdx.x == 0)
        rows = group_rows(a, blockIdx.y);
    __syncthreads();
    for (int64_t i = blockIdx.x * SUM_THREADS + threadIdx.x; i < rows.y; i += SUM_BLOCKS * SUM_THREADS) {
        float sum = 0.0f;
        for (uint32_t part = 0; part < a.n_parts; part++)
            sum += a.parts[part * a.max_rows + rows.x + i];
        a.sums[rows.x + i] = sum;
    }
}

extern "C" cudaError_t sm90_backward_prepare(enum epd_dtype dtype, size_t smem_bytes, uint32_t *n_clusters)
{
    cudaFuncAttributes attributes;
    cudaError_t error = cudaFuncGetAttributes(&attributes, sum_parts);
    if (error != cudaSuccess)
        return error;
    return dtype == EPD_F16 ? sm90::prepare<backward<true>>(smem_bytes, n_clusters)
                            : sm90::prepare<backward<false>>(smem_bytes, n_clusters);
}

extern "C" cudaError_t sm90_backward_launch(const struct sm90_args *args, enum epd_dtype dtype,
                                            float *d_row_weights, cudaStream_t stream)
{
    cudaError_t error = dtype == EPD_F16 ? sm90::launch<backward<true>>(*args, stream)
                                         : sm90::launch<backward<false>>(*args, stream);
    if (error != cudaSuccess || !d_row_weights)
        return error;
    const sum_args sums = {args->row_sums, d_row_weights,  args->m_splits,
                           args->offsets,  args->max_rows, (args->outer + 63) / 64};
    sum_parts<<<dim3(SUM_BLOCKS, args->n_groups), SUM_THREADS, 0, stream>>>(sums);
    return cudaGetLastError();
}
