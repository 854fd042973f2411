/* TN, fprop: Y[m, N] = X[m, K] W[N, K]^T (+ bias) per group, or act[m, F] = f(gate) up from W[2F, K].
 * Moves each weight once from memory and X, Y once if they fit the L2; 2 m N K operations. Floor: the tensor cores at
 * about 790 TFLOP/s from some 300 rows per group up, reading the weights below. */
#include "kernels/gemm/sm90_kernel.cuh"

template <bool F16, bool GATED> using tn = sm90::operation<EPD_GEMM_TN, F16, GATED>;

extern "C" cudaError_t sm90_tn_prepare(enum epd_dtype dtype, int gated, size_t smem_bytes,
                                       uint32_t *n_clusters)
{
    if (gated)
        return dtype == EPD_F16 ? sm90::prepare<tn<true, true>>(smem_bytes, n_clusters)
                                : sm90::prepare<tn<false, true>>(smem_bytes, n_clusters);
    return dtype == EPD_F16 ? sm90::prepare<tn<true, false>>(smem_bytes, n_clusters)
                            : sm90::prepare<tn<false, false>>(smem_bytes, n_clusters);
}

extern "C" cudaError_t sm90_tn_launch(const struct sm90_args *args, enum epd_dtype dtype, cudaStream_t stream)
{
    if (args->activation)
        return dtype == EPD_F16 ? sm90::launch<tn<true, true>>(*args, stream)
                                : sm90::launch<tn<false, true>>(*args, stream);
    return dtype == EPD_F16 ? sm90::launch<tn<true, false>>(*args, stream)
                            : sm90::launch<tn<false, false>>(*args, stream);
}

extern "C" size_t sm90_smem_bytes(uint32_t n_stages, uint32_t stage_bytes)
{
    return sm90::shared_bytes(n_stages, stage_bytes);
}
