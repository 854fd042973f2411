#include "tests/gpu/backend/process.h"

#include <cuda_runtime_api.h>
#include <signal.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "client/public.h"

#define MAX_ARGUMENTS 24

_Noreturn void process_fail(const char *file, int line, const char *condition)
{
    fprintf(stderr, "process %d: %s:%d: %s failed: %s / %s\n", (int)getpid(), file, line, condition,
            epd_error_text(), cudaGetErrorString(cudaGetLastError()));
    exit(1);
}

void process_upload(void *to, const void *from, size_t bytes)
{
    MUST(cudaMemcpy(to, from, bytes, cudaMemcpyHostToDevice) == cudaSuccess &&
         cudaStreamSynchronize(cudaStreamLegacy) == cudaSuccess);
}

pid_t process_start(const char *const *argv)
{
    pid_t pid = fork();
    if (pid == 0) {
        execv(argv[0], (char *const *)argv);
        perror(argv[0]);
        _exit(127);
    }
    return pid;
}

int process_wait(pid_t pid)
{
    int status;
    if (waitpid(pid, &status, 0) != pid || !WIFEXITED(status))
        return -1;
    return WEXITSTATUS(status);
}

int process_count_main(void)
{
    int n = 0;
    return cudaGetDeviceCount(&n) == cudaSuccess ? n : 0;
}

int process_count_gpus(void)
{
    const char *argv[] = {"/proc/self/exe", "count", NULL};
    int n = process_wait(process_start(argv));
    return n < 0 || n == 127 ? 0 : n;
}

void process_daemon_start(struct process_daemon *daemon, const char *epd, const char *const *options)
{
    const char *argv[MAX_ARGUMENTS] = {
        epd, "--backend", "cuda", "--socket", daemon->socket_path, "--control-socket", daemon->control_path};
    snprintf(daemon->directory, sizeof daemon->directory, "/tmp/epd-gpu-XXXXXX");
    if (!mkdtemp(daemon->directory)) {
        perror(daemon->directory);
        exit(1);
    }
    snprintf(daemon->socket_path, sizeof daemon->socket_path, "%s/epd.sock", daemon->directory);
    snprintf(daemon->control_path, sizeof daemon->control_path, "%s/control.sock", daemon->directory);
    for (size_t i = 0; options && options[i] && i + 8 < MAX_ARGUMENTS; i++)
        argv[7 + i] = options[i];
    daemon->pid = process_start(argv);
}

int process_daemon_stop(struct process_daemon *daemon)
{
    char command[128];
    kill(daemon->pid, SIGTERM);
    int code = process_wait(daemon->pid);
    snprintf(command, sizeof command, "rm -rf %s", daemon->directory); /* sockets, locks, dumps */
    return system(command) != 0 || code != 0;
}

double process_seconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + (double)now.tv_nsec * 1e-9;
}

double process_number(const char *text, const char *from, const char *name)
{
    char key[64];
    const char *at = strstr(text, from);
    snprintf(key, sizeof key, "\"%s\":", name);
    at = at ? strstr(at, key) : NULL;
    return at ? strtod(at + strlen(key), NULL) : -1;
}
