#include "ep/plan_check.h"

#include <stdio.h>
#include <string.h>

/* The op whose plan an op takes as its context; UNSPECIFIED: none. */
static const enum epd_op context_ops[EPD_OP_COUNT] = {
    [EPD_OP_COMBINE] = EPD_OP_DISPATCH,       [EPD_OP_DISPATCH_BWD] = EPD_OP_DISPATCH,
    [EPD_OP_COMBINE_BWD] = EPD_OP_DISPATCH,   [EPD_OP_MOE_BACKWARD] = EPD_OP_MOE_FORWARD,
    [EPD_OP_MOE_WGRAD] = EPD_OP_MOE_BACKWARD,
};

static const enum epd_role gradient_roles[] = {EPD_ROLE_DW1, EPD_ROLE_DB1, EPD_ROLE_DW2, EPD_ROLE_DB2};
#define N_GRADIENT_ROLES (sizeof gradient_roles / sizeof *gradient_roles)

static enum epd_status check_context(const struct team *team, const struct plan_request *request,
                                     struct epd_error *error)
{
    enum epd_op wanted = context_ops[request->op];
    const struct plan *context = request->context;
    const char *op = op_name(request->op);
    if (!wanted && context)
        return error_set(error, EPD_INVALID_ARGUMENT, "%s takes no context plan", op);
    if (!wanted)
        return EPD_OK;
    if (!context)
        return error_set(error, EPD_INVALID_ARGUMENT, "%s: no context plan, want one of %s", op,
                         op_name(wanted));
    if (context->dead)
        return error_set(error, EPD_UNKNOWN_ID, "%s: its context plan was destroyed", op);
    if (context->op != wanted)
        return error_set(error, EPD_INVALID_ARGUMENT, "%s: context plan is a %s, want a %s", op,
                         op_name(context->op), op_name(wanted));
    if (context->team != team || context->rank != request->rank)
        return error_set(error, EPD_INVALID_ARGUMENT,
                         "%s: context plan is of another group or rank (%u, want %u)", op, context->rank,
                         request->rank);
    if (request->op == EPD_OP_MOE_BACKWARD && context->saved == EPD_SAVED_NONE)
        return error_set(error, EPD_INVALID_ARGUMENT,
                         "%s: its moe_forward plan saves nothing, want saved context or recompute", op);
    if (request->op == EPD_OP_MOE_WGRAD && !context->delay_wgrad)
        return error_set(error, EPD_INVALID_ARGUMENT,
                         "%s: its moe_backward plan does not delay the weight gradients", op);
    return EPD_OK;
}

static enum epd_status check_activation(const struct plan_request *request, struct epd_error *error)
{
    enum epd_op op = request->op;
    enum epd_activation given = request->activation;
    int wanted = op == EPD_OP_ACTIVATION || op == EPD_OP_ACTIVATION_BWD || op == EPD_OP_MOE_FORWARD;
    int known = given >= EPD_SWIGLU && given <= EPD_RELU2;
    if (wanted ? !known : given && !known)
        return error_set(error, EPD_INVALID_ARGUMENT, "%s: activation %d, want swiglu, geglu or relu2",
                         op_name(op), (int)given);
    if (op == EPD_OP_MOE_BACKWARD && given && given != request->context->activation)
        return error_set(error, EPD_INVALID_ARGUMENT, "%s: activation %s, its moe_forward plan has %s",
                         op_name(op), activation_name(given), activation_name(request->context->activation));
    return EPD_OK;
}

