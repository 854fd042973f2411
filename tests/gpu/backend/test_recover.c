/* The daemon's worker is killed while a client's stream waits for it: the stream is released, the launch ends EPD_RESTARTED,
 * epd_recover makes groups, registered memory, heap memory and plans again, and the next step computes what the first one did. */
#include <cuda_runtime_api.h>
#include <signal.h>
#include <string.h>
#include <unistd.h>

#include "client/public.h"
#include "tests/gpu/backend/process.h"

enum { WORLD = 2, T = 64, H = 256, E = 4, K = 2, C = WORLD * T * K, N_ROUNDS = 3, RECOVER_MS = 60000 };

/* How long a stream may wait for a dead worker. */
#define RELEASED_S 3.0
/* Longer than a client looks closely at streams that take no flag. */
#define OWN_WORK_US 1200000

struct client {
    unsigned rank;
    struct epd_client *epd;
    struct epd_group *group;
    cudaStream_t stream;
    void *x, *idx;                                           /* own memory */
    struct epd_buffer *x_buffer, *idx_buffer, *recv_x, *out; /* the last two in the daemon's heap */
    struct epd_plan *dispatch, *combine;
};

/* bf16 of a small whole number. */
static unsigned short number(unsigned i, unsigned rank)
{
    const float value = (float)((int)((i * 7 + rank * 5) % 61) - 30);
    unsigned bits;
    memcpy(&bits, &value, sizeof bits);
    return (unsigned short)(bits >> 16);
}

static void fill(struct client *c)
{
    static unsigned short x[T * H];
    static int idx[T * K];
    for (unsigned i = 0; i < T * H; i++)
        x[i] = number(i, c->rank);
    for (unsigned t = 0; t < T; t++) {
        idx[t * K] = (int)((t + c->rank) % E);
        idx[t * K + 1] = (int)((t + c->rank + 1 + t / E % (E - 1)) % E);
    }
    process_upload(c->x, x, sizeof x);
    process_upload(c->idx, idx, sizeof idx);
}

/* Combine without experts between adds a token to itself. */
static int doubled(struct client *c)
{
    static unsigned short out[T * H];
    MUST(cudaMemcpy(out, epd_buffer_data(c->out), sizeof out, cudaMemcpyDeviceToHost) == cudaSuccess);
    for (unsigned i = 0; i < T * H; i++) {
        const unsigned short once = number(i, c->rank);
        /* Twice the number: the exponent is one larger. */
        const unsigned short want = once & 0x7fff ? (unsigned short)(once + 0x80) : 0;
        if ((out[i] & 0x7fff ? out[i] : 0) != want) {
            fprintf(stderr, "rank %u element %u: %04x, want %04x\n", c->rank, i, out[i], want);
            return 0;
        }
    }
    return 1;
}

static struct epd_tensor tensor(enum epd_role role, struct epd_buffer *buffer, enum epd_dtype dtype,
                                int64_t d0, int64_t d1)
{
    return (struct epd_tensor){
        .role = role, .buffer = buffer, .dtype = dtype, .n_dims = 2, .shape = {d0, d1}};
}

static void make_plans(struct client *c)
{
    const struct epd_tensor dispatch[] = {tensor(EPD_ROLE_X, c->x_buffer, EPD_BF16, T, H),
                                          tensor(EPD_ROLE_TOPK_IDX, c->idx_buffer, EPD_I32, T, K),
                                          tensor(EPD_ROLE_RECV_X, c->recv_x, EPD_BF16, C, H)};
    const struct epd_tensor combine[] = {tensor(EPD_ROLE_Y, c->recv_x, EPD_BF16, C, H),
                                         tensor(EPD_ROLE_OUT, c->out, EPD_BF16, T, H)};
    struct epd_plan_options options = {
        .size = sizeof options, .op = EPD_OP_DISPATCH, .n_tensors = 3, .tensors = dispatch};
    MUST(epd_plan_create(c->group, &options, &c->dispatch) == EPD_OK);
    options = (struct epd_plan_options){.size = sizeof options,
                                        .op = EPD_OP_COMBINE,
                                        .context = c->dispatch,
                                        .n_tensors = 2,
                                        .tensors = combine};
    MUST(epd_plan_create(c->group, &options, &c->combine) == EPD_OK);
}

static void client_open(struct client *c, const char *socket_path, unsigned rank)
{
    struct epd_open_options open = {.size = sizeof open, .socket_path = socket_path, .timeout_ms = 60000};
    struct epd_group_options join = {.size = sizeof join,
                                     .name = "recover",
                                     .world_size = WORLD,
                                     .rank = rank,
                                     .n_experts = E,
                                     .top_k = K,
                                     .hidden = H,
                                     .max_tokens = T,
                                     .capacity_rows = C,
                                     .dtype = EPD_BF16};
    int n_gpus = 0;
    *c = (struct client){.rank = rank};
    MUST(cudaGetDeviceCount(&n_gpus) == cudaSuccess && cudaSetDevice((int)rank % n_gpus) == cudaSuccess);
    MUST(cudaStreamCreateWithFlags(&c->stream, cudaStreamNonBlocking) == cudaSuccess);
    MUST(cudaMalloc(&c->x, T * H * 2) == cudaSuccess && cudaMalloc(&c->idx, T * K * 4) == cudaSuccess);
    MUST(epd_open(&open, &c->epd) == EPD_OK);
    MUST(epd_group_join(c->epd, &join, &c->group) == EPD_OK);
    MUST(epd_buffer_register_cuda(c->group, c->x, T * H * 2, &c->x_buffer) == EPD_OK);
    MUST(epd_buffer_register_cuda(c->group, c->idx, T * K * 4, &c->idx_buffer) == EPD_OK);
    MUST(epd_buffer_alloc(c->group, (size_t)C * H * 2, &c->recv_x) == EPD_OK);
    MUST(epd_buffer_alloc(c->group, T * H * 2, &c->out) == EPD_OK);
    make_plans(c);
    fill(c);
}

