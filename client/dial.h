/* From a socket path to a connected SOCK_SEQPACKET socket. No state; any thread. */
#ifndef EPD_CLIENT_DIAL_H
#define EPD_CLIENT_DIAL_H

#include <stddef.h>
#include <stdint.h>

#include "proto/status.h"

/* Longest socket path that the system takes, terminating zero included. */
#define DIAL_PATH_BYTES 108

/* Where the daemon listens: given if not NULL, else $EPD_SOCKET, else $XDG_RUNTIME_DIR/epd/epd.sock, but /run/epd/epd.sock where
 * only that is there or there is no XDG_RUNTIME_DIR (variables that are set to "" count as unset). EPD_INVALID_ARGUMENT if it is
 * empty or too long. */
EPD_MUST_CHECK enum epd_status dial_path(const char *given, char path[DIAL_PATH_BYTES],
                                         struct epd_error *error);

/* The user's own path, which may be waited for, unless only the system's is there. */
const char *dial_first_there(const char *own, const char *system);

/* Connects; while the socket is absent, refuses or its backlog is full, tries again with backoff until the
 * deadline. The socket is close-on-exec and blocking. Errors: EPD_DISCONNECTED (nobody there),
 * EPD_PERMISSION, EPD_SYSTEM. */
EPD_MUST_CHECK enum epd_status dial(const char *path, uint64_t deadline_ns, int *connected,
                                    struct epd_error *error);

/* 1 if somebody listens on the path now. */
int dial_probe(const char *path);

#endif
