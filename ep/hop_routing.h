/* What a dispatch over several nodes leaves for its combine and its backward, besides struct routing: which tokens of
 * this rank went to which node, and where the rows lie of the tokens that came from the other nodes of its rail. Carved
 * out of the control block of the plan that routes. Lane thread. */
#ifndef EPD_EP_HOP_ROUTING_H
#define EPD_EP_HOP_ROUTING_H

#include "ep/layout.h"
#include "ep/problem.h"

/* Of one node. Of this node: this rank's own tokens, with the rows on this node only. */
struct hop_arrivals {
    uint32_t n_tokens;
    int32_t *expert; /* [max_tokens, K] */
    int32_t *row;    /* [max_tokens, K] on this node; -1 for experts of others, and where there is none */
    float *weights;  /* [max_tokens, K] */
};

/* All NULL where a team lies on one node. */
struct hop_routing {
    struct hop_arrivals *from; /* [n_nodes] */
    int32_t **sent;   /* [n_nodes] of [max_tokens]: tokens of this rank that have an expert there, rising */
    uint32_t *n_sent; /* [n_nodes] */
};

void hop_routing_carve(struct hop_routing *hop, const struct problem *problem, struct layout *layout);

#endif
