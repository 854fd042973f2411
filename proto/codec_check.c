/* Every range of a message that depends on nothing but the message, checked on the plain struct, so that what
 * a sender refuses to send and what a receiver refuses to take are the same by construction. */
#include <string.h>

#include "proto/codec_wire.h"
#include "proto/page.h"

/* Each check returns EPD_OK or sets *error, so that a kind's checks read as one chain of ||. */
static enum epd_status check_range(struct epd_error *error, const char *field, uint64_t given, uint64_t min,
                                   uint64_t max)
{
    if (given >= min && given <= max)
        return EPD_OK;
    return error_set(error, EPD_PROTOCOL, "%s: given %llu, want %llu..%llu", field, (unsigned long long)given,
                     (unsigned long long)min, (unsigned long long)max);
}

static enum epd_status check_id(struct epd_error *error, const char *field, uint64_t given)
{
    if (given > 0)
        return EPD_OK;
    return error_set(error, EPD_PROTOCOL, "%s: given 0, want an id", field);
}

/* Words are compared unsigned: a negative wire number is a large one here. */
static enum epd_status check_word(struct epd_error *error, const char *field, unsigned given, unsigned min,
                                  unsigned max)
{
    return check_range(error, field, given, min, max);
}

static enum epd_status check_text(struct epd_error *error, const char *field, const char *text, size_t room)
{
    size_t length = strnlen(text, room);

    if (length == room)
        return error_set(error, EPD_PROTOCOL, "%s: %zu bytes without an end, want at most %zu", field, room,
                         room - 1);
    for (size_t i = 0; i < length; i++) {
        unsigned char c = (unsigned char)text[i];

        if (c < 0x20 || c == 0x7f)
            return error_set(error, EPD_PROTOCOL,
                             "%s: byte 0x%02x at %zu, want text without control characters", field, c, i);
    }
    return EPD_OK;
}

/* A failure travels as a status of the table that is not EPD_OK. */
static enum epd_status check_failure(struct epd_error *error, const char *field, enum epd_status given)
{
    if (given != EPD_OK && status_known((uint32_t)given))
        return EPD_OK;
    return error_set(error, EPD_PROTOCOL, "%s: given %u, want the number of a failure", field,
                     (unsigned)given);
}

static enum epd_status check_request_id(const struct message *message, struct epd_error *error)
{
    switch (message->kind) {
    case MESSAGE_LAUNCH:
    case MESSAGE_CLOSED:
        if (message->request_id == 0)
            return EPD_OK;
        return error_set(error, EPD_PROTOCOL, "%s request_id: given %llu, want 0",
                         message_kind_name(message->kind), (unsigned long long)message->request_id);
    case MESSAGE_REPLY_ERROR:
        return EPD_OK;
    default:
        if (message->request_id != 0)
            return EPD_OK;
        return error_set(error, EPD_PROTOCOL, "%s request_id: given 0, want an id",
                         message_kind_name(message->kind));
    }
}

static enum epd_status check_hello(const struct message_hello *hello, struct epd_error *error)
{
    if (check_range(error, "hello major", hello->major, 1, UINT32_MAX))
        return error->status;
    return check_text(error, "hello client_name", hello->client_name, sizeof hello->client_name);
}

static enum epd_status check_alignment(uint32_t alignment, struct epd_error *error)
{
    if (alignment >= 1 && alignment <= EPD_MAX_ALIGNMENT && (alignment & (alignment - 1)) == 0)
        return EPD_OK;
    return error_set(error, EPD_PROTOCOL, "group_join alignment: given %u, want a power of two up to %d",
                     alignment, EPD_MAX_ALIGNMENT);
}

static enum epd_status check_experts(uint32_t n_experts, uint32_t world_size, struct epd_error *error)
{
    if (n_experts == 0 || n_experts % world_size != 0)
        return error_set(error, EPD_PROTOCOL,
                         "group_join n_experts: given %u, want a multiple of world_size %u", n_experts,
                         world_size);
    if (n_experts / world_size > EPD_MAX_LOCAL_EXPERTS)
        return error_set(error, EPD_PROTOCOL,
                         "group_join n_experts: given %u, want at most %d for each of %u ranks", n_experts,
                         EPD_MAX_LOCAL_EXPERTS, world_size);
    return EPD_OK;
}

/* The widest row kept per slot is hidden or the 2 * ffn pre-activations, at most 4 bytes each. */
static enum epd_status check_capacity(const struct message_group_config *config, struct epd_error *error)
{
    uint64_t columns = config->hidden > 2u * config->ffn ? config->hidden : 2u * config->ffn;
    int64_t most = (int64_t)(INT64_MAX / (columns * 4));

