/* The grouped GEMM of Hopper: D[outer, inner] = A[outer, r] B[inner, r]^T, tile after tile, fp32 accumulation.
 *
 * Persistent clusters of two blocks; block b of a cluster takes 128 outer rows, both share the inner side. In a block:
 *   warp 8   producer: copies A (own) and its half of the boxes of B (to both blocks) into a ring of stages
 *   warp 9   scheduler (first block of the cluster only): posts the next tile to both blocks
 *   warps 0-3, 4-7   two warpgroups, each 64 outer rows x the whole inner tile, then its own epilogue
 * The warpgroups are coupled only through the ring: one may be as many stages ahead as the ring has, so that one
 * stores its tile while the other keeps the tensor cores busy.
 *
 * Floor per tile and stage: 64 * 64 * inner * 2 / 4096 cycles of tensor time per warpgroup against 16 KiB of A and
 * inner * 64 bytes of B through the L2 per block (B is halved by the multicast). */
#ifndef EPD_KERNELS_GEMM_SM90_KERNEL_CUH
#define EPD_KERNELS_GEMM_SM90_KERNEL_CUH

#include "kernels/gemm/sm90_epilogue.cuh"
#include "kernels/gemm/sm90_schedule.cuh"
#include "kernels/gemm/sm90_wgmma.cuh"

namespace sm90
{

constexpr uint32_t A_BYTES = SM90_OUTER_ROWS * SM90_STEP * 2;
constexpr uint32_t CHUNK_BYTES = 64 * SM90_STEP * 2; /* 64 x 64 elements */
constexpr uint32_t ONES_BYTES = 1024;                /* 8 x 64 ones: dbias is a product with them */
constexpr int N_THREADS = 384;
constexpr uint32_t N_SLOTS = 2;                      /* posted tiles */
constexpr uint32_t SLOT_READERS = 2 * (8 + 1);       /* eight warps and the producer of both blocks */
constexpr uint32_t STAGE_READERS = 2 * 8;            /* eight warps of both blocks */

/* What differs between the layouts. */
template <enum epd_gemm_layout LAYOUT, bool IS_F16, bool IS_GATED = false> struct operation {
    static constexpr bool TOKENS_INNER = LAYOUT != EPD_GEMM_NT;
    static constexpr bool A_OUTER_MAJOR = LAYOUT != EPD_GEMM_TN;
    static constexpr bool B_OUTER_MAJOR = LAYOUT == EPD_GEMM_NT;
    static constexpr bool F16 = IS_F16;
    static constexpr bool GATED = IS_GATED;
};

struct mailbox {
    uint64_t full[SM90_MAX_STAGES], empty[SM90_MAX_STAGES];
    uint64_t tile_full[N_SLOTS], tile_empty[N_SLOTS];
    int4 tiles[N_SLOTS];
};

/* Shared memory: stages | staging of both warpgroups | ones | mailbox. */
struct shared_layout {
    uint32_t stages, staging, ones;
    mailbox *box;

    __device__ shared_layout(const sm90_args &args, uint8_t *smem)
    {
        stages = smem_address(smem);
        staging = stages + args.n_stages * args.stage_bytes;
        ones = staging + 2 * STAGING_BYTES;
        box = reinterpret_cast<mailbox *>(smem + (ones - stages) + ONES_BYTES);
    }
};

/* A place in the ring; parity flips at each turn. */
struct ring {
    uint32_t stage = 0, parity = 0;

    __device__ __forceinline__ void advance(uint32_t n_stages)
    {
        if (++stage == n_stages) {
            stage = 0;
            parity ^= 1;
        }
    }
};

struct tile_reader {
    mailbox *box;
    uint32_t leader_empty; /* cluster address of tile_empty[0] in the first block */
    ring at;

    __device__ tile_reader(mailbox *box_) : box(box_)
    {
        leader_empty = peer_address(smem_address(box->tile_empty), 0);
    }

    __device__ tile wait() const
    {
        barrier_wait_cluster(smem_address(&box->tile_full[at.stage]), at.parity);
        int4 posted = box->tiles[at.stage];
        return {posted.x, posted.y, posted.z, posted.w};
    }

    /* By one thread for each reader. */
    __device__ void release()
    {
        barrier_arrive_peer(leader_empty + at.stage * 8);
    }

