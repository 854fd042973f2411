/* Both ends of a rail. choose: one block, 4 T K bytes in and about as many out; pack: T H 2 bytes in, up to n_nodes - 1
 * times as many out; finish: as many in, T H 2 out. All but choose go at the speed of memory, beside which the network
 * between them takes ten times as long. */
#include "kernels/cuda/exchange.cuh"

extern "C" {
#include "kernels/cuda/hop.h"
}

static constexpr uint32_t CHOOSE_THREADS = 1024, CHOOSE_WARPS = CHOOSE_THREADS / 32;
static constexpr uint32_t THREADS = 512, WARPS = THREADS / 32, BLOCKS = 64;
static constexpr uint32_t MAX_SHARED_BYTES = 160 * 1024;

static __host__ __device__ __forceinline__ uint32_t ranks_per_node(const struct cuda_hop &h)
{
    return h.shape.world_size / h.shape.n_nodes;
}

static __host__ __device__ __forceinline__ uint32_t experts_per_node(const struct cuda_hop &h)
{
    return h.shape.n_experts / h.shape.n_nodes;
}

static __device__ __forceinline__ char *frame_of(const struct cuda_hop &h, char *frames, uint32_t node)
{
    return frames + (size_t)(node - (node > h.node ? 1 : 0)) * h.frame.bytes;
}

/* The place of the token in the frame of the node; -1 where it does not go. */
static __device__ __forceinline__ int32_t place_of(const struct cuda_hop &h, uint32_t node, uint32_t token)
{
    return node == h.node ? -1 : h.place[(size_t)node * h.shape.max_tokens + token];
}

/* Expert of the group -> of this node, or -1. */
static __device__ __forceinline__ int32_t expert_here(const struct cuda_hop &h, int32_t expert)
{
    int32_t first = (int32_t)(h.node * experts_per_node(h));
    return expert >= first && expert < first + (int32_t)experts_per_node(h) ? expert - first : -1;
}

/* ---- choose ---- */

struct choose_memory {
    int32_t *rows; /* [E] of each expert; dynamic */
    uint32_t first_bad;
    int32_t before[CHOOSE_WARPS][EPD_MAX_RANKS]; /* tokens for a node: of a warp, then of all before it */
    int32_t chosen[EPD_MAX_RANKS];               /* so far */
    int32_t sent[EPD_MAX_RANKS];                 /* tokens for a rank, so far */
};

static __device__ __forceinline__ int64_t topk_at(const struct tensor &topk_idx, size_t i)
{
    return topk_idx.dtype == EPD_I64 ? static_cast<const int64_t *>(topk_idx.data)[i]
                                     : (int64_t) static_cast<const int32_t *>(topk_idx.data)[i];
}

/* Checks and counts the experts of a token; returns the ranks that have one. */
static __device__ uint64_t token_choose(const struct cuda_hop_choose_args &a, choose_memory &m,
                                        uint32_t token)
{
    const struct exchange_shape &shape = a.hop.shape;
    size_t first = (size_t)token * shape.top_k;
    uint64_t ranks = 0;
    for (uint32_t k = 0; k < shape.top_k; k++) {
        int64_t value = topk_at(a.topk_idx, first + k);
        bool known = value >= 0 && value < shape.n_experts;
        for (uint32_t j = 0; j < k && known; j++)
            known = a.expert[first + j] != (int32_t)value;
        int32_t expert = known ? (int32_t)value : -1;
        if (!known && value != -1)
            atomicMin(&m.first_bad, (uint32_t)first + k);
        a.expert[first + k] = expert;
        a.expert_here[first + k] = known ? expert_here(a.hop, expert) : -1;
        if (!known)
            continue;
        atomicAdd(&m.rows[expert], 1);
        ranks |= 1ull << ((uint32_t)expert / shape.n_local_experts);
    }
    return ranks;
}

/* The other nodes that have one of the ranks. */
static __device__ uint64_t nodes_of(const struct cuda_hop &h, uint64_t ranks)
{
    uint64_t nodes = 0;
    for (; ranks; ranks &= ranks - 1)
        nodes |= 1ull << ((uint32_t)(__ffsll((long long)ranks) - 1) / ranks_per_node(h));
    return nodes & ~(1ull << h.node);
}

