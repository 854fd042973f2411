#include "daemon/endpoint.h"

#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#define BACKLOG 4096 /* the kernel cuts it at net.core.somaxconn */

static const char *base_of(const char *path)
{
    const char *slash = strrchr(path, '/');
    return slash ? slash + 1 : path;
}

static enum epd_status check_path(const char *path, struct epd_error *error)
{
    const size_t room = sizeof(((struct sockaddr_un *)0)->sun_path) - 1;
    if (!base_of(path)[0])
        return error_set(error, EPD_INVALID_ARGUMENT, "socket %.150s: a file name is missing", path);
    if (strlen(path) > room)
        return error_set(error, EPD_INVALID_ARGUMENT, "socket path: %zu bytes, at most %zu: %.120s",
                         strlen(path), room, path);
    return EPD_OK;
}

/* Whoever can write the directory can put another socket in our place. */
static enum epd_status check_directory(const char *directory, int fd, struct epd_error *error)
{
    struct stat info;
    if (fstat(fd, &info) != 0)
        return error_set(error, EPD_SYSTEM, "directory %.150s: %s", directory, strerror(errno));
    if (info.st_uid != 0 && info.st_uid != geteuid())
        return error_set(error, EPD_PERMISSION, "directory %.150s: owned by uid %u, want %u or root",
                         directory, info.st_uid, geteuid());
    if (info.st_mode & (S_IWGRP | S_IWOTH))
        return error_set(
            error, EPD_PERMISSION,
            "directory %.130s: mode %04o lets others write, want at most 0755 (use a directory of its own)",
            directory, info.st_mode & 07777u);
    return EPD_OK;
}

/* Opens the socket's directory, which is made if only its last part is missing. */
static enum epd_status open_directory(const char *path, int *directory_fd, struct epd_error *error)
{
    char directory[CONFIG_TEXT_BYTES] = ".";
    const size_t length = (size_t)(base_of(path) - path);
    if (length > 0) {
        memcpy(directory, path, length);
        directory[length > 1 ? length - 1 : 1] = 0;
    }
    if (mkdir(directory, 0755) != 0 && errno != EEXIST)
        return error_set(error, EPD_SYSTEM, "directory %.150s: cannot be made: %s", directory,
                         strerror(errno));
    int fd = open(directory, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0)
        return error_set(error, EPD_SYSTEM, "directory %.150s: %s", directory, strerror(errno));
    enum epd_status status = check_directory(directory, fd, error);
    if (status != EPD_OK) {
        close(fd);
        return status;
    }
    *directory_fd = fd;
    return EPD_OK;
}

static enum epd_status check_lock(const char *path, int fd, struct epd_error *error)
{
    struct stat info;
    if (fstat(fd, &info) != 0)
        return error_set(error, EPD_SYSTEM, "lock %.150s.lock: %s", path, strerror(errno));
    if (!S_ISREG(info.st_mode) || info.st_nlink != 1 || info.st_uid != geteuid())
        return error_set(error, EPD_PERMISSION, "lock %.150s.lock: not a plain file of uid %u with one name",
                         path, geteuid());
    if (flock(fd, LOCK_EX | LOCK_NB) == 0)
        return EPD_OK;
    if (errno != EWOULDBLOCK)
        return error_set(error, EPD_SYSTEM, "lock %.150s.lock: %s", path, strerror(errno));
    char pid[24] = "unknown";
    ssize_t n = pread(fd, pid, sizeof(pid) - 1, 0);
    pid[n > 0 ? n : 0] = 0;
    pid[strcspn(pid, "\n")] = 0;
    return error_set(error, EPD_IN_USE, "socket %.150s: served by another epd, pid %s", path, pid);
}

static enum epd_status take_lock(struct endpoint *endpoint, int directory_fd, struct epd_error *error)
{
    char name[CONFIG_TEXT_BYTES + 8];
    (void)snprintf(name, sizeof(name), "%s.lock", base_of(endpoint->path));
    int fd = openat(directory_fd, name, O_RDWR | O_CREAT | O_NOFOLLOW | O_CLOEXEC | O_NONBLOCK, 0600);
    if (fd < 0 && errno == ELOOP)
        return error_set(error, EPD_PERMISSION, "lock %.150s.lock: is a symbolic link", endpoint->path);
    if (fd < 0)
        return error_set(error, EPD_SYSTEM, "lock %.150s.lock: %s", endpoint->path, strerror(errno));
    enum epd_status status = check_lock(endpoint->path, fd, error);
    if (status != EPD_OK) {
        close(fd);
        return status;
    }
    char pid[24];
    int n = snprintf(pid, sizeof(pid), "%d\n", (int)getpid());
    if (ftruncate(fd, 0) != 0 || pwrite(fd, pid, (size_t)n, 0) != n)
        (void)ftruncate(fd, 0); /* the pid is for people; the lock counts */
    endpoint->lock_fd = fd;
    return EPD_OK;
}

