/* What a dispatch over several nodes leaves for its combine and its backward, besides struct routing: which tokens of
 * this rank went to which node, and where the rows lie of the tokens that came from the other nodes of its rail. Carved
 * out of the control block of the plan that routes. Lane thread.
 *
 * Any number of ranks and nodes: what limits them is elsewhere (epd-bench --op plan-scale). */
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

/* Which tokens of this rank, expert [n_tokens, K], go to which other node: each once, whatever number of experts it has
 * there. O(T K). */
void hop_routing_choose(struct hop_routing *hop, const struct problem *problem, const int32_t *expert,
                        uint32_t n_tokens);
/* Words of memory that hop_routing_place wants. */
uint64_t hop_routing_place_words(const struct problem *problem);
/* Where on this node the rows lie of all tokens of the rank's rail (hop->from: n_tokens and expert in, row out), from the
 * rows [R, E] that every rank routes to every expert: where they would lie on one node. Returns the rows [L] of this
 * rank's experts, of all ranks; in words. O(R * experts of the node + tokens * K). */
const int64_t *hop_routing_place(struct hop_routing *hop, const struct problem *problem, uint32_t rank,
                                 const int32_t *counts, int64_t *words);

#endif
