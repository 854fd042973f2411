/* What clients and people send: protobuf form <-> struct message. */
#include <string.h>

#include "proto/codec_wire.h"

/* Words travel by number too; the last of each enum tells that none was left out or moved. */
_Static_assert((int)EPD__V1__DTYPE__EPD_F32 == EPD_F32 && (int)EPD__V1__DTYPE__EPD_BF16 == EPD_BF16 &&
                   (int)EPD__V1__DTYPE__EPD_F16 == EPD_F16 && (int)EPD__V1__DTYPE__EPD_I64 == EPD_I64,
               "epd.proto repeats proto/words.h");
_Static_assert((int)EPD__V1__OP__EPD_OP_MOE_WGRAD == EPD_OP_MOE_WGRAD &&
                   (int)EPD__V1__OP__EPD_OP_GROUPED_GEMM == EPD_OP_GROUPED_GEMM,
               "epd.proto repeats proto/words.h");
_Static_assert((int)EPD__V1__ROLE__EPD_ROLE_DB2 == EPD_ROLE_DB2 &&
                   (int)EPD__V1__ROLE__EPD_ROLE_A == EPD_ROLE_A,
               "epd.proto repeats proto/words.h");
_Static_assert((int)EPD__V1__GEMM_LAYOUT__EPD_GEMM_NT == EPD_GEMM_NT &&
                   (int)EPD__V1__ACTIVATION__EPD_RELU2 == EPD_RELU2 &&
                   (int)EPD__V1__OVERFLOW__EPD_OVERFLOW_DROP == EPD_OVERFLOW_DROP &&
                   (int)EPD__V1__SAVED__EPD_SAVED_RECOMPUTE == EPD_SAVED_RECOMPUTE &&
                   (int)EPD__V1__CROSSING__EPD_CROSSING_STATIC == EPD_CROSSING_STATIC &&
                   (int)EPD__V1__MEMORY_KIND__EPD_MEMORY_CUDA_VMM == EPD_MEMORY_CUDA_VMM,
               "epd.proto repeats proto/words.h");
_Static_assert((int)EPD__V1__CONTROL_VERB__CONTROL_FABRIC == CONTROL_FABRIC,
               "epd.proto repeats proto/message.h");

enum epd_status wire_read_hello(const Epd__V1__Datagram *datagram, struct arena *arena,
                                struct message *message, struct epd_error *error)
{
    const Epd__V1__Hello *from = datagram->hello;
    struct message_hello *to = &message->hello;

    (void)arena;
    memset(to, 0, sizeof *to);
    to->major = from->major;
    to->minor = from->minor;
    to->features = from->features;
    return wire_get_text(&from->client_name, to->client_name, sizeof to->client_name, "hello client_name",
                         error);
}

enum epd_status wire_write_hello(const struct message *message, struct wire *wire, struct epd_error *error)
{
    const struct message_hello *from = &message->hello;
    Epd__V1__Hello *to = &wire->hello;

    (void)error;
    epd__v1__hello__init(to);
    to->major = from->major;
    to->minor = from->minor;
    to->features = from->features;
    to->client_name = wire_put_text(from->client_name);
    wire->datagram.hello = to;
    return EPD_OK;
}

static void read_group_config(const Epd__V1__GroupConfig *from, struct message_group_config *to)
{
    to->n_experts = from->n_experts;
    to->top_k = from->top_k;
    to->hidden = from->hidden;
    to->ffn = from->ffn;
    to->max_tokens = from->max_tokens;
    to->capacity_rows = from->capacity_rows;
    to->alignment = from->alignment;
    to->dtype = (enum epd_dtype)from->dtype;
    to->overflow = (enum epd_overflow)from->overflow;
    to->deadline_ms = from->deadline_ms;
    to->n_nodes = from->n_nodes;
}

static void write_group_config(const struct message_group_config *from, Epd__V1__GroupConfig *to)
{
    epd__v1__group_config__init(to);
    to->n_experts = from->n_experts;
    to->top_k = from->top_k;
    to->hidden = from->hidden;
    to->ffn = from->ffn;
    to->max_tokens = from->max_tokens;
    to->capacity_rows = from->capacity_rows;
    to->alignment = from->alignment;
    to->dtype = (Epd__V1__Dtype)from->dtype;
    to->overflow = (Epd__V1__Overflow)from->overflow;
    to->deadline_ms = from->deadline_ms;
    to->n_nodes = from->n_nodes;
}