/* Each lane has a token for `ranks`. Whole warp. */
static __device__ void ranks_tally(const struct exchange_shape &shape, choose_memory &m, uint64_t ranks)
{
    for (uint32_t rank = 0; rank < shape.world_size; rank++) {
        uint32_t n = __popc(__ballot_sync(FULL_WARP, ranks >> rank & 1));
        if (threadIdx.x % 32 == 0 && n)
            atomicAdd(&m.sent[rank], (int32_t)n);
    }
}

/* Places of a block of tokens, one per thread, behind those chosen so far. Whole block. */
static __device__ void tokens_place(const struct cuda_hop_choose_args &a, choose_memory &m, uint32_t token,
                                    uint64_t nodes)
{
    const struct exchange_shape &shape = a.hop.shape;
    uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32, earlier = (1u << lane) - 1;
    for (uint32_t node = 0; node < shape.n_nodes; node++) {
        uint32_t n = __popc(__ballot_sync(FULL_WARP, nodes >> node & 1));
        if (lane == 0)
            m.before[warp][node] = (int32_t)n;
    }
    __syncthreads();
    if (threadIdx.x < shape.n_nodes) {
        int32_t sum = m.chosen[threadIdx.x];
        for (uint32_t w = 0; w < CHOOSE_WARPS; w++) {
            int32_t n = m.before[w][threadIdx.x];
            m.before[w][threadIdx.x] = sum;
            sum += n;
        }
        m.chosen[threadIdx.x] = sum;
    }
    __syncthreads();
    for (uint32_t node = 0; node < shape.n_nodes; node++) {
        uint32_t goes = __ballot_sync(FULL_WARP, nodes >> node & 1);
        int32_t place = m.before[warp][node] + __popc(goes & earlier);
        if (token < shape.n_tokens && node != a.hop.node)
            a.place[(size_t)node * shape.max_tokens + token] = goes >> lane & 1 ? place : -1;
    }
}

/* By the rule of the host kernels (route.cuh). One thread. */
static __device__ void record_bad(const struct cuda_hop_choose_args &a, uint32_t first_bad)
{
    const struct exchange_shape &shape = a.hop.shape;
    int32_t token = (int32_t)(first_bad / shape.top_k);
    if (first_bad == UINT32_MAX || (a.error->status != 0 && a.error->token >= 0 && a.error->token <= token))
        return;
    int64_t got = topk_at(a.topk_idx, first_bad);
    a.error->status = EPD_BAD_ROUTING;
    a.error->rank = shape.rank;
    a.error->expert = got >= 0 && got < shape.n_experts ? (int32_t)got : -1;
    a.error->token = token;
    a.error->got = got;
    a.error->allowed = (int64_t)shape.n_experts - 1;
}

/* Heads, counts and what crosses. Whole block. */
static __device__ void choose_tell(const struct cuda_hop_choose_args &a, const choose_memory &m)
{
    const struct cuda_hop &h = a.hop;
    const struct exchange_shape &shape = h.shape;
    uint32_t n_here = ranks_per_node(h);
    for (uint32_t e = threadIdx.x; e < shape.n_experts; e += CHOOSE_THREADS) {
        int32_t rows = m.rows[e];
        for (uint32_t i = 0; i < n_here; i++)
            a.counts[i][(size_t)shape.rank * shape.n_experts + e] = rows;
        for (uint32_t node = 0; node < shape.n_nodes; node++)
            if (node != h.node)
                reinterpret_cast<int32_t *>(frame_of(h, h.out, node) + h.frame.counts)[e] = rows;
    }
    uint32_t node = threadIdx.x;
    if (node < shape.n_nodes && node != h.node)
        *reinterpret_cast<cuda_hop_head *>(frame_of(h, h.out, node) +
                                           h.frame.head) = {CUDA_HOP_MAGIC, (uint32_t)m.chosen[node]};
    uint32_t rank = threadIdx.x;
    if (a.sent_tokens && rank < shape.world_size && rank / n_here != h.node)
        a.sent_tokens[rank] = m.sent[rank];
}

