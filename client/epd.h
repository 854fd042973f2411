/* libepd: the client of epd, the expert-parallel service for Mixture-of-Experts layers.
 *
 * A rank (one process per GPU; any process on the host backend) opens a connection to the daemon of its node, joins a
 * group with the other ranks, allocates or registers buffers, creates plans (an op checked once and bound to buffers) and
 * launches them. Tensors never travel through the socket: the daemon and the rank share the buffers' memory.
 *
 * Words used in shapes: R ranks, T tokens of this rank, H hidden, F ffn, E experts, L = E/R local experts, K top-k,
 * C capacity rows of a rank. All tensors are row-major and contiguous.
 *
 * Errors. Every fallible call returns enum epd_status; EPD_OK is 0. Outputs are written only on success. The sentence that
 * says what was given and what is allowed is epd_error_text() of the same thread, until that thread's next call.
 *
 * Threads. A client and everything made from it may be used from any thread; calls that talk to the daemon are serialised
 * inside. Collective calls (epd_group_join, epd_plan_create of a collective op, epd_plan_launch of a collective plan) must be
 * made in the same order on every rank of the group. After fork() the child must not use a parent's client: every call returns
 * EPD_INVALID_ARGUMENT there.
 *
 * Ownership. *_create, *_open, *_alloc, *_register and *_join make objects that the caller ends with the matching
 * destroy, close, release or leave. Closing a client ends everything made from it. */
#ifndef EPD_H
#define EPD_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(EPD_BUILDING_LIBRARY)
#define EPD_API      __attribute__((visibility("default"), warn_unused_result))
#define EPD_API_VOID __attribute__((visibility("default")))
#else
#define EPD_API __attribute__((warn_unused_result))
#define EPD_API_VOID
#endif

#ifndef EPD_PROTO_STATUS_H /* inside the epd tree the ground floor has these words already */
/* Results. The numbers are stable. */
enum epd_status {
    EPD_OK = 0,                 /* ok */
    EPD_INVALID_ARGUMENT = 1,   /* invalid argument */
    EPD_INVALID_SHAPE = 2,      /* wrong shape */
    EPD_INVALID_DTYPE = 3,      /* wrong dtype */
    EPD_INVALID_DEVICE = 4,     /* wrong device */
    EPD_INVALID_ALIGNMENT = 5,  /* wrong alignment */
    EPD_OUT_OF_RANGE = 6,       /* range outside its allocation */
    EPD_UNKNOWN_ID = 7,         /* unknown id */
    EPD_FOREIGN_ID = 8,         /* id belongs to another session */
    EPD_STALE_EPOCH = 9,        /* id is of an older epoch */
    EPD_IN_USE = 10,            /* still in use */
    EPD_BUSY = 11,              /* already in flight */
    EPD_QUOTA = 12,             /* quota exceeded */
    EPD_NO_MEMORY = 13,         /* out of memory */
    EPD_UNSUPPORTED = 14,       /* not supported here */
    EPD_GROUP_MISMATCH = 15,    /* ranks disagree about the group */
    EPD_PLAN_MISMATCH = 16,     /* ranks disagree about the plan */
    EPD_SEQ_MISMATCH = 17,      /* ranks disagree about the step */
    EPD_TIMEOUT = 18,           /* deadline passed */
    EPD_PEER_LOST = 19,         /* a rank of the group is gone */
    EPD_EVICTED = 20,           /* session was evicted */
    EPD_RESTARTED = 21,         /* the daemon was restarted */
    EPD_DRAINING = 22,          /* the daemon is draining */
    EPD_DISCONNECTED = 23,      /* connection to the daemon lost */
    EPD_PROTOCOL = 24,          /* protocol violation */
    EPD_VERSION_MISMATCH = 25,  /* protocol versions do not meet */
    EPD_PERMISSION = 26,        /* not permitted */
    EPD_CAPACITY_OVERFLOW = 27, /* more rows routed to a rank than its capacity */
    EPD_BAD_ROUTING = 28,       /* expert index out of range or repeated in a token */
    EPD_BAD_SPLITS = 29,        /* m_splits negative or larger than the rows given */
    EPD_SYSTEM = 30,            /* operating system call failed */
    EPD_CUDA = 31,              /* CUDA call failed */
    EPD_NCCL = 32,              /* NCCL call failed */
    EPD_INTERNAL = 33,          /* internal invariant broken */
};
#endif

