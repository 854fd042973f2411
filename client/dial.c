#include "client/dial.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#include "client/deadline.h"

/* Between two tries: from the first, doubling, to the last. */
#define DIAL_BACKOFF_FIRST_MS 5
#define DIAL_BACKOFF_LAST_MS  500

/* Of a daemon that was started without XDG_RUNTIME_DIR, as systemd starts it. */
#define SYSTEM_SOCKET "/run/epd/epd.sock"

_Static_assert(sizeof(((struct sockaddr_un *)0)->sun_path) == DIAL_PATH_BYTES, "what the system takes");

static const char *environment(const char *name)
{
    const char *value = secure_getenv(name);

    return value && value[0] ? value : NULL;
}

const char *dial_first_there(const char *own, const char *system)
{
    return access(own, F_OK) != 0 && access(system, F_OK) == 0 ? system : own;
}

static enum epd_status take_path(const char *directory, const char *name, char path[DIAL_PATH_BYTES],
                                 struct epd_error *error)
{
    size_t directory_bytes = strlen(directory), bytes = directory_bytes + strlen(name);
    if (bytes == 0)
        return error_set(error, EPD_INVALID_ARGUMENT, "socket path: empty");
    if (bytes >= DIAL_PATH_BYTES)
        return error_set(error, EPD_INVALID_ARGUMENT, "socket path %s%.100s: %zu bytes, at most %d",
                         directory, name, bytes, DIAL_PATH_BYTES - 1);
    memcpy(path, directory, directory_bytes);
    memcpy(path + directory_bytes, name, bytes - directory_bytes + 1);
    return EPD_OK;
}

enum epd_status dial_path(const char *given, char path[DIAL_PATH_BYTES], struct epd_error *error)
{
    const char *name = given ? given : environment("EPD_SOCKET"), *runtime = environment("XDG_RUNTIME_DIR");

    if (name)
        return take_path("", name, path, error);
    if (!runtime || runtime[0] != '/')
        return take_path("", SYSTEM_SOCKET, path, error);
    if (take_path(runtime, "/epd/epd.sock", path, error))
        return error->status;
    return dial_first_there(path, SYSTEM_SOCKET) == path ? EPD_OK : take_path("", SYSTEM_SOCKET, path, error);
}

/* One try, which never blocks: a full backlog is waited for where the deadline is known. 0, or an errno. */
static int dial_once(const char *path, int *connected)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);

    if (fd < 0)
        return errno;
    memcpy(address.sun_path, path, strlen(path) + 1);
    if (connect(fd, (const struct sockaddr *)&address, sizeof address) < 0 || fcntl(fd, F_SETFL, 0) < 0) {
        int failed = errno;
        close(fd);
        return failed;
    }
    *connected = fd;
    return 0;
}

/* 1 if the daemon may be there in a moment. */
static int worth_waiting(int failed)
{
    return failed == ENOENT || failed == ECONNREFUSED || failed == EAGAIN || failed == EINTR;
}

static enum epd_status dial_check(int failed, const char *path, struct epd_error *error)
{
    if (worth_waiting(failed))
        return error_set(error, EPD_DISCONNECTED, "no daemon on %s: %s", path, strerror(failed));
    if (failed == EACCES || failed == EPERM)
        return error_set(error, EPD_PERMISSION, "connect to %s: %s", path, strerror(failed));
    return error_set(error, EPD_SYSTEM, "connect to %s: %s", path, strerror(failed));
}

static void sleep_ms(uint32_t ms)
{
    struct timespec time = {.tv_sec = ms / 1000, .tv_nsec = (long)(ms % 1000) * 1000000};

    nanosleep(&time, NULL);
}

enum epd_status dial(const char *path, uint64_t deadline_ns, int *connected, struct epd_error *error)
{
    uint32_t backoff_ms = DIAL_BACKOFF_FIRST_MS;

    for (;;) {
        int fd = -1;
        int failed = dial_once(path, &fd);
        if (!failed) {
            *connected = fd;
            return EPD_OK;
        }
        uint32_t left_ms = deadline_left_ms(deadline_ns);
        if (!worth_waiting(failed) || left_ms == 0)
            return dial_check(failed, path, error);
        sleep_ms(backoff_ms < left_ms ? backoff_ms : left_ms);
        backoff_ms = backoff_ms * 2 < DIAL_BACKOFF_LAST_MS ? backoff_ms * 2 : DIAL_BACKOFF_LAST_MS;
    }
}

int dial_probe(const char *path)
{
    int fd = -1;
    int failed = dial_once(path, &fd);

    if (!failed)
        close(fd);
    return failed == 0 || failed == EAGAIN;
}