static __global__ void __launch_bounds__(CHOOSE_THREADS, 1)
    choose_kernel(const __grid_constant__ cuda_hop_choose_args a)
{
    extern __shared__ int32_t expert_rows[];
    __shared__ choose_memory m;
    const struct exchange_shape &shape = a.hop.shape;
    for (uint32_t e = threadIdx.x; e < shape.n_experts; e += CHOOSE_THREADS)
        expert_rows[e] = 0;
    if (threadIdx.x < EPD_MAX_RANKS)
        m.chosen[threadIdx.x] = m.sent[threadIdx.x] = 0;
    if (threadIdx.x == 0) {
        m.rows = expert_rows;
        m.first_bad = UINT32_MAX;
    }
    __syncthreads();
    for (uint32_t first = 0; first < shape.n_tokens; first += CHOOSE_THREADS) {
        uint32_t token = first + threadIdx.x;
        uint64_t ranks = token < shape.n_tokens ? token_choose(a, m, token) : 0;
        if (a.sent_tokens)
            ranks_tally(shape, m, ranks);
        tokens_place(a, m, token, nodes_of(a.hop, ranks));
    }
    __syncthreads();
    choose_tell(a, m);
    if (threadIdx.x == 0)
        record_bad(a, m.first_bad);
}

/* ---- pack, take ---- */

/* n elements of a row by one warp, several loads in flight. */
template <typename V>
static __device__ __forceinline__ void row_copy(V *to, const V *from, uint32_t n, uint32_t lane)
{
    constexpr uint32_t BATCH = 4;
    for (uint32_t first = lane; first < n; first += 32 * BATCH) {
        V values[BATCH];
#pragma unroll
        for (uint32_t b = 0; b < BATCH; b++)
            if (first + 32 * b < n)
                values[b] = from[first + 32 * b];
#pragma unroll
        for (uint32_t b = 0; b < BATCH; b++)
            if (first + 32 * b < n)
                to[first + 32 * b] = values[b];
    }
}

static __device__ void token_pack(const struct cuda_hop_pack_args &a, uint32_t token, char *frame,
                                  uint32_t place)
{
    const struct cuda_hop &h = a.hop;
    uint32_t lane = threadIdx.x % 32, top_k = h.shape.top_k, n_vecs = h.row_bytes / 16;
    size_t from = (size_t)token * top_k, to = (size_t)place * top_k;
    if (a.experts)
        row_copy(reinterpret_cast<int32_t *>(frame + h.frame.experts) + to, h.expert + from, top_k, lane);
    if (a.weights)
        row_copy(reinterpret_cast<float *>(frame + h.frame.weights) + to, a.weights + from, top_k, lane);
    if (a.x)
        row_copy(reinterpret_cast<uint4 *>(frame + h.frame.rows) + (size_t)place * n_vecs,
                 static_cast<const uint4 *>(a.x) + (size_t)token * n_vecs, n_vecs, lane);
}

static __global__ void __launch_bounds__(THREADS) pack_kernel(const __grid_constant__ cuda_hop_pack_args a)
{
    const struct cuda_hop &h = a.hop;
    uint32_t first = blockIdx.x * WARPS + threadIdx.x / 32;
    for (uint32_t token = first; token < h.shape.n_tokens; token += gridDim.x * WARPS)
        for (uint32_t node = 0; node < h.shape.n_nodes; node++) {
            int32_t place = place_of(h, node, token);
            if (place >= 0)
                token_pack(a, token, frame_of(h, h.out, node), (uint32_t)place);
        }
}