enum epd_status wire_read_group_join(const Epd__V1__Datagram *datagram, struct arena *arena,
                                     struct message *message, struct epd_error *error)
{
    const Epd__V1__GroupJoin *from = datagram->group_join;
    struct message_group_join *to = &message->group_join;

    (void)arena;
    memset(to, 0, sizeof *to);
    if (wire_get_text(&from->name, to->name, sizeof to->name, "group_join name", error))
        return error->status;
    to->world_size = from->world_size;
    to->rank = from->rank;
    to->has_device = from->device_uuid.len > 0;
    if (to->has_device && wire_get_bytes(&from->device_uuid, to->device_uuid, sizeof to->device_uuid,
                                         "group_join device_uuid", error))
        return error->status;
    if (!from->config)
        return error_set(error, EPD_PROTOCOL, "group_join config: missing");
    read_group_config(from->config, &to->config);
    return EPD_OK;
}

enum epd_status wire_write_group_join(const struct message *message, struct wire *wire,
                                      struct epd_error *error)
{
    const struct message_group_join *from = &message->group_join;
    Epd__V1__GroupJoin *to = &wire->group_join.join;

    (void)error;
    epd__v1__group_join__init(to);
    to->name = wire_put_text(from->name);
    to->world_size = from->world_size;
    to->rank = from->rank;
    if (from->has_device)
        to->device_uuid = wire_put_bytes(from->device_uuid, sizeof from->device_uuid);
    write_group_config(&from->config, &wire->group_join.config);
    to->config = &wire->group_join.config;
    wire->datagram.group_join = to;
    return EPD_OK;
}

/* The three requests that name one id. */
#define WIRE_ID_PAIR(name)                                                                                   \
    enum epd_status wire_read_##name(const Epd__V1__Datagram *datagram, struct arena *arena,                 \
                                     struct message *message, struct epd_error *error)                       \
    {                                                                                                        \
        (void)arena;                                                                                         \
        (void)error;                                                                                         \
        message->name.id = datagram->name->id;                                                               \
        return EPD_OK;                                                                                       \
    }                                                                                                        \
    enum epd_status wire_write_##name(const struct message *message, struct wire *wire,                      \
                                      struct epd_error *error)                                               \
    {                                                                                                        \
        (void)error;                                                                                         \
        epd__v1__##name##__init(&wire->name);                                                                \
        wire->name.id = message->name.id;                                                                    \
        wire->datagram.name = &wire->name;                                                                   \
        return EPD_OK;                                                                                       \
    }
WIRE_ID_PAIR(group_leave)
WIRE_ID_PAIR(buffer_release)
WIRE_ID_PAIR(plan_destroy)
#undef WIRE_ID_PAIR

enum epd_status wire_read_buffer_alloc(const Epd__V1__Datagram *datagram, struct arena *arena,
                                       struct message *message, struct epd_error *error)
{
    (void)arena;
    (void)error;
    message->buffer_alloc.group_id = datagram->buffer_alloc->group_id;
    message->buffer_alloc.bytes = datagram->buffer_alloc->bytes;
    return EPD_OK;
}

enum epd_status wire_write_buffer_alloc(const struct message *message, struct wire *wire,
                                        struct epd_error *error)
{
    Epd__V1__BufferAlloc *to = &wire->buffer_alloc;

    (void)error;
    epd__v1__buffer_alloc__init(to);
    to->group_id = message->buffer_alloc.group_id;
    to->bytes = message->buffer_alloc.bytes;
    wire->datagram.buffer_alloc = to;
    return EPD_OK;
}

enum epd_status wire_read_buffer_register(const Epd__V1__Datagram *datagram, struct arena *arena,
                                          struct message *message, struct epd_error *error)
{
    const Epd__V1__BufferRegister *from = datagram->buffer_register;
    struct message_buffer_register *to = &message->buffer_register;

