#include "client/bench/run.h"

#include <errno.h>
#include <math.h>
#include <signal.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>

#include "client/bench/sample.h"

extern char **environ;

enum epd_status run_start_rank(const struct board *board, uint32_t rank, pid_t *pid)
{
    char name[] = "epd-bench", rank_option[32], board_option[32];
    (void)snprintf(rank_option, sizeof(rank_option), "--rank=%u", rank);
    (void)snprintf(board_option, sizeof(board_option), "--board-fd=%d", board->fd);
    char *arguments[] = {name, rank_option, board_option, NULL};
    /* A fresh program image: nothing that a library has set up here reaches the rank. */
    int error = posix_spawn(pid, "/proc/self/exe", NULL, NULL, arguments, environ);
    if (!error)
        return EPD_OK;
    fprintf(stderr, "epd-bench: starting rank %u: %s\n", rank, strerror(error));
    return EPD_SYSTEM;
}

static void end_ranks(struct board *board, const pid_t *pids, uint32_t n_ranks)
{
    board_abort(board);
    for (uint32_t rank = 0; rank < n_ranks; rank++)
        if (pids[rank] > 0)
            kill(pids[rank], SIGTERM);
}

static void print_failure(const struct board *board, uint32_t rank, int wait_status)
{
    const char *text = board_text(board, rank);
    if (WIFSIGNALED(wait_status))
        fprintf(stderr, "epd-bench: rank %u was ended by signal %d\n", rank, WTERMSIG(wait_status));
    else
        fprintf(stderr, "epd-bench: rank %u: %s\n", rank, *text ? text : "failed");
}

static enum epd_status wait_ranks(struct board *board, pid_t *pids, uint32_t n_ranks)
{
    enum epd_status result = EPD_OK;
    for (uint32_t n_running = n_ranks; n_running > 0;) {
        int wait_status = 0;
        const pid_t pid = waitpid(-1, &wait_status, 0);
        if (pid < 0 && errno == EINTR) { /* a person wants an end; main catches the signal for us */
            result = EPD_EVICTED;
            end_ranks(board, pids, n_ranks);
            continue;
        }
        if (pid < 0)
            return EPD_INTERNAL;
        for (uint32_t rank = 0; rank < n_ranks; rank++) {
            if (pids[rank] != pid)
                continue;
            pids[rank] = 0;
            n_running--;
            if (wait_status == 0)
                continue;
            if (result == EPD_OK) { /* the others only follow */
                print_failure(board, rank, wait_status);
                end_ranks(board, pids, n_ranks);
                result = EPD_PEER_LOST;
            }
        }
    }
    return result;
}

static enum epd_status condense(const struct board *board, struct result *result)
{
    const struct job *job = board_job(board);
    const uint32_t n = job->n_iterations;
    double *slowest = calloc(n, sizeof(double));
    if (!slowest) {
        fprintf(stderr, "epd-bench: no memory for %u times\n", n);
        return EPD_NO_MEMORY;
    }
    *result =
        (struct result){.counted = *board_counted(board), .memory_bytes = -1, .slowest_rank_median_ns = -1};
    for (uint32_t rank = 0; rank < job->n_ranks; rank++) {
        double *samples = board_samples(board, rank);
        for (uint32_t i = 0; i < n; i++)
            slowest[i] = samples[i] > slowest[i] ? samples[i] : slowest[i];
        sample_sort(samples, n);
        const double median_ns = sample_quantile(samples, n, 0.5);
        if (median_ns > result->slowest_rank_median_ns) {
            result->slowest_rank_median_ns = median_ns;
            result->slowest_rank = rank;
        }
        double *launches = board_launches(board, rank);
        sample_sort(launches, n);
        result->launch_ns = fmax(result->launch_ns, sample_quantile(launches, n, 0.5));
        result->memory_bytes = fmax(result->memory_bytes, *board_memory(board, rank));
    }
    sample_sort(slowest, n);
    result->min_ns = slowest[0];
    result->median_ns = sample_quantile(slowest, n, 0.5);
    result->p10_ns = sample_quantile(slowest, n, 0.1);
    result->p90_ns = sample_quantile(slowest, n, 0.9);
    result->p99_ns = sample_quantile(slowest, n, 0.99);
    free(slowest);
    return EPD_OK;
}