static enum epd_status check_crossing(const struct team *team, const struct plan_request *request,
                                      struct epd_error *error)
{
    enum epd_op op = request->op;
    if (request->crossing < EPD_CROSSING_UNSPECIFIED || request->crossing > EPD_CROSSING_STATIC ||
        (request->crossing && !plan_check_crosses(op)))
        return error_set(error, EPD_INVALID_ARGUMENT, "%s: crossing %d, want %s", op_name(op),
                         (int)request->crossing, plan_check_crosses(op) ? "0..2" : "0: it crosses nowhere");
    /* Of a static routing no host where work goes on later knows how much crosses. */
    if (request->crossing == EPD_CROSSING_EAGER && team_spans(team) && team->node->backend->works_later &&
        request->context && request->context->crossing != EPD_CROSSING_EAGER)
        return error_set(
            error, EPD_UNSUPPORTED,
            "%s: crossing eager, its %s plan crosses static: on the %s backend what crosses of it is "
            "known to the devices alone",
            op_name(op), op_name(request->context->op), backend_name(team->node->backend->kind));
    return EPD_OK;
}

static enum epd_status check_modes(const struct plan_request *request, struct epd_error *error)
{
    enum epd_op op = request->op;
    int may_accumulate = op == EPD_OP_MOE_BACKWARD || op == EPD_OP_MOE_WGRAD ||
                         (op == EPD_OP_GROUPED_GEMM && request->layout == EPD_GEMM_NT);
    if (op == EPD_OP_GROUPED_GEMM && (request->layout < EPD_GEMM_TN || request->layout > EPD_GEMM_NT))
        return error_set(error, EPD_INVALID_ARGUMENT, "%s: layout %d, want TN, NN or NT", op_name(op),
                         (int)request->layout);
    if (request->accumulate && !may_accumulate)
        return error_set(error, EPD_INVALID_ARGUMENT, "%s cannot accumulate: only weight gradients can",
                         op_name(op));
    if (request->delay_wgrad && op != EPD_OP_MOE_BACKWARD)
        return error_set(error, EPD_INVALID_ARGUMENT,
                         "%s cannot delay weight gradients: only moe_backward can", op_name(op));
    if (request->saved < EPD_SAVED_NONE || request->saved > EPD_SAVED_RECOMPUTE ||
        (request->saved && op != EPD_OP_MOE_FORWARD))
        return error_set(error, EPD_INVALID_ARGUMENT, "%s: saved mode %d, want %s", op_name(op),
                         (int)request->saved, op == EPD_OP_MOE_FORWARD ? "0..2" : "0");
    return check_activation(request, error);
}

enum epd_status plan_check_request(const struct team *team, const struct plan_request *request,
                                   struct epd_error *error)
{
    enum epd_op op = request->op;
    if (op <= EPD_OP_UNSPECIFIED || op >= EPD_OP_COUNT)
        return error_set(error, EPD_INVALID_ARGUMENT, "op %d is unknown", (int)op);
    const uint32_t first = problem_first_rank(&team->problem);
    if (request->rank < first || request->rank - first >= team->problem.ranks_per_node)
        return error_set(error, EPD_INVALID_ARGUMENT, "%s: rank %u, want %u..%u", op_name(op), request->rank,
                         first, first + team->problem.ranks_per_node - 1);
    if (!request->page || request->flag_idx >= EPD_PAGE_MAX_PLANS)
        return error_set(error, EPD_INVALID_ARGUMENT, "%s: flag %u, want 0..%d of a page", op_name(op),
                         request->flag_idx, EPD_PAGE_MAX_PLANS - 1);
    const uint64_t row_bytes = team->problem.hidden * dtype_bytes(team->problem.dtype);
    const uint32_t alignment = team->node->backend->tensor_alignment;
    if (op_is_collective(op) && op != EPD_OP_BARRIER && row_bytes % alignment)
        return error_set(
            error, EPD_INVALID_SHAPE,
            "%s: hidden %u of %s makes rows of %llu bytes, the %s backend wants a multiple of %u",
            op_name(op), team->problem.hidden, dtype_name(team->problem.dtype), (unsigned long long)row_bytes,
            backend_name(team->node->backend->kind), alignment);
    if (op >= EPD_OP_MOE_FORWARD && team->problem.ffn == 0)
        return error_set(error, EPD_INVALID_ARGUMENT, "%s: the group was joined with ffn 0", op_name(op));
    if (check_context(team, request, error) || check_crossing(team, request, error))
        return error->status;
    return check_modes(request, error);
}

