/* From the accumulators of one warpgroup (64 outer rows x up to 256 inner columns) to memory. Thread (warp w, lane l)
 * holds, for every 8 inner columns c: d[4c], d[4c+1] at outer row 16w + l/4, columns 2(l%4) and the next, and
 * d[4c+2], d[4c+3] eight outer rows further.
 *
 * Results go through a 16 KiB buffer of the warpgroup, half a tile at a time, and leave by the copy engine in the
 * background. A round costs some 300 cycles of waiting (fence towards the copy engine, barriers, the copies of the round
 * before), so there are few of them, and a round's conversions are done before it waits. Token rows of a ragged round
 * leave 64 and eight at a time, the last few of a group by guarded plain stores: nothing past the group's end is
 * written. A round has no branch inside, so that the conversions of many elements overlap (with one per element a gated
 * epilogue took 9500 cycles instead of 3200). The two warpgroups of a block never wait for each other here. */
#ifndef EPD_KERNELS_GEMM_SM90_EPILOGUE_CUH
#define EPD_KERNELS_GEMM_SM90_EPILOGUE_CUH

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "kernels/gemm/sm90_args.h"
#include "kernels/gemm/sm90_ptx.cuh"

namespace sm90 {

constexpr uint32_t STAGING_BYTES = 16384; /* of one warpgroup */

/* Who writes what of a tile. */
struct epilogue_place {
    uint32_t staging;     /* shared address of the buffer */
    uint32_t turn;        /* parity of the rounds so far (activation backward) */
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

/* Rows of 128 (64) bytes, 16-byte pieces exchanged by row as the copy engine's 128-byte (64-byte) swizzle has it, so
 * that neither side meets a bank twice. */
__device__ __forceinline__ uint32_t staged(uint32_t staging, uint32_t row, uint32_t piece)
{
    return staging + row * 128 + ((piece ^ (row & 7)) << 4);
}

__device__ __forceinline__ uint32_t staged_64(uint32_t staging, uint32_t row, uint32_t piece)
{
    return staging + row * 64 + ((piece ^ (row >> 1 & 3)) << 4);
}

/* The buffer may be written: the copies of the round before have read it. Copies are issued by warp 0 only. */
__device__ __forceinline__ void round_begin(const epilogue_place &at)
{
    if (at.warp == 0)
        store_wait_read<0>();
    warpgroup_sync(at.barrier);
}

/* It is written: the copy engine may read. Then warp 0 issues copies and every lane of it commits once. */
__device__ __forceinline__ void round_written(const epilogue_place &at)
{
    proxy_fence();
    warpgroup_sync(at.barrier);
}

__device__ __forceinline__ void store_16_bytes(void *base, size_t element, uint4 value)
{
    *reinterpret_cast<uint4 *>(static_cast<uint16_t *>(base) + element) = value;
}

/* Row weights of the two tokens this thread holds in 8-column block `block`; 1 past the tile's end. */
__device__ __forceinline__ row_pair token_weights(const sm90_args &args, const epilogue_place &at,
                                                  uint32_t block)
{
    uint32_t token = block * 8 + (at.lane & 3) * 2;
    row_pair weights = {1.0f, 1.0f};
    if (token < at.rows)
        weights.low = args.row_weights[at.row + token];
    if (token + 1 < at.rows)
        weights.high = args.row_weights[at.row + token + 1];
    return weights;
}

/* What the epilogues do to a result on its way out. The accumulators themselves are never written: the compiler would
 * have to keep two versions of them and would serialise the products. */
template <bool WEIGHTED> struct finisher {
    row_pair bias;
    row_pair weights = {1.0f, 1.0f};

    __device__ finisher(row_pair bias_) : bias(bias_)
    {
    }

    __device__ __forceinline__ void block(const sm90_args &args, const epilogue_place &at, uint32_t block)
    {
        if constexpr (WEIGHTED)
            weights = token_weights(args, at, block);
    }

    /* Element i (0..3) of the thread's four in the block. */
    __device__ __forceinline__ float operator()(float value, uint32_t i) const
    {
        value += i & 2 ? bias.high : bias.low;
        return WEIGHTED ? value * (i & 1 ? weights.high : weights.low) : value;
    }

    template <bool HALF> __device__ __forceinline__ uint32_t pack_two(const float *d, uint32_t i) const
    {
        return pack<HALF>((*this)(d[i], i), (*this)(d[i + 1], i + 1));
    }
};

/* How the n token rows of a round leave: copies of 64 rows, then of eight, one by each lane. */
struct round_copies {
    uint32_t n_whole, n_copies;

