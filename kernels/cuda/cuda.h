/* CUDA kernels of the exchange and the activations: launchers, and where CUDA splits the work differently
 * than kernels.h says. Any thread; the current device must be the rank's own. A launcher enqueues on the
 * stream, allocates nothing, never syncs and may be captured. Call cuda_kernels_load() once per device before
 * anything waits.
 *
 * The idea. Peers touch only each other's *workspace* (peer-mapped memory, one per rank and group); x,
 * recv_x, y, out and every array of struct cuda_routing are read and written by their own device alone. So
 * client memory that only its own GPU can see (CUDA IPC) needs no second mapping and no copy. dispatch  a
 * token crosses the link once per destination rank, into stage[source][token] of that rank's workspace,
 *             without waiting for any count; meanwhile one block counts, exchanges counts and sends the rows
 * of the token's slots after it. The receiver copies (or scales) staged tokens into the expert-major rows, in
 *             the order in which they arrive, and zeroes the padding.
 *   combine   the expert's side sums the slots a token has on it, in order of k, in fp32, rounds once to the
 * dtype and sends that partial sum into stage[expert rank][token] of the token's rank. That rank adds, in
 * fp32 and in order of rank, the partial sums of the others and its own slots (unrounded, at its place in the
 *             order), and rounds once. So out has one more rounding per remote rank than the host's; with one
 * rank the two agree in order and rounding. A row index into the staged tokens is source_rank * max_tokens +
 * token = source / K of struct routing: a GEMM that gathers its rows may read the stage instead of recv_x
 * until the next op of the workspace.
 *
 * Stages. CUDA_STAGE_ALL runs an op in one launch per rank: the ranks' grids wait for each other through flag
 * words in the workspaces, polling the abort word; it needs every rank on a device of its own (or room for
 * all grids at once) and every rank's launch to be certain. Otherwise the caller launches the stages one by
 * one with a group barrier (kernel boundary + events between devices) after each, and nothing ever polls:
 *   dispatch       SEND, LAYOUT (only if args->route), RECEIVE
 *   combine        PUBLISH (only with topk_weights), SEND, RECEIVE
 *   gather_scalars SEND, RECEIVE
 * and one barrier before the first stage if a rank may still be in an earlier op of the same workspace
 * (CUDA_STAGE_ALL sees to that itself). Ops of one workspace run one after another, in the same order on
 * every rank.
 *
 * Deadlock. A grid of CUDA_STAGE_ALL has one block per multiprocessor and at most shape.max_blocks blocks,
 * all of which must become resident: groups that share devices may overlap only if their blocks fit together,
 * or are submitted in one order everywhere. Abort: setting *abort_word makes every waiting block leave; the
 * op's results are void and the workspaces of the whole group must be reset (cuda_workspace_reset_launch on
 * every rank, all idle) before the next op. */
#ifndef EPD_KERNELS_CUDA_CUDA_H
#define EPD_KERNELS_CUDA_CUDA_H

#include <stddef.h>

#include "kernels/kernels.h"

struct CUstream_st;

/* Bytes of a row that one warp moves at a time, at most; a multiple of 128. */
#define CUDA_PIECE_BYTES 7168
/* The same for sums, which stay in registers: a multiple of 512. */
#define CUDA_SUM_PIECE_BYTES 4096
/* Blocks of a launch when shape.max_blocks is 0. With few tokens latency counts, and more blocks shorten it.
 */
#define CUDA_DEFAULT_BLOCKS    32
#define CUDA_FEW_TOKENS        512
#define CUDA_FEW_TOKENS_BLOCKS 64
#define CUDA_MAX_TOP_K         32
/* Where the abort word lies in every workspace, whatever its sizes. */
#define CUDA_ABORT_OFFSET 256

enum cuda_stage {
    CUDA_STAGE_ALL = 0,
    CUDA_STAGE_PUBLISH = 1,
    CUDA_STAGE_SEND = 2,
    CUDA_STAGE_LAYOUT = 3,
    CUDA_STAGE_RECEIVE = 4,
};

