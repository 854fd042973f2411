/* Datagrams and fds over a real socket pair; every test ends with as many open fds as it began with. */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include "proto/limits.h"
#include "proto/packet.h"
#include "tests/unit/proto/suite.h"

struct link {
    int a, b;       /* two ends of a socket, non-blocking */
    int fds_before; /* open fds of the process */
};

static int count_fds(void)
{
    DIR *directory = opendir("/proc/self/fd");
    int n = 0;

    ck_assert_ptr_nonnull(directory);
    while (readdir(directory))
        n++;
    closedir(directory);
    return n;
}

static void link_init(struct link *link)
{
    int ends[2];

    link->fds_before = count_fds();
    ck_assert_int_eq(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, ends), 0);
    link->a = ends[0];
    link->b = ends[1];
}

static void link_fini(struct link *link)
{
    close(link->a);
    close(link->b);
    ck_assert_int_eq(count_fds(), link->fds_before);
}

/* Sends n_fds fds at once, which packet_send never does. */
static void send_fds(int socket, const int *fds, size_t n_fds)
{
    union {
        char bytes[CMSG_SPACE(8 * sizeof(int))];
        struct cmsghdr align;
    } control = {{0}};
    char letter = 'x';
    struct iovec data = {.iov_base = &letter, .iov_len = 1};
    struct msghdr header = {.msg_iov = &data,
                            .msg_iovlen = 1,
                            .msg_control = control.bytes,
                            .msg_controllen = CMSG_SPACE(n_fds * sizeof(int))};
    struct cmsghdr *rights = CMSG_FIRSTHDR(&header);

    rights->cmsg_level = SOL_SOCKET;
    rights->cmsg_type = SCM_RIGHTS;
    rights->cmsg_len = CMSG_LEN(n_fds * sizeof(int));
    memcpy(CMSG_DATA(rights), fds, n_fds * sizeof(int));
    ck_assert_int_eq(sendmsg(socket, &header, MSG_NOSIGNAL), 1);
}

static int open_memfd(void)
{
    int fd = memfd_create("packet-test", MFD_CLOEXEC);

    ck_assert_int_ge(fd, 0);
    return fd;
}

START_TEST(a_datagram_arrives_whole_and_alone)
{
    struct link link;
    char buffer[64];
    size_t bytes;
    int fd;

    link_init(&link);
    ck_assert_int_eq(packet_send(link.a, "first", 5, -1), PACKET_OK);
    ck_assert_int_eq(packet_send(link.a, "second", 6, -1), PACKET_OK);
    ck_assert_int_eq(packet_receive(link.b, buffer, sizeof buffer, &bytes, &fd), PACKET_OK);
    ck_assert_uint_eq(bytes, 5);
    ck_assert_mem_eq(buffer, "first", 5);
    ck_assert_int_eq(fd, -1);
    ck_assert_int_eq(packet_receive(link.b, buffer, sizeof buffer, &bytes, &fd), PACKET_OK);
    ck_assert_uint_eq(bytes, 6);
    ck_assert_int_eq(packet_receive(link.b, buffer, sizeof buffer, &bytes, &fd), PACKET_AGAIN);
    link_fini(&link);
}
END_TEST

START_TEST(the_largest_datagram_passes_and_a_larger_one_is_truncated)
{
    static unsigned char out[EPD_MAX_DATAGRAM_BYTES + 1], in[EPD_MAX_DATAGRAM_BYTES];
    struct link link;
    size_t bytes = 77;
    int fd = -77;

    for (size_t i = 0; i < sizeof out; i++)
        out[i] = (unsigned char)(i * 31);
    link_init(&link);
    ck_assert_int_eq(packet_send(link.a, out, EPD_MAX_DATAGRAM_BYTES, -1), PACKET_OK);
    ck_assert_int_eq(packet_receive(link.b, in, sizeof in, &bytes, &fd), PACKET_OK);
    ck_assert_uint_eq(bytes, EPD_MAX_DATAGRAM_BYTES);
    ck_assert_mem_eq(in, out, bytes);

    int given = open_memfd();
    bytes = 77;
    fd = -77;
    ck_assert_int_eq(packet_send(link.a, out, sizeof out, given), PACKET_OK);
    close(given);
    ck_assert_int_eq(packet_receive(link.b, in, sizeof in, &bytes, &fd), PACKET_TRUNCATED);
    ck_assert_uint_eq(bytes, 77); /* outputs only on success */
    ck_assert_int_eq(fd, -77);
    link_fini(&link);
}
END_TEST

START_TEST(one_fd_arrives_close_on_exec_and_names_the_same_file)
{
    struct link link;
    struct stat sent, received;
    char buffer[8];
    size_t bytes;
    int fd;

    link_init(&link);
    int given = open_memfd();
    ck_assert_int_eq(packet_send(link.a, "fd", 2, given), PACKET_OK);
    ck_assert_int_eq(fstat(given, &sent), 0);
    ck_assert_int_eq(close(given), 0); /* it stayed the sender's */
    ck_assert_int_eq(packet_receive(link.b, buffer, sizeof buffer, &bytes, &fd), PACKET_OK);
    ck_assert_int_ge(fd, 0);
    ck_assert_int_eq(fcntl(fd, F_GETFD) & FD_CLOEXEC, FD_CLOEXEC);
    ck_assert_int_eq(fstat(fd, &received), 0);
    ck_assert_uint_eq(sent.st_ino, received.st_ino);
    close(fd);
    link_fini(&link);
}
END_TEST

