/* What a step reports: a few kilobytes of counts and records to host memory, then its ticket. A copy each would cost
 * the stream some 2 us apiece between two steps; this is one launch of one block. */
#include "kernels/cuda/exchange.cuh"

static constexpr uint32_t THREADS = 512;

static __global__ void __launch_bounds__(THREADS) report_kernel(const __grid_constant__ cuda_report_args a)
{
    for (uint32_t i = 0; i < a.n_parts; i++) {
        const cuda_report_part &part = a.parts[i];
        uint32_t *to = static_cast<uint32_t *>(part.to), *from = static_cast<uint32_t *>(part.from);
        for (uint32_t word = threadIdx.x; word < part.bytes / 4; word += THREADS) {
            to[word] = from[word];
            if (part.clear)
                from[word] = 0;
        }
    }
    if (!a.ticket)
        return;
    fence_system();
    __syncthreads();
    if (threadIdx.x == 0) {
        fence_system();
        *static_cast<volatile uint64_t *>(a.ticket) = a.value;
    }
}

enum epd_status report_load(struct epd_error *error)
{
    return kernel_load(reinterpret_cast<const void *>(report_kernel), 0, "report", error);
}

enum epd_status cuda_report_launch(const struct cuda_report_args *args, struct CUstream_st *stream,
                                   struct epd_error *error)
{
    void *arguments[] = {const_cast<struct cuda_report_args *>(args)};
    return cuda_check(cudaLaunchKernel(reinterpret_cast<const void *>(report_kernel), dim3(1), dim3(THREADS),
                                       arguments, 0, stream),
                      "report", error);
}
