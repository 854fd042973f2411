#include "client/bench/daemon.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define DAEMON_STOP_S  10
#define LOG_TAIL_BYTES 4000

extern char **environ;

/* Where epd lies: as told, else beside this program (installed), else where the build puts it, else on PATH.
 */
static void find_program(const struct daemon_options *options, char *path, size_t bytes)
{
    static const char *const places[] = {"epd", "../../daemon/epd"};
    char self[3072];
    const ssize_t length = readlink("/proc/self/exe", self, sizeof(self) - 1);
    self[length > 0 ? length : 0] = 0;
    char *slash = strrchr(self, '/');
    if (slash)
        *slash = 0;
    for (size_t i = 0; !options->program && slash && i < sizeof(places) / sizeof(places[0]); i++) {
        (void)snprintf(path, bytes, "%s/%s", self, places[i]);
        if (access(path, X_OK) == 0)
            return;
    }
    (void)snprintf(path, bytes, "%s", options->program ? options->program : "epd");
}

static int spawn_daemon(struct daemon *daemon, const struct daemon_options *options)
{
    char program[4096], backend[64], devices[160], socket_path[160], control_path[160];
    find_program(options, program, sizeof(program));
    (void)snprintf(backend, sizeof(backend), "--backend=%s", options->backend);
    (void)snprintf(devices, sizeof(devices), "--devices=%s", options->devices ? options->devices : "");
    (void)snprintf(socket_path, sizeof(socket_path), "--socket=%s", daemon->socket_path);
    (void)snprintf(control_path, sizeof(control_path), "--control-socket=%s", daemon->control_path);
    char *arguments[10] = {program, backend, socket_path, control_path};
    char nodes[32], node[32], rendezvous[128], secret[160];
    size_t n = 4;
    if (options->devices)
        arguments[n++] = devices;
    if (options->n_nodes > 1) {
        (void)snprintf(nodes, sizeof(nodes), "--nodes=%u", options->n_nodes);
        (void)snprintf(node, sizeof(node), "--node-rank=%u", options->node);
        (void)snprintf(rendezvous, sizeof(rendezvous), "--rendezvous=%s", options->rendezvous);
        (void)snprintf(secret, sizeof(secret), "--secret-file=%s", options->secret_path);
        arguments[n++] = nodes;
        arguments[n++] = node;
        arguments[n++] = rendezvous;
        arguments[n++] = secret;
    }
    posix_spawn_file_actions_t actions;
    int error = posix_spawn_file_actions_init(&actions);
    if (error)
        return error;
    error = posix_spawn_file_actions_addopen(&actions, STDERR_FILENO, daemon->log_path,
                                             O_WRONLY | O_CREAT | O_APPEND, 0600);
    if (!error)
        error = posix_spawn_file_actions_adddup2(&actions, STDERR_FILENO, STDOUT_FILENO);
    if (!error)
        error = posix_spawnp(&daemon->pid, program, &actions, NULL, arguments, environ);
    posix_spawn_file_actions_destroy(&actions);
    if (error)
        fprintf(stderr, "epd-bench: starting %s: %s; name the daemon with --daemon\n", program,
                strerror(error));
    return error;
}

enum epd_status daemon_start(struct daemon *daemon, const struct daemon_options *options)
{
    const char *temporary = getenv("TMPDIR");
    *daemon = (struct daemon){0};
    /* A socket path has room for about 100 bytes: a long TMPDIR is not used. */
    (void)snprintf(daemon->directory, sizeof(daemon->directory), "%s/epd-bench-XXXXXX",
                   temporary && *temporary && strlen(temporary) < 60 ? temporary : "/tmp");
    if (!mkdtemp(daemon->directory)) {
        fprintf(stderr, "epd-bench: %s: %s\n", daemon->directory, strerror(errno));
        return EPD_SYSTEM;
    }
    (void)snprintf(daemon->socket_path, sizeof(daemon->socket_path), "%s/epd.sock", daemon->directory);
    (void)snprintf(daemon->control_path, sizeof(daemon->control_path), "%s/epd-control.sock",
                   daemon->directory);
    (void)snprintf(daemon->log_path, sizeof(daemon->log_path), "%s/log", daemon->directory);
    if (spawn_daemon(daemon, options)) {
        daemon->pid = 0;
        daemon_stop(daemon);
        return EPD_SYSTEM;
    }
    return EPD_OK;
}

int daemon_has_ended(const struct daemon *daemon)
{
    siginfo_t info = {0};
    if (daemon->pid <= 0 || waitid(P_PID, (id_t)daemon->pid, &info, WEXITED | WNOHANG | WNOWAIT) != 0 ||
        info.si_pid == 0)
        return 0;
    fprintf(stderr, "epd-bench: the daemon ended by itself, %s %d\n",
            info.si_code == CLD_EXITED ? "exit status" : "signal", info.si_status);
    return 1;
}

static void end_process(pid_t pid)
{
    const struct timespec nap = {.tv_nsec = 10 * 1000 * 1000};
    kill(pid, SIGTERM);
    for (int i = 0; i < DAEMON_STOP_S * 100; i++) {
        if (waitpid(pid, NULL, WNOHANG) != 0)
            return;
        nanosleep(&nap, NULL);
    }
    kill(pid, SIGKILL);
    (void)waitpid(pid, NULL, 0);
}

/* Sockets, locks, log, dumps: all files of the folder that we made. */
static void empty_folder(const char *path)
{
    DIR *folder = opendir(path);
    for (struct dirent *entry; folder && (entry = readdir(folder));)
        if (entry->d_name[0] != '.')
            (void)unlinkat(dirfd(folder), entry->d_name, 0);
    if (folder)
        closedir(folder);
}

void daemon_stop(struct daemon *daemon)
{
    if (daemon->pid > 0)
        end_process(daemon->pid);
    daemon->pid = 0;
    if (!daemon->directory[0])
        return;
    empty_folder(daemon->directory);
    if (rmdir(daemon->directory) != 0)
        fprintf(stderr, "epd-bench: %s is left behind: %s\n", daemon->directory, strerror(errno));
    daemon->directory[0] = 0;
}

void daemon_print_log(const struct daemon *daemon)
{
    char text[LOG_TAIL_BYTES];
    FILE *file = daemon->directory[0] ? fopen(daemon->log_path, "re") : NULL;
    if (!file)
        return;
    if (fseek(file, -(long)sizeof(text), SEEK_END) != 0)
        rewind(file);
    const size_t n = fread(text, 1, sizeof(text), file);
    fclose(file);
    fprintf(stderr, "--- the daemon's log ---\n%.*s---\n", (int)n, text);
}
