#include "proto/fabric.h"

#include <stdio.h>
#include <string.h>

#include "proto/fabric.pb-c.h"

void fabric_message_init(struct fabric_message *message, enum fabric_kind kind)
{
    memset(message, 0, sizeof *message);
    message->kind = kind;
    message->rank = -1;
}

const char *fabric_kind_name(enum fabric_kind kind)
{
    switch (kind) {
    case FABRIC_PING:
        return "ping";
    case FABRIC_PONG:
        return "pong";
    case FABRIC_BREAK:
        return "break";
    case FABRIC_HELLO:
        return "hello";
    case FABRIC_JOIN:
        return "join";
    case FABRIC_PLAN:
        return "plan";
    case FABRIC_STEP:
        return "step";
    case FABRIC_HEARD:
        return "heard";
    case FABRIC_STATE:
        return "state";
    case FABRIC_OPEN:
        return "open";
    case FABRIC_READY:
        return "ready";
    case FABRIC_GO:
        return "go";
    }
    return "?";
}

enum epd_status fabric_encode(const struct fabric_message *from, void *data, size_t *bytes,
                              struct epd_error *error)
{
    Epd__Fabric__V1__Message wire = EPD__FABRIC__V1__MESSAGE__INIT;
    ProtobufCBinaryData addresses[EPD_MAX_WORLD_SIZE];
    int64_t config[FABRIC_MAX_CONFIG];
    uint32_t nodes[EPD_MAX_NODES];
    if (from->n_addresses > EPD_MAX_WORLD_SIZE || from->n_config > FABRIC_MAX_CONFIG ||
        from->n_nodes > EPD_MAX_NODES)
        return error_set(error, EPD_INTERNAL, "fabric %s: %u addresses, %u fields, %u nodes",
                         fabric_kind_name(from->kind), from->n_addresses, from->n_config, from->n_nodes);
    memcpy(config, from->config, sizeof config);
    memcpy(nodes, from->nodes, sizeof nodes);
    for (uint32_t i = 0; i < from->n_addresses; i++)
        addresses[i] = (ProtobufCBinaryData){.len = from->addresses[i].bytes,
                                             .data = (uint8_t *)(uintptr_t)from->addresses[i].data};
    wire.kind = (Epd__Fabric__V1__Kind)from->kind;
    wire.epoch = from->epoch;
    wire.group = from->group;
    wire.number = from->number;
    wire.node = from->node;
    wire.rank = from->rank;
    wire.status = from->error.status;
    if (from->error.status)
        wire.text = (ProtobufCBinaryData){.len = strlen(from->error.text),
                                          .data = (uint8_t *)(uintptr_t)from->error.text};
    wire.op = from->op;
    wire.hash = from->hash;
    wire.present = from->present;
    wire.time_ns = from->time_ns;
    wire.name = (ProtobufCBinaryData){.len = strlen(from->name), .data = (uint8_t *)(uintptr_t)from->name};
    wire.uid = from->uid;
    wire.world_size = from->world_size;
    wire.n_config = from->n_config;
    wire.config = config;
    wire.n_addresses = from->n_addresses;
    wire.addresses = addresses;
    wire.block = from->block;
    wire.n_nodes = from->n_nodes;
    wire.nodes = nodes;
    wire.n_tokens = from->n_tokens;
    *bytes = epd__fabric__v1__message__get_packed_size(&wire);
    if (*bytes > FABRIC_MAX_MESSAGE_BYTES)
        return error_set(error, EPD_INTERNAL, "fabric %s: %zu bytes, at most %d",
                         fabric_kind_name(from->kind), *bytes, FABRIC_MAX_MESSAGE_BYTES);
    epd__fabric__v1__message__pack(&wire, data);
    return EPD_OK;
}

static void *allocate(void *arena, size_t bytes)
{
    return arena_alloc(arena, bytes);
}

static void release(void *arena, void *data)
{
    (void)arena, (void)data; /* the reset frees everything */
}

static enum epd_status get_text(const ProtobufCBinaryData *from, char *to, size_t room, const char *field,
                                struct epd_error *error)
{
    if (from->len >= room)
        return error_set(error, EPD_PROTOCOL, "fabric %s: %zu bytes, want less than %zu", field, from->len,
                         room);
    for (size_t i = 0; i < from->len; i++) /* it goes into logs */
        if (from->data[i] < ' ' || from->data[i] > '~')
            return error_set(error, EPD_PROTOCOL, "fabric %s: byte 0x%02x, want printable ASCII", field,
                             from->data[i]);
    if (from->len)
        memcpy(to, from->data, from->len);
    to[from->len] = 0;
    return EPD_OK;
}

