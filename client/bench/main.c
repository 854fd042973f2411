/* epd-bench: measures the ops of epd through real clients, beside the same computation in one process where
 * that can be said on the host. */
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "client/bench/agreement.h"
#include "client/bench/fabric.h"
#include "client/bench/gpu.h"
#include "client/bench/machine.h"
#include "client/bench/options.h"
#include "client/bench/plan_scale.h"
#include "client/bench/rank.h"
#include "client/bench/report.h"
#include "client/bench/sessions.h"
#include "client/bench/solo.h"
#include "proto/mps.h"

enum { EXIT_FAILED = 1, EXIT_USAGE = 2 };

/* A hand-off takes microseconds: this many times the iterations of an op that takes milliseconds. */
#define HANDOFF_ITERATIONS      100
#define HANDOFF_ITERATIONS_CUDA 20
#define DEFAULT_RANKS           4
#define LINK_ITERATIONS         20
/* How long a daemon that was started may take to listen, and how often it is looked at meanwhile: CUDA contexts. */
#define START_MS 20000
#define LOOK_MS  250
/* With uniform routing no rank gets this many times the even share. */
#define CUDA_CAPACITY_FACTOR 1.25

/* The one word that is not in struct bench: a handler of signals sees nothing else. An interrupted benchmark still stops its daemon:
 * whoever waits sees it by EINTR (crew_run ends the ranks and fails), whoever computes looks here. */
static volatile sig_atomic_t interrupted;

static void interrupt(int number)
{
    (void)number;
    interrupted = 1;
}

struct bench {
    struct options options;
    struct fabric fabric; /* of one daemon, or of --nodes */
    struct report report;
    struct crew crew; /* for all jobs but link and peer_loss */
    enum epd_backend_kind backend;
    char devices[16]; /* default of --devices as text */
    char device_name[64];
};

/* -1: the question does not arise. */
static int mps_is_there(enum epd_backend_kind backend)
{
    char path[512];
    return backend == EPD_BACKEND_CUDA ? mps_find(path, sizeof(path)) : -1;
}

/* Connects; a daemon of our own that is on its way is waited for, one that has ended is not. */
static enum epd_status find_daemon(const struct bench *bench, struct epd_client **client)
{
    struct epd_open_options options = {.size = sizeof(options),
                                       .socket_path = bench->options.job.socket_path};
    const int ours = bench->fabric.n_nodes > 0;
    options.timeout_ms = ours ? LOOK_MS : 0;
    for (int ms = 0;; ms += LOOK_MS) {
        const enum epd_status status = epd_open(&options, client);
        if (status != EPD_DISCONNECTED || !ours || interrupted || ms >= START_MS ||
            daemon_has_ended(&bench->fabric.nodes[0]))
            return status;
    }
}

/* Asks the daemon what it runs on. */
static enum epd_status meet_daemon(struct bench *bench)
{
    struct epd_client *client = NULL;
    struct epd_client_info info = {.size = sizeof(info)};
    enum epd_status status = find_daemon(bench, &client);
    if (status == EPD_OK)
        status = epd_client_info(client, &info);
    if (status != EPD_OK)
        fprintf(stderr, "epd-bench: %s: %s\n", epd_status_name(status), epd_error_text());
    epd_close(client);
    if (status != EPD_OK)
        return status;
    bench->backend = info.backend;
    bench->report.backend = info.backend == EPD_BACKEND_CUDA ? "cuda" : "host";
    bench->report.n_devices = info.n_devices;
    (void)snprintf(bench->device_name, sizeof(bench->device_name), "%s", info.devices[0].name);
    bench->report.device = bench->device_name;
    bench->report.mps = mps_is_there(info.backend);
    return EPD_OK;
}

static uint32_t host_ranks(const struct options *options)
{
    if (options->job.n_ranks)
        return options->job.n_ranks;
    return options->n_nodes > 1 ? 2 * options->n_nodes : DEFAULT_RANKS;
}

/* Of all nodes, which have as many each. */
static uint32_t n_gpus_of_all(const struct bench *bench)
{
    return bench->report.n_devices * (bench->options.n_nodes > 1 ? bench->options.n_nodes : 1);
}

