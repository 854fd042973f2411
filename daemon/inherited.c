#include "daemon/inherited.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static int *place_of(struct inherited *inherited, const char *name)
{
    if (strcmp(name, INHERITED_RANK) == 0)
        return &inherited->rank_fd;
    if (strcmp(name, INHERITED_CONTROL) == 0)
        return &inherited->control_fd;
    if (strcmp(name, INHERITED_CHANNEL) == 0)
        return &inherited->channel_fd;
    if (strcmp(name, INHERITED_RECORDER) == 0)
        return &inherited->recorder_fd;
    return NULL;
}

static enum epd_status take_named(struct inherited *inherited, char *names, int n_fds,
                                  struct epd_error *error)
{
    char *rest = NULL;
    char *name = strtok_r(names, ":", &rest);
    for (int i = 0; i < n_fds; i++, name = strtok_r(NULL, ":", &rest)) {
        int *place = name ? place_of(inherited, name) : NULL;
        if (!place)
            return error_set(
                error, EPD_INVALID_ARGUMENT,
                "inherited fd %d is named '%.40s', want %s or %s (FileDescriptorName= in the socket unit)",
                INHERITED_FIRST_FD + i, name ? name : "", INHERITED_RANK, INHERITED_CONTROL);
        *place = INHERITED_FIRST_FD + i;
        if (fcntl(*place, F_SETFD, FD_CLOEXEC) != 0)
            return error_set(error, EPD_SYSTEM, "inherited fd %d: %s", *place, strerror(errno));
    }
    return EPD_OK;
}

enum epd_status inherited_take(struct inherited *inherited, struct epd_error *error)
{
    *inherited = (struct inherited){-1, -1, -1, -1};
    const char *pid = getenv("LISTEN_PID"), *count = getenv("LISTEN_FDS"), *given = getenv("LISTEN_FDNAMES");
    enum epd_status status = EPD_OK;
    if (pid && count && strtol(pid, NULL, 10) == (long)getpid()) {
        const long n_fds = strtol(count, NULL, 10);
        char names[256];
        (void)snprintf(names, sizeof(names), "%s", given ? given : "");
        if (n_fds < 0 || n_fds > INHERITED_MAX_FDS)
            status = error_set(error, EPD_INVALID_ARGUMENT, "LISTEN_FDS %ld, at most %d", n_fds,
                               INHERITED_MAX_FDS);
        else
            status = take_named(inherited, names, (int)n_fds, error);
    }
    (void)unsetenv("LISTEN_PID");
    (void)unsetenv("LISTEN_FDS");
    (void)unsetenv("LISTEN_FDNAMES");
    return status;
}

/* dup2 gives the copy no close-on-exec flag; going through high numbers keeps one from overwriting another's
 * source. */
static int put_in_place(const int *fds, int n_fds)
{
    int high[INHERITED_MAX_FDS];
    for (int i = 0; i < n_fds; i++) {
        high[i] = fcntl(fds[i], F_DUPFD_CLOEXEC, INHERITED_FIRST_FD + INHERITED_MAX_FDS);
        if (high[i] < 0)
            return -1;
    }
    for (int i = 0; i < n_fds; i++)
        if (dup2(high[i], INHERITED_FIRST_FD + i) < 0)
            return -1;
    return 0;
}

enum epd_status handover_create(struct handover *handover, const struct inherited *inherited,
                                struct epd_error *error)
{
    static char count[] = "LISTEN_FDS=4", names[] = "LISTEN_FDNAMES=" INHERITED_RANK ":" INHERITED_CONTROL
                                                    ":" INHERITED_CHANNEL ":" INHERITED_RECORDER;
    size_t n = 0, n_kept = 0;
    while (environ[n])
        n++;
    *handover = (struct handover){.inherited = *inherited};
    handover->environment = malloc((n + 4) * sizeof(*handover->environment));
    if (!handover->environment)
        return error_set(error, EPD_NO_MEMORY, "environment of %zu words: no memory", n);
    for (size_t i = 0; i < n; i++)
        if (strncmp(environ[i], "LISTEN_", strlen("LISTEN_")) != 0)
            handover->environment[n_kept++] = environ[i];
    handover->environment[n_kept++] = handover->pid;
    handover->environment[n_kept++] = count;
    handover->environment[n_kept++] = names;
    handover->environment[n_kept] = NULL;
    return EPD_OK;
}

void handover_destroy(struct handover *handover)
{
    free(handover->environment);
    handover->environment = NULL;
}

/* "LISTEN_PID=" and the number, without a library's help. */
static void write_pid(char *to, pid_t pid)
{
    char digits[16];
    size_t n = 0;
    memcpy(to, "LISTEN_PID=", strlen("LISTEN_PID="));
    to += strlen("LISTEN_PID=");
    do
        digits[n++] = (char)('0' + pid % 10);
    while ((pid /= 10) > 0);
    while (n > 0)
        *to++ = digits[--n];
    *to = '\0';
}

int handover_give(struct handover *handover)
{
    const struct inherited *inherited = &handover->inherited;
    const int fds[] = {inherited->rank_fd, inherited->control_fd, inherited->channel_fd,
                       inherited->recorder_fd};
    write_pid(handover->pid, getpid());
    return put_in_place(fds, 4);
}
