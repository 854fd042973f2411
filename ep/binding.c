#include "ep/binding.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "ep/binding_rules.h"
#include "ep/memory_impl.h"

/* One check of one plan. */
struct binding_check {
    const struct binding_context *context;
    const struct plan_request *request;
    struct binding_set *set;
    enum epd_dtype free_dtype;
    struct epd_error *error;
};

#define NAME_BYTES 64

/* Largest N, K or F of a local op: what a BLAS int holds with room to spare. */
#define BINDING_MAX_COLUMNS (1 << 24)

static const struct {
    const char *name;
    int64_t min, max; /* of those that tensors set; max 0: set by the group */
} dim_table[DIM_COUNT] = {
    [DIM_TOP_K] = {"top_k", 0, 0},
    [DIM_HIDDEN] = {"hidden", 0, 0},
    [DIM_CAPACITY] = {"capacity", 0, 0},
    [DIM_LOCAL] = {"local experts", 0, 0},
    [DIM_LOCAL_PLUS_1] = {"local experts + 1", 0, 0},
    [DIM_FFN] = {"ffn", 0, 0},
    [DIM_FFN_TWICE] = {"2 x ffn", 0, 0},
    [DIM_TOKENS] = {"T of the plan", 0, EPD_MAX_TOKENS},
    [DIM_ROWS] = {"max_rows", 0, INT32_MAX},
    [DIM_N] = {"N", 1, BINDING_MAX_COLUMNS},
    [DIM_K] = {"K", 1, BINDING_MAX_COLUMNS},
    [DIM_GROUPS] = {"groups", 1, EPD_MAX_LOCAL_EXPERTS},
    [DIM_GROUPS_PLUS_1] = {"groups + 1", 2, EPD_MAX_LOCAL_EXPERTS + 1},
    [DIM_ACT] = {"F", 1, BINDING_MAX_COLUMNS},
    [DIM_ACT_TWICE] = {"2 x F", 2, 2 * BINDING_MAX_COLUMNS},
};

/* "rows" of [rows, columns]; dimension `i` of `n`. */
static const char *dim_label(uint32_t i, uint32_t n)
{
    static const char *const labels[3] = {"experts", "rows", "columns"};
    return n == 1 ? "length" : labels[i + 3 - n];
}

static void set_group_dims(const struct problem *problem, int64_t *dims)
{
    for (int i = 0; i < DIM_COUNT; i++)
        dims[i] = -1;
    dims[DIM_TOP_K] = problem->top_k;
    dims[DIM_HIDDEN] = problem->hidden;
    dims[DIM_CAPACITY] = problem->capacity_rows;
    dims[DIM_LOCAL] = problem->n_local_experts;
    dims[DIM_LOCAL_PLUS_1] = (int64_t)problem->n_local_experts + 1;
    dims[DIM_FFN] = problem->ffn;
    dims[DIM_FFN_TWICE] = 2 * (int64_t)problem->ffn;
}

/* "moe_forward w1[3]" */
static const char *tensor_name(const struct binding_check *check, const struct plan_binding *binding,
                               char name[NAME_BYTES])
{
    const char *op = op_name(check->request->op), *role = role_name(binding->role);
    if (binding->n_parts)
        snprintf(name, NAME_BYTES, "%s %s[%u]", op, role, binding->part_idx);
    else
        snprintf(name, NAME_BYTES, "%s %s", op, role);
    return name;
}

/* Sets a symbol that no tensor has set yet, and the one derived from it. */
static void set_dim(struct binding_check *check, enum binding_dim dim, int64_t given)
{
    int64_t *dims = check->set->dims;
    dims[dim] = given;
    if (dim == DIM_GROUPS)
        dims[DIM_GROUPS_PLUS_1] = given + 1;
    if (dim == DIM_ACT)
        dims[DIM_ACT_TWICE] = 2 * given;
}