/* What was not given, by the backend. */
static enum epd_status resolve(struct bench *bench)
{
    struct options *options = &bench->options;
    struct job *job = &options->job;
    const int cuda = bench->backend == EPD_BACKEND_CUDA;
    job->backend = bench->backend;
    if (cuda && gpu_count() == 0) {
        fprintf(stderr,
                "epd-bench: the daemon runs the CUDA backend, but this program has no CUDA or sees no GPU\n");
        return EPD_UNSUPPORTED;
    }
    if (job->n_ranks == 0)
        job->n_ranks = cuda ? n_gpus_of_all(bench) : host_ranks(options);
    if (job->dtype == EPD_DTYPE_UNSPECIFIED)
        job->dtype = cuda ? EPD_BF16 : EPD_F32;
    if (options->capacity_factor < 0)
        options->capacity_factor = cuda && job->zipf == 0 ? CUDA_CAPACITY_FACTOR : 0;
    static const char *const standard[] = {"dsv3", "qwen235b", "qwen30b", "mixtral", "decode128"};
    const size_t n_standard =
        cuda && options->suite && options->n_cases == 0 ? sizeof(standard) / sizeof(standard[0]) : 0;
    for (size_t i = 0; i < n_standard; i++)
        (void)snprintf(options->cases[options->n_cases++], JOB_NAME_BYTES, "%s", standard[i]);
    if (options->n_cases == 0)
        (void)snprintf(options->cases[options->n_cases++], JOB_NAME_BYTES, "tiny");
    return EPD_OK;
}

static enum epd_status choose_backend(struct bench *bench)
{
    struct daemon_options *daemon = &bench->options.daemon;
    if (strcmp(daemon->backend, "auto") == 0)
        daemon->backend = gpu_count() > 0 ? "cuda" : "host";
    if (strcmp(daemon->backend, "cuda") == 0 && gpu_count() == 0) {
        struct gpu gpu = {0};
        const uint8_t none[16] = {0};
        (void)!gpu_open(&gpu, none, 0);
        fprintf(stderr, "epd-bench: --backend cuda: %s\n", gpu.text);
        return EPD_UNSUPPORTED;
    }
    return EPD_OK;
}

/* Of several nodes: all GPUs of the machine, as many for each. */
static enum epd_status share_gpus(const struct options *options, uint32_t *n_gpus)
{
    if (strcmp(options->daemon.backend, "cuda") != 0)
        return EPD_OK;
    *n_gpus = (uint32_t)gpu_count() / options->n_nodes * options->n_nodes;
    if (*n_gpus > 0)
        return EPD_OK;
    fprintf(stderr, "epd-bench: --nodes %u: %d GPUs, want one for each node\n", options->n_nodes,
            gpu_count());
    return EPD_UNSUPPORTED;
}

static enum epd_status start_daemon(struct bench *bench)
{
    struct options *options = &bench->options;
    const uint32_t n_nodes = options->n_nodes ? options->n_nodes : 1;
    const uint32_t n_ranks = host_ranks(options) / n_nodes;
    uint32_t n_gpus = 0;
    enum epd_status status = choose_backend(bench);
    if (status == EPD_OK && n_nodes > 1)
        status = share_gpus(options, &n_gpus);
    if (status != EPD_OK)
        return status;
    (void)snprintf(bench->devices, sizeof(bench->devices), "%u",
                   machine_processors() < n_ranks ? machine_processors() : n_ranks);
    if (!options->daemon.devices && strcmp(options->daemon.backend, "host") == 0)
        options->daemon.devices = bench->devices;
    status = fabric_start(&bench->fabric, n_nodes, n_gpus, &options->daemon);
    if (status != EPD_OK)
        return status;
    options->socket_path = bench->fabric.nodes[0].socket_path;
    options->job.n_nodes = n_nodes;
    for (uint32_t node = 1; node < n_nodes; node++)
        (void)snprintf(options->job.other_sockets[node - 1], JOB_PATH_BYTES, "%s",
                       bench->fabric.nodes[node].socket_path);
    return EPD_OK;
}

