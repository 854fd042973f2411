/* What the daemon sends: protobuf form <-> struct message. */
#include <string.h>

#include "proto/codec_wire.h"

_Static_assert((int)EPD__V1__BACKEND_KIND__EPD_BACKEND_CUDA == EPD_BACKEND_CUDA,
               "epd.proto repeats proto/words.h");

enum epd_status wire_read_error(const Epd__V1__Datagram *datagram, struct arena *arena,
                                struct message *message, struct epd_error *error)
{
    struct epd_error *to = &message->reply_error;

    (void)arena;
    memset(to, 0, sizeof *to);
    to->status = (enum epd_status)datagram->error->status;
    return wire_get_text(&datagram->error->text, to->text, sizeof to->text, "reply_error text", error);
}

enum epd_status wire_write_error(const struct message *message, struct wire *wire, struct epd_error *error)
{
    (void)error;
    epd__v1__error__init(&wire->error);
    wire->error.status = (Epd__V1__Status)message->reply_error.status;
    wire->error.text = wire_put_text(message->reply_error.text);
    wire->datagram.error = &wire->error;
    return EPD_OK;
}

enum epd_status wire_read_ok(const Epd__V1__Datagram *datagram, struct arena *arena, struct message *message,
                             struct epd_error *error)
{
    (void)datagram;
    (void)arena;
    (void)message;
    (void)error;
    return EPD_OK;
}

enum epd_status wire_write_ok(const struct message *message, struct wire *wire, struct epd_error *error)
{
    (void)message;
    (void)error;
    epd__v1__ok__init(&wire->ok);
    wire->datagram.ok = &wire->ok;
    return EPD_OK;
}

static enum epd_status read_device(const Epd__V1__Device *from, struct message_device *to,
                                   struct epd_error *error)
{
    to->device_idx = from->device_idx;
    to->memory_bytes = from->memory_bytes;
    if (wire_get_bytes(&from->uuid, to->uuid, sizeof to->uuid, "reply_hello device uuid", error))
        return error->status;
    return wire_get_text(&from->name, to->name, sizeof to->name, "reply_hello device name", error);
}

static void write_device(const struct message_device *from, Epd__V1__Device *to)
{
    epd__v1__device__init(to);
    to->uuid = wire_put_bytes(from->uuid, sizeof from->uuid);
    to->device_idx = from->device_idx;
    to->name = wire_put_text(from->name);
    to->memory_bytes = from->memory_bytes;
}

enum epd_status wire_read_hello_reply(const Epd__V1__Datagram *datagram, struct arena *arena,
                                      struct message *message, struct epd_error *error)
{
    const Epd__V1__HelloReply *from = datagram->hello_reply;
    struct message_reply_hello *to = &message->reply_hello;

    (void)arena;
    memset(to, 0, sizeof *to);
    to->major = from->major;
    to->minor = from->minor;
    to->features = from->features;
    to->session_id = from->session_id;
    to->epoch = from->epoch;
    to->backend = (enum epd_backend_kind)from->backend;
    to->page_bytes = from->page_bytes;
    if (wire_get_bytes(&from->boot_id, to->boot_id, sizeof to->boot_id, "reply_hello boot_id", error) ||
        wire_get_text(&from->daemon_version, to->daemon_version, sizeof to->daemon_version,
                      "reply_hello daemon_version", error))
        return error->status;
    if (from->n_devices > EPD_MAX_DEVICES)
        return error_set(error, EPD_PROTOCOL, "reply_hello devices: given %zu, want at most %d",
                         from->n_devices, EPD_MAX_DEVICES);
    to->n_devices = (uint32_t)from->n_devices;
    for (uint32_t i = 0; i < to->n_devices; i++)
        if (read_device(from->devices[i], &to->devices[i], error))
            return error->status;
    return EPD_OK;
}

enum epd_status wire_write_hello_reply(const struct message *message, struct wire *wire,
                                       struct epd_error *error)
{
    const struct message_reply_hello *from = &message->reply_hello;
    Epd__V1__HelloReply *to = &wire->hello_reply.reply;

    (void)error;
    epd__v1__hello_reply__init(to);
    to->major = from->major;
    to->minor = from->minor;
    to->features = from->features;
    to->session_id = from->session_id;
    to->boot_id = wire_put_bytes(from->boot_id, sizeof from->boot_id);
    to->epoch = from->epoch;
    to->backend = (Epd__V1__BackendKind)from->backend;
    to->page_bytes = from->page_bytes;
    to->daemon_version = wire_put_text(from->daemon_version);
    to->n_devices = from->n_devices;
    to->devices = wire->hello_reply.device_list;
    for (uint32_t i = 0; i < from->n_devices; i++) {
        write_device(&from->devices[i], &wire->hello_reply.devices[i]);
        to->devices[i] = &wire->hello_reply.devices[i];
    }
    wire->datagram.hello_reply = to;
    return EPD_OK;
}

