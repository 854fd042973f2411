/* combine: out[t] = sum of w[t, k] y(t, k), from expert-major y [C, H] on every rank to out [T, H].
 *
 * Bytes, per rank and uniform routing, with d = R (1 - (1 - 1/R)^K): T H 2 d (R - 1) / R over the link, one
 * partial sum per (token, rank); T H 2 K of y are read once, at the expert's side or, for the rank's own
 * slots, by the final sum. Floor: the link's (dsv3 on 4 ranks 0.45 ms); summing rides beside it.
 *
 * Blocks of CUDA_STAGE_ALL: the first send_blocks sum and send partial sums, the others wait for them and
 * finish tokens in the order in which their parts arrive; senders that are done finish tokens too. Rounding:
 * cuda.h. */
#include "kernels/cuda/terms.cuh"

/* Of 32 blocks. With few tokens nothing is left to overlap, and finishing wants the larger part. */
static constexpr uint32_t DEFAULT_SEND_BLOCKS = 18, FEW_TOKENS_SEND_BLOCKS = 12;

struct combine_params {
    struct cuda_combine_args a;
    struct row_pieces pieces;
    uint32_t n_send;     /* blocks that begin with sending */
    uint32_t batch;      /* units that are looked up at once */
    uint32_t slot_lanes; /* lanes of one unit: a power of two, at least top-k */
};

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

/* Slots of a batch that are being looked up, one batch ahead of the one that is listed. Lane g * slot_lanes + k
 * holds slot k of unit g. */
struct slot_lookup {
    uint32_t first; /* unit; >= n_units: there is none */
    uint32_t unit;  /* of this lane; >= n_units: none */
    uint32_t token, source, piece;
    int32_t row, expert, n_tokens;
    float weight;
};

static __device__ __forceinline__ uint32_t slot_of_lane(const combine_params &p)
{
    return threadIdx.x % 32 & (p.slot_lanes - 1);
}

static __device__ __forceinline__ slot_lookup lookup_begin(const combine_params &p, unit_queue &queue,
                                                           uint32_t n_units)
{
    uint32_t lane = threadIdx.x % 32, idx = lane / p.slot_lanes;
    slot_lookup u = {queue_take(queue, lane) * p.batch, UINT32_MAX, 0, 0, 0, -1, -1, INT32_MAX, 1.0f};
    if (u.first >= n_units)
        u.first = UINT32_MAX; /* the count goes on while others ask */
    else if (idx < p.batch && u.first + idx < n_units)
        u.unit = u.first + idx;
    return u;
}

/* Units are the pieces of (token, other rank), the ranks beginning with the one after this. */
static __device__ __forceinline__ slot_lookup partial_lookup(const combine_params &p, unit_queue &queue,
                                                             uint32_t n_units)
{
    const struct exchange_shape &shape = p.a.exchange.shape;
    uint32_t k = slot_of_lane(p), n_others = shape.world_size - 1;
    slot_lookup u = lookup_begin(p, queue, n_units);
    if (u.unit >= n_units)
        return u;
    uint32_t place = u.unit / p.pieces.n_pieces;
    u.piece = u.unit - place * p.pieces.n_pieces;
    u.token = place / n_others;
    u.source = shape.rank + 1 + place - u.token * n_others;
    u.source -= u.source >= shape.world_size ? shape.world_size : 0;
    if (k < shape.top_k) {
        size_t i = (size_t)u.token * shape.top_k + k;
        const float *weights = weights_of(p.a, u.source);
        u.row = p.a.routing.slot_row[(size_t)u.source * shape.max_tokens * shape.top_k + i];
        u.n_tokens = p.a.routing.slot_tokens[u.source];
        u.weight = weights ? weights[i] : 1.0f;
    }
    return u;
}

/* Units are the pieces of this rank's tokens. */
static __device__ __forceinline__ slot_lookup token_lookup(const combine_params &p, unit_queue &queue,
                                                           uint32_t n_units)
{
    const struct exchange_shape &shape = p.a.exchange.shape;
    uint32_t k = slot_of_lane(p);
    slot_lookup u = lookup_begin(p, queue, n_units);
    u.source = shape.rank;
    if (u.unit >= n_units)
        return u;
    u.token = u.unit / p.pieces.n_pieces;
    u.piece = u.unit - u.token * p.pieces.n_pieces;
    if (k < shape.top_k) {
        size_t i = (size_t)u.token * shape.top_k + k;
        const float *weights = weights_of(p.a, shape.rank);
        u.row = p.a.routing.base.row[i];
        u.expert = p.a.routing.base.expert[i];
        u.weight = weights ? weights[i] : 1.0f;
    }
    return u;
}

