#include "proto/codec.h"

#include <string.h>

#include "proto/codec_wire.h"

/* Statuses travel by number: epd.proto must repeat the table. The other words are compared in
 * codec_request.c. */
#define SAME_STATUS(id, number, text)                                                                        \
    _Static_assert((int)EPD__V1__STATUS__##id == (number), "epd.proto repeats proto/status.h");
EPD_STATUS_TABLE(SAME_STATUS)
#undef SAME_STATUS

struct codec_kind {
    Epd__V1__Datagram__BodyCase body;
    enum codec_side side;
    enum epd_status (*read)(const Epd__V1__Datagram *, struct arena *, struct message *, struct epd_error *);
    enum epd_status (*write)(const struct message *, struct wire *, struct epd_error *);
};

static const struct codec_kind codec_kinds[MESSAGE_KIND_COUNT] = {
#define CODEC_KIND(kind, body, name, side)                                                                   \
    [kind] = {EPD__V1__DATAGRAM__BODY_##body, side, wire_read_##name, wire_write_##name},
    WIRE_TABLE(CODEC_KIND)
#undef CODEC_KIND
};

static enum message_kind kind_of_body(Epd__V1__Datagram__BodyCase body)
{
    switch (body) {
#define CODEC_BODY(kind, body, name, side)                                                                   \
    case EPD__V1__DATAGRAM__BODY_##body:                                                                     \
        return kind;
        WIRE_TABLE(CODEC_BODY)
#undef CODEC_BODY
    default:
        return MESSAGE_NONE;
    }
}

static const char *side_name(enum codec_side side)
{
    switch (side) {
    case CODEC_FROM_CLIENT:
        return "a client";
    case CODEC_FROM_CONTROL:
        return "the control socket";
    case CODEC_FROM_DAEMON:
        return "the daemon";
    }
    return "nobody";
}

enum epd_status wire_get_bytes(const ProtobufCBinaryData *from, uint8_t *to, size_t want, const char *field,
                               struct epd_error *error)
{
    if (from->len != want)
        return error_set(error, EPD_PROTOCOL, "%s: %zu bytes, want %zu", field, from->len, want);
    memcpy(to, from->data, want);
    return EPD_OK;
}

enum epd_status wire_get_text(const ProtobufCBinaryData *from, char *to, size_t room, const char *field,
                              struct epd_error *error)
{
    if (from->len >= room)
        return error_set(error, EPD_PROTOCOL, "%s: %zu bytes, want at most %zu", field, from->len, room - 1);
    if (from->len == 0)
        return EPD_OK;
    const char *zero = memchr(from->data, 0, from->len);
    if (zero)
        return error_set(error, EPD_PROTOCOL, "%s: zero byte at %td, want text without it", field,
                         zero - (const char *)from->data);
    memcpy(to, from->data, from->len);
    return EPD_OK;
}

ProtobufCBinaryData wire_put_bytes(const uint8_t *from, size_t bytes)
{
    return (ProtobufCBinaryData){.len = bytes, .data = (uint8_t *)from};
}

ProtobufCBinaryData wire_put_text(const char *from)
{
    return (ProtobufCBinaryData){.len = strlen(from), .data = (uint8_t *)from};
}

static void *unpack_alloc(void *arena, size_t bytes)
{
    return arena_alloc(arena, bytes);
}

static void unpack_free(void *arena, void *memory)
{
    (void)arena;
    (void)memory; /* the next reset takes everything back */
}

/* request_id of a datagram that is broken further on; every packer writes field 1 first. 0 if it is not
 * there. */
static uint64_t peek_request_id(const uint8_t *datagram, size_t bytes)
{
    uint64_t request_id = 0;

    if (bytes == 0 || datagram[0] != 0x08) /* field 1, varint */
        return 0;
    for (size_t i = 1; i < bytes && i <= 10; i++) {
        request_id |= (uint64_t)(datagram[i] & 0x7f) << (7 * (i - 1));
        if (!(datagram[i] & 0x80))
            return request_id;
    }
    return 0;
}

static enum epd_status decode_body(enum codec_side side, const Epd__V1__Datagram *datagram,
                                   struct arena *arena, struct message *message, struct epd_error *error)
{
    enum message_kind kind = kind_of_body(datagram->body_case);

    if (kind == MESSAGE_NONE)
        return error_set(error, EPD_PROTOCOL, "datagram body: none that protocol %d.%d knows",
                         EPD_PROTOCOL_MAJOR, EPD_PROTOCOL_MINOR);
    if (codec_kinds[kind].side != side)
        return error_set(error, EPD_PROTOCOL, "datagram body: %s from %s, want what %s sends",
                         message_kind_name(kind), side_name(side), side_name(side));
    if (codec_kinds[kind].read(datagram, arena, message, error))
        return error->status;
    message->kind = kind;
    return codec_check(message, error);
}

enum epd_status codec_decode(enum codec_side side, const void *datagram, size_t bytes, struct arena *arena,
                             struct message *message, struct epd_error *error)
{
    ProtobufCAllocator allocator = {.alloc = unpack_alloc, .free = unpack_free, .allocator_data = arena};

    message->kind = MESSAGE_NONE;
    message->request_id = 0;
    arena_reset(arena);
    if (bytes == 0 || bytes > EPD_MAX_DATAGRAM_BYTES)
        return error_set(error, EPD_PROTOCOL, "datagram: %zu bytes, want 1..%d", bytes,
                         EPD_MAX_DATAGRAM_BYTES);
    const Epd__V1__Datagram *unpacked = epd__v1__datagram__unpack(&allocator, bytes, datagram);
    if (!unpacked) {
        message->request_id = peek_request_id(datagram, bytes);
        if (arena->exhausted)
            return error_set(error, EPD_PROTOCOL, "datagram: %zu bytes need more than %zu to unpack", bytes,
                             arena->size);
        return error_set(error, EPD_PROTOCOL, "datagram: %zu bytes that are no epd.v1.Datagram", bytes);
    }
    message->request_id = unpacked->request_id;
    if (decode_body(side, unpacked, arena, message, error)) {
        message->kind = MESSAGE_NONE;
        return error->status;
    }
    return EPD_OK;
}

enum epd_status wire_encode(const struct message *message, void *datagram, size_t *bytes,
                            struct epd_error *error)
{
    struct wire wire; /* some 50 KiB, of which a message touches what it uses */

    if (message->kind == MESSAGE_LAUNCH && message->request_id == 0) {
        *bytes = wire_encode_launch(&message->launch, datagram);
        return EPD_OK;
    }
    epd__v1__datagram__init(&wire.datagram);
    wire.datagram.request_id = message->request_id;
    wire.datagram.body_case = codec_kinds[message->kind].body;
    if (codec_kinds[message->kind].write(message, &wire, error))
        return error->status;
    size_t packed = epd__v1__datagram__get_packed_size(&wire.datagram);
    if (packed > EPD_MAX_DATAGRAM_BYTES)
        return error_set(error, EPD_PROTOCOL, "%s: %zu bytes when encoded, want at most %d",
                         message_kind_name(message->kind), packed, EPD_MAX_DATAGRAM_BYTES);
    *bytes = epd__v1__datagram__pack(&wire.datagram, datagram);
    return EPD_OK;
}

enum epd_status codec_encode(const struct message *message, void *datagram, size_t *bytes,
                             struct epd_error *error)
{
    if (codec_check(message, error))
        return error->status = EPD_INVALID_ARGUMENT;
    return wire_encode(message, datagram, bytes, error);
}
