/* Gated activations on the rows of L groups, forward and backward (formulas: kernels.h).
 *   swiglu  f(g) = g s(g)          f'(g) = s + g s (1 - s)            s(x) = 1 / (1 + exp(-x))
 *   geglu   f(g) = g s(2 p(g))     f'(g) = s + g s (1 - s) 2 p'(g)    p(g) = sqrt(2/pi) (g + 0.044715 g^3)
 *   relu2   f(g) = max(g, 0)^2     f'(g) = 2 max(g, 0)
 * Memory-bound: forward reads 2F and writes F of a row, backward reads 3F and writes 2F or 3F; one warp per
 * row, so that the row's dot product stays in it. */
extern "C" {
#include "kernels/cuda/cuda.h"
}
#include "kernels/cuda/exchange.cuh"

static constexpr uint32_t WARPS = 8, THREADS = WARPS * 32, BLOCKS_PER_MULTIPROCESSOR = 8;
static constexpr uint32_t MAX_GROUPS = 2048;
static constexpr float GELU_TWO_SQRT_2_OVER_PI = 1.5957691216057308f, GELU_CUBIC = 0.044715f;

/* The groups of one launch, clamped, in shared memory. */
struct group_table {
    int64_t *first_row; /* [L] */
    int64_t *end;       /* [L] rows of this group and all before it */
    uint32_t n_groups;
};

static __device__ void record_bad_split(struct kernel_error *error, uint32_t group, int64_t got,
                                        int64_t allowed)
{
    if (blockIdx.x != 0 || error->status != 0)
        return;
    error->status = EPD_BAD_SPLITS;
    error->expert = (int32_t)group;
    error->token = -1;
    error->got = got;
    error->allowed = allowed;
}

/* One thread; the same clamps as the host's group cursor. */
static __device__ void table_fill(const group_table &table, const struct row_groups &groups,
                                  struct kernel_error *error)
{
    int64_t next = 0, end = 0, max_rows = groups.max_rows;
    for (uint32_t l = 0; l < table.n_groups; l++) {
        int64_t first = groups.offsets ? table.first_row[l] : next, split = table.end[l];
        if (first < 0 || first > max_rows) {
            record_bad_split(error, l, first, max_rows);
            first = first < 0 ? 0 : max_rows;
        }
        if (split < 0 || split > max_rows - first) {
            bool huge = split > INT64_MAX - first;
            record_bad_split(error, l, split < 0 ? split : huge ? INT64_MAX : first + split, max_rows);
            split = split < 0 ? 0 : max_rows - first;
        }
        next = first + split;
        end += split;
        table.first_row[l] = first;
        table.end[l] = end;
    }
}

/* Whole block. */
static __device__ group_table table_make(const struct row_groups &groups, int64_t *memory,
                                         struct kernel_error *error)
{
    group_table table = {memory, memory + groups.n_groups, groups.n_groups};
    for (uint32_t l = threadIdx.x; l < groups.n_groups; l += blockDim.x) {
        table.first_row[l] = groups.offsets ? groups.offsets[l] : 0;
        table.end[l] = groups.m_splits[l];
    }
    __syncthreads();
    if (threadIdx.x == 0)
        table_fill(table, groups, error);
    __syncthreads();
    return table;
}

/* The group of the i-th row of all groups. */
static __device__ __forceinline__ uint32_t table_find(const group_table &table, int64_t i)
{
    uint32_t low = 0, high = table.n_groups - 1;
    while (low < high) {
        uint32_t middle = (low + high) / 2;
        if (table.end[middle] > i)
            high = middle;
        else
            low = middle + 1;
    }
    return low;
}

static __device__ __forceinline__ int64_t table_row(const group_table &table, uint32_t group, int64_t i)
{
    return table.first_row[group] + i - (group ? table.end[group - 1] : 0);
}

/* The fast forms are exact enough below fp32. */
template <typename E> static __device__ __forceinline__ float sigmoid(float x)
{
    if constexpr (__is_same(E, float))
        return 1.0f / (1.0f + expf(-x));
    else
        return __fdividef(1.0f, 1.0f + __expf(-x));
}

