/* The field's words as numbers: dtypes, ops, tensor roles, modes. Wire numbers equal these values (epd.proto repeats
 * them); client/epd.h repeats them for users. 0 is always "unspecified" and never valid. No dependencies. */
#ifndef EPD_PROTO_WORDS_H
#define EPD_PROTO_WORDS_H

#include <stddef.h>
#include <stdint.h>

enum epd_dtype {
    EPD_DTYPE_UNSPECIFIED = 0,
    EPD_F32 = 1,
    EPD_BF16 = 2,
    EPD_F16 = 3,
    EPD_I32 = 4,
    EPD_I64 = 5,
};

enum epd_op {
    EPD_OP_UNSPECIFIED = 0,
    EPD_OP_BARRIER = 1, /* every rank of the group has arrived; no data */
    EPD_OP_DISPATCH = 2,
    EPD_OP_COMBINE = 3,
    EPD_OP_DISPATCH_BWD = 4,   /* slot gradients summed back to dx */
    EPD_OP_COMBINE_BWD = 5,    /* dout sent to the slots, d_weights returned */
    EPD_OP_GROUPED_GEMM = 6,   /* local: needs no gather */
    EPD_OP_ACTIVATION = 7,     /* local */
    EPD_OP_ACTIVATION_BWD = 8, /* local */
    EPD_OP_MOE_FORWARD = 9,
    EPD_OP_MOE_BACKWARD = 10,
    EPD_OP_MOE_WGRAD = 11, /* local: the wgrad that a moe_backward plan delayed */
    EPD_OP_COUNT
};

/* What a tensor is to a plan. Shapes: DESIGN words; R ranks, T tokens, H hidden, F ffn, L local experts, K top-k,
 * C capacity rows. Which op takes which role: the table at epd_plan_options in client/epd.h, ep/binding_rules.c. */
enum epd_role {
    EPD_ROLE_UNSPECIFIED = 0,
    EPD_ROLE_X = 1,            /* in  [T, H]  tokens */
    EPD_ROLE_TOPK_IDX = 2,     /* in  [T, K]  int32 or int64, -1 = not routed */
    EPD_ROLE_TOPK_WEIGHTS = 3, /* in  [T, K]  f32 */
    EPD_ROLE_RECV_X = 4,       /* out [C, H]  of dispatch: rows by expert, then source rank, then token */
    EPD_ROLE_RECV_WEIGHTS = 5, /* out [C]     f32 */
    EPD_ROLE_M_SPLITS = 6, /* [L] int64   out of dispatch / moe_forward, in of grouped_gemm / activation */
    EPD_ROLE_OFFSETS =
        7,            /* [L+1] int64 first row of each expert's slab; out of dispatch, optional in of gemm */
    EPD_ROLE_Y = 8,   /* in  [C, H]  expert outputs: of combine, and of combine_bwd for d_weights */
    EPD_ROLE_OUT = 9, /* out [T, H]  of combine / moe_forward */
    EPD_ROLE_DOUT = 10,           /* in  [T, H]  gradient of out */
    EPD_ROLE_DY = 11,             /* out [C, H]  of combine_bwd: w * dout in the slots */
    EPD_ROLE_D_WEIGHTS = 12,      /* out [T, K]  f32 gradient of topk_weights; 0 where topk_idx is -1 */
    EPD_ROLE_D_RECV_X = 13,       /* in  [C, H]  of dispatch_bwd */
    EPD_ROLE_D_RECV_WEIGHTS = 14, /* in [C]    f32, optional, of dispatch_bwd */
    EPD_ROLE_DX = 15,             /* out [T, H]  gradient of x */
    EPD_ROLE_A = 16,              /* in  grouped_gemm: TN X [M, K]; NN dY [M, N]; NT dY [M, N] */
    EPD_ROLE_B = 17,              /* in  grouped_gemm: TN, NN W [L, N, K] or L parts [N, K]; NT X [M, K] */
    EPD_ROLE_C = 18,      /* out grouped_gemm: TN Y [M, N]; NN dX [M, K]; NT dW [L, N, K] or L parts [N, K] */
    EPD_ROLE_BIAS = 19,   /* in  [L, N]  of TN */
    EPD_ROLE_DBIAS = 20,  /* out [L, N]  of NT */
    EPD_ROLE_PREACT = 21, /* in  [M, 2F] of activation: gate half, then up half */
    EPD_ROLE_ACT = 22,    /* out [M, F]  of activation */
    EPD_ROLE_D_ACT = 23,  /* in  [M, F]  of activation_bwd */
    EPD_ROLE_D_PREACT = 24, /* out [M, 2F] of activation_bwd */
    EPD_ROLE_W1 = 25,       /* in  [L, 2F, H] or L parts [2F, H] */
    EPD_ROLE_B1 = 26,       /* in  [L, 2F] */
    EPD_ROLE_W2 = 27,       /* in  [L, H, F] or L parts [H, F] */
    EPD_ROLE_B2 = 28,       /* in  [L, H] */
    EPD_ROLE_DW1 = 29,      /* out like W1; f32, bf16 or f16 */
    EPD_ROLE_DB1 = 30,
    EPD_ROLE_DW2 = 31,
    EPD_ROLE_DB2 = 32,
    EPD_ROLE_COUNT
};