static __device__ __forceinline__ uint32_t tokens_in(const struct cuda_hop_take_args &a, uint32_t node,
                                                     const char *frame)
{
    const cuda_hop_head *head = reinterpret_cast<const cuda_hop_head *>(frame + a.hop.frame.head);
    if (head->magic == CUDA_HOP_MAGIC && head->n_tokens <= a.hop.shape.max_tokens)
        return head->n_tokens;
    if (blockIdx.x == 0 && threadIdx.x == 0 &&
        atomicCAS(&a.error->status, 0u, (uint32_t)EPD_PROTOCOL) == 0u) {
        a.error->rank = a.hop.shape.rank;
        a.error->expert = -1;
        a.error->token = (int32_t)node;
        a.error->got = head->n_tokens;
        a.error->allowed = a.hop.shape.max_tokens;
    }
    return 0;
}

/* Row `rank` of the counts of all ranks here, within what is possible. */
static __device__ void counts_take(const struct cuda_hop_take_args &a, uint32_t rank, const char *frame)
{
    const struct exchange_shape &shape = a.hop.shape;
    const int32_t *counts = reinterpret_cast<const int32_t *>(frame + a.hop.frame.counts);
    uint32_t n_here = ranks_per_node(a.hop), stride = gridDim.x * THREADS;
    for (uint32_t e = blockIdx.x * THREADS + threadIdx.x; e < shape.n_experts; e += stride) {
        int32_t rows = min(max(counts[e], 0), (int32_t)shape.max_tokens);
        for (uint32_t i = 0; i < n_here; i++)
            a.counts[i][(size_t)rank * shape.n_experts + e] = rows;
    }
}

static __global__ void __launch_bounds__(THREADS) take_kernel(const __grid_constant__ cuda_hop_take_args a)
{
    const struct cuda_hop &h = a.hop;
    uint32_t node = blockIdx.y, n_here = ranks_per_node(h);
    if (node == h.node)
        return;
    const char *frame = frame_of(h, h.in, node);
    const int32_t *experts = reinterpret_cast<const int32_t *>(frame + h.frame.experts);
    uint32_t n = h.shape.max_tokens * h.shape.top_k, n_there = tokens_in(a, node, frame) * h.shape.top_k;
    int32_t *to = a.experts_here + (size_t)node * n;
    for (uint32_t i = blockIdx.x * THREADS + threadIdx.x; i < n; i += gridDim.x * THREADS)
        to[i] = i < n_there ? expert_here(h, experts[i]) : -1;
    counts_take(a, node * n_here + h.shape.rank % n_here, frame);
}

/* ---- the way back ---- */

template <typename E>
static __global__ void __launch_bounds__(THREADS)
    finish_kernel(const __grid_constant__ cuda_hop_finish_args a)
{
    constexpr int LANES = vec16<E>::LANES;
    const struct cuda_hop &h = a.hop;
    uint32_t n_vecs = h.row_bytes / 16, lane = threadIdx.x % 32;
    uint32_t first = blockIdx.x * WARPS + threadIdx.x / 32;
    for (uint32_t token = first; token < h.shape.n_tokens; token += gridDim.x * WARPS) {
        bool away = false;
        for (uint32_t node = 0; node < h.shape.n_nodes; node++)
            away |= place_of(h, node, token) >= 0;
        if (!away)
            continue;
        uint4 *out = static_cast<uint4 *>(a.out.data) + (size_t)token * n_vecs;
        for (uint32_t v = lane; v < n_vecs; v += 32) {
            float sum[LANES] = {};
            for (uint32_t node = 0; node < h.shape.n_nodes; node++) {
                int32_t place = place_of(h, node, token);
                if (place < 0 && node != h.node)
                    continue;
                const uint4 *from =
                    node == h.node
                        ? out
                        : reinterpret_cast<const uint4 *>(frame_of(h, h.out, node) + h.frame.rows) +
                              (size_t)place * n_vecs;
                float values[LANES];
                vec16<E>::unpack(from[v], values);
#pragma unroll
                for (int i = 0; i < LANES; i++)
                    sum[i] += values[i];
            }
            out[v] = vec16<E>::pack(sum);
        }
    }
}

