/* Clients in processes of their own, a real daemon, cudaMalloc memory by IPC: launches follow each other on a
 * stream without a wait between them, also from a CUDA graph; what goes wrong is told. The ranks are this
 * program again, started anew: CUDA does not survive a fork. */
#include <cuda_runtime_api.h>
#include <signal.h>
#include <string.h>
#include <unistd.h>

#include "client/public.h"
#include "tests/gpu/backend/process.h"

enum { WORLD = 2, T = 96, H = 512, E = 8, K = 2, C = WORLD * T * K, N_STEPS = 20, N_REPLAYS = 1000 };

struct tensors {
    void *x, *idx, *recv_x, *splits, *out; /* device */
    struct epd_buffer *buffers[5];
};

/* bf16 of small whole numbers, so that sums are exact. */
static unsigned short bf16(int value)
{
    float f = (float)value;
    unsigned bits;
    memcpy(&bits, &f, sizeof bits);
    return (unsigned short)(bits >> 16);
}

static void fill(unsigned short *x, unsigned step, unsigned rank)
{
    for (unsigned i = 0; i < T * H; i++)
        x[i] = bf16((int)((i * 7 + step * 13 + rank * 5) % 61) - 30);
}

static int doubled(const unsigned short *out, unsigned step, unsigned rank)
{
    for (unsigned i = 0; i < T * H; i++) {
        unsigned short want = bf16(2 * ((int)((i * 7 + step * 13 + rank * 5) % 61) - 30));
        if (out[i] != want) {
            fprintf(stderr, "rank %u step %u element %u: %04x, want %04x\n", rank, step, i, out[i], want);
            return 0;
        }
    }
    return 1;
}

static struct epd_buffer *device_buffer(struct epd_group *group, size_t bytes, void **data)
{
    struct epd_buffer *buffer;
    MUST(cudaMalloc(data, bytes) == cudaSuccess);
    MUST(cudaMemset(*data, 0xff, bytes) == cudaSuccess);
    MUST(epd_buffer_register_cuda(group, *data, bytes, &buffer) == EPD_OK);
    return buffer;
}

static void route(const struct tensors *t, unsigned rank, int bad)
{
    static int idx[T * K];
    for (int token = 0; token < T; token++) {
        idx[token * K] = (int)((unsigned)token + rank) % E;
        idx[token * K + 1] = (int)((unsigned)token * 3 + rank + 1) % E;
        if (idx[token * K + 1] == idx[token * K])
            idx[token * K + 1] = (idx[token * K] + 1) % E;
    }
    if (bad)
        idx[11 * K] = E;
    process_upload(t->idx, idx, sizeof idx);
}

static struct tensors make_tensors(struct epd_group *group, unsigned rank)
{
    struct tensors t;
    t.buffers[0] = device_buffer(group, T * H * 2, &t.x);
    t.buffers[1] = device_buffer(group, T * K * 4, &t.idx);
    t.buffers[2] = device_buffer(group, (size_t)C * H * 2, &t.recv_x);
    t.buffers[3] = device_buffer(group, E / WORLD * 8, &t.splits);
    /* One in the daemon's heap. */
    MUST(epd_buffer_alloc(group, T * H * 2, &t.buffers[4]) == EPD_OK);
    t.out = epd_buffer_data(t.buffers[4]);
    route(&t, rank, 0);
    return t;
}

static struct epd_tensor tensor(enum epd_role role, struct epd_buffer *buffer, enum epd_dtype dtype,
                                int64_t d0, int64_t d1)
{
    return (struct epd_tensor){
        .role = role, .buffer = buffer, .dtype = dtype, .n_dims = d1 ? 2 : 1, .shape = {d0, d1, 0}};
}

static void make_plans(struct epd_group *group, const struct tensors *t, struct epd_plan *plans[2])
{
    const struct epd_tensor dispatch[] = {tensor(EPD_ROLE_X, t->buffers[0], EPD_BF16, T, H),
                                          tensor(EPD_ROLE_TOPK_IDX, t->buffers[1], EPD_I32, T, K),
                                          tensor(EPD_ROLE_RECV_X, t->buffers[2], EPD_BF16, C, H),
                                          tensor(EPD_ROLE_M_SPLITS, t->buffers[3], EPD_I64, E / WORLD, 0)};
    const struct epd_tensor combine[] = {tensor(EPD_ROLE_Y, t->buffers[2], EPD_BF16, C, H),
                                         tensor(EPD_ROLE_OUT, t->buffers[4], EPD_BF16, T, H)};
    struct epd_plan_options options = {
        .size = sizeof options, .op = EPD_OP_DISPATCH, .n_tensors = 4, .tensors = dispatch};
    MUST(epd_plan_create(group, &options, &plans[0]) == EPD_OK);
    options = (struct epd_plan_options){.size = sizeof options,
                                        .op = EPD_OP_COMBINE,
                                        .context = plans[0],
                                        .n_tensors = 2,
                                        .tensors = combine};
    MUST(epd_plan_create(group, &options, &plans[1]) == EPD_OK);
}

