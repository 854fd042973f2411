/* What the exchange kernels share: views into workspaces, the steps of an op (enter, signal, wait, leave),
 * rows in pieces, and the checks of the launchers.
 *
 * Epochs. Every op of CUDA_STAGE_ALL has a number, one more than the last one's, counted in each workspace
 * alike. A rank raises ENTERED at its peers when its earlier work is done, and writes to a peer only after
 * that peer has entered: so nobody overwrites what is still being read. Flags carry the epoch and are never
 * cleared. */
#ifndef EPD_KERNELS_CUDA_EXCHANGE_CUH
#define EPD_KERNELS_CUDA_EXCHANGE_CUH

extern "C" {
#include "kernels/cuda/cuda.h"
}
#include "kernels/cuda/device.cuh"

enum signal_kind {
    SIGNAL_ENTERED = 0, /* the rank has begun this op */
    SIGNAL_COUNTS = 1,  /* its counts are here */
    SIGNAL_SLOTS = 2,   /* its slot rows and weights are here */
    SIGNAL_SCALARS = 3, /* its scalars are here */
    SIGNAL_SHARED = 4,  /* this rank's own: its share of a shared routing is on the link */
    N_SIGNALS
};

/* cuda_workspace.state */
struct workspace_state {
    uint32_t epoch;   /* ops completed */
    uint32_t left;    /* blocks of this launch that are done */
    uint32_t next[2]; /* work handed out in this launch */
    uint32_t pushed;  /* blocks whose stores to peers are done */
};

static __device__ __forceinline__ char *workspace_of(const struct cuda_exchange &x, uint32_t rank)
{
    return static_cast<char *>(x.workspace[rank]);
}

static __device__ __forceinline__ workspace_state *state_of(const struct cuda_exchange &x)
{
    return reinterpret_cast<workspace_state *>(workspace_of(x, x.shape.rank) + x.layout.state);
}

static __device__ __forceinline__ uint32_t *signal_at(const struct cuda_exchange &x, uint32_t at,
                                                      signal_kind kind, uint32_t from)
{
    return reinterpret_cast<uint32_t *>(workspace_of(x, at) + x.layout.signals) + kind * EPD_MAX_RANKS + from;
}

/* Row of `token` of rank `from`, staged at rank `at`. */
static __device__ __forceinline__ char *stage_at(const struct cuda_exchange &x, uint32_t at, uint32_t from,
                                                 uint32_t token)
{
    size_t place = (size_t)(from - (from > at ? 1 : 0)) * x.shape.max_tokens + token;
    return workspace_of(x, at) + x.layout.stage + place * x.layout.stage_row_bytes;
}

static __device__ __forceinline__ uint32_t *arrival_at(const struct cuda_exchange &x, uint32_t at,
                                                       uint32_t from, uint32_t unit)
{
    return reinterpret_cast<uint32_t *>(workspace_of(x, at) + x.layout.arrivals) +
           from * x.layout.arrival_stride + unit;
}

static __device__ __forceinline__ int32_t *slot_rows_at(const struct cuda_exchange &x, uint32_t at,
                                                        uint32_t from)
{
    return reinterpret_cast<int32_t *>(workspace_of(x, at) + x.layout.slot_row) + from * x.layout.slot_stride;
}

static __device__ __forceinline__ float *slot_weights_at(const struct cuda_exchange &x, uint32_t at,
                                                         uint32_t from)
{
    return reinterpret_cast<float *>(workspace_of(x, at) + x.layout.slot_weight) +
           from * x.layout.slot_stride;
}

/* Of the sources of all sets, the first one of this set. */
static __device__ __forceinline__ uint32_t first_source(const struct cuda_exchange &x)
{
    return x.set.idx * x.shape.world_size * x.shape.max_tokens * x.shape.top_k;
}

static __device__ __forceinline__ bool polls(const struct cuda_exchange &x)
{
    return x.stage == CUDA_STAGE_ALL;
}

/* 1 if this launch does `stage`. */
static __device__ __forceinline__ bool does(const struct cuda_exchange &x, cuda_stage stage)
{
    return x.stage == CUDA_STAGE_ALL || x.stage == stage;
}

/* The number of this op; its first block tells the peers that this rank has begun. Whole block. */
static __device__ __forceinline__ uint32_t op_enter(const struct cuda_exchange &x)
{
    uint32_t epoch = *reinterpret_cast<volatile uint32_t *>(&state_of(x)->epoch) + 1;
    if (polls(x) && blockIdx.x == 0 && threadIdx.x < x.shape.world_size)
        store_flag(signal_at(x, threadIdx.x, SIGNAL_ENTERED, x.shape.rank), epoch);
    return epoch;
}