static enum epd_status check_dim(struct binding_check *check, const struct plan_binding *binding, uint32_t i,
                                 enum binding_dim dim)
{
    char name[NAME_BYTES];
    int64_t given = binding->shape[i], wanted = check->set->dims[dim];
    const char *label = dim_label(i, binding->n_dims);
    if (wanted >= 0 && given != wanted)
        return error_set(check->error, EPD_INVALID_SHAPE, "%s: %s %lld, want %lld (%s)",
                         tensor_name(check, binding, name), label, (long long)given, (long long)wanted,
                         dim_table[dim].name);
    if (wanted >= 0)
        return EPD_OK;
    int64_t max = dim == DIM_TOKENS ? check->context->problem->max_tokens : dim_table[dim].max;
    if (given < dim_table[dim].min || given > max)
        return error_set(check->error, EPD_INVALID_SHAPE, "%s: %s %lld, want %lld..%lld (%s)",
                         tensor_name(check, binding, name), label, (long long)given,
                         (long long)dim_table[dim].min, (long long)max,
                         dim == DIM_TOKENS ? "max_tokens of the group" : dim_table[dim].name);
    set_dim(check, dim, given);
    return EPD_OK;
}

static enum epd_status check_shape(struct binding_check *check, const struct binding_rule *rule,
                                   const struct plan_binding *binding)
{
    char name[NAME_BYTES];
    uint32_t first = binding->n_parts ? 1 : 0, n_dims = 0;
    while (first + n_dims < 3 && rule->dims[first + n_dims])
        n_dims++;
    if (binding->n_dims != n_dims)
        return error_set(check->error, EPD_INVALID_SHAPE, "%s: %u dimensions, want %u",
                         tensor_name(check, binding, name), binding->n_dims, n_dims);
    for (uint32_t i = 0; i < n_dims; i++)
        if (check_dim(check, binding, i, rule->dims[first + i]))
            return check->error->status;
    return EPD_OK;
}

static int is_float(enum epd_dtype dtype)
{
    return dtype == EPD_F32 || dtype == EPD_BF16 || dtype == EPD_F16;
}

static enum epd_status check_dtype(struct binding_check *check, const struct binding_rule *rule,
                                   const struct plan_binding *binding)
{
    enum epd_dtype given = binding->dtype, group = check->context->problem->dtype;
    enum epd_dtype free_dtype = check->free_dtype;
    const char *wanted = "f32, bf16 or f16";
    char name[NAME_BYTES], either[NAME_BYTES];
    int fits = 0;
    switch (rule->type) {
    case TYPE_GROUP:
        fits = given == group;
        wanted = dtype_name(group);
        break;
    case TYPE_FREE:
        fits = free_dtype ? given == free_dtype : is_float(given);
        if (free_dtype)
            wanted = dtype_name(free_dtype);
        else if (fits)
            check->free_dtype = given;
        break;
    case TYPE_FREE_OR_F32:
        fits = given == EPD_F32 || given == free_dtype;
        snprintf(either, sizeof either, "%s or f32", dtype_name(free_dtype));
        wanted = either;
        break;
    case TYPE_FLOAT:
        fits = is_float(given);
        break;
    case TYPE_F32:
        fits = given == EPD_F32;
        wanted = "f32";
        break;
    case TYPE_I64:
        fits = given == EPD_I64;
        wanted = "i64";
        break;
    case TYPE_INDEX:
        fits = given == EPD_I32 || given == EPD_I64;
        wanted = "i32 or i64";
        break;
    }
    if (!fits)
        return error_set(check->error, EPD_INVALID_DTYPE, "%s: dtype %s, want %s",
                         tensor_name(check, binding, name), dtype_name(given), wanted);
    return EPD_OK;
}

/* Bytes of the tensor; its shape has been checked to be not negative. 0 on overflow with *too_large set. */
static uint64_t tensor_bytes(const struct plan_binding *binding, int *too_large)
{
    uint64_t bytes = dtype_bytes(binding->dtype);
    for (uint32_t i = 0; i < binding->n_dims; i++)
        *too_large |= __builtin_mul_overflow(bytes, (uint64_t)binding->shape[i], &bytes);
    return *too_large ? 0 : bytes;
}