    if (config->capacity_rows >= 0 && config->capacity_rows <= most)
        return EPD_OK;
    return error_set(error, EPD_PROTOCOL, "group_join capacity_rows: given %lld, want 0..%lld",
                     (long long)config->capacity_rows, (long long)most);
}

static enum epd_status check_group_config(const struct message_group_config *config, uint32_t world_size,
                                          struct epd_error *error)
{
    uint32_t max_top_k = config->n_experts < EPD_MAX_TOP_K ? config->n_experts : EPD_MAX_TOP_K;

    if (check_experts(config->n_experts, world_size, error) ||
        check_range(error, "group_join top_k", config->top_k, 1, max_top_k) ||
        check_range(error, "group_join hidden", config->hidden, 1, EPD_MAX_HIDDEN) ||
        check_range(error, "group_join ffn", config->ffn, 0, EPD_MAX_FFN) ||
        check_range(error, "group_join max_tokens", config->max_tokens, 1, EPD_MAX_TOKENS) ||
        check_range(error, "group_join n_nodes", config->n_nodes, 0, EPD_MAX_NODES) ||
        check_capacity(config, error) || check_alignment(config->alignment, error))
        return error->status;
    if (config->dtype != EPD_F32 && config->dtype != EPD_BF16 && config->dtype != EPD_F16)
        return error_set(error, EPD_PROTOCOL, "group_join dtype: given %u (%s), want f32, bf16 or f16",
                         (unsigned)config->dtype, dtype_name(config->dtype));
    return check_word(error, "group_join overflow", config->overflow, EPD_OVERFLOW_ERROR, EPD_OVERFLOW_DROP);
}

static enum epd_status check_group_join(const struct message_group_join *join, struct epd_error *error)
{
    if (check_text(error, "group_join name", join->name, sizeof join->name))
        return error->status;
    if (join->name[0] == 0)
        return error_set(error, EPD_PROTOCOL, "group_join name: empty, want 1..%d bytes",
                         EPD_MAX_NAME_BYTES - 1);
    if (check_range(error, "group_join world_size", join->world_size, 1, EPD_MAX_WORLD_SIZE) ||
        check_range(error, "group_join rank", join->rank, 0, join->world_size - 1))
        return error->status;
    return check_group_config(&join->config, join->world_size, error);
}

static enum epd_status check_buffer_alloc(const struct message_buffer_alloc *alloc, struct epd_error *error)
{
    if (check_id(error, "buffer_alloc group_id", alloc->group_id))
        return error->status;
    return check_range(error, "buffer_alloc bytes", alloc->bytes, 1, INT64_MAX);
}

static enum epd_status check_buffer_register(const struct message_buffer_register *buffer,
                                             struct epd_error *error)
{
    if (check_id(error, "buffer_register group_id", buffer->group_id) ||
        check_word(error, "buffer_register kind", buffer->kind, EPD_MEMORY_MEMFD, EPD_MEMORY_CUDA_VMM) ||
        check_range(error, "buffer_register bytes", buffer->bytes, 1, INT64_MAX))
        return error->status;
    /* The end of the range is what may not overflow. */
    if (check_range(error, "buffer_register offset", buffer->offset, 0, INT64_MAX - buffer->bytes))
        return error->status;
    if (buffer->allocation_bytes == 0)
        return EPD_OK;
    const uint64_t least = buffer->offset + buffer->bytes;
    return check_range(error, "buffer_register allocation_bytes", buffer->allocation_bytes, least,
                       buffer->kind == EPD_MEMORY_CUDA_VMM ? INT64_MAX : least);
}

/* Bytes of a shape, counting empty dimensions as 1, so that no stride computed from it overflows either. */
static enum epd_status check_shape(const struct message_binding *binding, uint32_t idx, int64_t *bytes,
                                   struct epd_error *error)
{
    int64_t total = (int64_t)dtype_bytes(binding->dtype);

    for (uint32_t i = 0; i < binding->n_dims; i++) {
        int64_t dim = binding->shape[i];

        if (dim < 0)
            return error_set(error, EPD_PROTOCOL,
                             "plan_create binding %u (%s) shape[%u]: given %lld, want 0 or more", idx,
                             role_name(binding->role), i, (long long)dim);
        if (__builtin_mul_overflow(total, dim ? dim : 1, &total))
            return error_set(error, EPD_PROTOCOL,
                             "plan_create binding %u (%s) shape: shape[%u] = %lld makes more than 2^63 bytes",
                             idx, role_name(binding->role), i, (long long)dim);
    }
    *bytes = total;
    return EPD_OK;
}