static enum epd_status bench_open(struct bench *bench)
{
    struct options *options = &bench->options;
    struct job *job = &options->job;
    enum epd_status status = options->socket_path ? EPD_OK : start_daemon(bench);
    if (status != EPD_OK)
        return status;
    if (strlen(options->socket_path) >= sizeof(job->socket_path)) {
        fprintf(stderr, "epd-bench: --socket: %zu bytes, at most %zu\n", strlen(options->socket_path),
                sizeof(job->socket_path) - 1);
        return EPD_INVALID_ARGUMENT;
    }
    (void)snprintf(job->socket_path, sizeof(job->socket_path), "%s", options->socket_path);
    status = meet_daemon(bench);
    return status == EPD_OK ? resolve(bench) : status;
}

static uint32_t handoff_factor(const struct job *job)
{
    return job->backend == EPD_BACKEND_CUDA ? HANDOFF_ITERATIONS_CUDA : HANDOFF_ITERATIONS;
}

static uint32_t max_iterations(const struct options *options)
{
    const struct job *job = &options->job;
    const int handoff = options->wanted[JOB_HANDOFF_BARRIER] || options->wanted[JOB_HANDOFF_GROUPED_GEMM];
    return (job->n_iterations + job->n_warmup) * (handoff ? handoff_factor(job) : 1);
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
    job->capacity_rows = 0;
    job->n_iterations *= handoff_factor(job);
    job->n_warmup *= handoff_factor(job);
}

static enum epd_status check_memory(const struct job *job)
{
    const double wanted = job_host_bytes(job), available = machine_available_bytes();
    if (available == 0 || wanted <= MACHINE_MEMORY_SHARE * available)
        return EPD_OK;
    fprintf(stderr,
            "epd-bench: %s of %s needs about %.1f GiB, %.1f GiB are available: choose smaller --tokens, "
            "--experts, "
            "--hidden or --ffn, a --capacity-rows, or another case\n",
            job_op_name(job->op), job->case_name, wanted / (1 << 30), available / (1 << 30));
    return EPD_NO_MEMORY;
}

static enum epd_status run_solo(const struct bench *bench, const struct job *job, struct result *result)
{
    const uint32_t n_nodes = job->n_nodes > 1 ? job->n_nodes : 1;
    return solo_run(job, bench->report.n_devices * n_nodes, &interrupted, result);
}

/* The comparison runs before and after, and its better half counts: a machine that was busy for a while must not make the
 * daemon look good. */
static enum epd_status run_solo_again(const struct bench *bench, const struct job *job, struct result *best)
{
    struct result again;
    enum epd_status status = run_solo(bench, job, &again);
    if (status == EPD_OK && again.median_ns < best->median_ns)
        *best = again;
    return status;
}

static int is_handoff(enum job_op op)
{
    return op == JOB_HANDOFF_BARRIER || op == JOB_HANDOFF_GROUPED_GEMM;
}

/* The job, and what its nodes' agreements about its steps took meanwhile. */
static enum epd_status run_job(struct bench *bench, const struct job *job, struct result *result)
{
    struct agreement before, after;
    const char *control_path = bench->fabric.nodes[0].control_path;
    if (job->n_nodes <= 1)
        return crew_run(&bench->crew, job, result);
    if (agreement_read(control_path, &before))
        return EPD_DISCONNECTED;
    enum epd_status status = crew_run(&bench->crew, job, result);
    if (status != EPD_OK)
        return status;
    if (agreement_read(control_path, &after))
        return EPD_DISCONNECTED;
    result->n_agreed = after.n_steps - before.n_steps;
    result->n_ahead = after.n_ahead - before.n_ahead;
    result->agreement_ns = result->n_agreed > 0 ? (after.sum_ns - before.sum_ns) / result->n_agreed : 0;
    return EPD_OK;
}

