/* The ranks of a group on emulated nodes: in one process, on the GPUs there are, with a rail between nodes that copies
 * from stream to stream. A thread per rank while an op runs. Everything ends the process with a message when CUDA fails:
 * this is a test. */
#ifndef EPD_TESTS_GPU_EXCHANGE_NODES_H
#define EPD_TESTS_GPU_EXCHANGE_NODES_H

#include <pthread.h>

#include "ep/cuda_exchange.h"
#include "ep/hop_cuda.h"
#include "tests/gpu/exchange/cluster.h"

/* What the rail does to what comes from the first other node. */
enum rail_mode { RAIL_TRUE, RAIL_VOID, RAIL_LIES };

/* Parts of a swap. */
#define NODES_MAX_PARTS 4

struct nodes;

struct node_rank {
    struct nodes *nodes;
    uint32_t rank;
    int device;
    cudaStream_t stream;
    cudaEvent_t ready, done; /* of a swap */
    cudaEvent_t met[2];      /* of a stage, by turns */
    uint32_t n_met;
    cudaEvent_t begun, ended;                                     /* timed */
    struct transport_move moves[NODES_MAX_PARTS * EPD_MAX_NODES]; /* of the swap that is on */
    struct hop_cuda hop;
    struct hop_cuda_counts counts; /* eager */
    struct routing routing;
    struct exchange_slots slots;
    void *workspace, *frames;
    void *topk_idx, *x, *recv_x, *y, *out, *dout, *dy;
    float *topk_weights, *recv_weights, *dot, *d_weights, *value;
    int64_t *splits, *offsets;
    struct kernel_error *error;
};

struct nodes {
    struct problem problem;
    uint32_t n_nodes, max_blocks;
    struct exchange_sizes sizes;
    uint64_t frames_bytes, lies_bytes;
    struct node_rank ranks[CLUSTER_MAX_RANKS];
    enum rail_mode rail_mode;
    int eager;  /* what crosses is as long as there are tokens; before the first op, and with a true rail */
    void *lies; /* [lies_bytes] pinned: experts that are none */
    pthread_barrier_t barrier;
    struct device_memory memory;
};

/* One exchange on all ranks. */
struct nodes_op {
    enum exchange_op op;
    int weights, weights_kept, scaled, bwd, no_rows;
};

void nodes_open(struct nodes *nodes, const struct problem *problem, uint32_t n_nodes);
void nodes_close(struct nodes *nodes);
/* 0xff into what the ops write, the frames too. */
void nodes_poison(struct nodes *nodes);
/* n_times on all ranks, to the end; the host waits for nothing in between. Returns the milliseconds of the slowest. */
float nodes_run(struct nodes *nodes, const struct nodes_op *op, uint32_t n_times);

#endif