enum epd_status plan_check_bound(struct plan *plan, const struct plan_request *request,
                                 struct epd_error *error)
{
    size_t n_gradients = 0;
    for (size_t i = 0; i < N_GRADIENT_ROLES; i++)
        n_gradients += plan_has(plan, gradient_roles[i]);
    if (plan->delay_wgrad && n_gradients)
        return error_set(error, EPD_INVALID_ARGUMENT,
                         "%s delays the weight gradients: bind dw1, db1, dw2, db2 to a moe_wgrad plan",
                         op_name(plan->op));
    if (plan->op == EPD_OP_MOE_WGRAD && !n_gradients)
        return error_set(error, EPD_INVALID_ARGUMENT, "%s: none of dw1, db1, dw2, db2 is bound",
                         op_name(plan->op));
    plan->saved_parts = prepare_saved_parts(plan);
    plan->saved_bytes = saved_bytes(&plan->team->problem, plan->saved_parts);
    if (plan->saved_bytes > request->saved_budget_bytes)
        return error_set(error, EPD_QUOTA, "%s: saved context of %llu bytes, the budget has %llu",
                         op_name(plan->op), (unsigned long long)plan->saved_bytes,
                         (unsigned long long)request->saved_budget_bytes);
    return EPD_OK;
}

/* FNV-1a. */
static uint64_t hash_bytes(uint64_t hash, const void *data, size_t n_bytes)
{
    const unsigned char *bytes = data;
    for (size_t i = 0; i < n_bytes; i++)
        hash = (hash ^ bytes[i]) * 0x100000001b3u;
    return hash;
}

static uint64_t hash_problem(const struct problem *problem)
{
    const uint64_t values[] = {
        problem->world_size, problem->n_experts,
        problem->top_k,      problem->hidden,
        problem->ffn,        problem->max_tokens,
        problem->alignment,  problem->dtype,
        problem->overflow,   (uint64_t)problem->capacity_rows,
    };
    return hash_bytes(0xcbf29ce484222325u, values, sizeof values);
}

void plan_check_fill_key(struct plan *plan)
{
    struct plan_key *key = &plan->key;
    memset(key, 0, sizeof *key);
    key->op = plan->op;
    key->layout = plan->layout;
    key->activation = plan->activation;
    key->saved = plan->saved;
    key->accumulate = (uint64_t)plan->accumulate;
    key->delay_wgrad = (uint64_t)plan->delay_wgrad;
    key->crossing = plan->crossing;
    key->bound = plan->bindings.bound;
    key->context_hash = plan->context ? plan->context->shape_hash : 0;
    for (int role = 0; role < EPD_ROLE_COUNT; role++)
        key->dtypes[role] = plan->bindings.tensors[role].dtype;
    plan->shape_hash = hash_bytes(hash_problem(&plan->team->problem), key, sizeof *key);
}

static enum epd_status mismatch(struct epd_error *error, const struct plan *plan, const char *property,
                                const char *given, const char *wanted)
{
    return error_set(error, EPD_PLAN_MISMATCH, "rank %u %s: %s is %s, rank 0 has %s", plan->rank,
                     op_name(plan->op), property, given, wanted);
}

static enum epd_status mismatch_number(struct epd_error *error, const struct plan *plan, const char *property,
                                       uint64_t given, uint64_t wanted)
{
    char given_text[24], wanted_text[24];
    snprintf(given_text, sizeof given_text, "%llu", (unsigned long long)given);
    snprintf(wanted_text, sizeof wanted_text, "%llu", (unsigned long long)wanted);
    return mismatch(error, plan, property, given_text, wanted_text);
}

