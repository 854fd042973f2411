/* The standard cases: the time of an op is the gap between two events on a rank's stream, with the host far
 * ahead; of the slowest rank; the median over the iterations. Bytes by formula, from the routing that was
 * drawn. */
#include <string.h>

#include "tests/gpu/exchange/gate.h"
#include "tests/gpu/exchange/reference.h"
#include "tests/gpu/exchange/test.h"

#define LINK_GBS       350.0 /* all-to-all stores, per GPU */
#define MEMORY_GBS     4170.0
#define MAX_ITERATIONS 200
#define WARM_UP        5

struct bench_case {
    const char *name;
    uint32_t n_tokens, hidden, n_experts, top_k, alignment;
};
static const struct bench_case bench_cases[] = {
    {"dsv3", 4096, 7168, 256, 8, 1},
    {"dsv3_align128", 4096, 7168, 256, 8, 128},
    {"qwen235b", 4096, 4096, 128, 8, 1},
    {"qwen30b", 8192, 2048, 128, 8, 1},
    {"mixtral", 4096, 4096, 8, 2, 1},
    {"decode128", 128, 7168, 256, 8, 1},
    {"decode128_align16", 128, 7168, 256, 8, 16},
};

struct bench {
    struct cluster cluster;
    const char *name;
    int iterations;
    int32_t *topk_idx[CLUSTER_MAX_RANKS];
    uint16_t *x[CLUSTER_MAX_RANKS];
    float *topk_weights[CLUSTER_MAX_RANKS];
    double link_bytes; /* of the rank that sends most */
    cudaEvent_t events[CLUSTER_MAX_RANKS][MAX_ITERATIONS + 1];
};

static uint64_t seed = 7;
static uint32_t next_random(void)
{
    seed = seed * 6364136223846793005ull + 1442695040888963407ull;
    return (uint32_t)(seed >> 33);
}

static void draw_token(const struct problem *p, int32_t *idx, uint64_t *ranks)
{
    *ranks = 0;
    for (uint32_t k = 0; k < p->top_k; k++) {
        int again = 1;
        while (again) {
            idx[k] = (int32_t)(next_random() % p->n_experts);
            again = 0;
            for (uint32_t j = 0; j < k; j++)
                again |= idx[j] == idx[k];
        }
        *ranks |= 1ull << ((uint32_t)idx[k] / (p->n_experts / p->n_ranks));
    }
}

static void draw_inputs(struct bench *b)
{
    const struct problem *p = &b->cluster.problem;
    size_t slots = (size_t)p->max_tokens * p->top_k, elements = (size_t)p->max_tokens * p->hidden;
    b->link_bytes = 0;
    for (uint32_t rank = 0; rank < p->n_ranks; rank++) {
        struct rank_memory *m = &b->cluster.ranks[rank];
        double sent = 0;
        b->topk_idx[rank] = malloc(slots * 4);
        b->topk_weights[rank] = malloc(slots * 4);
        b->x[rank] = malloc(elements * 2);
        for (uint32_t token = 0; token < p->max_tokens; token++) {
            uint64_t ranks;
            draw_token(p, b->topk_idx[rank] + (size_t)token * p->top_k, &ranks);
            sent += __builtin_popcountll(ranks & ~(1ull << rank));
        }
        for (size_t i = 0; i < slots; i++)
            b->topk_weights[rank][i] = (float)(next_random() % 1000) / 1000.0f;
        for (size_t i = 0; i < elements; i++)
            element_set(b->x[rank], i, EPD_BF16, (float)(int)(next_random() % 2001 - 1000) / 500.0f);
        upload(m->topk_idx, b->topk_idx[rank], slots * 4);
        upload(m->topk_weights, b->topk_weights[rank], slots * 4);
        upload(m->x, b->x[rank], elements * 2);
        sent *= p->hidden * 2.0;
        b->link_bytes = sent > b->link_bytes ? sent : b->link_bytes;
    }
}