/* Where the tensor lies; NULL if it is empty and has no memory. */
static enum epd_status check_memory(struct binding_check *check, const struct plan_binding *binding,
                                    void **data)
{
    char name[NAME_BYTES];
    const struct memory *memory = binding->memory;
    int too_large = 0;
    uint64_t bytes = tensor_bytes(binding, &too_large);
    uint32_t alignment = check->context->backend->tensor_alignment;
    tensor_name(check, binding, name);
    if (!memory && (bytes || too_large))
        return error_set(check->error, EPD_INVALID_ARGUMENT, "%s: no buffer", name);
    *data = NULL;
    if (!memory)
        return EPD_OK;
    if (memory_device_idx(memory) != check->context->device_idx)
        return error_set(check->error, EPD_INVALID_DEVICE, "%s: on device %u, want device %u of the rank",
                         name, memory_device_idx(memory), check->context->device_idx);
    if (too_large || binding->offset > memory_bytes(memory) || bytes > memory_bytes(memory) - binding->offset)
        return error_set(check->error, EPD_OUT_OF_RANGE, "%s: offset %llu bytes %llu, the buffer has %llu",
                         name, (unsigned long long)binding->offset, (unsigned long long)bytes,
                         (unsigned long long)memory_bytes(memory));
    if (alignment < dtype_bytes(binding->dtype))
        alignment = (uint32_t)dtype_bytes(binding->dtype);
    char *start = (char *)memory_data(memory) + binding->offset;
    if (bytes && (uintptr_t)start % alignment)
        return error_set(check->error, EPD_INVALID_ALIGNMENT, "%s: offset %llu, want a multiple of %u", name,
                         (unsigned long long)binding->offset, alignment);
    *data = start;
    return EPD_OK;
}

static void keep_tensor(struct binding_set *set, const struct plan_binding *binding, void *data)
{
    struct tensor *tensor = &set->tensors[binding->role];
    *tensor = (struct tensor){.dtype = binding->dtype, .n_dims = binding->n_dims, .shape = {1, 1, 1}};
    for (uint32_t i = 0; i < binding->n_dims; i++)
        tensor->shape[i] = binding->shape[i];
    if (binding->n_parts)
        set->parts[binding->role][binding->part_idx] = data;
    else
        tensor->data = data;
    if (binding->memory) {
        memory_bind(binding->memory);
        set->memories[set->n_memories++] = binding->memory;
    }
}

/* A list: every part once, as many as there are experts. */
static enum epd_status check_list(struct binding_check *check, const struct binding_rule *rule,
                                  const struct plan_binding *binding, uint64_t *seen)
{
    char name[NAME_BYTES];
    struct binding_set *set = check->set;
    int64_t wanted = set->dims[rule->dims[0]];
    tensor_name(check, binding, name);
    if (!rule->takes_parts)
        return error_set(check->error, EPD_INVALID_ARGUMENT, "%s: comes as one tensor, not as a list", name);
    if (binding->n_parts != wanted || binding->part_idx >= binding->n_parts)
        return error_set(check->error, EPD_INVALID_ARGUMENT,
                         "%s: part %u of a list of %u, want a list of %lld (%s)", name, binding->part_idx,
                         binding->n_parts, (long long)wanted, dim_table[rule->dims[0]].name);
    uint64_t bit = (uint64_t)1 << (binding->part_idx % 64);
    if (seen[binding->part_idx / 64] & bit)
        return error_set(check->error, EPD_INVALID_ARGUMENT, "%s: bound twice", name);
    seen[binding->part_idx / 64] |= bit;
    if (!set->parts[binding->role]) {
        set->parts[binding->role] = calloc(binding->n_parts, sizeof(void *));
        if (!set->parts[binding->role])
            return error_set(check->error, EPD_NO_MEMORY, "%s: a list of %u", name, binding->n_parts);
        set->n_parts[binding->role] = binding->n_parts;
    }
    return EPD_OK;
}

