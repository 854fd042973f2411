/* Routing by one block, out of the way of the tokens: it is hidden behind their first piece on the link.
 *
 * 32 tokens make a word; a warp takes a run of consecutive words. For each word it keeps a bit per (expert,
 * token) in shared memory: a bit that is already set is an expert named twice, and the bits below a token's
 * own count its predecessors. So the position of (t, k) among the rows of its expert is rows of earlier warps
 * + rows of earlier words of this warp + bits below and the layout is the same in every run, with no sort and
 * no atomic order. */
#ifndef EPD_KERNELS_CUDA_ROUTE_CUH
#define EPD_KERNELS_CUDA_ROUTE_CUH

#include "kernels/cuda/exchange.cuh"

/* expert / n_local_experts without a division, which costs as much as all else that is done for a slot. */
struct rank_finder {
    uint32_t factor; /* 2^32 / n_local_experts, rounded up; 0: each rank has one */
};

static __device__ __forceinline__ uint32_t rank_of(const rank_finder &finder, int32_t expert)
{
    return finder.factor ? __umulhi((uint32_t)expert, finder.factor) : (uint32_t)expert;
}

/* Arrays of the block in shared memory; [n_warps, E] and [n_warps, 32 K]. */
struct route_memory {
    uint32_t n_warps;
    int32_t *rows;     /* rows of an expert in the words of a warp; after the scan, of all warps before */
    uint32_t *bits;    /* all zero between words */
    int32_t *tile_row; /* rows and ranks of the 32 tokens of a word */
    int32_t *tile_rank;
    int32_t *tokens;    /* [EPD_MAX_RANKS] of each rank */
    int32_t *sent;      /* [EPD_MAX_RANKS] tokens of this rank that go to each rank */
    int32_t *first_row; /* [E] row of the first of this rank's rows at the expert's rank */
    rank_finder finder;
};

static __host__ __device__ inline size_t route_warp_bytes(uint32_t n_experts, uint32_t top_k)
{
    return ((size_t)n_experts * 2 + (size_t)top_k * 64) * 4;
}

/* Warps the shared memory has room for; 0: not even one. */
static __host__ __device__ inline uint32_t route_warps(uint32_t n_experts, uint32_t top_k,
                                                       size_t shared_bytes, uint32_t max_warps)
{
    size_t fixed = ((size_t)n_experts + 2 * EPD_MAX_RANKS) * 4;
    if (fixed >= shared_bytes)
        return 0;
    size_t fit = (shared_bytes - fixed) / route_warp_bytes(n_experts, top_k);
    return fit < max_warps ? (uint32_t)fit : max_warps;
}

/* See route_share. */
static constexpr uint32_t SHARED_ROUTING_TOKENS = 2048; /* of all ranks */

static __host__ __device__ inline bool routing_is_shared(const struct exchange_shape &shape)
{
    return shape.world_size > 1 && shape.world_size * shape.max_tokens <= SHARED_ROUTING_TOKENS;
}

static __device__ route_memory route_partition(const struct exchange_shape &shape, void *shared,
                                               size_t shared_bytes)
{
    route_memory m;
    size_t n_experts = shape.n_experts, tile = (size_t)shape.top_k * 32;
    uint32_t n_words = (shape.max_tokens + 31) / 32, n_warps = blockDim.x / 32;
    n_words *= routing_is_shared(shape) ? shape.world_size : 1;
    n_warps = n_words == 0 ? 1 : n_words < n_warps ? n_words : n_warps;
    m.n_warps = route_warps(shape.n_experts, shape.top_k, shared_bytes, n_warps);
    m.finder.factor = shape.n_local_experts == 1 ? 0 : UINT32_MAX / shape.n_local_experts + 1;
    m.tokens = static_cast<int32_t *>(shared);
    m.sent = m.tokens + EPD_MAX_RANKS;
    m.first_row = m.sent + EPD_MAX_RANKS;
    m.rows = m.first_row + n_experts;
    m.bits = reinterpret_cast<uint32_t *>(m.rows + m.n_warps * n_experts);
    m.tile_row = reinterpret_cast<int32_t *>(m.bits + m.n_warps * n_experts);
    m.tile_rank = m.tile_row + m.n_warps * tile;
    return m;
}

struct word_range {
    uint32_t begin, end;
};

