/* epd-bench: measures the ops of epd through real clients, beside the same computation in one process where
 * that can be said on the host. */
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "client/bench/options.h"
#include "client/bench/rank.h"
#include "client/bench/report.h"
#include "client/bench/sessions.h"
#include "client/bench/solo.h"

enum { EXIT_FAILED = 1, EXIT_USAGE = 2 };

/* A hand-off takes microseconds: this many times the iterations of an op that takes milliseconds. */
#define HANDOFF_ITERATIONS 100
/* Share of the available memory that a job may plan to use. */
#define MEMORY_SHARE 0.8

struct bench {
    struct options options;
    struct daemon daemon;
    struct report report;
    char devices[16]; /* default of --devices as text */
    char backend[16];
};

/* Bytes of MemAvailable; 0 if unknown. */
static double available_bytes(void)
{
    char line[128];
    double kib = 0;
    FILE *file = fopen("/proc/meminfo", "re");
    while (file && kib == 0 && fgets(line, sizeof(line), file))
        (void)sscanf(line, "MemAvailable: %lf kB", &kib);
    if (file)
        fclose(file);
    return kib * 1024;
}

static uint32_t n_processors(void)
{
    cpu_set_t set;
    return sched_getaffinity(0, sizeof(set), &set) == 0 ? (uint32_t)CPU_COUNT(&set) : 1;
}

/* Asks the daemon what it runs on. */
static enum epd_status meet_daemon(struct bench *bench)
{
    const struct epd_open_options options = {.size = sizeof(options),
                                             .socket_path = bench->options.job.socket_path};
    struct epd_client *client = NULL;
    struct epd_client_info info = {.size = sizeof(info)};
    enum epd_status status = epd_open(&options, &client);
    if (status == EPD_OK)
        status = epd_client_info(client, &info);
    if (status != EPD_OK)
        fprintf(stderr, "epd-bench: %s: %s\n", epd_status_name(status), epd_error_text());
    epd_close(client);
    (void)snprintf(bench->backend, sizeof(bench->backend), "%s",
                   info.backend == EPD_BACKEND_CUDA ? "cuda" : "host");
    bench->report.backend = bench->backend;
    bench->report.n_devices = info.n_devices;
    return status;
}

static enum epd_status bench_open(struct bench *bench)
{
    struct options *options = &bench->options;
    struct job *job = &options->job;
    if (!options->socket_path) {
        const uint32_t n = n_processors() < job->n_ranks ? n_processors() : job->n_ranks;
        (void)snprintf(bench->devices, sizeof(bench->devices), "%u", n);
        if (!options->daemon.devices && strcmp(options->daemon.backend, "host") == 0)
            options->daemon.devices = bench->devices;
        enum epd_status status = daemon_start(&bench->daemon, &options->daemon);
        if (status != EPD_OK)
            return status;
        options->socket_path = bench->daemon.socket_path;
    }
    if (strlen(options->socket_path) >= sizeof(job->socket_path)) {
        fprintf(stderr, "epd-bench: --socket: %zu bytes, at most %zu\n", strlen(options->socket_path),
                sizeof(job->socket_path) - 1);
        return EPD_INVALID_ARGUMENT;
    }
    (void)snprintf(job->socket_path, sizeof(job->socket_path), "%s", options->socket_path);
    return meet_daemon(bench);
}

/* The smallest group that can hand something off: the sizes do not matter, the row is one. */
static void make_handoff(struct job *job)
{
    (void)snprintf(job->case_name, sizeof(job->case_name), "one row");
    job->n_tokens = 1;
    job->hidden = 64;
    job->ffn = 64;
    job->n_experts = job->n_ranks;
    job->top_k = 1;
    job->n_iterations *= HANDOFF_ITERATIONS;
    job->n_warmup *= HANDOFF_ITERATIONS;
}

static enum epd_status check_memory(const struct job *job)
{
    const double wanted = job_host_bytes(job), available = available_bytes();
    if (available == 0 || wanted <= MEMORY_SHARE * available)
        return EPD_OK;
    fprintf(stderr,
            "epd-bench: %s of %s needs about %.1f GiB, %.1f GiB are available: choose smaller --tokens, "
            "--experts, "
            "--hidden or --ffn, a --capacity-rows, or another case\n",
            job_op_name(job->op), job->case_name, wanted / (1 << 30), available / (1 << 30));
    return EPD_NO_MEMORY;
}

/* The comparison runs before and after, and its better half counts: a machine that was busy for a while must not make the
 * daemon look good. */
static enum epd_status run_solo_again(const struct job *job, uint32_t n_threads, struct result *best)
{
    struct result again;
    enum epd_status status = solo_run(job, n_threads, &again);
    if (status == EPD_OK && again.median_ns < best->median_ns)
        *best = again;
    return status;
}

static enum epd_status bench_job(struct bench *bench, enum job_op op)
{
    struct job job = bench->options.job;
    struct result result, solo;
    job.op = op;
    (void)snprintf(job.group_name, sizeof(job.group_name), "bench-%d-%d", (int)getpid(), (int)op);
    if (op == JOB_HANDOFF_BARRIER || op == JOB_HANDOFF_GROUPED_GEMM)
        make_handoff(&job);
    enum epd_status status = strcmp(bench->backend, "host") == 0 ? check_memory(&job) : EPD_OK;
    const int with_solo =
        op == JOB_MOE_FORWARD && job.dtype == EPD_F32 && strcmp(bench->backend, "host") == 0;
    if (status == EPD_OK && with_solo)
        status = solo_run(&job, bench->report.n_devices, &solo);
    if (status == EPD_OK)
        status = run_job(&job, &result);
    if (status == EPD_OK && with_solo)
        status = run_solo_again(&job, bench->report.n_devices, &solo);
    if (status == EPD_OK)
        report_job(&bench->report, &job, &result, with_solo ? &solo : NULL);
    return status;
}

static enum epd_status bench_run(struct bench *bench)
{
    enum epd_status status = bench_open(bench);
    for (int op = 0; status == EPD_OK && op < JOB_OP_COUNT; op++)
        if (bench->options.wanted[op])
            status = bench_job(bench, (enum job_op)op);
    if (status != EPD_OK || !bench->options.sessions)
        return status;
    struct sessions_result sessions;
    status = sessions_run(bench->options.job.socket_path, bench->options.n_sessions, &sessions);
    if (status == EPD_OK)
        report_sessions(&bench->report, &sessions);
    return status;
}

/* An interrupted benchmark still stops its daemon: run_job sees that its waiting was interrupted, ends the
 * ranks and fails. */
static void interrupt(int number)
{
    (void)number;
}

int main(int argc, char **argv)
{
    static struct bench bench; /* larger than a stack frame should be; only main knows it */
    switch (options_parse(&bench.options, argc, argv)) {
    case OPTIONS_SHOWN:
        return 0;
    case OPTIONS_USAGE_ERROR:
        return EXIT_USAGE;
    case OPTIONS_RUN:
        break;
    }
    if (bench.options.rank >= 0)
        return rank_run(bench.options.board_fd, (uint32_t)bench.options.rank);
    const struct sigaction action = {.sa_handler = interrupt};
    (void)sigaction(SIGINT, &action, NULL);
    (void)sigaction(SIGTERM, &action, NULL);
    bench.report.json = bench.options.json;
    const enum epd_status status = bench_run(&bench);
    if (status != EPD_OK)
        daemon_print_log(&bench.daemon);
    daemon_stop(&bench.daemon);
    return status == EPD_OK ? 0 : EXIT_FAILED;
}
