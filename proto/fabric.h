/* The messages between the daemons of a fabric, decoded: every size, count and enum is checked here and nowhere else.
 * What each kind carries is said in fabric.proto; what it does not carry is zero. Any thread. */
#ifndef EPD_PROTO_FABRIC_H
#define EPD_PROTO_FABRIC_H

#include <stddef.h>

#include "proto/arena.h"
#include "proto/limits.h"
#include "proto/words.h"

#define FABRIC_PROTOCOL 4u
/* The largest message: the addresses of all ranks. */
#define FABRIC_MAX_MESSAGE_BYTES (EPD_MAX_WORLD_SIZE * (EPD_MAX_RAIL_ADDRESS_BYTES + 8) + 2048)
/* What unpacking one may take. */
#define FABRIC_MAX_ARENA_BYTES (512 * 1024)
#define FABRIC_MAX_CONFIG      16

enum fabric_kind {
    FABRIC_PING = 1,
    FABRIC_PONG = 2,
    FABRIC_BREAK = 3,
    FABRIC_HELLO = 8,
    FABRIC_JOIN = 9,
    FABRIC_PLAN = 10,
    FABRIC_STEP = 11,
    FABRIC_HEARD = 12,
    FABRIC_STATE = 16,
    FABRIC_OPEN = 17,
    FABRIC_READY = 18,
    FABRIC_GO = 19,
};

struct fabric_address {
    uint32_t bytes;
    uint8_t data[EPD_MAX_RAIL_ADDRESS_BYTES];
};

struct fabric_message {
    enum fabric_kind kind;
    uint64_t epoch, group, number;
    uint32_t node;
    int32_t rank;           /* -1: none */
    struct epd_error error; /* EPD_OK: none */
    uint32_t op;            /* enum epd_op, or 0 */
    uint64_t hash;
    uint64_t present, time_ns;
    char name[EPD_MAX_NAME_BYTES];
    uint32_t uid, world_size;
    uint32_t n_config;
    int64_t config[FABRIC_MAX_CONFIG];
    uint32_t n_addresses;
    const struct fabric_address *addresses; /* borrowed: in the arena, or the sender's */
    uint32_t block;
    uint32_t n_nodes;
    uint32_t nodes[EPD_MAX_NODES];
    uint32_t n_tokens;
};

/* A message of this kind that says nothing. */
void fabric_message_init(struct fabric_message *message, enum fabric_kind kind);
const char *fabric_kind_name(enum fabric_kind kind);
/* data has room for FABRIC_MAX_MESSAGE_BYTES. */
EPD_MUST_CHECK enum epd_status fabric_encode(const struct fabric_message *message, void *data, size_t *bytes,
                                             struct epd_error *error);
/* The arena is reset first, and holds the addresses until the next reset. EPD_PROTOCOL names the field. */
EPD_MUST_CHECK enum epd_status fabric_decode(const void *data, size_t bytes, struct arena *arena,
                                             struct fabric_message *message, struct epd_error *error);

#endif