enum epd_status wire_read_group_reply(const Epd__V1__Datagram *datagram, struct arena *arena,
                                      struct message *message, struct epd_error *error)
{
    const Epd__V1__GroupReply *from = datagram->group_reply;
    struct message_reply_group *to = &message->reply_group;

    (void)arena;
    memset(to, 0, sizeof *to);
    to->group_id = from->group_id;
    to->epoch = from->epoch;
    to->device_idx = from->device_idx;
    to->n_local_experts = from->n_local_experts;
    to->first_expert = from->first_expert;
    to->capacity_rows = from->capacity_rows;
    to->heap_bytes = from->heap_bytes;
    return wire_get_bytes(&from->device_uuid, to->device_uuid, sizeof to->device_uuid,
                          "reply_group device_uuid", error);
}

enum epd_status wire_write_group_reply(const struct message *message, struct wire *wire,
                                       struct epd_error *error)
{
    const struct message_reply_group *from = &message->reply_group;
    Epd__V1__GroupReply *to = &wire->group_reply;

    (void)error;
    epd__v1__group_reply__init(to);
    to->group_id = from->group_id;
    to->epoch = from->epoch;
    to->device_idx = from->device_idx;
    to->device_uuid = wire_put_bytes(from->device_uuid, sizeof from->device_uuid);
    to->n_local_experts = from->n_local_experts;
    to->first_expert = from->first_expert;
    to->capacity_rows = from->capacity_rows;
    to->heap_bytes = from->heap_bytes;
    wire->datagram.group_reply = to;
    return EPD_OK;
}

enum epd_status wire_read_buffer_reply(const Epd__V1__Datagram *datagram, struct arena *arena,
                                       struct message *message, struct epd_error *error)
{
    (void)arena;
    (void)error;
    message->reply_buffer.buffer_id = datagram->buffer_reply->buffer_id;
    message->reply_buffer.bytes = datagram->buffer_reply->bytes;
    return EPD_OK;
}

enum epd_status wire_write_buffer_reply(const struct message *message, struct wire *wire,
                                        struct epd_error *error)
{
    Epd__V1__BufferReply *to = &wire->buffer_reply;

    (void)error;
    epd__v1__buffer_reply__init(to);
    to->buffer_id = message->reply_buffer.buffer_id;
    to->bytes = message->reply_buffer.bytes;
    wire->datagram.buffer_reply = to;
    return EPD_OK;
}

enum epd_status wire_read_plan_reply(const Epd__V1__Datagram *datagram, struct arena *arena,
                                     struct message *message, struct epd_error *error)
{
    const Epd__V1__PlanReply *from = datagram->plan_reply;
    struct message_reply_plan *to = &message->reply_plan;

    (void)arena;
    (void)error;
    memset(to, 0, sizeof *to);
    to->plan_id = from->plan_id;
    to->plan_key = from->plan_key;
    to->flag_idx = from->flag_idx;
    to->shape_hash = from->shape_hash;
    to->saved_bytes = from->saved_bytes;
    return EPD_OK;
}

enum epd_status wire_write_plan_reply(const struct message *message, struct wire *wire,
                                      struct epd_error *error)
{
    const struct message_reply_plan *from = &message->reply_plan;
    Epd__V1__PlanReply *to = &wire->plan_reply;

    (void)error;
    epd__v1__plan_reply__init(to);
    to->plan_id = from->plan_id;
    to->plan_key = from->plan_key;
    to->flag_idx = from->flag_idx;
    to->shape_hash = from->shape_hash;
    to->saved_bytes = from->saved_bytes;
    wire->datagram.plan_reply = to;
    return EPD_OK;
}

enum epd_status wire_read_document_reply(const Epd__V1__Datagram *datagram, struct arena *arena,
                                         struct message *message, struct epd_error *error)
{
    (void)arena;
    (void)error;
    message->reply_document.bytes = datagram->document_reply->bytes;
    return EPD_OK;
}

enum epd_status wire_write_document_reply(const struct message *message, struct wire *wire,
                                          struct epd_error *error)
{
    (void)error;
    epd__v1__document_reply__init(&wire->document_reply);
    wire->document_reply.bytes = message->reply_document.bytes;
    wire->datagram.document_reply = &wire->document_reply;
    return EPD_OK;
}

enum epd_status wire_read_closed(const Epd__V1__Datagram *datagram, struct arena *arena,
                                 struct message *message, struct epd_error *error)
{
    struct message_closed *to = &message->closed;

    (void)arena;
    memset(to, 0, sizeof *to);
    to->status = (enum epd_status)datagram->closed->status;
    return wire_get_text(&datagram->closed->reason, to->reason, sizeof to->reason, "closed reason", error);
}

enum epd_status wire_write_closed(const struct message *message, struct wire *wire, struct epd_error *error)
{
    (void)error;
    epd__v1__closed__init(&wire->closed);
    wire->closed.status = (Epd__V1__Status)message->closed.status;
    wire->closed.reason = wire_put_text(message->closed.reason);
    wire->datagram.closed = &wire->closed;
    return EPD_OK;
}
