#include "client/bench/options.h"

#include <errno.h>
#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
    OPTION_BACKEND = 256,
    OPTION_DEVICES,
    OPTION_DAEMON,
    OPTION_SOCKET,
    OPTION_RANKS,
    OPTION_NODES,
    OPTION_CROSSING,
    OPTION_CASE,
    OPTION_TOKENS,
    OPTION_HIDDEN,
    OPTION_FFN,
    OPTION_EXPERTS,
    OPTION_TOP_K,
    OPTION_CAPACITY,
    OPTION_CAPACITY_FACTOR,
    OPTION_ZIPF,
    OPTION_MEMORY,
    OPTION_CLIENT_KERNEL,
    OPTION_DTYPE,
    OPTION_OP,
    OPTION_SUITE,
    OPTION_ROUNDS,
    OPTION_SESSIONS,
    OPTION_ITERATIONS,
    OPTION_WARMUP,
    OPTION_JSON,
    OPTION_VERSION,
    OPTION_HELP,
    OPTION_RANK,
    OPTION_BOARD_FD,
};

struct row {
    const char *name;
    int id;
    int has_argument;
    uint64_t min, max;    /* of numbers; max 0: text */
    const char *argument; /* what help calls it; "" without one */
    const char *help;     /* NULL: for rank processes only */
};

static const struct row rows[] = {
    {"backend", OPTION_BACKEND, 1, 0, 0, "NAME",
     "backend of the daemon that is started: host, cuda, auto: cuda where there is a GPU (auto)"},
    {"devices", OPTION_DEVICES, 1, 0, 0, "TEXT",
     "its --devices; host: a number (one per processor, at most one per rank)"},
    {"daemon", OPTION_DAEMON, 1, 0, 0, "PATH",
     "the program to start (beside epd-bench, in the build tree, or on PATH)"},
    {"socket", OPTION_SOCKET, 1, 0, 0, "PATH", "use the daemon that listens there; start none"},
    {"ranks", OPTION_RANKS, 1, 1, JOB_MAX_RANKS, "N", "rank processes (host: 4, CUDA: one per GPU)"},
    {"nodes", OPTION_NODES, 1, 1, JOB_MAX_NODES, "N",
     "daemons on this machine that are a fabric, with the ranks and their groups spread over them; "
     "CUDA: each has an even share of the GPUs, NCCL goes over the loopback (1)"},
    {"crossing", OPTION_CROSSING, 1, 0, 0, "NAME",
     "with --nodes: messages as long as what crosses (eager), or as all tokens would need (static) "
     "(the backend's choice)"},
    {"case", OPTION_CASE, 1, 0, 0, "LIST",
     "sizes: dsv3, qwen235b, qwen30b, mixtral, decode128, tiny, with commas between (tiny)"},
    {"tokens", OPTION_TOKENS, 1, 1, 1u << 24, "N", "tokens of a rank, instead of the case's"},
    {"hidden", OPTION_HIDDEN, 1, 1, 1u << 20, "N", "hidden size, instead of the case's"},
    {"ffn", OPTION_FFN, 1, 1, 1u << 20, "N", "ffn size, instead of the case's"},
    {"experts", OPTION_EXPERTS, 1, 1, 1u << 16, "N", "experts of all ranks, instead of the case's"},
    {"topk", OPTION_TOP_K, 1, 1, JOB_MAX_TOP_K, "N", "experts of a token, instead of the case's"},
    {"capacity-rows", OPTION_CAPACITY, 1, 0, 1u << 30, "N",
     "rows a rank can receive (0: all that could arrive)"},
    {"capacity-factor", OPTION_CAPACITY_FACTOR, 1, 0, 0, "X",
     "the same as a multiple of tokens x top-k (host: all that could arrive; CUDA with uniform routing: "
     "1.25)"},
    {"zipf", OPTION_ZIPF, 1, 0, 0, "X",
     "routing with the i-th expert drawn in proportion to i^-X (0: uniform)"},
    {"memory", OPTION_MEMORY, 1, 0, 0, "NAME",
     "CUDA: buffers of the ranks by cudaMalloc (own) or in the daemon's heap (heap) (own)"},
    {"client-kernel-us", OPTION_CLIENT_KERNEL, 1, 0, 0, "X",
     "CUDA: what a rank's stream does before each launch (50)"},
    {"dtype", OPTION_DTYPE, 1, 0, 0, "NAME", "f32, bf16 or f16 (host: f32, CUDA: bf16)"},
    {"op", OPTION_OP, 1, 0, 0, "LIST",
     "handoff, dispatch, combine, combine_weighted, dispatch_bwd, combine_bwd, grouped_gemm, moe_forward, "
     "moe_backward, link, peer_loss, sessions, plan-scale (the planning of 16 to 1,024 ranks on nodes of 8, "
     "without a "
     "daemon), with commas between, or all: those from handoff to moe_backward (all)"},
    {"suite", OPTION_SUITE, 1, 0, 0, "NAME",
     "node: all ops, link and peer_loss; on CUDA for dsv3, qwen235b, qwen30b, mixtral, decode128; a "
     "job that fails "
     "does not end it"},
    {"rounds", OPTION_ROUNDS, 1, 2, 100000, "N", "killed ranks of --op peer_loss (20)"},
    {"sessions", OPTION_SESSIONS, 1, 1, 100000, "N", "idle sessions of --op sessions (1000)"},
    {"iters", OPTION_ITERATIONS, 1, 1, 1000000, "N",
     "timed iterations (handoff: 100 times as many, CUDA 20 times) (50)"},
    {"warmup", OPTION_WARMUP, 1, 0, 1000000, "N", "iterations before them (5)"},
    {"json", OPTION_JSON, 0, 0, 0, "", "one JSON line per result instead of the table"},
    {"version", OPTION_VERSION, 0, 0, 0, "", "print the version and exit"},
    {"help", OPTION_HELP, 0, 0, 0, "", "this text"},
    {"rank", OPTION_RANK, 1, 0, JOB_MAX_RANKS, NULL, NULL},
    {"board-fd", OPTION_BOARD_FD, 1, 0, 1u << 30, NULL, NULL},
};
#define N_ROWS (sizeof(rows) / sizeof(rows[0]))