static void step(struct client *c)
{
    MUST(cudaMemsetAsync(epd_buffer_data(c->out), 0xff, T * H * 2, c->stream) == cudaSuccess);
    MUST(epd_plan_launch(c->dispatch, c->stream) == EPD_OK &&
         epd_plan_launch(c->combine, c->stream) == EPD_OK);
    MUST(cudaStreamSynchronize(c->stream) == cudaSuccess);
    MUST(epd_plan_wait(c->dispatch, 20000) == EPD_OK && epd_plan_wait(c->combine, 20000) == EPD_OK);
    MUST(doubled(c));
}

static pid_t worker_of(struct client *c)
{
    char *stats = NULL;
    MUST(epd_stats(c->epd, &stats) == EPD_OK);
    pid_t pid = (pid_t)process_number(stats, "", "pid");
    epd_free(stats);
    MUST(pid > 1);
    return pid;
}

static void CUDART_CB own_work(void *arg)
{
    (void)arg;
    usleep(OWN_WORK_US);
}

/* Rank 0's launches wait for rank 1's, which never come; before the last of several the stream has work of its own. */
static void lose_waiting(struct client *c, int n_launches)
{
    pid_t worker = worker_of(c);
    for (int i = 0; i < n_launches; i++) {
        if (i > 0 && i == n_launches - 1)
            MUST(cudaLaunchHostFunc(c->stream, own_work, NULL) == cudaSuccess);
        MUST(epd_plan_launch(c->dispatch, c->stream) == EPD_OK);
    }
    usleep(100000);
    MUST(cudaStreamQuery(c->stream) == cudaErrorNotReady);
    double begin = process_seconds();
    MUST(kill(worker, SIGKILL) == 0);
    MUST(cudaStreamSynchronize(c->stream) == cudaSuccess);
    double released = process_seconds() - begin;
    MUST(epd_plan_wait(c->dispatch, 20000) == EPD_RESTARTED);
    printf("a stream with %d launches that waited for a killed worker was released after %.1f ms\n",
           n_launches, released * 1e3);
    MUST(released < RELEASED_S);
}

/* Rank 1 has nothing in flight; it notices by asking. */
static void lose_idle(struct client *c)
{
    char *stats = NULL;
    enum epd_status status;
    while ((status = epd_stats(c->epd, &stats)) == EPD_OK) {
        epd_free(stats);
        usleep(2000);
    }
    MUST(status == EPD_RESTARTED);
}

static int client_main(const char *socket_path, unsigned rank)
{
    struct client c;
    client_open(&c, socket_path, rank);
    const void *out = epd_buffer_data(c.out);
    for (int round = 0; round < N_ROUNDS; round++) {
        step(&c);
        step(&c);
        if (rank == 0)
            lose_waiting(&c, round == 0 ? 3 : 1);
        else
            lose_idle(&c);
        double begin = process_seconds();
        MUST(epd_recover(c.epd, RECOVER_MS) == EPD_OK);
        MUST(epd_buffer_data(c.out) == out);
        MUST(doubled(&c)); /* what it held */
        step(&c);
        if (rank == 0)
            printf("recovered and a step done after %.0f ms\n", (process_seconds() - begin) * 1e3);
    }
    epd_close(c.epd);
    return 0;
}

int main(int argc, char **argv)
{
    struct process_daemon daemon;
    int failed = 0;
    if (argc == 2 && strcmp(argv[1], "count") == 0)
        return process_count_main();
    if (argc == 4 && strcmp(argv[1], "client") == 0)
        return client_main(argv[2], (unsigned)atoi(argv[3]));
    if (argc != 2) {
        fprintf(stderr, "usage: %s EPD\n", argv[0]);
        return 2;
    }
    if (process_count_gpus() == 0) {
        printf("SKIP: no GPU\n");
        return PROCESS_SKIPPED;
    }
    const char *options[] = {"--restart-first", "1ms", NULL};
    process_daemon_start(&daemon, argv[1], options);
    const char *first[] = {"/proc/self/exe", "client", daemon.socket_path, "0", NULL};
    const char *second[] = {"/proc/self/exe", "client", daemon.socket_path, "1", NULL};
    pid_t pids[WORLD] = {process_start(first), process_start(second)};
    for (int r = 0; r < WORLD; r++)
        failed |= process_wait(pids[r]) != 0;
    failed |= process_daemon_stop(&daemon);
    printf("%s\n", failed ? "FAILED" : "PASSED");
    return failed;
}
