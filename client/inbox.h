/* What comes from the daemon: one datagram at a time, decoded. Owned by a connection; one thread at a time
 * (the opener until the hello is answered, the watcher from then on). */
#ifndef EPD_CLIENT_INBOX_H
#define EPD_CLIENT_INBOX_H

#include "proto/arena.h"
#include "proto/message.h"

/* One message and the fd that came with it. */
struct inbox_item {
    struct message message;
    int fd; /* -1 or owned by the holder of the item */
};

struct inbox {
    int socket; /* borrowed from the connection */
    struct arena arena;
    struct inbox_item item; /* the newest */
    unsigned char datagram[EPD_MAX_DATAGRAM_BYTES];
};

enum inbox_result {
    INBOX_MESSAGE = 0, /* inbox->item holds it */
    INBOX_HUNG_UP,     /* nothing more will come; no reason was given, *error is untouched */
    INBOX_NOTHING,     /* nothing came within the socket's timeout; *error is untouched */
    INBOX_FAILED, /* *error says why the session is over: a CLOSED notice, or a peer that breaks the protocol
                   */
};

EPD_MUST_CHECK enum epd_status inbox_init(struct inbox *inbox, int socket, struct epd_error *error);
void inbox_fini(struct inbox *inbox);
EPD_MUST_CHECK enum inbox_result inbox_receive(struct inbox *inbox, struct epd_error *error);

/* Closes the item's fd if it has one. */
void inbox_drop_fd(struct inbox_item *item);

/* EPD_OK if the item answers a request as wanted; an error reply, or a reply of another kind, becomes *error
 * and its fd is closed. */
EPD_MUST_CHECK enum epd_status inbox_check_reply(struct inbox_item *item, enum message_kind want,
                                                 struct epd_error *error);

#endif
