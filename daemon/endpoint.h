/* A listening Unix socket with the rules that make it safe to trust its path: one daemon per path (a lock
 * file), a directory that only its owner can write, no links to follow, the mode set before anybody can
 * connect. Supervisor, before it serves; no thread of its own. */
#ifndef EPD_DAEMON_ENDPOINT_H
#define EPD_DAEMON_ENDPOINT_H

#include "daemon/config.h"
#include "proto/status.h"

struct endpoint {
    char path[CONFIG_TEXT_BYTES];
    int fd;      /* owned, listening, non-blocking, close-on-exec; -1: closed */
    int lock_fd; /* owned, holds the lock; -1: taken over from systemd, which owns the path */
};

/* Binds and listens. group: name or number, "" = unchanged. Errors name the path and the rule:
 * EPD_INVALID_ARGUMENT (path too long, not a socket, unknown group), EPD_PERMISSION (directory, lock),
 * EPD_IN_USE (another daemon), EPD_SYSTEM. */
EPD_MUST_CHECK enum epd_status endpoint_open(struct endpoint *endpoint, const char *path, uint32_t mode,
                                             const char *group, struct epd_error *error);
/* Takes over a socket that systemd has bound and that listens already. */
EPD_MUST_CHECK enum epd_status endpoint_adopt(struct endpoint *endpoint, int fd, const char *path,
                                              struct epd_error *error);
/* Removes the path if this process made it. Idempotent. */
void endpoint_close(struct endpoint *endpoint);

#endif
