/* The phases that ops are made of, and the rows of phases that are the ops. A phase is run by each lane for
 * each of its local ranks; where a row says so, all lanes of the team meet before it. Written once over
 * backend.h; lane thread. */
#ifndef EPD_EP_PHASE_H
#define EPD_EP_PHASE_H

#include "ep/plan_impl.h"

/* One rank's part of a step. */
struct rank_run {
    const struct backend *backend;
    struct backend_queue *queue;
    struct plan *plan;
    struct plan *const
        *peers; /* the plans of all ranks of this node, in rank order; of a local op: its own at [0] */
    uint32_t n_tokens;
    uint32_t stage; /* of an exchange */
};

struct phase {
    enum epd_phase phase;
    /* Reads what other ranks wrote into its tensors in the phases before, or writes what they read there.
     * Only where an exchange works in the tensors: where it takes turns in workspaces, others touch no
     * tensor. */
    int after_barrier;
    enum epd_status (*run)(const struct rank_run *run, struct epd_error *error);
    int n_exchanges; /* 1: it is run once for each stage of the exchange; once in all in the fused form */
    enum exchange_op exchange;
};

struct pipeline {
    const struct phase *phases;
    uint32_t n_phases;
};

/* moe.c */
const struct pipeline *moe_pipeline(enum epd_op op);
/* Whether the step may run at all: the context that it uses must be there. */
EPD_MUST_CHECK enum epd_status moe_check_step(const struct rank_run *run, struct epd_error *error);
/* The step will run: from here on the arrays of a routing are of this step, and what the last one kept is gone. */
void moe_begin_step(const struct rank_run *run);
/* The step was submitted well, or, where work is done at once, went well on every rank: what it leaves may be
 * used. */
void moe_finish_step(const struct rank_run *run);
/* The step whose routing was the generation-th of its plan turned out to have failed. */
void moe_undo_step(const struct rank_run *run, uint64_t generation);
/* The error of a step that used a routing which has turned out to be of a failed step. */
EPD_MUST_CHECK enum epd_status moe_check_used(const struct rank_run *run, uint64_t generation,
                                              struct epd_error *error);

/* exchange.c */
enum epd_status exchange_dispatch(const struct rank_run *run, struct epd_error *error);
enum epd_status exchange_push_x(const struct rank_run *run, struct epd_error *error);
enum epd_status exchange_weight_grad(const struct rank_run *run, struct epd_error *error);
enum epd_status exchange_push_dout(const struct rank_run *run, struct epd_error *error);
enum epd_status exchange_combine_out(const struct rank_run *run, struct epd_error *error);
enum epd_status exchange_combine_dx(const struct rank_run *run, struct epd_error *error);
enum epd_status exchange_gather_weights(const struct rank_run *run, struct epd_error *error);

/* expert.c */
enum epd_status expert_take_splits(const struct rank_run *run, struct epd_error *error);
enum epd_status expert_grouped_gemm(const struct rank_run *run, struct epd_error *error);
enum epd_status expert_activation_alone(const struct rank_run *run, struct epd_error *error);
enum epd_status expert_activation_bwd_alone(const struct rank_run *run, struct epd_error *error);
enum epd_status expert_fc1(const struct rank_run *run, struct epd_error *error);
enum epd_status expert_activation(const struct rank_run *run, struct epd_error *error);
enum epd_status expert_fc2(const struct rank_run *run, struct epd_error *error);
enum epd_status expert_d_act(const struct rank_run *run, struct epd_error *error);
enum epd_status expert_activation_bwd(const struct rank_run *run, struct epd_error *error);
enum epd_status expert_dx(const struct rank_run *run, struct epd_error *error);
enum epd_status expert_wgrad(const struct rank_run *run, struct epd_error *error);

#endif