static __device__ __forceinline__ word_range words_of_warp(uint32_t n_words, uint32_t n_warps, uint32_t warp)
{
    uint32_t each = (n_words + n_warps - 1) / n_warps;
    word_range range = {warp * each, (warp + 1) * each};
    range.begin = range.begin < n_words ? range.begin : n_words;
    range.end = range.end < n_words ? range.end : n_words;
    return range;
}

static __device__ __forceinline__ int64_t topk_value(const struct tensor &topk_idx, size_t i)
{
    return topk_idx.dtype == EPD_I64 ? static_cast<const int64_t *>(topk_idx.data)[i]
                                     : (int64_t) static_cast<const int32_t *>(topk_idx.data)[i];
}

/* One value of topk_idx as an int32: -1 stays, what is no expert becomes NO_EXPERT. */
static constexpr int32_t NO_EXPERT = INT32_MIN;

static __device__ __forceinline__ int32_t topk_expert(const struct tensor &topk_idx, size_t i,
                                                      uint32_t n_experts)
{
    int64_t value = topk_value(topk_idx, i);
    return value == -1 ? -1 : value >= 0 && value < n_experts ? (int32_t)value : NO_EXPERT;
}

/* n experts from `first` on into the tile, all loads in flight at once: latency is what routing costs. From
 * checked, or, if that is NULL, from topk_idx. One warp. */
static constexpr uint32_t LOADS = 8;

static __device__ __forceinline__ void word_load(const struct cuda_dispatch_args &a, const int32_t *checked,
                                                 int32_t *tile, uint32_t first, uint32_t n)
{
    for (uint32_t i0 = threadIdx.x % 32; i0 < n; i0 += 32 * LOADS) {
        int32_t experts[LOADS];
#pragma unroll
        for (uint32_t b = 0; b < LOADS; b++) {
            uint32_t i = i0 + 32 * b;
            if (i < n)
                experts[b] = checked ? checked[first + i]
                                     : topk_expert(a.topk_idx, first + i, a.exchange.shape.n_experts);
        }
#pragma unroll
        for (uint32_t b = 0; b < LOADS; b++)
            if (i0 + 32 * b < n)
                tile[i0 + 32 * b] = experts[b];
    }
    __syncwarp();
}

/* (token, k) of a word: how many there are. */
static __device__ __forceinline__ uint32_t word_slots(uint32_t n_tokens, uint32_t top_k, uint32_t word)
{
    uint32_t left = n_tokens - word * 32;
    return (left < 32 ? left : 32) * top_k;
}

/* Adds the bits of a word to `rows` and clears them. Whole warp. */
static __device__ __forceinline__ void word_close(uint32_t n_experts, int32_t *rows, uint32_t *bits,
                                                  uint32_t lane)
{
    __syncwarp();
    for (uint32_t e = lane; e < n_experts; e += 32) {
        uint32_t set = bits[e];
        if (set) {
            rows[e] += __popc(set);
            bits[e] = 0;
        }
    }
    __syncwarp();
}

/* Marks the experts of one token (lane) in `bits`; one that is named again, or is none, becomes -1 in the
 * tile. Returns the ranks of the others. */
static __device__ __forceinline__ uint64_t token_mark(const struct exchange_shape &shape,
                                                      const rank_finder &finder, int32_t *tile,
                                                      uint32_t *bits, uint32_t first, uint32_t *first_bad)
{
    uint32_t lane = threadIdx.x % 32;
    uint64_t ranks = 0;
    for (uint32_t k = 0; k < shape.top_k; k++) {
        uint32_t i = lane * shape.top_k + k;
        int32_t expert = tile[i];
        bool bad = expert == NO_EXPERT;
        if (expert >= 0) {
            bad = (atomicOr(&bits[expert], 1u << lane) >> lane) & 1;
            ranks |= 1ull << rank_of(finder, expert);
        }
        if (!bad)
            continue;
        tile[i] = -1;
        atomicMin(first_bad, first + i);
    }
    return ranks;
}

/* Lane l has a token for `ranks`. Whole warp. */
static __device__ __forceinline__ void tokens_tally(const struct exchange_shape &shape, int32_t *sent,
                                                    uint64_t ranks)
{
    for (uint32_t rank = 0; rank < shape.world_size; rank++) {
        uint32_t n = __popc(__ballot_sync(FULL_WARP, ranks >> rank & 1));
        if (threadIdx.x % 32 == 0 && n)
            atomicAdd(&sent[rank], (int32_t)n);
    }
}