static unsigned short x_steps[N_STEPS][T * H], out_steps[N_STEPS][T * H];

static void pin(void)
{
    MUST(cudaHostRegister(x_steps, sizeof x_steps, 0) == cudaSuccess);
    MUST(cudaHostRegister(out_steps, sizeof out_steps, 0) == cudaSuccess);
}

/* New rows in, ops, rows out, all in the order of the stream alone. */
static void run_eager(const struct tensors *t, struct epd_plan *plans[2], cudaStream_t stream, unsigned rank)
{
    for (unsigned step = 0; step < N_STEPS; step++) {
        unsigned short *x = x_steps[step], *out = out_steps[step];
        fill(x, step, rank);
        MUST(cudaMemcpyAsync(t->x, x, sizeof x_steps[0], cudaMemcpyHostToDevice, stream) == cudaSuccess);
        MUST(epd_plan_launch(plans[0], stream) == EPD_OK && epd_plan_launch(plans[1], stream) == EPD_OK);
        MUST(cudaMemcpyAsync(out, t->out, sizeof out_steps[0], cudaMemcpyDeviceToHost, stream) ==
             cudaSuccess);
    }
    MUST(cudaStreamSynchronize(stream) == cudaSuccess);
    MUST(epd_plan_wait(plans[0], 10000) == EPD_OK && epd_plan_wait(plans[1], 10000) == EPD_OK);
    for (unsigned step = 0; step < N_STEPS; step++)
        MUST(doubled(out_steps[step], step, rank));
}

static void run_graph(const struct tensors *t, struct epd_plan *plans[2], cudaStream_t stream, unsigned rank)
{
    static unsigned short x[T * H], out[T * H];
    cudaGraph_t graph;
    cudaGraphExec_t replay;
    fill(x, 99, rank);
    process_upload(t->x, x, sizeof x);
    MUST(cudaMemset(t->out, 0xff, sizeof out) == cudaSuccess);
    MUST(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal) == cudaSuccess);
    MUST(epd_plan_launch(plans[0], stream) == EPD_INVALID_ARGUMENT); /* and nobody hears of it */
    MUST(epd_plan_capture(plans[0], stream) == EPD_OK && epd_plan_capture(plans[1], stream) == EPD_OK);
    MUST(cudaStreamEndCapture(stream, &graph) == cudaSuccess);
    MUST(cudaGraphInstantiate(&replay, graph, 0) == cudaSuccess);
    double begin = process_seconds();
    /* The daemon gathers steps in the order of the launches: one of each at a time. */
    for (int i = 0; i < N_REPLAYS; i++) {
        MUST(epd_plan_arm(plans[0], 1) == EPD_OK && epd_plan_arm(plans[1], 1) == EPD_OK);
        MUST(cudaGraphLaunch(replay, stream) == cudaSuccess);
    }
    MUST(cudaStreamSynchronize(stream) == cudaSuccess);
    double end = process_seconds();
    MUST(epd_plan_wait(plans[0], 10000) == EPD_OK && epd_plan_wait(plans[1], 10000) == EPD_OK);
    MUST(cudaMemcpy(out, t->out, sizeof out, cudaMemcpyDeviceToHost) == cudaSuccess);
    MUST(doubled(out, 99, rank));
    if (rank == 0)
        printf("graph of dispatch and combine: %.1f us a replay\n", (end - begin) / N_REPLAYS * 1e6);
    MUST(cudaGraphExecDestroy(replay) == cudaSuccess && cudaGraphDestroy(graph) == cudaSuccess);
}

static void run_bad(const struct tensors *t, struct epd_plan *plans[2], cudaStream_t stream, unsigned rank)
{
    route(t, rank, rank == 1);
    MUST(epd_plan_launch(plans[0], stream) == EPD_OK && epd_plan_launch(plans[1], stream) == EPD_OK);
    MUST(cudaStreamSynchronize(stream) == cudaSuccess);
    MUST(epd_plan_wait(plans[0], 10000) == EPD_BAD_ROUTING);
    MUST(epd_plan_wait(plans[1], 10000) == EPD_INVALID_ARGUMENT);
    route(t, rank, 0);
}

static void sleep_long(void *arg)
{
    (void)arg;
    sleep(20);
}

