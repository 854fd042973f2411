/* combine: out[t] = sum of w[t, k] y(t, k), from expert-major y [C, H] on every rank to out [T, H].
 *
 * Bytes, per rank and uniform routing, with d = R (1 - (1 - 1/R)^K): T H 2 d (R - 1) / R over the link, one
 * partial sum per (token, rank); T H 2 K of y are read once, at the expert's side or, for the rank's own
 * slots, by the final sum. Floor: the link's (dsv3 on 4 ranks 0.45 ms); summing rides beside it.
 *
 * Blocks of CUDA_STAGE_ALL: the first send_blocks sum and send partial sums, the others wait for them and
 * finish tokens in the order in which their parts arrive; senders that are done finish tokens too. Rounding:
 * cuda.h. */
#include "kernels/cuda/exchange.cuh"

/* A warp has a ring of pieces: the terms of this sum and of the next are on their way while others are added. RESULTS more
 * hold sums that are being sent: to wait until a store has left shared memory costs as much as waiting until it
 * has arrived, about 3 us over the link. One more warp tells, in a block that sends. */
static constexpr uint32_t WARPS = 10, THREADS = (WARPS + 1) * 32, RING = 3, RESULTS = 3;
static constexpr uint32_t WARP_BYTES = (RING + RESULTS) * CUDA_SUM_PIECE_BYTES,
                          SHARED_BYTES = WARPS * WARP_BYTES;
/* Of 32 blocks. With few tokens nothing is left to overlap, and finishing wants the larger part. */
static constexpr uint32_t DEFAULT_SEND_BLOCKS = 22, FEW_TOKENS_SEND_BLOCKS = 12;
static constexpr int SUM_VECS = CUDA_SUM_PIECE_BYTES / 16 / 32; /* of a lane */

struct combine_params {
    struct cuda_combine_args a;
    struct row_pieces pieces;
    uint32_t n_send; /* blocks that begin with sending */
};

/* A sum to be made: its terms, lane i holding the i-th, and where it belongs. */
struct sum_unit {
    const char *row; /* the term's piece */
    float weight;
    uint32_t n; /* terms */
    uint32_t bytes;
    uint32_t id;   /* token * n_pieces + piece */
    uint32_t rank; /* to which it is sent */
    char *to;
};

/* Term of lane k to lane pos, for the lanes in `live`. order: 32 bytes of this warp. Whole warp. */
static __device__ __forceinline__ void terms_order(sum_unit &unit, uint8_t *order, uint32_t live,
                                                   uint32_t pos, const char *row, float weight)
{
    uint32_t lane = threadIdx.x % 32;
    if (live >> lane & 1)
        order[pos] = (uint8_t)lane;
    __syncwarp();
    unit.n = __popc(live);
    int from = lane < unit.n ? order[lane] : 0;
    __syncwarp();
    unit.row = reinterpret_cast<const char *>(
        __shfl_sync(FULL_WARP, reinterpret_cast<unsigned long long>(row), from));
    unit.weight = __shfl_sync(FULL_WARP, weight, from);
}

/* Slots are filled at the head and emptied at the tail, in the order of the terms. */
struct term_ring {
    unsigned char *memory;
    uint32_t barriers; /* an mbarrier per slot */
    uint32_t parities; /* a bit per slot */
    uint32_t head, tail, n_full;
};

/* Starts loading the unit's terms from `issued` on, as far as there is room. Whole warp. */
static __device__ __forceinline__ void terms_issue(term_ring &ring, const sum_unit &unit, uint32_t &issued)
{
    uint32_t lane = threadIdx.x % 32, left = unit.n - issued, room = RING - ring.n_full;
    uint32_t n = left < room ? left : room;
    if (lane - issued < n) {
        uint32_t slot = ring.head + lane - issued;
        slot -= slot >= RING ? RING : 0;
        bulk_load(shared_address(ring.memory) + slot * CUDA_SUM_PIECE_BYTES, unit.row, unit.bytes,
                  ring.barriers + slot * 8);
    }
    issued += n;
    ring.n_full += n;
    ring.head += n;
    ring.head -= ring.head >= RING ? RING : 0;
}

