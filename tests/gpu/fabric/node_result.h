/* What a layer leaves on a rank: written by the rank to a file, read and compared by the test. */
#ifndef EPD_TESTS_GPU_FABRIC_NODE_RESULT_H
#define EPD_TESTS_GPU_FABRIC_NODE_RESULT_H

#include <stddef.h>
#include <stdint.h>

enum {
    NODE_T = 512,
    NODE_H = 1024,
    NODE_F = 256,
    NODE_E = 24,
    NODE_K = 4,
    NODE_MAX_WORLD = 8,
    NODE_MIN_WORLD = 2, /* of a group that leaves a result */
};

enum node_part { NODE_OUT, NODE_DX, NODE_D_WEIGHTS, NODE_DW1, NODE_DW2, NODE_PARTS };

struct node_result {
    uint16_t out[NODE_T * NODE_H], dx[NODE_T * NODE_H]; /* bf16 */
    float d_weights[NODE_T * NODE_K];
    float
        dw1[(size_t)NODE_E / NODE_MIN_WORLD * 2 * NODE_F * NODE_H]; /* [L, 2F, H], the rest is not written */
    float dw2[(size_t)NODE_E / NODE_MIN_WORLD * NODE_H * NODE_F];   /* [L, H, F] */
};

/* The bytes of a part in a group of so many ranks; *data is where they lie. */
size_t node_result_part(struct node_result *result, enum node_part part, unsigned world_size, void **data);
/* 0 if it was written, or read. */
int node_result_write(struct node_result *result, unsigned world_size, const char *prefix, unsigned rank);
int node_result_read(struct node_result *result, unsigned world_size, const char *prefix, unsigned rank);
/* Of all ranks, the results of one node against those of n_nodes; prints them. 0: as near as they must be. */
int node_results_compare(const char *one, const char *several, unsigned world_size, unsigned n_nodes);
/* Their files, as far as there are any. */
void node_results_remove(const char *prefix, unsigned world_size);

#endif
