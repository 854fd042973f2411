/* NT, wgrad: dW[N, K] (+)= dY[m, N]^T X[m, K] per group, dbias[N] (+)= column sums of dY (a product with ones, one
 * more tile in each row of tiles). The reduction runs over the group's rows; rows of the next group that a last copy
 * brings are zeroed in shared memory. Floor: 2 m N K operations, or writing dW for short groups. */
#include "kernels/gemm/sm90_kernel.cuh"

template <bool F16> using nt = sm90::operation<EPD_GEMM_NT, F16>;

extern "C" cudaError_t sm90_nt_prepare(enum epd_dtype dtype, size_t smem_bytes, uint32_t *n_clusters)
{
    return dtype == EPD_F16 ? sm90::prepare<nt<true>>(smem_bytes, n_clusters)
                            : sm90::prepare<nt<false>>(smem_bytes, n_clusters);
}

extern "C" cudaError_t sm90_nt_launch(const struct sm90_args *args, enum epd_dtype dtype, cudaStream_t stream)
{
    return dtype == EPD_F16 ? sm90::launch<nt<true>>(*args, stream) : sm90::launch<nt<false>>(*args, stream);
}
