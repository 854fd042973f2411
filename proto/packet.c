#include "proto/packet.h"

#include <assert.h>
#include <errno.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

/* Room for one fd. CMSG_LEN, not CMSG_SPACE, is what recvmsg is told: the padding of CMSG_SPACE holds a
 * second fd on 64-bit machines, and the kernel would fill it. */
union packet_control {
    char bytes[CMSG_SPACE(sizeof(int))];
    struct cmsghdr align;
};

/* Takes the first fd out of the control data and closes any other; returns how many there were. */
static int take_fds(struct msghdr *header, int *fd)
{
    int n_fds = 0;

    *fd = -1;
    for (struct cmsghdr *control = CMSG_FIRSTHDR(header); control; control = CMSG_NXTHDR(header, control)) {
        if (control->cmsg_level != SOL_SOCKET || control->cmsg_type != SCM_RIGHTS)
            continue;
        size_t n = (control->cmsg_len - CMSG_LEN(0)) / sizeof(int);
        for (size_t i = 0; i < n; i++, n_fds++) {
            int received;

            memcpy(&received, CMSG_DATA(control) + i * sizeof(int), sizeof received);
            if (n_fds == 0)
                *fd = received;
            else
                close(received);
        }
    }
    return n_fds;
}

static enum packet_result result_of_errno(void)
{
    switch (errno) {
    case EAGAIN:
        return PACKET_AGAIN;
    case EPIPE:
    case ECONNRESET: /* the peer closed with datagrams unread */
        return PACKET_EOF;
    case ETOOMANYREFS:
        return PACKET_CROWDED;
    default:
        return PACKET_ERROR;
    }
}

enum packet_result packet_receive(int socket, void *buffer, size_t buffer_bytes, size_t *bytes, int *fd)
{
    union packet_control control;
    struct iovec data = {.iov_base = buffer, .iov_len = buffer_bytes};
    struct msghdr header = {.msg_iov = &data,
                            .msg_iovlen = 1,
                            .msg_control = control.bytes,
                            .msg_controllen = CMSG_LEN(sizeof(int))};
    ssize_t received;

    do {
        received = recvmsg(socket, &header, MSG_CMSG_CLOEXEC);
    } while (received < 0 && errno == EINTR);
    if (received < 0)
        return result_of_errno();

    int received_fd;
    int n_fds = take_fds(&header, &received_fd);
    enum packet_result result = PACKET_OK;
    if (received == 0) /* nobody sends an empty datagram: see packet_send */
        result = PACKET_EOF;
    else if (header.msg_flags & MSG_TRUNC)
        result = PACKET_TRUNCATED;
    else if (n_fds > 1 || (header.msg_flags & MSG_CTRUNC))
        result = PACKET_BAD_FDS;
    if (result != PACKET_OK) {
        if (received_fd >= 0)
            close(received_fd);
        return result;
    }
    *bytes = (size_t)received;
    *fd = received_fd;
    return PACKET_OK;
}

enum packet_result packet_send(int socket, const void *datagram, size_t bytes, int fd)
{
    /* The receiver could not tell an empty datagram from the end of the connection. */
    assert(bytes > 0);
    struct iovec data = {.iov_base = (void *)datagram, .iov_len = bytes};
    struct msghdr header = {.msg_iov = &data, .msg_iovlen = 1};
    union packet_control control;

    if (fd >= 0) {
        memset(&control, 0, sizeof control);
        header.msg_control = control.bytes;
        header.msg_controllen = sizeof control.bytes;
        struct cmsghdr *rights = CMSG_FIRSTHDR(&header);
        *rights = (struct cmsghdr){
            .cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS, .cmsg_len = CMSG_LEN(sizeof fd)};
        memcpy(CMSG_DATA(rights), &fd, sizeof fd);
    }
    ssize_t sent;
    do {
        sent = sendmsg(socket, &header, MSG_NOSIGNAL);
    } while (sent < 0 && errno == EINTR);
    return sent < 0 ? result_of_errno() : PACKET_OK;
}
