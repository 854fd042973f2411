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
#define COMBINE_WARPS 10
#define COMBINE_SLOTS 3
#endif
/* A warp has two banks of SLOTS pieces: the terms of the next sum are on their way while this one is added.
 */
static constexpr uint32_t WARPS = COMBINE_WARPS, SLOTS = COMBINE_SLOTS;
static constexpr uint32_t THREADS = (WARPS + 1) * 32; /* one more warp tells, in a block that sends */
static constexpr uint32_t BANK_BYTES = SLOTS * CUDA_SUM_PIECE_BYTES, SHARED_BYTES = WARPS * 2 * BANK_BYTES;
static constexpr uint32_t DEFAULT_SEND_BLOCKS = 20;
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

/* The two banks of a warp. */
struct sum_banks {
    unsigned char *memory;
    uint32_t barriers; /* two mbarriers */
    uint32_t parities; /* a bit each */
    uint32_t turn;     /* the bank of the current sum */
};

static __device__ __forceinline__ unsigned char *bank_memory(const sum_banks &banks, uint32_t bank)
{
    return banks.memory + bank * BANK_BYTES;
}

/* Starts loading terms first .. first + SLOTS - 1. Whole warp. */
static __device__ __forceinline__ void terms_load(const sum_banks &banks, uint32_t bank, const sum_unit &unit,
                                                  uint32_t first)
{
    uint32_t lane = threadIdx.x % 32, end = first + SLOTS < unit.n ? first + SLOTS : unit.n;
    if (lane == 0)
        mbarrier_expect(banks.barriers + bank * 8, (end - first) * unit.bytes);
    __syncwarp();
    if (lane >= first && lane < end)
        bulk_copy(shared_address(bank_memory(banks, bank)) + (lane - first) * CUDA_SUM_PIECE_BYTES, unit.row,
                  unit.bytes, banks.barriers + bank * 8);
}

/* The sum of the terms in their order, in fp32; the first of them are on their way. Lane holds vectors lane,
 * lane + 32,
 * .. Whole warp. */
