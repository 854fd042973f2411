/* The two warpgroups of a block that multiply: products over the stages of the ring, then the tile's epilogue. */
#ifndef EPD_KERNELS_GEMM_SM90_CONSUMER_CUH
#define EPD_KERNELS_GEMM_SM90_CONSUMER_CUH

#include "kernels/gemm/sm90_pipeline.cuh"
#include "kernels/gemm/sm90_wgmma.cuh"

namespace sm90 {

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
            uint32_t base =
                stage_address + (chunk == 0 ? warpgroup * CHUNK_BYTES : A_BYTES + (chunk - 1) * CHUNK_BYTES);
            store_shared_zero(base + rows * 128 + piece * 16);
        }
        proxy_fence();
        warpgroup_sync(1 + warpgroup);
        return parts;
    }

    /* One 16-element part of a stage. With SUM, B is all ones. */
    template <class Op, int N, bool SUM>
    __device__ __forceinline__ void multiply_part(uint64_t a, uint64_t b, uint32_t keep,
                                                  float (&d)[128]) const
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
        constexpr uint64_t A_PART = descriptor_step<Op::A_OUTER_MAJOR>(),
                           B_PART = descriptor_step<Op::B_OUTER_MAJOR>();
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
        with.multiply<Op, (blocks)*8, false>(with.args.reduction, d);                                        \
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

template <class Op>
__device__ __forceinline__ void multiply_columns(consumer &with, uint32_t rows, float (&d)[128])
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
__device__ __forceinline__ void finish_tokens(const sm90_args &args, epilogue_place &at, row_pair bias,
                                              float (&d)[128])
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
__device__ __forceinline__ void store_dbias(const sm90_args &args, const epilogue_place &at, int group,
                                            float low, float high)
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
__device__ __forceinline__ void finish_group(consumer &with, epilogue_place &at, const tile &now,
                                             float (&d)[128])
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

} // namespace sm90

#endif
