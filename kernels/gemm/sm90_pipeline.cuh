/* What the roles of a block share: sizes, the layout of shared memory, the ring of stages and the posted tiles. */
#ifndef EPD_KERNELS_GEMM_SM90_PIPELINE_CUH
#define EPD_KERNELS_GEMM_SM90_PIPELINE_CUH

#include <stddef.h>

#include "kernels/gemm/sm90_epilogue.cuh"
#include "kernels/gemm/sm90_schedule.cuh"

namespace sm90 {

constexpr uint32_t A_BYTES = SM90_OUTER_ROWS * SM90_STEP * 2;
constexpr uint32_t CHUNK_BYTES = 64 * SM90_STEP * 2; /* 64 x 64 elements */
constexpr uint32_t ONES_BYTES = 1024;                /* 8 x 64 ones: dbias is a product with them */
constexpr int N_THREADS = 384;
constexpr uint32_t N_SLOTS = 2;                /* posted tiles */
constexpr uint32_t SLOT_READERS = 2 * (8 + 1); /* eight warps and the producer of both blocks */
constexpr uint32_t STAGE_READERS = 2 * 8;      /* eight warps of both blocks */

/* What differs between the layouts. WITH_GATE: TN then an activation, NN then the activation's backward. */
template <enum epd_gemm_layout LAYOUT, bool IS_F16, bool WITH_GATE = false> struct operation {
    static constexpr bool TOKENS_INNER = LAYOUT != EPD_GEMM_NT;
    static constexpr bool A_OUTER_MAJOR = LAYOUT != EPD_GEMM_TN;
    static constexpr bool B_OUTER_MAJOR = LAYOUT == EPD_GEMM_NT;
    static constexpr bool F16 = IS_F16;
    static constexpr bool GATED = WITH_GATE && LAYOUT == EPD_GEMM_TN;
    static constexpr bool BACKWARD = WITH_GATE && LAYOUT == EPD_GEMM_NN;
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
    uint32_t n_read = 0;   /* one register for place and parity: there is none to spare */

    __device__ tile_reader(mailbox *box_) : box(box_)
    {
        leader_empty = peer_address(smem_address(box->tile_empty), 0);
    }

    __device__ tile wait() const
    {
        barrier_wait(smem_address(&box->tile_full[n_read % N_SLOTS]), n_read / N_SLOTS & 1);
        int4 posted = box->tiles[n_read % N_SLOTS];
        return {posted.x, posted.y, posted.z, posted.w};
    }

    /* By one thread for each reader; loaded: of the tile, of all threads that read it. */
    __device__ void release(uint32_t loaded)
    {
        barrier_arrive_peer_after(leader_empty + n_read % N_SLOTS * 8, loaded);
    }

    __device__ void advance()
    {
        n_read++;
    }
};

/* The same in two registers, for NT, which has none to spare. */
struct lean_reader {
    uint32_t box; /* shared address of the mailbox */
    uint32_t n_read = 0;

    __device__ lean_reader(mailbox *box_) : box(smem_address(box_))
    {
    }

    __device__ tile wait() const
    {
        uint32_t slot = n_read % N_SLOTS;
        barrier_wait(box + offsetof(mailbox, tile_full) + slot * 8, n_read / N_SLOTS & 1);
        uint4 posted = load_shared(box + offsetof(mailbox, tiles) + slot * 16);
        return {static_cast<int>(posted.x), static_cast<int>(posted.y), static_cast<int>(posted.z),
                static_cast<int>(posted.w)};
    }

    /* By one thread for each reader; loaded: of the tile, of all threads that read it. */
    __device__ void release(uint32_t loaded)
    {
        barrier_arrive_peer_after(peer_address(box + offsetof(mailbox, tile_empty) + n_read % N_SLOTS * 8, 0),
                                  loaded);
    }

    __device__ void advance()
    {
        n_read++;
    }
};

template <class Op, bool LEAN = !Op::TOKENS_INNER> struct reader_of {
    using type = tile_reader;
};

template <class Op> struct reader_of<Op, true> {
    using type = lean_reader;
};

} // namespace sm90

#endif