/* Whole block. */
static __device__ __forceinline__ void rows_clear(const struct exchange_shape &shape, const route_memory &m)
{
    for (uint32_t i = threadIdx.x; i < m.n_warps * shape.n_experts; i += blockDim.x) {
        m.rows[i] = 0;
        m.bits[i] = 0;
    }
    __syncthreads();
}

/* Checks topk_idx into routing.expert (or reads it back, if `again`) and counts m.rows. first_bad: smallest t
 * * K + k that was refused. Whole block. */
static __device__ void route_count(const struct cuda_dispatch_args &a, const route_memory &m, bool again,
                                   uint32_t *first_bad)
{
    const struct exchange_shape &shape = a.exchange.shape;
    uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (threadIdx.x == 0)
        *first_bad = UINT32_MAX;
    if (threadIdx.x < EPD_MAX_RANKS)
        m.sent[threadIdx.x] = 0;
    rows_clear(shape, m);
    if (warp < m.n_warps) {
        uint32_t *bits = m.bits + warp * shape.n_experts;
        int32_t *tile = m.tile_row + warp * 32 * shape.top_k;
        word_range words = words_of_warp((shape.n_tokens + 31) / 32, m.n_warps, warp);
        for (uint32_t word = words.begin; word < words.end; word++) {
            uint32_t first = word * 32 * shape.top_k, n = word_slots(shape.n_tokens, shape.top_k, word);
            word_load(a, again ? a.routing.base.expert : NULL, tile, first, n);
            uint64_t ranks = 0;
            if (lane * shape.top_k < n)
                ranks = token_mark(shape, m.finder, tile, bits, first, first_bad);
            if (a.routing.sent_tokens)
                tokens_tally(shape, m.sent, ranks);
            word_close(shape.n_experts, m.rows + warp * shape.n_experts, bits, lane);
            for (uint32_t i = lane; i < n && !again; i += 32)
                a.routing.base.expert[first + i] = tile[i];
            __syncwarp();
        }
    }
    __syncthreads();
}

/* m.rows becomes the rows of earlier warps; the sums go to row `rank` of counts at every rank if `send`.
 * Whole block. */
static __device__ void route_scan(const struct cuda_dispatch_args &a, const route_memory &m, bool send)
{
    const struct cuda_exchange &x = a.exchange;
    uint32_t n_experts = x.shape.n_experts;
    for (uint32_t e = threadIdx.x; e < n_experts; e += blockDim.x) {
        int32_t sum = 0;
        for (uint32_t warp = 0; warp < m.n_warps; warp++) {
            int32_t rows = m.rows[warp * n_experts + e];
            m.rows[warp * n_experts + e] = sum;
            sum += rows;
        }
        for (uint32_t rank = 0; send && rank < x.shape.world_size; rank++)
            reinterpret_cast<int32_t *>(workspace_of(x, rank) +
                                        x.layout.counts)[x.shape.rank * n_experts + e] = sum;
    }
    if (send && threadIdx.x < x.shape.world_size)
        reinterpret_cast<int32_t *>(workspace_of(x, threadIdx.x) + x.layout.tokens)[x.shape.rank] =
            (int32_t)x.shape.n_tokens;
}

/* By the rule of the host kernels: a record that names a token goes before one that names none. One thread.
 */
static __device__ void route_record_bad(const struct cuda_dispatch_args &a, uint32_t first_bad)
{
    const struct exchange_shape &shape = a.exchange.shape;
    int32_t token = (int32_t)(first_bad / shape.top_k);
    if (first_bad == UINT32_MAX || (a.error->status != 0 && a.error->token >= 0 && a.error->token <= token))
        return;
    int64_t got = topk_value(a.topk_idx, first_bad);
    a.error->status = EPD_BAD_ROUTING;
    a.error->rank = a.exchange.set.first_rank + shape.rank;
    a.error->expert = got >= 0 && got < shape.n_experts ? (int32_t)got : -1;
    a.error->token = token;
    a.error->got = got;
    a.error->allowed = (int64_t)shape.n_experts - 1;
}

static __device__ void route_record_overflow(const struct cuda_dispatch_args &a, int64_t needed)
{
    const struct exchange_shape &shape = a.exchange.shape;
    if (needed <= shape.capacity_rows || a.error->status != 0)
        return;
    a.error->status = EPD_CAPACITY_OVERFLOW;
    a.error->rank = a.exchange.set.first_rank + shape.rank;
    a.error->expert = -1;
    a.error->token = -1;
    a.error->got = needed;
    a.error->allowed = shape.capacity_rows;
}