/* Adds the oldest term in the ring. Lane holds vectors lane, lane + 32, .. of the piece. Whole warp. */
template <typename E>
static __device__ __forceinline__ void term_add(term_ring &ring, uint32_t bytes, float weight,
                                                float (&sum)[SUM_VECS][vec16<E>::LANES])
{
    uint32_t lane = threadIdx.x % 32;
    const uint4 *piece = reinterpret_cast<const uint4 *>(ring.memory + ring.tail * CUDA_SUM_PIECE_BYTES);
    bulk_load_wait(ring.barriers + ring.tail * 8, ring.parities >> ring.tail & 1);
    uint4 vecs[SUM_VECS]; /* all loads first: their latency is paid once */
#pragma unroll
    for (int v = 0; v < SUM_VECS; v++)
        vecs[v] = (lane + 32 * v) * 16 < bytes ? piece[lane + 32 * v] : make_uint4(0, 0, 0, 0);
#pragma unroll
    for (int v = 0; v < SUM_VECS; v++) {
        float values[vec16<E>::LANES];
        vec16<E>::unpack(vecs[v], values);
#pragma unroll
        for (int i = 0; i < vec16<E>::LANES; i++)
            sum[v][i] += weight * values[i];
    }
    __syncwarp();
    ring.parities ^= 1u << ring.tail;
    ring.n_full--;
    ring.tail = ring.tail + 1 == RING ? 0 : ring.tail + 1;
}

/* The sum of the terms in their order, in fp32; the ring is kept full with what is left of them and then with
 * those of the next unit. Whole warp. */
template <typename E>
static __device__ __forceinline__ void unit_add(term_ring &ring, const sum_unit &unit, uint32_t &issued,
                                                const sum_unit &next, uint32_t &next_issued,
                                                float (&sum)[SUM_VECS][vec16<E>::LANES])
{
#pragma unroll
    for (int v = 0; v < SUM_VECS; v++)
#pragma unroll
        for (int i = 0; i < vec16<E>::LANES; i++)
            sum[v][i] = 0.0f;
    for (uint32_t term = 0; term < unit.n; term++) {
        terms_issue(ring, unit, issued);
        if (issued == unit.n)
            terms_issue(ring, next, next_issued);
        term_add<E>(ring, unit.bytes, __shfl_sync(FULL_WARP, unit.weight, term), sum);
    }
    if (issued == unit.n)
        terms_issue(ring, next, next_issued);
}

template <typename E>
static __device__ __forceinline__ void sum_store(const float (&sum)[SUM_VECS][vec16<E>::LANES],
                                                 uint32_t bytes, void *to)
{
    uint32_t lane = threadIdx.x % 32;
#pragma unroll
    for (int v = 0; v < SUM_VECS; v++)
        if ((lane + 32 * v) * 16 < bytes)
            static_cast<uint4 *>(to)[lane + 32 * v] = vec16<E>::pack(sum[v]);
}

/* Weights of the tokens of `source` as the expert's side has them; NULL: all 1. */
static __device__ __forceinline__ const float *weights_of(const struct cuda_combine_args &a, uint32_t source)
{
    const struct exchange_shape &shape = a.exchange.shape;
    if (a.topk_weights.data)
        return source == shape.rank ? static_cast<const float *>(a.topk_weights.data)
                                    : slot_weights_at(a.exchange, shape.rank, source);
    if (a.saved_weights)
        return a.routing.slot_weight + (size_t)source * shape.max_tokens * shape.top_k;
    return NULL;
}

static __device__ void publish_weights(const struct cuda_combine_args &a)
{
    const struct cuda_exchange &x = a.exchange;
    const float *weights = static_cast<const float *>(a.topk_weights.data);
    for (uint32_t step = 1; step < x.shape.world_size; step++) {
        float *to = slot_weights_at(x, (x.shape.rank + step) % x.shape.world_size, x.shape.rank);
        for (uint32_t i = threadIdx.x; i < x.shape.n_tokens * x.shape.top_k; i += blockDim.x)
            to[i] = weights[i];
    }
}

/* A unit whose slots are being looked up, one ahead of the unit whose terms are being loaded. Lane k holds
 * slot k. */
struct unit_lookup {
    uint32_t taken; /* >= n_units: there is none */
    uint32_t token, source, piece;
    int32_t row, expert;
    float weight;
};

static __device__ __forceinline__ unit_lookup partial_lookup(const combine_params &p, unit_queue &queue,
                                                             uint32_t n_units)
{
    const struct exchange_shape &shape = p.a.exchange.shape;
    uint32_t lane = threadIdx.x % 32, n_others = shape.world_size - 1;
    unit_lookup u = {queue_take(queue, lane), 0, 0, 0, -1, -1, 1.0f};
    if (u.taken >= n_units)
        return u;
    uint32_t place = u.taken / p.pieces.n_pieces;
    u.piece = u.taken % p.pieces.n_pieces;
    u.token = place / n_others;
    u.source = (shape.rank + 1 + place % n_others) % shape.world_size;
    if (lane < shape.top_k) {
        size_t i = (size_t)u.token * shape.top_k + lane;
        const float *weights = weights_of(p.a, u.source);
        u.row = p.a.routing.slot_row[(size_t)u.source * shape.max_tokens * shape.top_k + i];
        u.weight = weights ? weights[i] : 1.0f;
    }
    return u;
}

