#include "daemon/process.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>

/* Of field 9 of /proc/PID/stat, as the kernel has it. */
#define PF_EXITING 0x4u

/* A file of /proc/PID as text. 0, or errno; "" then. */
static int read_file(pid_t pid, const char *name, char *text, size_t bytes)
{
    char path[48];
    text[0] = 0;
    (void)snprintf(path, sizeof(path), "/proc/%d/%s", (int)pid, name);
    FILE *file = fopen(path, "re");
    if (!file)
        return errno;
    const size_t n = fread(text, 1, bytes - 1, file);
    (void)fclose(file);
    text[n] = 0;
    return 0;
}

int process_ending(pid_t pid)
{
    char text[512];
    unsigned flags = PF_EXITING;
    char state = 0;
    const int failed = read_file(pid, "stat", text, sizeof(text));
    if (failed)
        return failed == ENOENT || failed == ESRCH;
    const char *name_end = strrchr(text, ')'); /* the name may hold anything */
    if (!name_end || sscanf(name_end + 1, " %c %*d %*d %*d %*d %*d %u", &state, &flags) != 2)
        return 0;
    return state == 'Z' || state == 'X' || (flags & PF_EXITING) != 0;
}

/* The number in a line "Key: 12" of /proc/PID/status; 0 if there is none. */
static long status_number(const char *text, const char *key)
{
    const char *at = strstr(text, key);
    long number = 0;
    if (!at || sscanf(at + strlen(key), "%ld", &number) != 1)
        return 0;
    return number;
}

int process_held(pid_t pid)
{
    char text[4096];
    if (read_file(pid, "status", text, sizeof(text)) != 0)
        return 0;
    return status_number(text, "\nTracerPid:") != 0 || status_number(text, "\nCoreDumping:") != 0;
}

void process_describe(pid_t pid, char *text, size_t bytes)
{
    char stat[512], wchan[64];
    (void)read_file(pid, "stat", stat, sizeof(stat));
    (void)read_file(pid, "wchan", wchan, sizeof(wchan)); /* "0" where we may not know, or it runs */
    const char *name_end = strrchr(stat, ')');
    char state = '?';
    if (name_end)
        (void)sscanf(name_end + 1, " %c", &state);
    (void)snprintf(text, bytes, "state %c wchan %s", state, wchan[0] ? wchan : "?");
}
