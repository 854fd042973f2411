/* Fds that a parent hands over by the LISTEN_FDS convention: systemd to the supervisor, the supervisor to the
 * worker. LISTEN_PID says whom they are for, LISTEN_FDS how many follow from fd 3 on, LISTEN_FDNAMES what
 * each is. Main thread, before any other thread exists. */
#ifndef EPD_DAEMON_INHERITED_H
#define EPD_DAEMON_INHERITED_H

#include "proto/status.h"

#define INHERITED_RANK     "epd"
#define INHERITED_CONTROL  "epd-control"
#define INHERITED_CHANNEL  "epd-channel"
#define INHERITED_RECORDER "epd-recorder"
#define INHERITED_FIRST_FD 3
#define INHERITED_MAX_FDS  8

/* -1 where nothing was handed over under the name. */
struct inherited {
    int rank_fd, control_fd, channel_fd, recorder_fd;
};

/* Reads and clears the variables, and makes the fds close-on-exec. EPD_INVALID_ARGUMENT: an fd of no known
 * name. */
EPD_MUST_CHECK enum epd_status inherited_take(struct inherited *inherited, struct epd_error *error);
/* In a child between fork and exec: puts the fds in place and sets the variables. 0 on success. */
int inherited_give(const struct inherited *inherited);

#endif
