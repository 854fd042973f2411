/* The grouped GEMM of Hopper: D[outer, inner] = A[outer, r] B[inner, r]^T, tile after tile, fp32 accumulation.
 *
 * Persistent clusters of two blocks; block b of a cluster takes 128 outer rows, both share the inner side. In a block:
 *   warp 8   producer: copies A (own) and its half of the boxes of B (to both blocks) into a ring of stages
 *   warp 9   scheduler (first block of the cluster only): posts the next tile to both blocks
 *   warps 0-3, 4-7   two warpgroups, each 64 outer rows x the whole inner tile, then its own epilogue
 * The warpgroups are coupled only through the ring. Stages of the next tile are fetched during an epilogue.
 *
 * Floor per tile and stage: 64 * 64 * inner * 2 / 4096 cycles of tensor time per warpgroup against 16 KiB of A and
 * inner * 64 bytes of B through the L2 per block (B is halved by the multicast). */
#ifndef EPD_KERNELS_GEMM_SM90_KERNEL_CUH
#define EPD_KERNELS_GEMM_SM90_KERNEL_CUH

#include "kernels/gemm/sm90_consumer.cuh"
#include "kernels/gemm/sm90_groups.cuh"
#include "kernels/gemm/sm90_pipeline.cuh"

namespace sm90 {

template <class Op> __device__ void schedule(const sm90_args &args, mailbox *box)
{
    scheduler<Op::TOKENS_INNER> tiles(args, blockIdx.x == 0);
    uint32_t number = blockIdx.x / 2, lane = threadIdx.x & 31;
    ring at;
    while (true) {
        tile next = tiles.find(number);
        if (lane < 2) {
            barrier_wait(smem_address(&box->tile_empty[at.stage]), at.parity ^ 1);
            post_16_bytes(peer_address(smem_address(&box->tiles[at.stage]), lane),
                          peer_address(smem_address(&box->tile_full[at.stage]), lane),
                          make_int4(next.group, next.row, next.rows, next.place));
        }
        __syncwarp();
        if (next.group < 0)
            break;
        at.advance(N_SLOTS);
        if (lane == 0)
            number = args.n_clusters + atomicAdd(&args.counters->next_tile, 1u);
        number = __shfl_sync(~0u, number, 0);
    }
    /* The last cluster to finish leaves the counters as it found them. */
    if (lane == 0 && atomicAdd(&args.counters->n_finished, 1u) == args.n_clusters - 1) {
        args.counters->next_tile = 0;
        args.counters->n_finished = 0;
    }
}

template <class Op>
__device__ __forceinline__ void load_a(const sm90_args &args, const CUtensorMap *map, uint32_t to,
                                       uint32_t barrier, const tile &now, uint32_t outer_tile, uint32_t step)
{
    int outer = outer_tile * SM90_OUTER_ROWS, r = step * SM90_STEP, group = args.a_parts ? 0 : now.group;
    if constexpr (!Op::TOKENS_INNER) {
        load_2d(to, map, barrier, outer, now.row + r);
        load_2d(to + CHUNK_BYTES, map, barrier, outer + 64, now.row + r);
    } else if constexpr (Op::A_OUTER_MAJOR) {
        load_3d(to, map, barrier, outer, r, group);
        load_3d(to + CHUNK_BYTES, map, barrier, outer + 64, r, group);
    } else if constexpr (Op::GATED) {
        load_5d(to, map, barrier, r, outer / 16, group);
    } else {
        load_3d(to, map, barrier, r, outer, group);
    }
}

template <class Op>
__device__ __forceinline__ void load_b(const sm90_args &args, uint32_t to, uint32_t barrier, const tile &now,
                                       uint32_t box_idx, uint32_t step)
{
    int r = step * SM90_STEP;
    if constexpr (Op::TOKENS_INNER)
        load_2d_multicast(to, &args.b, barrier, 3, r, now.row + box_idx * args.box_rows);
    else
        load_2d_multicast(to, &args.b, barrier, 3, (now.place >> 16) * args.tile_inner + box_idx * 64,
                          now.row + r);
}

/* Copies of B that a stage takes; none for the sums of dbias. */
template <class Op> __device__ __forceinline__ uint32_t count_boxes(const sm90_args &args, const tile &now)
{
    if constexpr (Op::TOKENS_INNER)
        return div_up(now.rows, args.box_rows);
    return (now.place >> 16) * args.tile_inner < args.inner ? args.tile_inner / 64 : 0;
}

/* Gates and ups of the tile behind its products, 64 tokens a stage; each block its own. */
__device__ __forceinline__ void produce_preact(const sm90_args &args, const shared_layout &shared, ring &at,
                                               const tile &now, uint32_t outer_tile)
{
    uint32_t full = smem_address(shared.box->full), empty = smem_address(shared.box->empty);
    for (int first = 0; first < now.rows; first += 64) {
        uint32_t barrier = full + at.stage * 8, to = shared.stages + at.stage * args.stage_bytes;
        barrier_wait(empty + at.stage * 8, at.parity ^ 1);
        barrier_expect(barrier, 4 * CHUNK_BYTES);
        for (int part = 0; part < 4; part++)
            load_3d(to + part * CHUNK_BYTES, &args.preact, barrier,
                    outer_tile * SM90_OUTER_ROWS + part % 2 * 64, part / 2, now.row + first);
        at.advance(args.n_stages);
    }
}

template <class Op> __device__ void produce(const sm90_args &args, const shared_layout &shared)
{
    typename reader_of<Op>::type tiles(shared.box);
    uint32_t rank = cluster_rank(), full = smem_address(shared.box->full),
             empty = smem_address(shared.box->empty);
    uint32_t box_bytes = (Op::TOKENS_INNER ? args.box_rows : 64) * SM90_STEP * 2;
    int last_group = -1;
    ring at;
    prefetch_map(&args.b);
    while (true) {
        tile now = tiles.wait();
        tiles.release(static_cast<uint32_t>(now.group));
        tiles.advance();
        if (now.group < 0)
            return;
        const CUtensorMap *map = args.a_parts ? args.a_parts + now.group : &args.a;
        if (args.a_parts && now.group != last_group)
            acquire_map(map);
        last_group = now.group;
        uint32_t n_steps = div_up(Op::TOKENS_INNER ? args.reduction : now.rows, SM90_STEP);
        uint32_t n_boxes = count_boxes<Op>(args, now);
        uint32_t outer_tile = (now.place & 0xffff) * 2 + rank;
        for (uint32_t step = 0; step < n_steps; step++) {
            uint32_t barrier = full + at.stage * 8, to = shared.stages + at.stage * args.stage_bytes;
            barrier_wait(empty + at.stage * 8, at.parity ^ 1);
            barrier_expect(barrier, A_BYTES + n_boxes * box_bytes);
            load_a<Op>(args, map, to, barrier, now, outer_tile, step);
            for (uint32_t i = rank; i < n_boxes; i += 2)
                load_b<Op>(args, to + A_BYTES + i * box_bytes, barrier, now, i, step);
            at.advance(args.n_stages);
        }
        if constexpr (Op::BACKWARD)
            produce_preact(args, shared, at, now, outer_tile);
    }
}

template <class Op>
__global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(N_THREADS, 1)
    grouped(const __grid_constant__ sm90_args args)
{
    extern __shared__ __align__(1024) uint8_t smem[];
    shared_layout shared(args, smem);
    if (threadIdx.x == 0) {
        for (uint32_t i = 0; i < SM90_MAX_STAGES; i++) {
            barrier_init(smem_address(&shared.box->full[i]), 1);
            barrier_init(smem_address(&shared.box->empty[i]), STAGE_READERS);
        }
        for (uint32_t i = 0; i < N_SLOTS; i++) {
            barrier_init(smem_address(&shared.box->tile_full[i]), 1);
            barrier_init(smem_address(&shared.box->tile_empty[i]), SLOT_READERS);
        }
        barrier_init_fence();
    }
    if constexpr (!Op::TOKENS_INNER) {
        uint32_t one = Op::F16 ? 0x3c003c00u : 0x3f803f80u;
        if (threadIdx.x < ONES_BYTES / 4)
            reinterpret_cast<uint32_t *>(smem + (shared.ones - shared.stages))[threadIdx.x] = one;
        proxy_fence();
    }
    cluster_sync();
    if (threadIdx.x >= 256) {
        registers_lower<40>();
        if (threadIdx.x == 256)
            produce<Op>(args, shared);
        else if (threadIdx.x / 32 == 9 && cluster_rank() == 0)
            schedule<Op>(args, shared.box);
        __syncwarp();
    } else {
        registers_raise<232>();
        if constexpr (Op::TOKENS_INNER)
            consume<Op>(args, shared);
        else
            consume_groups<Op>(args, shared);
    }
    /* Nobody leaves while the other block may still copy to it or tell it something. */
    cluster_sync();
}

inline size_t shared_bytes(uint32_t n_stages, uint32_t stage_bytes)
{
    return static_cast<size_t>(n_stages) * stage_bytes + 2 * STAGING_BYTES + ONES_BYTES + sizeof(mailbox);
}

/* Loads the kernel and says how many clusters run at the same time. */
template <class Op> cudaError_t prepare(size_t smem_bytes, uint32_t *n_clusters)
{
    cudaFuncAttributes attributes;
    cudaError_t error = cudaFuncGetAttributes(&attributes, grouped<Op>);
    /* The limit is the kernel's: other plans of this device may need more than this one. */
    if (error == cudaSuccess && static_cast<size_t>(attributes.maxDynamicSharedSizeBytes) < smem_bytes)
        error = cudaFuncSetAttribute(grouped<Op>, cudaFuncAttributeMaxDynamicSharedMemorySize, smem_bytes);
    if (error != cudaSuccess)
        return error;
    cudaLaunchAttribute cluster = {};
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = 2;
    cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(2);
    config.blockDim = dim3(N_THREADS);
    config.dynamicSmemBytes = smem_bytes;
    config.attrs = &cluster;
    config.numAttrs = 1;
    int n = 0;
    error = cudaOccupancyMaxActiveClusters(&n, grouped<Op>, &config);
    *n_clusters = n > 0 ? n : 1;
    return error;
}

template <class Op> cudaError_t launch(const sm90_args &args, cudaStream_t stream)
{
    size_t smem_bytes = shared_bytes(args.n_stages, args.stage_bytes);
    grouped<Op><<<2 * args.n_clusters, N_THREADS, smem_bytes, stream>>>(args);
    return cudaGetLastError();
}

} // namespace sm90

#endif
