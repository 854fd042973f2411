#include "daemon/peer.h"

#include <errno.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

/* Younger than the headers we build with. */
#ifndef SO_PEERPIDFD
#define SO_PEERPIDFD 77
#endif

static const char *const watch_names[PEER_WATCH_COUNT] = {"socket", "pid", "none"};

const char *peer_watch_name(enum peer_watch watch)
{
    return watch_names[watch];
}

/* 0 or errno. */
static int by_socket(int socket_fd, int *pidfd)
{
    socklen_t bytes = sizeof(*pidfd);
    return getsockopt(socket_fd, SOL_SOCKET, SO_PEERPIDFD, pidfd, &bytes) == 0 ? 0 : errno;
}

static int by_pid(pid_t pid, int *pidfd)
{
    if (pid <= 0) /* of a namespace that is not ours */
        return EINVAL;
    const long opened = syscall(SYS_pidfd_open, pid, 0);
    if (opened < 0)
        return errno;
    *pidfd = (int)opened;
    return 0;
}

static int out_of_fds(int code)
{
    return code == EMFILE || code == ENFILE;
}

/* Refused by this kernel or by a sandbox, for every peer alike. */
static int not_here(int code)
{
    return code == ENOPROTOOPT || code == ENOSYS || code == EPERM || code == EOPNOTSUPP;
}

enum epd_status peer_open(int socket_fd, const struct ucred *peer, enum peer_watch *watch, int *pidfd,
                          struct epd_error *error)
{
    int made = -1, code = ENOSYS;
    if (*watch == PEER_WATCH_SOCKET) {
        code = by_socket(socket_fd, &made);
        if (not_here(code))
            *watch = PEER_WATCH_PID;
    }
    /* Also for a peer that is dead and reaped: some kernels have no pidfd for it, and pidfd_open says why. */
    if (code != 0 && !out_of_fds(code) && *watch != PEER_WATCH_NONE) {
        code = by_pid(peer->pid, &made);
        if (not_here(code) && *watch == PEER_WATCH_PID)
            *watch = PEER_WATCH_NONE;
    }
    if (out_of_fds(code))
        return error_set(error, EPD_QUOTA, "peer: no fd to watch its process: %s", strerror(code));
    if (code == ESRCH)
        return error_set(error, EPD_DISCONNECTED, "peer: process %d is dead", (int)peer->pid);
    *pidfd = code == 0 ? made : -1;
    return EPD_OK;
}