static enum epd_status check_part(const struct message_binding *binding, uint32_t idx,
                                  struct epd_error *error)
{
    if (binding->n_parts > EPD_MAX_LOCAL_EXPERTS)
        return error_set(error, EPD_PROTOCOL, "plan_create binding %u (%s) n_parts: given %u, want 0..%d",
                         idx, role_name(binding->role), binding->n_parts, EPD_MAX_LOCAL_EXPERTS);
    if (binding->part_idx >= binding->n_parts && (binding->n_parts > 0 || binding->part_idx > 0))
        return error_set(error, EPD_PROTOCOL, "plan_create binding %u (%s) part_idx: given %u of %u parts",
                         idx, role_name(binding->role), binding->part_idx, binding->n_parts);
    return EPD_OK;
}

static enum epd_status check_binding(const struct message_binding *binding, uint32_t idx,
                                     struct epd_error *error)
{
    int64_t bytes = 0;
    uint64_t end;

    if (check_word(error, "plan_create binding role", binding->role, EPD_ROLE_X, EPD_ROLE_COUNT - 1) ||
        check_word(error, "plan_create binding dtype", binding->dtype, EPD_F32, EPD_I64) ||
        check_range(error, "plan_create binding n_dims", binding->n_dims, 1, 3) ||
        check_id(error, "plan_create binding buffer_id", binding->buffer_id) ||
        check_part(binding, idx, error) || check_shape(binding, idx, &bytes, error))
        return error->status;
    if (__builtin_add_overflow(binding->offset, (uint64_t)bytes, &end) || end > INT64_MAX)
        return error_set(
            error, EPD_PROTOCOL,
            "plan_create binding %u (%s) offset: given %llu for %lld bytes, want an end below 2^63", idx,
            role_name(binding->role), (unsigned long long)binding->offset, (long long)bytes);
    return EPD_OK;
}

static enum epd_status check_plan_create(const struct message_plan_create *plan, struct epd_error *error)
{
    if (check_id(error, "plan_create group_id", plan->group_id) ||
        check_word(error, "plan_create op", plan->op, EPD_OP_BARRIER, EPD_OP_COUNT - 1) ||
        check_word(error, "plan_create layout", plan->layout, EPD_GEMM_UNSPECIFIED, EPD_GEMM_NT) ||
        check_word(error, "plan_create activation", plan->activation, EPD_ACTIVATION_UNSPECIFIED,
                   EPD_RELU2) ||
        check_word(error, "plan_create saved", plan->saved, EPD_SAVED_NONE, EPD_SAVED_RECOMPUTE) ||
        check_word(error, "plan_create crossing", plan->crossing, EPD_CROSSING_UNSPECIFIED,
                   EPD_CROSSING_STATIC) ||
        check_range(error, "plan_create bindings", plan->n_bindings, 0, EPD_MAX_BINDINGS))
        return error->status;
    for (uint32_t i = 0; i < plan->n_bindings; i++)
        if (check_binding(&plan->bindings[i], i, error))
            return error->status;
    return EPD_OK;
}

static enum epd_status check_launch(const struct message_launch *launch, struct epd_error *error)
{
    if (check_id(error, "launch plan_id", launch->plan_id) ||
        check_range(error, "launch n_tokens", launch->n_tokens, 0, EPD_MAX_TOKENS) ||
        check_range(error, "launch n_repeats", launch->n_repeats, 1, EPD_MAX_REPEATS))
        return error->status;
    return check_range(error, "launch seq", launch->seq, 1, UINT64_MAX - launch->n_repeats);
}

static enum epd_status check_control(const struct message_control *control, struct epd_error *error)
{
    if (check_word(error, "control verb", control->verb, CONTROL_STATUS, CONTROL_VERB_COUNT - 1) ||
        check_text(error, "control reason", control->reason, sizeof control->reason))
        return error->status;
    if (control->verb == CONTROL_EVICT)
        return check_id(error, "control session_id", control->session_id);
    if (control->session_id != 0 || control->reason[0] != 0)
        return error_set(error, EPD_PROTOCOL,
                         "control session_id %llu and reason: given, but only evict takes them",
                         (unsigned long long)control->session_id);
    return EPD_OK;
}

static enum epd_status check_reply_error(const struct epd_error *reply, struct epd_error *error)
{
    if (check_failure(error, "reply_error status", reply->status))
        return error->status;
    return check_text(error, "reply_error text", reply->text, sizeof reply->text);
}

