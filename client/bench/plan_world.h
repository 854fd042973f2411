/* A fabric of any number of ranks whose dispatch is planned: routing, capacities, slabs, messages and schedule of every
 * rank, built by the functions that plan them in the daemon (ep/problem.h, ep/hop_routing.h, ep/hop_frame.h,
 * ep/rail_order.h, kernels/host), one rank after the other in this process. One thread. */
#ifndef EPD_BENCH_PLAN_WORLD_H
#define EPD_BENCH_PLAN_WORLD_H

#include <stdint.h>

#include "ep/hop_routing.h"

#define PLAN_RANKS_PER_NODE 8u

struct plan_world {
    struct problem problem;              /* of node 0; node is set as its turn comes */
    int32_t *topk_idx;                   /* [R, T, K] drawn; the caller fills it */
    int32_t *experts;                    /* [R, T, K] checked */
    int32_t *counts;                     /* [R, E] rows of a rank for each expert */
    int64_t *m_splits;                   /* [R, L] */
    int64_t *offsets;                    /* [R, L + 1] */
    int64_t *needed_rows, *dropped_rows; /* [R] */
    uint32_t *n_sent;                    /* [R, nodes] tokens that cross */
    uint32_t *schedule;                  /* [nodes, nodes - 1] whom a node turns to */
    int32_t *owner;                      /* [R, C] of a slot: source_rank * T * K + token * K + k; -1: none */
    int32_t *sent;                       /* [nodes, nodes, T] of one rail */
    struct hop_routing hop;              /* of the rank whose turn it is */
    int64_t *words;
    double *plan_ns; /* [R] */
};

/* Memory that plan_world_init takes, roughly. */
double plan_world_bytes(uint32_t n_ranks, uint32_t n_experts, uint32_t n_tokens, uint32_t top_k,
                        double capacity_factor);
/* capacity_factor: rows of a rank over the mean. EPD_INVALID_ARGUMENT, EPD_NO_MEMORY. */
EPD_MUST_CHECK enum epd_status plan_world_init(struct plan_world *world, uint32_t n_ranks, uint32_t n_experts,
                                               uint32_t n_tokens, uint32_t top_k, uint32_t hidden,
                                               double capacity_factor, struct epd_error *error);
void plan_world_fini(struct plan_world *world);
/* Plans all ranks; plan_ns is what each took. EPD_BAD_ROUTING: topk_idx is none. */
EPD_MUST_CHECK enum epd_status plan_world_plan(struct plan_world *world, struct epd_error *error);
/* EPD_INTERNAL says what is wrong: every row is in a slot, in the order of (source rank, token) of its expert, none in
 * two, but those over the capacity, which are counted; and every node turns to every other one, each round to another. */
EPD_MUST_CHECK enum epd_status plan_world_check(const struct plan_world *world, struct epd_error *error);
/* Bytes that a rank sends to other nodes in a dispatch and its combine, as eager messages. */
uint64_t plan_world_sent_bytes(const struct plan_world *world, uint32_t rank);

#endif