/* What ends a job in this process without a word. */
static enum epd_status said(const struct job *job, enum epd_status status)
{
    if (status == EPD_NO_MEMORY || status == EPD_SYSTEM)
        fprintf(stderr, "epd-bench: %s of %s: %s\n", job_op_name(job->op), job->case_name,
                epd_status_text(status));
    return status;
}

static enum epd_status measure_job(struct bench *bench, const struct job *job)
{
    struct result result, solo;
    struct traffic traffic;
    const int host = bench->backend == EPD_BACKEND_HOST;
    const int with_solo = host && job->op == JOB_MOE_FORWARD && job->dtype == EPD_F32;
    enum epd_status status = host ? check_memory(job) : EPD_OK;
    if (status == EPD_OK)
        status = said(job, traffic_count(job, &traffic));
    if (status == EPD_OK && with_solo)
        status = said(job, run_solo(bench, job, &solo));
    if (status == EPD_OK)
        status = run_job(bench, job, &result);
    if (status == EPD_OK && !(result.median_ns > 0)) {
        fprintf(stderr, "epd-bench: %s of %s took no time: nothing was measured\n", job_op_name(job->op),
                job->case_name);
        status = EPD_INTERNAL;
    }
    if (status == EPD_OK && with_solo)
        status = said(job, run_solo_again(bench, job, &solo));
    /* GPUs that ranks share are not told apart by rank. */
    if (job->n_ranks > n_gpus_of_all(bench))
        result.memory_bytes = -1;
    if (status == EPD_OK)
        report_job(&bench->report, job, &result, &traffic, with_solo ? &solo : NULL);
    return status;
}

static void name_group(struct job *job, enum job_op op)
{
    job->op = op;
    (void)snprintf(job->group_name, sizeof(job->group_name), "bench-%d-%.10s-%d", (int)getpid(),
                   job->case_name, (int)op);
}

static enum epd_status bench_op(struct bench *bench, const char *case_name, enum job_op op)
{
    struct job job = bench->options.job;
    enum epd_status status =
        options_take_case(&bench->options, case_name, &job) ? EPD_INVALID_ARGUMENT : EPD_OK;
    name_group(&job, op);
    if (status == EPD_OK && is_handoff(op))
        make_handoff(&job);
    if (status == EPD_OK)
        status = measure_job(bench, &job);
    if (status != EPD_OK)
        report_failure(&bench->report, job_op_name(op), &job, status);
    return status;
}

static enum epd_status bench_link(struct bench *bench)
{
    struct job job = bench->options.job;
    double gb_per_s = 0;
    if (bench->backend != EPD_BACKEND_CUDA || bench->report.n_devices < 2) {
        if (!bench->options.link || bench->options.suite)
            return EPD_OK; /* nobody asked */
        fprintf(stderr, "epd-bench: --op link: needs the CUDA backend on at least two GPUs\n");
        report_failure(&bench->report, "link", NULL, EPD_UNSUPPORTED);
        return EPD_UNSUPPORTED;
    }
    name_group(&job, JOB_LINK);
    job.n_ranks = 1;
    job.n_iterations = LINK_ITERATIONS;
    enum epd_status status = run_link(&job, &gb_per_s);
    if (status == EPD_OK)
        report_link(&bench->report, gb_per_s);
    else
        report_failure(&bench->report, "link", NULL, status);
    return status;
}

static enum epd_status bench_loss(struct bench *bench, const char *case_name)
{
    struct job job = bench->options.job;
    struct loss_result result;
    if (job.n_ranks < 2) /* one GPU: the ranks share it */
        job.n_ranks = 2;
    enum epd_status status =
        options_take_case(&bench->options, case_name, &job) ? EPD_INVALID_ARGUMENT : EPD_OK;
    name_group(&job, JOB_PEER_LOSS);
    if (status == EPD_OK)
        status = loss_run(&job, bench->options.n_rounds, &result);
    if (status == EPD_OK)
        report_loss(&bench->report, &job, &result);
    else
        report_failure(&bench->report, job_op_name(JOB_PEER_LOSS), &job, status);
    return status;
}

