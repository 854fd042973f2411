/* From the accumulators of one warpgroup (64 outer rows x up to 256 inner columns) to memory. Thread (warp w, lane l)
 * holds, for every 8 inner columns c: d[4c], d[4c+1] at outer row 16w + l/4, columns 2(l%4) and the next, and
 * d[4c+2], d[4c+3] eight outer rows further.
 *
 * 16-bit results go through 16 KiB of shared memory of the warpgroup and leave as 16-byte stores of whole 128-byte lines;
 * every store is guarded by the tile's rows and the matrix's columns, so a ragged last tile touches no neighbour. The two
 * warpgroups of a block never wait for each other here: while one stores, the other multiplies. */
#ifndef EPD_KERNELS_GEMM_SM90_EPILOGUE_CUH
#define EPD_KERNELS_GEMM_SM90_EPILOGUE_CUH

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "kernels/gemm/sm90_args.h"
#include "kernels/gemm/sm90_ptx.cuh"

namespace sm90
{

constexpr uint32_t STAGING_BYTES = 16384; /* of one warpgroup */
constexpr uint32_t STAGED_TOKENS = 128;   /* x 64 outer rows x 2 bytes */

/* Who writes what of a tile. */
struct epilogue_place {
    uint32_t staging;     /* shared address */
    uint32_t barrier;     /* id of the warpgroup's barrier */
    uint32_t warp, lane;  /* in the warpgroup, in the warp */
    uint32_t outer_first; /* of this warpgroup */
    int64_t row;          /* first token row (TN, NN) */
    uint32_t rows;        /* tokens of the tile (TN, NN) */

