/* How the ranks of one rail - those of the same local index on every node - reach each other. One row of functions per
 * library; a group that lies on one node needs none and never comes here.
 *
 * A rail only swaps: every node of it gives one message to every other node and takes one from each, in the same order
 * on all. So messages need no names beyond their number, none is ever unexpected, and a node that has nothing to say
 * says so. A rail that has failed stays failed: every later swap ends at once with the first error, which names the node.
 *
 * Threads: a rail lives on one lane; `abort` alone may be called from anywhere, and ends a swap that waits within
 * TRANSPORT_LOOK_MS. Messages are not checked here: who reads them checks them. */
#ifndef EPD_EP_TRANSPORT_H
#define EPD_EP_TRANSPORT_H

#include <stddef.h>
#include <stdint.h>

#include "proto/limits.h"
#include "proto/status.h"

#define TRANSPORT_MAX_ADDRESS_BYTES EPD_MAX_RAIL_ADDRESS_BYTES
/* A waiting rail looks at its abort word at least this often. */
#define TRANSPORT_LOOK_MS 10

struct transport_rail;

struct transport_options {
    const char *ways;    /* the library's own list of network kinds; borrowed during load */
    const char *devices; /* network devices it may use; "" for all; borrowed during load */
};

/* Where a rail listens: opaque bytes of the library. */
struct transport_address {
    uint32_t bytes;
    uint8_t data[TRANSPORT_MAX_ADDRESS_BYTES];
};

struct transport_part {
    const void *send; /* [send_bytes], untouched until the swap ends */
    uint64_t send_bytes;
    void *receive; /* [receive_room] */
    uint64_t receive_room;
    uint64_t received_bytes; /* out */
};

struct transport {
    const char *name;
    /* Once, before any thread runs: loads the library, which may want its settings in the environment. */
    enum epd_status (*load)(const struct transport_options *options, struct epd_error *error);
    /* Lane thread. */
    enum epd_status (*rail_open)(struct transport_rail **rail, struct transport_address *address,
                                 struct epd_error *error);
    /* addresses[n_nodes]; that of this node is not looked at. */
    enum epd_status (*rail_connect)(struct transport_rail *rail, uint32_t n_nodes, uint32_t node,
                                    const struct transport_address *addresses, uint64_t limit_ns,
                                    struct epd_error *error);
    /* parts[n_nodes]; that of this node is not looked at. EPD_PEER_LOST names the node that is gone, or carries what
     * abort was given; EPD_TIMEOUT after limit_ns of connect. */
    enum epd_status (*rail_swap)(struct transport_rail *rail, struct transport_part *parts,
                                 struct epd_error *error);
    /* Any thread; the first one counts. */
    void (*rail_abort)(struct transport_rail *rail, const struct epd_error *why);
    void (*rail_close)(struct transport_rail *rail);
};

/* The transport between nodes of this build; NULL, and the reason, if it has none. */
const struct transport *transport_host(struct epd_error *reason);

#endif
