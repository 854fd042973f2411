/* The sizes of a group, checked once, and what follows from them: capacity, rows, bytes. Immutable; any
 * thread. */
#ifndef EPD_EP_PROBLEM_H
#define EPD_EP_PROBLEM_H

#include "kernels/kernels.h"
#include "proto/message.h"

struct problem {
    uint32_t world_size;
    uint32_t n_nodes,
        node; /* 1 and 0 unless the group spans nodes; each has as many of the ranks, in order */
    uint32_t ranks_per_node;
    uint32_t n_experts, n_local_experts, top_k;
    uint32_t hidden, ffn; /* ffn 0: no moe ops */
    uint32_t max_tokens;
    uint32_t alignment;
    int64_t capacity_rows;
    enum epd_dtype dtype;
    enum epd_overflow overflow;
};

/* Errors name the field, what was given and what is allowed. */
EPD_MUST_CHECK enum epd_status problem_init(struct problem *problem,
                                            const struct message_group_config *config, uint32_t world_size,
                                            struct epd_error *error);

/* The same, and spanning, for any number of ranks and nodes: what plans without a group may ask for. */
EPD_MUST_CHECK enum epd_status problem_init_any(struct problem *problem,
                                                const struct message_group_config *config,
                                                uint32_t world_size, uint32_t n_nodes, uint32_t node,
                                                struct epd_error *error);

/* The group spans n_nodes, and this is one of them. */
EPD_MUST_CHECK enum epd_status problem_span(struct problem *problem, uint32_t n_nodes, uint32_t node,
                                            struct epd_error *error);
/* Of the ranks on this node. */
static inline uint32_t problem_first_rank(const struct problem *problem)
{
    return problem->node * problem->ranks_per_node;
}

/* The most rows that can arrive at one rank, with the padding of its slabs. */
int64_t problem_max_rows(const struct problem *problem);
/* The part of a step's shape that the group fixes; rank and n_tokens are 0. */
struct exchange_shape problem_shape(const struct problem *problem);
/* Bytes of [capacity_rows, columns] of the group's dtype. */
uint64_t problem_row_bytes(const struct problem *problem, uint64_t columns);

/* What one step's routing came to, from the counts [R, E] of rows that every rank sends to every expert. */
struct problem_traffic {
    int64_t rows;         /* in this rank's slabs, without padding */
    int64_t needed_rows;  /* with padding: what would have been the smallest capacity */
    int64_t dropped_rows; /* for this rank, over its capacity */
    int64_t sent_rows;    /* tokens of this rank, once for each other rank that has one of their experts */
    int64_t foreign_rows; /* tokens of other ranks that have an expert here */
};
/* traffic[world_size]; the last two stay 0: counts do not tell them. */
void problem_count_traffic(const struct problem *problem, const int32_t *counts,
                           struct problem_traffic *traffic);

#endif
