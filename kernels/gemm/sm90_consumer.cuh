/* The two warpgroups of a block that multiply: a tile's products, then its epilogue. */
#ifndef EPD_KERNELS_GEMM_SM90_CONSUMER_CUH
#define EPD_KERNELS_GEMM_SM90_CONSUMER_CUH

#include "kernels/gemm/sm90_backward.cuh"

namespace sm90 {

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

template <class Op>
__device__ __forceinline__ void finish_backward(consumer &with, epilogue_place &at, float (&d)[128])
{
    if (with.args.activation == EPD_SWIGLU)
        store_backward<Op::F16, EPD_SWIGLU>(with, at, d);
    else if (with.args.activation == EPD_GEGLU)
        store_backward<Op::F16, EPD_GEGLU>(with, at, d);
    else
        store_backward<Op::F16, EPD_RELU2>(with, at, d);
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
        if constexpr (Op::BACKWARD) {
            multiply_tokens<Op>(with, now.rows, d);
            finish_backward<Op>(with, at, d);
        } else if constexpr (Op::TOKENS_INNER) {
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