    __device__ explicit round_copies(uint32_t n) : n_whole(n / 64), n_copies(n / 64 + n % 64 / 8)
    {
    }

    /* First row of copy i. */
    __device__ __forceinline__ uint32_t row(uint32_t i) const
    {
        return i < n_whole ? i * 64 : n_whole * 64 + (i - n_whole) * 8;
    }
};

/* TN, NN to 16 bits: D is [outer, token], memory is [token, outer]; 128 tokens a round. */
template <bool HALF, bool WEIGHTED>
__device__ __forceinline__ void store_tokens(const sm90_args &args, const epilogue_place &at, float (&d)[128],
                                             row_pair bias)
{
    finisher<WEIGHTED> out(bias);
#pragma unroll
    for (uint32_t first = 0; first < SM90_INNER_MAX; first += 128) {
        if (first >= at.rows)
            break;
        uint32_t v[32];
#pragma unroll
        for (uint32_t i = 0; i < 16; i++) {
            out.block(args, at, first / 8 + i);
            v[i * 2] = out.template pack_two<HALF>(d + (first / 8 + i) * 4, 0);
            v[i * 2 + 1] = out.template pack_two<HALF>(d + (first / 8 + i) * 4, 2);
        }
        round_begin(at);
#pragma unroll
        for (uint32_t pair = 0; pair < 8; pair++) {
            uint32_t row = pair * 16 + (at.lane >> 4) * 8 + (at.lane & 7), *four = v + pair * 4;
            store_matrix_transposed(staged(at.staging, row, at.warp * 2 + (at.lane >> 3 & 1)), four[0],
                                    four[1], four[2], four[3]);
        }
        round_written(at);
        uint32_t n = min(at.rows - first, 128u);
        if (at.warp == 0) {
            round_copies copies(n);
            uint32_t row = copies.row(at.lane);
            if (at.lane < copies.n_copies)
                store_2d(at.lane < copies.n_whole ? &args.c : &args.c_rows, at.staging + row * 128,
                         at.outer_first, at.row + first + row);
            store_commit();
        }
        uint32_t row = (n & ~7u) + at.thread() / 8, piece = at.thread() & 7,
                 column = at.outer_first + piece * 8;
        if (row < n && column < args.outer)
            store_16_bytes(args.c_data, (at.row + first + row) * args.outer + column,
                           load_shared(staged(at.staging, row, piece)));
    }
}

/* TN, NN to fp32: straight from the registers, eight lanes fill a 32-byte sector. */
template <bool WEIGHTED>
__device__ __forceinline__ void store_tokens_f32(const sm90_args &args, const epilogue_place &at,
                                                 float (&d)[128], row_pair bias)
{
    finisher<WEIGHTED> out(bias);
    float *c = static_cast<float *>(args.c_data);
    uint32_t column = at.outer_first + at.warp * 16 + (at.lane >> 2);
#pragma unroll
    for (uint32_t block = 0; block < 32; block++) {
        if (block * 8 >= at.rows)
            break;
        out.block(args, at, block);
#pragma unroll
        for (uint32_t i = 0; i < 4; i++) {
            uint32_t token = block * 8 + (at.lane & 3) * 2 + (i & 1), to = column + (i >> 1) * 8;
            if (token < at.rows && to < args.outer)
                c[(at.row + token) * args.outer + to] = out(d[block * 4 + i], i);
        }
    }
}

/* 1 / (1 + exp(-x)) of two numbers with one division: an epilogue's exponentials and divisions all go to one slow unit.
 * Below -43, where the sigmoid is 2e-19, the product of the denominators would leave fp32. A NaN becomes -43 here: it
 * comes back by the factor that is multiplied with the result, and does not reach the other number. */
__device__ __forceinline__ row_pair sigmoids(float low, float high)
{
    float a = 1.0f + exp2_fast(-1.4426950408889634f * fmaxf(low, -43.0f));
    float b = 1.0f + exp2_fast(-1.4426950408889634f * fmaxf(high, -43.0f));
    float inverse = reciprocal_fast(a * b);
    return {b * inverse, a * inverse};
}

/* f(g) of two gates; the formulas of enum epd_activation. */
template <enum epd_activation KIND> __device__ __forceinline__ row_pair gates(float low, float high)
{
    if constexpr (KIND == EPD_RELU2) {
        float l = low < 0.0f ? 0.0f : low, h = high < 0.0f ? 0.0f : high; /* keeps a NaN */
        return {l * l, h * h};
    }
    row_pair s;
    if constexpr (KIND == EPD_SWIGLU)
        s = sigmoids(low, high);
    else /* gelu by tanh: g s(2 p), p = sqrt(2 / pi) (g + 0.044715 g^3) */
        s = sigmoids(1.5957691216057308f * (low + 0.044715f * low * low * low),
                     1.5957691216057308f * (high + 0.044715f * high * high * high));
    return {low * s.low, high * s.high};
}

/* TN with an activation: outer rows come as 8 gate, 8 up, 8 gate, ..: this thread's `low` row is the gate of column f and
 * its `high` row the up of the same column. at.outer_first counts columns of F here, 32 to a warpgroup. First the
 * pre-activation, 128 tokens a round: the buffer holds 8 KiB of gate and 8 KiB of up. */
template <bool HALF>
__device__ __forceinline__ void store_preact(const sm90_args &args, const epilogue_place &at, float (&d)[128],
                                             row_pair bias)
{
    finisher<false> out(bias);
    const uint32_t ffn = args.outer / 2;
#pragma unroll
    for (uint32_t first = 0; first < SM90_INNER_MAX; first += 128) {
        if (first >= at.rows)
            break;
        uint32_t v[32];
#pragma unroll
        for (uint32_t i = 0; i < 32; i++)
            v[i] = out.template pack_two<HALF>(d + first / 2 + i / 2 * 4, i % 2 * 2);
        round_begin(at);
#pragma unroll
        for (uint32_t pair = 0; pair < 8; pair++) {
            uint32_t row = pair * 16 + (at.lane >> 4) * 8 + (at.lane & 7), *four = v + pair * 4;
            store_matrix_transposed(staged_64(at.staging + (at.lane >> 3 & 1) * 8192, row, at.warp), four[0],
                                    four[1], four[2], four[3]);
        }
        round_written(at);
        uint32_t n = min(at.rows - first, 128u), up = at.lane >> 4;
        if (at.warp == 0) {
            round_copies copies(n);
            uint32_t i = at.lane & 15, row = copies.row(i);
            if (i < copies.n_copies)
                store_3d(i < copies.n_whole ? &args.c : &args.c_rows, at.staging + up * 8192 + row * 64,
                         at.outer_first, up, at.row + first + row);
            store_commit();
        }
        uint32_t row = (n & ~7u) + at.thread() / 8, piece = at.thread() & 3,
                 column = at.outer_first + piece * 8;
        up = at.thread() >> 2 & 1;
        if (row < n && column < ffn)
            store_16_bytes(args.c_data, (at.row + first + row) * args.outer + up * ffn + column,
                           load_shared(staged_64(at.staging + up * 8192, row, piece)));
    }
}

/* Then the activation, all tokens in one round. */
template <bool HALF, bool WEIGHTED, enum epd_activation KIND>
__device__ __forceinline__ void store_act(const sm90_args &args, const epilogue_place &at, float (&d)[128],
                                          row_pair bias)
{
    const uint32_t ffn = args.outer / 2;
    finisher<WEIGHTED> weigh({0.0f, 0.0f});
    uint32_t v[32];
#pragma unroll
    for (uint32_t first = 0; first < 32; first += 16) {
        if (first * 8 >= at.rows)
            break;
#pragma unroll
        for (uint32_t block = first; block < first + 16; block++) {
            const float *r = d + block * 4;
            row_pair f = gates<KIND>(r[0] + bias.low, r[1] + bias.low);
            float act[2] = {f.low * (r[2] + bias.high), f.high * (r[3] + bias.high)};
            weigh.block(args, at, block);
            v[block] = weigh.template pack_two<HALF>(act, 0);
        }
    }
    round_begin(at);
#pragma unroll
    for (uint32_t four = 0; four < 8; four++)
        if (four * 32 < at.rows)
            store_matrix_transposed(staged_64(at.staging, four * 32 + at.lane, at.warp), v[four * 4],
                                    v[four * 4 + 1], v[four * 4 + 2], v[four * 4 + 3]);
    round_written(at);
    if (at.warp == 0) {
        round_copies copies(at.rows);
        uint32_t row = copies.row(at.lane);
        if (at.lane < copies.n_copies)
            store_2d(at.lane < copies.n_whole ? &args.act : &args.act_rows, at.staging + row * 64,
                     at.outer_first, at.row + row);
        store_commit();
    }
    uint32_t row = (at.rows & ~7u) + at.thread() / 4, piece = at.thread() & 3,
             column = at.outer_first + piece * 8;
    if (row < at.rows && column < ffn)
        store_16_bytes(args.act_data, (at.row + row) * ffn + column,
                       load_shared(staged_64(at.staging, row, piece)));
}

/* Read where it is used: what the compiler makes of threadIdx it keeps in registers, and NT has none to spare. */
__device__ __forceinline__ epilogue_place place_now(const sm90_args &args, uint32_t stages)
{
    uint32_t idx = thread_idx();
    epilogue_place at;
    at.staging = stages + args.n_stages * args.stage_bytes + idx / 128 * STAGING_BYTES;
    at.barrier = 1 + idx / 128;
    at.warp = idx / 32 & 3;
    at.lane = idx & 31;
    return at;
}

/* NT needs no other warp: each has a buffer of two boxes of 16 rows of 128 bytes, and lanes 0 and 1 copy a box each. */
__device__ __forceinline__ uint32_t warp_round_begin(const epilogue_place &at)
{
    store_wait_read<0>();
    __syncwarp();
    return at.staging + at.warp * (STAGING_BYTES / 4);
}

constexpr uint32_t BOX_BYTES = STAGING_BYTES / 8;

__device__ __forceinline__ void warp_round_written()
{
    proxy_fence();
    __syncwarp();
}

/* NT to 16 bits, overwriting: D and memory are both [outer, inner]; 128 columns a round, the copies clip at the matrix.
 * Results are rounded at the tile's end and leave while the tensor cores work on the next tile, half of them at a time: a
 * tile of NT may be as short as its group, and its epilogue a fifth of it. (For TN and NN this gained nothing: there power
 * decides, and they have no registers for it.) */
struct late_columns {
    uint32_t v[64];
    uint32_t inner_first, outer, group;
    uint32_t n_left = 0; /* halves */

