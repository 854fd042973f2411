/* Fds that a parent hands over by the LISTEN_FDS convention: systemd to the supervisor, the supervisor to the
 * worker. LISTEN_PID says whom they are for, LISTEN_FDS how many follow from fd 3 on, LISTEN_FDNAMES what
 * each is. Main thread. */
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

/* Reads and clears the variables, and makes the fds close-on-exec; before any other thread exists.
 * EPD_INVALID_ARGUMENT: an fd of no known name. */
EPD_MUST_CHECK enum epd_status inherited_take(struct inherited *inherited, struct epd_error *error);
/* Made before a fork, used by the child: between fork and exec it may allocate nothing and set no variable, for another
 * thread of the parent may have held a lock that nobody gives back. */
struct handover {
    struct inherited inherited;
    char **environment; /* owned, for execve; its words but for three are those of `environ` */
    char pid[32];       /* LISTEN_PID=..., the child's own */
};

EPD_MUST_CHECK enum epd_status handover_create(struct handover *handover, const struct inherited *inherited,
                                               struct epd_error *error);
void handover_destroy(struct handover *handover);
/* The child: puts the fds in place and says whom they are for. 0 on success. */
int handover_give(struct handover *handover);

#endif
