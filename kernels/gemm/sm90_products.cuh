/* A warpgroup's products over the stages of the ring. */
#ifndef EPD_KERNELS_GEMM_SM90_PRODUCTS_CUH
#define EPD_KERNELS_GEMM_SM90_PRODUCTS_CUH

#include "kernels/gemm/sm90_pipeline.cuh"
#include "kernels/gemm/sm90_wgmma.cuh"

namespace sm90 {

/* What a product does besides: TN and NN nothing. */
struct nothing_late {
    __device__ __forceinline__ void operator()() const
    {
    }
};

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

    /* When plain loads have read the stage; loaded: of all threads that did. */
    __device__ __forceinline__ void release_after(uint32_t stage, uint32_t loaded) const
    {
        if (lane < 2)
            barrier_arrive_peer_after(peer_empty + stage * 8, loaded);
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

    /* d = sum over the reduction, `length` elements of it (TN, NN: the copy engine fills the last step with zeros). late() is
     * called once a step, when the step's products are on their way. */
    template <class Op, int N, bool SUM, class Late>
    __device__ __forceinline__ void multiply(uint32_t length, float (&d)[128], Late late)
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
            late();
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
        with.multiply<Op, (blocks)*8, false>(with.args.reduction, d, nothing_late());                        \
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

template <class Op, class Late>
__device__ __forceinline__ void multiply_columns(consumer &with, uint32_t rows, float (&d)[128], Late late)
{
    switch (with.args.tile_inner) {
    case 64:
        with.multiply<Op, 64, false>(rows, d, late);
        break;
    case 128:
        with.multiply<Op, 128, false>(rows, d, late);
        break;
    case 192:
        with.multiply<Op, 192, false>(rows, d, late);
        break;
    default:
        with.multiply<Op, 256, false>(rows, d, late);
        break;
    }
}

} // namespace sm90

#endif
