/* R ranks on the GPUs there are, round-robin, in one process: their memory, and launching an op on all of
 * them either stage by stage (host barrier after each) or as one launch per rank. Used by one thread.
 * Everything ends the process with a message when CUDA fails: this is a test. */
#ifndef EPD_TESTS_GPU_EXCHANGE_CLUSTER_H
#define EPD_TESTS_GPU_EXCHANGE_CLUSTER_H

#include <cuda_runtime_api.h>
#include <stdio.h>
#include <stdlib.h>

#include "kernels/cuda/cuda.h"

#define MUST(call)                                                                                           \
    do {                                                                                                     \
        cudaError_t code_ = (call);                                                                          \
        if (code_ != cudaSuccess) {                                                                          \
            fprintf(stderr, "%s:%d %s: %s\n", __FILE__, __LINE__, #call, cudaGetErrorString(code_));         \
            exit(1);                                                                                         \
        }                                                                                                    \
    } while (0)

#define CLUSTER_MAX_RANKS 8
#define CLUSTER_MAX_PARTS 4 /* stages of an op */

struct problem {
    uint32_t n_ranks, top_k, n_experts, hidden, alignment, max_tokens;
    uint32_t n_tokens[CLUSTER_MAX_RANKS];
    int64_t capacity_rows;
    enum epd_dtype dtype;
    enum epd_dtype idx_dtype;
};

/* Of the kernels: everything but max_blocks and n_nodes. */
struct exchange_shape shape_of_rank(const struct problem *problem, uint32_t rank);
struct tensor tensor_of(void *data, enum epd_dtype dtype, int64_t rows, int64_t columns);

/* Device memory that is given back at once. */
struct device_memory {
    int n_allocations;
    void *allocations[CLUSTER_MAX_RANKS * 48];
};

/* On the current device, 0xff; at least 16 bytes. */
void *device_bytes(struct device_memory *memory, size_t bytes);
void device_memory_free(struct device_memory *memory);
struct routing device_routing(struct device_memory *memory, const struct problem *problem);

/* Device memory of one rank. */
struct rank_memory {
    int device;
    cudaStream_t stream, abort_stream;
    uint32_t *abort_word, *one; /* one: pinned, holds 1 */
    void *workspace;
    struct cuda_routing routing;
    void *topk_idx, *x, *recv_x, *y, *out, *dout, *dy;
    float *topk_weights, *recv_weights, *dot, *d_weights;
    struct kernel_error *error;
};

struct cluster {
    struct problem problem;
    struct cuda_workspace layout;
    struct rank_memory ranks[CLUSTER_MAX_RANKS];
    uint32_t max_blocks, send_blocks;
    struct device_memory memory;
};

int device_count(void);
/* Enables peer access among all devices and loads the kernels on each. */
void devices_start(void);
void cluster_open(struct cluster *cluster, const struct problem *problem);
void cluster_close(struct cluster *cluster);
void cluster_reset(struct cluster *cluster);
/* 0 if the ranks' streams did not all finish in time: then the abort word was set and the workspaces were
 * reset. */
int cluster_wait(struct cluster *cluster, double seconds);

/* What to do on one rank; `stage` says which part. */
typedef enum epd_status (*launch_function)(struct cluster *cluster, uint32_t rank, enum cuda_stage stage,
                                           const void *what, struct epd_error *error);
struct op_dispatch {
    int route, scaled, dot, weights; /* weights: give topk_weights */
    int no_rows;
    int bwd; /* x = dout, recv_x = dy */
};
struct op_combine {
    int saved_weights, weights;
};
struct op_gather {
    int accumulate;
};
enum epd_status launch_dispatch(struct cluster *cluster, uint32_t rank, enum cuda_stage stage,
                                const void *what, struct epd_error *error);
enum epd_status launch_combine(struct cluster *cluster, uint32_t rank, enum cuda_stage stage,
                               const void *what, struct epd_error *error);
enum epd_status launch_gather(struct cluster *cluster, uint32_t rank, enum cuda_stage stage, const void *what,
                              struct epd_error *error);
/* The stages of an op that runs stage by stage; returns how many. */
int stages_of(launch_function launch, const void *what, enum cuda_stage stages[CLUSTER_MAX_PARTS]);
/* One op on all ranks; fused: one launch per rank. 0 if it did not end. */
int cluster_run(struct cluster *cluster, launch_function launch, const void *what, int fused);

void download(void *to, const void *from, size_t bytes);
void upload(void *to, const void *from, size_t bytes);

#endif