#ifndef EPD_PROTO_WORDS_H
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
#endif

struct epd_client; /* a connection to the daemon */
struct epd_group;  /* this rank's membership in an EP group */
struct epd_buffer; /* a byte range that the daemon can reach */
struct epd_plan;   /* an op bound to buffers */

/* ---- errors and versions ------------------------------------------------------------------------------------------- */

/* "EPD_TIMEOUT"; "EPD_?" if unknown. Static. */
EPD_API_VOID const char *epd_status_name(enum epd_status status);
/* "deadline passed". Static. */
EPD_API_VOID const char *epd_status_text(enum epd_status status);
/* The sentence of the last failed call on this thread, "" if none. Valid until the thread's next call. */
EPD_API_VOID const char *epd_error_text(void);
/* "0.1.0" of the library. Static. */
EPD_API_VOID const char *epd_version(void);

/* ---- connection ------------------------------------------------------------------------------------------------------ */

struct epd_open_options {
    size_t size; /* [in] sizeof(struct epd_open_options) */
    /* [in] NULL: $EPD_SOCKET, else $XDG_RUNTIME_DIR/epd/epd.sock, but /run/epd/epd.sock where only that is there */
    const char *socket_path;
    const char *client_name; /* [in] shown by `epdctl clients`; NULL: the program's name; at most 63 bytes */
    uint32_t timeout_ms;     /* [in] for connecting, while the socket is absent or refuses; 0: 10000 */
};

/* Connects, agrees on the protocol and maps the session page. options may be NULL.
 * Errors: EPD_DISCONNECTED (no daemon within the timeout; the text has the path), EPD_VERSION_MISMATCH, EPD_QUOTA,
 * EPD_PERMISSION, EPD_DRAINING. */
EPD_API enum epd_status epd_open(const struct epd_open_options *options, struct epd_client **client);
/* Leaves all groups and ends the session and everything made from it. Launches in flight end with an error on the other ranks.
 * NULL is legal. In a forked child it does nothing: the session is the parent's. */
EPD_API_VOID void epd_close(struct epd_client *client);

/* Connects again after the connection was lost, waiting for the daemon as epd_open does (timeout_ms 0: 10000); EPD_OK at once
 * while it is not lost.
 *
 * When a connection is lost nothing hangs: every launch in flight and every call that waits ends with one of EPD_RESTARTED (the
 * daemon's worker ended without a notice; its supervisor starts another), EPD_DISCONNECTED (nobody is there any more), or the
 * status with which the daemon closed the session: EPD_EVICTED, EPD_DRAINING, EPD_QUOTA... From then on every call on the client's
 * groups, buffers and plans returns the same, except those that end them. epd_reconnect does not bring them back: epd_recover
 * does, or join, allocate and create again. What an allocated buffer held last stays readable until it is released. */
EPD_API enum epd_status epd_reconnect(struct epd_client *client, uint32_t timeout_ms);

/* epd_reconnect, and then makes again, in the order of creation, every group, buffer and plan that was lost with an earlier
 * connection: handles and epd_buffer_data stay as they are, allocated buffers keep what they held, sequence numbers begin again.
 * Saved contexts are gone: run a forward again before its backward. Collective over the ranks of those groups, all of which lost
 * the same daemon; wait for launches in flight first (EPD_BUSY), and use the client from one thread meanwhile. On error
 * everything stays lost, and the call may be repeated. Errors: those of epd_reconnect and of what is made again. */
EPD_API enum epd_status epd_recover(struct epd_client *client, uint32_t timeout_ms);

struct epd_device {
    uint8_t uuid[16];
    uint32_t device_idx; /* of the daemon */
    char name[64];
    uint64_t memory_bytes;
};