/* Where things are in a workspace: byte offsets from its base, the same on every rank. Arrays named [R] are
 * indexed by the rank that wrote them. */
struct cuda_workspace {
    size_t state;          /* struct of counters, this rank's own */
    size_t abort;          /* u32 for abort_word, at CUDA_ABORT_OFFSET */
    size_t signals;        /* u32 [kinds, R] epoch that rank has reached */
    size_t tokens;         /* i32 [R] */
    size_t counts;         /* i32 [R, E] */
    size_t slot_row;       /* i32 [R, slot_stride]: row of (token, k) here, or -1 */
    size_t slot_weight;    /* f32 [R, slot_stride] */
    size_t scalars;        /* f32 [slot_stride] of this rank's tokens */
    size_t arrivals;       /* u32 [R, arrival_stride]: epoch in which a staged piece arrived */
    size_t stage;          /* [R - 1, max_tokens, stage_row_bytes]; a rank has none of its own */
    size_t slot_stride;    /* elements */
    size_t arrival_stride; /* elements */
    size_t stage_row_bytes;
    size_t bytes; /* of the whole workspace */
};

/* row_bytes: hidden * bytes of the widest dtype the group will send. Pure arithmetic. dsv3 on 4 ranks: 177
 * MB. */
void cuda_workspace_layout(const struct exchange_shape *shape, size_t row_bytes,
                           struct cuda_workspace *layout);
/* Pieces a row is cut into; part of the size of cuda_dispatch_args.dot. */
uint32_t cuda_row_pieces(size_t row_bytes);
/* Blocks of a launch of CUDA_STAGE_ALL on a device with so many multiprocessors: one on each, all resident at once. */
uint32_t cuda_exchange_blocks(const struct exchange_shape *shape, uint32_t n_multiprocessors);

/* Loads every kernel on the current device and raises its shared memory limit. */
EPD_MUST_CHECK enum epd_status cuda_kernels_load(struct epd_error *error);
/* Zeroes flags and counters of one workspace: after it was allocated, and after an abort. The device's own
 * rank only; a group barrier must follow before the next op. */
EPD_MUST_CHECK enum epd_status cuda_workspace_reset_launch(const struct cuda_workspace *layout,
                                                           void *workspace, struct CUstream_st *stream,
                                                           struct epd_error *error);

/* The routing of one dispatch on this rank: the contract's arrays, and what the expert's side keeps so that
 * the way back needs no question. All memory of this rank; unlike in kernels.h, base.counts is a copy and is
 * not written by others. Saved contexts keep all of it. */
struct cuda_routing {
    struct routing base;
    int32_t *slot_row;    /* [R, max_tokens, K] row here of (t, k) of rank r; -1 = elsewhere or none */
    float *slot_weight;   /* [R, max_tokens, K] its weight, or NULL if nobody will ask */
    int32_t *slot_tokens; /* [R] tokens of rank r */
    int32_t *sent_tokens; /* [R] or NULL: tokens of this rank that rank r gets rows of; written with route */
};

/* What every op of the exchange needs. */
struct cuda_exchange {
    struct exchange_shape shape; /* max_blocks: all blocks of a launch; 0 = CUDA_DEFAULT_BLOCKS */
    struct exchange_set set;     /* its workspaces are those below */
    struct cuda_workspace layout;
    void *workspace[EPD_MAX_RANKS]; /* of every rank, as this device sees it */
    const uint32_t *abort_word;     /* in memory of this device; polled while waiting; CUDA_STAGE_ALL only */
    enum cuda_stage stage;
    /* of the blocks of CUDA_STAGE_ALL, how many begin with sending; 0 = the op's default */
    uint32_t send_blocks;
};

/* route (if `route`) and dispatch_push in one. With route = 0 the routing is one that an earlier dispatch
 * left (backward, recompute) and topk_idx is not read. Weight of a slot: topk_weights if given, else
 * slot_weight as the routing saved it (route = 0), else 1. */
