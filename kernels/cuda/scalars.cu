/* gather_scalars: value [C] of every rank -> out [T, K]. The rank that holds a row knows its token: it writes
 * the scalar into the workspace of the token's rank, which copies it out. 4 T K bytes each way; a matter of
 * latency. */
#include "kernels/cuda/exchange.cuh"

static constexpr uint32_t THREADS = 1024;

static __device__ __forceinline__ float *scalars_of(const struct cuda_exchange &x, uint32_t rank)
{
    return reinterpret_cast<float *>(workspace_of(x, rank) + x.layout.scalars);
}

static __device__ void push_scalars(const struct cuda_gather_scalars_args &a)
{
    const struct cuda_exchange &x = a.exchange;
    uint32_t slots = x.shape.max_tokens * x.shape.top_k;
    int64_t n_rows = a.routing.base.offsets[x.shape.n_local_experts];
    for (int64_t row = blockIdx.x * THREADS + threadIdx.x; row < n_rows; row += gridDim.x * THREADS) {
        int32_t source = a.routing.base.source[row] - (int32_t)first_source(x);
        if (source < 0 || source / slots >= x.shape.world_size)
            continue;
        float sum = 0.0f;
        for (uint32_t part = 0; part < a.n_parts; part++)
            sum += a.value[(size_t)row * a.n_parts + part];
        scalars_of(x, source / slots)[source % slots] = sum;
    }
}

/* Once every block of this rank has pushed, the last one tells the peers. Whole block. */
static __device__ void tell_pushed(const struct cuda_exchange &x, uint32_t epoch)
{
    __shared__ bool last;
    __syncthreads();
    if (threadIdx.x == 0) {
        fence_system();
        last = atomicAdd(&state_of(x)->pushed, 1) == gridDim.x - 1;
    }
    __syncthreads();
    if (last)
        signals_raise(x, SIGNAL_SCALARS, epoch);
}

static __device__ void copy_scalars(const struct cuda_gather_scalars_args &a)
{
    const struct cuda_exchange &x = a.exchange;
    const float *scalars = scalars_of(x, x.shape.rank);
    uint32_t n = x.shape.n_tokens * x.shape.top_k;
    for (uint32_t i = blockIdx.x * THREADS + threadIdx.x; i < n; i += gridDim.x * THREADS) {
        float value = a.routing.base.row[i] >= 0 ? scalars[i] : 0.0f;
        a.out[i] = a.accumulate ? a.out[i] + value : value;
    }
}

static __global__ void __launch_bounds__(THREADS)
    scalars_kernel(const __grid_constant__ cuda_gather_scalars_args a)
{
    const struct cuda_exchange &x = a.exchange;
    uint32_t epoch = op_enter(x);
    bool ok = true;
    if (does(x, CUDA_STAGE_SEND)) {
        ok = signals_wait(x, SIGNAL_ENTERED, epoch);
        if (ok) {
            push_scalars(a);
            tell_pushed(x, epoch);
        }
    }
    if (ok && does(x, CUDA_STAGE_RECEIVE) && signals_wait(x, SIGNAL_SCALARS, epoch))
        copy_scalars(a);
    op_leave(x, epoch);
}

enum epd_status scalars_load(struct epd_error *error)
{
    return kernel_load(reinterpret_cast<const void *>(scalars_kernel), 0, "gather_scalars", error);
}

enum epd_status cuda_gather_scalars_launch(const struct cuda_gather_scalars_args *args,
                                           struct CUstream_st *stream, struct epd_error *error)
{
    enum epd_status status = exchange_check(&args->exchange, "gather_scalars", error);
    if (status != EPD_OK)
        return status;
    void *arguments[] = {const_cast<struct cuda_gather_scalars_args *>(args)};
    return cuda_check(cudaLaunchKernel(reinterpret_cast<const void *>(scalars_kernel),
                                       dim3(blocks_of(&args->exchange)), dim3(THREADS), arguments, 0, stream),
                      "gather_scalars", error);
}
