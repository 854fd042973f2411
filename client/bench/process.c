#include "client/bench/process.h"

#include <dirent.h>
#include <stdio.h>
#include <string.h>

/* The number behind `name:` in /proc/PID/status; 0 if it is not there. */
static double status_number(pid_t pid, const char *name)
{
    char path[64], line[256];
    double number = 0;
    (void)snprintf(path, sizeof(path), "/proc/%d/status", (int)pid);
    FILE *file = fopen(path, "re");
    while (file && fgets(line, sizeof(line), file))
        if (strncmp(line, name, strlen(name)) == 0 && line[strlen(name)] == ':')
            (void)sscanf(line + strlen(name) + 1, "%lf", &number);
    if (file)
        fclose(file);
    return number;
}

/* Adds the first number of every /proc/PID/task/TID/schedstat: nanoseconds on a processor. */
static double threads_cpu_ns(pid_t pid)
{
    char path[320];
    double sum = 0;
    (void)snprintf(path, sizeof(path), "/proc/%d/task", (int)pid);
    DIR *threads = opendir(path);
    for (struct dirent *entry; threads && (entry = readdir(threads));) {
        double ns = 0;
        if (entry->d_name[0] == '.')
            continue;
        (void)snprintf(path, sizeof(path), "/proc/%d/task/%s/schedstat", (int)pid, entry->d_name);
        FILE *file = fopen(path, "re");
        if (file && fscanf(file, "%lf", &ns) == 1)
            sum += ns;
        if (file)
            fclose(file);
    }
    if (threads)
        closedir(threads);
    return sum;
}

static double count_fds(pid_t pid)
{
    char path[64];
    double n = 0;
    (void)snprintf(path, sizeof(path), "/proc/%d/fd", (int)pid);
    DIR *fds = opendir(path);
    for (struct dirent *entry; fds && (entry = readdir(fds));)
        n += entry->d_name[0] != '.';
    if (fds)
        closedir(fds);
    return n;
}

/* Sizes of the session pages that it maps; -1 if they cannot be seen. */
static double page_bytes(pid_t pid)
{
    char path[64], line[512];
    unsigned long long first, end;
    double sum = 0;
    (void)snprintf(path, sizeof(path), "/proc/%d/maps", (int)pid);
    FILE *file = fopen(path, "re");
    if (!file)
        return -1;
    while (fgets(line, sizeof(line), file))
        if (strstr(line, "/memfd:epd-session-page") && sscanf(line, "%llx-%llx", &first, &end) == 2)
            sum += (double)(end - first);
    fclose(file);
    return sum;
}

enum epd_status process_read(pid_t pid, struct process_use *use)
{
    *use = (struct process_use){.anon_bytes = status_number(pid, "RssAnon") * 1024,
                                .page_bytes = page_bytes(pid),
                                .cpu_ns = threads_cpu_ns(pid),
                                .n_fds = count_fds(pid)};
    return use->anon_bytes > 0 && use->page_bytes >= 0 ? EPD_OK : EPD_SYSTEM;
}

pid_t process_parent(pid_t pid)
{
    return (pid_t)status_number(pid, "PPid");
}