struct epd_client_info {
    size_t size; /* [in] sizeof(struct epd_client_info) */
    char daemon_version[64];
    uint32_t protocol_major, protocol_minor;
    enum epd_backend_kind backend;
    uint64_t session_id;
    uint8_t boot_id[16]; /* changes when the daemon's worker restarts */
    uint64_t epoch;
    uint32_t n_devices;
    struct epd_device devices[16];
};
EPD_API enum epd_status epd_client_info(const struct epd_client *client, struct epd_client_info *info);

/* The daemon's statistics as a JSON document, zero-terminated; the caller frees it with epd_free. */
EPD_API enum epd_status epd_stats(struct epd_client *client, char **json);
EPD_API_VOID void epd_free(void *memory);

/* ---- groups ------------------------------------------------------------------------------------------------------------ */

struct epd_group_options {
    size_t size;                /* [in] sizeof(struct epd_group_options) */
    const char *name;           /* [in] what the ranks meet under; at most 63 bytes */
    uint32_t world_size, rank;  /* [in] */
    const uint8_t *device_uuid; /* [in] [16]; NULL: device number rank modulo n_devices */
    uint32_t n_experts;         /* [in] E, divisible by world_size; expert e lives on rank e / L */
    uint32_t top_k;             /* [in] K <= 32 */
    uint32_t hidden;            /* [in] H */
    uint32_t ffn;               /* [in] F; 0 if the group runs no moe op */
    uint32_t max_tokens;        /* [in] largest T of any rank */
    int64_t capacity_rows;      /* [in] C; 0: as many as could ever arrive, so that nothing can overflow */
    uint32_t alignment;         /* [in] of every expert's first row, power of two; 0: 1 */
    enum epd_dtype dtype; /* [in] of tokens and weights: EPD_F32 (host backend only), EPD_BF16, EPD_F16 */
    enum epd_overflow overflow; /* [in] unspecified: EPD_OVERFLOW_ERROR */
    uint32_t deadline_ms;       /* [in] how long a step waits for its last rank; 0: the daemon's default */
    /* [in] 0 or 1: all ranks use this node's daemon; else how many nodes of its fabric they are on, at most all. Each node
     * has as many ranks, in one block: rank r is on the group's node r / (world_size / n_nodes). Which nodes of the fabric
     * these are, and in which order, the joins say. A name stands for one group at a time of a uid in the whole fabric:
     * groups of other nodes need names of their own. */
    uint32_t n_nodes;
};

/* Collective: returns when all ranks have joined. Errors: EPD_GROUP_MISMATCH (names the field and both values),
 * EPD_TIMEOUT (names the missing ranks), EPD_INVALID_*, EPD_IN_USE (the rank is taken, or the name by a group of other
 * nodes), EPD_QUOTA. */
EPD_API enum epd_status epd_group_join(struct epd_client *client, const struct epd_group_options *options,
                                       struct epd_group **group);
/* Leaves; destroys this rank's plans and releases its buffers of the group. The other ranks' next collective launch ends
 * EPD_PEER_LOST. NULL is legal. */
EPD_API_VOID void epd_group_leave(struct epd_group *group);

struct epd_group_info {
    size_t size; /* [in] sizeof(struct epd_group_info) */
    uint64_t epoch;
    uint32_t world_size, rank;
    uint32_t n_local_experts, first_expert;
    int64_t capacity_rows;
    uint32_t device_idx;
    uint8_t device_uuid[16];
};
EPD_API enum epd_status epd_group_info(const struct epd_group *group, struct epd_group_info *info);

/* ---- buffers ----------------------------------------------------------------------------------------------------------- */

/* Allocates in the daemon's symmetric heap on the group's device and maps it here. Zeroed. Errors: EPD_QUOTA, EPD_NO_MEMORY. */
EPD_API enum epd_status epd_buffer_alloc(struct epd_group *group, uint64_t bytes, struct epd_buffer **buffer);
/* Host backend: makes [offset, offset + bytes) of a memfd, sealed with F_SEAL_SHRINK, a buffer. The fd stays the caller's.
 * Errors: EPD_OUT_OF_RANGE, EPD_INVALID_ARGUMENT (not a memfd, not sealed), EPD_UNSUPPORTED (CUDA backend). */