    template <bool HALF>
    __device__ __forceinline__ void keep(const epilogue_place &at, int group_, uint32_t inner_first_,
                                         float (&d)[128])
    {
#pragma unroll
        for (uint32_t i = 0; i < 64; i++)
            v[i] = pack<HALF>(d[i * 2], d[i * 2 + 1]);
        inner_first = inner_first_;
        outer = at.outer_first + at.warp * 16;
        group = group_;
        n_left = 2;
    }

    template <uint32_t ROUND>
    __device__ __forceinline__ void store(const sm90_args &args, const epilogue_place &at) const
    {
        uint32_t buffer = warp_round_begin(at), first = ROUND * 128;
#pragma unroll
        for (uint32_t pair = 0; pair < 8; pair++) {
            uint32_t row = at.lane & 15, piece = pair % 4 * 2 + (at.lane >> 4);
            const uint32_t *four = v + ROUND * 32 + pair * 4;
            store_matrix(staged(buffer + pair / 4 * BOX_BYTES, row, piece), four[0], four[1], four[2],
                         four[3]);
        }
        warp_round_written();
        if (at.lane < 2 && outer < args.outer && first + at.lane * 64 < args.tile_inner)
            store_3d(args.c_parts_map ? args.c_parts_map + group : &args.c, buffer + at.lane * BOX_BYTES,
                     inner_first + first + at.lane * 64, outer, args.c_parts_map ? 0 : group);
        store_commit();
    }

