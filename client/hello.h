/* The first exchange of a session, on a socket that nobody else uses yet. No state; the opener's thread. */
#ifndef EPD_CLIENT_HELLO_H
#define EPD_CLIENT_HELLO_H

#include "client/inbox.h"
#include "proto/page.h"

#define HELLO_REQUEST_ID 1

/* Sends the hello and waits for its answer until the deadline; on success inbox->item.message is the HELLO
 * reply and *page the session page. Errors: EPD_DISCONNECTED (hung up or silent: worth another connection),
 * EPD_VERSION_MISMATCH, and what the daemon refuses with. */
EPD_MUST_CHECK enum epd_status hello(struct inbox *inbox, const char *client_name, uint64_t deadline_ns,
                                     struct page **page, struct epd_error *error);

#endif
