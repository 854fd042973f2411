/* Datagram <-> struct message. The codec files are the only ones that know protobuf. Every size, count and enum of a peer is checked here;
 * what passes is safe to use without another look at ranges that depend on nothing but the message itself.
 * Stateless; any thread with its own arena. */
#ifndef EPD_PROTO_CODEC_H
#define EPD_PROTO_CODEC_H

#include <stddef.h>

#include "proto/arena.h"
#include "proto/message.h"

/* Which end of which socket is decoding: a client must not send replies, a rank must not send control requests. */
enum codec_side {
    CODEC_FROM_CLIENT = 1,  /* daemon reads a rank socket */
    CODEC_FROM_CONTROL = 2, /* daemon reads the control socket */
    CODEC_FROM_DAEMON = 3,  /* a client or epdctl reads */
};

/* Decodes one datagram. message->plan_create.bindings points into the arena and lives until the caller resets it (decode
 * itself resets the arena first). Errors: EPD_PROTOCOL with a text that names the field, what was given and what is
 * allowed; request_id is still set in *message when it could be read, so that the error can be answered. */
EPD_MUST_CHECK enum epd_status codec_decode(enum codec_side side, const void *datagram, size_t bytes,
                                            struct arena *arena, struct message *message,
                                            struct epd_error *error);

/* Encodes into the caller's buffer of at least EPD_MAX_DATAGRAM_BYTES. What a peer would refuse is refused here already:
 * EPD_INVALID_ARGUMENT with the same text. EPD_PROTOCOL if the message does not fit. */
EPD_MUST_CHECK enum epd_status codec_encode(const struct message *message, void *datagram, size_t *bytes,
                                            struct epd_error *error);

#endif