static void print_option(const struct row *row)
{
    char option[40];
    (void)snprintf(option, sizeof(option), "--%s %s", row->name, row->argument);
    printf("  %-22s %s\n", option, row->help);
}

static void print_help(void)
{
    printf("usage: epd-bench [options]\n\nMeasures the ops of epd: starts a daemon and rank processes of its "
           "own, or uses a "
           "running daemon.\n\n");
    for (size_t i = 0; i < N_ROWS; i++)
        if (rows[i].help)
            print_option(&rows[i]);
    printf("\nExit codes: 0 measured, 1 failed, 2 usage.\n");
}

static int take_number(const struct row *row, const char *text, uint64_t *value)
{
    char *end = NULL;
    errno = 0;
    *value = strtoull(text, &end, 10);
    if (!errno && end != text && !*end && text[0] != '-' && *value >= row->min && *value <= row->max)
        return 0;
    fprintf(stderr, "epd-bench: --%s %s: want a number from %llu to %llu\n", row->name, text,
            (unsigned long long)row->min, (unsigned long long)row->max);
    return -1;
}

static int take_dtype(struct options *options, const char *name)
{
    static const struct {
        const char *name;
        enum epd_dtype dtype;
    } dtypes[] = {
        {"f32", EPD_F32}, {"fp32", EPD_F32}, {"bf16", EPD_BF16}, {"f16", EPD_F16}, {"fp16", EPD_F16}};
    for (size_t i = 0; i < sizeof(dtypes) / sizeof(dtypes[0]); i++) {
        if (strcmp(dtypes[i].name, name) == 0) {
            options->job.dtype = dtypes[i].dtype;
            return 0;
        }
    }
    fprintf(stderr, "epd-bench: --dtype %s: want f32, bf16 or f16\n", name);
    return -1;
}