EPD_API enum epd_status epd_buffer_register_memfd(struct epd_group *group, int fd, uint64_t offset,
                                                  uint64_t bytes, struct epd_buffer **buffer);
/* CUDA backend: makes [data, data + bytes) of a cudaMalloc or VMM allocation of the group's device a buffer. No copy.
 * Errors: EPD_INVALID_DEVICE (names both UUIDs), EPD_OUT_OF_RANGE, EPD_UNSUPPORTED (host backend, or built without CUDA). */
EPD_API enum epd_status epd_buffer_register_cuda(struct epd_group *group, void *data, uint64_t bytes,
                                                 struct epd_buffer **buffer);
/* The allocation that an address of this process's device memory lies in. Frameworks sub-allocate: who registers a whole
 * allocation once serves every tensor in it. */
struct epd_memory_range {
    size_t size;            /* [in] sizeof(struct epd_memory_range) */
    void *base;             /* first byte of the allocation */
    uint64_t bytes;         /* of the whole allocation */
    uint64_t allocation_id; /* unique in this process: an address used again has another one */
    uint8_t device_uuid[16];
    int is_vmm; /* 0: cudaMalloc; 1: a VMM mapping, which may be one piece of a larger address range */
};
/* CUDA backend. Errors: EPD_INVALID_ARGUMENT (no device memory of this process), EPD_UNSUPPORTED (host backend). */
EPD_API enum epd_status epd_memory_range(const struct epd_group *group, const void *data,
                                         struct epd_memory_range *range);
/* The first byte in this process; on CUDA a device pointer. */
EPD_API_VOID void *epd_buffer_data(const struct epd_buffer *buffer);
EPD_API_VOID uint64_t epd_buffer_bytes(const struct epd_buffer *buffer);
/* Unmaps it here too. EPD_IN_USE while a plan is bound to it. EPD_OK also when the connection is lost. NULL is legal. */
EPD_API enum epd_status epd_buffer_release(struct epd_buffer *buffer);

/* ---- plans ------------------------------------------------------------------------------------------------------------- */

/* One tensor of a plan. A weight (W1, W2, B or C of a grouped_gemm and their gradients) may be given as one tensor [L, ...]
 * or as L parts: L entries with the same role, n_parts = L and part_idx = 0..L-1, each without the leading dimension. */
struct epd_tensor {
    enum epd_role role;
    struct epd_buffer *buffer;
    uint64_t offset_bytes; /* multiple of 16 (host: of the element) */
    enum epd_dtype dtype;
    uint32_t n_dims;
    int64_t shape[3];
    uint32_t part_idx, n_parts; /* 0, 0: one tensor */
};

/* Which op takes which tensors (o = optional):
 *   barrier         none
 *   dispatch        X, TOPK_IDX, TOPK_WEIGHTS o -> RECV_X, M_SPLITS o, OFFSETS o, RECV_WEIGHTS o
 *   combine         Y, TOPK_WEIGHTS o -> OUT                               context: its dispatch plan
 *   combine_bwd     DOUT, TOPK_WEIGHTS o, Y o -> DY, D_WEIGHTS o           context: its dispatch plan
 *   dispatch_bwd    D_RECV_X, D_RECV_WEIGHTS o -> DX, D_WEIGHTS o          context: its dispatch plan
 *   grouped_gemm    A, B, BIAS o, M_SPLITS, OFFSETS o -> C, DBIAS o        local; layout TN, NN or NT; accumulate for NT
 *   activation      PREACT, M_SPLITS, OFFSETS o, RECV_WEIGHTS o -> ACT     local; RECV_WEIGHTS also multiply the rows of ACT
 *   activation_bwd  PREACT, D_ACT, M_SPLITS, OFFSETS o, RECV_WEIGHTS o -> D_PREACT, D_RECV_WEIGHTS o, ACT o   local; ACT is
 *                   the weighted activation that dW2 is made from
 *   moe_forward     X, TOPK_IDX, TOPK_WEIGHTS o, W1, B1 o, W2, B2 o -> OUT, M_SPLITS o
 *   moe_backward    DOUT, W1 o, B1 o, W2 o, B2 o -> DX o, D_WEIGHTS o, DW1 o, DB1 o, DW2 o, DB2 o   context: its moe_forward
 *                   plan, whose weights it takes where they are not bound again
 *   moe_wgrad       -> DW1 o, DB1 o, DW2 o, DB2 o                          local; context: a moe_backward with delay_wgrad
 * Without OFFSETS the groups of a grouped_gemm or activation are packed one after the other. With saved =
 * EPD_SAVED_RECOMPUTE the forward plan's own X, TOPK_WEIGHTS and W1 are read again by the backward and must still hold. */
