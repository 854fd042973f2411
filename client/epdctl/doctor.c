#include "client/epdctl/doctor.h"

#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/utsname.h>
#include <unistd.h>

#include "client/epdctl/field.h"
#include "client/epdctl/quantity.h"

/* getsockopt number of SO_PEERPIDFD (Linux 6.5); older headers do not have it. */
#define PEERPIDFD_OPTION 77
/* A session takes three descriptors in the daemon, a buffer one more. */
#define WANTED_FILES 16384 /* a rank session costs two: its socket and a watch of its process */

void doctor_report(struct doctor *doctor, enum finding_level level, const char *what, const char *fix,
                   const char *format, ...)
{
    static const char *const names[] = {"ok  ", "warn", "fail"};
    va_list arguments;
    doctor->n_findings[level]++;
    printf("%s  %-16s ", names[level], what);
    va_start(arguments, format);
    vprintf(format, arguments);
    va_end(arguments);
    putchar('\n');
    if (level != FINDING_OK && fix)
        printf("      %-16s -> %s\n", "", fix);
}

static void check_kernel(struct doctor *doctor)
{
    struct utsname name;
    int pair[2] = {-1, -1}, pid_fd = -1;
    socklen_t size = sizeof(pid_fd);
    if (uname(&name) != 0)
        return;
    doctor_report(doctor, FINDING_OK, "kernel", NULL, "%s %s, %s", name.sysname, name.release, name.machine);
    if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair) != 0) {
        doctor_report(doctor, FINDING_FAIL, "sockets", "a kernel with AF_UNIX SOCK_SEQPACKET is needed",
                      "SOCK_SEQPACKET: %s", strerror(errno));
        return;
    }
    if (getsockopt(pair[0], SOL_SOCKET, PEERPIDFD_OPTION, &pid_fd, &size) == 0) {
        doctor_report(doctor, FINDING_OK, "SO_PEERPIDFD", NULL, "clients are told apart by pidfd");
        close(pid_fd);
    } else {
        doctor_report(doctor, FINDING_WARN, "SO_PEERPIDFD",
                      "Linux 6.5 or newer has it; nothing else depends on it",
                      "not in this kernel: pids shown for clients could in theory be reused ones");
    }
    close(pair[0]);
    close(pair[1]);
}

static void check_memfd(struct doctor *doctor)
{
    const char *fix = "a kernel with sealed memfds is needed; a seccomp filter may forbid them";
    int fd = memfd_create("epd-doctor", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (fd < 0) {
        doctor_report(doctor, FINDING_FAIL, "memfd", fix, "memfd_create: %s", strerror(errno));
        return;
    }
    void *memory = MAP_FAILED;
    if (ftruncate(fd, 4096) == 0 && fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) == 0)
        memory = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (memory == MAP_FAILED)
        doctor_report(doctor, FINDING_FAIL, "memfd", fix, "sealing or mapping: %s", strerror(errno));
    else
        doctor_report(doctor, FINDING_OK, "memfd", NULL, "can be made, sealed and mapped");
    if (memory != MAP_FAILED)
        munmap(memory, 4096);
    close(fd);
}

static void check_files(struct doctor *doctor)
{
    struct rlimit limit;
    if (getrlimit(RLIMIT_NOFILE, &limit) != 0)
        return;
    doctor_report(
        doctor, limit.rlim_cur >= WANTED_FILES ? FINDING_OK : FINDING_WARN, "open files",
        "LimitNOFILE=65536 in the unit, or `ulimit -n 65536` before epd, where many clients connect",
        "RLIMIT_NOFILE %llu (hard %llu), at least %d is comfortable", (unsigned long long)limit.rlim_cur,
        (unsigned long long)limit.rlim_max, WANTED_FILES);
}

/* MemAvailable of /proc/meminfo in bytes; NaN if it cannot be read. */
static double available_memory(void)
{
    FILE *file = fopen("/proc/meminfo", "re");
    double kib = -1;
    char line[128];
    while (file && kib < 0 && fgets(line, sizeof(line), file))
        if (sscanf(line, "MemAvailable: %lf kB", &kib) != 1)
            kib = -1;
    if (file)
        fclose(file);
    return kib < 0 ? 0.0 / 0.0 : kib * 1024;
}

static void check_memory(struct doctor *doctor)
{
    char text[QUANTITY_BYTES];
    const double bytes = available_memory();
    doctor_report(doctor, bytes < 256e6 ? FINDING_WARN : FINDING_OK, "memory",
                  "on the host backend all buffers are shared memory: free some, or lower heap_per_device",
                  "%s available", quantity_memory(text, bytes));
}