struct cuda_dispatch_args {
    struct cuda_exchange exchange;
    struct cuda_routing routing;
    int route;
    int scaled;                 /* rows are weight * x instead of x, rounded once */
    struct tensor topk_idx;     /* [T, K] i32 or i64 */
    struct tensor topk_weights; /* [T, K] f32 or data NULL; 16-byte aligned unless route */
    struct tensor x;            /* [T, H], 16-byte aligned */
    int64_t *splits_out;        /* [L] or NULL: a second copy of m_splits; with route */
    int64_t *offsets_out;       /* [L + 1] or NULL: the same of offsets */
    void *recv_x;               /* [C, H] or NULL: rows are not wanted (weight_grad alone) */
    float *recv_weights;        /* [C] or NULL */
    /* combine_bwd: <x[t], y(row)> of each received row rides along, in parts that gather_scalars adds in
     * order. */
    const void *dot_with; /* [C, H] dtype of x, or NULL */
    float *dot;           /* [C, cuda_row_pieces] */
    struct kernel_error *error;
};
EPD_MUST_CHECK enum epd_status cuda_dispatch_launch(const struct cuda_dispatch_args *args,
                                                    struct CUstream_st *stream, struct epd_error *error);

/* Weights: topk_weights if given (published to the expert's side first: one more hop); else, if
 * saved_weights, those the routing saved; else 1. */
struct cuda_combine_args {
    struct cuda_exchange exchange;
    struct cuda_routing routing;
    int saved_weights;
    struct tensor topk_weights; /* [T, K] f32 or data NULL; 16-byte aligned */
    const void *y;              /* [C, H] of this rank, dtype of out, 16-byte aligned */
    struct tensor out;          /* [T, H] */
};
EPD_MUST_CHECK enum epd_status cuda_combine_launch(const struct cuda_combine_args *args,
                                                   struct CUstream_st *stream, struct epd_error *error);

/* gather_scalars. value of a row is the sum over its parts, in order. weight_grad is a dispatch of dout with
 * dot_with = y followed by this with n_parts = cuda_row_pieces(row bytes). */
struct cuda_gather_scalars_args {
    struct cuda_exchange exchange;
    struct cuda_routing routing;
    const float *value; /* [C, n_parts] of this rank */
    uint32_t n_parts;
    int accumulate;
    float *out; /* [T, K] */
};
EPD_MUST_CHECK enum epd_status cuda_gather_scalars_launch(const struct cuda_gather_scalars_args *args,
                                                          struct CUstream_st *stream,
                                                          struct epd_error *error);

/* Small arrays of the device to host memory that it can write, and a number behind them when they have arrived: one
 * launch for what would be a copy each. */
#define CUDA_REPORT_PARTS 8
struct cuda_report_part {
    void *to;       /* host memory, as the device sees it */
    void *from;     /* words of 4 bytes */
    uint32_t bytes; /* a multiple of 4 */
    int clear;      /* from is zeroed when it has been read */
};
struct cuda_report_args {
    uint32_t n_parts;
    struct cuda_report_part parts[CUDA_REPORT_PARTS];
    uint64_t
        *ticket; /* host memory; NULL: nobody looks at it, the copies are for what follows in the stream */
    uint64_t value;
};
EPD_MUST_CHECK enum epd_status cuda_report_launch(const struct cuda_report_args *args,
                                                  struct CUstream_st *stream, struct epd_error *error);

/* As in kernels.h. ffn (and hidden, with bias2) a multiple of 16 bytes; buffers 16-byte aligned. Clamped
 * splits are recorded by the rule of the host kernels. */
EPD_MUST_CHECK enum epd_status cuda_activation_launch(const struct activation_args *args,
                                                      struct CUstream_st *stream, struct epd_error *error);
EPD_MUST_CHECK enum epd_status cuda_activation_bwd_launch(const struct activation_bwd_args *args,
                                                          struct CUstream_st *stream,
                                                          struct epd_error *error);

#endif