/* Waits until every rank has raised `kind`. Whole block; false after an abort. */
static __device__ __forceinline__ bool signals_wait(const struct cuda_exchange &x, signal_kind kind,
                                                    uint32_t epoch)
{
    if (!polls(x))
        return true;
    bool ok = true;
    if (threadIdx.x < x.shape.world_size)
        ok = wait_flag(signal_at(x, x.shape.rank, kind, threadIdx.x), epoch, false, x.abort_word);
    return __syncthreads_and(ok);
}

/* The same for one warp on its own; for the signal of this rank alone if `here`. */
static __device__ __forceinline__ bool signals_wait_warp(const struct cuda_exchange &x, signal_kind kind,
                                                         uint32_t epoch, bool here)
{
    bool ok = true;
    if (here && polls(x) && threadIdx.x % 32 == 0)
        ok = wait_flag(signal_at(x, x.shape.rank, kind, x.shape.rank), epoch, false, x.abort_word);
    for (uint32_t rank = threadIdx.x % 32; rank < x.shape.world_size && polls(x) && !here; rank += 32)
        ok &= wait_flag(signal_at(x, x.shape.rank, kind, rank), epoch, false, x.abort_word);
    return __all_sync(FULL_WARP, ok);
}

/* Between the blocks of this rank alone. Whole block. */
static __device__ __forceinline__ void signal_raise_here(const struct cuda_exchange &x, signal_kind kind,
                                                         uint32_t epoch)
{
    __syncthreads();
    if (!polls(x) || threadIdx.x != 0)
        return;
    fence_device();
    store_flag(signal_at(x, x.shape.rank, kind, x.shape.rank), epoch);
}

static __device__ __forceinline__ bool signal_wait_here(const struct cuda_exchange &x, signal_kind kind,
                                                        uint32_t epoch)
{
    bool ok = true;
    if (polls(x) && threadIdx.x == 0)
        ok = wait_flag(signal_at(x, x.shape.rank, kind, x.shape.rank), epoch, false, x.abort_word);
    return __syncthreads_and(ok);
}

/* Everything this block has written is seen by whoever sees the signal. Whole block. */
static __device__ __forceinline__ void signals_raise(const struct cuda_exchange &x, signal_kind kind,
                                                     uint32_t epoch)
{
    __syncthreads();
    if (!polls(x) || threadIdx.x >= x.shape.world_size)
        return;
    fence_system();
    store_flag(signal_at(x, threadIdx.x, kind, x.shape.rank), epoch);
}

/* The weights of this rank's slots to every rank, 16-byte aligned on both sides; as many loads in flight as a block of one
 * multiprocessor needs to be done in a few microseconds. Whole block. */
static __device__ void weights_publish(const struct cuda_exchange &x, const float *weights)
{
    constexpr uint32_t BATCH = 4;
    uint32_t n = x.shape.n_tokens * x.shape.top_k, n_vecs = n / 4;
    const uint4 *from = reinterpret_cast<const uint4 *>(weights);
    for (uint32_t first = threadIdx.x; first < n_vecs; first += BATCH * blockDim.x) {
        uint4 vecs[BATCH];
#pragma unroll
        for (uint32_t b = 0; b < BATCH; b++)
            if (first + b * blockDim.x < n_vecs)
                vecs[b] = from[first + b * blockDim.x];
        for (uint32_t step = 0; step < x.shape.world_size; step++) {
            uint32_t to = (x.shape.rank + step) % x.shape.world_size;
            uint4 *there = reinterpret_cast<uint4 *>(slot_weights_at(x, to, x.shape.rank));
#pragma unroll
            for (uint32_t b = 0; b < BATCH; b++)
                if (first + b * blockDim.x < n_vecs)
                    there[first + b * blockDim.x] = vecs[b];
        }
    }
    for (uint32_t i = n_vecs * 4 + threadIdx.x; i < n; i += blockDim.x)
        for (uint32_t to = 0; to < x.shape.world_size; to++)
            slot_weights_at(x, to, x.shape.rank)[i] = weights[i];
}

/* The last block to leave makes the state ready for the next launch. Whole block. */
static __device__ __forceinline__ void op_leave(const struct cuda_exchange &x, uint32_t epoch)
{
    __syncthreads();
    if (threadIdx.x != 0)
        return;
    workspace_state *state = state_of(x);
    fence_device();
    if (atomicAdd(&state->left, 1) != gridDim.x - 1)
        return;
    fence_device(); /* after the last fetch of every queue */
    state->left = 0;
    state->next[0] = 0;
    state->next[1] = 0;
    state->pushed = 0;
    if (polls(x))
        state->epoch = epoch;
}

