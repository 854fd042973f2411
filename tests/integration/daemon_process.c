#include "tests/integration/daemon_process.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "client/public.h"

#define START_DEADLINE_MS 20000 /* sanitizer builds on a busy machine start slowly */
#define STOP_DEADLINE_MS  20000

static void sleep_ms(long ms)
{
    struct timespec t = {.tv_sec = ms / 1000, .tv_nsec = ms % 1000 * 1000000};
    nanosleep(&t, NULL);
}

static void fail(const struct daemon_process *daemon, const char *what)
{
    fprintf(stderr, "daemon: %s\n", what);
    daemon_print_log(daemon);
    abort();
}

static int accepts(const char *path)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    snprintf(address.sun_path, sizeof(address.sun_path), "%s", path);
    int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
    int ok = fd >= 0 && connect(fd, (struct sockaddr *)&address, sizeof(address)) == 0;
    if (fd >= 0)
        close(fd);
    return ok;
}

static void exec_daemon(const struct daemon_process *daemon, unsigned n_devices, const char *const *extra)
{
    const char *given = getenv("EPD_TEST_EPD"), *binary = given ? given : EPD_BINARY;
    char devices[16];
    const char *argv[64] = {binary, "--socket", daemon->socket_path, "--control-socket",
                            daemon->control_path};
    int argc = 5;
    snprintf(devices, sizeof(devices), "%u", n_devices);
    if (n_devices) {
        const char *const host[] = {"--backend", "host", "--devices", devices};
        memcpy(&argv[argc], host, sizeof(host));
        argc += 4;
    }
    for (int i = 0; extra && extra[i] && argc < 63; i++)
        argv[argc++] = extra[i];
    int log = open(daemon->log_path, O_WRONLY | O_CREAT | O_APPEND, 0600);
    dup2(log, STDOUT_FILENO);
    dup2(log, STDERR_FILENO);
    execv(binary, (char *const *)argv);
    perror(binary);
    _exit(127);
}

/* The supervisor's socket accepts before the worker is up: a session that opens says that it is. */
static void wait_until_served(const struct daemon_process *daemon)
{
    struct epd_open_options options = {
        .size = sizeof(options), .socket_path = daemon->socket_path, .timeout_ms = START_DEADLINE_MS};
    struct epd_client *client;
    if (epd_open(&options, &client) != EPD_OK)
        fail(daemon, epd_error_text());
    epd_close(client);
}

void daemon_start(struct daemon_process *daemon, unsigned n_devices, const char *const *extra)
{
    snprintf(daemon->directory, sizeof(daemon->directory), "/tmp/epd-test-XXXXXX");
    if (!mkdtemp(daemon->directory))
        abort();
    snprintf(daemon->socket_path, sizeof(daemon->socket_path), "%s/epd.sock", daemon->directory);
    snprintf(daemon->control_path, sizeof(daemon->control_path), "%s/epd-control.sock", daemon->directory);
    snprintf(daemon->log_path, sizeof(daemon->log_path), "%s/log", daemon->directory);
    daemon->pid = fork();
    if (daemon->pid == 0)
        exec_daemon(daemon, n_devices, extra);
    for (int waited = 0; !accepts(daemon->socket_path); waited += 10) {
        if (waitpid(daemon->pid, NULL, WNOHANG) == daemon->pid)
            fail(daemon, "ended during its start");
        if (waited > START_DEADLINE_MS)
            fail(daemon, "does not accept");
        sleep_ms(10);
    }
    daemon_wait_worker(daemon, 0);
    wait_until_served(daemon);
}

static void remove_directory(const char *path)
{
    DIR *directory = opendir(path);
    for (struct dirent *entry; directory && (entry = readdir(directory));) {
        char file[PATH_MAX];
        snprintf(file, sizeof(file), "%s/%s", path, entry->d_name);
        unlink(file);
    }
    if (directory)
        closedir(directory);
    rmdir(path);
}

void daemon_stop(struct daemon_process *daemon)
{
    int status = 0;
    kill(daemon->pid, SIGTERM);
    for (int waited = 0; waitpid(daemon->pid, &status, WNOHANG) != daemon->pid; waited += 10) {
        if (waited > STOP_DEADLINE_MS)
            fail(daemon, "does not stop");
        sleep_ms(10);
    }
    if (!WIFEXITED(status) || WEXITSTATUS(status) != 0)
        fail(daemon, "did not exit with 0");
    daemon->pid = 0;
    remove_directory(daemon->directory);
}

static pid_t parent_of(pid_t pid)
{
    char path[64], text[512];
    snprintf(path, sizeof(path), "/proc/%d/stat", (int)pid);
    FILE *file = fopen(path, "r");
    if (!file)
        return 0;
    size_t n = fread(text, 1, sizeof(text) - 1, file);
    fclose(file);
    text[n] = 0;
    char *end = strrchr(text, ')');
    int parent = 0;
    char state = 0;
    return end && sscanf(end + 1, " %c %d", &state, &parent) == 2 && state != 'Z' ? parent : 0;
}

/* Not a helper that a sanitizer has started at the supervisor's end. */
static int is_worker(pid_t pid)
{
    char path[64], text[4096];
    snprintf(path, sizeof(path), "/proc/%d/cmdline", (int)pid);
    FILE *file = fopen(path, "r");
    if (!file)
        return 0;
    size_t n = fread(text, 1, sizeof(text), file);
    fclose(file);
    return memmem(text, n, "--worker", strlen("--worker")) != NULL;
}

pid_t daemon_worker(const struct daemon_process *daemon)
{
    DIR *proc = opendir("/proc");
    pid_t worker = 0;
    for (struct dirent *entry; !worker && proc && (entry = readdir(proc));) {
        pid_t pid = atoi(entry->d_name);
        if (pid > 0 && parent_of(pid) == daemon->pid && is_worker(pid))
            worker = pid;
    }
    if (proc)
        closedir(proc);
    return worker;
}

pid_t daemon_wait_worker(const struct daemon_process *daemon, pid_t old)
{
    for (int waited = 0; waited < 10000; waited += 10) {
        pid_t worker = daemon_worker(daemon);
        if (worker && worker != old)
            return worker;
        sleep_ms(10);
    }
    fail(daemon, "has no new worker");
    return 0;
}

int process_fds(pid_t pid)
{
    char path[64];
    snprintf(path, sizeof(path), "/proc/%d/fd", (int)pid);
    DIR *directory = opendir(path);
    int n = 0;
    for (struct dirent *entry; directory && (entry = readdir(directory));)
        n += entry->d_name[0] != '.';
    if (directory)
        closedir(directory);
    return n;
}

void daemon_print_log(const struct daemon_process *daemon)
{
    char line[512];
    FILE *log = fopen(daemon->log_path, "r");
    while (log && fgets(line, sizeof(line), log))
        fprintf(stderr, "  epd: %s", line);
    if (log)
        fclose(log);
}
