/* The compute contract of every backend: what the exchange, activation and GEMM kernels read and write.
 *
 * Kernels are pure: pointers in, status out; they own nothing and know no session, socket or group. Every function here
 * has a host form `host_<name>(args)` (kernels/host) and a CUDA form `cuda_<name>_launch(args, stream)` (kernels/cuda)
 * with the same meaning; where CUDA splits the work differently it says so in its own header.
 *
 * Words: R ranks, T tokens of this rank, H hidden, F ffn, E experts, L = E/R local experts, K top-k, C capacity rows.
 * Expert e lives on rank e / L. Rows a rank receives are expert-major; rows of one expert are ordered by (source rank,
 * token): the same inputs always give the same layout. The slab of local expert l starts at offsets[l], a multiple of
 * `alignment`; offsets[l+1] - offsets[l] is m_splits[l] rounded up to `alignment`.
 *
 * An exchange is a row of stages with a group barrier between two stages (kernel boundary or event on CUDA; thread
 * barrier on the host). Within one stage a rank writes only what no other rank reads or writes in that stage. */
#ifndef EPD_KERNELS_KERNELS_H
#define EPD_KERNELS_KERNELS_H

#include "kernels/tensor.h"
#include "proto/status.h"

/* Sizes all kernels of one rank share. Fixed when a plan is created, except n_tokens. */
struct exchange_shape {
    uint32_t world_size, rank;
    uint32_t n_experts, n_local_experts, top_k;
    uint32_t hidden;
    uint32_t max_tokens; /* largest T of any rank */
    uint32_t alignment;  /* rows, power of two */
    int64_t capacity_rows;
    uint32_t n_tokens;   /* T of this rank and this step, 0..max_tokens */
    uint32_t max_blocks; /* CUDA: blocks for communication; 0 = the kernel's default */
    uint32_t n_nodes;    /* the ranks lie on, in order and as many on each; 0 counts as 1 */
};

/* CUDA: where a group spans nodes, several sets of tokens go to the slots of the ranks of one node: its own, and those
 * that came from each other node (kernels/cuda/hop.h). An exchange of one set counts ranks and experts of this node
 * alone, and rows of an expert begin behind those of the sets before. All zero: there is one set. */
struct exchange_set {
    uint32_t idx;        /* the node that the tokens are of */
    uint32_t n_more;     /* sets besides this one */
    size_t bytes;        /* of a set's workspace on each rank; they lie one behind the other */
    uint32_t first_rank; /* of this node, for records */
};

/* The routing of one dispatch, kept as long as its combine or backward may come. All arrays in memory of this rank,
 * except that counts is written by every rank. */
struct routing {
    int32_t *expert; /* [max_tokens, K] expert of (t, k); -1 = not routed (also: refused as bad) */
    int32_t *row;    /* [max_tokens, K] row in the destination's slabs; -1 = not routed or over capacity */
    int32_t *counts; /* [R, E] rows that rank r sends to expert e, before any drop */
    int32_t *source; /* [C] of a received row: source_rank * max_tokens * K + t * K + k; -1 in padding rows */
    int64_t *m_splits;     /* [L] rows of each local expert that are in the slabs (after drops) */
    int64_t *offsets;      /* [L + 1] */
    int64_t *needed_rows;  /* [1] capacity that this step would have needed on this rank */
    int64_t *dropped_rows; /* [1] rows for this rank that are over its capacity */
};

/* Stage 1, route_count: reads topk_idx, checks it (range 0..E-1 or -1, no expert twice in a token), writes
 * routing.expert and writes this rank's row of counts into counts[r] of every rank r.
 * A bad value is recorded (token, got = the value, allowed = E - 1; expert = -1 when out of range, the expert when it is
 * repeated), becomes -1, and the kernel goes on; of a repeated expert the first occurrence stays.
 * Stage 2, route_layout (after a barrier): from counts computes m_splits, offsets, needed_rows, dropped_rows of this
 * rank as a receiver and routing.row of this rank as a sender. An over-capacity rank (needed_rows > C) is recorded as
 * EPD_CAPACITY_OVERFLOW (got = needed rows, allowed = capacity) unless a token is recorded already; rows past the
 * capacity get row -1; slabs are cut: m_splits[l] = clamp(C - offsets[l], 0, m), offsets are clamped to C. */