/* f(g) and f'(g). */
template <typename E, enum epd_activation KIND>
static __device__ __forceinline__ void gate(float g, float *value, float *slope)
{
    if constexpr (KIND == EPD_RELU2) {
        g = g < 0.0f ? 0.0f : g; /* keeps a NaN */
        *value = g * g;
        *slope = 2.0f * g;
    } else if constexpr (KIND == EPD_GEGLU) {
        float s = sigmoid<E>(GELU_TWO_SQRT_2_OVER_PI * g * (1.0f + GELU_CUBIC * g * g));
        *value = g * s;
        *slope = s + g * s * (1.0f - s) * GELU_TWO_SQRT_2_OVER_PI * (1.0f + 3.0f * GELU_CUBIC * g * g);
    } else {
        float s = sigmoid<E>(g);
        *value = g * s;
        *slope = s + g * s * (1.0f - s);
    }
}

template <typename E, enum epd_activation KIND>
static __global__ void __launch_bounds__(THREADS) activation_kernel(const __grid_constant__ activation_args a)
{
    extern __shared__ int64_t memory[];
    constexpr int LANES = vec16<E>::LANES, BATCH = 2;
    group_table table = table_make(a.groups, memory, a.error);
    uint32_t lane = threadIdx.x % 32, n_vecs = a.ffn / LANES;
    int64_t n_rows = table.n_groups ? table.end[table.n_groups - 1] : 0;
    for (int64_t i = blockIdx.x * WARPS + threadIdx.x / 32; i < n_rows; i += gridDim.x * WARPS) {
        int64_t row = table_row(table, table_find(table, i), i);
        const uint4 *gates = static_cast<const uint4 *>(a.preact) + (size_t)row * 2 * n_vecs,
                    *ups = gates + n_vecs;
        uint4 *act = static_cast<uint4 *>(a.act) + (size_t)row * n_vecs;
        float weight = a.row_weights ? a.row_weights[row] : 1.0f;
        for (uint32_t first = lane; first < n_vecs; first += 32 * BATCH) {
            uint4 g[BATCH], u[BATCH];
#pragma unroll
            for (int b = 0; b < BATCH; b++)
                if (first + 32 * b < n_vecs) {
                    g[b] = load_once(gates + first + 32 * b);
                    u[b] = load_once(ups + first + 32 * b);
                }
#pragma unroll
            for (int b = 0; b < BATCH; b++) {
                if (first + 32 * b >= n_vecs)
                    break;
                float gs[LANES], us[LANES];
                vec16<E>::unpack(g[b], gs);
                vec16<E>::unpack(u[b], us);
#pragma unroll
                for (int j = 0; j < LANES; j++) {
                    float value, slope;
                    gate<E, KIND>(gs[j], &value, &slope);
                    gs[j] = value * (us[j] * weight);
                }
                act[first + 32 * b] = vec16<E>::pack(gs);
            }
        }
    }
}

/* 16 bytes of a row backward; everything is loaded before anything is stored, because outputs may be inputs.
 * Returns their part of <d_act, act>. */
template <typename E, enum epd_activation KIND>
static __device__ __forceinline__ float backward_vec(const activation_bwd_args &a, size_t at_gate,
                                                     size_t at_act, uint32_t n_vecs, float weight)
{
    constexpr int LANES = vec16<E>::LANES;
    const uint4 *preact = static_cast<const uint4 *>(a.preact);
    uint4 *d_preact = static_cast<uint4 *>(a.d_preact);
    uint4 g = load_once(preact + at_gate), u = load_once(preact + at_gate + n_vecs);
    uint4 d = load_once(static_cast<const uint4 *>(a.d_act) + at_act);
    float gs[LANES], us[LANES], ds[LANES], dot = 0.0f;
    vec16<E>::unpack(g, gs);
    vec16<E>::unpack(u, us);
    vec16<E>::unpack(d, ds);
#pragma unroll
    for (int j = 0; j < LANES; j++) {
        float value, slope, up = us[j], da = weight * ds[j];
        gate<E, KIND>(gs[j], &value, &slope);
        dot += ds[j] * (value * up);
        gs[j] = da * up * slope;
        us[j] = da * value;
        ds[j] = weight * value * up;
    }
    d_preact[at_gate] = vec16<E>::pack(gs);
    d_preact[at_gate + n_vecs] = vec16<E>::pack(us);
    if (a.weighted_act)
        static_cast<uint4 *>(a.weighted_act)[at_act] = vec16<E>::pack(ds);
    return dot;
}