static __device__ __forceinline__ int64_t smaller(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

/* The slabs of one receiving rank: first_row of the rows in each that come after those of n_before ranks, and of the
 * sets before, and, if the rank is this one, the layout itself. One warp. */
static __device__ void route_slabs(const struct cuda_dispatch_args &a, const route_memory &m, uint32_t rank,
                                   uint32_t n_before)
{
    const struct cuda_exchange &x = a.exchange;
    const struct exchange_shape &shape = x.shape;
    const struct routing &routing = a.routing.base;
    const char *counts = workspace_of(x, shape.rank) + x.layout.counts - x.set.idx * x.set.bytes;
    uint32_t lane = threadIdx.x % 32;
    int64_t mask = (int64_t)shape.alignment - 1, capacity = shape.capacity_rows, next = 0, dropped = 0;
    for (uint32_t l0 = 0; l0 < shape.n_local_experts; l0 += 32) {
        uint32_t l = l0 + lane, expert = rank * shape.n_local_experts + l;
        int64_t rows = 0, before = 0;
        for (uint32_t set = 0; set <= x.set.n_more && l < shape.n_local_experts; set++) {
            const int32_t *of_set = reinterpret_cast<const int32_t *>(counts + set * x.set.bytes);
            uint32_t n_first = set < x.set.idx ? shape.world_size : set == x.set.idx ? n_before : 0;
            for (uint32_t from = 0; from < shape.world_size; from++) {
                int32_t n = of_set[from * shape.n_experts + expert];
                rows += n;
                before += from < n_first ? n : 0;
            }
        }
        int64_t padded = (rows + mask) & ~mask, end = padded;
        for (int step = 1; step < 32; step <<= 1) {
            int64_t other = __shfl_up_sync(FULL_WARP, (long long)end, step);
            end += lane >= step ? other : 0;
        }
        int64_t slab = next + end - padded;
        if (l < shape.n_local_experts) {
            m.first_row[expert] = (int32_t)smaller(slab + before, INT32_MAX);
            if (rank == shape.rank) {
                int64_t first = smaller(slab, capacity), kept = smaller(rows, capacity - first);
                routing.offsets[l] = first;
                routing.m_splits[l] = kept;
                if (a.offsets_out)
                    a.offsets_out[l] = first;
                if (a.splits_out)
                    a.splits_out[l] = kept;
                dropped += rows - kept;
            }
        }
        next += __shfl_sync(FULL_WARP, (long long)end, 31);
    }
    dropped = warp_sum(dropped);
    if (rank != shape.rank || lane != 0)
        return;
    routing.offsets[shape.n_local_experts] = smaller(next, capacity);
    if (a.offsets_out)
        a.offsets_out[shape.n_local_experts] = smaller(next, capacity);
    *routing.needed_rows = next;
    *routing.dropped_rows = dropped;
    route_record_overflow(a, next);
}

/* The tile's experts become rows; their ranks beside it. m.rows and m.bits as after the scan. One warp. */
static __device__ void word_place(const struct cuda_dispatch_args &a, const route_memory &m, uint32_t warp,
                                  uint32_t n)
{
    const struct exchange_shape &shape = a.exchange.shape;
    uint32_t lane = threadIdx.x % 32, earlier = (1u << lane) - 1;
    uint32_t *bits = m.bits + warp * shape.n_experts;
    int32_t *rows = m.rows + warp * shape.n_experts;
    int32_t *tile_row = m.tile_row + warp * 32 * shape.top_k,
            *tile_rank = m.tile_rank + warp * 32 * shape.top_k;
    for (uint32_t i = lane * shape.top_k, end = i + shape.top_k; i < end && i < n; i++)
        if (tile_row[i] >= 0)
            atomicOr(&bits[tile_row[i]], 1u << lane);
    __syncwarp();
    for (uint32_t i = lane * shape.top_k, end = i + shape.top_k; i < end && i < n; i++) {
        int32_t expert = tile_row[i], row = -1, rank = -1;
        if (expert >= 0) {
            int64_t at = (int64_t)m.first_row[expert] + rows[expert] + __popc(bits[expert] & earlier);
            rank = (int32_t)rank_of(m.finder, expert);
            row = at < shape.capacity_rows ? (int32_t)at : -1;
        }
        tile_row[i] = row;
        tile_rank[i] = rank;
    }
    word_close(shape.n_experts, rows, bits, lane);
}

/* The tile to routing.row, and to every rank what it needs of it. One warp. */
static __device__ void word_send(const struct cuda_dispatch_args &a, const route_memory &m, uint32_t warp,
                                 uint32_t word)
{
    const struct cuda_exchange &x = a.exchange;
    const struct exchange_shape &shape = x.shape;
    const int32_t *tile_row = m.tile_row + warp * 32 * shape.top_k,
                  *tile_rank = m.tile_rank + warp * 32 * shape.top_k;
    uint32_t first = word * 32 * shape.top_k, n = word_slots(shape.n_tokens, shape.top_k, word);
    const float *given = static_cast<const float *>(a.topk_weights.data);
    for (uint32_t i0 = threadIdx.x % 32; i0 < n; i0 += 32 * LOADS) {
        float weights[LOADS];
#pragma unroll
        for (uint32_t b = 0; b < LOADS; b++)
            weights[b] = given && i0 + 32 * b < n ? given[first + i0 + 32 * b] : 1.0f;
        for (uint32_t step = 0; step < shape.world_size; step++) {
            uint32_t to = (shape.rank + step) % shape.world_size;
            int32_t *rows = slot_rows_at(x, to, shape.rank) + first;
            float *slot_weights = slot_weights_at(x, to, shape.rank) + first;
#pragma unroll
            for (uint32_t b = 0; b < LOADS; b++) {
                uint32_t i = i0 + 32 * b;
                if (i >= n)
                    break;
                rows[i] = tile_rank[i] == (int32_t)to ? tile_row[i] : -1;
                slot_weights[i] = weights[b];
                if (step == 0)
                    a.routing.base.row[first + i] = tile_row[i];
            }
        }
    }
    __syncwarp();
}

/* From the counts of all ranks the layout of this one; m.first_row as in route_slabs. By the last warps of
 * the block; it may go on with other work until the next barrier. */
static __device__ void route_lay_out(const struct cuda_dispatch_args &a, const route_memory &m,
                                     uint32_t n_before)
{
    uint32_t n_warps = blockDim.x / 32;
    for (uint32_t rank = n_warps - 1 - threadIdx.x / 32; rank < a.exchange.shape.world_size; rank += n_warps)
        route_slabs(a, m, rank, n_before);
}

/* Tokens of all ranks. Whole block. */
static __device__ void tokens_keep(const struct cuda_dispatch_args &a, const route_memory &m)
{
    const struct cuda_exchange &x = a.exchange;
    const int32_t *tokens = reinterpret_cast<int32_t *>(workspace_of(x, x.shape.rank) + x.layout.tokens);
    if (threadIdx.x < x.shape.world_size) {
        m.tokens[threadIdx.x] = (int32_t)smaller(tokens[threadIdx.x], x.shape.max_tokens);
        a.routing.slot_tokens[threadIdx.x] = m.tokens[threadIdx.x];
    }
    __syncthreads();
}

/* Stage 2: the layout, and the rows of this rank's tokens, sent to their ranks. Whole block. */
static __device__ void route_layout(const struct cuda_dispatch_args &a, const route_memory &m)
{
    const struct exchange_shape &shape = a.exchange.shape;
    uint32_t warp = threadIdx.x / 32;
    route_lay_out(a, m, shape.rank);
    tokens_keep(a, m);
    if (warp >= m.n_warps)
        return;
    word_range words = words_of_warp((shape.n_tokens + 31) / 32, m.n_warps, warp);
    for (uint32_t word = words.begin; word < words.end; word++) {
        word_load(a, a.routing.base.expert, m.tile_row + warp * 32 * shape.top_k, word * 32 * shape.top_k,
                  word_slots(shape.n_tokens, shape.top_k, word));
        word_place(a, m, warp, word_slots(shape.n_tokens, shape.top_k, word));
        word_send(a, m, warp, word);
    }
}

/* With few tokens a hop costs more than work. Then every rank sends its checked experts and weights to all at
 * once with its counts, and each finds the rows of all tokens of all ranks itself: one hop instead of two,
 * before the tokens fill the link. The experts lie in slot_row until rows take their place.
 * -------------------------------------- */

/* Whole block. */
static __device__ void route_share(const struct cuda_dispatch_args &a)
{
    const struct cuda_exchange &x = a.exchange;
    const float *weights = static_cast<const float *>(a.topk_weights.data);
    for (uint32_t i = threadIdx.x; i < x.shape.n_tokens * x.shape.top_k; i += blockDim.x) {
        int32_t expert = a.routing.base.expert[i];
        float weight = weights ? weights[i] : 1.0f;
        for (uint32_t to = 0; to < x.shape.world_size; to++) {
            slot_rows_at(x, to, x.shape.rank)[i] = expert;
            slot_weights_at(x, to, x.shape.rank)[i] = weight;
        }
    }
}

/* A word of another rank, or of this one. */
struct shared_word {
    uint32_t source, first, n;
};

static __device__ __forceinline__ shared_word shared_word_find(const struct cuda_dispatch_args &a,
                                                               const route_memory &m, uint32_t word)
{
    const struct exchange_shape &shape = a.exchange.shape;
    shared_word found = {0, 0, 0};
    for (; found.source + 1 < shape.world_size; found.source++) {
        uint32_t n_words = ((uint32_t)m.tokens[found.source] + 31) / 32;
        if (word < n_words)
            break;
        word -= n_words;
    }
    found.first = word * 32 * shape.top_k;
    found.n = word_slots((uint32_t)m.tokens[found.source], shape.top_k, word);
    return found;
}

static __device__ void shared_word_count(const struct cuda_dispatch_args &a, const route_memory &m,
                                         uint32_t warp, uint32_t word)
{
    const struct exchange_shape &shape = a.exchange.shape;
    uint32_t lane = threadIdx.x % 32, *bits = m.bits + warp * shape.n_experts;
    int32_t *tile = m.tile_row + warp * 32 * shape.top_k;
    shared_word found = shared_word_find(a, m, word);
    word_load(a, slot_rows_at(a.exchange, shape.rank, found.source), tile, found.first, found.n);
    for (uint32_t i = lane * shape.top_k, end = i + shape.top_k; i < end && i < found.n; i++)
        if (tile[i] >= 0)
            atomicOr(&bits[tile[i]], 1u << lane);
    word_close(shape.n_experts, m.rows + warp * shape.n_experts, bits, lane);
}

/* loaded: the tile still holds the word. */
static __device__ void shared_word_place(const struct cuda_dispatch_args &a, const route_memory &m,
                                         uint32_t warp, uint32_t word, bool loaded)
{
    const struct exchange_shape &shape = a.exchange.shape;
    int32_t *tile_row = m.tile_row + warp * 32 * shape.top_k,
            *tile_rank = m.tile_rank + warp * 32 * shape.top_k;
    shared_word found = shared_word_find(a, m, word);
    int32_t *slot_rows = slot_rows_at(a.exchange, shape.rank, found.source) + found.first;
    if (!loaded)
        word_load(a, slot_rows, tile_row, 0, found.n);
    word_place(a, m, warp, found.n);
    for (uint32_t i = threadIdx.x % 32; i < found.n; i += 32) {
        if (found.source == shape.rank)
            a.routing.base.row[found.first + i] = tile_row[i];
        slot_rows[i] = tile_rank[i] == (int32_t)shape.rank ? tile_row[i] : -1;
    }
    __syncwarp();
}

/* Stage 2 of a shared routing, after rows_clear. Whole block. */
static __device__ void route_layout_shared(const struct cuda_dispatch_args &a, const route_memory &m)
{
    const struct exchange_shape &shape = a.exchange.shape;
    uint32_t warp = threadIdx.x / 32, n_words = 0;
    tokens_keep(a, m);
    for (uint32_t rank = 0; rank < shape.world_size; rank++)
        n_words += ((uint32_t)m.tokens[rank] + 31) / 32;
    word_range words = words_of_warp(n_words, m.n_warps, warp);
    for (uint32_t word = words.begin; warp < m.n_warps && word < words.end; word++)
        shared_word_count(a, m, warp, word);
    route_lay_out(a, m, 0);
    __syncthreads();
    route_scan(a, m, false);
    __syncthreads();
    for (uint32_t word = words.begin; warp < m.n_warps && word < words.end; word++)
        shared_word_place(a, m, warp, word, words.end - words.begin == 1);
}

/* What nobody waits for. Whole block. */
static __device__ void route_keep(const struct cuda_dispatch_args &a)
{
    const struct cuda_exchange &x = a.exchange;
    const int32_t *counts = reinterpret_cast<int32_t *>(workspace_of(x, x.shape.rank) + x.layout.counts);
    for (uint32_t i = threadIdx.x; i < x.shape.world_size * x.shape.n_experts; i += blockDim.x)
        a.routing.base.counts[i] = counts[i];
}

#endif
