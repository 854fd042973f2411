/* The two warpgroups of a block that multiply (TN, NN): a tile's products, then its epilogue. */
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
        uint32_t loaded = __reduce_and_sync(~0u, static_cast<uint32_t>(now.group));
        if (with.lane == 0)
            tiles.release(loaded);
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
        } else {
            row_pair bias = load_bias<Op>(args, at, now.group);
            multiply_tokens<Op>(with, now.rows, d);
            if (args.row_weights)
                finish_tokens<Op, true>(args, at, bias, d);
            else
                finish_tokens<Op, false>(args, at, bias, d);
        }
    }
    store_wait_read<0>();
}

} // namespace sm90

#endif