/* This lane's part of <dy[row], bias2[group]>. */
template <typename E>
static __device__ __forceinline__ float bias_dot(const activation_bwd_args &a, int64_t row, uint32_t group,
                                                 uint32_t lane)
{
    constexpr int LANES = vec16<E>::LANES;
    uint32_t n_vecs = a.hidden / LANES;
    const uint4 *dy = static_cast<const uint4 *>(a.dy) + (size_t)row * n_vecs;
    const uint4 *bias = static_cast<const uint4 *>(a.bias2) + (size_t)group * n_vecs;
    float dot = 0.0f;
    for (uint32_t v = lane; v < n_vecs; v += 32) {
        float ys[LANES], bs[LANES];
        vec16<E>::unpack(load_once(dy + v), ys);
        vec16<E>::unpack(bias[v], bs);
#pragma unroll
        for (int j = 0; j < LANES; j++)
            dot += ys[j] * bs[j];
    }
    return dot;
}

template <typename E, enum epd_activation KIND>
static __global__ void __launch_bounds__(THREADS)
    activation_bwd_kernel(const __grid_constant__ activation_bwd_args a)
{
    extern __shared__ int64_t memory[];
    constexpr int LANES = vec16<E>::LANES;
    group_table table = table_make(a.groups, memory, a.error);
    uint32_t lane = threadIdx.x % 32, n_vecs = a.ffn / LANES;
    int64_t n_rows = table.n_groups ? table.end[table.n_groups - 1] : 0;
    for (int64_t i = blockIdx.x * WARPS + threadIdx.x / 32; i < n_rows; i += gridDim.x * WARPS) {
        uint32_t group = table_find(table, i);
        int64_t row = table_row(table, group, i);
        size_t at_gate = (size_t)row * 2 * n_vecs, at_act = (size_t)row * n_vecs;
        float weight = a.row_weights ? a.row_weights[row] : 1.0f, dot = 0.0f;
        for (uint32_t v = lane; v < n_vecs; v += 32)
            dot += backward_vec<E, KIND>(a, at_gate + v, at_act + v, n_vecs, weight);
        if (!a.d_row_weights)
            continue;
        if (a.bias2)
            dot += bias_dot<E>(a, row, group, lane);
        dot = warp_sum(dot);
        if (lane == 0)
            a.d_row_weights[row] = dot;
    }
}

template <typename E> static const void *forward_of(enum epd_activation kind)
{
    switch (kind) {
    case EPD_SWIGLU:
        return reinterpret_cast<const void *>(activation_kernel<E, EPD_SWIGLU>);
    case EPD_GEGLU:
        return reinterpret_cast<const void *>(activation_kernel<E, EPD_GEGLU>);
    case EPD_RELU2:
        return reinterpret_cast<const void *>(activation_kernel<E, EPD_RELU2>);
    default:
        return NULL;
    }
}

template <typename E> static const void *backward_of(enum epd_activation kind)
{
    switch (kind) {
    case EPD_SWIGLU:
        return reinterpret_cast<const void *>(activation_bwd_kernel<E, EPD_SWIGLU>);
    case EPD_GEGLU:
        return reinterpret_cast<const void *>(activation_bwd_kernel<E, EPD_GEGLU>);
    case EPD_RELU2:
        return reinterpret_cast<const void *>(activation_bwd_kernel<E, EPD_RELU2>);
    default:
        return NULL;
    }
}

static const void *kernel_of(enum epd_activation kind, enum epd_dtype dtype, bool backward)
{
    switch (dtype) {
    case EPD_BF16:
        return backward ? backward_of<__nv_bfloat16>(kind) : forward_of<__nv_bfloat16>(kind);
    case EPD_F16:
        return backward ? backward_of<__half>(kind) : forward_of<__half>(kind);
    case EPD_F32:
        return backward ? backward_of<float>(kind) : forward_of<float>(kind);
    default:
        return NULL;
    }
}

