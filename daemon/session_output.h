/* What a session sends: at once if the socket takes it, else in order as soon as it does, within limits. A client that
 * does not read loses its session, not the daemon's memory. Loop thread. */
#ifndef EPD_DAEMON_SESSION_OUTPUT_H
#define EPD_DAEMON_SESSION_OUTPUT_H

#include <stdint.h>

#include "proto/message.h"
#include "proto/status.h"

struct session;

/* Replies with an fd (documents, memory) that may wait for a client which does not read, whatever their bytes: each
 * holds an fd of the worker and the memory behind it. */
#define SESSION_MAX_OUTPUT_FDS 64

/* Sends, or queues if the socket is full. fd stays the caller's. Does nothing on a closing session. */
void session_send(struct session *session, const struct message *message, int fd);
/* The socket is writable: sends what waits. */
void session_flush(struct session *session);
/* The first datagram that waits, unsent; there is one. */
void session_drop_output(struct session *session);
/* The sweep's: tries again what was crowded out. Returns 1 if it still is. */
int session_retry(struct session *session);
/* EPD_CUDA ends the worker, too. */
void session_reply_error(struct session *session, uint64_t request_id, const struct epd_error *error);
void session_reply_ok(struct session *session, uint64_t request_id);

#endif