static void bench_open(struct bench *b, const struct bench_case *c, uint32_t n_ranks)
{
    struct problem p = {.n_ranks = n_ranks,
                        .top_k = c->top_k,
                        .n_experts = c->n_experts,
                        .hidden = c->hidden,
                        .alignment = c->alignment,
                        .max_tokens = c->n_tokens,
                        .dtype = EPD_BF16,
                        .idx_dtype = EPD_I32};
    for (uint32_t rank = 0; rank < n_ranks; rank++)
        p.n_tokens[rank] = c->n_tokens;
    p.capacity_rows =
        (int64_t)c->n_tokens * c->top_k * 5 / 4 + (int64_t)c->n_experts / n_ranks * c->alignment;
    cluster_open(&b->cluster, &p);
    for (uint32_t rank = 0; rank < n_ranks; rank++) {
        MUST(cudaSetDevice(b->cluster.ranks[rank].device));
        MUST(cudaMemset(b->cluster.ranks[rank].error, 0, sizeof(struct kernel_error)));
        for (int i = 0; i <= MAX_ITERATIONS; i++)
            MUST(cudaEventCreate(&b->events[rank][i]));
    }
    draw_inputs(b);
}

static void bench_close(struct bench *b)
{
    for (uint32_t rank = 0; rank < b->cluster.problem.n_ranks; rank++) {
        for (int i = 0; i <= MAX_ITERATIONS; i++)
            MUST(cudaEventDestroy(b->events[rank][i]));
        free(b->topk_idx[rank]);
        free(b->topk_weights[rank]);
        free(b->x[rank]);
    }
    cluster_close(&b->cluster);
}

static void must_launch(struct bench *b, launch_function launch, uint32_t rank, enum cuda_stage stage,
                        const void *what)
{
    struct epd_error error;
    if (launch(&b->cluster, rank, stage, what, &error) == EPD_OK)
        return;
    fprintf(stderr, "launch: %s\n", error.text);
    exit(1);
}

/* Stage by stage with events between the devices, as a caller without co-resident grids would do it. */
static void enqueue_stages(struct bench *b, launch_function launch, const void *what)
{
    static cudaEvent_t ends[CLUSTER_MAX_RANKS];
    enum cuda_stage stages[CLUSTER_MAX_PARTS];
    uint32_t n_ranks = b->cluster.problem.n_ranks;
    int n = stages_of(launch, what, stages);
    for (int i = 0; i < n; i++) {
        for (uint32_t rank = 0; rank < n_ranks; rank++) {
            MUST(cudaSetDevice(b->cluster.ranks[rank].device));
            if (!ends[rank])
                MUST(cudaEventCreateWithFlags(&ends[rank], cudaEventDisableTiming));
            must_launch(b, launch, rank, stages[i], what);
            MUST(cudaEventRecord(ends[rank], b->cluster.ranks[rank].stream));
        }
        for (uint32_t rank = 0; rank < n_ranks; rank++)
            for (uint32_t other = 0; other < n_ranks; other++)
                MUST(cudaStreamWaitEvent(b->cluster.ranks[rank].stream, ends[other], 0));
    }
}

static int compare_float(const void *a, const void *b)
{
    float x = *(const float *)a, y = *(const float *)b;
    return (x > y) - (x < y);
}

/* Milliseconds, median and 99th percentile of the slowest rank; negative if the op did not end. */
static float measure(struct bench *b, launch_function launch, const void *what, int staged, float *p99)
{
    uint32_t n_ranks = b->cluster.problem.n_ranks;
    float times[MAX_ITERATIONS];
    int n = b->iterations + WARM_UP, kept = 0;
    for (uint32_t rank = 0; rank < n_ranks; rank++) {
        MUST(cudaSetDevice(b->cluster.ranks[rank].device));
        gate_launch(b->cluster.ranks[rank].stream, staged ? 30 : 10);
        MUST(cudaEventRecord(b->events[rank][0], b->cluster.ranks[rank].stream));
    }
    for (int i = 0; i < n; i++) {
        if (staged)
            enqueue_stages(b, launch, what);
        for (uint32_t rank = 0; rank < n_ranks; rank++) {
            MUST(cudaSetDevice(b->cluster.ranks[rank].device));
            if (!staged)
                must_launch(b, launch, rank, CUDA_STAGE_ALL, what);
            MUST(cudaEventRecord(b->events[rank][i + 1], b->cluster.ranks[rank].stream));
        }
    }
    if (!cluster_wait(&b->cluster, 10.0))
        return -1.0f;
    for (int i = WARM_UP; i < n; i++) {
        float slowest = 0.0f;
        for (uint32_t rank = 0; rank < n_ranks; rank++) {
            float ms;
            MUST(cudaEventElapsedTime(&ms, b->events[rank][i], b->events[rank][i + 1]));
            slowest = ms > slowest ? ms : slowest;
        }
        times[kept++] = slowest;
    }
    qsort(times, (size_t)kept, sizeof(float), compare_float);
    *p99 = times[kept * 99 / 100];
    return times[kept / 2];
}