/* Puts the batch's terms into the list, `pos` being this lane's among the lanes in `live`, and its units into
 * `units`. Returns how many units. Whole warp. */
static __device__ __forceinline__ uint32_t batch_list(const combine_params &p, term_ring &ring,
                                                      unit_record *units, const slot_lookup &u, uint32_t live,
                                                      uint32_t pos, const char *from, float weight, char *to)
{
    uint32_t lane = threadIdx.x % 32, k = slot_of_lane(p), first = lane - k;
    uint32_t bytes = piece_length(p.pieces, u.piece);
    uint32_t own = p.slot_lanes == 32 ? FULL_WARP : ((1u << p.slot_lanes) - 1) << first;
    if (live >> lane & 1) {
        uint32_t at = (ring.listed + pos) % LISTED;
        ring.lists->row[at] = reinterpret_cast<uint64_t>(from) | (uint64_t)(bytes / 16) << ROW_BITS;
        ring.lists->weight[at] = weight;
    }
    if (k == 0 && u.unit != UINT32_MAX)
        units[lane / p.slot_lanes] = {to, u.token * p.pieces.n_pieces + u.piece, u.source, bytes,
                                      (uint32_t)__popc(live & own)};
    ring.listed += __popc(live);
    __syncwarp();
    return __popc(__ballot_sync(FULL_WARP, k == 0 && u.unit != UINT32_MAX));
}

/* Lists the next batch of partial sums, by k; 0 at the end. Whole warp. */
static __device__ __forceinline__ uint32_t partials_list(const combine_params &p, unit_queue &queue,
                                                         uint32_t n_units, term_ring &ring,
                                                         slot_lookup &ahead, unit_record *units)
{
    const struct cuda_exchange &x = p.a.exchange;
    uint32_t lane = threadIdx.x % 32;
    slot_lookup u = ahead;
    if (u.first == UINT32_MAX)
        return 0;
    ahead = partial_lookup(p, queue, n_units);
    if ((int32_t)u.token >= u.n_tokens)
        u.row = -1;
    uint32_t live = __ballot_sync(FULL_WARP, u.row >= 0);
    size_t at = (size_t)u.piece * p.pieces.piece_bytes;
    const char *from =
        static_cast<const char *>(p.a.y) + (size_t)(u.row < 0 ? 0 : u.row) * p.pieces.row_bytes + at;
    char *to = u.source == x.shape.rank ? NULL : stage_at(x, u.source, x.shape.rank, u.token) + at;
    return batch_list(p, ring, units, u, live, __popc(live & ((1u << lane) - 1)), from, u.weight, to);
}

/* How many live lanes of the same unit come before this one, by rank, then k. */
static __device__ __forceinline__ uint32_t order_in_unit(const combine_params &p, uint32_t live,
                                                         uint32_t rank)
{
    uint32_t lane = threadIdx.x % 32, first = lane - slot_of_lane(p), pos = 0;
    for (uint32_t k = 0; k < p.a.exchange.shape.top_k; k++) {
        uint32_t other = first + k, other_rank = __shfl_sync(FULL_WARP, rank, other);
        pos += (live >> other & 1) && (other_rank < rank || (other_rank == rank && other < lane));
    }
    return pos;
}

/* Lists the next batch of pieces of out: own slots and the partial sums of other ranks, by rank, then k; waits for the
 * latter. 0 at the end, and after an abort. Whole warp. */