    __device__ uint32_t thread() const
    {
        return warp * 32 + lane;
    }
};

/* Bias (or nothing) of this thread's two outer rows, fetched before the product so that nobody waits for it. */
struct row_pair {
    float low, high;
};

template <bool HALF> __device__ __forceinline__ uint32_t pack(float low, float high)
{
    uint32_t both;
    if constexpr (HALF)
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    else
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}

__device__ __forceinline__ float load_any(const void *base, enum epd_dtype dtype, size_t idx)
{
    if (dtype == EPD_F32)
        return static_cast<const float *>(base)[idx];
    if (dtype == EPD_F16)
        return __half2float(static_cast<const __half *>(base)[idx]);
    return __bfloat162float(static_cast<const __nv_bfloat16 *>(base)[idx]);
}

__device__ __forceinline__ void store_any(void *base, enum epd_dtype dtype, size_t idx, float value)
{
    if (dtype == EPD_F32)
        static_cast<float *>(base)[idx] = value;
    else if (dtype == EPD_F16)
        static_cast<__half *>(base)[idx] = __float2half_rn(value);
    else
        static_cast<__nv_bfloat16 *>(base)[idx] = __float2bfloat16_rn(value);
}

/* 128-byte rows, 16-byte pieces exchanged by row so that neither side meets a bank twice. */
__device__ __forceinline__ uint32_t staged(uint32_t staging, uint32_t row, uint32_t piece)
{
    return staging + row * 128 + ((piece ^ (row & 7)) << 4);
}

__device__ __forceinline__ void store_16_bytes(const sm90_args &args, void *base, size_t element, uint4 value)
{
    uint4 *to = reinterpret_cast<uint4 *>(static_cast<uint16_t *>(base) + element);
    if (args.flags & 1)
        __stcs(to, value);
    else
        *to = value;
}

/* Row weights of the two tokens this thread holds in 8-column block `block`; 1 past the tile's end. */
__device__ __forceinline__ row_pair token_weights(const sm90_args &args, const epilogue_place &at, uint32_t block)
{
    uint32_t token = block * 8 + (at.lane & 3) * 2;
    row_pair weights = {1.0f, 1.0f};
    if (token < at.rows)
        weights.low = args.row_weights[at.row + token];
    if (token + 1 < at.rows)
        weights.high = args.row_weights[at.row + token + 1];
    return weights;
}

/* TN, NN to 16 bits: D is [outer, token], memory is [token, outer]. */
template <bool HALF>
__device__ __forceinline__ void store_tokens(const sm90_args &args, const epilogue_place &at, float (&d)[128],
                                             row_pair bias)
{
#pragma unroll
    for (uint32_t half = 0; half < 2; half++) {
        if (half * STAGED_TOKENS >= at.rows)
            break;
        warpgroup_sync(at.barrier);
#pragma unroll
        for (uint32_t pair = 0; pair < 8; pair++) {
            uint32_t block = half * 16 + pair * 2, r = block * 4;
            if (block * 8 >= at.rows)
                break;
            row_pair w0 = {1.0f, 1.0f}, w1 = w0;
            if (args.row_weights) {
                w0 = token_weights(args, at, block);
                w1 = token_weights(args, at, block + 1);
            }
            uint32_t row = pair * 16 + (at.lane >> 4) * 8 + (at.lane & 7);
            store_matrix_transposed(staged(at.staging, row, at.warp * 2 + (at.lane >> 3 & 1)),
                                    pack<HALF>((d[r] + bias.low) * w0.low, (d[r + 1] + bias.low) * w0.high),
                                    pack<HALF>((d[r + 2] + bias.high) * w0.low, (d[r + 3] + bias.high) * w0.high),
                                    pack<HALF>((d[r + 4] + bias.low) * w1.low, (d[r + 5] + bias.low) * w1.high),
                                    pack<HALF>((d[r + 6] + bias.high) * w1.low, (d[r + 7] + bias.high) * w1.high));
        }
        warpgroup_sync(at.barrier);
        uint32_t piece = at.thread() & 7, column = at.outer_first + piece * 8;
#pragma unroll
        for (uint32_t turn = 0; turn < 8; turn++) {
            uint32_t row = turn * 16 + (at.thread() >> 3), token = half * STAGED_TOKENS + row;
            if (token < at.rows && column < args.outer)
                store_16_bytes(args, args.c, (at.row + token) * args.outer + column,
                               load_shared(staged(at.staging, row, piece)));
        }
    }
}

/* TN, NN to fp32: straight from the registers, eight lanes fill a 32-byte sector. */
__device__ __forceinline__ void store_tokens_f32(const sm90_args &args, const epilogue_place &at, float (&d)[128],
                                                 row_pair bias)
{
    float *c = static_cast<float *>(args.c);
    uint32_t column = at.outer_first + at.warp * 16 + (at.lane >> 2);
#pragma unroll
    for (uint32_t block = 0; block < 32; block++) {
        if (block * 8 >= at.rows)
            break;
        row_pair w = {1.0f, 1.0f};
        if (args.row_weights)
            w = token_weights(args, at, block);
#pragma unroll
        for (uint32_t i = 0; i < 4; i++) {
            uint32_t token = block * 8 + (at.lane & 3) * 2 + (i & 1), to = column + (i >> 1) * 8;
            float value = (d[block * 4 + i] + (i >> 1 ? bias.high : bias.low)) * (i & 1 ? w.high : w.low);
            if (token < at.rows && to < args.outer)
                c[(at.row + token) * args.outer + to] = value;
        }
    }
}

/* f(g) u; the formulas of enum epd_activation. */
__device__ __forceinline__ float gated(enum epd_activation kind, float gate, float up)
{
    if (kind == EPD_SWIGLU)
        return __fdividef(gate, 1.0f + __expf(-gate)) * up;
    if (kind == EPD_RELU2) {
        float positive = fmaxf(gate, 0.0f);
        return positive * positive * up;
    }
    /* gelu by tanh: g / (1 + exp(-2 s)), s = sqrt(2 / pi) (g + 0.044715 g^3) */
    float twice = 1.5957691216057308f * (gate + 0.044715f * gate * gate * gate);
    return __fdividef(gate, 1.0f + __expf(-twice)) * up;
}

/* TN with an activation: outer rows come as 8 gate, 8 up, 8 gate, ..: this thread's `low` row is the gate of column f and
 * its `high` row the up of the same column. at.outer_first counts columns of F here. */
template <bool HALF>
__device__ __forceinline__ void store_gated(const sm90_args &args, const epilogue_place &at, float (&d)[128],
                                            row_pair bias)
{
    const uint32_t ffn = args.outer / 2;
#pragma unroll
    for (uint32_t half = 0; half < 2; half++) {
        if (half * STAGED_TOKENS >= at.rows)
            break;
        if (args.c) {
            warpgroup_sync(at.barrier);
#pragma unroll
            for (uint32_t pair = 0; pair < 8; pair++) {
                uint32_t block = half * 16 + pair * 2, r = block * 4;
                if (block * 8 >= at.rows)
                    break;
                uint32_t row = pair * 16 + (at.lane >> 4) * 8 + (at.lane & 7);
                store_matrix_transposed(staged(at.staging, row, at.warp + (at.lane >> 3 & 1) * 4),
                                        pack<HALF>(d[r] + bias.low, d[r + 1] + bias.low),
                                        pack<HALF>(d[r + 2] + bias.high, d[r + 3] + bias.high),
                                        pack<HALF>(d[r + 4] + bias.low, d[r + 5] + bias.low),
                                        pack<HALF>(d[r + 6] + bias.high, d[r + 7] + bias.high));
            }
            warpgroup_sync(at.barrier);
            uint32_t piece = at.thread() & 7, column = at.outer_first + (piece & 3) * 8;
#pragma unroll
            for (uint32_t turn = 0; turn < 8; turn++) {
                uint32_t row = turn * 16 + (at.thread() >> 3), token = half * STAGED_TOKENS + row;
                if (token < at.rows && column < ffn)
                    store_16_bytes(args, args.c, (at.row + token) * args.outer + (piece >> 2) * ffn + column,
                                   load_shared(staged(at.staging, row, piece)));
            }
        }
        warpgroup_sync(at.barrier);
#pragma unroll
        for (uint32_t four = 0; four < 4; four++) {
            uint32_t v[4] = {0, 0, 0, 0};
#pragma unroll
            for (uint32_t i = 0; i < 4; i++) {
                uint32_t block = half * 16 + four * 4 + i, r = block * 4;
                if (block * 8 >= at.rows)
                    break;
                row_pair w = {1.0f, 1.0f};
                if (args.row_weights)
                    w = token_weights(args, at, block);
                v[i] = pack<HALF>(gated(args.activation, d[r] + bias.low, d[r + 2] + bias.high) * w.low,
                                  gated(args.activation, d[r + 1] + bias.low, d[r + 3] + bias.high) * w.high);
            }
            store_matrix_transposed(staged(at.staging, four * 32 + at.lane, at.warp), v[0], v[1], v[2], v[3]);
        }
        warpgroup_sync(at.barrier);
        uint32_t piece = at.thread() & 3, column = at.outer_first + piece * 8;
#pragma unroll
        for (uint32_t turn = 0; turn < 4; turn++) {
            uint32_t row = turn * 32 + (at.thread() >> 2), token = half * STAGED_TOKENS + row;
            if (token < at.rows && column < ffn)
                store_16_bytes(args, args.act, (at.row + token) * ffn + column, load_shared(staged(at.staging, row, piece)));
        }
    }
}

/* NT to 16 bits, overwriting: D and memory are both [outer, inner]. */
template <bool HALF>
__device__ __forceinline__ void store_matrix_rows(const sm90_args &args, const epilogue_place &at, void *c,
                                                  uint32_t inner_first, float (&d)[128])
{
#pragma unroll
    for (uint32_t half = 0; half < 2; half++) {
        if (half * 128 >= args.tile_inner)
            break;
        warpgroup_sync(at.barrier);
#pragma unroll
        for (uint32_t pair = 0; pair < 8; pair++) {
            uint32_t r = (half * 16 + pair * 2) * 4;
            uint32_t row = at.warp * 16 + (at.lane >> 3 & 1) * 8 + (at.lane & 7), piece = pair * 2 + (at.lane >> 4);
            store_matrix(staged(at.staging + (piece >> 3) * 8192, row, piece & 7), pack<HALF>(d[r], d[r + 1]),
                         pack<HALF>(d[r + 2], d[r + 3]), pack<HALF>(d[r + 4], d[r + 5]),
                         pack<HALF>(d[r + 6], d[r + 7]));
        }
        warpgroup_sync(at.barrier);
        uint32_t piece = at.thread() & 15, in_tile = half * 128 + piece * 8, column = inner_first + in_tile;
#pragma unroll
        for (uint32_t turn = 0; turn < 8; turn++) {
            uint32_t row = turn * 8 + (at.thread() >> 4), to = at.outer_first + row;
            if (to < args.outer && in_tile < args.tile_inner && column < args.inner)
                store_16_bytes(args, c, static_cast<size_t>(to) * args.inner + column,
                               load_shared(staged(at.staging + (piece >> 3) * 8192, row, piece & 7)));
        }
    }
}

/* NT of an empty group, overwriting. */
__device__ __forceinline__ void store_zeros(const sm90_args &args, const epilogue_place &at, void *c,
                                            uint32_t inner_first)
{
    uint32_t bytes = args.dtype_c == EPD_F32 ? 4 : 2, per_piece = 16 / bytes;
    uint32_t width = min(args.tile_inner, args.inner - inner_first) / per_piece;
    for (uint32_t i = at.thread(); i < 64 * width; i += 128) {
        uint32_t to = at.outer_first + i / width, column = inner_first + i % width * per_piece;
        if (to < args.outer)
            *reinterpret_cast<uint4 *>(static_cast<uint8_t *>(c) + (static_cast<size_t>(to) * args.inner + column) * bytes) =
                make_uint4(0, 0, 0, 0);
    }
}

/* NT to fp32, or adding to what is there: a thread's pair of columns at a time, four lanes to a sector. One rounding. */
template <class PAIR_OP>
__device__ __forceinline__ void for_each_pair(const sm90_args &args, const epilogue_place &at, uint32_t inner_first,
                                              PAIR_OP operation)
{
#pragma unroll
    for (uint32_t block = 0; block < 32; block++) {
        uint32_t in_tile = block * 8 + (at.lane & 3) * 2, column = inner_first + in_tile;
        if (in_tile >= args.tile_inner)
            break;
#pragma unroll
        for (uint32_t high = 0; high < 2; high++) {
            uint32_t to = at.outer_first + at.warp * 16 + high * 8 + (at.lane >> 2);
            if (to < args.outer && column < args.inner)
                operation(static_cast<size_t>(to) * args.inner + column, block * 4 + high * 2);
        }
    }
}

__device__ __forceinline__ void store_pairs(const sm90_args &args, const epilogue_place &at, void *c,
                                            uint32_t inner_first, float (&d)[128])
{
    if (args.dtype_c == EPD_F32) {
        float *to = static_cast<float *>(c);
        /* One addition per element and launch: the order cannot matter. */
        if (args.accumulate)
            for_each_pair(args, at, inner_first,
                          [&](size_t element, uint32_t r) { add_pair(to + element, d[r], d[r + 1]); });
        else
            for_each_pair(args, at, inner_first, [&](size_t element, uint32_t r) {
                *reinterpret_cast<float2 *>(to + element) = make_float2(d[r], d[r + 1]);
            });
    } else if (args.dtype_c == EPD_F16) {
        for_each_pair(args, at, inner_first, [&](size_t element, uint32_t r) {
            __half2 *to = reinterpret_cast<__half2 *>(static_cast<__half *>(c) + element);
            float2 old = __half22float2(*to);
            *to = __floats2half2_rn(old.x + d[r], old.y + d[r + 1]);
        });
    } else {
        for_each_pair(args, at, inner_first, [&](size_t element, uint32_t r) {
            __nv_bfloat162 *to = reinterpret_cast<__nv_bfloat162 *>(static_cast<__nv_bfloat16 *>(c) + element);
            float2 old = __bfloat1622float2(*to);
            *to = __floats2bfloat162_rn(old.x + d[r], old.y + d[r + 1]);
        });
    }
}

} // namespace sm90

#endif
