/* route + dispatch_push: x [T, H] of every rank -> expert-major recv_x [C, H].
 *
 * Bytes, per rank and uniform routing, with d = R (1 - (1 - 1/R)^K) ranks per token: T H 2 d (R - 1) / R over
 * the link, once per (token, rank), and T H 2 (d + K) of local memory to spread them. Floor: the link's (dsv3
 * on 4 ranks: 155 MB at 350 GB/s, 0.45 ms); the spreading rides beside it.
 *
 * Blocks of CUDA_STAGE_ALL: 0 routes, 1..send_blocks send, the others receive; whoever is done receives too.
 * All copies go through shared memory by the bulk engine, one piece of a row per warp: sending SMs may be
 * held back by the link, so receiving has SMs of its own. */
#include "kernels/cuda/route.cuh"

static constexpr uint32_t WARPS = 28, THREADS = WARPS * 32;
static constexpr uint32_t SENDERS = WARPS - 1; /* the last warp of a sending block tells */
static constexpr uint32_t SHARED_BYTES = WARPS * CUDA_PIECE_BYTES;
static constexpr uint32_t DEFAULT_SEND_BLOCKS = 8;

struct dispatch_params {
    struct cuda_dispatch_args a;
    struct row_pieces pieces;
    uint32_t first_send, n_send; /* blocks that send */
    bool route_alone;            /* block 0 does nothing else before it has routed */
    bool share_first;            /* tokens wait until the shared routing is on the link, ahead of them */
};

/* Ranks other than this one that need the token; with route, before anything is counted. Whole warp. */
static __device__ __forceinline__ uint64_t ranks_of_token(const struct cuda_dispatch_args &a, uint32_t token,
                                                          uint32_t lane)
{
    const struct exchange_shape &shape = a.exchange.shape;
    uint64_t ranks = 0;
    if (lane < shape.top_k) {
        size_t i = (size_t)token * shape.top_k + lane;
        int64_t expert = a.route                      ? topk_value(a.topk_idx, i)
                         : a.routing.base.row[i] >= 0 ? (int64_t)a.routing.base.expert[i]
                                                      : -1;
        if (expert >= 0 && expert < shape.n_experts)
            ranks = 1ull << ((uint32_t)expert / shape.n_local_experts);
    }
    uint32_t low = __reduce_or_sync(FULL_WARP, (uint32_t)ranks);
    uint32_t high = shape.world_size > 32 ? __reduce_or_sync(FULL_WARP, (uint32_t)(ranks >> 32)) : 0;
    return ((uint64_t)high << 32 | low) & ~(1ull << shape.rank);
}

/* One piece to the ranks that need it; it is on its way to the slot. Lane 0. */
static __device__ __forceinline__ void send_piece(const dispatch_params &p, const warp_slot &slot,
                                                  uint32_t unit, uint64_t ranks)
{
    const struct cuda_exchange &x = p.a.exchange;
    uint32_t token = unit / p.pieces.n_pieces, piece = unit % p.pieces.n_pieces;
    size_t at = (size_t)piece * p.pieces.piece_bytes;
    bulk_load_wait(slot.barrier, slot.parity);
    uint64_t below = (1ull << x.shape.rank) - 1;
    /* Each rank begins with the one after it, so that they do not all send to the first. */
    for (int half = 0; half < 2; half++) {
        for (uint64_t left = half == 0 ? ranks & ~below : ranks & below; left; left &= left - 1) {
            uint32_t to = __ffsll((long long)left) - 1;
            bulk_store(stage_at(x, to, x.shape.rank, token) + at, slot.address,
                       piece_length(p.pieces, piece));
        }
    }
    bulk_commit();
}

/* Every token once to every rank that needs it; the first piece is fetched while the peers are still to
 * enter. False after an abort. Whole warp; `worker` of n_workers. */
