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

#ifndef COMBINE_WARPS
#define COMBINE_WARPS 20
#define COMBINE_BATCH 3
#endif
static constexpr uint32_t WARPS = COMBINE_WARPS, THREADS = WARPS * 32;
static constexpr uint32_t SHARED_BYTES = WARPS * CUDA_PIECE_BYTES;
static constexpr uint32_t DEFAULT_SEND_BLOCKS = 20;

struct combine_params {
    struct cuda_combine_args a;
    struct row_pieces pieces;
    uint32_t n_send; /* blocks that begin with sending */
};

/* The terms of a sum: lane i holds the i-th. */
struct sum_terms {
    const char *row;
    float weight;
    uint32_t n;
};

/* Term of lane k to lane pos, for the lanes in `live`. order: 32 bytes of this warp. Whole warp. */
static __device__ __forceinline__ sum_terms terms_order(uint8_t *order, uint32_t live, uint32_t pos,
                                                        const char *row, float weight, uint32_t lane)
{
    if (live >> lane & 1)
        order[pos] = (uint8_t)lane;
    __syncwarp();
    sum_terms terms;
    terms.n = __popc(live);
    int from = lane < terms.n ? order[lane] : 0;
    __syncwarp();
    terms.row = reinterpret_cast<const char *>(
        __shfl_sync(FULL_WARP, reinterpret_cast<unsigned long long>(row), from));
    terms.weight = __shfl_sync(FULL_WARP, weight, from);
    return terms;
}

template <typename E> static __device__ __forceinline__ void add_vec(float *sum, const uint4 &v, float weight)
{
    float values[vec16<E>::LANES];
    vec16<E>::unpack(v, values);
#pragma unroll
    for (int i = 0; i < vec16<E>::LANES; i++)
        sum[i] += weight * values[i];
}

/* to[0 .. n_vecs) = sum of the terms at byte `at` of their rows; two rows of BATCH vectors are in flight per
 * lane. TO_SLOT: `to` is shared memory that an earlier bulk store may still be reading. Whole warp. */