static void check_processors(struct doctor *doctor)
{
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof(set), &set) != 0)
        return;
    const int n = CPU_COUNT(&set);
    doctor_report(doctor, n >= 2 ? FINDING_OK : FINDING_WARN, "processors",
                  "give epd and its clients at least two: hand-offs between them need both at once",
                  "%d usable", n);
}

static void check_cblas(struct doctor *doctor)
{
    void *library = dlopen("libopenblas.so.0", RTLD_NOW | RTLD_LOCAL);
    if (!library) {
        doctor_report(doctor, FINDING_FAIL, "CBLAS", "install OpenBLAS: apt-get install libopenblas0-pthread",
                      "%s", dlerror());
        return;
    }
    const char *(*core)(void) = NULL;
    *(void **)&core = dlsym(library, "openblas_get_corename");
    doctor_report(doctor, FINDING_OK, "CBLAS", NULL, "OpenBLAS, kernels for %s", core ? core() : "-");
}

static void check_socket_directory(struct doctor *doctor, const char *socket_path)
{
    char directory[COMMAND_PATH_BYTES];
    struct stat info;
    const char *slash = strrchr(socket_path, '/');
    const int length = slash && slash != socket_path ? (int)(slash - socket_path) : 1;
    (void)snprintf(directory, sizeof(directory), "%.*s", length, slash ? socket_path : ".");
    if (stat(directory, &info) != 0) {
        doctor_report(doctor, FINDING_WARN, "socket folder",
                      "epd makes it when it starts, if it may; the systemd unit does by RuntimeDirectory=epd",
                      "%s: %s", directory, strerror(errno));
        return;
    }
    if (info.st_mode & (S_IWGRP | S_IWOTH)) {
        doctor_report(doctor, FINDING_FAIL, "socket folder",
                      "chmod go-w it, or use another: epd refuses a folder in which others could put another "
                      "socket in place",
                      "%s, mode %04o, is writable for more than its owner", directory,
                      (unsigned)info.st_mode & 07777);
        return;
    }
    doctor_report(doctor, FINDING_OK, "socket folder", NULL, "%s, mode %04o, uid %u, gid %u", directory,
                  (unsigned)info.st_mode & 07777, (unsigned)info.st_uid, (unsigned)info.st_gid);
}

/* The daemon, if there is one: its version must be ours, and a limit that refused somebody is worth knowing.
 */
static void check_daemon(struct doctor *doctor, const struct command *command)
{
    struct link link;
    struct epd_error error = {0};
    json_t *status = NULL;
    if (link_open(&link, command->socket, command->timeout_ms, &error) != EPD_OK) {
        doctor_report(doctor, FINDING_WARN, "daemon", "start it: epd, or systemctl start epd", "%s",
                      error.text);
        return;
    }
    enum epd_status result =
        link_request(&link, &(struct message_control){.verb = CONTROL_STATUS}, &status, &error);
    link_close(&link);
    if (result != EPD_OK) {
        doctor_report(doctor, FINDING_FAIL, "daemon", "look into its log; restart it", "does not answer: %s",
                      error.text);
        return;
    }
    const char *version = field_text(status, "version", "-");
    if (field_text(status, "worker", NULL))
        doctor_report(doctor, FINDING_FAIL, "daemon", "look into its log", "its worker does not run: %s",
                      field_text(status, "last_exit", "-"));
    else if (strcmp(version, EPD_VERSION) != 0)
        doctor_report(doctor, FINDING_WARN, "daemon", "install both from the same package",
                      "version %s, epdctl is %s", version, EPD_VERSION);
    else
        doctor_report(doctor, FINDING_OK, "daemon", NULL, "version %s, backend %s, sessions open %.0f",
                      version, field_text(status, "backend", "-"), field_number(status, "sessions"));
    const char *name;
    json_t *hits;
    json_object_foreach (field_object(status, "limits_hit"), name, hits) {
        if (json_number_value(hits) > 0)
            doctor_report(doctor, FINDING_WARN, "limit",
                          "raise it in epd.conf, or find out who asks for so much", "%s was hit %.0f times",
                          name, json_number_value(hits));
    }
    json_decref(status);
}

enum command_exit doctor_run(const struct command *command)
{
    struct doctor doctor = {0};
    check_kernel(&doctor);
    check_memfd(&doctor);
    check_files(&doctor);
    check_memory(&doctor);
    check_processors(&doctor);
    check_cblas(&doctor);
    doctor_cuda(&doctor);
    check_socket_directory(&doctor, command->socket);
    check_daemon(&doctor, command);
    printf("\n%u ok, %u to look at, %u to fix\n", doctor.n_findings[FINDING_OK],
           doctor.n_findings[FINDING_WARN], doctor.n_findings[FINDING_FAIL]);
    return doctor.n_findings[FINDING_FAIL] ? COMMAND_REFUSED : COMMAND_OK;
}