struct epd_plan_options {
    size_t size;                 /* [in] sizeof(struct epd_plan_options) */
    enum epd_op op;              /* [in] */
    struct epd_plan *context;    /* [in] see the table; else NULL */
    enum epd_gemm_layout layout; /* [in] grouped_gemm */
    /* [in] activation*, moe_*; unspecified: EPD_SWIGLU, of moe_backward its forward's */
    enum epd_activation activation;
    enum epd_saved saved;             /* [in] moe_forward: what to keep for backward */
    int accumulate;                   /* [in] wgrad adds to DW and DB instead of overwriting */
    int delay_wgrad;                  /* [in] moe_backward: leave DW and DB to a moe_wgrad plan */
    uint32_t n_tensors;               /* [in] */
    const struct epd_tensor *tensors; /* [in] [n_tensors], read during the call only */
    /* [in] dispatch, combine, their backward forms, moe_forward, moe_backward; the same on all ranks. Unspecified: as the
     * context's; without one what the backend does best: host eager, CUDA static. In a group of one node nothing crosses:
     * the choice is accepted and changes nothing. Results are the same bits. Bytes of a static message from one rank to one
     * node, T = the most tokens that a rank of the group can have in a launch of the plan that routes (its T, below), e bytes
     * of the group's dtype, every section rounded up to 64:
     *   there   64 + [4 E + 4 T K of a dispatch or moe_forward] + [4 T K with weights] + [T H e with rows]
     *   back    64 + [4 T H of rows] or [4 T K of d_weights]
     * On CUDA head and 4 E, rounded up to 256 each, cross with the routing alone, nothing else is rounded up, and rows cross
     * back in the group's dtype, T H e. Eager messages have the number of tokens that cross in the place of T; on CUDA head
     * and 4 E go ahead.
     *
     * Eager on CUDA: the daemon of each node waits for these numbers once in a dispatch or moe_forward, when all clients
     * have come to it; what crosses later of its routing is known then. The group's launches behind it wait for that in the
     * daemon instead of in the device's queue; clients, their streams and other groups do not. A launch that a client has
     * captured in a graph of its own may be eager too: what is captured are the flags, and the daemon's host takes part in
     * each replay. Of a plan whose context is static nobody on the host knows the numbers: EPD_UNSUPPORTED. */
    enum epd_crossing crossing;
};

/* Checks the op against its tensors and makes everything a launch needs; launches allocate nothing. Collective ops: collective
 * call, plans of the ranks match by creation order. Errors name the tensor and the property: EPD_INVALID_SHAPE,
 * EPD_INVALID_DTYPE, EPD_INVALID_DEVICE, EPD_INVALID_ALIGNMENT, EPD_OUT_OF_RANGE, EPD_INVALID_ARGUMENT, EPD_PLAN_MISMATCH,
 * EPD_TIMEOUT, EPD_PEER_LOST, EPD_QUOTA, EPD_NO_MEMORY, EPD_UNSUPPORTED. */
EPD_API enum epd_status epd_plan_create(struct epd_group *group, const struct epd_plan_options *options,
                                        struct epd_plan **plan);
/* Waits for launches in flight, then destroys. A plan that others have as context goes when the last of them does. NULL is
 * legal. */
EPD_API_VOID void epd_plan_destroy(struct epd_plan *plan);

/* Number of tokens of this rank in the following launches, 0..T; T at creation. T is the rows of X, TOPK_IDX, OUT, DOUT or DX,
 * whichever comes first among the plan's tensors; 0 if it has none of them. EPD_INVALID_ARGUMENT if it is more. */