static __global__ void __launch_bounds__(THREADS)
    collect_kernel(const __grid_constant__ cuda_hop_collect_args a)
{
    const struct cuda_hop &h = a.hop;
    uint32_t n = h.shape.n_tokens * h.shape.top_k;
    for (uint32_t i = blockIdx.x * THREADS + threadIdx.x; i < n; i += gridDim.x * THREADS) {
        int32_t expert = h.expert[i];
        uint32_t node = expert < 0 ? h.node : (uint32_t)expert / experts_per_node(h);
        if (node == h.node)
            continue;
        int32_t place = place_of(h, node, i / h.shape.top_k);
        const float *scalars = reinterpret_cast<const float *>(frame_of(h, h.out, node) + h.frame.experts);
        a.scalars[i] = place < 0 ? 0.0f : scalars[(size_t)place * h.shape.top_k + i % h.shape.top_k];
    }
}

/* ---- launchers ---- */

static size_t placed(size_t *end, size_t bytes)
{
    size_t at = *end;
    *end = (at + bytes + 255) / 256 * 256;
    return at;
}

void cuda_hop_frame_layout(const struct exchange_shape *shape, size_t row_bytes, struct cuda_hop_frame *frame)
{
    size_t n_choices = (size_t)shape->max_tokens * shape->top_k, end = 0;
    frame->head = placed(&end, sizeof(struct cuda_hop_head));
    frame->counts = placed(&end, shape->n_experts * sizeof(int32_t));
    frame->experts = placed(&end, n_choices * sizeof(int32_t));
    frame->weights = placed(&end, n_choices * sizeof(float));
    frame->rows = placed(&end, shape->max_tokens * row_bytes);
    frame->bytes = end;
}

static const void *finish_of(enum epd_dtype dtype)
{
    switch (dtype) {
    case EPD_BF16:
        return reinterpret_cast<const void *>(finish_kernel<__nv_bfloat16>);
    case EPD_F16:
        return reinterpret_cast<const void *>(finish_kernel<__half>);
    case EPD_F32:
        return reinterpret_cast<const void *>(finish_kernel<float>);
    default:
        return NULL;
    }
}

enum epd_status hop_load(struct epd_error *error)
{
    const void *kernels[] = {reinterpret_cast<const void *>(pack_kernel),
                             reinterpret_cast<const void *>(take_kernel),
                             reinterpret_cast<const void *>(collect_kernel),
                             finish_of(EPD_BF16),
                             finish_of(EPD_F16),
                             finish_of(EPD_F32)};
    enum epd_status status =
        kernel_load(reinterpret_cast<const void *>(choose_kernel), MAX_SHARED_BYTES, "hop", error);
    for (size_t i = 0; i < sizeof(kernels) / sizeof(kernels[0]) && status == EPD_OK; i++)
        status = kernel_load(kernels[i], 0, "hop", error);
    return status;
}

static enum epd_status hop_check(const struct cuda_hop *hop, struct epd_error *error)
{
    const struct exchange_shape *shape = &hop->shape;
    if (shape->n_nodes < 2 || shape->n_nodes > EPD_MAX_RANKS || shape->world_size > EPD_MAX_RANKS ||
        shape->world_size % shape->n_nodes || shape->n_experts % shape->world_size ||
        hop->node != shape->rank / ranks_per_node(*hop))
        return error_set(error, EPD_INVALID_SHAPE, "hop: rank %u of %u with %u experts on node %u of %u",
                         shape->rank, shape->world_size, shape->n_experts, hop->node, shape->n_nodes);
    if (shape->n_tokens > shape->max_tokens || shape->top_k > CUDA_MAX_TOP_K)
        return error_set(error, EPD_INVALID_SHAPE, "hop: %u tokens and top-k %u, want at most %u and %u",
                         shape->n_tokens, shape->top_k, shape->max_tokens, CUDA_MAX_TOP_K);
    if ((uint64_t)shape->world_size * shape->max_tokens * shape->top_k > INT32_MAX)
        return error_set(error, EPD_INVALID_SHAPE, "hop: more than 2^31 - 1 rows");
    if (hop->row_bytes == 0 || hop->row_bytes % 16)
        return error_set(error, EPD_INVALID_SHAPE, "hop: rows of %u bytes, want a multiple of 16",
                         hop->row_bytes);
    if (shape->n_experts * sizeof(int32_t) > MAX_SHARED_BYTES)
        return error_set(error, EPD_UNSUPPORTED, "hop: %u experts are more than routing has room for",
                         shape->n_experts);
    return EPD_OK;
}

