/* What one line of the benchmark measures: an op at a size. Value type, kept in the board that parent and
 * ranks share. */
#ifndef EPD_BENCH_JOB_H
#define EPD_BENCH_JOB_H

#include <epd.h>

#define JOB_NAME_BYTES 32
#define JOB_PATH_BYTES 128
#define JOB_MAX_RANKS  64
#define JOB_MAX_TOP_K  32
#define JOB_MAX_NODES  4

enum job_op {
    JOB_HANDOFF_BARRIER,      /* a barrier op of all ranks: launch to done */
    JOB_HANDOFF_GROUPED_GEMM, /* a grouped_gemm of one row by one rank, the others idle */
    JOB_DISPATCH,
    JOB_COMBINE,          /* the plain sum of a token's rows */
    JOB_COMBINE_WEIGHTED, /* with topk_weights */
    JOB_DISPATCH_BWD,
    JOB_COMBINE_BWD,
    JOB_GROUPED_GEMM,
    JOB_MOE_FORWARD,
    JOB_MOE_BACKWARD,
    JOB_OP_COUNT,

    /* Not ops: they have their own way through a rank process. */
    JOB_LINK,      /* what the GPUs' links can do; one process */
    JOB_PEER_LOSS, /* a rank is killed in a step */
};

struct job {
    enum job_op op;
    char case_name[JOB_NAME_BYTES];
    char socket_path[JOB_PATH_BYTES]; /* of node 0 */
    uint32_t n_nodes;                 /* 0 or 1: one daemon; else each has as many of the ranks, in order */
    char other_sockets[JOB_MAX_NODES - 1][JOB_PATH_BYTES]; /* of nodes 1 and on */
    char group_name[JOB_NAME_BYTES];
    uint32_t n_ranks;
    uint32_t n_tokens, hidden, ffn, n_experts, top_k; /* T, H, F, E, K */
    int64_t capacity_rows;                            /* 0: all that could arrive */
    enum epd_dtype dtype;
    enum epd_backend_kind backend; /* of the daemon */
    enum epd_crossing crossing;    /* of several nodes; unspecified: what the backend does best */
    double zipf;                   /* exponent of the experts' popularity; 0: all equally likely */
    int heap_memory;         /* CUDA: buffers in the daemon's heap instead of the rank's own cudaMalloc */
    double client_kernel_us; /* CUDA: what the rank's stream does before each launch */
    uint32_t n_warmup, n_iterations;
};

/* Also of JOB_LINK and JOB_PEER_LOSS. "dispatch"; the two hand-offs are "handoff_barrier" and "handoff_grouped_gemm". */
const char *job_op_name(enum job_op op);
const char *job_dtype_name(enum epd_dtype dtype);
uint32_t job_dtype_bytes(enum epd_dtype dtype);

/* The daemon of a rank. */
const char *job_socket(const struct job *job, uint32_t rank);

/* Sizes of a standard case by name (dsv3, qwen235b, qwen30b, mixtral, decode128, tiny); 0 if there is none.
 */
int job_take_case(struct job *job, const char *name);
/* "dsv3, qwen235b, ..." for help and errors. */
const char *job_case_names(void);

/* How many times the tokens of a rank cross to their experts' ranks in an op: dispatch 1, a layer 2, 0 for local ops. */
int job_n_crossings(const struct job *job);
/* GEMM work: moe_forward 2 * T * K * 3 * H * F, moe_backward twice that, grouped_gemm 2 * T * K * 2F * H. */
double job_flops(const struct job *job);
/* Shared memory that the job needs on the host backend, all ranks: buffers and the exchange, roughly. */
double job_host_bytes(const struct job *job);

#endif