/* The next unit that has terms here; one without terms at the end. Whole warp. */
static __device__ __forceinline__ bool partial_next(const combine_params &p, unit_queue &queue,
                                                    uint32_t n_units, unit_lookup &ahead, uint8_t *order,
                                                    sum_unit &unit)
{
    const struct cuda_exchange &x = p.a.exchange;
    uint32_t lane = threadIdx.x % 32;
    unit.n = 0;
    while (ahead.taken < n_units) {
        unit_lookup u = ahead;
        ahead = partial_lookup(p, queue, n_units);
        if (u.token >= (uint32_t)p.a.routing.slot_tokens[u.source])
            u.row = -1;
        uint32_t live = __ballot_sync(FULL_WARP, u.row >= 0);
        if (live == 0)
            continue;
        size_t at = (size_t)u.piece * p.pieces.piece_bytes;
        unit.bytes = piece_length(p.pieces, u.piece);
        unit.id = u.token * p.pieces.n_pieces + u.piece;
        unit.rank = u.source;
        unit.to = stage_at(x, u.source, x.shape.rank, u.token) + at;
        const char *y =
            static_cast<const char *>(p.a.y) + (size_t)(u.row < 0 ? 0 : u.row) * p.pieces.row_bytes + at;
        terms_order(unit, order, live, __popc(live & ((1u << lane) - 1)), y, u.weight);
        return true;
    }
    return false;
}

/* Sums that are on their way, oldest first, and the box of the block that they are handed to. Lane 0. */
static constexpr int SENT = RESULTS - 1;

struct sent_sums {
    uint32_t unit[SENT];
    uint64_t ranks[SENT];
};

static __device__ __forceinline__ void sums_sent(sent_sums &sent, sent_box &box, uint32_t unit,
                                                 uint64_t ranks)
{
    box_put(box, threadIdx.x / 32, sent.unit[0], sent.ranks[0]);
    sent.unit[0] = sent.unit[1];
    sent.ranks[0] = sent.ranks[1];
    sent.unit[1] = unit;
    sent.ranks[1] = ranks;
}

/* Partial sums of the tokens of all other ranks, in order of token. Whole warp. */
template <typename E>
static __device__ void send_sums(const combine_params &p, term_ring &ring, uint8_t *order, sent_box &box)
{
    const struct cuda_exchange &x = p.a.exchange;
    uint32_t lane = threadIdx.x % 32, most_tokens = 0, issued = 0;
    for (uint32_t rank = 0; rank < x.shape.world_size; rank++)
        most_tokens = max(most_tokens, rank == x.shape.rank ? 0 : (uint32_t)p.a.routing.slot_tokens[rank]);
    uint32_t n_units = most_tokens * (x.shape.world_size - 1) * p.pieces.n_pieces;
    uint32_t turn = 0;
    sent_sums sent = {{0, 0}, {0, 0}};
    unit_queue queue = {&state_of(x)->next[0], 0};
    queue_fetch(queue, lane);
    unit_lookup ahead = partial_lookup(p, queue, n_units);
    sum_unit unit, next;
    bool more = partial_next(p, queue, n_units, ahead, order, unit);
    while (more) {
        uint32_t next_issued = 0;
        terms_issue(ring, unit, issued);
        more = partial_next(p, queue, n_units, ahead, order, next);
        float sum[SUM_VECS][vec16<E>::LANES];
        unit_add<E>(ring, unit, issued, next, next_issued, sum);
        unsigned char *result = ring.memory + (RING + turn) * CUDA_SUM_PIECE_BYTES;
        turn = turn + 1 == RESULTS ? 0 : turn + 1;
        if (lane == 0)
            bulk_wait_read<SENT>();
        __syncwarp();
        sum_store<E>(sum, unit.bytes, result);
        fence_bulk_shared();
        __syncwarp();
        if (lane == 0) {
            bulk_store(unit.to, shared_address(result), unit.bytes);
            bulk_commit();
            if (polls(x)) {
                bulk_wait_written<SENT>();
                sums_sent(sent, box, unit.id, 1ull << unit.rank);
            }
        }
        unit = next;
        issued = next_issued;
    }
    if (lane == 0) {
        bulk_wait_written<0>();
        sums_sent(sent, box, 0, 0);
        sums_sent(sent, box, 0, 0);
        box_done(box);
    }
    __syncwarp();
}

