/* What a client may ask: one short function per message kind, from the checked message to the group, buffer
 * or plan it is about, and back to a reply - at once, or later by whoever finishes the work. Loop thread. */
#ifndef EPD_DAEMON_REQUEST_H
#define EPD_DAEMON_REQUEST_H

#include "daemon/session.h"

/* Handles one message of the session and takes over fd (-1: none). The session may be closing afterwards. */
void request_handle(struct session *session, const struct message *message, int fd);

#endif
