/* The way to the daemon's control socket: one connection, one request at a time, each answered by a JSON
 * document or an error. One thread. */
#ifndef EPD_EPDCTL_LINK_H
#define EPD_EPDCTL_LINK_H

#include <jansson.h>

#include "proto/arena.h"
#include "proto/message.h"

/* How long connecting and each answer may take before epdctl gives up: the daemon's loop answers in well
 * under a millisecond, so a second of silence already means that something is wrong. */
#define LINK_TIMEOUT_MS_DEFAULT 5000

struct link {
    int socket; /* owned, -1 if closed */
    int timeout_ms;
    uint64_t last_request_id;
    struct arena arena;
    unsigned char *datagram; /* owned, EPD_MAX_DATAGRAM_BYTES */
};

/* The control socket to use when none is named: $EPD_CONTROL_SOCKET, else epd-control.sock beside
 * $EPD_SOCKET, else under $XDG_RUNTIME_DIR/epd, but /run/epd/epd-control.sock where only that is there. */
void link_default_path(char *path, size_t bytes);

/* EPD_DISCONNECTED if nobody listens there, EPD_PERMISSION if we may not; the text has the path and what to
 * do. */
EPD_MUST_CHECK enum epd_status link_open(struct link *link, const char *path, int timeout_ms,
                                         struct epd_error *error);
void link_close(struct link *link);

/* Sends one request. *document is a new reference: the daemon's JSON, or NULL where the daemon answers OK
 * without one. The daemon's refusal comes back with its own status and text; EPD_DISCONNECTED and EPD_TIMEOUT
 * are the link's own. */
EPD_MUST_CHECK enum epd_status link_request(struct link *link, const struct message_control *control,
                                            json_t **document, struct epd_error *error);

#endif