struct route_args {
    struct exchange_shape shape;
    struct tensor topk_idx; /* [T, K] i32 or i64 */
    struct routing routing;
    int32_t *counts[EPD_MAX_RANKS]; /* routing.counts of every rank, as this rank's device sees it */
    struct kernel_error *error;
};

/* Stage 3, dispatch_push: for every (t, k) with row >= 0 writes x[t] (optionally scaled by topk_weights[t, k]),
 * its weight and its source index into the slabs of the destination rank. Also zeroes this rank's own padding rows
 * (payload and weight 0, source -1). Rows at or past offsets[L] are not touched.
 * Used by dispatch (scaled = 0) and by combine_bwd (x = dout, scaled as the contract of that op asks). */
struct dispatch_args {
    struct exchange_shape shape;
    struct routing routing;
    struct tensor x;            /* [T, H] f32, bf16 or f16 */
    struct tensor topk_weights; /* [T, K] f32; data NULL: weights count as 1 */
    int scaled;
    void *recv_x[EPD_MAX_RANKS];         /* [C, H] of every rank, dtype of x */
    float *recv_weights[EPD_MAX_RANKS];  /* [C] of every rank; all NULL: not wanted */
    int32_t *recv_source[EPD_MAX_RANKS]; /* routing.source of every rank; all NULL: already there */
};

/* combine (after a barrier): out[t] = sum over k, in order of k, of w[t, k] * y(t, k), in fp32, one rounding; (t, k)
 * with row < 0 adds nothing; a token with no row gets zeros. Weights: topk_weights, or 1 when its data is NULL.
 * Used by combine and by dispatch_bwd (unweighted). */
struct combine_args {
    struct exchange_shape shape;
    struct routing routing;
    struct tensor topk_weights;   /* [T, K] f32 or data NULL */
    const void *y[EPD_MAX_RANKS]; /* [C, H] of every rank, dtype of out */
    struct tensor out;            /* [T, H] */
};

/* Scalars of slots back to their tokens: out[t, k] = value(row of (t, k)), 0 where row < 0. Used for d_weights that were
 * computed on the expert's side and for d_recv_weights. */
struct gather_scalars_args {
    struct exchange_shape shape;
    struct routing routing;
    const float *value[EPD_MAX_RANKS]; /* [C] of every rank */
    float *out;                        /* [T, K] */
    int accumulate;                    /* add to out instead of overwriting */
};

/* d_weights of combine_bwd: out[t, k] = <dout[t], y(t, k)>, fp32, 0 where row < 0. */
struct weight_grad_args {
    struct exchange_shape shape;
    struct routing routing;
    struct tensor dout;           /* [T, H] */
    const void *y[EPD_MAX_RANKS]; /* [C, H] of every rank, dtype of dout */
    float *out;                   /* [T, K] */
};

/* Rows of L groups: group l holds rows offsets[l] .. offsets[l] + m_splits[l] - 1. offsets NULL: groups are packed,
 * offsets[l] = sum of m_splits before l. Device memory on CUDA: kernels read them, the host never does. */
struct row_groups {
    uint32_t n_groups;
    const int64_t *m_splits; /* [L] */
    const int64_t *offsets;  /* [L + 1] or NULL */
    int64_t
        max_rows; /* rows of the buffers; splits that would pass it are clamped and recorded: the first such
                              * group, got = its negative split or offset or else its end, allowed = max_rows; the rank
                              * of the record stays as the caller preset it */
};

