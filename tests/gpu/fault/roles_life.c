/* Ranks that step, wait, die and recover. */
#include <pthread.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "tests/gpu/fault/roles.h"

#define RECOVER_MS       30000
#define N_STEPS          20
#define SLOW_US          300000
#define N_QUEUED         3     /* launches of one plan: released one after the other */
#define N_ARMED          10000 /* far more than a lane takes at once */
#define N_ARMED_MESSAGES 5
#define N_CHURNED        2000 /* registrations */
#define N_BLOCKS         8
#define BLOCK_BYTES      (4 << 20)

static int is_loss(enum epd_status status)
{
    /* EPD_CUDA: the worker's own context was lost, and it still could say so. */
    return status == EPD_RESTARTED || status == EPD_DISCONNECTED || status == EPD_CUDA;
}

static void run_steps(struct gpu_rank *rank)
{
    gpu_rank_open(rank);
    for (int i = 0; i < N_STEPS; i++)
        GPU_MUST(gpu_rank_counted_step(rank) == EPD_OK);
    gpu_rank_close(rank);
}

/* Good steps alone until it is told to stop; the last one may find the other rank gone. */
static void run_bystander(struct gpu_rank *rank)
{
    enum epd_status status = EPD_OK;
    gpu_rank_open(rank);
    while (status == EPD_OK && !(rank->rank == 0 && atomic_load(&rank->board->stop)))
        status = gpu_rank_counted_step(rank);
    GPU_MUST(status == EPD_OK || (status == EPD_PEER_LOST && atomic_load(&rank->board->stop)));
    gpu_rank_close(rank);
}

static void recover(struct gpu_rank *rank)
{
    enum epd_status status = EPD_RESTARTED;
    atomic_store(&rank->own->place, BOARD_RECOVER);
    for (int i = 0; i < 20 && status != EPD_OK; i++) {
        status = epd_recover(rank->client, RECOVER_MS);
        GPU_MUST(status == EPD_OK || is_loss(status) || status == EPD_PEER_LOST);
    }
    GPU_MUST(status == EPD_OK);
    atomic_store(&rank->own->place, BOARD_OUTSIDE);
    atomic_fetch_add(&rank->own->n_recovered, 1);
}

/* The same, and when the daemon's worker is lost it goes on with the next one. */
static void run_survivor(struct gpu_rank *rank)
{
    gpu_rank_open(rank);
    for (;;) {
        const enum epd_status status = gpu_rank_counted_step(rank);
        const int stop = atomic_load(&rank->board->stop);
        if (status == EPD_PEER_LOST && stop)
            break;
        if (status != EPD_OK) {
            GPU_MUST(is_loss(status) || status == EPD_PEER_LOST);
            recover(rank);
        } else if (stop && rank->rank == 0) {
            break;
        }
    }
    gpu_rank_close(rank);
}

/* Holds everything a rank can hold, and waits to be killed. */
static void run_idle(struct gpu_rank *rank)
{
    struct epd_buffer *ballast;
    gpu_rank_open(rank);
    GPU_MUST(epd_buffer_alloc(rank->group, GPU_BALLAST_BYTES, &ballast) == EPD_OK);
    GPU_MUST(gpu_rank_step(rank) == EPD_OK);
    atomic_store(&rank->own->ready, 1);
    for (;;)
        pause();
}

/* Registers memory and takes it back, again and again. */
static void run_churn(struct gpu_rank *rank)
{
    struct epd_buffer *buffer;
    void *blocks[N_BLOCKS];
    gpu_rank_open(rank);
    for (int i = 0; i < N_BLOCKS; i++)
        GPU_MUST(cudaMalloc(&blocks[i], BLOCK_BYTES) == cudaSuccess);
    for (int i = 0; i < N_CHURNED; i++) {
        GPU_MUST(epd_buffer_register_cuda(rank->group, blocks[i % N_BLOCKS], BLOCK_BYTES, &buffer) == EPD_OK);
        GPU_MUST(epd_buffer_release(buffer) == EPD_OK);
    }
    GPU_MUST(gpu_rank_step(rank) == EPD_OK);
    gpu_rank_close(rank);
    for (int i = 0; i < N_BLOCKS; i++)
        GPU_MUST(cudaFree(blocks[i]) == cudaSuccess);
}

static void wait_for_release(void *arg)
{
    struct board *board = arg;
    while (!atomic_load(&board->release))
        usleep(1000);
}

/* Rank 1's stream stands still behind a host function with launches queued; it is killed so. The others' streams go on, and
 * they are told who is gone. */
static void run_queued(struct gpu_rank *rank)
{
    struct epd_failure failure = {.size = sizeof failure};
    gpu_rank_open(rank);
    GPU_MUST(gpu_rank_step(rank) == EPD_OK);
    if (rank->rank == 1)
        GPU_MUST(cudaLaunchHostFunc(rank->stream, wait_for_release, rank->board) == cudaSuccess);
    for (int i = 0; i < N_QUEUED; i++)
        GPU_MUST(gpu_rank_launch(rank) == EPD_OK);
    atomic_store(&rank->own->ready, 1);
    while (rank->rank == 1)
        pause();
    const enum epd_status status = gpu_rank_wait(rank);
    GPU_MUST(status == EPD_PEER_LOST);
    GPU_MUST(epd_plan_failure(rank->dispatch, &failure) == EPD_OK && failure.rank == 1);
    atomic_fetch_add(&rank->own->n_ended[status], 1);
    gpu_rank_close(rank);
}

