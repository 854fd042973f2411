/* Sums of rows as one warp makes them: its terms come through a ring of bulk loads in shared memory, whatever unit they
 * belong to, and are added in their order.
 *
 * What a warp costs is instructions, not bytes: with ten warps on a multiprocessor two instructions per cycle is all there
 * is. So a sum is over a piece of VECS vectors per lane, as many as the row gives; slots are looked up for several units
 * at once, as many as have room in the lanes; and their terms stand in one list from which the ring of loads is kept full
 * without a look at where a unit ends. RESULTS slots hold sums that are being sent: to wait until a store has left shared
 * memory costs as much as waiting until it has arrived, about 3 us over the link. One more warp tells, in a block that
 * sends. */
#ifndef EPD_KERNELS_CUDA_TERMS_CUH
#define EPD_KERNELS_CUDA_TERMS_CUH

#include "kernels/cuda/exchange.cuh"

static constexpr uint32_t RING = 3;
static constexpr uint32_t LISTED = 64, MAX_BATCH = 4; /* terms of two batches; units of one */
static constexpr uint32_t SHARED_LIMIT = 232448, MAX_WARPS = 15;

/* A sum to be made. */
struct unit_record {
    char *to;
    uint32_t id;   /* token * n_pieces + piece */
    uint32_t rank; /* to which it is sent */
    uint32_t bytes;
    uint32_t n; /* terms */
};

/* Of one warp, in shared memory. */
struct warp_lists {
    uint64_t row[LISTED]; /* where the term's piece lies, and above ROW_BITS its 16-byte vectors */
    float weight[LISTED];
    struct unit_record units[2][MAX_BATCH];
};

static constexpr int ROW_BITS = 52;

template <int VECS> struct combine_sizes {
    static constexpr uint32_t PIECE_BYTES = VECS * 512, RESULTS = VECS == 8 ? 2 : 3,
                              WARP_BYTES = (RING + RESULTS) * PIECE_BYTES;
    static constexpr uint32_t ROOM = (SHARED_LIMIT - sizeof(sent_box) - 1024) /
                                     (WARP_BYTES + sizeof(warp_lists) + RING * sizeof(uint64_t));
    static constexpr uint32_t WARPS = ROOM < MAX_WARPS ? ROOM : MAX_WARPS, THREADS = (WARPS + 1) * 32,
                              SHARED_BYTES = WARPS * WARP_BYTES;
};

/* A warp's terms on their way: listed, then issued into a ring of slots, then added. All counted from the
 * beginning. */
struct term_ring {
    unsigned char *memory;
    struct warp_lists *lists;
    uint32_t barriers; /* an mbarrier per slot */
    uint32_t parities; /* a bit per slot */
    uint32_t head, tail;
    uint32_t listed, issued, added;
};

/* Keeps as many loads on their way as there are slots. Whole warp. */
template <int VECS> static __device__ __forceinline__ void ring_fill(term_ring &ring)
{
    while (ring.issued != ring.listed && ring.issued - ring.added < RING) {
        if (threadIdx.x % 32 == 0) {
            uint64_t row = ring.lists->row[ring.issued % LISTED];
            bulk_load(shared_address(ring.memory) + ring.head * combine_sizes<VECS>::PIECE_BYTES,
                      reinterpret_cast<const char *>(row & ((1ull << ROW_BITS) - 1)),
                      (uint32_t)(row >> ROW_BITS) * 16, ring.barriers + ring.head * 8);
        }
        ring.issued++;
        ring.head = ring.head + 1 == RING ? 0 : ring.head + 1;
    }
}

/* Adds the oldest term in the ring; its slot is filled again before it is. Lane holds vectors lane, lane + 32, .. of the
 * piece, those past its end too: what is in them goes nowhere. Whole warp. */
template <typename E, int VECS, bool FIRST>
static __device__ __forceinline__ void term_add(term_ring &ring, float (&sum)[VECS][vec16<E>::LANES])
{
    uint32_t lane = threadIdx.x % 32;
    const uint4 *piece =
        reinterpret_cast<const uint4 *>(ring.memory + ring.tail * combine_sizes<VECS>::PIECE_BYTES);
    float weight = ring.lists->weight[ring.added % LISTED];
    bulk_load_wait(ring.barriers + ring.tail * 8, ring.parities >> ring.tail & 1);
    uint4 vecs[VECS]; /* all loads first: their latency is paid once */
#pragma unroll
    for (int v = 0; v < VECS; v++)
        vecs[v] = piece[lane + 32 * v];
    __syncwarp();
    ring.parities ^= 1u << ring.tail;
    ring.tail = ring.tail + 1 == RING ? 0 : ring.tail + 1;
    ring.added++;
    ring_fill<VECS>(ring);
#pragma unroll
    for (int v = 0; v < VECS; v++) {
        float values[vec16<E>::LANES];
        vec16<E>::unpack(vecs[v], values);
#pragma unroll
        for (int i = 0; i < vec16<E>::LANES; i++)
            sum[v][i] = fmaf(weight, values[i], FIRST ? 0.0f : sum[v][i]);
    }
}

/* The sum of a unit's terms in their order, in fp32. Whole warp. */
template <typename E, int VECS>
static __device__ __forceinline__ void unit_add(term_ring &ring, uint32_t n,
                                                float (&sum)[VECS][vec16<E>::LANES])
{
    if (n > 0) {
        term_add<E, VECS, true>(ring, sum);
    } else {
#pragma unroll
        for (int v = 0; v < VECS; v++)
#pragma unroll
            for (int i = 0; i < vec16<E>::LANES; i++)
                sum[v][i] = 0.0f;
    }
    for (uint32_t term = 1; term < n; term++)
        term_add<E, VECS, false>(ring, sum);
}

#endif