static enum epd_status launch(const void *kernel, dim3 blocks, uint32_t threads, const void *args,
                              size_t shared_bytes, struct CUstream_st *stream, struct epd_error *error)
{
    void *arguments[] = {const_cast<void *>(args)};
    return cuda_check(cudaLaunchKernel(kernel, blocks, dim3(threads), arguments, shared_bytes, stream), "hop",
                      error);
}

/* As many blocks as there is work for. */
static uint32_t blocks_for(const struct cuda_hop *hop, uint32_t n_units, uint32_t units_per_block)
{
    uint32_t most = hop->shape.max_blocks ? hop->shape.max_blocks : BLOCKS;
    uint32_t wanted = (n_units + units_per_block - 1) / units_per_block;
    return wanted == 0 ? 1 : wanted < most ? wanted : most;
}

enum epd_status cuda_hop_choose_launch(const struct cuda_hop_choose_args *args, struct CUstream_st *stream,
                                       struct epd_error *error)
{
    enum epd_status status = hop_check(&args->hop, error);
    if (status != EPD_OK)
        return status;
    return launch(reinterpret_cast<const void *>(choose_kernel), dim3(1), CHOOSE_THREADS, args,
                  args->hop.shape.n_experts * sizeof(int32_t), stream, error);
}

enum epd_status cuda_hop_pack_launch(const struct cuda_hop_pack_args *args, struct CUstream_st *stream,
                                     struct epd_error *error)
{
    enum epd_status status = hop_check(&args->hop, error);
    if (status != EPD_OK || args->hop.shape.n_tokens == 0)
        return status;
    if (!aligned16(args->x))
        return error_set(error, EPD_INVALID_ALIGNMENT, "hop: x wants 16-byte alignment");
    return launch(reinterpret_cast<const void *>(pack_kernel),
                  dim3(blocks_for(&args->hop, args->hop.shape.n_tokens, WARPS)), THREADS, args, 0, stream,
                  error);
}

enum epd_status cuda_hop_take_launch(const struct cuda_hop_take_args *args, struct CUstream_st *stream,
                                     struct epd_error *error)
{
    const struct exchange_shape *shape = &args->hop.shape;
    enum epd_status status = hop_check(&args->hop, error);
    if (status != EPD_OK)
        return status;
    return launch(reinterpret_cast<const void *>(take_kernel),
                  dim3(blocks_for(&args->hop, shape->max_tokens * shape->top_k, THREADS * 4), shape->n_nodes),
                  THREADS, args, 0, stream, error);
}

enum epd_status cuda_hop_finish_launch(const struct cuda_hop_finish_args *args, struct CUstream_st *stream,
                                       struct epd_error *error)
{
    enum epd_status status = hop_check(&args->hop, error);
    if (status != EPD_OK || args->hop.shape.n_tokens == 0)
        return status;
    if (!finish_of(args->out.dtype))
        return error_set(error, EPD_INVALID_DTYPE, "combine out: %s", dtype_name(args->out.dtype));
    if (!aligned16(args->out.data))
        return error_set(error, EPD_INVALID_ALIGNMENT, "combine: out wants 16-byte alignment");
    return launch(finish_of(args->out.dtype), dim3(blocks_for(&args->hop, args->hop.shape.n_tokens, WARPS)),
                  THREADS, args, 0, stream, error);
}

enum epd_status cuda_hop_collect_launch(const struct cuda_hop_collect_args *args, struct CUstream_st *stream,
                                        struct epd_error *error)
{
    const struct exchange_shape *shape = &args->hop.shape;
    enum epd_status status = hop_check(&args->hop, error);
    if (status != EPD_OK || shape->n_tokens == 0)
        return status;
    return launch(reinterpret_cast<const void *>(collect_kernel),
                  dim3(blocks_for(&args->hop, shape->n_tokens * shape->top_k, THREADS)), THREADS, args, 0,
                  stream, error);
}
