/* One TCP connection between two daemons of a fabric: first the three frames of fabric_auth.h, then messages. Loop
 * thread.
 *
 * Lifetime: created by fabric_link_accept or fabric_link_connect; ends with exactly one on_end, in which the owner
 * forgets it; frees itself afterwards. */
#ifndef EPD_DAEMON_FABRIC_LINK_H
#define EPD_DAEMON_FABRIC_LINK_H

#include <uv.h>

#include "daemon/fabric_auth.h"
#include "proto/fabric.h"

/* From the connection to the last frame of the authentication. */
#define FABRIC_AUTH_MS 5000
/* Bytes that may wait for a node that does not read. */
#define FABRIC_MAX_OUTPUT_BYTES (8u << 20)

struct fabric_link;

enum fabric_link_state {
    FABRIC_LINK_CONNECTING, /* waits for the other side's accept */
    FABRIC_LINK_PROVING,    /* waits for a frame of the authentication, at most FABRIC_AUTH_MS */
    FABRIC_LINK_OPEN,       /* messages */
    FABRIC_LINK_CLOSED,     /* waits for libuv */
};

/* What a link needs of its fabric; borrowed, outlives it. */
struct fabric_link_owner {
    uv_loop_t *loop;
    const uint8_t *key; /* [FABRIC_KEY_BYTES] */
    uint32_t node, n_nodes;
    void *arg;
    /* Both sides have shown the secret; node: who it is. 0 closes the link, and says why in error. */
    int (*on_open)(void *arg, struct fabric_link *link, uint32_t node, struct epd_error *error);
    void (*on_message)(void *arg, struct fabric_link *link, const void *data, size_t bytes);
    void (*on_end)(void *arg, struct fabric_link *link, const struct epd_error *why);
};

EPD_MUST_CHECK enum epd_status fabric_link_accept(const struct fabric_link_owner *owner, uv_stream_t *server,
                                                  struct fabric_link **link, struct epd_error *error);
EPD_MUST_CHECK enum epd_status fabric_link_connect(const struct fabric_link_owner *owner,
                                                   const struct sockaddr *address, struct fabric_link **link,
                                                   struct epd_error *error);
/* Open links only. A link whose output is full ends: not before the loop runs again, so that nothing is called from
 * here, and what is sent until then is dropped. */
void fabric_link_send(struct fabric_link *link, const void *data, size_t bytes);
/* on_end comes, unless it has come already. */
void fabric_link_close(struct fabric_link *link, const struct epd_error *why);

enum fabric_link_state fabric_link_state(const struct fabric_link *link);
/* When something came last; bytes in both directions so far. */
uint64_t fabric_link_heard_ns(const struct fabric_link *link);
void fabric_link_bytes(const struct fabric_link *link, uint64_t *sent, uint64_t *received);
/* "10.0.0.2:7741" of the other side. */
const char *fabric_link_address(const struct fabric_link *link);

#endif
