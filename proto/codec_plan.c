/* plan_create: the bindings of struct message are tensors and runs of list parts on the wire. */
#include <string.h>

#include "proto/codec_wire.h"

/* Total number of bindings, or an error if a tensor's lists cannot be laid out as bindings. */
static enum epd_status count_bindings(const Epd__V1__PlanCreate *plan, uint32_t *n_bindings,
                                      struct epd_error *error)
{
    size_t total = 0;

    if (plan->n_tensors > EPD_MAX_TENSORS)
        return error_set(error, EPD_PROTOCOL, "plan_create tensors: given %zu, want at most %d",
                         plan->n_tensors, EPD_MAX_TENSORS);
    for (size_t i = 0; i < plan->n_tensors; i++) {
        const Epd__V1__Tensor *tensor = plan->tensors[i];
        size_t n = tensor->n_buffer_id;

        if (tensor->n_shape < 1 || tensor->n_shape > 3)
            return error_set(error, EPD_PROTOCOL, "plan_create tensor %zu shape: %zu dimensions, want 1..3",
                             i, tensor->n_shape);
        if (n != tensor->n_offset || n < 1 || (tensor->n_parts == 0 && n != 1))
            return error_set(
                error, EPD_PROTOCOL,
                "plan_create tensor %zu: %zu buffer_id and %zu offset, want as many of both, at least "
                "1, and 1 unless it is a list",
                i, n, tensor->n_offset);
        total += n;
    }
    if (total > EPD_MAX_BINDINGS)
        return error_set(error, EPD_PROTOCOL, "plan_create bindings: given %zu, want at most %d", total,
                         EPD_MAX_BINDINGS);
    *n_bindings = (uint32_t)total;
    return EPD_OK;
}

static struct message_binding *read_tensor(const Epd__V1__Tensor *from, struct message_binding *to)
{
    for (size_t i = 0; i < from->n_buffer_id; i++, to++) {
        to->role = (enum epd_role)from->role;
        to->part_idx = from->first_part + (uint32_t)i;
        to->n_parts = from->n_parts;
        to->buffer_id = from->buffer_id[i];
        to->offset = from->offset[i];
        to->dtype = (enum epd_dtype)from->dtype;
        to->n_dims = (uint32_t)from->n_shape;
        memcpy(to->shape, from->shape, from->n_shape * sizeof to->shape[0]);
    }
    return to;
}

enum epd_status wire_read_plan_create(const Epd__V1__Datagram *datagram, struct arena *arena,
                                      struct message *message, struct epd_error *error)
{
    const Epd__V1__PlanCreate *from = datagram->plan_create;
    struct message_plan_create *to = &message->plan_create;

    memset(to, 0, sizeof *to);
    to->group_id = from->group_id;
    to->op = (enum epd_op)from->op;
    to->context_plan_id = from->context_plan_id;
    to->layout = (enum epd_gemm_layout)from->layout;
    to->activation = (enum epd_activation)from->activation;
    to->saved = (enum epd_saved)from->saved;
    to->accumulate = from->accumulate != 0;
    to->delay_wgrad = from->delay_wgrad != 0;
    to->crossing = (enum epd_crossing)from->crossing;
    if (count_bindings(from, &to->n_bindings, error))
        return error->status;
    to->bindings = arena_alloc(arena, to->n_bindings * sizeof to->bindings[0]);
    if (!to->bindings)
        return error_set(error, EPD_PROTOCOL, "plan_create: %u bindings need more than %zu bytes to unpack",
                         to->n_bindings, arena->size);
    struct message_binding *next = to->bindings;
    for (size_t i = 0; i < from->n_tensors; i++)
        next = read_tensor(from->tensors[i], next);
    return EPD_OK;
}

/* b continues a's run: the next part of the same list, alike in everything but its place. */
static int continues_run(const struct message_binding *a, const struct message_binding *b)
{
    return a->n_parts > 0 && b->n_parts == a->n_parts && b->part_idx == a->part_idx + 1 &&
           b->role == a->role && b->dtype == a->dtype && b->n_dims == a->n_dims &&
           memcmp(a->shape, b->shape, a->n_dims * sizeof a->shape[0]) == 0;
}

static void start_run(const struct message_binding *from, Epd__V1__Tensor *to)
{
    epd__v1__tensor__init(to);
    to->role = (Epd__V1__Role)from->role;
    to->dtype = (Epd__V1__Dtype)from->dtype;
    to->n_shape = from->n_dims;
    to->shape = (int64_t *)from->shape;
    to->n_parts = from->n_parts;
    to->first_part = from->part_idx;
}

enum epd_status wire_write_plan_create(const struct message *message, struct wire *wire,
                                       struct epd_error *error)
{
    const struct message_plan_create *from = &message->plan_create;
    Epd__V1__PlanCreate *to = &wire->plan_create.plan;
    Epd__V1__Tensor *run = NULL;

    epd__v1__plan_create__init(to);
    to->group_id = from->group_id;
    to->op = (Epd__V1__Op)from->op;
    to->context_plan_id = from->context_plan_id;
    to->layout = (Epd__V1__GemmLayout)from->layout;
    to->activation = (Epd__V1__Activation)from->activation;
    to->saved = (Epd__V1__Saved)from->saved;
    to->accumulate = from->accumulate != 0;
    to->delay_wgrad = from->delay_wgrad != 0;
    to->crossing = (Epd__V1__Crossing)from->crossing;
    to->tensors = wire->plan_create.tensor_list;
    for (uint32_t i = 0; i < from->n_bindings; i++) {
        const struct message_binding *binding = &from->bindings[i];

        if (!run || !continues_run(binding - 1, binding)) {
            if (to->n_tensors == EPD_MAX_TENSORS)
                return error_set(error, EPD_PROTOCOL,
                                 "plan_create bindings: more than %d tensors and runs of parts",
                                 EPD_MAX_TENSORS);
            run = &wire->plan_create.tensors[to->n_tensors];
            to->tensors[to->n_tensors++] = run;
            start_run(binding, run);
            run->buffer_id = &wire->plan_create.buffer_ids[i];
            run->offset = &wire->plan_create.offsets[i];
        }
        run->buffer_id[run->n_buffer_id++] = binding->buffer_id;
        run->offset[run->n_offset++] = binding->offset;
    }
    wire->datagram.plan_create = to;
    return EPD_OK;
}