static enum epd_status check_reply_hello(const struct message_reply_hello *hello, struct epd_error *error)
{
    if (check_range(error, "reply_hello major", hello->major, 1, UINT32_MAX) ||
        check_id(error, "reply_hello session_id", hello->session_id) ||
        check_word(error, "reply_hello backend", hello->backend, EPD_BACKEND_HOST, EPD_BACKEND_CUDA) ||
        check_range(error, "reply_hello page_bytes", hello->page_bytes, 1, INT64_MAX) ||
        check_text(error, "reply_hello daemon_version", hello->daemon_version,
                   sizeof hello->daemon_version) ||
        check_range(error, "reply_hello n_devices", hello->n_devices, 0, EPD_MAX_DEVICES))
        return error->status;
    for (uint32_t i = 0; i < hello->n_devices; i++)
        if (check_range(error, "reply_hello device_idx", hello->devices[i].device_idx, 0,
                        EPD_MAX_DEVICES - 1) ||
            check_text(error, "reply_hello device name", hello->devices[i].name,
                       sizeof hello->devices[i].name))
            return error->status;
    return EPD_OK;
}

static enum epd_status check_reply_group(const struct message_reply_group *group, struct epd_error *error)
{
    if (check_id(error, "reply_group group_id", group->group_id) ||
        check_range(error, "reply_group device_idx", group->device_idx, 0, EPD_MAX_DEVICES - 1) ||
        check_range(error, "reply_group n_local_experts", group->n_local_experts, 1, EPD_MAX_LOCAL_EXPERTS))
        return error->status;
    /* A negative number of rows is a large one unsigned. */
    if (check_range(error, "reply_group first_expert", group->first_expert, 0,
                    (EPD_MAX_WORLD_SIZE - 1) * EPD_MAX_LOCAL_EXPERTS) ||
        check_range(error, "reply_group capacity_rows", (uint64_t)group->capacity_rows, 1, INT64_MAX))
        return error->status;
    return EPD_OK;
}

static enum epd_status check_reply_buffer(const struct message_reply_buffer *buffer, struct epd_error *error)
{
    if (check_id(error, "reply_buffer buffer_id", buffer->buffer_id))
        return error->status;
    return check_range(error, "reply_buffer bytes", buffer->bytes, 1, INT64_MAX);
}

static enum epd_status check_reply_plan(const struct message_reply_plan *plan, struct epd_error *error)
{
    if (check_id(error, "reply_plan plan_id", plan->plan_id))
        return error->status;
    return check_range(error, "reply_plan flag_idx", plan->flag_idx, 0, EPD_PAGE_MAX_PLANS - 1);
}

static enum epd_status check_closed(const struct message_closed *closed, struct epd_error *error)
{
    if (check_failure(error, "closed status", closed->status))
        return error->status;
    return check_text(error, "closed reason", closed->reason, sizeof closed->reason);
}

enum epd_status codec_check(const struct message *message, struct epd_error *error)
{
    if (message->kind <= MESSAGE_NONE || message->kind >= MESSAGE_KIND_COUNT)
        return error_set(error, EPD_PROTOCOL, "message kind: given %u, want 1..%d", (unsigned)message->kind,
                         MESSAGE_KIND_COUNT - 1);
    if (check_request_id(message, error))
        return error->status;
    switch (message->kind) {
    case MESSAGE_HELLO:
        return check_hello(&message->hello, error);
    case MESSAGE_GROUP_JOIN:
        return check_group_join(&message->group_join, error);
    case MESSAGE_GROUP_LEAVE:
        return check_id(error, "group_leave id", message->group_leave.id);
    case MESSAGE_BUFFER_ALLOC:
        return check_buffer_alloc(&message->buffer_alloc, error);
    case MESSAGE_BUFFER_REGISTER:
        return check_buffer_register(&message->buffer_register, error);
    case MESSAGE_BUFFER_RELEASE:
        return check_id(error, "buffer_release id", message->buffer_release.id);
    case MESSAGE_PLAN_CREATE:
        return check_plan_create(&message->plan_create, error);
    case MESSAGE_PLAN_DESTROY:
        return check_id(error, "plan_destroy id", message->plan_destroy.id);
    case MESSAGE_LAUNCH:
        return check_launch(&message->launch, error);
    case MESSAGE_CONTROL:
        return check_control(&message->control, error);
    case MESSAGE_REPLY_ERROR:
        return check_reply_error(&message->reply_error, error);
    case MESSAGE_REPLY_HELLO:
        return check_reply_hello(&message->reply_hello, error);
    case MESSAGE_REPLY_GROUP:
        return check_reply_group(&message->reply_group, error);
    case MESSAGE_REPLY_BUFFER:
        return check_reply_buffer(&message->reply_buffer, error);
    case MESSAGE_REPLY_PLAN:
        return check_reply_plan(&message->reply_plan, error);
    case MESSAGE_REPLY_DOCUMENT:
        return check_range(error, "reply_document bytes", message->reply_document.bytes, 1, INT64_MAX);
    case MESSAGE_CLOSED:
        return check_closed(&message->closed, error);
    case MESSAGE_STATS:
    case MESSAGE_REPLY_OK:
    case MESSAGE_NONE:
    case MESSAGE_KIND_COUNT:
        break;
    }
    return EPD_OK;
}
