/* One datagram and at most one fd over a SOCK_SEQPACKET socket. Non-blocking sockets return PACKET_AGAIN.
 * Any thread; one reader and one writer per socket at a time. */
#ifndef EPD_PROTO_PACKET_H
#define EPD_PROTO_PACKET_H

#include <stddef.h>

#include "proto/status.h"

enum packet_result {
    PACKET_OK = 0,
    PACKET_AGAIN,     /* would block */
    PACKET_EOF,       /* peer closed */
    PACKET_TRUNCATED, /* datagram longer than the buffer: the rest is lost */
    PACKET_BAD_FDS, /* more than one fd, or fds lost on the way (MSG_CTRUNC); all received ones are closed */
    PACKET_CROWDED, /* nothing was sent: this user has as many fds in datagrams that nobody has read yet as the kernel
                       allows. Later, when others have read theirs, it works; the socket does not tell when */
    PACKET_ERROR, /* errno is set */
};

/* Receives one datagram into buffer. *fd is -1 or one fd (close-on-exec) that the caller now owns. */
EPD_MUST_CHECK enum packet_result packet_receive(int socket, void *buffer, size_t buffer_bytes, size_t *bytes,
                                                 int *fd);
/* Sends one datagram with fd (or -1); fd stays the caller's. Never raises SIGPIPE. */
EPD_MUST_CHECK enum packet_result packet_send(int socket, const void *datagram, size_t bytes, int fd);

#endif
