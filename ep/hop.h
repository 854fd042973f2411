/* The exchange of a team that lies on several nodes, in two hops. First the rail: a token goes once to every node that
 * has one of its experts, from its rank to the rank of the same local index there. Then the node: that rank pushes the
 * rows on to its neighbours, standing for the rank they came from, so that the rows of an expert keep their order of
 * (source rank, token) and the slots hold what they would hold on one node, bit for bit. Combine is the way back: each
 * node sums its rows of a token in fp32, in the order of k; the sums cross once; the token's rank adds them in the order
 * of the nodes and rounds once. So its result may differ from one node's by the order of that sum alone, and is the same
 * in every repeat.
 *
 * All nodes take the same swaps in the same order: by (phase, rank, number in the phase), which every lane keeps to; the
 * fabric hands the steps of all groups to all nodes in one order. So no two rails can wait for each other. A rank whose
 * step is off takes its remaining swaps all the same, each in its place of that order, saying that it is off. The last
 * swap of a step is the agreement on what it came to. Work is done when a call returns: host backend. Lane thread. */
#ifndef EPD_EP_HOP_H
#define EPD_EP_HOP_H

#include "ep/phase.h"

/* What a rank of a spanning team swaps with: owned by the team. */
struct hop_desk;

/* One node's share of a verdict, or all nodes'. */
struct hop_verdict {
    uint32_t status;
    int32_t rank; /* to blame; -1: none */
    uint32_t phase;
    uint32_t order; /* of two, the one with the lower (order, rank) counts */
    struct kernel_error record;
    char text[EPD_ERROR_TEXT_BYTES];
};

/* What a rank of another node has come to, as it crosses at the end of a step whose work goes on later. The same number
 * of the step at both ends: all of it has come, and so has everything that was swapped before. */
struct hop_report {
    uint64_t step;
    uint32_t status, phase, order; /* of its host's side, like those of a verdict */
    int32_t rank;
    char text[EPD_ERROR_TEXT_BYTES];
    struct kernel_error records[PLAN_RECORD_COUNT];
    uint64_t step_again;
};

/* How hops are done on a kind of backend: one row where work is done at once, one where it goes into a stream. */
struct hop_form {
    /* Of one rank; made before its first plan. */
    enum epd_status (*desk_create)(struct team *team, uint32_t rank, struct epd_error *error);
    void (*desk_destroy)(struct team *team, uint32_t rank);
    void (*carve_routing)(struct routing_context *routing, const struct problem *problem,
                          struct layout *layout);
    /* The exchange of one rank: as the backend's, in its stages. */
    enum epd_status (*exchange)(const struct rank_run *run, enum exchange_op op,
                                const struct exchange_args *args, struct epd_error *error);
    /* A step begins on these ranks of one lane. */
    void (*begin)(const struct rank_run *runs, uint32_t n_runs, uint64_t step);
    /* Where work is done at once; else NULL. Every rank of the lane has ended its phases, or is off: takes what is left of
     * the swaps, in their order. */
    void (*drain)(const struct rank_run *runs, uint32_t n_runs);
    /* Where work goes on later; else NULL. These ranks are off: when the exchanges of all phases are run once more, with no
     * lane waiting for another, each takes those of its swaps that it has not taken, and does nothing else. */
    void (*turn_off)(const struct rank_run *runs, uint32_t n_runs);
    /* 1 if the host has to learn what crosses before the second stage of this exchange, of which there is one more than the
     * backend says: eager, and work goes on later. The same for all ranks of the step. NULL: never. */
    int (*learns)(const struct plan *plan, enum exchange_op op);
    /* What the first stage has told, when all that was in the queue behind it has been reached. An error breaks the rails. */
    enum epd_status (*learn)(const struct rank_run *run, struct epd_error *error);
    /* 1 if what the rank failed with only says that another one has. */
    int (*only_followed)(const struct rank_run *run);
    /* Where work is done at once; else NULL. The nodes agree: in, what this node has come to; out, what the step came
     * to. Every rank of the lane swaps. */
    void (*agree)(const struct rank_run *runs, uint32_t n_runs, struct hop_verdict *verdict);
    /* Where work goes on later; else NULL. Behind all that the rank does: its report goes to the other nodes, with the
     * records that its kernels have left, and theirs [n_nodes] are copied out; host: what its host has met. */
    enum epd_status (*report)(const struct rank_run *run, const struct hop_verdict *host,
                              struct hop_report *reports, struct epd_error *error);
};

extern const struct hop_form hop_form_host;
#ifdef EPD_HAVE_CUDA
extern const struct hop_form hop_form_cuda;
#endif

/* 1 if a comes before b. */
int hop_counts_before(const struct hop_verdict *a, const struct hop_verdict *b);

#endif