static __device__ __forceinline__ uint32_t tokens_list(const combine_params &p, unit_queue &queue,
                                                       uint32_t n_units, term_ring &ring, slot_lookup &ahead,
                                                       unit_record *units, uint32_t epoch)
{
    const struct cuda_exchange &x = p.a.exchange;
    const struct exchange_shape &shape = x.shape;
    uint32_t lane = threadIdx.x % 32, first = lane - slot_of_lane(p);
    slot_lookup u = ahead;
    if (u.first == UINT32_MAX)
        return 0;
    ahead = token_lookup(p, queue, n_units);
    uint32_t rank = u.row >= 0 ? (uint32_t)u.expert / shape.n_local_experts : UINT32_MAX;
    /* The first lane of each (unit, rank) stands for the rank's sum. */
    uint32_t peers =
        __match_any_sync(FULL_WARP, rank == UINT32_MAX ? UINT32_MAX : first * EPD_MAX_RANKS + rank);
    bool own = rank == shape.rank, leads = lane == (uint32_t)__ffs(peers) - 1, ok = true;
    bool wanted = u.row >= 0 && (own || leads);
    uint32_t live = __ballot_sync(FULL_WARP, wanted);
    uint32_t pos = __popc(live & ((1u << first) - 1)) + order_in_unit(p, live, rank);
    size_t at = (size_t)u.piece * p.pieces.piece_bytes;
    const char *from = NULL;
    if (wanted)
        from = (own ? static_cast<const char *>(p.a.y) + (size_t)u.row * p.pieces.row_bytes
                    : stage_at(x, shape.rank, rank, u.token)) +
               at;
    if (wanted && !own && polls(x)) {
        ok = wait_flag(arrival_at(x, shape.rank, rank, u.unit), epoch, true, x.abort_word);
        fence_bulk_global();
    }
    char *to = static_cast<char *>(p.a.out.data) + (size_t)u.token * p.pieces.row_bytes + at;
    if (!__all_sync(FULL_WARP, ok))
        return 0;
    return batch_list(p, ring, units, u, live, pos, from, own ? u.weight : 1.0f, to);
}

/* Sums that are on their way, oldest first, and the box of the block that they are handed to. Lane 0. */
template <int SENT> struct sent_sums {
    uint32_t unit[SENT];
    uint64_t ranks[SENT];
};

template <int SENT>
static __device__ __forceinline__ void sums_sent(sent_sums<SENT> &sent, sent_box &box, uint32_t unit,
                                                 uint64_t ranks)
{
    box_put(box, threadIdx.x / 32, sent.unit[0], sent.ranks[0]);
#pragma unroll
    for (int i = 1; i < SENT; i++) {
        sent.unit[i - 1] = sent.unit[i];
        sent.ranks[i - 1] = sent.ranks[i];
    }
    sent.unit[SENT - 1] = unit;
    sent.ranks[SENT - 1] = ranks;
}

/* A sum into a slot of its own, and from there to its rank. Whole warp. */
template <typename E, int VECS, int SENT>
static __device__ __forceinline__ void sum_send(const struct cuda_exchange &x, const unit_record &unit,
                                                unsigned char *result, sent_sums<SENT> &sent, sent_box &box,
                                                const float (&sum)[VECS][vec16<E>::LANES])
{
    uint32_t lane = threadIdx.x % 32;
    if (lane == 0)
        bulk_wait_read<SENT>();
    __syncwarp();
#pragma unroll
    for (int v = 0; v < VECS; v++)
        reinterpret_cast<uint4 *>(result)[lane + 32 * v] = vec16<E>::pack(sum[v]);
    fence_bulk_shared();
    __syncwarp();
    if (lane != 0)
        return;
    bulk_store(unit.to, shared_address(result), unit.bytes);
    bulk_commit();
    if (polls(x)) {
        bulk_wait_written<SENT>();
        sums_sent<SENT>(sent, box, unit.id, 1ull << unit.rank);
    }
}

template <typename E, int VECS>
static __device__ __forceinline__ void sum_store(const unit_record &unit,
                                                 const float (&sum)[VECS][vec16<E>::LANES])
{
    uint32_t lane = threadIdx.x % 32;
#pragma unroll
    for (int v = 0; v < VECS; v++)
        if ((lane + 32 * v) * 16 < unit.bytes)
            reinterpret_cast<uint4 *>(unit.to)[lane + 32 * v] = vec16<E>::pack(sum[v]);
}