/* What is not an op of the job table. 0 if the name is none of them. */
static int want_other(struct options *options, const char *name)
{
    int *const flags[] = {&options->sessions, &options->link, &options->peer_loss, &options->plan_scale};
    static const char *const names[] = {"sessions", "link", "peer_loss", "plan-scale"};
    for (size_t i = 0; i < sizeof(names) / sizeof(names[0]); i++) {
        if (strcmp(name, names[i]) != 0)
            continue;
        *flags[i] = 1;
        return 1;
    }
    return 0;
}

static void want_all(struct options *options)
{
    for (int op = 0; op < JOB_OP_COUNT; op++)
        options->wanted[op] = 1;
}

static int want_op(struct options *options, const char *name)
{
    if (want_other(options, name))
        return 0;
    if (strcmp(name, "all") == 0) {
        want_all(options);
        return 0;
    }
    if (strcmp(name, "handoff") == 0) {
        options->wanted[JOB_HANDOFF_BARRIER] = options->wanted[JOB_HANDOFF_GROUPED_GEMM] = 1;
        return 0;
    }
    for (int op = JOB_HANDOFF_GROUPED_GEMM + 1; op < JOB_OP_COUNT; op++) {
        if (strcmp(job_op_name((enum job_op)op), name) != 0)
            continue;
        options->wanted[op] = 1;
        return 0;
    }
    fprintf(stderr, "epd-bench: --op %s: there is no such op, see --help\n", name);
    return -1;
}

static int take_ops(struct options *options, const char *list)
{
    char name[32];
    do {
        const size_t length = strcspn(list, ",");
        (void)snprintf(name, sizeof(name), "%.*s", (int)length, list);
        if (want_op(options, name))
            return -1;
        list += length + (list[length] == ',');
    } while (*list);
    return 0;
}

static int add_case(struct options *options, const char *name)
{
    struct job ignored = {0};
    if (!job_take_case(&ignored, name)) {
        fprintf(stderr, "epd-bench: --case %s: want one of %s\n", name, job_case_names());
        return -1;
    }
    if (options->n_cases == OPTIONS_MAX_CASES) {
        fprintf(stderr, "epd-bench: --case: at most %d of them\n", OPTIONS_MAX_CASES);
        return -1;
    }
    (void)snprintf(options->cases[options->n_cases++], JOB_NAME_BYTES, "%s", name);
    return 0;
}

static int take_cases(struct options *options, const char *list)
{
    char name[JOB_NAME_BYTES];
    do {
        const size_t length = strcspn(list, ",");
        (void)snprintf(name, sizeof(name), "%.*s", (int)length, list);
        if (add_case(options, name))
            return -1;
        list += length + (list[length] == ',');
    } while (*list);
    return 0;
}

static int take_real(const char *option, const char *text, double max, double *value)
{
    char *end = NULL;
    const double number = strtod(text, &end);
    if (end != text && !*end && number >= 0 && number <= max) {
        *value = number;
        return 0;
    }
    fprintf(stderr, "epd-bench: --%s %s: want a number from 0 to %g\n", option, text, max);
    return -1;
}

static int take_word(const char *option, const char *text, const char *no, const char *yes, int *flag)
{
    if (strcmp(text, no) != 0 && strcmp(text, yes) != 0) {
        fprintf(stderr, "epd-bench: --%s %s: want %s%s%s\n", option, text, no, no[0] ? " or " : "", yes);
        return -1;
    }
    *flag = strcmp(text, yes) == 0;
    return 0;
}

static int take_crossing(const char *option, const char *text, enum epd_crossing *crossing)
{
    int is_static;
    if (take_word(option, text, "eager", "static", &is_static))
        return -1;
    *crossing = is_static ? EPD_CROSSING_STATIC : EPD_CROSSING_EAGER;
    return 0;
}