static __device__ bool send_tokens(const dispatch_params &p, warp_slot &slot, sent_box &box, uint32_t worker,
                                   uint32_t n_workers, uint32_t epoch)
{
    const struct cuda_exchange &x = p.a.exchange;
    uint32_t lane = threadIdx.x % 32, n_units = x.shape.n_tokens * p.pieces.n_pieces;
    uint32_t sent = 0;
    uint64_t sent_ranks = 0; /* the last unit, which may still be on its way */
    bool entered = false, ok = true;
    for (uint32_t unit = worker; unit < n_units && ok; unit += n_workers) {
        uint32_t token = unit / p.pieces.n_pieces, piece = unit % p.pieces.n_pieces;
        uint64_t ranks = ranks_of_token(p.a, token, lane);
        if (ranks == 0)
            continue;
        if (lane == 0) {
            bulk_wait_read<0>();
            bulk_load(slot.address,
                      static_cast<const char *>(p.a.x.data) + (size_t)token * p.pieces.row_bytes +
                          (size_t)piece * p.pieces.piece_bytes,
                      piece_length(p.pieces, piece), slot.barrier);
        }
        if (!entered)
            ok = signals_wait_warp(x, p.share_first ? SIGNAL_SHARED : SIGNAL_ENTERED, epoch, p.share_first);
        entered = true;
        if (lane == 0 && ok) {
            send_piece(p, slot, unit, ranks);
            if (polls(x)) {
                bulk_wait_written<1>();
                box_put(box, threadIdx.x / 32, sent, sent_ranks);
                sent = unit;
                sent_ranks = ranks;
            }
        }
        if (!ok)
            bulk_load_wait(slot.barrier, slot.parity);
        slot.parity ^= 1;
    }
    if (lane == 0) {
        bulk_wait_written<0>();
        box_put(box, threadIdx.x / 32, sent, sent_ranks);
        box_done(box);
    }
    __syncwarp();
    return ok;
}

/* Padding rows: unit j of local expert l zeroes rows j, j + PADDING_UNITS, .. of its padding. Whole warp. */
static constexpr uint32_t PADDING_UNITS = 128;

static __device__ __forceinline__ uint32_t padding_units(const struct exchange_shape &shape)
{
    uint32_t rows = shape.alignment - 1;
    return rows < PADDING_UNITS ? rows : PADDING_UNITS;
}

static __device__ void clear_padding(const dispatch_params &p, uint32_t unit, uint32_t lane)
{
    const struct routing &routing = p.a.routing.base;
    uint32_t n_units = padding_units(p.a.exchange.shape), local = unit / n_units;
    int64_t row = routing.offsets[local] + routing.m_splits[local] + unit % n_units,
            end = routing.offsets[local + 1];
    for (; row < end; row += n_units) {
        char *to = static_cast<char *>(p.a.recv_x) + (size_t)row * p.pieces.row_bytes;
        for (uint32_t at = lane * 16; p.a.recv_x && at < p.pieces.row_bytes; at += 32 * 16)
            *reinterpret_cast<uint4 *>(to + at) = make_uint4(0, 0, 0, 0);
        if (lane == 0 && p.a.recv_weights)
            p.a.recv_weights[row] = 0.0f;
        if (lane == 0 && p.a.route)
            routing.source[row] = -1;
    }
}

/* What a warp knows of the token it receives: lane k holds slot k. */
struct received {
    uint32_t source, token, piece;
    int32_t row; /* -1 = not here */
    float weight;
};

static __device__ __forceinline__ received received_slots(const dispatch_params &p, uint32_t unit,
                                                          uint32_t lane)
{
    const struct cuda_exchange &x = p.a.exchange;
    const struct exchange_shape &shape = x.shape;
    received r;
    uint32_t place = unit / p.pieces.n_pieces;
    r.piece = unit % p.pieces.n_pieces;
    r.source = place % shape.world_size;
    r.token = place / shape.world_size;
    r.row = -1;
    r.weight = 1.0f;
    if (lane >= shape.top_k || r.token >= (uint32_t)p.a.routing.slot_tokens[r.source])
        return r;
    size_t i = (size_t)r.token * shape.top_k + lane,
           kept = (size_t)r.source * shape.max_tokens * shape.top_k + i;
    r.row = p.a.route ? slot_rows_at(x, shape.rank, r.source)[i] : p.a.routing.slot_row[kept];
    if (r.row >= shape.capacity_rows)
        r.row = -1;
    if (p.a.route || p.a.topk_weights.data)
        r.weight = slot_weights_at(x, shape.rank, r.source)[i];
    else if (p.a.routing.slot_weight)
        r.weight = p.a.routing.slot_weight[kept];
    return r;
}

/* Everything about the slots but the rows themselves; with the first piece. */
static __device__ __forceinline__ void record_slots(const dispatch_params &p, const received &r,
                                                    uint32_t lane)
{
    const struct exchange_shape &shape = p.a.exchange.shape;
    if (r.piece != 0 || lane >= shape.top_k)
        return;
    size_t kept = ((size_t)r.source * shape.max_tokens + r.token) * shape.top_k + lane;
    if (p.a.route) {
        p.a.routing.slot_row[kept] = r.row;
        if (p.a.routing.slot_weight)
            p.a.routing.slot_weight[kept] = r.weight;
        if (r.row >= 0)
            p.a.routing.base.source[r.row] = (int32_t)(kept + first_source(p.a.exchange));
    }
    if (r.row >= 0 && p.a.recv_weights)
        p.a.recv_weights[r.row] = r.weight;
}

