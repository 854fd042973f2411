/* Daemons of the tests of nodes, each with its own GPUs and NCCL_HOSTID: to NCCL, nodes. The parent uses no CUDA. */
#ifndef EPD_TESTS_GPU_FABRIC_NODE_DAEMONS_H
#define EPD_TESTS_GPU_FABRIC_NODE_DAEMONS_H

#include "tests/gpu/backend/process.h"

#define NODE_MAX_NODES 3

struct node_daemons {
    const char *epd;
    unsigned n;
    const char *const *devices; /* [n] --devices of each: "0,1" */
    char secret_path[32], rendezvous[32];
    struct process_daemon daemons[NODE_MAX_NODES]; /* pid 0: killed */
};

/* One daemon is one without a fabric. */
void node_daemons_start(struct node_daemons *nodes, const char *epd, unsigned n, const char *const *devices);
/* 0 if all that were left ended well. */
int node_daemons_stop(struct node_daemons *nodes);
/* One of several, after node_daemon_kill. */
void node_daemon_start(struct node_daemons *nodes, unsigned node);
/* The supervisor and its worker, at once. */
void node_daemon_kill(struct node_daemons *nodes, unsigned node);
/* CUDA's number of the GPU that the i-th rank there has: as the daemon gives it. */
unsigned node_daemon_device(const struct node_daemons *nodes, unsigned node, unsigned i);

#endif
