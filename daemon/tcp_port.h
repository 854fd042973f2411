/* The TCP port at which a rendezvous listens: taken although something else has it for a moment, and whether the system may
 * give it away. Where the port lies among those of outgoing connections (net.ipv4.ip_local_port_range), any of them can get it
 * while a worker is being replaced. At a worker's start, before the loop runs. */
#ifndef EPD_DAEMON_TCP_PORT_H
#define EPD_DAEMON_TCP_PORT_H

#include <stdint.h>
#include <sys/socket.h>

#include "daemon/log.h"
#include "proto/status.h"

/* How long an address that is in use is tried again. */
#define TCP_PORT_PATIENCE_MS 10000
#define TCP_PORT_RETRY_MS    50

/* A listening socket, close-on-exec, that does not block; the caller's. Waits up to limit_ms while the address is in use. */
EPD_MUST_CHECK enum epd_status tcp_port_listen(const struct sockaddr *address, socklen_t address_bytes,
                                               int backlog, uint64_t limit_ms, int *fd,
                                               struct epd_error *error);

/* 1 if the port lies in `range` ("first last") and not in `reserved` ("80,8000-8010"); both as the kernel prints them. */
int tcp_port_is_given_away(uint16_t port, const char *range, const char *reserved);
/* Looks into /proc/sys and logs one line with the advice if it is. */
void tcp_port_advise(struct log *log, const char *port);

#endif
