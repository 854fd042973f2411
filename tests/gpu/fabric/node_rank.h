/* A rank of the tests of nodes, as a process of its own with a GPU: one MoE layer, forward and backward, on a daemon. */
#ifndef EPD_TESTS_GPU_FABRIC_NODE_RANK_H
#define EPD_TESTS_GPU_FABRIC_NODE_RANK_H

#include <stddef.h>
#include <stdint.h>

enum {
    NODE_T = 512,
    NODE_H = 1024,
    NODE_F = 512,
    NODE_E = 16,
    NODE_K = 4,
    NODE_MAX_WORLD = 4,
};

/* What a layer leaves on a rank, as it is written to a file; L experts. */
struct node_result {
    uint16_t out[NODE_T * NODE_H], dx[NODE_T * NODE_H]; /* bf16 */
    float d_weights[NODE_T * NODE_K];
    float dw1[(size_t)NODE_E / NODE_MAX_WORLD * 2 * NODE_F * NODE_H];
    float dw2[(size_t)NODE_E / NODE_MAX_WORLD * NODE_H * NODE_F];
};

struct node_rank_options {
    const char *mode; /* "layer", "until_lost", or "for:S", S seconds */
    const char *group;
    unsigned rank, world_size, n_nodes;
    const char *socket_path;
    const char *result_path;           /* of "layer"; "-": none */
    const char *epdctl, *control_path; /* rank 0 of "layer" prints the fabric; "-": not */
};

/* "PROGRAM rank MODE GROUP RANK WORLD NODES SOCKET RESULT EPDCTL CONTROL"; exits. */
_Noreturn void node_rank_main(char **argv);

#endif