    (void)arena;
    memset(to, 0, sizeof *to);
    to->group_id = from->group_id;
    to->kind = (enum epd_memory_kind)from->kind;
    to->offset = from->offset;
    to->bytes = from->bytes;
    to->allocation_bytes = from->allocation_bytes;
    size_t handle_bytes = to->kind == EPD_MEMORY_CUDA_IPC ? sizeof to->ipc_handle : 0;
    if (handle_bytes != from->ipc_handle.len)
        return error_set(error, EPD_PROTOCOL,
                         "buffer_register ipc_handle: %zu bytes, want %zu with this kind",
                         from->ipc_handle.len, handle_bytes);
    if (handle_bytes)
        memcpy(to->ipc_handle, from->ipc_handle.data, handle_bytes);
    if (to->kind == EPD_MEMORY_MEMFD && from->device_uuid.len == 0)
        return EPD_OK;
    return wire_get_bytes(&from->device_uuid, to->device_uuid, sizeof to->device_uuid,
                          "buffer_register device_uuid", error);
}

static int all_zero(const uint8_t *bytes, size_t n)
{
    for (size_t i = 0; i < n; i++)
        if (bytes[i])
            return 0;
    return 1;
}

enum epd_status wire_write_buffer_register(const struct message *message, struct wire *wire,
                                           struct epd_error *error)
{
    const struct message_buffer_register *from = &message->buffer_register;
    Epd__V1__BufferRegister *to = &wire->buffer_register;

    (void)error;
    epd__v1__buffer_register__init(to);
    to->group_id = from->group_id;
    to->kind = (Epd__V1__MemoryKind)from->kind;
    to->offset = from->offset;
    to->bytes = from->bytes;
    to->allocation_bytes = from->allocation_bytes;
    if (from->kind == EPD_MEMORY_CUDA_IPC)
        to->ipc_handle = wire_put_bytes(from->ipc_handle, sizeof from->ipc_handle);
    if (from->kind != EPD_MEMORY_MEMFD || !all_zero(from->device_uuid, sizeof from->device_uuid))
        to->device_uuid = wire_put_bytes(from->device_uuid, sizeof from->device_uuid);
    wire->datagram.buffer_register = to;
    return EPD_OK;
}

enum epd_status wire_read_launch(const Epd__V1__Datagram *datagram, struct arena *arena,
                                 struct message *message, struct epd_error *error)
{
    const Epd__V1__Launch *from = datagram->launch;
    struct message_launch *to = &message->launch;

    (void)arena;
    (void)error;
    memset(to, 0, sizeof *to);
    to->plan_id = from->plan_id;
    to->seq = from->seq;
    to->n_tokens = from->n_tokens;
    to->shape_hash = from->shape_hash;
    to->n_repeats = from->n_repeats;
    return EPD_OK;
}

enum epd_status wire_write_launch(const struct message *message, struct wire *wire, struct epd_error *error)
{
    const struct message_launch *from = &message->launch;
    Epd__V1__Launch *to = &wire->launch;

    (void)error;
    epd__v1__launch__init(to);
    to->plan_id = from->plan_id;
    to->seq = from->seq;
    to->n_tokens = from->n_tokens;
    to->shape_hash = from->shape_hash;
    to->n_repeats = from->n_repeats;
    wire->datagram.launch = to;
    return EPD_OK;
}

enum epd_status wire_read_stats(const Epd__V1__Datagram *datagram, struct arena *arena,
                                struct message *message, struct epd_error *error)
{
    (void)datagram;
    (void)arena;
    (void)message;
    (void)error;
    return EPD_OK;
}

enum epd_status wire_write_stats(const struct message *message, struct wire *wire, struct epd_error *error)
{
    (void)message;
    (void)error;
    epd__v1__stats__init(&wire->stats);
    wire->datagram.stats = &wire->stats;
    return EPD_OK;
}

enum epd_status wire_read_control(const Epd__V1__Datagram *datagram, struct arena *arena,
                                  struct message *message, struct epd_error *error)
{
    const Epd__V1__Control *from = datagram->control;
    struct message_control *to = &message->control;

    (void)arena;
    memset(to, 0, sizeof *to);
    to->verb = (enum control_verb)from->verb;
    to->session_id = from->session_id;
    return wire_get_text(&from->reason, to->reason, sizeof to->reason, "control reason", error);
}

enum epd_status wire_write_control(const struct message *message, struct wire *wire, struct epd_error *error)
{
    Epd__V1__Control *to = &wire->control;

    (void)error;
    epd__v1__control__init(to);
    to->verb = (Epd__V1__ControlVerb)message->control.verb;
    to->session_id = message->control.session_id;
    to->reason = wire_put_text(message->control.reason);
    wire->datagram.control = to;
    return EPD_OK;
}