/* A row in pieces, one warp each. */
struct row_pieces {
    uint32_t row_bytes;
    uint32_t n_pieces;
    uint32_t piece_bytes; /* of all but the last */
};

static __device__ __forceinline__ uint32_t piece_length(const row_pieces &pieces, uint32_t piece)
{
    uint32_t left = pieces.row_bytes - piece * pieces.piece_bytes;
    return left < pieces.piece_bytes ? left : pieces.piece_bytes;
}

/* Work is handed out a unit at a time, so that slow neighbours do not matter; the next number is fetched
 * while the current unit is worked on. Whole warp. */
struct unit_queue {
    uint32_t *next;
    uint32_t fetched; /* lane 0 */
};

static __device__ __forceinline__ void queue_fetch(unit_queue &queue, uint32_t lane)
{
    if (lane == 0)
        queue.fetched = atomicAdd(queue.next, 1);
}

static __device__ __forceinline__ uint32_t queue_take(unit_queue &queue, uint32_t lane)
{
    uint32_t unit = __shfl_sync(FULL_WARP, queue.fetched, 0);
    queue_fetch(queue, lane);
    return unit;
}

/* The bulk path of one warp: one slot of CUDA_PIECE_BYTES in shared memory and its mbarrier. */
struct warp_slot {
    uint32_t address;
    uint32_t barrier;
    uint32_t parity;
};

/* Telling peers that pieces have arrived needs a fence for the whole system, which takes a microsecond or
 * more and lets one warp of a multiprocessor through at a time. So a sending block has one warp, the teller,
 * that does nothing else: the others hand it each piece that has been written, and one fence of it serves all
 * that have come in meanwhile. */
struct sent_unit {
    uint64_t ranks; /* that have got it; 0 = none */
    uint32_t unit;
};

/* In shared memory: a queue for each warp that sends, at most 32. Deep enough that nobody waits for a fence.
 */
static constexpr uint32_t BOX_DEPTH = 8;

struct sent_box {
    struct sent_unit units[32][BOX_DEPTH];
    uint32_t put[32], told[32]; /* units so far */
    uint32_t n_done;            /* warps that will hand over nothing more */
};

/* Whole block, before a barrier. */
static __device__ __forceinline__ void box_init(sent_box &box)
{
    if (threadIdx.x < 32) {
        box.put[threadIdx.x] = 0;
        box.told[threadIdx.x] = 0;
    }
    if (threadIdx.x == 0)
        box.n_done = 0;
}

/* Hands over a unit; waits while the queue is full. Lane 0 of a warp. */
static __device__ __forceinline__ void box_put(sent_box &box, uint32_t warp, uint32_t unit, uint64_t ranks)
{
    if (ranks == 0)
        return;
    uint32_t n = box.put[warp];
    while (n - load_acquire_shared(&box.told[warp]) == BOX_DEPTH)
        __nanosleep(50);
    box.units[warp][n % BOX_DEPTH].ranks = ranks;
    box.units[warp][n % BOX_DEPTH].unit = unit;
    store_release_shared(&box.put[warp], n + 1);
}

static __device__ __forceinline__ void box_done(sent_box &box)
{
    __threadfence_block();
    atomicAdd(&box.n_done, 1);
}

/* The teller: until all n_warps are done, which they will be without anyone's help. Whole warp. */
static __device__ void box_tell(const struct cuda_exchange &x, sent_box &box, uint32_t n_warps,
                                uint32_t epoch)
{
    uint32_t lane = threadIdx.x % 32, told = 0;
    for (;;) {
        bool last = load_acquire_shared(&box.n_done) == n_warps;
        uint32_t put = lane < n_warps ? load_acquire_shared(&box.put[lane]) : 0;
        if (!__any_sync(FULL_WARP, put != told)) {
            if (__all_sync(FULL_WARP, last))
                return;
            __nanosleep(100);
            continue;
        }
        fence_system();
        for (; told != put; told++) {
            sent_unit sent = box.units[lane][told % BOX_DEPTH];
            for (uint64_t left = sent.ranks; left; left &= left - 1)
                store_flag(arrival_at(x, __ffsll((long long)left) - 1, x.shape.rank, sent.unit), epoch);
        }
        if (lane < n_warps)
            store_release_shared(&box.told[lane], told);
        __syncwarp();
    }
}

/* Host side of the launchers.
 * --------------------------------------------------------------------------------------- */