static enum epd_status start_ranks(struct board *board, uint32_t n_ranks, pid_t *pids)
{
    enum epd_status status = EPD_OK;
    uint32_t n_started = 0;
    while (status == EPD_OK && n_started < n_ranks) {
        status = run_start_rank(board, n_started, &pids[n_started]);
        n_started += status == EPD_OK;
    }
    if (status == EPD_OK)
        return EPD_OK;
    end_ranks(board, pids, n_started);
    (void)wait_ranks(board, pids, n_started);
    return status;
}

void crew_init(struct crew *crew, uint32_t max_iterations)
{
    *crew = (struct crew){.max_iterations = max_iterations};
}

static enum epd_status crew_start(struct crew *crew, const struct job *job)
{
    enum epd_status status = board_create(&crew->board, job, crew->max_iterations);
    if (status != EPD_OK)
        return status;
    status = start_ranks(&crew->board, job->n_ranks, crew->pids);
    if (status == EPD_OK)
        crew->n_ranks = job->n_ranks;
    else
        board_close(&crew->board);
    return status;
}

/* Whether a rank has ended; it stays to be waited for. */
static int crew_is_short(const struct crew *crew)
{
    for (uint32_t rank = 0; rank < crew->n_ranks; rank++) {
        siginfo_t info = {0};
        if (waitid(P_PID, (id_t)crew->pids[rank], &info, WEXITED | WNOHANG | WNOWAIT) == 0 && info.si_pid > 0)
            return 1;
    }
    return 0;
}

/* A rank that ends in the middle of a job has failed. */
static enum epd_status crew_wait(struct crew *crew)
{
    for (;;) {
        const enum epd_status status = board_wait_finished(&crew->board);
        if (status == EPD_OK)
            return EPD_OK;
        if (status == EPD_EVICTED)
            end_ranks(&crew->board, crew->pids, crew->n_ranks);
        else if (!crew_is_short(crew))
            continue;
        const enum epd_status ended = wait_ranks(&crew->board, crew->pids, crew->n_ranks);
        return status == EPD_EVICTED ? EPD_EVICTED : ended == EPD_OK ? EPD_PEER_LOST : ended;
    }
}

enum epd_status crew_run(struct crew *crew, const struct job *job, struct result *result)
{
    enum epd_status status = EPD_OK;
    if (crew->n_ranks == 0)
        status = crew_start(crew, job);
    else
        board_next_job(&crew->board, job);
    if (status != EPD_OK)
        return status;
    status = crew_wait(crew);
    if (status == EPD_OK)
        return condense(&crew->board, result);
    board_close(&crew->board);
    crew->n_ranks = 0;
    return status;
}

void crew_fini(struct crew *crew)
{
    if (crew->n_ranks == 0)
        return;
    board_no_more_jobs(&crew->board);
    (void)wait_ranks(&crew->board, crew->pids, crew->n_ranks);
    board_close(&crew->board);
    crew->n_ranks = 0;
}

enum epd_status run_link(const struct job *job, double *gb_per_s)
{
    struct board board;
    pid_t pids[JOB_MAX_RANKS] = {0};
    enum epd_status status = board_create(&board, job, job->n_iterations);
    if (status != EPD_OK)
        return status;
    status = start_ranks(&board, job->n_ranks, pids);
    if (status == EPD_OK)
        status = wait_ranks(&board, pids, job->n_ranks);
    if (status == EPD_OK) {
        sample_sort(board_samples(&board, 0), job->n_iterations);
        *gb_per_s = sample_quantile(board_samples(&board, 0), job->n_iterations, 0.5);
    }
    board_close(&board);
    return status;
}
