#include "client/bench/loss.h"

#include <errno.h>
#include <jansson.h>
#include <math.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <time.h>

#include "client/bench/clock.h"
#include "client/bench/run.h"
#include "client/bench/sample.h"

#define START_MS   120000 /* processes, CUDA contexts, first steps */
#define RECLAIM_MS 20000
/* How often the parent looks: at the board, at the statistics. */
#define LOOK_NS  1000000
#define STATS_NS 100000
/* Before the first look: the sessions of earlier jobs are gone. */
#define SETTLE_NS 300000000
/* The kill comes at a random moment of this time after all ranks work. */
#define KILL_WITHIN_US 3000

/* What sessions hold in the daemon. */
struct holdings {
    double n_sessions, heap_bytes, imported_bytes;
};

struct loss {
    const struct job *job;
    struct epd_client *client; /* the parent's, for the statistics */
    struct holdings before;
    uint32_t n_told, n_reclaimed, n_served;
    double *told, *reclaimed, *served; /* owned, [n_rounds] nanoseconds */
};

static void nap_ns(long ns)
{
    const struct timespec nap = {.tv_sec = ns / 1000000000, .tv_nsec = ns % 1000000000};
    nanosleep(&nap, NULL);
}

static double number_of(const json_t *object, const char *field, int *known)
{
    const json_t *value = json_object_get(object, field);
    *known = *known && json_is_number(value);
    return json_number_value(value);
}

static enum epd_status look(struct epd_client *client, struct holdings *holdings)
{
    char *text = NULL;
    enum epd_status status = epd_stats(client, &text);
    if (status != EPD_OK) {
        fprintf(stderr, "epd-bench: statistics: %s\n", epd_error_text());
        return status;
    }
    json_t *stats = json_loads(text, 0, NULL), *device;
    size_t idx;
    int known = 1;
    *holdings =
        (struct holdings){.n_sessions = number_of(json_object_get(stats, "sessions"), "open", &known)};
    json_array_foreach (json_object_get(stats, "devices"), idx, device) {
        holdings->heap_bytes += number_of(device, "heap_bytes", &known);
        holdings->imported_bytes += number_of(device, "imported_bytes", &known);
    }
    json_decref(stats);
    epd_free(text);
    if (known)
        return EPD_OK;
    fprintf(stderr, "epd-bench: statistics: not the fields that this program knows\n");
    return EPD_PROTOCOL;
}

static int holds_no_more(const struct holdings *now, const struct holdings *before)
{
    return now->n_sessions <= before->n_sessions && now->heap_bytes <= before->heap_bytes &&
           now->imported_bytes <= before->imported_bytes;
}

static enum epd_status wait_reclaimed(struct loss *loss, double killed_ns)
{
    struct holdings now;
    for (;;) {
        enum epd_status status = look(loss->client, &now);
        const double ns = clock_ns() - killed_ns;
        if (status != EPD_OK)
            return status;
        if (holds_no_more(&now, &loss->before)) {
            loss->reclaimed[loss->n_reclaimed++] = ns;
            return EPD_OK;
        }
        if (ns > RECLAIM_MS * 1e6) {
            fprintf(stderr,
                    "epd-bench: %d ms after a rank was killed the daemon holds %.0f sessions, %.0f bytes of "
                    "heap, %.0f "
                    "imported; before %.0f, %.0f, %.0f\n",
                    RECLAIM_MS, now.n_sessions, now.heap_bytes, now.imported_bytes, loss->before.n_sessions,
                    loss->before.heap_bytes, loss->before.imported_bytes);
            return EPD_TIMEOUT;
        }
        nap_ns(STATS_NS);
    }
}

/* A rank that fails before the kill is seen here. */
static enum epd_status wait_ready(struct board *board, uint32_t n)
{
    for (int ms = 0; ms < START_MS; ms++) {
        if (atomic_load(&board_loss(board)->n_ready) == n)
            return EPD_OK;
        for (uint32_t rank = 0; rank < n; rank++) {
            if (!board_text(board, rank)[0])
                continue;
            fprintf(stderr, "epd-bench: rank %u: %s\n", rank, board_text(board, rank));
            return EPD_PEER_LOST;
        }
        nap_ns(LOOK_NS);
    }
    fprintf(stderr, "epd-bench: %u of %u ranks work after %d ms\n", atomic_load(&board_loss(board)->n_ready),
            n, START_MS);
    return EPD_TIMEOUT;
}

static void end_all(const pid_t *pids, uint32_t n)
{
    for (uint32_t rank = 0; rank < n; rank++)
        if (pids[rank] > 0)
            kill(pids[rank], SIGKILL);
}

