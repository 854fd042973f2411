/* The table of grouped GEMM engines on CUDA. An engine is chosen per problem when a plan is created, never on the step
 * path; asking for one by name that cannot do the problem is an error that says why. Called by ep (backend_cuda);
 * descriptors, workspaces and algorithms are made in create() and cached in the engine plan.
 *
 *   sm90              own TMA/wgmma kernels, splits read on the device (kernels/gemm/sm90*.cu)
 *   cublaslt_grouped  grouped layouts of newer cuBLASLt, splits read on the device; never run yet, so it comes last
 *   cublaslt          one matmul per expert, splits read on the host: any GPU; a plan with it cannot be captured */
#ifndef EPD_KERNELS_GEMM_ENGINE_H
#define EPD_KERNELS_GEMM_ENGINE_H

#include "kernels/kernels.h"

struct CUstream_st;

/* What is known when a plan is created. Counts are not: they live on the device. */
struct gemm_problem {
    struct gemm_shape shape;
    uint32_t n_groups;
    int64_t max_rows;      /* rows of the buffers */
    int64_t expected_rows; /* rows in an average step, for the cost model; 0 = max_rows */
    int pointer_parts;     /* weights (NT: their gradients) come as L pointers */
    /* Fused epilogues; 0 = none.
     * TN with an activation, n = 2F: act gets [M, F]; c gets [M, 2F] unless keep_preact is 0.
     * NN with an activation, k = F, is the product d_act = a b and the activation's backward in one (struct
     * activation_bwd_args): reads preact [M, 2F]; c gets d_preact [M, 2F] (may be preact itself), act the weighted
     * activation [M, F]; with d_row_weights, that gets <d_act[m], act[m]> of the rows of groups. d_act goes nowhere. */
    enum epd_activation activation;
    int keep_preact;
    int d_row_weights;
    int row_weights; /* multiply row m of the result by args.row_weights[m] */
};

/* One launch: the plain arguments plus what the fused epilogues write. */
struct gemm_launch {
    struct gemm_args args;
    void *act;                /* [M, F] with an activation */
    const float *row_weights; /* [M] */
    const void *preact;       /* [M, 2F] NN with an activation */
    float *d_row_weights;     /* [M] */
};

struct gemm_engine_plan; /* each engine has its own body */

struct gemm_engine {
    const char *name;
    int splits_on_device;
    int destroy_waits; /* 1: destroy may wait for whatever runs on the device */
    /* 1 if this engine can do the problem on this device; 0 and a reason otherwise. */
    int (*supports)(const struct gemm_problem *problem, int device_idx, struct epd_error *reason);
    /* The current device must be device_idx. Allocates the workspace the plan keeps. */
    enum epd_status (*create)(const struct gemm_problem *problem, int device_idx,
                              struct gemm_engine_plan **plan, struct epd_error *error);
    /* Enqueues on the stream; allocates nothing; no host sync (except cublaslt, which reads splits). */
    enum epd_status (*launch)(struct gemm_engine_plan *plan, const struct gemm_launch *launch,
                              struct CUstream_st *stream, struct epd_error *error);
    void (*destroy)(struct gemm_engine_plan *plan);
};

/* NULL-terminated, in the order of preference. */
extern const struct gemm_engine *const gemm_engines[];

/* Engines that this build lacks, and why. Ends with a NULL name. */
struct gemm_engine_absent {
    const char *name, *reason;
};
extern const struct gemm_engine_absent gemm_engines_absent[];

#endif
