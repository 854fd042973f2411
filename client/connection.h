/* One session with the daemon: the socket, the session page, and the watcher, the thread that reads every
 * datagram and hands replies to the callers that wait for them. A connection lives until it is lost, once and
 * for good: by a CLOSED notice, by a hang-up or by epd_close. From then on every call returns what it was
 * lost by. Counted references: the client holds one and each group one, so that the page and what hangs on it
 * stay mapped until the last group made over it is left.
 *
 * States: open (from connection_open) -> lost. In open, calls wait for their reply and launches are sent.
 * Lost is entered on the watcher thread, which then releases every caller, tells its owner through
 * config.lost, and ends. */
#ifndef EPD_CLIENT_CONNECTION_H
#define EPD_CLIENT_CONNECTION_H

#include "client/dial.h"
#include "client/inbox.h"
#include "proto/page.h"

struct connection;

struct connection_config {
    const char *path;        /* borrowed during connection_open */
    const char *client_name; /* borrowed during connection_open */
    uint64_t deadline_ns;    /* for connecting and the hello */
    /* how long a message waits for room in the socket of a daemon that does not read */
    uint32_t send_timeout_ms;
    /* Runs on the watcher thread, once, after connection_check has begun to fail. Must not call back into the
     * connection except for connection_check, connection_stopping and connection_page, and comes to an end soon after
     * connection_stopping has become true. */
    void (*lost)(void *arg, struct connection *connection);
    void *arg;
};

/* Connects and agrees on protocol and page. Tries again until the deadline while the daemon is absent or
 * hangs up before it has answered, as one does that is being restarted. Errors: see epd_open. */
EPD_MUST_CHECK enum epd_status connection_open(const struct connection_config *config,
                                               struct connection **opened, struct epd_error *error);
void connection_retain(struct connection *connection);
/* Not from the watcher thread. The last release hangs up, joins the watcher and unmaps the page. */
void connection_release(struct connection *connection);
/* Hangs up and waits for the watcher to end: no callback runs after it. Idempotent, but not from the watcher
 * thread. */
void connection_stop(struct connection *connection);
/* 1 once this side hangs up. */
int connection_stopping(const struct connection *connection);

/* EPD_OK while the connection is open, else what it was lost by. */
EPD_MUST_CHECK enum epd_status connection_check(const struct connection *connection, struct epd_error *error);
const struct message_reply_hello *connection_hello(const struct connection *connection);
struct page *connection_page(const struct connection *connection);

/* Sends the request (its request_id is set here) with fd or -1 and waits for its reply, which must be of the
 * kind `want`. An error reply becomes the call's own error. timeout_ms bounds the wait against a daemon that
 * has stopped answering; a reply that comes after it is undone. */
EPD_MUST_CHECK enum epd_status connection_call(struct connection *connection, struct message *request, int fd,
                                               enum message_kind want, uint32_t timeout_ms,
                                               struct inbox_item *reply, struct epd_error *error);

/* Sends a request whose answer nobody waits for, if there is room for it now. Sends of others no longer wait for room either: the
 * connection ends next. */
void connection_tell_last(struct connection *connection, struct message *request);

/* Sends one launch. Its seq is *last_seq + 1; *last_seq is advanced by n_repeats if it was sent, and is
 * guarded by the connection: sequence numbers leave in their order. No allocation, one system call. */
EPD_MUST_CHECK enum epd_status connection_launch(struct connection *connection, struct message_launch *launch,
                                                 uint64_t *last_seq, struct epd_error *error);

#endif