    __device__ __forceinline__ void step(const sm90_args &args, const epilogue_place &at)
    {
        if (n_left == 2)
            store<0>(args, at);
        else if (n_left == 1)
            store<1>(args, at);
        n_left -= n_left != 0;
    }
};

/* NT to fp32, overwriting or adding: 64 columns a round. */
__device__ __forceinline__ void store_columns_f32(const sm90_args &args, const epilogue_place &at,
                                                  const CUtensorMap *map, int group, uint32_t inner_first,
                                                  float (&d)[128])
{
    uint32_t outer = at.outer_first + at.warp * 16;
#pragma unroll
    for (uint32_t first = 0; first < SM90_INNER_MAX; first += 64) {
        if (first >= args.tile_inner)
            break;
        uint32_t buffer = warp_round_begin(at);
#pragma unroll
        for (uint32_t block = 0; block < 8; block++) {
            uint32_t r = (first / 8 + block) * 4, piece = block % 4 * 2 + (at.lane >> 1 & 1);
            uint32_t to = staged(buffer + block / 4 * BOX_BYTES, at.lane >> 2, piece) + (at.lane & 1) * 8;
            store_shared_pair(to, d[r], d[r + 1]);
            store_shared_pair(to + 8 * 128, d[r + 2], d[r + 3]);
        }
        warp_round_written();
        if (at.lane < 2 && outer < args.outer) {
            uint32_t from = buffer + at.lane * BOX_BYTES, column = inner_first + first + at.lane * 32;
            if (args.accumulate)
                add_3d(map, from, column, outer, group);
            else
                store_3d(map, from, column, outer, group);
        }
        store_commit();
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
            *reinterpret_cast<uint4 *>(static_cast<uint8_t *>(c) +
                                       (static_cast<size_t>(to) * args.inner + column) * bytes) =
                make_uint4(0, 0, 0, 0);
    }
}

/* NT adding to 16 bits: sum in fp32, one rounding; a thread's pair of columns at a time. */
template <bool HALF>
__device__ __forceinline__ void add_columns(const sm90_args &args, const epilogue_place &at, void *c,
                                            uint32_t inner_first, float (&d)[128])
{
#pragma unroll
    for (uint32_t block = 0; block < 32; block++) {
        uint32_t in_tile = block * 8 + (at.lane & 3) * 2, column = inner_first + in_tile;
        if (in_tile >= args.tile_inner)
            break;
#pragma unroll
        for (uint32_t high = 0; high < 2; high++) {
            uint32_t to = at.outer_first + at.warp * 16 + high * 8 + (at.lane >> 2), r = block * 4 + high * 2;
            if (to >= args.outer || column >= args.inner)
                continue;
            size_t element = static_cast<size_t>(to) * args.inner + column;
            uint32_t *pair = reinterpret_cast<uint32_t *>(static_cast<uint16_t *>(c) + element);
            float2 old = HALF ? __half22float2(*reinterpret_cast<__half2 *>(pair))
                              : __bfloat1622float2(*reinterpret_cast<__nv_bfloat162 *>(pair));
            *pair = pack<HALF>(old.x + d[r], old.y + d[r + 1]);
        }
    }
}

} // namespace sm90

#endif
