#include "tests/fault/baseline.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "tests/fault/control.h"

#define POLL_MS        5
#define TAKE_LOOKS     6
#define TAKE_MAX_LOOKS 2000

static long now_ms(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000 + t.tv_nsec / 1000000;
}

static FILE *open_proc(pid_t pid, const char *name)
{
    char path[64];
    snprintf(path, sizeof path, "/proc/%d/%s", (int)pid, name);
    return fopen(path, "r");
}

/* Anonymous shared memory shows as /memfd: or as a deleted file; the log, libraries and locales do not. */
static void count_shared(struct baseline *b)
{
    char line[512];
    FILE *maps = open_proc(b->worker, "maps");
    while (maps && fgets(line, sizeof line, maps)) {
        unsigned long first, last;
        char flags[8];
        if (sscanf(line, "%lx-%lx %7s", &first, &last, flags) != 3 || flags[3] != 's')
            continue;
        b->n_shared++;
        b->shared_kib += (long)((last - first) / 1024);
    }
    if (maps)
        fclose(maps);
}

static long read_rss(pid_t pid)
{
    char line[256];
    long kib = 0;
    FILE *status = open_proc(pid, "status");
    while (status && fgets(line, sizeof line, status))
        if (sscanf(line, "VmRSS: %ld", &kib) == 1)
            break;
    if (status)
        fclose(status);
    return kib;
}

/* 0 if the daemon does not answer. */
static int look(struct baseline *b, const struct daemon_process *daemon)
{
    *b = (struct baseline){0};
    json_t *status = control_ask(daemon->control_path, CONTROL_STATUS, NULL);
    json_t *devices = control_ask(daemon->control_path, CONTROL_DEVICES, NULL);
    if (!status || !devices) {
        json_decref(status);
        json_decref(devices);
        return 0;
    }
    b->worker = (pid_t)control_number(status, "pid");
    b->sessions = control_number(status, "sessions");
    b->groups = control_number(status, "groups");
    b->buffers = control_number(status, "buffers");
    b->plans = control_number(status, "plans");
    b->launches = control_number(status, "launches_in_flight");
    b->heap_bytes = control_sum(devices, "devices", "heap_bytes");
    b->imported_bytes = control_sum(devices, "devices", "imported_bytes");
    json_decref(status);
    json_decref(devices);
    b->fds = process_fds(b->worker);
    b->rss_kib = read_rss(b->worker);
    count_shared(b);
    return 1;
}

/* The control connections of a look may still be open in the worker when it counts: the least of several
 * looks. */
void baseline_take(struct baseline *baseline, const struct daemon_process *daemon)
{
    int n_good = 0;
    for (int i = 0; i < TAKE_MAX_LOOKS && n_good < TAKE_LOOKS; i++) {
        struct baseline now;
        struct timespec t = {.tv_nsec = POLL_MS * 1000000l};
        nanosleep(&t, NULL);
        if (!look(&now, daemon))
            continue;
        if (n_good++ == 0 || now.fds < baseline->fds || now.sessions < baseline->sessions ||
            now.shared_kib < baseline->shared_kib)
            *baseline = now;
    }
    if (n_good == TAKE_LOOKS)
        return;
    fprintf(stderr, "baseline: the daemon does not answer\n");
    daemon_print_log(daemon);
    abort();
}

/* NULL if `now` is no more than `before`, else what is more. */
static const char *grown(const struct baseline *before, const struct baseline *now)
{
    if (now->worker != before->worker)
        return "another worker";
    if (now->sessions > before->sessions || now->groups > before->groups || now->buffers > before->buffers ||
        now->plans > before->plans || now->launches > before->launches)
        return "objects";
    if (now->heap_bytes > before->heap_bytes || now->imported_bytes > before->imported_bytes)
        return "device memory";
    if (now->n_shared > before->n_shared || now->shared_kib > before->shared_kib)
        return "shared mappings";
    if (now->fds > before->fds)
        return "fds";
    /* Sanitizers keep freed memory on purpose. */
    if (SANITIZER_FACTOR == 1 && now->rss_kib > before->rss_kib + BASELINE_RSS_SLACK_KIB)
        return "rss";
    return NULL;
}

static void print(const char *when, const struct baseline *b)
{
    fprintf(stderr,
            "%s: pid %d fds %d rss_kib %ld shared %d shared_kib %ld sessions %lld groups %lld buffers %lld "
            "plans %lld launches %lld heap_bytes %lld imported_bytes %lld\n",
            when, (int)b->worker, b->fds, b->rss_kib, b->n_shared, b->shared_kib, b->sessions, b->groups,
            b->buffers, b->plans, b->launches, b->heap_bytes, b->imported_bytes);
}

int baseline_wait(const struct baseline *before, const struct daemon_process *daemon)
{
    struct baseline now = {0};
    const long begin = now_ms();
    for (;;) {
        const char *what = look(&now, daemon) ? grown(before, &now) : "no answer";
        if (!what)
            return (int)(now_ms() - begin);
        if (now_ms() - begin > RECLAIM_MS * SANITIZER_FACTOR) {
            fprintf(stderr, "not back to the baseline within %d ms: %s\n", RECLAIM_MS * SANITIZER_FACTOR,
                    what);
            print("before", before);
            print("now", &now);
            return -1;
        }
        struct timespec t = {.tv_nsec = POLL_MS * 1000000l};
        nanosleep(&t, NULL);
    }
}