static enum epd_status get_addresses(const Epd__Fabric__V1__Message *wire, struct arena *arena,
                                     struct fabric_message *message, struct epd_error *error)
{
    if (wire->n_addresses > EPD_MAX_WORLD_SIZE)
        return error_set(error, EPD_PROTOCOL, "fabric addresses: %zu, want at most %d", wire->n_addresses,
                         EPD_MAX_WORLD_SIZE);
    if (!wire->n_addresses)
        return EPD_OK;
    struct fabric_address *addresses = arena_alloc(arena, wire->n_addresses * sizeof *addresses);
    if (!addresses)
        return error_set(error, EPD_PROTOCOL, "fabric addresses: no room for %zu", wire->n_addresses);
    for (size_t i = 0; i < wire->n_addresses; i++) {
        const ProtobufCBinaryData *from = &wire->addresses[i];
        if (from->len == 0 || from->len > sizeof addresses[i].data)
            return error_set(error, EPD_PROTOCOL, "fabric address: %zu bytes, want 1..%zu", from->len,
                             sizeof addresses[i].data);
        addresses[i].bytes = (uint32_t)from->len;
        memcpy(addresses[i].data, from->data, from->len);
    }
    message->n_addresses = (uint32_t)wire->n_addresses;
    message->addresses = addresses;
    return EPD_OK;
}

static enum epd_status get_nodes(const Epd__Fabric__V1__Message *wire, struct fabric_message *message,
                                 struct epd_error *error)
{
    if (wire->block >= EPD_MAX_NODES || wire->n_nodes > EPD_MAX_NODES)
        return error_set(error, EPD_PROTOCOL, "fabric %s: block %u, %zu nodes: out of range",
                         fabric_kind_name(message->kind), wire->block, wire->n_nodes);
    for (size_t i = 0; i < wire->n_nodes; i++) {
        if (wire->nodes[i] >= EPD_MAX_NODES)
            return error_set(error, EPD_PROTOCOL, "fabric nodes: %u, want less than %d", wire->nodes[i],
                             EPD_MAX_NODES);
        message->nodes[i] = wire->nodes[i];
    }
    message->block = wire->block;
    message->n_nodes = (uint32_t)wire->n_nodes;
    return EPD_OK;
}

static enum epd_status get_all(const Epd__Fabric__V1__Message *wire, struct arena *arena,
                               struct fabric_message *message, struct epd_error *error)
{
    fabric_message_init(message, (enum fabric_kind)wire->kind);
    if (strcmp(fabric_kind_name(message->kind), "?") == 0)
        return error_set(error, EPD_PROTOCOL, "fabric kind: %u is unknown", (unsigned)wire->kind);
    if (!status_known(wire->status))
        return error_set(error, EPD_PROTOCOL, "fabric status: %u is unknown", wire->status);
    if (wire->node >= EPD_MAX_NODES || wire->rank < -1 || wire->rank >= EPD_MAX_WORLD_SIZE ||
        wire->world_size > EPD_MAX_WORLD_SIZE || wire->op >= EPD_OP_COUNT)
        return error_set(error, EPD_PROTOCOL,
                         "fabric %s: node %u, rank %d, world_size %u, op %u: out of range",
                         fabric_kind_name(message->kind), wire->node, wire->rank, wire->world_size, wire->op);
    if (wire->n_config > FABRIC_MAX_CONFIG)
        return error_set(error, EPD_PROTOCOL, "fabric config: %zu fields, want at most %d", wire->n_config,
                         FABRIC_MAX_CONFIG);
    message->epoch = wire->epoch;
    message->group = wire->group;
    message->number = wire->number;
    message->node = wire->node;
    message->rank = wire->rank;
    message->error.status = (enum epd_status)wire->status;
    message->op = wire->op;
    message->hash = wire->hash;
    message->present = wire->present;
    message->time_ns = wire->time_ns;
    message->uid = wire->uid;
    message->world_size = wire->world_size;
    message->n_tokens = wire->n_tokens;
    message->n_config = (uint32_t)wire->n_config;
    for (size_t i = 0; i < wire->n_config; i++)
        message->config[i] = wire->config[i];
    if (get_text(&wire->text, message->error.text, sizeof message->error.text, "text", error) ||
        get_text(&wire->name, message->name, sizeof message->name, "name", error) ||
        get_nodes(wire, message, error))
        return error->status;
    return get_addresses(wire, arena, message, error);
}

enum epd_status fabric_decode(const void *data, size_t bytes, struct arena *arena,
                              struct fabric_message *message, struct epd_error *error)
{
    ProtobufCAllocator allocator = {.alloc = allocate, .free = release, .allocator_data = arena};
    arena_reset(arena);
    if (bytes > FABRIC_MAX_MESSAGE_BYTES)
        return error_set(error, EPD_PROTOCOL, "fabric message: %zu bytes, at most %d", bytes,
                         FABRIC_MAX_MESSAGE_BYTES);
    const Epd__Fabric__V1__Message *wire = epd__fabric__v1__message__unpack(&allocator, bytes, data);
    if (!wire)
        return error_set(error, EPD_PROTOCOL, "fabric message: %zu bytes that are no message", bytes);
    return get_all(wire, arena, message, error);
}
