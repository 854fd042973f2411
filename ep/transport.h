/* How the ranks of one rail - those of the same local index on every node - reach each other. One row of functions per
 * library; a group that lies on one node needs none and never comes here.
 *
 * A rail only swaps: every node of it gives one message to every other node and takes one from each, in the same order
 * on all. So messages need no names beyond their number, none is ever unexpected, and a node that has nothing to say
 * says so. A rail that has failed stays failed: every later swap ends at once with the first error, which names the node.
 *
 * There are two kinds. Where work is done at once (host backend) rail_swap moves host memory and returns when the
 * messages are there. Where work goes on later (CUDA) rail_swap_on puts a swap of device memory into a stream: it is
 * done in the order of the stream, the host waits for nothing, and both sides know all sizes beforehand. What arrived of
 * a swap that failed or was aborted is undefined, the stream goes on behind it all the same: kernels that read it must
 * bear anything, and rail_check tells what has happened.
 *
 * Threads: a rail lives on one lane; `abort` alone may be called from anywhere, and ends a swap that waits within
 * TRANSPORT_LOOK_MS (one in a stream within a second). Messages are not checked here: who reads them checks them. */
#ifndef EPD_EP_TRANSPORT_H
#define EPD_EP_TRANSPORT_H

#include <stddef.h>
#include <stdint.h>

#include "proto/limits.h"
#include "proto/status.h"
#include "proto/words.h"

#define TRANSPORT_MAX_ADDRESS_BYTES EPD_MAX_RAIL_ADDRESS_BYTES
/* A waiting rail looks at its abort word at least this often. */
#define TRANSPORT_LOOK_MS 10
/* A quiet moment in which rails end lasts at most about so long. */
#define TRANSPORT_END_MS 3000
/* A swap in a stream keeps at most so many blocks on the device while it waits for other nodes. */
#define TRANSPORT_RAIL_BLOCKS 8
/* Channels of its device that a rail takes on CUDA: its own stream, and those that NCCL makes for its communicator. */
#define TRANSPORT_RAIL_STREAMS 3

struct transport_rail;
struct backend_device;

struct transport_options {
    const char *ways;    /* the library's own list of network kinds; borrowed during load */
    const char *devices; /* network devices it may use; "" for all; borrowed during load */
};

/* Where a rail listens: opaque bytes of the library. node: what errors call the node that it is on. rail_open gives the
 * place on the rail; who knows a better name writes it here before rail_connect. */
struct transport_address {
    uint32_t bytes, node;
    uint8_t data[TRANSPORT_MAX_ADDRESS_BYTES];
};

struct transport_part {
    const void *send; /* [send_bytes], untouched until the swap ends */
    uint64_t send_bytes;
    void *receive; /* [receive_room] */
    uint64_t receive_room;
    uint64_t received_bytes; /* out */
};

/* One part of what a swap on a stream takes to and from one node. Both sides give the same parts in the same order, and
 * the same sizes: send_bytes here is receive_bytes there. */
struct transport_move {
    const void *send; /* [send_bytes] device memory, untouched until the swap has ended */
    uint64_t send_bytes;
    void *receive; /* [receive_bytes] device memory, apart from everything that is sent */
    uint64_t receive_bytes;
};

struct CUstream_st;

struct transport {
    const char *name;
    /* Once, before any thread runs: loads the library, which may want its settings in the environment. */
    enum epd_status (*load)(const struct transport_options *options, struct epd_error *error);
    /* Lane thread, before the device has any work: what the library has to do once there. NULL: nothing. */
    enum epd_status (*device_begin)(struct epd_error *error);
    /* Lane thread, of the node-th node of the rail. device: the lane's, or NULL where there is no lane. */
    enum epd_status (*rail_open)(struct backend_device *device, uint32_t node, struct transport_rail **rail,
                                 struct transport_address *address, struct epd_error *error);
    /* Begins; addresses[n_nodes] are copied. */
    enum epd_status (*rail_connect)(struct transport_rail *rail, uint32_t n_nodes, uint32_t node,
                                    const struct transport_address *addresses, uint64_t limit_ns,
                                    struct epd_error *error);
    /* Waits for nothing. 1: it is decided, and *error is OK or says why not, EPD_TIMEOUT after limit_ns. 0: later. */
    int (*rail_connected)(struct transport_rail *rail, struct epd_error *error);
    /* NULL where there is rail_swap_on. parts[n_nodes]; that of this node is not looked at. EPD_PEER_LOST names the
     * node that is gone, or carries what abort was given; EPD_TIMEOUT after limit_ns of connect. */
    enum epd_status (*rail_swap)(struct transport_rail *rail, struct transport_part *parts,
                                 struct epd_error *error);
    /* NULL where there is rail_swap. moves[n_parts * n_nodes], the parts one behind the other; those of this node are not
     * looked at, and 0 bytes are no message: a swap may have none. stream: of the lane's device. Returns when all of it is
     * in the stream; an error if it is not, or if the rail has failed before. Lanes of one rail give their swaps in one
     * order, on any stream. */
    enum epd_status (*rail_swap_on)(struct transport_rail *rail, const struct transport_move *moves,
                                    uint32_t n_parts, struct CUstream_st *stream, struct epd_error *error);
    /* Whether the rail still works, for swaps that are in a stream: waits for nothing. The first error is told, and has
     * ended what waits in streams, as abort does. NULL where rail_swap_on is NULL. */
    enum epd_status (*rail_check)(struct transport_rail *rail, struct epd_error *error);
    /* Any thread; the first one counts. */
    void (*rail_abort)(struct transport_rail *rail, const struct epd_error *why);
    /* Waits for nothing. */
    void (*rail_close)(struct transport_rail *rail);
    /* NULL where rail_close is all. Behind it, on the lane: 1 if all that had to leave streams has left; waits for nothing. */
    int (*rail_closed)(struct transport_rail *rail);
    /* NULL likewise. The rest, of rails of one lane that all are closed so, in a quiet moment of the node (quiet.h). All of
     * them together take TRANSPORT_END_MS at most, and what has not ended then is left to end by itself. */
    void (*rails_end)(struct transport_rail *const *rails, uint32_t n_rails);
};

/* The transport between nodes of a backend; NULL, and the reason, if this build has none. */
const struct transport *transport_find(enum epd_backend_kind backend, struct epd_error *reason);

#endif
