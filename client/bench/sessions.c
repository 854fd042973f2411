#include "client/bench/sessions.h"

#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/resource.h>
#include <time.h>

#include "client/bench/clock.h"
#include "client/bench/process.h"

#define IDLE_MEASURE_S 2
/* Before each measurement: what the last connections set off has died down. */
#define SETTLE_MS 300

/* EPD_EVICTED: a signal wants an end. */
static enum epd_status nap_ms(long ms)
{
    const struct timespec nap = {.tv_sec = ms / 1000, .tv_nsec = ms % 1000 * 1000000};
    return nanosleep(&nap, NULL) == 0 ? EPD_OK : EPD_EVICTED;
}

static enum epd_status open_session(const char *socket_path, struct epd_client **client)
{
    const struct epd_open_options options = {.size = sizeof(options), .socket_path = socket_path};
    enum epd_status status = epd_open(&options, client);
    if (status != EPD_OK)
        fprintf(stderr, "epd-bench: %s: %s\n", epd_status_name(status), epd_error_text());
    return status;
}

/* The worker's pid is in the statistics. */
static enum epd_status find_worker(struct epd_client *client, pid_t *worker)
{
    char *text = NULL;
    enum epd_status status = epd_stats(client, &text);
    if (status != EPD_OK) {
        fprintf(stderr, "epd-bench: statistics: %s\n", epd_error_text());
        return status;
    }
    json_t *stats = json_loads(text, 0, NULL);
    *worker = (pid_t)json_integer_value(json_object_get(stats, "pid"));
    json_decref(stats);
    epd_free(text);
    if (*worker > 0)
        return EPD_OK;
    fprintf(stderr, "epd-bench: the daemon's statistics do not name its pid\n");
    return EPD_UNSUPPORTED;
}

static enum epd_status measure_idle(pid_t worker, double *share)
{
    struct process_use before[2], after[2];
    const pid_t supervisor = process_parent(worker);
    enum epd_status status = nap_ms(SETTLE_MS);
    const double start_ns = clock_ns();
    if (status == EPD_OK)
        status = process_read(worker, &before[0]);
    if (status == EPD_OK)
        status = process_read(supervisor, &before[1]);
    if (status == EPD_OK)
        status = nap_ms(IDLE_MEASURE_S * 1000);
    if (status == EPD_OK)
        status = process_read(worker, &after[0]);
    if (status == EPD_OK)
        status = process_read(supervisor, &after[1]);
    if (status == EPD_EVICTED)
        return status;
    if (status != EPD_OK) {
        fprintf(stderr, "epd-bench: /proc does not show the daemon's processes %d and %d\n", (int)supervisor,
                (int)worker);
        return status;
    }
    *share =
        (after[0].cpu_ns - before[0].cpu_ns + after[1].cpu_ns - before[1].cpu_ns) / (clock_ns() - start_ns);
    return EPD_OK;
}

static enum epd_status measure(const char *socket_path, struct epd_client **clients, uint32_t n_sessions,
                               struct sessions_result *result)
{
    pid_t worker = 0;
    struct process_use empty, full;
    /* One session is there before the first measurement: code and tables that every daemon needs are warm. */
    enum epd_status status = open_session(socket_path, &clients[0]);
    if (status == EPD_OK)
        status = find_worker(clients[0], &worker);
    if (status == EPD_OK)
        status = measure_idle(worker, &result->idle_empty_share);
    if (status == EPD_OK)
        status = process_read(worker, &empty);
    for (uint32_t i = 1; status == EPD_OK && i <= n_sessions; i++)
        status = open_session(socket_path, &clients[i]);
    if (status == EPD_OK)
        status = measure_idle(worker, &result->idle_full_share);
    if (status == EPD_OK)
        status = process_read(worker, &full);
    if (status != EPD_OK)
        return status;
    result->n_sessions = n_sessions;
    result->anon_bytes_per_session = (full.anon_bytes - empty.anon_bytes) / n_sessions;
    result->shared_bytes_per_session = (full.page_bytes - empty.page_bytes) / n_sessions;
    result->fds_per_session = (full.n_fds - empty.n_fds) / n_sessions;
    return EPD_OK;
}

enum epd_status sessions_run(const char *socket_path, uint32_t n_sessions, struct sessions_result *result)
{
    struct rlimit limit;
    if (getrlimit(RLIMIT_NOFILE, &limit) == 0) {
        limit.rlim_cur = limit.rlim_max;
        (void)setrlimit(RLIMIT_NOFILE, &limit); /* if it is not enough, epd_open says so */
    }
    struct epd_client **clients = calloc((size_t)n_sessions + 1, sizeof(struct epd_client *));
    if (!clients) {
        fprintf(stderr, "epd-bench: no memory for %u sessions\n", n_sessions);
        return EPD_NO_MEMORY;
    }
    enum epd_status status = measure(socket_path, clients, n_sessions, result);
    for (uint32_t i = 0; i <= n_sessions; i++)
        epd_close(clients[i]);
    free(clients);
    return status;
}