static enum epd_status wait_survivors(struct board *board, const pid_t *pids, uint32_t n, uint32_t victim)
{
    enum epd_status status = EPD_OK;
    for (uint32_t rank = 0; rank < n; rank++) {
        int wait_status = 0;
        pid_t ended = 0;
        while (pids[rank] > 0 && (ended = waitpid(pids[rank], &wait_status, 0)) < 0 && errno == EINTR) {
            end_all(pids, n); /* told to end: this round counts for nothing */
            status = EPD_EVICTED;
        }
        if (pids[rank] <= 0 || ended != pids[rank] || rank == victim || wait_status == 0 ||
            status == EPD_EVICTED)
            continue;
        if (status == EPD_OK)
            fprintf(stderr, "epd-bench: %s %u: %s\n", rank == n - 1 && n > victim + 1 ? "spare" : "rank",
                    rank, board_text(board, rank)[0] ? board_text(board, rank) : "failed");
        status = EPD_PEER_LOST;
    }
    return status;
}

static void collect(struct loss *loss, const struct board_loss *round, uint32_t n_ranks)
{
    double told = 0, served = 0;
    for (uint32_t rank = 0; rank < n_ranks; rank++) {
        told = fmax(told, rank + 1 < n_ranks ? round->told_ns[rank] : 0);
        served = fmax(served, round->served_ns[rank]);
    }
    loss->told[loss->n_told++] = told - round->killed_ns;
    if (round->go_on)
        loss->served[loss->n_served++] = served - round->killed_ns;
}

/* Kills the last rank; with a spare the others go on. */
static enum epd_status kill_one(struct loss *loss, struct board *board, const pid_t *pids, uint32_t n,
                                uint32_t round)
{
    struct board_loss *shared = board_loss(board);
    const uint32_t victim = loss->job->n_ranks - 1;
    enum epd_status status = wait_ready(board, n);
    if (status != EPD_OK) {
        end_all(pids, n);
        (void)wait_survivors(board, pids, n, victim);
        return status;
    }
    nap_ns((long)(round * 7919 % KILL_WITHIN_US) * 1000);
    atomic_store(&shared->killed_ns, clock_ns());
    kill(pids[victim], SIGKILL);
    if (!shared->go_on)
        status = wait_reclaimed(loss, shared->killed_ns);
    const enum epd_status ended = wait_survivors(board, pids, n, victim);
    status = status == EPD_OK ? ended : status;
    if (status == EPD_OK)
        collect(loss, shared, loss->job->n_ranks);
    return status;
}

static enum epd_status run_round(struct loss *loss, uint32_t round)
{
    struct board board;
    struct job job = *loss->job;
    pid_t pids[JOB_MAX_RANKS + 1] = {0};
    const int serve = round % 2;
    const uint32_t n = job.n_ranks + (uint32_t)serve;
    (void)snprintf(job.group_name, sizeof(job.group_name), "%.20s-%u", loss->job->group_name, round);
    enum epd_status status = board_create(&board, &job, job.n_iterations);
    if (status != EPD_OK)
        return status;
    atomic_store(&board_loss(&board)->go_on, (uint32_t)serve);
    uint32_t n_started = 0;
    while (status == EPD_OK && n_started < n) {
        status = run_start_rank(&board, n_started, &pids[n_started]);
        n_started += status == EPD_OK;
    }
    if (status == EPD_OK)
        status = kill_one(loss, &board, pids, n, round);
    else
        end_all(pids, n_started);
    board_close(&board);
    return status;
}

static struct loss_times condense(double *samples, uint32_t n)
{
    sample_sort(samples, n);
    return (struct loss_times){.n = n,
                               .p50_ns = sample_quantile(samples, n, 0.5),
                               .p99_ns = sample_quantile(samples, n, 0.99),
                               .max_ns = samples[n - 1]};
}

enum epd_status loss_run(const struct job *job, uint32_t n_rounds, struct loss_result *result)
{
    const struct epd_open_options options = {.size = sizeof(options), .socket_path = job->socket_path};
    double *samples = calloc((size_t)n_rounds * 3, sizeof(double));
    if (!samples) {
        fprintf(stderr, "epd-bench: no memory for %u rounds\n", n_rounds);
        return EPD_NO_MEMORY;
    }
    struct loss loss = {.job = job,
                        .told = samples,
                        .reclaimed = samples + n_rounds,
                        .served = samples + 2 * (size_t)n_rounds};
    enum epd_status status = epd_open(&options, &loss.client);
    if (status != EPD_OK)
        fprintf(stderr, "epd-bench: %s: %s\n", epd_status_name(status), epd_error_text());
    nap_ns(SETTLE_NS);
    if (status == EPD_OK)
        status = look(loss.client, &loss.before);
    for (uint32_t round = 0; status == EPD_OK && round < n_rounds; round++)
        status = run_round(&loss, round);
    epd_close(loss.client);
    if (status == EPD_OK)
        *result = (struct loss_result){.told = condense(loss.told, loss.n_told),
                                       .reclaim = condense(loss.reclaimed, loss.n_reclaimed),
                                       .serve = condense(loss.served, loss.n_served)};
    free(samples);
    return status;
}