enum epd_status activation_load(struct epd_error *error)
{
    const enum epd_activation kinds[] = {EPD_SWIGLU, EPD_GEGLU, EPD_RELU2};
    const enum epd_dtype dtypes[] = {EPD_BF16, EPD_F16, EPD_F32};
    enum epd_status status = EPD_OK;
    for (int i = 0; i < 18 && status == EPD_OK; i++)
        status = kernel_load(kernel_of(kinds[i % 3], dtypes[i / 3 % 3], i >= 9), 0, "activation", error);
    return status;
}

static enum epd_status activation_check(const struct row_groups *groups, enum epd_dtype dtype, uint32_t ffn,
                                        const void *kernel, struct epd_error *error)
{
    if (!kernel)
        return error_set(error, EPD_INVALID_DTYPE, "activation: %s", dtype_name(dtype));
    if (ffn * dtype_bytes(dtype) % 16 != 0)
        return error_set(error, EPD_INVALID_SHAPE, "activation ffn: %u, want a multiple of 16 bytes", ffn);
    if (groups->n_groups > MAX_GROUPS)
        return error_set(error, EPD_UNSUPPORTED, "activation: %u groups, want at most %u", groups->n_groups,
                         MAX_GROUPS);
    return EPD_OK;
}

/* Enough blocks for the rows there may be; how many there are only the device knows. */
static enum epd_status rows_launch(const void *kernel, void *args, const struct row_groups *groups,
                                   struct CUstream_st *stream, struct epd_error *error)
{
    int device = 0, n_multiprocessors = 0;
    enum epd_status status = cuda_check(cudaGetDevice(&device), "activation", error);
    if (status == EPD_OK)
        status =
            cuda_check(cudaDeviceGetAttribute(&n_multiprocessors, cudaDevAttrMultiProcessorCount, device),
                       "activation", error);
    if (status != EPD_OK || groups->n_groups == 0)
        return status;
    int64_t most = (int64_t)n_multiprocessors * BLOCKS_PER_MULTIPROCESSOR,
            blocks = (groups->max_rows + WARPS - 1) / WARPS;
    blocks = blocks < 1 ? 1 : blocks > most ? most : blocks;
    void *arguments[] = {args};
    return cuda_check(cudaLaunchKernel(kernel, dim3((unsigned)blocks), dim3(THREADS), arguments,
                                       groups->n_groups * 2 * sizeof(int64_t), stream),
                      "activation", error);
}

enum epd_status cuda_activation_launch(const struct activation_args *args, struct CUstream_st *stream,
                                       struct epd_error *error)
{
    const void *kernel = kernel_of(args->kind, args->dtype, false);
    enum epd_status status = activation_check(&args->groups, args->dtype, args->ffn, kernel, error);
    if (status != EPD_OK)
        return status;
    if (!aligned16(args->preact) || !aligned16(args->act))
        return error_set(error, EPD_INVALID_ALIGNMENT, "activation: preact and act want 16-byte alignment");
    struct activation_args copy = *args;
    return rows_launch(kernel, &copy, &args->groups, stream, error);
}

enum epd_status cuda_activation_bwd_launch(const struct activation_bwd_args *args, struct CUstream_st *stream,
                                           struct epd_error *error)
{
    const void *kernel = kernel_of(args->kind, args->dtype, true);
    enum epd_status status = activation_check(&args->groups, args->dtype, args->ffn, kernel, error);
    if (status != EPD_OK)
        return status;
    if (args->bias2 && args->hidden * dtype_bytes(args->dtype) % 16 != 0)
        return error_set(error, EPD_INVALID_SHAPE, "activation_bwd hidden: %u, want a multiple of 16 bytes",
                         args->hidden);
    if (!aligned16(args->preact) || !aligned16(args->d_act) || !aligned16(args->d_preact) ||
        !aligned16(args->weighted_act) || !aligned16(args->dy) || !aligned16(args->bias2))
        return error_set(error, EPD_INVALID_ALIGNMENT, "activation_bwd: buffers want 16-byte alignment");
    struct activation_bwd_args copy = *args;
    return rows_launch(kernel, &copy, &args->groups, stream, error);
}