/* With the lock held, a socket that is left at the path is nobody's. */
static enum epd_status remove_stale(const char *path, int directory_fd, struct epd_error *error)
{
    struct stat info;
    if (fstatat(directory_fd, base_of(path), &info, AT_SYMLINK_NOFOLLOW) != 0)
        return errno == ENOENT ? EPD_OK
                               : error_set(error, EPD_SYSTEM, "socket %.150s: %s", path, strerror(errno));
    if (!S_ISSOCK(info.st_mode))
        return error_set(error, EPD_INVALID_ARGUMENT, "socket %.150s: exists and is not a socket", path);
    if (unlinkat(directory_fd, base_of(path), 0) != 0)
        return error_set(error, EPD_SYSTEM, "socket %.150s: stale, cannot be removed: %s", path,
                         strerror(errno));
    return EPD_OK;
}

static enum epd_status find_group(const char *group, gid_t *gid, struct epd_error *error)
{
    *gid = (gid_t)-1;
    if (!group[0])
        return EPD_OK;
    char *end;
    unsigned long number = strtoul(group, &end, 10);
    if (!*end) {
        *gid = (gid_t)number;
        return EPD_OK;
    }
    const struct group *entry = getgrnam(group);
    if (!entry)
        return error_set(error, EPD_INVALID_ARGUMENT, "socket group %.64s: does not exist", group);
    *gid = entry->gr_gid;
    return EPD_OK;
}

/* Nobody can connect before listen(), so owner and mode are right from the first moment that counts. */
static enum epd_status bind_and_listen(struct endpoint *endpoint, int directory_fd, uint32_t mode, gid_t gid,
                                       struct epd_error *error)
{
    const char *path = endpoint->path, *base = base_of(path);
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    memcpy(address.sun_path, path, strlen(path));
    int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0)
        return error_set(error, EPD_SYSTEM, "socket %.150s: %s", path, strerror(errno));
    const mode_t mask = umask(0177);
    int result = bind(fd, (struct sockaddr *)&address, sizeof(address));
    (void)umask(mask);
    const char *step = "bind";
    if (result == 0 && gid != (gid_t)-1) {
        step = "group";
        result = fchownat(directory_fd, base, (uid_t)-1, gid, AT_SYMLINK_NOFOLLOW);
    }
    if (result == 0) {
        step = "mode";
        result = fchmodat(directory_fd, base, mode, 0);
    }
    if (result == 0) {
        step = "listen";
        result = listen(fd, BACKLOG);
    }
    if (result == 0) {
        endpoint->fd = fd;
        return EPD_OK;
    }
    enum epd_status status =
        error_set(error, EPD_SYSTEM, "socket %.150s: %s: %s", path, step, strerror(errno));
    close(fd);
    return status;
}

enum epd_status endpoint_open(struct endpoint *endpoint, const char *path, uint32_t mode, const char *group,
                              struct epd_error *error)
{
    *endpoint = (struct endpoint){.fd = -1, .lock_fd = -1};
    gid_t gid;
    int directory_fd = -1;
    enum epd_status status = check_path(path, error);
    if (status == EPD_OK)
        status = find_group(group, &gid, error);
    if (status == EPD_OK)
        status = open_directory(path, &directory_fd, error);
    if (status != EPD_OK)
        return status;
    (void)snprintf(endpoint->path, sizeof(endpoint->path), "%s", path);
    status = take_lock(endpoint, directory_fd, error);
    if (status == EPD_OK)
        status = remove_stale(path, directory_fd, error);
    if (status == EPD_OK)
        status = bind_and_listen(endpoint, directory_fd, mode, gid, error);
    if (status != EPD_OK && endpoint->lock_fd >= 0) {
        close(endpoint->lock_fd);
        endpoint->lock_fd = -1;
    }
    close(directory_fd);
    return status;
}

enum epd_status endpoint_adopt(struct endpoint *endpoint, int fd, const char *path, struct epd_error *error)
{
    int type = 0, listening = 0, domain = 0;
    socklen_t bytes = sizeof(int);
    if (getsockopt(fd, SOL_SOCKET, SO_DOMAIN, &domain, &bytes) != 0 ||
        getsockopt(fd, SOL_SOCKET, SO_TYPE, &type, &bytes) != 0 ||
        getsockopt(fd, SOL_SOCKET, SO_ACCEPTCONN, &listening, &bytes) != 0)
        return error_set(error, EPD_INVALID_ARGUMENT, "fd %d for %.120s: %s", fd, path, strerror(errno));
    if (domain != AF_UNIX || type != SOCK_SEQPACKET || !listening)
        return error_set(
            error, EPD_INVALID_ARGUMENT,
            "fd %d for %.120s: not a listening Unix socket of type SEQPACKET (ListenSequentialPacket=)", fd,
            path);
    if (fcntl(fd, F_SETFD, FD_CLOEXEC) != 0 || fcntl(fd, F_SETFL, O_NONBLOCK) != 0)
        return error_set(error, EPD_SYSTEM, "fd %d for %.120s: %s", fd, path, strerror(errno));
    *endpoint = (struct endpoint){.fd = fd, .lock_fd = -1};
    (void)snprintf(endpoint->path, sizeof(endpoint->path), "%s", path);
    return EPD_OK;
}

void endpoint_close(struct endpoint *endpoint)
{
    if (endpoint->fd < 0)
        return;
    if (endpoint->lock_fd >= 0) {
        (void)unlink(endpoint->path); /* before the lock goes: a newcomer's socket is not ours to remove */
        (void)close(endpoint->lock_fd);
    }
    (void)close(endpoint->fd);
    endpoint->fd = -1;
    endpoint->lock_fd = -1;
}