/* Partial sums of the tokens of all other ranks, in order of token. Whole warp. */
template <typename E, int VECS>
static __device__ void send_sums(const combine_params &p, term_ring &ring, sent_box &box)
{
    constexpr int SENT = combine_sizes<VECS>::RESULTS - 1;
    const struct cuda_exchange &x = p.a.exchange;
    uint32_t lane = threadIdx.x % 32, most_tokens = 0, turn = 0;
    for (uint32_t rank = 0; rank < x.shape.world_size; rank++)
        most_tokens = max(most_tokens, rank == x.shape.rank ? 0 : (uint32_t)p.a.routing.slot_tokens[rank]);
    uint32_t n_units = most_tokens * (x.shape.world_size - 1) * p.pieces.n_pieces;
    sent_sums<SENT> sent = {};
    unit_queue queue = {&state_of(x)->next[0], 0};
    queue_fetch(queue, lane);
    slot_lookup ahead = partial_lookup(p, queue, n_units);
    uint32_t n = partials_list(p, queue, n_units, ring, ahead, ring.lists->units[0]);
    for (uint32_t half = 0; n > 0; half ^= 1) {
        ring_fill<VECS>(ring);
        uint32_t n_next = partials_list(p, queue, n_units, ring, ahead, ring.lists->units[half ^ 1]);
        for (uint32_t i = 0; i < n; i++) {
            const unit_record unit = ring.lists->units[half][i];
            if (unit.n == 0)
                continue;
            float sum[VECS][vec16<E>::LANES];
            unit_add<E, VECS>(ring, unit.n, sum);
            unsigned char *result = ring.memory + (RING + turn) * combine_sizes<VECS>::PIECE_BYTES;
            turn = turn == SENT ? 0 : turn + 1;
            sum_send<E, VECS, SENT>(x, unit, result, sent, box, sum);
        }
        n = n_next;
        __syncwarp();
    }
    if (lane == 0) {
        bulk_wait_written<0>();
        for (int i = 0; i < SENT; i++)
            sums_sent<SENT>(sent, box, 0, 0);
        box_done(box);
    }
    __syncwarp();
}

/* Whole warp. */
template <typename E, int VECS>
static __device__ void finish_tokens(const combine_params &p, term_ring &ring, uint32_t epoch)
{
    uint32_t n_units = p.a.exchange.shape.n_tokens * p.pieces.n_pieces;
    unit_queue queue = {&state_of(p.a.exchange)->next[1], 0};
    queue_fetch(queue, threadIdx.x % 32);
    slot_lookup ahead = token_lookup(p, queue, n_units);
    uint32_t n = tokens_list(p, queue, n_units, ring, ahead, ring.lists->units[0], epoch);
    for (uint32_t half = 0; n > 0; half ^= 1) {
        ring_fill<VECS>(ring);
        uint32_t n_next = tokens_list(p, queue, n_units, ring, ahead, ring.lists->units[half ^ 1], epoch);
        for (uint32_t i = 0; i < n; i++) {
            const unit_record unit = ring.lists->units[half][i];
            float sum[VECS][vec16<E>::LANES];
            unit_add<E, VECS>(ring, unit.n, sum);
            sum_store<E, VECS>(unit, sum);
        }
        n = n_next;
        __syncwarp();
    }
}

template <typename E, int VECS>
static __global__ void __launch_bounds__(combine_sizes<VECS>::THREADS, 1)
    combine_kernel(const __grid_constant__ combine_params p)
{
    constexpr uint32_t WARPS = combine_sizes<VECS>::WARPS;
    extern __shared__ __align__(128) unsigned char shared[];
    __shared__ __align__(16) warp_lists lists[WARPS];
    __shared__ __align__(8) uint64_t barriers[WARPS][RING];
    __shared__ sent_box box;
    const struct cuda_exchange &x = p.a.exchange;
    uint32_t warp = threadIdx.x / 32, own = warp < WARPS ? warp : 0, epoch = op_enter(x);
    term_ring ring = {shared + own * combine_sizes<VECS>::WARP_BYTES, &lists[own],
                      shared_address(barriers[own])};
    if (threadIdx.x % 32 < RING && warp < WARPS)
        mbarrier_init(ring.barriers + threadIdx.x % 32 * 8);
    box_init(box);
    __syncthreads();
    bool publishes = p.a.topk_weights.data && blockIdx.x == 0 && does(x, CUDA_STAGE_PUBLISH);
    bool sends = blockIdx.x < p.n_send && does(x, CUDA_STAGE_SEND), ok = true;
    if (publishes || sends)
        ok = signals_wait(x, SIGNAL_ENTERED, epoch);
    if (publishes && ok) {
        weights_publish(x, static_cast<const float *>(p.a.topk_weights.data));
        signals_raise(x, SIGNAL_SLOTS, epoch);
    }
    if (sends && ok && p.a.topk_weights.data)
        ok = signals_wait(x, SIGNAL_SLOTS, epoch);
    if (sends && ok && warp < WARPS)
        send_sums<E, VECS>(p, ring, box);
    else if (sends && ok && polls(x))
        box_tell(x, box, WARPS, epoch);
    __syncwarp();
    if (ok && warp < WARPS && does(x, CUDA_STAGE_RECEIVE))
        finish_tokens<E, VECS>(p, ring, epoch);
    op_leave(x, epoch);
}

