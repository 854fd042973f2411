/* Hopper instructions the grouped GEMM is made of, one thin wrapper each: shared-memory barriers, tensor copies,
 * cluster addressing, warpgroup registers. Shared addresses are 32-bit (shared window). Device code only. */
#ifndef EPD_KERNELS_GEMM_SM90_PTX_CUH
#define EPD_KERNELS_GEMM_SM90_PTX_CUH

#include <cuda.h>
#include <stdint.h>

namespace sm90 {

__device__ __forceinline__ uint32_t smem_address(const void *pointer)
{
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ uint32_t thread_idx()
{
    uint32_t idx;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(idx));
    return idx;
}

__device__ __forceinline__ uint32_t cluster_rank()
{
    uint32_t rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

/* The address of the same variable in another block of the cluster. */
__device__ __forceinline__ uint32_t peer_address(uint32_t address, uint32_t rank)
{
    uint32_t peer;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(peer) : "r"(address), "r"(rank));
    return peer;
}

__device__ __forceinline__ void cluster_sync()
{
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::
                     : "memory");
}

__device__ __forceinline__ void barrier_init(uint32_t barrier, uint32_t n_arrivals)
{
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(n_arrivals));
}

__device__ __forceinline__ void barrier_init_fence()
{
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void barrier_expect(uint32_t barrier, uint32_t bytes)
{
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
                 : "memory");
}

/* `barrier` is a cluster address (peer_address). Orders nothing for the other block: it says that reading is over, and a
 * release of cluster scope would cost a memory barrier at every pipeline stage (seen: a third of the speed). */
__device__ __forceinline__ void barrier_arrive_peer(uint32_t barrier)
{
    asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
}

/* The same when `loaded`, a word that this thread has loaded, is there (it is never 0x7fffffff). An arrival is a message to the
 * other block and does not wait for loads issued before it: these may stand behind the operands of the tensor cores, and what
 * they are to read was overwritten first (seen: a warp took the next tile for its own, and the block hung). */
__device__ __forceinline__ void barrier_arrive_peer_after(uint32_t barrier, uint32_t loaded)
{
    asm volatile("{\n"
                 ".reg .pred known;\n"
                 "setp.ne.u32 known, %1, 0x7fffffff;\n"
                 "@known mbarrier.arrive.shared::cluster.b64 _, [%0];\n"
                 "}" ::"r"(barrier),
                 "r"(loaded)
                 : "memory");
}

/* 16 bytes into a block's shared memory; its barrier completes a phase by their arrival. Nobody fences: a release of
 * cluster scope is a memory barrier of the whole GPU, its acquire empties the L1 (seen: 450 cycles a tile). Addresses
 * are cluster addresses. */
__device__ __forceinline__ void post_16_bytes(uint32_t address, uint32_t barrier, int4 value)
{
    asm volatile("mbarrier.arrive.expect_tx.shared::cluster.b64 _, [%0], 16;" ::"r"(barrier) : "memory");
    asm volatile(
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.s32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(
            address),
        "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w), "r"(barrier)
        : "memory");
}

__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity)
{
    asm volatile("{\n"
                 ".reg .pred done;\n"
                 "again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
                 "@!done bra again;\n"
                 "}" ::"r"(barrier),
                 "r"(parity)
                 : "memory");
}

__device__ __forceinline__ void prefetch_map(const CUtensorMap *map)
{
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

/* Makes a tensor map that another kernel wrote visible to the copy engine. */
__device__ __forceinline__ void acquire_map(const CUtensorMap *map)
{
    asm volatile("fence.proxy.tensormap::generic.acquire.gpu [%0], 128;" ::"l"(map) : "memory");
}

__device__ __forceinline__ void load_2d(uint32_t to, const CUtensorMap *map, uint32_t barrier, int x, int y)
{
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, "
                 "{%3, %4}], [%2];" ::"r"(to),
                 "l"(map), "r"(barrier), "r"(x), "r"(y)
                 : "memory");
}

/* Into the same place of every block in `mask`, each one's barrier being told. */
__device__ __forceinline__ void load_2d_multicast(uint32_t to, const CUtensorMap *map, uint32_t barrier,
                                                  uint16_t mask, int x, int y)
{
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
        "[%0], [%1, {%4, %5}], [%2], %3;" ::"r"(to),
        "l"(map), "r"(barrier), "h"(mask), "r"(x), "r"(y)
        : "memory");
}

