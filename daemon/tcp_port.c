#include "daemon/tcp_port.h"

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "daemon/clock.h"

/* 0, or an errno. */
static int try_once(const struct sockaddr *address, socklen_t address_bytes, int backlog, int *fd)
{
    const int yes = 1; /* connections of the worker before may linger */
    int made = socket(address->sa_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (made < 0)
        return errno;
    if (setsockopt(made, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof(yes)) == 0 &&
        bind(made, address, address_bytes) == 0 && listen(made, backlog) == 0) {
        *fd = made;
        return 0;
    }
    const int failed = errno;
    (void)close(made);
    return failed;
}

enum epd_status tcp_port_listen(const struct sockaddr *address, socklen_t address_bytes, int backlog,
                                uint64_t limit_ms, int *fd, struct epd_error *error)
{
    const struct timespec pause = {.tv_nsec = TCP_PORT_RETRY_MS * (long)CLOCK_NS_PER_MS};
    const uint64_t end_ns = clock_ns() + clock_ms_to_ns(limit_ms);
    int failed;
    while ((failed = try_once(address, address_bytes, backlog, fd)) == EADDRINUSE && clock_ns() < end_ns)
        (void)nanosleep(&pause, NULL);
    if (failed == EADDRINUSE)
        return error_set(error, EPD_SYSTEM, "%s, tried for %" PRIu64 " ms", strerror(failed), limit_ms);
    return failed ? error_set(error, EPD_SYSTEM, "%s", strerror(failed)) : EPD_OK;
}

static int is_reserved(uint16_t port, const char *reserved)
{
    for (const char *at = reserved; *at;) {
        char *end;
        const unsigned long first = strtoul(at, &end, 10);
        const unsigned long last = *end == '-' ? strtoul(end + 1, &end, 10) : first;
        if (end == at)
            return 0;
        if (first <= port && port <= last)
            return 1;
        at = end + strspn(end, ", \n");
    }
    return 0;
}

int tcp_port_is_given_away(uint16_t port, const char *range, const char *reserved)
{
    unsigned first, last;
    return sscanf(range, "%u %u", &first, &last) == 2 && first <= port && port <= last &&
           !is_reserved(port, reserved);
}

/* "" if it cannot be read. */
static void read_line(const char *path, char *text, size_t bytes)
{
    FILE *file = fopen(path, "re");
    if (!file || !fgets(text, (int)bytes, file))
        text[0] = 0;
    if (file)
        (void)fclose(file);
    text[strcspn(text, "\n")] = 0;
}

void tcp_port_advise(struct log *log, const char *port)
{
    char range[64] = "", reserved[4096] = "";
    read_line("/proc/sys/net/ipv4/ip_local_port_range", range, sizeof(range));
    read_line("/proc/sys/net/ipv4/ip_local_reserved_ports", reserved, sizeof(reserved));
    if (!tcp_port_is_given_away((uint16_t)strtoul(port, NULL, 10), range, reserved))
        return;
    range[strcspn(range, "\t")] = '-';
    log_write(log, LOG_WARN,
              "fabric port %s lies among those of outgoing connections, %s: one may have it when the worker "
              "restarts; choose another, or add %s to sysctl net.ipv4.ip_local_reserved_ports",
              port, range, port);
}