static void report(struct bench *b, const char *op, const char *way, launch_function launch, const void *what,
                   int staged)
{
    const struct problem *p = &b->cluster.problem;
    float p99 = 0, ms = measure(b, launch, what, staged, &p99);
    double gbs = b->link_bytes / ms * 1e-6;
    uint32_t blocks = b->cluster.max_blocks ? b->cluster.max_blocks : CUDA_DEFAULT_BLOCKS;
    printf("{\"bench\":\"exchange\",\"case\":\"%s\",\"op\":\"%s\",\"way\":\"%s\",\"ranks\":%u,\"blocks\":%u,"
           "\"send_blocks\":%u,\"median_us\":%.1f,\"p99_us\":%.1f,\"link_bytes\":%.0f,\"link_gbs\":%.1f,"
           "\"of_link\":%.3f}\n",
           b->name, op, way, p->n_ranks, blocks, b->cluster.send_blocks, ms * 1e3, p99 * 1e3, b->link_bytes,
           gbs, gbs / LINK_GBS);
    fflush(stdout);
}

/* For each "blocks:send" of a list. */
static void report_list(struct bench *b, const char *op, const char *list, launch_function launch,
                        const void *what)
{
    for (const char *at = list; at && *at; at = strchr(at, ',') ? strchr(at, ',') + 1 : "") {
        unsigned blocks = 0, send = 0;
        if (sscanf(at, "%u:%u", &blocks, &send) < 1)
            break;
        b->cluster.max_blocks = blocks;
        b->cluster.send_blocks = send;
        report(b, op, "fused", launch, what, 0);
    }
    b->cluster.max_blocks = 0;
    b->cluster.send_blocks = 0;
}

/* After the timed runs: every received row is the token it says it is. */
static int check_rows(struct bench *b)
{
    const struct problem *p = &b->cluster.problem;
    size_t rows = (size_t)p->capacity_rows, row_bytes = p->hidden * 2,
           slots = (size_t)p->max_tokens * p->top_k;
    char *got = malloc(rows * row_bytes);
    int32_t *source = malloc(rows * 4);
    uint32_t n_local = p->n_experts / p->n_ranks;
    size_t bad = 0, received = 0;
    for (uint32_t rank = 0; rank < p->n_ranks; rank++) {
        int64_t end;
        download(&end, b->cluster.ranks[rank].routing.base.offsets + n_local, 8);
        download(got, b->cluster.ranks[rank].recv_x, (size_t)end * row_bytes);
        download(source, b->cluster.ranks[rank].routing.base.source, (size_t)end * 4);
        for (size_t row = 0; row < (size_t)end; row++) {
            if (source[row] < 0)
                continue;
            size_t from = (size_t)source[row] / slots, i = (size_t)source[row] % slots;
            received++;
            bad += (uint32_t)b->topk_idx[from][i] / n_local != rank ||
                   memcmp(got + row * row_bytes, b->x[from] + i / p->top_k * p->hidden, row_bytes) != 0;
        }
    }
    free(got);
    free(source);
    bad += received != slots * p->n_ranks;
    printf("%s %s: %zu rows received, %zu wrong\n", bad ? "FAIL" : "ok  ", b->name, received, bad);
    return bad != 0;
}