/* act[m, F] = f(gate) * up (enum epd_activation); rows of groups only. */
struct activation_args {
    struct row_groups groups;
    enum epd_activation kind;
    enum epd_dtype dtype;
    uint32_t ffn;
    const void *preact;       /* [M, 2F] */
    void *act;                /* [M, F] */
    const float *row_weights; /* [M] or NULL: act is also multiplied by the row's weight */
    struct kernel_error *error;
};

/* Backward of the activation. With da = row_weights[m] * d_act[m] (or d_act[m] when NULL):
 * d_preact = (da * up * f'(gate), da * f(gate)). If asked for, also what moe_backward needs in the same pass:
 * d_row_weights[m] = <d_act[m], act[m]> (+ <dy[m], bias2 of the group> when bias2 is given), and the weighted activation
 * weighted_act[m] = row_weights[m] * act[m] that dW2 is made from. */
struct activation_bwd_args {
    struct row_groups groups;
    enum epd_activation kind;
    enum epd_dtype dtype;
    uint32_t ffn;
    const void *preact;       /* [M, 2F] */
    const void *d_act;        /* [M, F] */
    const float *row_weights; /* [M] or NULL */
    void *d_preact;           /* [M, 2F], may be preact itself */
    void *weighted_act;       /* [M, F] or NULL, may be d_act itself */
    float *d_row_weights;     /* [M] or NULL */
    const void *dy;           /* [M, hidden] with bias2, else NULL */
    const void *bias2;        /* [L, hidden] or NULL */
    uint32_t hidden;
    struct kernel_error *error;
};

/* Gradient of a bias that was added to the rows of each group before they were weighted:
 * dbias_l[n] (+)= sum over rows m of group l of row_weights[m] * dy[m, n] (weights NULL: 1), one rounding. A group without
 * rows gives zeros, or nothing when accumulating. moe_backward makes db2 with it, whose rows lie unweighted in the slots. */
struct bias_grad_args {
    struct row_groups groups;
    enum epd_dtype dtype;       /* of dy */
    enum epd_dtype dtype_dbias; /* f32, bf16 or f16 */
    uint32_t n;
    const void *dy;           /* [M, N] */
    const float *row_weights; /* [M] or NULL */
    void *dbias;              /* [L, N] */
    int accumulate;
    struct kernel_error *error;
};

/* Grouped GEMM, all row-major, fp32 accumulation. m_l = m_splits[l]; w_l is parts[l] if parts is given, else
 * base + l * N * K elements.
 *   TN  Y[m_l, N]  = X[m_l, K] W_l[N, K]^T (+ bias_l[N])          a = X,  b = W,  c = Y
 *   NN  dX[m_l, K] = dY[m_l, N] W_l[N, K]                         a = dY, b = W,  c = dX
 *   NT  dW_l[N, K] (+)= dY[m_l, N]^T X[m_l, K]; dbias_l[N] (+)= column sums of dY   a = dY, b = X, c = dW
 * m_l = 0: TN and NN write nothing; NT writes zeros, or nothing when accumulating. Rows outside the groups are neither
 * read into a result nor written. */
struct gemm_shape {
    enum epd_gemm_layout layout;
    enum epd_dtype dtype;      /* of a and b */
    enum epd_dtype dtype_c;    /* of c: TN, NN same as dtype or f32; NT bf16, f16 or f32 */
    enum epd_dtype dtype_bias; /* of bias or dbias; unspecified = none */
    uint32_t n, k;
    int accumulate; /* NT only */
};

struct gemm_args {
    struct gemm_shape shape;
    struct row_groups groups;
    const void *a;
    const void *b;
    const void *const *b_parts; /* [L] weight pointers (device array on CUDA) or NULL */
    void *c;
    void *const *c_parts; /* [L] (NT) or NULL */
    const void *bias;     /* [L, N] or NULL */
    void *dbias;          /* [L, N] or NULL; accumulate as for c */
    struct kernel_error *error;
};

#endif
