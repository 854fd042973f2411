#include "daemon/reserve.h"

#include <fcntl.h>
#include <sys/resource.h>
#include <unistd.h>

int reserve_touched(int fd)
{
    struct rlimit limit; /* asked each time: it can be changed from outside */
    if (fd < 0 || getrlimit(RLIMIT_NOFILE, &limit) != 0)
        return 0;
    const rlim_t quarter = limit.rlim_cur / 4;
    const rlim_t kept = quarter < RESERVE_FDS ? quarter : RESERVE_FDS;
    return (rlim_t)fd >= limit.rlim_cur - kept;
}

int reserve_next(int any_fd)
{
    const int fd = fcntl(any_fd, F_DUPFD_CLOEXEC, 0);
    if (fd < 0)
        return 1;
    const int touched = reserve_touched(fd);
    (void)close(fd);
    return touched;
}
