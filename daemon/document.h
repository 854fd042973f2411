/* A JSON document on its way to a client: text in a sealed memfd, because it may be larger than a datagram
 * and the reader must be able to map it safely. Any thread. */
#ifndef EPD_DAEMON_DOCUMENT_H
#define EPD_DAEMON_DOCUMENT_H

#include <jansson.h>
#include <stdint.h>

#include "proto/status.h"

/* Takes the reference to json (NULL: EPD_NO_MEMORY). fd belongs to the caller. */
EPD_MUST_CHECK enum epd_status document_seal(json_t *json, int *fd, uint64_t *bytes, struct epd_error *error);
/* [bytes] as hex digits; text has room for 2 * bytes + 1. */
void document_hex(const uint8_t *data, size_t bytes, char *text);

#endif
