#include "tests/fault/spawn.h"

#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define MAX_ARGUMENTS 64

void sleep_ms(long ms)
{
    struct timespec t = {.tv_sec = ms / 1000, .tv_nsec = ms % 1000 * 1000000};
    nanosleep(&t, NULL);
}

double now_ms(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e3 + (double)t.tv_nsec * 1e-6;
}

pid_t spawn_epd(const char *const *arguments, const char *log_path)
{
    const char *argv[MAX_ARGUMENTS] = {EPD_BINARY};
    int argc = 1;
    for (int i = 0; arguments[i] && argc < MAX_ARGUMENTS - 1; i++)
        argv[argc++] = arguments[i];
    pid_t pid = fork();
    if (pid == 0) {
        int log = open(log_path, O_WRONLY | O_CREAT | O_APPEND, 0600);
        dup2(log, STDOUT_FILENO);
        dup2(log, STDERR_FILENO);
        execv(EPD_BINARY, (char *const *)argv);
        _exit(127);
    }
    return pid;
}

int spawn_wait(pid_t pid, int deadline_ms)
{
    int status;
    for (int waited = 0; waitpid(pid, &status, WNOHANG) != pid; waited += 5) {
        if (waited > deadline_ms) {
            kill(pid, SIGKILL);
            waitpid(pid, &status, 0);
            return -1;
        }
        sleep_ms(5);
    }
    return WIFEXITED(status) ? WEXITSTATUS(status) : 1000 + WTERMSIG(status);
}

int file_count(const char *path, const char *text)
{
    char line[4096];
    int n = 0;
    FILE *file = fopen(path, "r");
    while (file && fgets(line, sizeof line, file))
        n += strstr(line, text) != NULL;
    if (file)
        fclose(file);
    return n;
}

int file_contains(const char *path, const char *text)
{
    return file_count(path, text) > 0;
}

int file_wait(const char *path, const char *text, int deadline_ms)
{
    for (int waited = 0; !file_contains(path, text); waited += 5) {
        if (waited > deadline_ms)
            return 0;
        sleep_ms(5);
    }
    return 1;
}