static inline enum epd_status cuda_check(cudaError_t code, const char *what, struct epd_error *error)
{
    if (code == cudaSuccess)
        return EPD_OK;
    return error_set(error, EPD_CUDA, "%s: %s", what, cudaGetErrorString(code));
}

static inline struct row_pieces pieces_of(size_t row_bytes, uint32_t most_bytes)
{
    struct row_pieces pieces;
    uint32_t bytes = (uint32_t)row_bytes, n = (bytes + most_bytes - 1) / most_bytes;
    pieces.row_bytes = bytes;
    pieces.piece_bytes = ((bytes + n - 1) / n + 127) / 128 * 128;
    pieces.n_pieces = (bytes + pieces.piece_bytes - 1) / pieces.piece_bytes;
    return pieces;
}

static inline bool aligned16(const void *pointer)
{
    return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
}

/* Refuses what the kernels cannot do. */
static inline enum epd_status exchange_check(const struct cuda_exchange *x, const char *what,
                                             struct epd_error *error)
{
    const struct exchange_shape *shape = &x->shape;
    if (shape->world_size == 0 || shape->world_size > EPD_MAX_RANKS || shape->rank >= shape->world_size)
        return error_set(error, EPD_INVALID_SHAPE, "%s: rank %u of %u, want at most %d ranks", what,
                         shape->rank, shape->world_size, EPD_MAX_RANKS);
    if (shape->top_k == 0 || shape->top_k > CUDA_MAX_TOP_K)
        return error_set(error, EPD_INVALID_SHAPE, "%s: top-k %u, want 1..%d", what, shape->top_k,
                         CUDA_MAX_TOP_K);
    if (shape->n_local_experts == 0 || shape->n_experts != shape->n_local_experts * shape->world_size)
        return error_set(error, EPD_INVALID_SHAPE, "%s: %u experts on %u ranks with %u each", what,
                         shape->n_experts, shape->world_size, shape->n_local_experts);
    if (shape->n_tokens > shape->max_tokens)
        return error_set(error, EPD_INVALID_SHAPE, "%s: %u tokens, want at most %u", what, shape->n_tokens,
                         shape->max_tokens);
    if ((uint64_t)shape->world_size * shape->max_tokens * shape->top_k > INT32_MAX ||
        shape->capacity_rows > INT32_MAX || shape->capacity_rows < 0)
        return error_set(error, EPD_INVALID_SHAPE, "%s: more than 2^31 - 1 rows", what);
    if (x->stage == CUDA_STAGE_ALL && !x->abort_word)
        return error_set(error, EPD_INTERNAL, "%s: no abort word to poll", what);
    return EPD_OK;
}

static inline enum epd_status row_bytes_check(const struct cuda_exchange *x, size_t row_bytes,
                                              const char *what, struct epd_error *error)
{
    if (row_bytes == 0 || row_bytes % 16 != 0)
        return error_set(error, EPD_INVALID_SHAPE, "%s: rows of %zu bytes, want a multiple of 16", what,
                         row_bytes);
    if (row_bytes > x->layout.stage_row_bytes)
        return error_set(error, EPD_INVALID_SHAPE, "%s: rows of %zu bytes, the workspace takes %zu", what,
                         row_bytes, x->layout.stage_row_bytes);
    return EPD_OK;
}

/* Blocks of one launch: all of them must be resident when they wait for each other. */
static inline uint32_t blocks_of(const struct cuda_exchange *x)
{
    int device = 0, n_multiprocessors = 0;
    if (cudaGetDevice(&device) != cudaSuccess ||
        cudaDeviceGetAttribute(&n_multiprocessors, cudaDevAttrMultiProcessorCount, device) != cudaSuccess)
        return 1;
    return cuda_exchange_blocks(&x->shape, (uint32_t)n_multiprocessors);
}

/* For cuda_kernels_load: each kernel file loads its own. */
enum epd_status dispatch_load(struct epd_error *error);
enum epd_status combine_load(struct epd_error *error);
enum epd_status scalars_load(struct epd_error *error);
enum epd_status report_load(struct epd_error *error);
enum epd_status activation_load(struct epd_error *error);
enum epd_status hop_load(struct epd_error *error);

static inline enum epd_status kernel_load(const void *kernel, int shared_bytes, const char *what,
                                          struct epd_error *error)
{
    cudaFuncAttributes attributes;
    enum epd_status status = cuda_check(cudaFuncGetAttributes(&attributes, kernel), what, error);
    if (status != EPD_OK || shared_bytes == 0)
        return status;
    return cuda_check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes),
                      what, error);
}

#endif