/* One row scaled and stored, or only its dot product, from shared memory. Whole warp. */
template <typename E>
static __device__ void spread_row(const dispatch_params &p, const uint4 *piece, uint32_t n_vecs, size_t at,
                                  int32_t row, float weight, uint32_t part, uint32_t lane)
{
    constexpr int LANES = vec16<E>::LANES, BATCH = 4;
    size_t place = (size_t)row * p.pieces.row_bytes + at;
    uint4 *to = reinterpret_cast<uint4 *>(static_cast<char *>(p.a.recv_x) + place);
    const uint4 *y = reinterpret_cast<const uint4 *>(static_cast<const char *>(p.a.dot_with) + place);
    float sum = 0.0f;
    for (uint32_t first = lane; first < n_vecs; first += 32 * BATCH) {
        uint4 other[BATCH];
#pragma unroll
        for (int b = 0; b < BATCH; b++)
            if (p.a.dot_with && first + 32 * b < n_vecs)
                other[b] = load_once(y + first + 32 * b);
#pragma unroll
        for (int b = 0; b < BATCH; b++) {
            if (first + 32 * b >= n_vecs)
                break;
            float values[LANES];
            uint4 packed = piece[first + 32 * b];
            vec16<E>::unpack(packed, values);
            if (p.a.dot_with) {
                float others[LANES];
                vec16<E>::unpack(other[b], others);
#pragma unroll
                for (int i = 0; i < LANES; i++)
                    sum += values[i] * others[i];
            }
            if (p.a.scaled) {
#pragma unroll
                for (int i = 0; i < LANES; i++)
                    values[i] *= weight;
                packed = vec16<E>::pack(values);
            }
            if (p.a.recv_x)
                to[first + 32 * b] = packed;
        }
    }
    if (!p.a.dot_with)
        return;
    sum = warp_sum(sum);
    if (lane == 0)
        p.a.dot[(size_t)row * p.pieces.n_pieces + part] = sum;
}

/* A staged piece to all its rows. E void: copied as it is, each lane storing the row of its slot. Whole warp.
 */
template <typename E>
static __device__ __forceinline__ void spread_piece(const dispatch_params &p, const received &r,
                                                    warp_slot &slot, const void *piece, uint32_t lane)
{
    uint32_t bytes = piece_length(p.pieces, r.piece);
    size_t at = (size_t)r.piece * p.pieces.piece_bytes;
    if constexpr (__is_same(E, void)) {
        if (r.row >= 0)
            bulk_store(static_cast<char *>(p.a.recv_x) + (size_t)r.row * p.pieces.row_bytes + at,
                       slot.address, bytes);
        bulk_commit();
    } else {
        for (uint32_t left = __ballot_sync(FULL_WARP, r.row >= 0); left; left &= left - 1) {
            int k = __ffs(left) - 1;
            spread_row<E>(p, static_cast<const uint4 *>(piece), bytes / 16, at,
                          __shfl_sync(FULL_WARP, r.row, k), __shfl_sync(FULL_WARP, r.weight, k), r.piece,
                          lane);
        }
    }
}

/* Staged tokens of all ranks, and this rank's own, in order of token. Whole warp. */
template <typename E>
static __device__ void receive_tokens(const dispatch_params &p, warp_slot &slot, const void *piece,
                                      uint32_t epoch)
{
    const struct cuda_exchange &x = p.a.exchange;
    const struct exchange_shape &shape = x.shape;
    uint32_t lane = threadIdx.x % 32, most_tokens = 0;
    for (uint32_t rank = 0; rank < shape.world_size; rank++)
        most_tokens = max(most_tokens, (uint32_t)p.a.routing.slot_tokens[rank]);
    uint32_t n_padding = x.set.idx == 0 ? padding_units(shape) * shape.n_local_experts : 0;
    uint32_t n_units = n_padding + most_tokens * shape.world_size * p.pieces.n_pieces;
    bool rows_wanted = p.a.recv_x || p.a.dot_with;
    unit_queue queue = {&state_of(x)->next[0], 0};
    queue_fetch(queue, lane);
    for (uint32_t unit; (unit = queue_take(queue, lane)) < n_units;) {
        if (unit < n_padding) {
            clear_padding(p, unit, lane);
            continue;
        }
        received r = received_slots(p, unit - n_padding, lane);
        record_slots(p, r, lane);
        if (!__any_sync(FULL_WARP, r.row >= 0) || !rows_wanted)
            continue;
        bool own = r.source == shape.rank, ok = true;
        bulk_wait_read<0>();
        __syncwarp();
        if (lane == 0) {
            const char *from =
                own ? static_cast<const char *>(p.a.x.data) + (size_t)r.token * p.pieces.row_bytes
                    : stage_at(x, shape.rank, r.source, r.token);
            if (!own && polls(x))
                ok = wait_flag(arrival_at(x, shape.rank, r.source, r.token * p.pieces.n_pieces + r.piece),
                               epoch, true, x.abort_word);
            fence_bulk_global();
            if (ok)
                bulk_load(slot.address, from + (size_t)r.piece * p.pieces.piece_bytes,
                          piece_length(p.pieces, r.piece), slot.barrier);
        }
        if (!__shfl_sync(FULL_WARP, ok, 0))
            break;
        bulk_load_wait(slot.barrier, slot.parity);
        slot.parity ^= 1;
        spread_piece<E>(p, r, slot, piece, lane);
    }
    bulk_wait_written<0>();
}