static int take_text(struct options *options, const struct row *row, const char *text)
{
    switch (row->id) {
    case OPTION_BACKEND:
        options->daemon.backend = text;
        return 0;
    case OPTION_DEVICES:
        options->daemon.devices = text;
        return 0;
    case OPTION_DAEMON:
        options->daemon.program = text;
        return 0;
    case OPTION_SOCKET:
        options->socket_path = text;
        return 0;
    case OPTION_DTYPE:
        return take_dtype(options, text);
    case OPTION_OP:
        return take_ops(options, text);
    case OPTION_CASE:
        return take_cases(options, text);
    case OPTION_CAPACITY_FACTOR:
        return take_real(row->name, text, JOB_MAX_RANKS, &options->capacity_factor);
    case OPTION_ZIPF:
        return take_real(row->name, text, 10, &options->job.zipf);
    case OPTION_CLIENT_KERNEL:
        return take_real(row->name, text, 1e6, &options->job.client_kernel_us);
    case OPTION_MEMORY:
        return take_word(row->name, text, "own", "heap", &options->job.heap_memory);
    case OPTION_CROSSING:
        return take_crossing(row->name, text, &options->job.crossing);
    case OPTION_SUITE:
        return take_word(row->name, text, "", "node", &options->suite);
    default:
        options->json = 1;
        return 0;
    }
}

static void set_number(struct options *options, int id, uint64_t value)
{
    struct options_sizes *sizes = &options->sizes;
    switch (id) {
    case OPTION_RANKS:
        options->job.n_ranks = (uint32_t)value;
        return;
    case OPTION_NODES:
        options->n_nodes = (uint32_t)value;
        return;
    case OPTION_TOKENS:
        sizes->tokens = value;
        return;
    case OPTION_HIDDEN:
        sizes->hidden = value;
        return;
    case OPTION_FFN:
        sizes->ffn = value;
        return;
    case OPTION_EXPERTS:
        sizes->experts = value;
        return;
    case OPTION_TOP_K:
        sizes->top_k = value;
        return;
    case OPTION_CAPACITY:
        options->job.capacity_rows = (int64_t)value;
        options->capacity_factor = 0;
        return;
    case OPTION_ROUNDS:
        options->n_rounds = (uint32_t)value;
        return;
    case OPTION_SESSIONS:
        options->n_sessions = (uint32_t)value;
        return;
    case OPTION_ITERATIONS:
        options->job.n_iterations = (uint32_t)value;
        return;
    case OPTION_WARMUP:
        options->job.n_warmup = (uint32_t)value;
        return;
    case OPTION_RANK:
        options->rank = (int)value;
        return;
    default:
        options->board_fd = (int)value;
        return;
    }
}

/* A changed case is named so: nobody shall take a scaled-down dsv3 for dsv3. */
static void apply_sizes(struct job *job, const struct options_sizes *sizes)
{
    const uint64_t given[] = {sizes->tokens, sizes->hidden, sizes->ffn, sizes->experts, sizes->top_k};
    uint32_t *const fields[] = {&job->n_tokens, &job->hidden, &job->ffn, &job->n_experts, &job->top_k};
    int changed = 0;
    for (size_t i = 0; i < sizeof(given) / sizeof(given[0]); i++) {
        changed |= given[i] && given[i] != *fields[i];
        *fields[i] = given[i] ? (uint32_t)given[i] : *fields[i];
    }
    if (changed)
        (void)snprintf(job->case_name, sizeof(job->case_name), "custom");
}

int options_take_case(const struct options *options, const char *name, struct job *job)
{
    (void)job_take_case(job, name);
    apply_sizes(job, &options->sizes);
    if (job->n_experts % job->n_ranks) {
        fprintf(stderr, "epd-bench: %u experts are not a multiple of %u ranks\n", job->n_experts,
                job->n_ranks);
        return -1;
    }
    if (job->top_k > job->n_experts) {
        fprintf(stderr, "epd-bench: top-k %u is more than %u experts\n", job->top_k, job->n_experts);
        return -1;
    }
    if (options->capacity_factor > 0)
        job->capacity_rows = (int64_t)(options->capacity_factor * job->n_tokens * job->top_k + 0.5);
    return 0;
}

static void set_defaults(struct options *options)
{
    *options = (struct options){
        .n_sessions = 1000, .n_rounds = 20, .capacity_factor = -1, .rank = -1, .board_fd = -1};
    options->job.n_iterations = 50;
    options->job.n_warmup = 5;
    options->job.client_kernel_us = 50;
}

static int n_ops(const struct options *options)
{
    int n = options->sessions + options->link + options->peer_loss + options->plan_scale;
    for (int op = 0; op < JOB_OP_COUNT; op++)
        n += options->wanted[op];
    return n;
}

