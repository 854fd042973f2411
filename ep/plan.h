/* A plan: one rank's op, checked once and bound to buffers. Collective ops are launched through a plan set: the plans of
 * all ranks joined, with the table of every rank's pointers. Loop thread; see node.h. */
#ifndef EPD_EP_PLAN_H
#define EPD_EP_PLAN_H

#include "ep/memory.h"
#include "ep/team.h"
#include "proto/page.h"

struct plan;
struct plan_set;

struct plan_binding {
    enum epd_role role;
    uint32_t part_idx, n_parts;
    struct memory *memory; /* retained by the plan */
    uint64_t offset;
    enum epd_dtype dtype;
    uint32_t n_dims;
    int64_t shape[3];
};

/* Tensors per op: the table in binding_rules.c. Contexts: combine, dispatch_bwd and combine_bwd name their dispatch plan and
 * use the routing of its latest step; moe_backward names its moe_forward plan, moe_wgrad its moe_backward plan. A context
 * must have run since, and well, or the step ends EPD_INVALID_ARGUMENT:
 *   - moe_backward uses up what the forward saved: one backward per forward. W1, B1, W2, B2 are the forward plan's unless
 *     bound again. With EPD_SAVED_RECOMPUTE the forward plan's X must still hold what it held.
 *   - moe_wgrad takes what the latest delayed moe_backward left; a new step of the forward plan takes it away. */
struct plan_request {
    enum epd_op op;
    uint32_t rank;
    struct plan *context; /* same rank, same team; retained by the plan; NULL if the op takes none */
    enum epd_gemm_layout layout;
    enum epd_activation activation;
    enum epd_saved saved;
    int accumulate, delay_wgrad;
    enum epd_crossing crossing;  /* unspecified: the context's, or else the backend's own */
    uint64_t saved_budget_bytes; /* the most that this plan may take as a saved context */
    struct page *page;           /* of the session; outlives the plan */
    uint32_t flag_idx;           /* which page_plan is this plan's */
    uint64_t public_id;          /* plan id the client knows; goes into page entries */
    uint32_t n_bindings;
    const struct plan_binding *bindings; /* read during the call only */
};

/* plan is NULL unless error->status is EPD_OK. */
typedef void (*plan_callback)(void *arg, struct plan *plan, const struct epd_error *error);

/* Checks roles, dtypes, shapes, ranges, alignment and device at once (immediate error, naming the property), then makes
 * what the op needs (routing, saved context, scratch regions, GEMM engine plans) on the lane and calls back. */
EPD_MUST_CHECK enum epd_status plan_create(struct team *team, const struct plan_request *request,
                                           plan_callback callback, void *arg, struct epd_error *error);
/* Marks the plan dead; gone(arg) runs when no step, set or dependent plan uses it any more and its memory is on the way
 * back. A set that contains it can no longer be submitted. */
void plan_destroy(struct plan *plan, void (*gone)(void *arg), void *arg);

uint64_t
plan_shape_hash(const struct plan *plan); /* of what all ranks must agree on: op, modes, H, F, E, K, dtypes */
uint64_t plan_saved_bytes(const struct plan *plan);
/* 1 while steps or plans that have it as context use it: destroyed now, it would keep its memory until they end. */
int plan_in_use(const struct plan *plan);
enum epd_op plan_op(const struct plan *plan);

/* Joins the plans of all ranks ([world_size], in rank order; n = 1 for a local op). EPD_PLAN_MISMATCH names the rank and
 * the property that differ from rank 0. The set dies with plan_set_destroy; it does not keep dead plans alive. */
EPD_MUST_CHECK enum epd_status plan_join(struct plan *const *plans, uint32_t n_plans, struct plan_set **set,
                                         struct epd_error *error);
/* The most tokens that a rank of the set can have in a step, its plan's T; 0 if its op routes nothing. What crosses statically
 * between nodes of such a routing, and of all that uses it, is as long as for so many: the most of all nodes, which they
 * have to agree on before the first step of the set (the group's max_tokens until then, and more than that is none). */
uint32_t plan_set_tokens(const struct plan_set *set);
void plan_set_agree(struct plan_set *set, uint32_t n_tokens);
void plan_set_destroy(struct plan_set *set); /* deferred until no step of it is in flight */

/* Ends one launch of this plan without running it: consumes `ready`, reports the entry, counts it as failed and sets
 * `done`, so that no stream hangs. phase and blamed rank (-1: none) go into the page entry. */
void plan_fail(struct plan *plan, uint64_t seq, const struct epd_error *error, enum epd_phase phase,
               int32_t rank);

#endif