template <typename E>
static __global__ void __launch_bounds__(THREADS, 1)
    dispatch_kernel(const __grid_constant__ dispatch_params p)
{
    extern __shared__ __align__(128) unsigned char shared[];
    __shared__ __align__(8) uint64_t barriers[WARPS];
    __shared__ uint32_t first_bad;
    __shared__ sent_box box;
    const struct cuda_exchange &x = p.a.exchange;
    uint32_t warp = threadIdx.x / 32;
    void *piece = shared + warp * CUDA_PIECE_BYTES;
    warp_slot slot = {shared_address(piece), shared_address(&barriers[warp]), 0};
    if (threadIdx.x % 32 == 0)
        mbarrier_init(slot.barrier);
    box_init(box);
    uint32_t epoch = op_enter(x);
    route_memory memory = route_partition(x.shape, shared, SHARED_BYTES);
    bool first = blockIdx.x == 0, routes = p.a.route && first,
         publishes = !p.a.route && first && p.a.topk_weights.data;
    bool shared_routing = p.a.route && routing_is_shared(x.shape);
    bool sends = does(x, CUDA_STAGE_SEND) && blockIdx.x - p.first_send < p.n_send, ok = true;
    __syncthreads();

    if (routes && does(x, CUDA_STAGE_SEND))
        route_count(p.a, memory, false, &first_bad);
    if (routes || publishes)
        ok = signals_wait(x, SIGNAL_ENTERED, epoch);
    if (routes && ok && does(x, CUDA_STAGE_SEND)) {
        route_scan(p.a, memory, true);
        if (shared_routing) {
            route_share(p.a);
            __syncthreads();
            if (polls(x) && threadIdx.x == 0)
                store_flag(signal_at(x, x.shape.rank, SIGNAL_SHARED, x.shape.rank), epoch);
        }
        signals_raise(x, SIGNAL_COUNTS, epoch);
        if (threadIdx.x == 0)
            route_record_bad(p.a, first_bad);
        if (p.a.routing.sent_tokens && threadIdx.x < x.shape.world_size)
            p.a.routing.sent_tokens[threadIdx.x] = memory.sent[threadIdx.x];
    }
    if (publishes && ok && does(x, CUDA_STAGE_SEND)) {
        weights_publish(x, static_cast<const float *>(p.a.topk_weights.data));
        signals_raise(x, SIGNAL_SLOTS, epoch);
    }
    __syncthreads();
    if (sends && ok) {
        fence_bulk_shared();
        if (warp < SENDERS)
            ok = send_tokens(p, slot, box, (blockIdx.x - p.first_send) * SENDERS + warp, p.n_send * SENDERS,
                             epoch);
        else if (polls(x))
            box_tell(x, box, SENDERS, epoch);
    }
    ok = __syncthreads_and(ok);
    if (routes && ok && does(x, CUDA_STAGE_LAYOUT)) {
        if (!p.route_alone && !shared_routing) {
            route_count(p.a, memory, true, &first_bad);
            route_scan(p.a, memory, false);
        }
        if (shared_routing)
            rows_clear(x.shape, memory);
        ok = signals_wait(x, SIGNAL_COUNTS, epoch);
        if (ok) {
            shared_routing ? route_layout_shared(p.a, memory) : route_layout(p.a, memory);
            shared_routing ? signal_raise_here(x, SIGNAL_SLOTS, epoch)
                           : signals_raise(x, SIGNAL_SLOTS, epoch);
            route_keep(p.a);
        }
    }
    if (ok && does(x, CUDA_STAGE_RECEIVE)) {
        if (p.a.route || p.a.topk_weights.data)
            ok = shared_routing ? signal_wait_here(x, SIGNAL_SLOTS, epoch)
                                : signals_wait(x, SIGNAL_SLOTS, epoch);
        __syncthreads();
        fence_bulk_shared();
        if (ok)
            receive_tokens<E>(p, slot, piece, epoch);
    }
    op_leave(x, epoch);
}