static __device__ __forceinline__ unit_lookup token_lookup(const combine_params &p, unit_queue &queue)
{
    const struct exchange_shape &shape = p.a.exchange.shape;
    uint32_t lane = threadIdx.x % 32;
    unit_lookup u = {queue_take(queue, lane), 0, shape.rank, 0, -1, -1, 1.0f};
    u.token = u.taken / p.pieces.n_pieces;
    u.piece = u.taken % p.pieces.n_pieces;
    if (lane < shape.top_k && u.token < shape.n_tokens) {
        size_t i = (size_t)u.token * shape.top_k + lane;
        const float *weights = weights_of(p.a, shape.rank);
        u.row = p.a.routing.base.row[i];
        u.expert = p.a.routing.base.expert[i];
        u.weight = weights ? weights[i] : 1.0f;
    }
    return u;
}

/* The next piece of out and its terms: own slots and the partial sums of other ranks, by rank, then k; waits
 * for the latter. False at the end, and after an abort. Whole warp. */
static __device__ __forceinline__ bool token_next(const combine_params &p, unit_queue &queue,
                                                  unit_lookup &ahead, uint8_t *order, uint32_t epoch,
                                                  sum_unit &unit)
{
    const struct cuda_exchange &x = p.a.exchange;
    const struct exchange_shape &shape = x.shape;
    uint32_t lane = threadIdx.x % 32;
    unit_lookup u = ahead;
    unit.n = 0;
    if (u.token >= shape.n_tokens)
        return false;
    ahead = token_lookup(p, queue);
    uint32_t rank = u.row >= 0 ? (uint32_t)u.expert / shape.n_local_experts : UINT32_MAX;
    uint32_t peers = __match_any_sync(FULL_WARP, rank);
    bool own = rank == shape.rank, leads = lane == (uint32_t)__ffs(peers) - 1, ok = true;
    uint32_t live = __ballot_sync(FULL_WARP, u.row >= 0 && (own || leads)), pos = 0;
    for (uint32_t left = live; left; left &= left - 1) {
        uint32_t other = __ffs(left) - 1, other_rank = __shfl_sync(FULL_WARP, rank, other);
        pos += other_rank < rank || (other_rank == rank && other < lane);
    }
    size_t at = (size_t)u.piece * p.pieces.piece_bytes;
    const char *from = NULL;
    if (live >> lane & 1)
        from = (own ? static_cast<const char *>(p.a.y) + (size_t)u.row * p.pieces.row_bytes
                    : stage_at(x, shape.rank, rank, u.token)) +
               at;
    if ((live >> lane & 1) && !own && polls(x)) {
        ok = wait_flag(arrival_at(x, shape.rank, rank, u.taken), epoch, true, x.abort_word);
        fence_bulk_global();
    }
    unit.bytes = piece_length(p.pieces, u.piece);
    unit.to = static_cast<char *>(p.a.out.data) + (size_t)u.token * p.pieces.row_bytes + at;
    terms_order(unit, order, live, pos, from, own ? u.weight : 1.0f);
    if (__all_sync(FULL_WARP, ok))
        return true;
    unit.n = 0;
    return false;
}

/* Whole warp. */
template <typename E>
static __device__ void finish_tokens(const combine_params &p, term_ring &ring, uint8_t *order, uint32_t epoch)
{
    uint32_t issued = 0;
    unit_queue queue = {&state_of(p.a.exchange)->next[1], 0};
    queue_fetch(queue, threadIdx.x % 32);
    unit_lookup ahead = token_lookup(p, queue);
    sum_unit unit, next;
    bool more = token_next(p, queue, ahead, order, epoch, unit);
    while (more) {
        uint32_t next_issued = 0;
        terms_issue(ring, unit, issued);
        more = token_next(p, queue, ahead, order, epoch, next);
        float sum[SUM_VECS][vec16<E>::LANES];
        unit_add<E>(ring, unit, issued, next, next_issued, sum);
        sum_store<E>(sum, unit.bytes, unit.to);
        unit = next;
        issued = next_issued;
    }
}