/* Announces launches that it never makes, and waits to be killed: its plan's queue stands still on the GPU. */
static void run_armed(struct gpu_rank *rank)
{
    gpu_rank_open(rank);
    GPU_MUST(gpu_rank_step(rank) == EPD_OK);
    for (int i = 0; i < N_ARMED_MESSAGES; i++)
        GPU_MUST(epd_plan_arm(rank->dispatch, N_ARMED) == EPD_OK);
    atomic_store(&rank->own->ready, 1);
    for (;;)
        pause();
}

/* Steps until somebody kills it; the other ranks are told, again and again in new groups of the same name. */
static void run_mortal(struct gpu_rank *rank)
{
    while (!atomic_load(&rank->board->stop)) {
        enum epd_status status = gpu_rank_try(rank);
        if (status != EPD_OK) { /* the dead one's place is not free yet, or it died while joining */
            GPU_MUST(status == EPD_IN_USE || status == EPD_PEER_LOST);
            usleep(2000);
            continue;
        }
        atomic_store(&rank->own->ready, 1);
        while (status == EPD_OK && !(rank->rank == 0 && atomic_load(&rank->board->stop)))
            status = gpu_rank_counted_step(rank);
        GPU_MUST(status == EPD_OK || status == EPD_PEER_LOST);
        gpu_rank_close(rank);
    }
}

/* Tries until it gets through a few steps: the daemon has lost its GPU and does not know it yet. */
static void run_patient(struct gpu_rank *rank)
{
    for (int n = 0; n < 1000; n++) {
        enum epd_status status = gpu_rank_try(rank);
        const int opened = status == EPD_OK;
        for (int i = 0; i < N_STEPS && status == EPD_OK; i++)
            status = gpu_rank_counted_step(rank);
        if (opened)
            gpu_rank_close(rank);
        if (status == EPD_OK)
            return;
        GPU_MUST(is_loss(status) || status == EPD_PEER_LOST || status == EPD_IN_USE);
        usleep(10000);
    }
    GPU_MUST(!"got through");
}

/* Launches at once, but its stream comes late. */
static void run_slow(struct gpu_rank *rank)
{
    gpu_rank_open(rank);
    for (int i = 0; i < 5; i++) {
        if (rank->rank == 1)
            usleep(SLOW_US);
        GPU_MUST(gpu_rank_counted_step(rank) == EPD_OK);
    }
    atomic_store(&rank->own->ready, 1);
    wait_for_release(rank->board); /* the test looks at the stats */
    gpu_rank_close(rank);
}

/* One rank skips a dispatch: both learn it at once, and not at the deadline. */
static void run_order(struct gpu_rank *rank)
{
    gpu_rank_open(rank);
    GPU_MUST(gpu_rank_step(rank) == EPD_OK);
    struct epd_plan *plan = rank->rank == 0 ? rank->dispatch : rank->combine;
    GPU_MUST(epd_plan_launch(plan, rank->stream) == EPD_OK);
    GPU_MUST(cudaStreamSynchronize(rank->stream) == cudaSuccess);
    GPU_MUST(epd_plan_wait(plan, 10000) == EPD_SEQ_MISMATCH);
    GPU_MUST(gpu_rank_step(rank) == EPD_OK);
    gpu_rank_close(rank);
}

static void *step_on_a_thread(void *arg)
{
    struct gpu_rank *rank = arg;
    enum epd_status *status = malloc(sizeof *status);
    /* No device was selected here: on GPU 0 that goes wrong for all others, and is said before anything is sent. */
    gpu_rank_select(rank);
    *status = gpu_rank_step(rank);
    return status;
}

/* A thread that CUDA does not know yet, and a child of fork. */
static void run_elsewhere(struct gpu_rank *rank)
{
    pthread_t thread;
    void *status;
    int ended;
    gpu_rank_open(rank);
    GPU_MUST(pthread_create(&thread, NULL, step_on_a_thread, rank) == 0 &&
             pthread_join(thread, &status) == 0);
    GPU_MUST(*(enum epd_status *)status == EPD_OK);
    free(status);
    pid_t child = fork();
    if (child == 0) {
        const int refused = epd_plan_launch(rank->dispatch, rank->stream) == EPD_INVALID_ARGUMENT &&
                            strstr(epd_error_text(), "before fork()") != NULL;
        epd_plan_destroy(rank->combine);
        epd_close(rank->client);
        _exit(!refused);
    }
    GPU_MUST(waitpid(child, &ended, 0) == child && WIFEXITED(ended) && WEXITSTATUS(ended) == 0);
    GPU_MUST(gpu_rank_step(rank) == EPD_OK);
    gpu_rank_close(rank);
}

/* A neighbour on the GPU that loses its context. Not a client. */
static void run_crash(struct gpu_rank *rank)
{
    gpu_rank_select(rank);
    GPU_MUST(cudaFree(NULL) == cudaSuccess);
    gpu_crash();
    GPU_MUST(cudaDeviceSynchronize() != cudaSuccess);
}

const struct role roles_of_life[] = {
    {"steps", run_steps},       {"bystander", run_bystander},
    {"survivor", run_survivor}, {"idle", run_idle},
    {"churn", run_churn},       {"queued", run_queued},
    {"armed", run_armed},       {"patient", run_patient},
    {"mortal", run_mortal},     {"slow", run_slow},
    {"order", run_order},       {"elsewhere", run_elsewhere},
    {"crash", run_crash},       {NULL, NULL},
};