/* Rank 1 is killed with a launch sent that its stream never reached: rank 0's stream goes on, and is told. */
static void run_death(struct epd_plan *plans[2], cudaStream_t stream, unsigned rank)
{
    double begin = process_seconds();
    if (rank == 1)
        MUST(cudaLaunchHostFunc(stream, sleep_long, NULL) == cudaSuccess);
    MUST(epd_plan_launch(plans[0], stream) == EPD_OK);
    if (rank == 1) {
        usleep(200000);
        raise(SIGKILL);
    }
    MUST(cudaStreamSynchronize(stream) == cudaSuccess);
    MUST(epd_plan_wait(plans[0], 10000) == EPD_PEER_LOST);
    printf("a rank killed in its launch: the other went on after %.2f s\n", process_seconds() - begin);
}

static void run_rank(const char *socket_path, unsigned rank, int dies)
{
    struct epd_open_options open = {.size = sizeof open, .socket_path = socket_path, .timeout_ms = 60000};
    struct epd_group_options join = {.size = sizeof join,
                                     .name = "process",
                                     .world_size = WORLD,
                                     .rank = rank,
                                     .n_experts = E,
                                     .top_k = K,
                                     .hidden = H,
                                     .max_tokens = T,
                                     .capacity_rows = C,
                                     .dtype = EPD_BF16};
    struct epd_client *client;
    struct epd_group *group;
    struct epd_plan *plans[2];
    cudaStream_t stream;
    int n_gpus = 0;
    MUST(cudaGetDeviceCount(&n_gpus) == cudaSuccess && cudaSetDevice((int)rank % n_gpus) == cudaSuccess);
    MUST(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking) == cudaSuccess);
    MUST(epd_open(&open, &client) == EPD_OK);
    MUST(epd_group_join(client, &join, &group) == EPD_OK);
    struct tensors t = make_tensors(group, rank);
    make_plans(group, &t, plans);
    pin();
    run_eager(&t, plans, stream, rank);
    run_bad(&t, plans, stream, rank);
    run_eager(&t, plans, stream, rank);
    run_graph(&t, plans, stream, rank);
    double begin = process_seconds();
    for (int i = 0; i < 200; i++)
        MUST(epd_plan_launch(plans[0], stream) == EPD_OK && epd_plan_launch(plans[1], stream) == EPD_OK);
    double end = process_seconds();
    MUST(cudaStreamSynchronize(stream) == cudaSuccess);
    if (rank == 0)
        printf("dispatch and combine, eager: %.1f us, launches alone %.1f us\n",
               (process_seconds() - begin) / 200 * 1e6, (end - begin) / 400 * 1e6);
    MUST(epd_plan_wait(plans[0], 10000) == EPD_OK && epd_plan_wait(plans[1], 10000) == EPD_OK);
    if (dies)
        run_death(plans, stream, rank);
    epd_plan_destroy(plans[1]);
    epd_plan_destroy(plans[0]);
    for (int i = 0; i < 5; i++)
        MUST(epd_buffer_release(t.buffers[i]) == EPD_OK);
    epd_group_leave(group);
    epd_close(client);
    printf("rank %u ok\n", rank);
}

/* The ranks as processes; of a team that loses one, only the other has to end well. */
static int run_ranks(const char *socket_path, const char *dies)
{
    char number[WORLD][4];
    int failed = 0;
    pid_t ranks[WORLD];
    for (unsigned r = 0; r < WORLD; r++) {
        snprintf(number[r], sizeof number[r], "%u", r);
        const char *rank[] = {"/proc/self/exe", "rank", number[r], socket_path, dies, NULL};
        ranks[r] = process_start(rank);
    }
    for (unsigned r = 0; r < WORLD; r++) {
        if (process_wait(ranks[r]) == 0 || (dies && r == 1))
            continue;
        failed = 1;
        for (unsigned other = r + 1; other < WORLD; other++)
            kill(ranks[other], SIGKILL);
    }
    return failed;
}

int main(int argc, char **argv)
{
    struct process_daemon daemon;
    if (argc == 2 && strcmp(argv[1], "count") == 0)
        return process_count_main();
    if (argc >= 4 && strcmp(argv[1], "rank") == 0) {
        run_rank(argv[3], (unsigned)atoi(argv[2]), argc == 5);
        return 0;
    }
    if (argc != 2) {
        fprintf(stderr, "usage: %s EPD\n", argv[0]);
        return 2;
    }
    if (process_count_gpus() == 0) {
        printf("SKIP: no GPU\n");
        return PROCESS_SKIPPED;
    }
    process_daemon_start(&daemon, argv[1], NULL);
    int failed = run_ranks(daemon.socket_path, NULL) || run_ranks(daemon.socket_path, "dies");
    failed |= process_daemon_stop(&daemon);
    printf("%s\n", failed ? "FAILED" : "PASSED");
    return failed;
}