    __device__ void advance()
    {
        at.advance(N_SLOTS);
    }
};

template <class Op> __device__ void schedule(const sm90_args &args, mailbox *box)
{
    scheduler<Op::TOKENS_INNER> tiles(args, blockIdx.x == 0);
    uint32_t number = blockIdx.x / 2, lane = threadIdx.x & 31;
    ring at;
    while (true) {
        tile next = tiles.find(number);
        if (lane < 2) {
            barrier_wait_cluster(smem_address(&box->tile_empty[at.stage]), at.parity ^ 1);
            store_cluster(peer_address(smem_address(&box->tiles[at.stage]), lane),
                          make_int4(next.group, next.row, next.rows, next.place));
            barrier_release_peer(peer_address(smem_address(&box->tile_full[at.stage]), lane));
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
__device__ __forceinline__ void load_a(const sm90_args &args, const CUtensorMap *map, uint32_t to, uint32_t barrier,
                                       const tile &now, uint32_t outer_tile, uint32_t step)
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
        load_2d_multicast(to, &args.b, barrier, 3, (now.place >> 16) * args.tile_inner + box_idx * 64, now.row + r);
}

/* Copies of B that a stage takes; none for the sums of dbias. */
template <class Op> __device__ __forceinline__ uint32_t count_boxes(const sm90_args &args, const tile &now)
{
    if constexpr (Op::TOKENS_INNER)
        return div_up(now.rows, args.box_rows);
    return (now.place >> 16) * args.tile_inner < args.inner ? args.tile_inner / 64 : 0;
}

template <class Op> __device__ void produce(const sm90_args &args, const shared_layout &shared)
{
    tile_reader tiles(shared.box);
    uint32_t rank = cluster_rank(), full = smem_address(shared.box->full), empty = smem_address(shared.box->empty);
    uint32_t box_bytes = (Op::TOKENS_INNER ? args.box_rows : 64) * SM90_STEP * 2;
    int last_group = -1;
    ring at;
    prefetch_map(&args.b);
    while (true) {
        tile now = tiles.wait();
        tiles.release();
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
    }
}

/* One warpgroup's view of the ring. */
struct consumer {
    const sm90_args &args;
    uint32_t stages, ones;
    uint32_t full;
    uint32_t peer_empty; /* lanes 0 and 1: empty[0] of either block */
    uint32_t warpgroup, lane, thread;
    ring at;

    __device__ consumer(const sm90_args &args_, const shared_layout &shared) : args(args_)
    {
        warpgroup = threadIdx.x / 128;
        thread = threadIdx.x & 127;
        lane = threadIdx.x & 31;
        stages = shared.stages;
        ones = shared.ones;
        full = smem_address(shared.box->full);
        peer_empty = peer_address(smem_address(shared.box->empty), lane & 1);
    }

    __device__ __forceinline__ void release(uint32_t stage) const
    {
        if (lane < 2)
            barrier_arrive_peer(peer_empty + stage * 8);
    }

    /* The rows of a ragged last step of NT that belong to the next group, zeroed in both operands (0 * NaN is NaN), up to
     * the next multiple of 16. Returns the number of 16-row parts that count. */
    __device__ uint32_t clear_tail(uint32_t stage_address, uint32_t rows, uint32_t n_b_chunks) const
    {
        uint32_t parts = div_up(rows, 16u), n_clear = parts * 16 - rows;
        uint32_t n_chunks = 1 + n_b_chunks; /* own half of A, all of B */
        for (uint32_t i = thread; i < n_clear * 8 * n_chunks; i += 128) {
            uint32_t chunk = i / (n_clear * 8), piece = i % (n_clear * 8);
            uint32_t base = stage_address + (chunk == 0 ? warpgroup * CHUNK_BYTES : A_BYTES + (chunk - 1) * CHUNK_BYTES);
            store_shared_zero(base + rows * 128 + piece * 16);
        }
        proxy_fence();
        warpgroup_sync(1 + warpgroup);
        return parts;
    }

    /* One 16-element part of a stage. With SUM, B is all ones. */
    template <class Op, int N, bool SUM>
    __device__ __forceinline__ void multiply_part(uint64_t a, uint64_t b, uint32_t keep, float (&d)[128]) const
    {
        if constexpr (SUM)
            wgmma<N, Op::F16, Op::A_OUTER_MAJOR, false>::run(d, a, descriptor(ones), keep);
        else
            wgmma<N, Op::F16, Op::A_OUTER_MAJOR, Op::B_OUTER_MAJOR>::run(d, a, b, keep);
    }

    /* d = sum over the reduction, `length` elements of it (TN, NN: the copy engine fills the last step with zeros). */
    template <class Op, int N, bool SUM>
    __device__ __forceinline__ void multiply(uint32_t length, float (&d)[128])
    {
        constexpr uint64_t A_PART = descriptor_step<Op::A_OUTER_MAJOR>(), B_PART = descriptor_step<Op::B_OUTER_MAJOR>();
        uint32_t before = ~0u;
        uint32_t n_steps = Op::TOKENS_INNER ? div_up(length, SM90_STEP) : length / SM90_STEP;
#pragma unroll 1
        for (uint32_t step = 0; step < n_steps; step++) {
            barrier_wait(full + at.stage * 8, at.parity);
            uint32_t address = stages + at.stage * args.stage_bytes;
            uint64_t a = descriptor(address + warpgroup * CHUNK_BYTES), b = descriptor(address + A_BYTES);
            wgmma_fence();
#pragma unroll
            for (uint32_t part = 0; part < 4; part++)
                multiply_part<Op, N, SUM>(a + part * A_PART, b + part * B_PART, step | part, d);
            wgmma_commit();
            wgmma_wait<1>();
            if (step > 0)
                release(before);
            before = at.stage;
            at.advance(args.n_stages);
        }
        wgmma_wait<0>();
        if (n_steps > 0)
            release(before);
        if (Op::TOKENS_INNER || length % SM90_STEP == 0)
            return;
        barrier_wait(full + at.stage * 8, at.parity);
        uint32_t address = stages + at.stage * args.stage_bytes;
        uint32_t n_parts = clear_tail(address, length % SM90_STEP, SUM ? 0 : args.tile_inner / 64);
        uint64_t a = descriptor(address + warpgroup * CHUNK_BYTES), b = descriptor(address + A_BYTES);
#pragma unroll 1
        for (uint32_t part = 0; part < n_parts; part++) {
            wgmma_fence();
            multiply_part<Op, N, SUM>(a + part * A_PART, b + part * B_PART, n_steps | part, d);
            wgmma_commit();
            wgmma_wait<0>();
        }
        release(at.stage);
        at.advance(args.n_stages);
    }
};

/* The inner size of the instruction is a compile-time number: one product loop for each. */
template <class Op>
__device__ __forceinline__ void multiply_tokens(consumer &with, uint32_t rows, float (&d)[128])
{
#define CASE(blocks)                                                                                         \
    case blocks:                                                                                             \
        with.multiply<Op, (blocks) * 8, false>(with.args.reduction, d);                                           \
        break
#define CASES(first)                                                                                         \
    CASE(first);                                                                                             \
    CASE(first + 1);                                                                                         \
    CASE(first + 2);                                                                                         \
    CASE(first + 3);                                                                                         \
    CASE(first + 4);                                                                                         \
    CASE(first + 5);                                                                                         \
    CASE(first + 6);                                                                                         \
    CASE(first + 7)
    switch (div_up(rows, 8u)) {
        CASES(1);
        CASES(9);
        CASES(17);
        CASES(25);
    default:
        break;
    }
#undef CASES
#undef CASE
}

template <class Op> __device__ __forceinline__ void multiply_columns(consumer &with, uint32_t rows, float (&d)[128])
{
    switch (with.args.tile_inner) {
    case 64:
        with.multiply<Op, 64, false>(rows, d);
        break;
    case 128:
        with.multiply<Op, 128, false>(rows, d);
        break;
    case 192:
        with.multiply<Op, 192, false>(rows, d);
        break;
    default:
        with.multiply<Op, 256, false>(rows, d);
        break;
    }
}

/* Bias of the thread's two outer rows of this tile. */
template <class Op>
__device__ __forceinline__ row_pair load_bias(const sm90_args &args, const epilogue_place &at, int group)
{
    row_pair bias = {0.0f, 0.0f};
    if (!args.bias)
        return bias;
    size_t base = static_cast<size_t>(group) * args.outer;
    uint32_t lane_row = at.lane >> 2;
    uint32_t low = at.outer_first + (Op::GATED ? at.warp * 8 : at.warp * 16) + lane_row;
    uint32_t high = Op::GATED ? args.outer / 2 + low : low + 8;
    if (low < (Op::GATED ? args.outer / 2 : args.outer))
        bias.low = load_any(args.bias, args.dtype_bias, base + low);
    if (high < args.outer)
        bias.high = load_any(args.bias, args.dtype_bias, base + high);
    return bias;
}

template <class Op, bool WEIGHTED>
__device__ __forceinline__ void finish_tokens(const sm90_args &args, epilogue_place &at, row_pair bias, float (&d)[128])
{
    if constexpr (Op::GATED) {
        if (args.c_data)
            store_preact<Op::F16>(args, at, d, bias);
        if (args.activation == EPD_SWIGLU)
            store_act<Op::F16, WEIGHTED, EPD_SWIGLU>(args, at, d, bias);
        else if (args.activation == EPD_GEGLU)
            store_act<Op::F16, WEIGHTED, EPD_GEGLU>(args, at, d, bias);
        else
            store_act<Op::F16, WEIGHTED, EPD_RELU2>(args, at, d, bias);
    } else if (args.dtype_c == EPD_F32) {
        store_tokens_f32<WEIGHTED>(args, at, d, bias);
    } else {
        store_tokens<Op::F16, WEIGHTED>(args, at, d, bias);
    }
}

/* All eight columns of the product with ones are the same: the first lane of four stores. */
__device__ __forceinline__ void store_dbias(const sm90_args &args, const epilogue_place &at, int group, float low,
                                            float high)
{
    for (uint32_t i = 0; i < 2; i++) {
        uint32_t outer = at.outer_first + at.warp * 16 + i * 8 + (at.lane >> 2);
        if ((at.lane & 3) != 0 || outer >= args.outer)
            continue;
        size_t element = static_cast<size_t>(group) * args.outer + outer;
        float old = args.accumulate ? load_any(args.dbias, args.dtype_bias, element) : 0.0f;
        store_any(args.dbias, args.dtype_bias, element, old + (i ? high : low));
    }
}

/* The matrix of the tile's group. */
__device__ __forceinline__ void *group_matrix(const sm90_args &args, int group)
{
    size_t group_bytes = static_cast<size_t>(args.outer) * args.inner * (args.dtype_c == EPD_F32 ? 4 : 2);
    return args.c_parts ? args.c_parts[group] : static_cast<uint8_t *>(args.c_data) + group * group_bytes;
}

__device__ __forceinline__ void finish_columns(const sm90_args &args, epilogue_place &at, const tile &now,
                                               float (&d)[128])
{
    uint32_t inner_first = (now.place >> 16) * args.tile_inner;
    const CUtensorMap *map = args.c_parts_map ? args.c_parts_map + now.group : &args.c;
    int group = args.c_parts_map ? 0 : now.group;
    if (args.c_parts_map)
        acquire_map(map);
    if (args.dtype_c == EPD_F32)
        store_columns_f32(args, at, map, group, inner_first, d);
    else if (args.accumulate && args.dtype_c == EPD_F16)
        add_columns<true>(args, at, group_matrix(args, now.group), inner_first, d);
    else if (args.accumulate)
        add_columns<false>(args, at, group_matrix(args, now.group), inner_first, d);
    else if (args.dtype_c == EPD_F16)
        store_columns<true>(args, at, map, group, inner_first, d);
    else
        store_columns<false>(args, at, map, group, inner_first, d);
}

/* One tile of NT; the tile after the last column is the sum of dY's rows. */
template <class Op>
__device__ __forceinline__ void finish_group(consumer &with, epilogue_place &at, const tile &now, float (&d)[128])
{
    const sm90_args &args = with.args;
    uint32_t inner_first = (now.place >> 16) * args.tile_inner;
    if (inner_first >= args.inner) {
        with.multiply<Op, 8, true>(now.rows, d);
        store_dbias(args, at, now.group, now.rows ? d[0] : 0.0f, now.rows ? d[2] : 0.0f);
    } else if (now.rows == 0) {
        store_zeros(args, at, group_matrix(args, now.group), inner_first);
    } else {
        multiply_columns<Op>(with, now.rows, d);
        finish_columns(args, at, now, d);
    }
}

template <class Op> __device__ void consume(const sm90_args &args, const shared_layout &shared)
{
    consumer with(args, shared);
    tile_reader tiles(shared.box);
    uint32_t rank = cluster_rank();
    epilogue_place at = {};
    at.staging = shared.staging + with.warpgroup * STAGING_BYTES;
    at.barrier = 1 + with.warpgroup;
    at.warp = with.thread / 32;
    at.lane = with.lane;
    while (true) {
        tile now = tiles.wait();
        __syncwarp();
        if (with.lane == 0)
            tiles.release();
        tiles.advance();
        if (now.group < 0)
            break;
        uint32_t first = ((now.place & 0xffff) * 2 + rank) * SM90_OUTER_ROWS + with.warpgroup * 64;
        at.outer_first = Op::GATED ? first / 2 : first;
        at.row = now.row;
        at.rows = now.rows;
        float d[128];
        if constexpr (Op::TOKENS_INNER) {
            row_pair bias = load_bias<Op>(args, at, now.group);
            multiply_tokens<Op>(with, now.rows, d);
            if (args.row_weights)
                finish_tokens<Op, true>(args, at, bias, d);
            else
                finish_tokens<Op, false>(args, at, bias, d);
        } else {
            finish_group<Op>(with, at, now, d);
        }
    }
    store_wait_read<0>();
}

template <class Op>
__global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(N_THREADS, 1) grouped(const __grid_constant__ sm90_args args)
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
        consume<Op>(args, shared);
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
    cudaError_t error = cudaFuncSetAttribute(grouped<Op>, cudaFuncAttributeMaxDynamicSharedMemorySize, smem_bytes);
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