template <typename E, bool TO_SLOT>
static __device__ __forceinline__ void sum_piece(const sum_terms &terms, size_t at, uint32_t n_vecs,
                                                 uint4 *to, uint32_t lane)
{
    constexpr int LANES = vec16<E>::LANES, BATCH = COMBINE_BATCH;
    for (uint32_t first = lane; first < (n_vecs + 31) / 32 * 32; first += 32 * BATCH) {
        float sum[BATCH][LANES];
#pragma unroll
        for (int b = 0; b < BATCH; b++)
#pragma unroll
            for (int i = 0; i < LANES; i++)
                sum[b][i] = 0.0f;
        for (uint32_t term = 0; term < terms.n; term += 2) {
            bool two = term + 1 < terms.n;
            int second = two ? term + 1 : term;
            unsigned long long rows = reinterpret_cast<unsigned long long>(terms.row);
            const uint4 *a = reinterpret_cast<const uint4 *>(__shfl_sync(FULL_WARP, rows, term) + at) + first;
            const uint4 *b2 =
                reinterpret_cast<const uint4 *>(__shfl_sync(FULL_WARP, rows, second) + at) + first;
            float weight_a = __shfl_sync(FULL_WARP, terms.weight, term);
            float weight_b = __shfl_sync(FULL_WARP, terms.weight, second);
            uint4 va[BATCH], vb[BATCH];
#pragma unroll
            for (int b = 0; b < BATCH; b++)
                if (first + 32 * b < n_vecs)
                    va[b] = load_once(a + 32 * b);
#pragma unroll
            for (int b = 0; b < BATCH; b++)
                if (two && first + 32 * b < n_vecs)
                    vb[b] = load_once(b2 + 32 * b);
#pragma unroll
            for (int b = 0; b < BATCH; b++)
                if (first + 32 * b < n_vecs)
                    add_vec<E>(sum[b], va[b], weight_a);
#pragma unroll
            for (int b = 0; b < BATCH; b++)
                if (two && first + 32 * b < n_vecs)
                    add_vec<E>(sum[b], vb[b], weight_b);
        }
        if (TO_SLOT) {
            if (lane == 0)
                bulk_wait_read();
            __syncwarp();
        }
#pragma unroll
        for (int b = 0; b < BATCH; b++)
            if (first + 32 * b < n_vecs)
                to[first + 32 * b] = vec16<E>::pack(sum[b]);
    }
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

/* Partial sums of the tokens of all other ranks, in order of token. Whole warp. */
template <typename E>
static __device__ void send_sums(const combine_params &p, uint4 *piece_memory, uint8_t *order, uint32_t epoch)
{
    const struct cuda_exchange &x = p.a.exchange;
    const struct exchange_shape &shape = x.shape;
    uint32_t lane = threadIdx.x % 32, n_others = shape.world_size - 1, most_tokens = 0;
    for (uint32_t rank = 0; rank < shape.world_size; rank++)
        most_tokens = max(most_tokens, rank == shape.rank ? 0 : (uint32_t)p.a.routing.slot_tokens[rank]);
    uint32_t n_units = most_tokens * n_others * p.pieces.n_pieces;
    struct sent_unit sent = {0, 0};
    unit_queue queue = {&state_of(x)->next[0], 0};
    queue_fetch(queue, lane);
    for (uint32_t unit; (unit = queue_take(queue, lane)) < n_units;) {
        uint32_t piece = unit % p.pieces.n_pieces, place = unit / p.pieces.n_pieces, token = place / n_others;
        uint32_t source = (shape.rank + 1 + place % n_others) % shape.world_size;
        if (token >= (uint32_t)p.a.routing.slot_tokens[source])
            continue;
        int32_t row = -1;
        float weight = 1.0f;
        if (lane < shape.top_k) {
            size_t i = (size_t)token * shape.top_k + lane;
            const float *weights = weights_of(p.a, source);
            row = p.a.routing.slot_row[(size_t)source * shape.max_tokens * shape.top_k + i];
            weight = weights ? weights[i] : 1.0f;
        }
        uint32_t live = __ballot_sync(FULL_WARP, row >= 0);
        if (live == 0)
            continue;
        const char *y = static_cast<const char *>(p.a.y) + (size_t)(row < 0 ? 0 : row) * p.pieces.row_bytes;
        sum_terms terms = terms_order(order, live, __popc(live & ((1u << lane) - 1)), y, weight, lane);
        size_t at = (size_t)piece * p.pieces.piece_bytes;
        uint32_t bytes = piece_length(p.pieces, piece);
        sum_piece<E, true>(terms, at, bytes / 16, piece_memory, lane);
        fence_bulk();
        __syncwarp();
        if (lane == 0) {
            bulk_store(stage_at(x, source, shape.rank, token) + at, shared_address(piece_memory), bytes);
            bulk_commit();
            if (polls(x)) {
                bulk_wait_written<1>();
                sent_tell(x, sent, epoch);
                sent = {token * p.pieces.n_pieces + piece, 1ull << source};
            }
        }
    }
    if (lane == 0) {
        bulk_wait_written<0>();
        sent_tell(x, sent, epoch);
    }
}

/* The terms of out[token]: own slots and the partial sums of other ranks, by rank, then k. Waits for the
 * parts of `piece`; *ok is false after an abort. Whole warp. */
static __device__ __forceinline__ sum_terms terms_of_token(const combine_params &p, uint8_t *order,
                                                           uint32_t token, uint32_t piece, uint32_t epoch,
                                                           bool *ok)
{
    const struct cuda_exchange &x = p.a.exchange;
    const struct exchange_shape &shape = x.shape;
    uint32_t lane = threadIdx.x % 32, rank = UINT32_MAX;
    int32_t row = -1;
    float weight = 1.0f;
    if (lane < shape.top_k) {
        size_t i = (size_t)token * shape.top_k + lane;
        row = p.a.routing.base.row[i];
        if (row >= 0)
            rank = (uint32_t)p.a.routing.base.expert[i] / shape.n_local_experts;
        const float *weights = weights_of(p.a, shape.rank);
        if (rank == shape.rank && weights)
            weight = weights[i];
    }
    uint32_t peers = __match_any_sync(FULL_WARP, rank);
    bool own = rank == shape.rank, leads = lane == (uint32_t)__ffs(peers) - 1;
    uint32_t live = __ballot_sync(FULL_WARP, row >= 0 && (own || leads)), pos = 0;
    for (uint32_t left = live; left; left &= left - 1) {
        uint32_t other = __ffs(left) - 1, other_rank = __shfl_sync(FULL_WARP, rank, other);
        pos += other_rank < rank || (other_rank == rank && other < lane);
    }
    const char *from = NULL;
    *ok = true;
    if (live >> lane & 1) {
        from = own ? static_cast<const char *>(p.a.y) + (size_t)row * p.pieces.row_bytes
                   : stage_at(x, shape.rank, rank, token);
        if (!own && polls(x))
            *ok = wait_flag(arrival_at(x, shape.rank, rank, token * p.pieces.n_pieces + piece), epoch, true,
                            x.abort_word);
    }
    *ok = __all_sync(FULL_WARP, *ok);
    return terms_order(order, live, pos, from, weight, lane);
}

template <typename E>
static __device__ void finish_tokens(const combine_params &p, uint8_t *order, uint32_t epoch)
{
    const struct cuda_exchange &x = p.a.exchange;
    uint32_t lane = threadIdx.x % 32, n_units = x.shape.n_tokens * p.pieces.n_pieces;
    unit_queue queue = {&state_of(x)->next[1], 0};
    queue_fetch(queue, lane);
    for (uint32_t unit; (unit = queue_take(queue, lane)) < n_units;) {
        uint32_t token = unit / p.pieces.n_pieces, piece = unit % p.pieces.n_pieces;
        size_t at = (size_t)piece * p.pieces.piece_bytes;
        bool ok;
        sum_terms terms = terms_of_token(p, order, token, piece, epoch, &ok);
        if (!ok)
            break;
        char *to = static_cast<char *>(p.a.out.data) + (size_t)token * p.pieces.row_bytes + at;
        sum_piece<E, false>(terms, at, piece_length(p.pieces, piece) / 16, reinterpret_cast<uint4 *>(to),
                            lane);
    }
}

template <typename E>
static __global__ void __launch_bounds__(THREADS, 1) combine_kernel(const __grid_constant__ combine_params p)
{
    extern __shared__ __align__(128) unsigned char shared[];
    __shared__ uint8_t orders[WARPS][32];
    const struct cuda_exchange &x = p.a.exchange;
    uint32_t warp = threadIdx.x / 32, epoch = op_enter(x);
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
    if (sends && ok)
        send_sums<E>(p, reinterpret_cast<uint4 *>(shared + warp * CUDA_PIECE_BYTES), orders[warp], epoch);
    __syncwarp();
    if (ok && does(x, CUDA_STAGE_RECEIVE))
        finish_tokens<E>(p, orders[warp], epoch);
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
    params.pieces = pieces_of(x->shape.hidden * dtype_bytes(args->out.dtype));
    uint32_t blocks = x->stage == CUDA_STAGE_PUBLISH ? 1 : blocks_of(x);
    params.n_send = blocks;
    if (x->stage == CUDA_STAGE_ALL) {
        uint32_t wanted = x->send_blocks ? x->send_blocks : (blocks * DEFAULT_SEND_BLOCKS + 31) / 32;
        params.n_send = wanted < blocks ? wanted : blocks;
    }
    void *arguments[] = {&params};
    return cuda_check(cudaLaunchKernel(kernel_of(args->out.dtype), dim3(blocks), dim3(THREADS), arguments,
                                       SHARED_BYTES, stream),
                      "combine", error);
}