__device__ __forceinline__ void load_3d(uint32_t to, const CUtensorMap *map, uint32_t barrier, int x, int y,
                                        int z)
{
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes "
                 "[%0], [%1, {%3, %4, %5}], [%2];" ::"r"(to),
                 "l"(map), "r"(barrier), "r"(x), "r"(y), "r"(z)
                 : "memory");
}

/* Gate and up rows in turns of eight: {k, row in 8, half, 8-row block, group}. */
__device__ __forceinline__ void load_5d(uint32_t to, const CUtensorMap *map, uint32_t barrier, int x,
                                        int block, int z)
{
    asm volatile("cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes "
                 "[%0], [%1, {%3, %4, %4, %5, %6}], [%2];" ::"r"(to),
                 "l"(map), "r"(barrier), "r"(x), "r"(0), "r"(block), "r"(z)
                 : "memory");
}

/* Shared to global, in the background; the issuing thread commits and may later wait until shared memory was read. */
__device__ __forceinline__ void store_2d(const CUtensorMap *map, uint32_t from, int x, int y)
{
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(map),
                 "r"(from), "r"(x), "r"(y)
                 : "memory");
}

__device__ __forceinline__ void store_3d(const CUtensorMap *map, uint32_t from, int x, int y, int z)
{
    asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(map),
                 "r"(from), "r"(x), "r"(y), "r"(z)
                 : "memory");
}

/* global += shared, element by element, where the memory is. */
__device__ __forceinline__ void add_3d(const CUtensorMap *map, uint32_t from, int x, int y, int z)
{
    asm volatile(
        "cp.reduce.async.bulk.tensor.3d.global.shared::cta.add.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(
            map),
        "r"(from), "r"(x), "r"(y), "r"(z)
        : "memory");
}

__device__ __forceinline__ void store_commit()
{
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

/* Until all but the last PENDING commits of this thread have read shared memory. */
template <int PENDING> __device__ __forceinline__ void store_wait_read()
{
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(PENDING) : "memory");
}

template <int N> __device__ __forceinline__ void registers_raise()
{
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}

template <int N> __device__ __forceinline__ void registers_lower()
{
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}

/* A barrier of the 128 threads of one warpgroup; id 1.. (0 is __syncthreads). */
__device__ __forceinline__ void warpgroup_sync(uint32_t id)
{
    asm volatile("bar.sync %0, 128;" ::"r"(id) : "memory");
}

/* Plain shared stores before it are seen by wgmma after the next barrier. */
__device__ __forceinline__ void proxy_fence()
{
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

/* Four 8x8 blocks of 16-bit values, each stored transposed: lane l gives the address of row l % 8 of block l / 8. */
__device__ __forceinline__ void store_matrix_transposed(uint32_t address, uint32_t a, uint32_t b, uint32_t c,
                                                        uint32_t d)
{
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
                 "r"(a), "r"(b), "r"(c), "r"(d)
                 : "memory");
}

__device__ __forceinline__ void store_matrix(uint32_t address, uint32_t a, uint32_t b, uint32_t c, uint32_t d)
{
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(a),
                 "r"(b), "r"(c), "r"(d)
                 : "memory");
}

__device__ __forceinline__ float exp2_fast(float x)
{
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ float reciprocal_fast(float x)
{
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/* The inverse of store_matrix_transposed: the same addresses give the same four registers. */
__device__ __forceinline__ uint4 load_matrix_transposed(uint32_t address)
{
    uint4 value;
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
                 : "r"(address)
                 : "memory");
    return value;
}

__device__ __forceinline__ float load_shared_float(uint32_t address)
{
    float value;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(value) : "r"(address) : "memory");
    return value;
}

__device__ __forceinline__ uint4 load_shared(uint32_t address)
{
    uint4 value;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
                 : "r"(address)
                 : "memory");
    return value;
}

__device__ __forceinline__ void store_shared_pair(uint32_t address, float a, float b)
{
    asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(address), "f"(a), "f"(b) : "memory");
}

__device__ __forceinline__ void store_shared_zero(uint32_t address)
{
    asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(address), "r"(0) : "memory");
}

} // namespace sm90

#endif