enum epd_gemm_layout {
    EPD_GEMM_UNSPECIFIED = 0,
    EPD_GEMM_TN = 1, /* fprop Y = X Wt (+ bias) */
    EPD_GEMM_NN = 2, /* dgrad dX = dY W */
    EPD_GEMM_NT = 3, /* wgrad dW (+)= dYt X, dbias (+)= column sums of dY */
};

/* Gated activations on [m, 2F]: g is the first half of a row, u the second. */
enum epd_activation {
    EPD_ACTIVATION_UNSPECIFIED = 0,
    EPD_SWIGLU = 1, /* silu(g) * u */
    EPD_GEGLU = 2,  /* gelu(g) * u, gelu by tanh */
    EPD_RELU2 = 3,  /* relu(g)^2 * u */
};

enum epd_overflow {
    EPD_OVERFLOW_UNSPECIFIED = 0,
    EPD_OVERFLOW_ERROR = 1, /* rows past the capacity are left out, the step ends EPD_CAPACITY_OVERFLOW */
    EPD_OVERFLOW_DROP = 2,  /* rows past the capacity are left out and counted */
};

/* What a moe_forward plan keeps for its backward. */
enum epd_saved {
    EPD_SAVED_NONE = 0,      /* inference */
    EPD_SAVED_CONTEXT = 1,   /* received rows and pre-activations, from the session's budget */
    EPD_SAVED_RECOMPUTE = 2, /* the routing only; backward dispatches and runs GEMM1 again */
};

/* How the messages of a plan are sized that cross between nodes. */
enum epd_crossing {
    EPD_CROSSING_UNSPECIFIED = 0,
    EPD_CROSSING_EAGER = 1,  /* as long as their tokens: hosts learn how many there are */
    EPD_CROSSING_STATIC = 2, /* always as long as the tokens of its plan need: no host learns a count */
};

enum epd_memory_kind {
    EPD_MEMORY_UNSPECIFIED = 0,
    EPD_MEMORY_HEAP = 1,     /* owned by the daemon, in the symmetric heap */
    EPD_MEMORY_MEMFD = 2,    /* host: sealed memfd of the client */
    EPD_MEMORY_CUDA_IPC = 3, /* cudaMalloc memory of the client: IPC handle + offset */
    EPD_MEMORY_CUDA_VMM = 4, /* VMM allocation of the client: POSIX fd */
};

enum epd_backend_kind {
    EPD_BACKEND_UNSPECIFIED = 0,
    EPD_BACKEND_HOST = 1,
    EPD_BACKEND_CUDA = 2,
};

/* Phases of a step, for error messages, stats and the flight recorder. */
enum epd_phase {
    EPD_PHASE_NONE = 0,
    EPD_PHASE_GATHER = 1, /* waiting for the requests of all ranks */
    EPD_PHASE_ROUTE = 2,
    EPD_PHASE_DISPATCH = 3,
    EPD_PHASE_GEMM = 4,
    EPD_PHASE_ACTIVATION = 5,
    EPD_PHASE_COMBINE = 6,
    EPD_PHASE_WGRAD = 7,
    EPD_PHASE_COUNT
};

/* Bytes of one element; 0 for an unknown dtype. */
size_t dtype_bytes(enum epd_dtype dtype);
/* Lower-case names as users read them ("bf16", "moe_forward", "recv_x", "gather", "swiglu"); "?" if unknown. */
const char *dtype_name(enum epd_dtype dtype);
const char *op_name(enum epd_op op);
const char *role_name(enum epd_role role);
const char *phase_name(enum epd_phase phase);
const char *activation_name(enum epd_activation activation);
const char *crossing_name(enum epd_crossing crossing);
const char *gemm_layout_name(enum epd_gemm_layout layout);
const char *backend_name(enum epd_backend_kind kind);
/* 1 if the op is submitted only when every rank of its group has asked for it. */
int op_is_collective(enum epd_op op);

#endif
