/* Epilogue of NN with an activation: the accumulators are d_act[f, token] of a tile, and out go, once each,
 *   d_preact = (w d up f'(gate), w d f(gate))    weighted act = w f(gate) up    row_sums[f / 64, token] = sum over f of d act
 * 64 tokens a round. The producer brings a round's gates and ups through the ring, as stages behind the last one of the
 * product: 16 KiB of gates (8 of each warpgroup's 64 columns), 16 of ups, 16 free. A warp reads and writes the same 16
 * columns, so results take the place of what they were made from, the weighted activation the free part, and the copy
 * engine takes all three from there; a stage is given back when it has read them.
 * Against a pass of its own this saves d_act (written and read) and reading everything at another time. */
#ifndef EPD_KERNELS_GEMM_SM90_BACKWARD_CUH
#define EPD_KERNELS_GEMM_SM90_BACKWARD_CUH

#include "kernels/gemm/sm90_products.cuh"

namespace sm90 {

/* Value and slope of two gates: the tokens' activation before the up, and its derivative. */
struct gate_pair {
    row_pair value, slope;
};

template <enum epd_activation KIND> __device__ __forceinline__ gate_pair gate_slopes(float low, float high)
{
    if constexpr (KIND == EPD_RELU2) {
        float l = low < 0.0f ? 0.0f : low, h = high < 0.0f ? 0.0f : high; /* keeps a NaN */
        return {{l * l, h * h}, {2.0f * l, 2.0f * h}};
    }
    row_pair rate = {1.0f, 1.0f}, s; /* rate: d(argument of the sigmoid) / d(gate) */
    if constexpr (KIND == EPD_SWIGLU) {
        s = sigmoids(low, high);
    } else {
        float l = 0.044715f * low * low, h = 0.044715f * high * high;
        s = sigmoids(1.5957691216057308f * low * (1.0f + l), 1.5957691216057308f * high * (1.0f + h));
        rate = {1.5957691216057308f * (1.0f + 3.0f * l), 1.5957691216057308f * (1.0f + 3.0f * h)};
    }
    row_pair value = {low * s.low, high * s.high};
    return {
        value,
        {s.low + value.low * (1.0f - s.low) * rate.low, s.high + value.high * (1.0f - s.high) * rate.high}};
}

template <bool HALF> __device__ __forceinline__ row_pair unpack(uint32_t both)
{
    float2 two = HALF ? __half22float2(*reinterpret_cast<__half2 *>(&both))
                      : __bfloat1622float2(*reinterpret_cast<__nv_bfloat162 *>(&both));
    return {two.x, two.y};
}

/* Weights of tokens 2 * lane and the next of a round; 1 past the tile's end and without weights. */
__device__ __forceinline__ row_pair lane_weights(const sm90_args &args, const epilogue_place &at,
                                                 uint32_t first)
{
    uint32_t token = first + at.lane * 2;
    row_pair weights = {1.0f, 1.0f};
    if (args.row_weights && token < at.rows)
        weights.low = args.row_weights[at.row + token];
    if (args.row_weights && token + 1 < at.rows)
        weights.high = args.row_weights[at.row + token + 1];
    return weights;
}

/* Accumulators of one round, so that the code of a round exists once: four times is 70 KB. */
__device__ __forceinline__ void take_round(const float (&d)[128], uint32_t round, float (&e)[32])
{
#pragma unroll
    for (uint32_t i = 0; i < 32; i++) {
        float low = round & 1 ? d[32 + i] : d[i], high = round & 1 ? d[96 + i] : d[64 + i];
        e[i] = round & 2 ? high : low;
    }
}

/* Half of 2 N sums goes to the lane that differs in `bit`, and as many come back. */
template <uint32_t N> __device__ __forceinline__ void fold(float (&sums)[16], bool upper, uint32_t bit)
{
#pragma unroll
    for (uint32_t i = 0; i < N; i++) {
        float mine = upper ? sums[N + i] : sums[i], other = upper ? sums[i] : sums[N + i];
        sums[i] = mine + __shfl_xor_sync(~0u, other, bit);
    }
}

/* Sums over the eight lanes that hold the same tokens (lane / 4 = 0..7); dots[block * 2 + i] belongs to token
 * block * 8 + lane % 4 * 2 + i. The lane gets the sums of tokens 2 * lane and 2 * lane + 1. */
__device__ __forceinline__ row_pair sum_lanes(float (&dots)[16], uint32_t lane)
{
    fold<8>(dots, lane & 16, 16);
    fold<4>(dots, lane & 8, 8);
    fold<2>(dots, lane & 4, 4);
    return {dots[0], dots[1]};
}

/* One round's results, written over their inputs; the round's dot products come back. chunk: the warpgroup's gates. */
template <bool HALF, enum epd_activation KIND>
__device__ __forceinline__ row_pair backward_round(const epilogue_place &at, uint32_t chunk, row_pair weights,
                                                   const float (&e)[32])
{
    float dots[16];
#pragma unroll
    for (uint32_t pair = 0; pair < 4; pair++) {
        uint32_t row = pair * 16 + (at.lane >> 4) * 8 + (at.lane & 7);
        uint32_t address = staged(chunk, row, at.warp * 2 + (at.lane >> 3 & 1));
        uint4 gates_read = load_matrix_transposed(address),
              ups = load_matrix_transposed(address + 2 * CHUNK_BYTES);
        uint32_t g[4] = {gates_read.x, gates_read.y, gates_read.z, gates_read.w};
        uint32_t u[4] = {ups.x, ups.y, ups.z, ups.w}, act[4];
#pragma unroll
        for (uint32_t i = 0; i < 4; i++) {
            uint32_t block = pair * 2 + i / 2, from = block * 4 + (at.lane & 3);
            const float *d = e + block * 4 + i % 2 * 2;
            row_pair w = {__shfl_sync(~0u, weights.low, from), __shfl_sync(~0u, weights.high, from)};
            row_pair gate = unpack<HALF>(g[i]), up = unpack<HALF>(u[i]);
            gate_pair f = gate_slopes<KIND>(gate.low, gate.high);
            row_pair a = {f.value.low * up.low, f.value.high * up.high}, da = {w.low * d[0], w.high * d[1]};
            dots[block * 2] = (i % 2 ? dots[block * 2] : 0.0f) + d[0] * a.low;
            dots[block * 2 + 1] = (i % 2 ? dots[block * 2 + 1] : 0.0f) + d[1] * a.high;
            g[i] = pack<HALF>(da.low * up.low * f.slope.low, da.high * up.high * f.slope.high);
            u[i] = pack<HALF>(da.low * f.value.low, da.high * f.value.high);
            act[i] = pack<HALF>(w.low * a.low, w.high * a.high);
        }
        store_matrix_transposed(address, g[0], g[1], g[2], g[3]);
        store_matrix_transposed(address + 2 * CHUNK_BYTES, u[0], u[1], u[2], u[3]);
        store_matrix_transposed(address + 4 * CHUNK_BYTES, act[0], act[1], act[2], act[3]);
    }
    return sum_lanes(dots, at.lane);
}

/* By warp 0: the n token rows of a round from the chunk's three parts. */
__device__ __forceinline__ void copy_backward(const sm90_args &args, const epilogue_place &at, uint32_t chunk,
                                              int row, uint32_t n)
{
    round_copies copies(n);
    uint32_t i = at.lane & 15, half = at.lane >> 4, from = copies.row(i);
    if (i < copies.n_copies)
        store_3d(i < copies.n_whole ? &args.c : &args.c_rows, chunk + half * 2 * CHUNK_BYTES + from * 128,
                 at.outer_first, half, row + from);
    if (at.lane < copies.n_copies)
        store_2d(i < copies.n_whole ? &args.act : &args.act_rows, chunk + 4 * CHUNK_BYTES + from * 128,
                 at.outer_first, row + from);
    store_commit();
}

/* The last rows of a group, less than eight. Returns a bit of what was loaded: whoever gives the chunk back waits for it. */
__device__ __forceinline__ uint32_t store_backward_tail(const sm90_args &args, const epilogue_place &at,
                                                        uint32_t chunk, int64_t row, uint32_t n)
{
    uint32_t tail = (n & ~7u) + at.thread() / 8, piece = at.thread() & 7, column = at.outer_first + piece * 8;
    if (tail >= n || column >= args.outer)
        return 0;
    uint32_t from = staged(chunk, tail, piece);
    size_t preact = (row + tail) * 2 * args.outer + column;
    uint4 gates = load_shared(from), ups = load_shared(from + 2 * CHUNK_BYTES),
          acts = load_shared(from + 4 * CHUNK_BYTES);
    store_16_bytes(args.c_data, preact, gates);
    store_16_bytes(args.c_data, preact + args.outer, ups);
    store_16_bytes(args.act_data, (row + tail) * args.outer + column, acts);
    return (gates.x | ups.x | acts.x) & 1;
}

/* Sums of the four warps, in their order, by 64 threads. sums: [4][64] floats in shared memory. */
__device__ __forceinline__ void store_row_sums(const sm90_args &args, const epilogue_place &at, uint32_t sums,
                                               int64_t row, uint32_t n)
{
    uint32_t token = at.thread() - 64;
    if (!args.row_sums || at.thread() < 64 || token >= n || at.outer_first >= args.outer)
        return;
    float sum = 0.0f;
#pragma unroll
    for (uint32_t warp = 0; warp < 4; warp++)
        sum += load_shared_float(sums + warp * 256 + token * 4);
    args.row_sums[at.outer_first / 64 * args.max_rows + row + token] = sum;
}

template <bool HALF, enum epd_activation KIND>
__device__ __forceinline__ void store_backward(consumer &with, epilogue_place &at, float (&d)[128])
{
    const sm90_args &args = with.args;
    row_pair weights = lane_weights(args, at, 0);
    uint32_t before = ~0u;
#pragma unroll 1
    for (uint32_t first = 0; first < at.rows; first += 64) {
        float e[32];
        take_round(d, first / 64, e);
        row_pair next_weights = lane_weights(args, at, first + 64);
        uint32_t chunk = with.stages + with.at.stage * args.stage_bytes + with.warpgroup * CHUNK_BYTES;
        uint32_t sums = at.staging + at.turn * 1024, n = min(at.rows - first, 64u);
        barrier_wait(with.full + with.at.stage * 8, with.at.parity);
        row_pair dots = backward_round<HALF, KIND>(at, chunk, weights, e);
        store_shared_pair(sums + at.warp * 256 + at.lane * 8, dots.low, dots.high);
        round_written(at);
        if (at.warp == 0)
            copy_backward(args, at, chunk, at.row + first, n);
        uint32_t loaded = store_backward_tail(args, at, chunk, at.row + first, n);
        store_row_sums(args, at, sums, at.row + first, n);
        /* Warp 0 has copies on their way from this stage: it gives back the one before. */
        if (at.warp == 0)
            store_wait_read<1>();
        loaded = __reduce_or_sync(~0u, loaded);
        if (at.warp != 0)
            with.release_after(with.at.stage, loaded);
        else if (before != ~0u)
            with.release(before);
        before = with.at.stage;
        at.turn ^= 1; /* who still reads these sums is a barrier away from the next but one */
        with.at.advance(args.n_stages);
        weights = next_weights;
    }
    if (at.warp == 0) {
        store_wait_read<0>();
        __syncwarp();
        with.release(before);
    }
}

} // namespace sm90

#endif