template <typename E>
static __device__ __forceinline__ void terms_add(sum_banks &banks, const sum_unit &unit,
                                                 float (&sum)[SUM_VECS][vec16<E>::LANES])
{
    uint32_t lane = threadIdx.x % 32;
#pragma unroll
    for (int v = 0; v < SUM_VECS; v++)
#pragma unroll
        for (int i = 0; i < vec16<E>::LANES; i++)
            sum[v][i] = 0.0f;
    for (uint32_t first = 0; first < unit.n; first += SLOTS) {
        if (first > 0)
            terms_load(banks, banks.turn, unit, first);
        bulk_load_wait(banks.barriers + banks.turn * 8, banks.parities >> banks.turn & 1);
        banks.parities ^= 1u << banks.turn;
        for (uint32_t term = first; term < first + SLOTS && term < unit.n; term++) {
            const uint4 *piece = reinterpret_cast<const uint4 *>(bank_memory(banks, banks.turn) +
                                                                 (term - first) * CUDA_SUM_PIECE_BYTES);
            float weight = __shfl_sync(FULL_WARP, unit.weight, term);
#pragma unroll
            for (int v = 0; v < SUM_VECS; v++) {
                if ((lane + 32 * v) * 16 >= unit.bytes)
                    break;
                float values[vec16<E>::LANES];
                vec16<E>::unpack(piece[lane + 32 * v], values);
#pragma unroll
                for (int i = 0; i < vec16<E>::LANES; i++)
                    sum[v][i] += weight * values[i];
            }
        }
        __syncwarp();
    }
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

/* Takes units until one has terms here; false at the end. Whole warp. */
static __device__ __forceinline__ bool partial_next(const combine_params &p, unit_queue &queue,
                                                    uint32_t n_units, uint8_t *order, sum_unit &unit)
{
    const struct cuda_exchange &x = p.a.exchange;
    const struct exchange_shape &shape = x.shape;
    uint32_t lane = threadIdx.x % 32, n_others = shape.world_size - 1, live = 0, taken;
    while (live == 0 && (taken = queue_take(queue, lane)) < n_units) {
        uint32_t piece = taken % p.pieces.n_pieces, place = taken / p.pieces.n_pieces,
                 token = place / n_others;
        uint32_t source = (shape.rank + 1 + place % n_others) % shape.world_size;
        int32_t row = -1;
        float weight = 1.0f;
        if (lane < shape.top_k && token < (uint32_t)p.a.routing.slot_tokens[source]) {
            size_t i = (size_t)token * shape.top_k + lane;
            const float *weights = weights_of(p.a, source);
            row = p.a.routing.slot_row[(size_t)source * shape.max_tokens * shape.top_k + i];
            weight = weights ? weights[i] : 1.0f;
        }
        live = __ballot_sync(FULL_WARP, row >= 0);
        size_t at = (size_t)piece * p.pieces.piece_bytes;
        unit.bytes = piece_length(p.pieces, piece);
        unit.id = token * p.pieces.n_pieces + piece;
        unit.rank = source;
        unit.to = stage_at(x, source, shape.rank, token) + at;
        const char *y =
            static_cast<const char *>(p.a.y) + (size_t)(row < 0 ? 0 : row) * p.pieces.row_bytes + at;
        terms_order(unit, order, live, __popc(live & ((1u << lane) - 1)), y, weight);
    }
    return live != 0;
}

/* Partial sums of the tokens of all other ranks, in order of token. Whole warp. */
template <typename E>
static __device__ void send_sums(const combine_params &p, sum_banks &banks, uint8_t *order, sent_box &box)
{
    const struct cuda_exchange &x = p.a.exchange;
    uint32_t lane = threadIdx.x % 32, most_tokens = 0;
    for (uint32_t rank = 0; rank < x.shape.world_size; rank++)
        most_tokens = max(most_tokens, rank == x.shape.rank ? 0 : (uint32_t)p.a.routing.slot_tokens[rank]);
    uint32_t n_units = most_tokens * (x.shape.world_size - 1) * p.pieces.n_pieces;
    uint32_t sent = 0;
    uint64_t sent_ranks = 0; /* the last unit, which may still be on its way */
    unit_queue queue = {&state_of(x)->next[0], 0};
    queue_fetch(queue, lane);
    sum_unit unit, next;
    bool more = partial_next(p, queue, n_units, order, unit);
    if (more)
        terms_load(banks, banks.turn, unit, 0);
    while (more) {
        more = partial_next(p, queue, n_units, order, next);
        /* The other bank's sum has left it; the latest store was from there. */
        if (lane == 0)
            bulk_wait_read();
        __syncwarp();
        if (more)
            terms_load(banks, banks.turn ^ 1, next, 0);
        float sum[SUM_VECS][vec16<E>::LANES];
        terms_add<E>(banks, unit, sum);
        sum_store<E>(sum, unit.bytes, bank_memory(banks, banks.turn));
        fence_bulk_shared();
        __syncwarp();
        if (lane == 0) {
            bulk_store(unit.to, shared_address(bank_memory(banks, banks.turn)), unit.bytes);
            bulk_commit();
            if (polls(x)) {
                bulk_wait_written<1>();
                box_put(box, threadIdx.x / 32, sent, sent_ranks);
                sent = unit.id;
                sent_ranks = 1ull << unit.rank;
            }
        }
        unit = next;
        banks.turn ^= 1;
    }
    if (lane == 0) {
        bulk_wait_written<0>();
        box_put(box, threadIdx.x / 32, sent, sent_ranks);
        box_done(box);
    }
    __syncwarp();
}

/* The next piece of out and its terms: own slots and the partial sums of other ranks, by rank, then k; waits
 * for the latter. False at the end, and after an abort. Whole warp. */
static __device__ __forceinline__ bool token_next(const combine_params &p, unit_queue &queue, uint8_t *order,
                                                  uint32_t epoch, sum_unit &unit)
{
    const struct cuda_exchange &x = p.a.exchange;
    const struct exchange_shape &shape = x.shape;
    uint32_t lane = threadIdx.x % 32, rank = UINT32_MAX, taken = queue_take(queue, lane);
    if (taken >= shape.n_tokens * p.pieces.n_pieces)
        return false;
    uint32_t token = taken / p.pieces.n_pieces, piece = taken % p.pieces.n_pieces;
    size_t at = (size_t)piece * p.pieces.piece_bytes;
    int32_t row = -1;
    float weight = 1.0f;
    if (lane < shape.top_k) {
        size_t i = (size_t)token * shape.top_k + lane;
        const float *weights = weights_of(p.a, shape.rank);
        int32_t expert = p.a.routing.base.expert[i];
        float own_weight = weights ? weights[i] : 1.0f;
        row = p.a.routing.base.row[i];
        if (row >= 0)
            rank = (uint32_t)expert / shape.n_local_experts;
        if (rank == shape.rank)
            weight = own_weight;
    }
    uint32_t peers = __match_any_sync(FULL_WARP, rank);
    bool own = rank == shape.rank, leads = lane == (uint32_t)__ffs(peers) - 1, ok = true;
    uint32_t live = __ballot_sync(FULL_WARP, row >= 0 && (own || leads)), pos = 0;
    for (uint32_t left = live; left; left &= left - 1) {
        uint32_t other = __ffs(left) - 1, other_rank = __shfl_sync(FULL_WARP, rank, other);
        pos += other_rank < rank || (other_rank == rank && other < lane);
    }
    const char *from = NULL;
    if (live >> lane & 1) {
        from = (own ? static_cast<const char *>(p.a.y) + (size_t)row * p.pieces.row_bytes
                    : stage_at(x, shape.rank, rank, token)) +
               at;
        if (!own && polls(x))
            ok = wait_flag(arrival_at(x, shape.rank, rank, taken), epoch, true, x.abort_word);
        fence_bulk_global();
    }
    unit.bytes = piece_length(p.pieces, piece);
    unit.to = static_cast<char *>(p.a.out.data) + (size_t)token * p.pieces.row_bytes + at;
    terms_order(unit, order, live, pos, from, weight);
    return __all_sync(FULL_WARP, ok);
}

/* Whole warp. */
template <typename E>
static __device__ void finish_tokens(const combine_params &p, sum_banks &banks, uint8_t *order,
                                     uint32_t epoch)
{
    uint32_t lane = threadIdx.x % 32;
    unit_queue queue = {&state_of(p.a.exchange)->next[1], 0};
    queue_fetch(queue, lane);
    sum_unit unit, next;
    bool more = token_next(p, queue, order, epoch, unit);
    if (more && unit.n)
        terms_load(banks, banks.turn, unit, 0);
    while (more) {
        more = token_next(p, queue, order, epoch, next);
        if (more && next.n)
            terms_load(banks, banks.turn ^ 1, next, 0);
        float sum[SUM_VECS][vec16<E>::LANES];
        terms_add<E>(banks, unit, sum);
        sum_store<E>(sum, unit.bytes, unit.to);
        unit = next;
        banks.turn ^= 1;
    }
}

template <typename E>
static __global__ void __launch_bounds__(THREADS, 1) combine_kernel(const __grid_constant__ combine_params p)
{
    extern __shared__ __align__(128) unsigned char shared[];
    __shared__ uint8_t orders[WARPS + 1][32];
    __shared__ __align__(8) uint64_t barriers[WARPS + 1][2];
    __shared__ sent_box box;
    const struct cuda_exchange &x = p.a.exchange;
    uint32_t warp = threadIdx.x / 32, epoch = op_enter(x);
    sum_banks banks = {shared + warp * 2 * BANK_BYTES, shared_address(barriers[warp]), 0, 0};
    if (threadIdx.x % 32 == 0) {
        mbarrier_init(banks.barriers);
        mbarrier_init(banks.barriers + 8);
    }
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
        send_sums<E>(p, banks, orders[warp], box);
    else if (sends && ok && polls(x))
        box_tell(x, box, WARPS, epoch);
    __syncwarp();
    if (ok && warp < WARPS && does(x, CUDA_STAGE_RECEIVE))
        finish_tokens<E>(p, banks, orders[warp], epoch);
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
        uint32_t wanted = x->send_blocks ? x->send_blocks : (blocks * DEFAULT_SEND_BLOCKS + 31) / 32;
        params.n_send = wanted < blocks ? wanted : blocks;
    }
    void *arguments[] = {&params};
    return cuda_check(cudaLaunchKernel(kernel_of(args->out.dtype), dim3(blocks), dim3(THREADS), arguments,
                                       SHARED_BYTES, stream),
                      "combine", error);
}