static enum options_result take_option(struct options *options, const struct row *row)
{
    uint64_t value = 0;
    if (row->id == OPTION_HELP) {
        print_help();
        return OPTIONS_SHOWN;
    }
    if (row->id == OPTION_VERSION) {
        printf("epd-bench %s\n", epd_version());
        return OPTIONS_SHOWN;
    }
    if (row->max == 0)
        return take_text(options, row, optarg) ? OPTIONS_USAGE_ERROR : OPTIONS_RUN;
    if (take_number(row, optarg, &value))
        return OPTIONS_USAGE_ERROR;
    set_number(options, row->id, value);
    return OPTIONS_RUN;
}

/* Daemons of our own, one host: the rest of the benchmark knows one daemon. */
static int check_nodes(const struct options *options)
{
    const int alone =
        options->suite || options->sessions || options->link || options->peer_loss || options->plan_scale;
    if (options->n_nodes <= 1 && options->job.crossing) {
        fprintf(stderr, "epd-bench: --crossing: nothing crosses without --nodes\n");
        return -1;
    }
    if (options->n_nodes <= 1)
        return 0;
    const int cuda = options->daemon.backend && strcmp(options->daemon.backend, "cuda") == 0;
    const int known = !options->daemon.backend || cuda || strcmp(options->daemon.backend, "host") == 0;
    if (alone || options->socket_path || !known || (cuda && options->daemon.devices)) {
        fprintf(stderr,
                "epd-bench: --nodes is for ops between daemons that are started, on the host or the cuda "
                "backend: not with --suite, --socket, --backend auto, --devices on cuda, or --op link, "
                "peer_loss, sessions or plan-scale\n");
        return -1;
    }
    if (options->job.n_ranks % options->n_nodes) {
        fprintf(stderr, "epd-bench: --ranks %u, want a multiple of --nodes %u\n", options->job.n_ranks,
                options->n_nodes);
        return -1;
    }
    return 0;
}

/* What would be left out without a word is refused. Errors have been printed. */
static int options_check(const struct options *options)
{
    const struct daemon_options *daemon = &options->daemon;
    if (check_nodes(options))
        return -1;
    if (options->suite && n_ops(options) > 0) {
        fprintf(stderr, "epd-bench: --suite names the ops, --op is one too many\n");
        return -1;
    }
    if (options->peer_loss && options->job.n_ranks == 1) {
        fprintf(stderr, "epd-bench: --op peer_loss: --ranks 1, want at least 2: one of them is killed\n");
        return -1;
    }
    if (options->plan_scale && n_ops(options) > 1) {
        fprintf(stderr, "epd-bench: --op plan-scale runs without a daemon, alone\n");
        return -1;
    }
    if (options->socket_path && (daemon->backend || daemon->devices || daemon->program)) {
        fprintf(stderr,
                "epd-bench: --socket uses a daemon that runs; --backend, --devices and --daemon are of "
                "one that is started\n");
        return -1;
    }
    return 0;
}

enum options_result options_parse(struct options *options, int argc, char **argv)
{
    struct option table[N_ROWS + 1];
    int idx = 0, found = 0;
    memset(table, 0, sizeof(table));
    for (size_t i = 0; i < N_ROWS; i++)
        table[i] = (struct option){rows[i].name, rows[i].has_argument, NULL, rows[i].id};
    set_defaults(options);
    while ((found = getopt_long(argc, argv, "", table, &idx)) != -1) {
        enum options_result result = found == '?' ? OPTIONS_USAGE_ERROR : take_option(options, &rows[idx]);
        if (result != OPTIONS_RUN)
            return result;
    }
    if (optind < argc) {
        fprintf(stderr, "epd-bench: what is '%s'? all arguments are options, see --help\n", argv[optind]);
        return OPTIONS_USAGE_ERROR;
    }
    if (options_check(options))
        return OPTIONS_USAGE_ERROR;
    if (!options->daemon.backend)
        options->daemon.backend = options->n_nodes > 1 ? "host" : "auto";
    if (options->suite)
        options->link = options->peer_loss = 1;
    if (options->suite || n_ops(options) == 0)
        want_all(options);
    return OPTIONS_RUN;
}