static enum epd_status bench_sessions(struct bench *bench)
{
    struct sessions_result sessions;
    enum epd_status status =
        sessions_run(bench->options.job.socket_path, bench->options.n_sessions, &sessions);
    if (status == EPD_OK)
        report_sessions(&bench->report, &sessions);
    else
        report_failure(&bench->report, "sessions", NULL, status);
    return status;
}

/* Whether there is anything that crosses a link. */
static int wants_exchange(const struct options *options)
{
    for (int op = 0; op < JOB_OP_COUNT; op++) {
        const struct job job = {.op = (enum job_op)op};
        if (options->wanted[op] && job_n_crossings(&job))
            return 1;
    }
    return options->link;
}

/* Of two results the one that counts: the first failure. */
static enum epd_status first_failure(enum epd_status first, enum epd_status then)
{
    return first == EPD_OK ? then : first;
}

/* A suite goes on after a job that failed, but not after a signal. */
static int goes_on(const struct bench *bench, enum epd_status status)
{
    return !interrupted && (status == EPD_OK || (bench->options.suite && status != EPD_EVICTED));
}

static enum epd_status bench_ops(struct bench *bench, uint32_t case_idx)
{
    enum epd_status status = EPD_OK;
    for (int op = 0; goes_on(bench, status) && op < JOB_OP_COUNT; op++)
        if (bench->options.wanted[op] && (case_idx == 0 || !is_handoff((enum job_op)op)))
            status = first_failure(status, bench_op(bench, bench->options.cases[case_idx], (enum job_op)op));
    return status;
}

static enum epd_status bench_run(struct bench *bench)
{
    const struct options *options = &bench->options;
    enum epd_status status = bench_open(bench);
    if (status != EPD_OK)
        return status;
    if (wants_exchange(options))
        status = bench_link(bench);
    crew_init(&bench->crew, max_iterations(options));
    for (uint32_t i = 0; goes_on(bench, status) && i < options->n_cases; i++)
        status = first_failure(status, bench_ops(bench, i));
    crew_fini(&bench->crew);
    const uint32_t n_losses = !options->peer_loss ? 0 : options->suite ? 1 : options->n_cases;
    for (uint32_t i = 0; goes_on(bench, status) && i < n_losses; i++)
        status = first_failure(status, bench_loss(bench, options->suite ? "tiny" : options->cases[i]));
    if (goes_on(bench, status) && options->sessions)
        status = first_failure(status, bench_sessions(bench));
    if (interrupted)
        status = first_failure(status, EPD_EVICTED);
    if (status == EPD_OK && bench->report.n_results == 0) {
        fprintf(stderr, "epd-bench: nothing was measured\n");
        status = EPD_INTERNAL;
    }
    return status;
}

/* Needs nothing of the rest. */
static int plan_scale(const struct options *options)
{
    const struct plan_scale_options scale = {.n_tokens = (uint32_t)options->sizes.tokens,
                                             .top_k = (uint32_t)options->sizes.top_k,
                                             .hidden = (uint32_t)options->sizes.hidden,
                                             .zipf = options->job.zipf,
                                             .json = options->json};
    return plan_scale_run(&scale, stdout) ? EXIT_FAILED : 0;
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
    if (bench.options.plan_scale)
        return plan_scale(&bench.options);
    if (bench.options.rank >= 0)
        return rank_run(bench.options.board_fd, (uint32_t)bench.options.rank);
    const struct sigaction action = {.sa_handler = interrupt};
    (void)sigaction(SIGINT, &action, NULL);
    (void)sigaction(SIGTERM, &action, NULL);
    bench.report.json = bench.options.json;
    const enum epd_status status = bench_run(&bench);
    if (interrupted)
        fprintf(stderr, "epd-bench: interrupted\n");
    /* What this program itself refused is none of the daemon's doing, nor is an end that was asked for. */
    if (status != EPD_OK && !interrupted && status != EPD_INVALID_ARGUMENT && status != EPD_UNSUPPORTED &&
        status != EPD_NO_MEMORY)
        fabric_print_logs(&bench.fabric);
    fabric_stop(&bench.fabric);
    return status == EPD_OK ? 0 : EXIT_FAILED;
}
