/* Inside of plans and plan sets, for the files of ep. */
#ifndef EPD_EP_PLAN_IMPL_H
#define EPD_EP_PLAN_IMPL_H

#include "ep/binding.h"
#include "ep/plan.h"
#include "ep/routing.h"
#include "ep/saved.h"
#include "ep/team_impl.h"

/* How long what was submitted waits for the client's stream to reach its launch. Then the lane sets the ready
 * flag itself, so that the ranks behind it go on; a step ends EPD_TIMEOUT. */
#define PLAN_READY_NS 30000000000ull

/* The GEMMs that the ops are made of. */
enum plan_gemm {
    PLAN_GEMM_ALONE, /* grouped_gemm */
    PLAN_GEMM_FC1,   /* preact = recv_x W1^T (+ b1) */
    PLAN_GEMM_FC2,   /* y = act W2^T (+ b2) */
    PLAN_GEMM_D_ACT, /* d_act = dout W2 */
    PLAN_GEMM_DX,    /* d_recv_x = d_preact W1 */
    PLAN_GEMM_DW2,   /* dout^T weighted_act */
    PLAN_GEMM_DW1,   /* d_preact^T recv_x */
    PLAN_GEMM_COUNT
};

/* Kernel records are kept apart by what wrote them, so that an overflow that is allowed hides nothing else.
 * In the order in which they are reported. */
enum plan_record { PLAN_RECORD_ROUTE, PLAN_RECORD_LAYOUT, PLAN_RECORD_EXPERT, PLAN_RECORD_COUNT };

/* Where the intermediate tensors of an op lie: shared scratch, the saved context, or the caller's memory. */
struct plan_work {
    void *recv_x; /* [C, H] slots that X is pushed into */
    void *preact; /* [C, 2F]; in backward also its gradient, in place; NULL in a forward that writes none */
    void *act;    /* [C, F]; in backward d_act, then the weighted activation, in place */
    void *dout;   /* [C, H] slots that DOUT is pushed into */
    void *y;      /* [C, H] what combine reads: y, or the gradient of recv_x */
    float *row_scalars; /* [C] what gather reads */
    void *workspace;    /* of the backend's exchange; NULL if it takes none */
    float *dot;         /* of a weight_grad; NULL likewise */
};

/* What all ranks must agree on, besides the group's sizes. Zeroed before it is filled: it is hashed as bytes.
 */
struct plan_key {
    uint64_t op, layout, activation, saved, accumulate, delay_wgrad, crossing;
    uint64_t bound;
    uint64_t context_hash;
    uint32_t dtypes[EPD_ROLE_COUNT + 1]; /* even number: no padding */
};

/* A place in a plan set. */
struct plan_link {
    struct plan_set *set;
    struct plan_link *next; /* of the same plan */
    uint32_t plan_idx;
};

struct plan {
    /* Fixed when the plan is created; any thread. */
    struct team *team; /* borrowed, outlives the plan */
    struct lane *lane; /* of the rank; borrowed */
    uint32_t rank;
    enum epd_op op;
    enum epd_gemm_layout layout;
    enum epd_activation activation;
    enum epd_saved saved;
    int accumulate, delay_wgrad;
    enum epd_crossing crossing; /* unspecified: of an op that never crosses */
    struct plan *context;       /* held */
    struct backend_flag flag;
    uint64_t public_id;
    struct binding_set bindings;
    struct plan_key key;
    uint64_t shape_hash;
    unsigned saved_parts;
    uint64_t saved_bytes;
    uint32_t max_tokens;      /* T; UINT32_MAX if no tensor has it */
    uint32_t crossing_tokens; /* plan_set_agree: before its first step; else the group's max_tokens */

    /* Made on the lane before the plan is handed out, fixed then. */
    struct backend_block control;       /* records, routing, copies of splits, part tables */
    struct kernel_error *records;       /* [PLAN_RECORD_COUNT] device memory; NULL for barrier */
    int64_t *splits, *offsets;          /* this plan's copy of M_SPLITS and OFFSETS where they are inputs */
    void **part_tables[EPD_ROLE_COUNT]; /* device memory */
    struct routing_context routing;
    struct saved_context kept;
    struct plan_work work;
    struct backend_gemm *gemms[PLAN_GEMM_COUNT];
    int fc1_activates;   /* PLAN_GEMM_FC1 writes act itself, and preact only where it is kept */
    int d_act_activates; /* PLAN_GEMM_D_ACT makes what the activation's backward makes; d_act goes nowhere */
    uint64_t flops_per_row;
    int recordable; /* its phases are several launches of one queue that read nothing from the device */

    /* Lane thread of the rank: what backward and wgrad may use. */
    uint64_t generation;         /* dispatch, moe_forward: steps begun */
    uint64_t failed_generation;  /* of them, the latest that failed after it was submitted; 0: none */
    int context_kept;            /* moe_forward: recv_x and preact are those of this generation and unused */
    uint64_t held_generation;    /* moe_backward: forward generation whose wgrad is outstanding; 0: none */
    struct backend_graph *graph; /* its phases with graph_tokens tokens; NULL: not recorded */
    uint32_t graph_tokens;
    uint32_t last_tokens; /* of the latest fused step that was not replayed, plus 1; 0: none */

    /* Loop thread. */
    uint64_t set_id;  /* of the latest set it was joined into; 0: none */
    uint32_t n_users; /* steps in flight and dependent plans */
    _Atomic int dead; /* read by the lane too */
    struct plan_link *first_link;
    void (*gone)(void *arg);
    void *gone_arg;
    struct lane_job job;
    plan_callback callback;
    void *callback_arg;
    struct epd_error create_error;
};

struct plan_set {
    struct team *team;
    uint64_t id;
    enum epd_op op;
    uint32_t n_plans;
    struct plan **plans;     /* [n_plans] NULL once gone; owned array */
    struct plan_link *links; /* [n_plans] owned */
    struct step *free_steps; /* owned */
    uint32_t n_steps;        /* in flight */
    int destroyed;
};

/* 1 if a step of the op routes: the plan owns a routing context. */
static inline int plan_routes(const struct plan *plan)
{
    return plan->op == EPD_OP_DISPATCH || plan->op == EPD_OP_MOE_FORWARD;
}

/* The plan whose routing this one uses: itself, its context, or the context of that; NULL if it uses none. */
static inline struct plan *plan_router(struct plan *plan)
{
    while (plan && !plan_routes(plan))
        plan = plan->context;
    return plan;
}

/* The plan that has the tensor bound: this one, or one of its contexts; NULL if none. */
static inline const struct plan *plan_owner(const struct plan *plan, enum epd_role role)
{
    while (plan && !binding_has(&plan->bindings, role))
        plan = plan->context;
    return plan;
}

static inline int plan_has(const struct plan *plan, enum epd_role role)
{
    return binding_has(&plan->bindings, role);
}

/* NULL if not bound, empty, or a list. */
static inline void *plan_data(const struct plan *plan, enum epd_role role)
{
    return plan->bindings.tensors[role].data;
}

/* A user ends; the last one of a dead plan ends the plan. Loop thread. */
void plan_let_go(struct plan *plan);

/* Frees the steps of a set, and the set; no step is in flight. */
void plan_set_free(struct plan_set *set);

/* prepare.c, lane thread: makes and frees what the op needs on the device. */
EPD_MUST_CHECK enum epd_status prepare_plan(struct plan *plan, struct epd_error *error);
void prepare_undo(struct plan *plan);
/* Which parts of a step the plan keeps (a sum of enum saved_part). */
unsigned prepare_saved_parts(const struct plan *plan);

#endif