static const void *kernel_of(const struct cuda_dispatch_args *args)
{
    if (!(args->scaled || args->dot_with))
        return reinterpret_cast<const void *>(dispatch_kernel<void>);
    switch (args->x.dtype) {
    case EPD_BF16:
        return reinterpret_cast<const void *>(dispatch_kernel<__nv_bfloat16>);
    case EPD_F16:
        return reinterpret_cast<const void *>(dispatch_kernel<__half>);
    case EPD_F32:
        return reinterpret_cast<const void *>(dispatch_kernel<float>);
    default:
        return NULL;
    }
}

enum epd_status dispatch_load(struct epd_error *error)
{
    const void *kernels[] = {reinterpret_cast<const void *>(dispatch_kernel<void>),
                             reinterpret_cast<const void *>(dispatch_kernel<__nv_bfloat16>),
                             reinterpret_cast<const void *>(dispatch_kernel<__half>),
                             reinterpret_cast<const void *>(dispatch_kernel<float>)};
    enum epd_status status = EPD_OK;
    for (size_t i = 0; i < sizeof(kernels) / sizeof(kernels[0]) && status == EPD_OK; i++)
        status = kernel_load(kernels[i], SHARED_BYTES, "dispatch", error);
    return status;
}

static enum epd_status dispatch_check(const struct cuda_dispatch_args *args, struct epd_error *error)
{
    const struct exchange_shape *shape = &args->exchange.shape;
    enum epd_status status = exchange_check(&args->exchange, "dispatch", error);
    if (status == EPD_OK)
        status =
            row_bytes_check(&args->exchange, shape->hidden * dtype_bytes(args->x.dtype), "dispatch", error);
    if (status != EPD_OK)
        return status;
    if (!kernel_of(args))
        return error_set(error, EPD_INVALID_DTYPE, "dispatch x: %s", dtype_name(args->x.dtype));
    if (!aligned16(args->x.data) || !aligned16(args->recv_x) || !aligned16(args->dot_with))
        return error_set(error, EPD_INVALID_ALIGNMENT, "dispatch: x, recv_x and y want 16-byte alignment");
    if (!args->route && !aligned16(args->topk_weights.data))
        return error_set(error, EPD_INVALID_ALIGNMENT, "dispatch: topk_weights want 16-byte alignment");
    if (args->route && route_warps(shape->n_experts, shape->top_k, SHARED_BYTES, WARPS) == 0)
        return error_set(error, EPD_UNSUPPORTED, "dispatch: %u experts are more than routing has room for",
                         shape->n_experts);
    return EPD_OK;
}

/* Which block does what. */
static uint32_t share_blocks(struct dispatch_params *p)
{
    const struct cuda_exchange *x = &p->a.exchange;
    uint32_t blocks = blocks_of(x);
    bool with_first = p->a.route || p->a.topk_weights.data;
    p->first_send = with_first && blocks > 1 ? 1 : 0;
    p->n_send = blocks - p->first_send;
    p->route_alone = false;
    p->share_first = p->a.route && routing_is_shared(x->shape);
    if (x->stage == CUDA_STAGE_LAYOUT)
        return 1;
    if (x->stage != CUDA_STAGE_ALL || blocks == 1)
        return blocks;
    uint32_t wanted = x->send_blocks ? x->send_blocks : (blocks * DEFAULT_SEND_BLOCKS + 31) / 32;
    p->n_send = wanted < p->n_send ? wanted : p->n_send;
    p->route_alone = true;
    return blocks;
}

enum epd_status cuda_dispatch_launch(const struct cuda_dispatch_args *args, struct CUstream_st *stream,
                                     struct epd_error *error)
{
    enum epd_status status = dispatch_check(args, error);
    if (status != EPD_OK)
        return status;
    struct dispatch_params params;
    params.a = *args;
    params.pieces = pieces_of(args->exchange.shape.hidden * dtype_bytes(args->x.dtype), CUDA_PIECE_BYTES);
    uint32_t blocks = share_blocks(&params);
    void *arguments[] = {&params};
    return cuda_check(
        cudaLaunchKernel(kernel_of(args), dim3(blocks), dim3(THREADS), arguments, SHARED_BYTES, stream),
        "dispatch", error);
}
