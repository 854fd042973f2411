/* How two daemons show each other that they know the fabric's secret, and how frames are marked afterwards.
 *
 * The one that connects sends a hello with a fresh challenge; the one that listens answers with its own and with a keyed
 * hash of both; the first answers with another keyed hash of both. Three frames of fixed size, nothing else is read
 * before they have been checked. From both challenges and the secret each side then derives a key for each direction,
 * and every frame carries a keyed hash of its number, its length and its bytes: a frame that was changed, repeated or
 * put in by somebody else ends the link. Nothing is encrypted: what daemons say is no secret.
 *
 * HMAC-SHA-256 of libsodium. Any thread. */
#ifndef EPD_DAEMON_FABRIC_AUTH_H
#define EPD_DAEMON_FABRIC_AUTH_H

#include <stddef.h>
#include <stdint.h>

#include "proto/status.h"

#define FABRIC_KEY_BYTES        32
#define FABRIC_MAC_BYTES        32
#define FABRIC_CHALLENGE_BYTES  32
#define FABRIC_MIN_SECRET_BYTES 16
#define FABRIC_MAX_SECRET_BYTES 4096

/* As they travel; all of one size. */
struct fabric_hello {
    uint8_t magic[8];
    uint8_t node, n_nodes, reserved[22];
    uint8_t challenge[FABRIC_CHALLENGE_BYTES];
};
#define FABRIC_HELLO_BYTES sizeof(struct fabric_hello)
_Static_assert(FABRIC_HELLO_BYTES == 64, "no padding");

struct fabric_keys {
    uint8_t send[FABRIC_KEY_BYTES], receive[FABRIC_KEY_BYTES];
};

/* Who a hash is made for. */
enum fabric_side { FABRIC_LISTENER, FABRIC_CONNECTOR };

/* 1 if this build can; else 0 and the reason. */
int fabric_auth_available(struct epd_error *reason);
/* Reads the file, which nobody else may read, into a key. Errors name the file and what is wrong with it. */
EPD_MUST_CHECK enum epd_status fabric_auth_read(const char *path, uint8_t key[FABRIC_KEY_BYTES],
                                                struct epd_error *error);
/* A hello of this node, with a fresh challenge. */
void fabric_auth_hello(struct fabric_hello *hello, uint32_t node, uint32_t n_nodes);
int fabric_auth_hello_known(const struct fabric_hello *hello);
/* The hash that the side shows for both hellos. */
void fabric_auth_prove(const uint8_t key[FABRIC_KEY_BYTES], enum fabric_side side,
                       const struct fabric_hello *connector, const struct fabric_hello *listener,
                       uint8_t mac[FABRIC_MAC_BYTES]);
/* 1 if the hash is the side's; takes as long either way. */
int fabric_auth_check(const uint8_t key[FABRIC_KEY_BYTES], enum fabric_side side,
                      const struct fabric_hello *connector, const struct fabric_hello *listener,
                      const uint8_t mac[FABRIC_MAC_BYTES]);
/* The keys of the side that asks. */
void fabric_auth_derive(const uint8_t key[FABRIC_KEY_BYTES], enum fabric_side side,
                        const struct fabric_hello *connector, const struct fabric_hello *listener,
                        struct fabric_keys *keys);
/* Of one frame. */
void fabric_auth_mark(const uint8_t key[FABRIC_KEY_BYTES], uint64_t number, const void *data, size_t bytes,
                      uint8_t mac[FABRIC_MAC_BYTES]);
int fabric_auth_marked(const uint8_t key[FABRIC_KEY_BYTES], uint64_t number, const void *data, size_t bytes,
                       const uint8_t mac[FABRIC_MAC_BYTES]);

#endif