/* A kernel for each dtype and number of vectors that a lane adds. */
struct combine_form {
    const void *kernel;
    uint32_t threads, shared_bytes;
};

template <typename E, int VECS> static struct combine_form form(void)
{
    return {reinterpret_cast<const void *>(combine_kernel<E, VECS>), combine_sizes<VECS>::THREADS,
            combine_sizes<VECS>::SHARED_BYTES};
}

template <int VECS> static struct combine_form form_of(enum epd_dtype dtype)
{
    switch (dtype) {
    case EPD_BF16:
        return form<__nv_bfloat16, VECS>();
    case EPD_F16:
        return form<__half, VECS>();
    case EPD_F32:
        return form<float, VECS>();
    default:
        return {NULL, 0, 0};
    }
}

static struct combine_form combine_form_for(enum epd_dtype dtype, uint32_t piece_bytes)
{
    return piece_bytes <= 4 * 512   ? form_of<4>(dtype)
           : piece_bytes <= 7 * 512 ? form_of<7>(dtype)
                                    : form_of<8>(dtype);
}

enum epd_status combine_load(struct epd_error *error)
{
    const enum epd_dtype dtypes[] = {EPD_BF16, EPD_F16, EPD_F32};
    const uint32_t piece_bytes[] = {4 * 512, 7 * 512, 8 * 512};
    enum epd_status status = EPD_OK;
    for (size_t i = 0; i < 9 && status == EPD_OK; i++) {
        struct combine_form form = combine_form_for(dtypes[i % 3], piece_bytes[i / 3]);
        status = kernel_load(form.kernel, (int)form.shared_bytes, "combine", error);
    }
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
    if (!combine_form_for(args->out.dtype, 0).kernel)
        return error_set(error, EPD_INVALID_DTYPE, "combine out: %s", dtype_name(args->out.dtype));
    if (!aligned16(args->y) || !aligned16(args->out.data) || !aligned16(args->topk_weights.data))
        return error_set(error, EPD_INVALID_ALIGNMENT,
                         "combine: y, out and topk_weights want 16-byte alignment");
    if (args->saved_weights && !args->routing.slot_weight)
        return error_set(error, EPD_INVALID_ARGUMENT, "combine: the routing saved no weights");
    return EPD_OK;
}

/* With few tokens there are not units enough for batches. */
static void choose_batch(struct combine_params *params)
{
    const struct exchange_shape *shape = &params->a.exchange.shape;
    params->slot_lanes = 1;
    while (params->slot_lanes < shape->top_k)
        params->slot_lanes *= 2;
    uint32_t fit = 32 / params->slot_lanes;
    params->batch = shape->max_tokens <= CUDA_FEW_TOKENS ? 1 : fit < MAX_BATCH ? fit : MAX_BATCH;
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
    choose_batch(&params);
    uint32_t blocks = x->stage == CUDA_STAGE_PUBLISH ? 1 : blocks_of(x);
    params.n_send = blocks;
    if (x->stage == CUDA_STAGE_ALL) {
        uint32_t share =
            x->shape.max_tokens <= CUDA_FEW_TOKENS ? FEW_TOKENS_SEND_BLOCKS : DEFAULT_SEND_BLOCKS;
        uint32_t wanted = x->send_blocks ? x->send_blocks : (blocks * share + 31) / 32;
        params.n_send = wanted < blocks ? wanted : blocks;
    }
    struct combine_form form = combine_form_for(args->out.dtype, params.pieces.piece_bytes);
    void *arguments[] = {&params};
    return cuda_check(
        cudaLaunchKernel(form.kernel, dim3(blocks), dim3(form.threads), arguments, form.shared_bytes, stream),
        "combine", error);
}
