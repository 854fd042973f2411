/* Which tensors an op takes, and whether the ones given fit: the table of roles, dtypes and shapes per op.
 * Loop thread. */
#ifndef EPD_EP_BINDING_H
#define EPD_EP_BINDING_H

#include "ep/backend.h"
#include "ep/plan.h"
#include "ep/problem.h"

/* The symbols shapes are written in. The first ones follow from the group; the others are set by the first
 * tensor of the plan that has them, and the rest must agree. */
enum binding_dim {
    DIM_NONE = 0,
    DIM_TOP_K,
    DIM_HIDDEN,
    DIM_CAPACITY,
    DIM_LOCAL, /* L */
    DIM_LOCAL_PLUS_1,
    DIM_FFN,
    DIM_FFN_TWICE,
    DIM_TOKENS, /* T of the plan, at most max_tokens */
    DIM_ROWS,   /* M: max_rows of a grouped_gemm or activation */
    DIM_N,
    DIM_K,
    DIM_GROUPS,
    DIM_GROUPS_PLUS_1,
    DIM_ACT, /* F of an activation */
    DIM_ACT_TWICE,
    DIM_COUNT
};

/* The tensors of one plan after the check. */
struct binding_set {
    uint64_t bound;                        /* bit per enum epd_role */
    struct tensor tensors[EPD_ROLE_COUNT]; /* of a list: dtype and the shape of one part, data NULL */
    void **parts[EPD_ROLE_COUNT];          /* [n_parts] owned, or NULL */
    uint32_t n_parts[EPD_ROLE_COUNT];
    int64_t dims[DIM_COUNT];  /* -1: no tensor of the plan has it */
    struct memory **memories; /* [n_memories] owned; each bound once per tensor */
    uint32_t n_memories;
};

static inline int binding_has(const struct binding_set *set, enum epd_role role)
{
    return (int)(set->bound >> role & 1);
}

/* What the check goes by. */
struct binding_context {
    const struct problem *problem;
    const struct backend *backend;
    uint32_t device_idx; /* of the rank */
};

/* Errors name op, role, property, what was given and what is allowed. On success the memories are bound. */
EPD_MUST_CHECK enum epd_status binding_check(const struct binding_context *context,
                                             const struct plan_request *request, struct binding_set *set,
                                             struct epd_error *error);
/* Lets the memories go. */
void binding_fini(struct binding_set *set);

#endif