EPD_API enum epd_status epd_plan_set_tokens(struct epd_plan *plan, uint32_t n_tokens);

/* Launches: one datagram, no round trip. Launches of one group run in the order of the calls.
 * CUDA: stream is a cudaStream_t; work of the stream before the call is seen by the op, work after it waits for the op. Further
 * launches need not be waited for. Host: stream must be NULL; results are there after epd_plan_wait; EPD_BUSY if the plan's
 * last launch was not waited for.
 * Errors of the call itself: EPD_DISCONNECTED, EPD_RESTARTED, EPD_EVICTED, EPD_BUSY, and EPD_TIMEOUT if the daemon reads nothing
 * for 20 s, EPD_INVALID_ARGUMENT if the stream is capturing a graph, EPD_CUDA if there is no such stream; after them nothing is in
 * flight. EPD_CUDA also if the driver refuses what has been announced already: the daemon ends that launch as one whose client does
 * not come, and the plan takes no further ones. Errors of the step come from epd_plan_wait. */
EPD_API enum epd_status epd_plan_launch(struct epd_plan *plan, void *stream);
/* Waits until every launch of the plan so far has ended; returns the first failure among them since the last wait (details:
 * epd_plan_failure). timeout_ms 0: no limit of its own (the daemon's deadlines end every step); EPD_TIMEOUT if it passes, and the
 * launch is still in flight. One thread waits at a time: EPD_BUSY to another that does. */
EPD_API enum epd_status epd_plan_wait(struct epd_plan *plan, uint32_t timeout_ms);

/* Reports without waiting: the first failure among the launches of the plan that have ended and were not asked for yet, as
 * epd_plan_wait would; EPD_OK also while all are in flight, and while another thread waits, to whom it is left. From any thread,
 * also beside epd_plan_wait: neither disturbs the other. A failure is reported once. What lost the connection, if it is lost. */
EPD_API enum epd_status epd_plan_check(struct epd_plan *plan);

/* A copy inside the group's device, contiguous bytes. */
struct epd_copy {
    void *to;
    const void *from;
    uint64_t bytes;
};

/* CUDA backend: epd_plan_check, then in the order of the stream the first n_before copies, epd_plan_launch, and the n_after copies
 * that follow them in the array. One call for a step whose tensors are not those that the plan is bound to. The copies before the
 * launch are in no order among themselves, nor are those after it: none may read or write what another one writes. If it fails
 * before the launch nothing is in flight; copies may have been made. */
EPD_API enum epd_status epd_plan_step(struct epd_plan *plan, void *stream, const struct epd_copy *copies,
                                      uint32_t n_before, uint32_t n_after);

/* CUDA backend: records the launch's flag operations into the graph that the stream is capturing; nothing is sent. */
EPD_API enum epd_status epd_plan_capture(struct epd_plan *plan, void *stream);
/* CUDA backend: announces n_launches replays of a captured launch, 1 to 65536, ahead of them. After an error, those of
 * epd_plan_launch, none of them is announced. */
EPD_API enum epd_status epd_plan_arm(struct epd_plan *plan, uint32_t n_launches);

/* The last failed launch of a plan. */
struct epd_failure {
    size_t size; /* [in] sizeof(struct epd_failure) */
    enum epd_status status;
    uint64_t seq; /* launch number in its group, from 1 */
    enum epd_phase phase;
    int32_t rank; /* the rank to blame; -1 if none */
    char text[224];
};
/* EPD_UNKNOWN_ID if no launch of the plan has failed. */
EPD_API enum epd_status epd_plan_failure(const struct epd_plan *plan, struct epd_failure *failure);

struct epd_plan_info {
    size_t size; /* [in] sizeof(struct epd_plan_info) */
    uint64_t plan_id;
    uint64_t saved_bytes; /* saved context in the daemon */
    uint64_t launches, failed_launches;
};
EPD_API enum epd_status epd_plan_info(const struct epd_plan *plan, struct epd_plan_info *info);

#ifdef __cplusplus
}
#endif

#endif