template <typename E>
static __global__ void __launch_bounds__(THREADS, 1) combine_kernel(const __grid_constant__ combine_params p)
{
    extern __shared__ __align__(128) unsigned char shared[];
    __shared__ uint8_t orders[WARPS + 1][32];
    __shared__ __align__(8) uint64_t barriers[WARPS + 1][RING];
    __shared__ sent_box box;
    const struct cuda_exchange &x = p.a.exchange;
    uint32_t warp = threadIdx.x / 32, epoch = op_enter(x);
    term_ring ring = {shared + warp * WARP_BYTES, shared_address(barriers[warp]), 0, 0, 0, 0};
    if (threadIdx.x % 32 < RING)
        mbarrier_init(ring.barriers + threadIdx.x % 32 * 8);
    box_init(box);
    __syncthreads();
    bool publishes = p.a.topk_weights.data && blockIdx.x == 0 && does(x, CUDA_STAGE_PUBLISH);
    bool sends = blockIdx.x < p.n_send && does(x, CUDA_STAGE_SEND), ok = true;
    if (publishes || sends)
        ok = signals_wait(x, SIGNAL_ENTERED, epoch);
    if (publishes && ok) {
        publish_weights(p.a);
        signals_raise(x, SIGNAL_SLOTS, epoch);
    }
    if (sends && ok && p.a.topk_weights.data)
        ok = signals_wait(x, SIGNAL_SLOTS, epoch);
    if (sends && ok && warp < WARPS)
        send_sums<E>(p, ring, orders[warp], box);
    else if (sends && ok && polls(x))
        box_tell(x, box, WARPS, epoch);
    __syncwarp();
    if (ok && warp < WARPS && does(x, CUDA_STAGE_RECEIVE))
        finish_tokens<E>(p, ring, orders[warp], epoch);
    op_leave(x, epoch);
}

static const void *kernel_of(enum epd_dtype dtype)
{
    switch (dtype) {
    case EPD_BF16:
        return reinterpret_cast<const void *>(combine_kernel<__nv_bfloat16>);
    case EPD_F16:
        return reinterpret_cast<const void *>(combine_kernel<__half>);
    case EPD_F32:
        return reinterpret_cast<const void *>(combine_kernel<float>);
    default:
        return NULL;
    }
}

enum epd_status combine_load(struct epd_error *error)
{
    const enum epd_dtype dtypes[] = {EPD_BF16, EPD_F16, EPD_F32};
    enum epd_status status = EPD_OK;
    for (size_t i = 0; i < sizeof(dtypes) / sizeof(dtypes[0]) && status == EPD_OK; i++)
        status = kernel_load(kernel_of(dtypes[i]), SHARED_BYTES, "combine", error);
    return status;
}

static enum epd_status combine_check(const struct cuda_combine_args *args, struct epd_error *error)
{
    size_t row_bytes = args->exchange.shape.hidden * dtype_bytes(args->out.dtype);
    enum epd_status status = exchange_check(&args->exchange, "combine", error);
    if (status == EPD_OK)
        status = row_bytes_check(&args->exchange, row_bytes, "combine", error);
    if (status != EPD_OK)
        return status;
    if (!kernel_of(args->out.dtype))
        return error_set(error, EPD_INVALID_DTYPE, "combine out: %s", dtype_name(args->out.dtype));
    if (!aligned16(args->y) || !aligned16(args->out.data))
        return error_set(error, EPD_INVALID_ALIGNMENT, "combine: y and out want 16-byte alignment");
    if (args->saved_weights && !args->routing.slot_weight)
        return error_set(error, EPD_INVALID_ARGUMENT, "combine: the routing saved no weights");
    return EPD_OK;
}

enum epd_status cuda_combine_launch(const struct cuda_combine_args *args, struct CUstream_st *stream,
                                    struct epd_error *error)
{
    enum epd_status status = combine_check(args, error);
    if (status != EPD_OK)
        return status;
    const struct cuda_exchange *x = &args->exchange;
    struct combine_params params;
    params.a = *args;
    params.pieces = pieces_of(x->shape.hidden * dtype_bytes(args->out.dtype), CUDA_SUM_PIECE_BYTES);
    uint32_t blocks = x->stage == CUDA_STAGE_PUBLISH ? 1 : blocks_of(x);
    params.n_send = blocks;
    if (x->stage == CUDA_STAGE_ALL) {
        uint32_t share =
            x->shape.max_tokens <= CUDA_FEW_TOKENS ? FEW_TOKENS_SEND_BLOCKS : DEFAULT_SEND_BLOCKS;
        uint32_t wanted = x->send_blocks ? x->send_blocks : (blocks * share + 31) / 32;
        params.n_send = wanted < blocks ? wanted : blocks;
    }
    void *arguments[] = {&params};
    return cuda_check(cudaLaunchKernel(kernel_of(args->out.dtype), dim3(blocks), dim3(THREADS), arguments,
                                       SHARED_BYTES, stream),
                      "combine", error);
}
