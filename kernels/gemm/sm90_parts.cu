/* Weights given as L pointers in device memory: the copy engine wants a tensor map each. The maps differ in nothing but
 * the address, so one small kernel ahead of the product writes them: L * 128 bytes. */
#include "kernels/gemm/sm90_args.h"

static __global__ void write_maps(const __grid_constant__ CUtensorMap pattern, const void *const *parts,
                                  uint32_t n_groups, CUtensorMap *maps)
{
    uint32_t group = blockIdx.x * blockDim.x + threadIdx.x;
    if (group >= n_groups)
        return;
    CUtensorMap *map = maps + group;
    *map = pattern;
    asm volatile("tensormap.replace.tile.global_address.global.b1024.b64 [%0], %1;" ::"l"(map),
                 "l"(parts[group])
                 : "memory");
    asm volatile("fence.proxy.tensormap::generic.release.gpu;" ::: "memory");
}

extern "C" cudaError_t sm90_parts_prepare(void)
{
    cudaFuncAttributes attributes;
    return cudaFuncGetAttributes(&attributes, write_maps);
}

extern "C" cudaError_t sm90_parts_launch(const CUtensorMap *template_map, const void *const *parts,
                                         uint32_t n_groups, CUtensorMap *maps, cudaStream_t stream)
{
    write_maps<<<(n_groups + 63) / 64, 64, 0, stream>>>(*template_map, parts, n_groups, maps);
    return cudaGetLastError();
}
