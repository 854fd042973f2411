/* NN, dgrad: dX[m, K] = dY[m, N] W[N, K] per group. As TN, but the weights lie with the outer side contiguous; the
 * tensor cores read them so. */
#include "kernels/gemm/sm90_kernel.cuh"

template <bool F16> using nn = sm90::operation<EPD_GEMM_NN, F16>;

extern "C" cudaError_t sm90_nn_prepare(enum epd_dtype dtype, size_t smem_bytes, uint32_t *n_clusters)
{
    return dtype == EPD_F16 ? sm90::prepare<nn<true>>(smem_bytes, n_clusters)
                            : sm90::prepare<nn<false>>(smem_bytes, n_clusters);
}

extern "C" cudaError_t sm90_nn_launch(const struct sm90_args *args, enum epd_dtype dtype, cudaStream_t stream)
{
    return dtype == EPD_F16 ? sm90::launch<nn<true>>(*args, stream) : sm90::launch<nn<false>>(*args, stream);
}