static enum epd_status compare_tensors(const struct plan *first, const struct plan *plan,
                                       struct epd_error *error)
{
    for (int role = 1; role < EPD_ROLE_COUNT; role++) {
        int given = plan_has(plan, (enum epd_role)role), wanted = plan_has(first, (enum epd_role)role);
        if (given != wanted)
            return mismatch(error, plan, role_name((enum epd_role)role), given ? "bound" : "not bound",
                            wanted ? "it bound" : "it not bound");
        if (plan->key.dtypes[role] != first->key.dtypes[role])
            return error_set(error, EPD_PLAN_MISMATCH, "rank %u %s: dtype of %s is %s, rank 0 has %s",
                             plan->rank, op_name(plan->op), role_name((enum epd_role)role),
                             dtype_name((enum epd_dtype)plan->key.dtypes[role]),
                             dtype_name((enum epd_dtype)first->key.dtypes[role]));
    }
    return EPD_OK;
}

static enum epd_status compare_plans(const struct plan *first, const struct plan *plan,
                                     struct epd_error *error)
{
    const struct plan_key *given = &plan->key, *wanted = &first->key;
    if (given->op != wanted->op)
        return mismatch(error, plan, "op", op_name(plan->op), op_name(first->op));
    if (given->activation != wanted->activation)
        return mismatch(error, plan, "activation", activation_name(plan->activation),
                        activation_name(first->activation));
    if (given->layout != wanted->layout)
        return mismatch_number(error, plan, "layout", given->layout, wanted->layout);
    if (given->saved != wanted->saved)
        return mismatch_number(error, plan, "saved mode", given->saved, wanted->saved);
    if (given->accumulate != wanted->accumulate)
        return mismatch_number(error, plan, "accumulate", given->accumulate, wanted->accumulate);
    if (given->delay_wgrad != wanted->delay_wgrad)
        return mismatch_number(error, plan, "delay_wgrad", given->delay_wgrad, wanted->delay_wgrad);
    if (compare_tensors(first, plan, error))
        return error->status;
    if (given->context_hash != wanted->context_hash)
        return error_set(error, EPD_PLAN_MISMATCH,
                         "rank %u %s: its context plan is of another kind than rank 0's", plan->rank,
                         op_name(plan->op));
    return EPD_OK;
}

/* The contexts of all ranks must be one joined set: their steps are the same steps. */
static enum epd_status compare_contexts(const struct plan *first, const struct plan *plan,
                                        struct epd_error *error)
{
    if (!plan->context)
        return EPD_OK;
    if (!plan->context->set_id)
        return error_set(error, EPD_PLAN_MISMATCH, "rank %u %s: its context plan is not joined", plan->rank,
                         op_name(plan->op));
    if (plan->context->set_id != first->context->set_id)
        return error_set(error, EPD_PLAN_MISMATCH,
                         "rank %u %s: its context plan belongs to other plans than rank 0's", plan->rank,
                         op_name(plan->op));
    return EPD_OK;
}

enum epd_status plan_check_join(struct plan *const *plans, uint32_t n_plans, struct epd_error *error)
{
    const struct plan *first = plans[0];
    uint32_t wanted = op_is_collective(first->op) ? first->team->problem.ranks_per_node : 1;
    if (n_plans != wanted)
        return error_set(error, EPD_PLAN_MISMATCH, "%s: %u plans, want %u", op_name(first->op), n_plans,
                         wanted);
    for (uint32_t i = 0; i < n_plans; i++) {
        const struct plan *plan = plans[i];
        if (plan->dead)
            return error_set(error, EPD_UNKNOWN_ID, "rank %u %s: the plan was destroyed", plan->rank,
                             op_name(plan->op));
        if (plan->team != first->team ||
            (n_plans > 1 && plan->rank != problem_first_rank(&plan->team->problem) + i))
            return error_set(error, EPD_PLAN_MISMATCH, "%s: plan %u is of another group or of rank %u",
                             op_name(plan->op), i, plan->rank);
        if (compare_plans(first, plan, error) || compare_contexts(first, plan, error))
            return error->status;
    }
    return EPD_OK;
}
