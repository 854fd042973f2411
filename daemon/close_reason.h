/* Why a session ends: one table that feeds logs, counters and the document of `epdctl stats`. No dependencies
 * but status. */
#ifndef EPD_DAEMON_CLOSE_REASON_H
#define EPD_DAEMON_CLOSE_REASON_H

#include "proto/status.h"

/* id, name, what the client is told, expected (logged as info, else warn), meaning */
#define CLOSE_REASON_TABLE(X)                                                                                \
    X(CLOSE_CLIENT, "client", EPD_DISCONNECTED, 1, "the client closed its end, on purpose or by dying")      \
    X(CLOSE_PEER_DIED, "peer_died", EPD_DISCONNECTED, 1,                                                     \
      "the client died, its children hold the connection")                                                   \
    X(CLOSE_BAD_FRAME, "bad_frame", EPD_PROTOCOL, 0, "a datagram that cannot be decoded")                    \
    X(CLOSE_OVERSIZED, "oversized", EPD_PROTOCOL, 0, "a datagram longer than the protocol allows")           \
    X(CLOSE_BAD_FDS, "bad_fds", EPD_PROTOCOL, 0, "more than one fd, or fds lost on the way")                 \
    X(CLOSE_UNEXPECTED_FD, "unexpected_fd", EPD_PROTOCOL, 0, "an fd with a message that takes none")         \
    X(CLOSE_BAD_STATE, "bad_state", EPD_PROTOCOL, 0, "a message that the state of the session forbids")      \
    X(CLOSE_BAD_LAUNCH, "bad_launch", EPD_UNKNOWN_ID, 0, "a launch of a plan that is not the session's")     \
    X(CLOSE_VERSION, "version", EPD_VERSION_MISMATCH, 1, "no protocol version in common")                    \
    X(CLOSE_HELLO_TIMEOUT, "hello_timeout", EPD_TIMEOUT, 0, "no Hello in time")                              \
    X(CLOSE_SLOW_READER, "slow_reader", EPD_QUOTA, 0, "more output waiting than the limit allows")           \
    X(CLOSE_SOCKET_ERROR, "socket_error", EPD_SYSTEM, 0, "the socket failed")                                \
    X(CLOSE_NO_MEMORY, "no_memory", EPD_NO_MEMORY, 0, "the daemon has no memory for the session")            \
    X(CLOSE_QUOTA, "quota", EPD_QUOTA, 0, "too many sessions")                                               \
    X(CLOSE_CROWDED_OUT, "crowded_out", EPD_QUOTA, 1,                                                        \
      "idle, and its place on the control socket was needed")                                                \
    X(CLOSE_PERMISSION, "permission", EPD_PERMISSION, 0, "the uid may not connect")                          \
    X(CLOSE_EVICTED, "evicted", EPD_EVICTED, 1, "a person asked for it")                                     \
    X(CLOSE_DEAD, "dead", EPD_EVICTED, 0, "the other ranks missed it for longer than the dead timer")        \
    X(CLOSE_DRAINING, "draining", EPD_DRAINING, 1, "the daemon ends")                                        \
    X(CLOSE_RESTART, "restart", EPD_RESTARTED, 0, "the worker gives up its devices and starts again")

enum close_reason {
#define CLOSE_REASON_ENUM(id, name, status, expected, text) id,
    CLOSE_REASON_TABLE(CLOSE_REASON_ENUM)
#undef CLOSE_REASON_ENUM
        CLOSE_REASON_COUNT
};

const char *close_reason_name(enum close_reason reason);
const char *close_reason_text(enum close_reason reason);
enum epd_status close_reason_status(enum close_reason reason);
int close_reason_expected(enum close_reason reason);

#endif
