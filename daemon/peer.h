/* The process at the other end of a session. Its death is watched by itself, because it does not always end the
 * connection: children that it forked hold a copy of the socket. Loop thread. */
#ifndef EPD_DAEMON_PEER_H
#define EPD_DAEMON_PEER_H

#include <sys/socket.h>

#include "proto/status.h"

/* How the kernel lets us name the process; what does not work here is not tried again. */
enum peer_watch {
    PEER_WATCH_SOCKET = 0, /* SO_PEERPIDFD: the very process that connected */
    PEER_WATCH_PID,        /* pidfd_open of the pid in its credentials: a pid that was given away between its
                              connect and our accept would name a stranger */
    PEER_WATCH_NONE,       /* neither: only the end of the connection tells */
    PEER_WATCH_COUNT
};

/* A pidfd (the caller's; readable once the process is dead), or -1 where there is none to have: *watch then says
 * PEER_WATCH_NONE, or the peer lives in a pid namespace in which we cannot name it. *watch: in, what to try first;
 * out, what works here. EPD_DISCONNECTED: the process is dead already. EPD_QUOTA: no fds left. */
EPD_MUST_CHECK enum epd_status peer_open(int socket_fd, const struct ucred *peer, enum peer_watch *watch,
                                         int *pidfd, struct epd_error *error);
const char *peer_watch_name(enum peer_watch watch);

#endif
