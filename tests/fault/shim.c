/* Preloaded into a daemon: lets its n-th allocation fail, its fds not be taken, its disk not answer, and its wall clock jump. Only calls made by the epd
 * program itself count: libuv and the C library end the process when they have no memory, which is theirs to
 * decide. */
#include "tests/fault/shim.h"

#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <link.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define EXPORT __attribute__((visibility("default")))

EXPORT void *malloc(size_t bytes);
EXPORT void *calloc(size_t n, size_t bytes);
EXPORT void *realloc(void *old, size_t bytes);
EXPORT void *mmap(void *address, size_t bytes, int protection, int flags, int fd, off_t offset);
EXPORT int memfd_create(const char *name, unsigned flags);
EXPORT int open(const char *path, int flags, ...);
EXPORT int accept4(int socket, struct sockaddr *address, socklen_t *bytes, int flags);
EXPORT int clock_gettime(clockid_t clock, struct timespec *time);
EXPORT ssize_t sendmsg(int socket, const struct msghdr *header, int flags);

/* glibc's own names: looking them up would allocate. */
void *__libc_malloc(size_t bytes);
void *__libc_calloc(size_t n, size_t bytes);
void *__libc_realloc(void *old, size_t bytes);

/* A preloaded library has nobody who would hand it a pointer. */
static struct shim *shim;
static unsigned long program_begin, program_end;

static int note_program(struct dl_phdr_info *info, size_t bytes, void *arg)
{
    (void)bytes, (void)arg;
    for (int i = 0; i < info->dlpi_phnum; i++) {
        const ElfW(Phdr) *header = &info->dlpi_phdr[i];
        const unsigned long first = info->dlpi_addr + header->p_vaddr, end = first + header->p_memsz;
        if (header->p_type != PT_LOAD)
            continue;
        program_begin = !program_begin || first < program_begin ? first : program_begin;
        program_end = end > program_end ? end : program_end;
    }
    return 1; /* the program comes first */
}

static void *real_mmap(void *address, size_t bytes, int protection, int flags, int fd, off_t offset)
{
    return (void *)syscall(SYS_mmap, address, bytes, protection, flags, fd, offset);
}

__attribute__((constructor)) static void open_shim(void)
{
    const char *path = getenv("FAULT_SHIM");
    int fd = path ? open(path, O_RDWR | O_CLOEXEC) : -1;
    if (fd < 0)
        return;
    void *page = real_mmap(NULL, sizeof(struct shim), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    (void)dl_iterate_phdr(note_program, NULL);
    if (page != MAP_FAILED)
        shim = page;
}

/* 1 if this call is to fail. */
static int fails(const void *caller)
{
    const unsigned long at = (unsigned long)caller;
    if (!shim || at < program_begin || at >= program_end || atomic_load(&shim->allocations_left) <= 0)
        return 0;
    if (atomic_fetch_sub(&shim->allocations_left, 1) != 1)
        return 0;
    atomic_fetch_add(&shim->n_failed, 1);
    errno = ENOMEM;
    return 1;
}

void *malloc(size_t bytes)
{
    return fails(__builtin_return_address(0)) ? NULL : __libc_malloc(bytes);
}

void *calloc(size_t n, size_t bytes)
{
    return fails(__builtin_return_address(0)) ? NULL : __libc_calloc(n, bytes);
}

void *realloc(void *old, size_t bytes)
{
    return fails(__builtin_return_address(0)) ? NULL : __libc_realloc(old, bytes);
}

void *mmap(void *address, size_t bytes, int protection, int flags, int fd, off_t offset)
{
    return fails(__builtin_return_address(0)) ? MAP_FAILED
                                              : real_mmap(address, bytes, protection, flags, fd, offset);
}

int memfd_create(const char *name, unsigned flags)
{
    return fails(__builtin_return_address(0)) ? -1 : (int)syscall(SYS_memfd_create, name, flags);
}

int open(const char *path, int flags, ...)
{
    va_list rest;
    va_start(rest, flags);
    const int mode = flags & O_CREAT ? va_arg(rest, int) : 0;
    va_end(rest);
    if (shim && strstr(path, "epd-dump-") && atomic_load(&shim->stuck)) {
        atomic_fetch_add(&shim->n_stuck, 1);
        while (atomic_load(&shim->stuck))
            (void)usleep(1000);
    }
    return (int)syscall(SYS_openat, AT_FDCWD, path, flags, mode);
}

int accept4(int socket, struct sockaddr *address, socklen_t *bytes, int flags)
{
    if (shim && atomic_load(&shim->deaf)) {
        atomic_fetch_add(&shim->n_deaf, 1);
        errno = EPERM;
        return -1;
    }
    return (int)syscall(SYS_accept4, socket, address, bytes, flags);
}

int clock_gettime(clockid_t clock, struct timespec *time)
{
    int result = (int)syscall(SYS_clock_gettime, clock, time);
    if (shim && clock == CLOCK_REALTIME) {
        const long jump_s = atomic_load(&shim->clock_jump_s);
        time->tv_sec += jump_s;
        atomic_store(&shim->clock_jump_s, -jump_s);
    }
    return result;
}

ssize_t sendmsg(int socket, const struct msghdr *header, int flags)
{
    if (shim && header->msg_controllen > 0 && atomic_load(&shim->crowded)) {
        atomic_fetch_add(&shim->n_crowded, 1);
        errno = ETOOMANYREFS;
        return -1;
    }
    return (ssize_t)syscall(SYS_sendmsg, socket, header, flags);
}