/* All bindings of one role: none, one tensor, or one whole list. */
static enum epd_status check_role(struct binding_check *check, const struct binding_rule *rule)
{
    const struct plan_request *request = check->request;
    const char *op = op_name(request->op), *role = role_name(rule->role);
    uint64_t seen[EPD_MAX_LOCAL_EXPERTS / 64] = {0};
    uint32_t n = 0, n_parts = 0;
    for (uint32_t i = 0; i < request->n_bindings; i++) {
        const struct plan_binding *binding = &request->bindings[i];
        void *data;
        if (binding->role != rule->role)
            continue;
        if (n && (!n_parts || binding->n_parts != n_parts))
            return error_set(check->error, EPD_INVALID_ARGUMENT, "%s %s: bound twice", op, role);
        n_parts = binding->n_parts;
        n++;
        if (n_parts && check_list(check, rule, binding, seen))
            return check->error->status;
        if (check_dtype(check, rule, binding) || check_shape(check, rule, binding) ||
            check_memory(check, binding, &data))
            return check->error->status;
        if (n > 1 && binding->dtype != check->set->tensors[rule->role].dtype)
            return error_set(check->error, EPD_INVALID_DTYPE,
                             "%s %s[%u]: dtype %s, want %s (the other parts)", op, role, binding->part_idx,
                             dtype_name(binding->dtype), dtype_name(check->set->tensors[rule->role].dtype));
        keep_tensor(check->set, binding, data);
    }
    if (n_parts && n != n_parts)
        return error_set(check->error, EPD_INVALID_ARGUMENT, "%s %s: %u parts of a list of %u", op, role, n,
                         n_parts);
    if (n == 0 && rule->need == BINDING_REQUIRED)
        return error_set(check->error, EPD_INVALID_ARGUMENT, "%s: %s is not bound", op, role);
    if (n)
        check->set->bound |= (uint64_t)1 << rule->role;
    return EPD_OK;
}

static enum epd_status check_roles_known(const struct plan_request *request, const struct binding_rule *rules,
                                         struct epd_error *error)
{
    for (uint32_t i = 0; i < request->n_bindings; i++) {
        const struct binding_rule *rule = rules;
        while (rule->role && rule->role != request->bindings[i].role)
            rule++;
        if (!rule->role)
            return error_set(error, EPD_INVALID_ARGUMENT, "%s takes no %s", op_name(request->op),
                             role_name(request->bindings[i].role));
    }
    return EPD_OK;
}

static enum epd_status check_companions(const struct plan_request *request, const struct binding_rule *rules,
                                        const struct binding_set *set, struct epd_error *error)
{
    for (const struct binding_rule *rule = rules; rule->role; rule++)
        if (rule->needs && binding_has(set, rule->role) && !binding_has(set, rule->needs))
            return error_set(error, EPD_INVALID_ARGUMENT, "%s %s: needs %s too", op_name(request->op),
                             role_name(rule->role), role_name(rule->needs));
    return EPD_OK;
}

enum epd_status binding_check(const struct binding_context *context, const struct plan_request *request,
                              struct binding_set *set, struct epd_error *error)
{
    const struct binding_rule *rules = binding_rules(request->op, request->layout);
    if (!rules)
        return error_set(error, EPD_INVALID_ARGUMENT, "op %d layout %d is unknown", (int)request->op,
                         (int)request->layout);
    if (check_roles_known(request, rules, error))
        return error->status;
    struct binding_set checked = {0};
    struct binding_check check = {.context = context, .request = request, .set = &checked, .error = error};
    set_group_dims(context->problem, checked.dims);
    if (request->n_bindings) {
        checked.memories = calloc(request->n_bindings, sizeof *checked.memories);
        if (!checked.memories)
            return error_set(error, EPD_NO_MEMORY, "%s: %u tensors", op_name(request->op),
                             request->n_bindings);
    }
    for (const struct binding_rule *rule = rules; rule->role; rule++)
        if (check_role(&check, rule))
            goto fini_set;
    if (check_companions(request, rules, &checked, error))
        goto fini_set;
    *set = checked;
    return EPD_OK;

fini_set:
    binding_fini(&checked);
    return error->status;
}

void binding_fini(struct binding_set *set)
{
    for (uint32_t i = 0; i < set->n_memories; i++)
        memory_unbind(set->memories[i]);
    free(set->memories);
    for (int role = 0; role < EPD_ROLE_COUNT; role++)
        free(set->parts[role]);
    *set = (struct binding_set){0};
}