START_TEST(more_than_one_fd_is_refused_and_none_stays_open)
{
    struct link link;
    char buffer[8];
    size_t bytes;
    int fd;

    link_init(&link);
    for (size_t n = 2; n <= 8; n++) {
        int given[8];
        for (size_t i = 0; i < n; i++)
            given[i] = open_memfd();
        send_fds(link.a, given, n);
        for (size_t i = 0; i < n; i++)
            close(given[i]);
        int before = count_fds();
        ck_assert_int_eq(packet_receive(link.b, buffer, sizeof buffer, &bytes, &fd), PACKET_BAD_FDS);
        ck_assert_int_eq(count_fds(), before);
    }
    /* The socket is still good. */
    ck_assert_int_eq(packet_send(link.a, "on", 2, -1), PACKET_OK);
    ck_assert_int_eq(packet_receive(link.b, buffer, sizeof buffer, &bytes, &fd), PACKET_OK);
    ck_assert_int_eq(fd, -1);
    link_fini(&link);
}
END_TEST

START_TEST(an_empty_datagram_is_the_end_and_its_fd_is_closed)
{
    struct link link;
    char buffer[8];
    size_t bytes;
    int fd;

    link_init(&link);
    union {
        char bytes[CMSG_SPACE(sizeof(int))];
        struct cmsghdr align;
    } control = {{0}};
    struct msghdr header = {.msg_control = control.bytes, .msg_controllen = sizeof control.bytes};
    struct cmsghdr *rights = CMSG_FIRSTHDR(&header);
    int given = open_memfd();
    rights->cmsg_level = SOL_SOCKET;
    rights->cmsg_type = SCM_RIGHTS;
    rights->cmsg_len = CMSG_LEN(sizeof(int));
    memcpy(CMSG_DATA(rights), &given, sizeof given);
    ck_assert_int_eq(sendmsg(link.a, &header, MSG_NOSIGNAL), 0);
    close(given);
    ck_assert_int_eq(packet_receive(link.b, buffer, sizeof buffer, &bytes, &fd), PACKET_EOF);
    link_fini(&link);
}
END_TEST

START_TEST(a_closed_peer_is_the_end_for_reader_and_writer)
{
    struct link link;
    char buffer[8];
    size_t bytes;
    int fd;

    link_init(&link);
    ck_assert_int_eq(packet_send(link.a, "last", 4, -1), PACKET_OK);
    close(link.a);
    ck_assert_int_eq(packet_receive(link.b, buffer, sizeof buffer, &bytes, &fd), PACKET_OK);
    ck_assert_int_eq(packet_receive(link.b, buffer, sizeof buffer, &bytes, &fd), PACKET_EOF);
    /* Without MSG_NOSIGNAL this would end the process. */
    ck_assert_int_eq(packet_send(link.b, "x", 1, -1), PACKET_EOF);
    link.a = dup(link.b);
    link_fini(&link);
}
END_TEST

START_TEST(a_peer_that_closes_with_unread_datagrams_is_the_end)
{
    struct link link;
    char buffer[8];
    size_t bytes;
    int fd;

    link_init(&link);
    ck_assert_int_eq(packet_send(link.b, "unread", 6, -1), PACKET_OK);
    close(link.a);
    ck_assert_int_eq(packet_receive(link.b, buffer, sizeof buffer, &bytes, &fd), PACKET_EOF);
    link.a = dup(link.b);
    link_fini(&link);
}
END_TEST

START_TEST(a_full_socket_asks_to_come_back)
{
    static unsigned char out[EPD_MAX_DATAGRAM_BYTES], in[EPD_MAX_DATAGRAM_BYTES];
    struct link link;
    enum packet_result result;
    int n_sent = 0, n_received = 0, fd;
    size_t bytes;

    link_init(&link);
    while ((result = packet_send(link.a, out, sizeof out, -1)) == PACKET_OK)
        ck_assert_int_lt(++n_sent, 10000);
    ck_assert_int_eq(result, PACKET_AGAIN);
    ck_assert_int_gt(n_sent, 0);
    while ((result = packet_receive(link.b, in, sizeof in, &bytes, &fd)) == PACKET_OK)
        n_received++;
    ck_assert_int_eq(result, PACKET_AGAIN);
    ck_assert_int_eq(n_received, n_sent);
    link_fini(&link);
}
END_TEST

START_TEST(other_failures_leave_errno)
{
    char buffer[8];
    size_t bytes;
    int fd;

    errno = 0;
    ck_assert_int_eq(packet_receive(-1, buffer, sizeof buffer, &bytes, &fd), PACKET_ERROR);
    ck_assert_int_eq(errno, EBADF);
    errno = 0;
    ck_assert_int_eq(packet_send(-1, "x", 1, -1), PACKET_ERROR);
    ck_assert_int_eq(errno, EBADF);
}
END_TEST

int main(void)
{
    TCase *tcase = tcase_create("packet");

    tcase_add_test(tcase, a_datagram_arrives_whole_and_alone);
    tcase_add_test(tcase, the_largest_datagram_passes_and_a_larger_one_is_truncated);
    tcase_add_test(tcase, one_fd_arrives_close_on_exec_and_names_the_same_file);
    tcase_add_test(tcase, more_than_one_fd_is_refused_and_none_stays_open);
    tcase_add_test(tcase, an_empty_datagram_is_the_end_and_its_fd_is_closed);
    tcase_add_test(tcase, a_closed_peer_is_the_end_for_reader_and_writer);
    tcase_add_test(tcase, a_peer_that_closes_with_unread_datagrams_is_the_end);
    tcase_add_test(tcase, a_full_socket_asks_to_come_back);
    tcase_add_test(tcase, other_failures_leave_errno);
    return suite_run("packet", tcase);
}