/* y = recv_x: out is x times the sum of its weights, but for the rounding of at most R + 1 sums. */
static int check_out(struct bench *b)
{
    const struct problem *p = &b->cluster.problem;
    size_t elements = (size_t)p->max_tokens * p->hidden, bad = 0;
    const struct op_combine saved = {.saved_weights = 1};
    uint16_t *out = malloc(elements * 2);
    for (uint32_t rank = 0; rank < p->n_ranks; rank++) {
        struct rank_memory *m = &b->cluster.ranks[rank];
        MUST(cudaSetDevice(m->device));
        MUST(cudaMemcpy(m->y, m->recv_x, (size_t)p->capacity_rows * p->hidden * 2, cudaMemcpyDeviceToDevice));
        MUST(cudaMemset(m->out, 0xff, elements * 2));
        MUST(cudaDeviceSynchronize());
    }
    if (!cluster_run(&b->cluster, launch_combine, &saved, 1))
        return printf("FAIL combine did not end\n"), 1;
    for (uint32_t rank = 0; rank < p->n_ranks; rank++) {
        download(out, b->cluster.ranks[rank].out, elements * 2);
        for (uint32_t token = 0; token < p->max_tokens; token++) {
            float weight = 0.0f;
            for (uint32_t k = 0; k < p->top_k; k++)
                weight += b->topk_weights[rank][(size_t)token * p->top_k + k];
            for (uint32_t h = token % 8; h < p->hidden; h += 8) {
                size_t i = (size_t)token * p->hidden + h;
                float want = weight * element_get(b->x[rank], i, EPD_BF16),
                      got = element_get(out, i, EPD_BF16);
                float error = got - want;
                bad += !(error * error <= want * want * 1e-4f + 1e-8f);
            }
        }
    }
    free(out);
    printf("%s %s: out is the weighted sum, %zu wrong\n", bad ? "FAIL" : "ok  ", b->name, bad);
    return bad != 0;
}

static int run_case(const struct bench_case *c, uint32_t n_ranks, const char *dispatch_list,
                    const char *combine_list, int iterations)
{
    static struct bench b;
    const struct op_dispatch forward = {.route = 1, .weights = 1}, copy = {.weights = 0},
                             backward = {.scaled = 1, .dot = 1, .bwd = 1};
    const struct op_combine saved = {.saved_weights = 1}, given = {.weights = 1};
    const struct op_gather gather = {0};
    b.name = c->name;
    b.iterations = iterations;
    bench_open(&b, c, n_ranks);
    report_list(&b, "dispatch", dispatch_list ? dispatch_list : "32:0", launch_dispatch, &forward);
    int failed = check_rows(&b);
    report_list(&b, "combine", combine_list ? combine_list : "32:0", launch_combine, &saved);
    report(&b, "dispatch_cached", "fused", launch_dispatch, &copy, 0);
    report(&b, "combine_given_weights", "fused", launch_combine, &given, 0);
    report(&b, "combine_bwd", "fused", launch_dispatch, &backward, 0);
    report(&b, "gather_scalars", "fused", launch_gather, &gather, 0);
    b.cluster.max_blocks = 132;
    report(&b, "dispatch", "staged", launch_dispatch, &forward, 1);
    report(&b, "combine", "staged", launch_combine, &saved, 1);
    b.cluster.max_blocks = 0;
    failed += check_out(&b);
    bench_close(&b);
    return failed;
}

int bench_exchange(const char *only, const char *dispatch_list, const char *combine_list, int iterations)
{
    int failed = 0;
    uint32_t n_ranks = device_count() >= 4 ? 4 : (uint32_t)device_count();
    for (int device = 0; device < (int)n_ranks; device++) {
        MUST(cudaSetDevice(device));
        gate_load();
    }
    if (iterations > MAX_ITERATIONS - WARM_UP)
        iterations = MAX_ITERATIONS - WARM_UP;
    for (size_t i = 0; i < sizeof(bench_cases) / sizeof(bench_cases[0]); i++)
        if (!only || strcmp(only, bench_cases[i].name) == 0)
            failed += run_case(&bench_cases[i], n_ranks, dispatch_list, combine_list, iterations);
    return failed;
}
