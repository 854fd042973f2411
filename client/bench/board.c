#include "client/bench/board.h"

#include <errno.h>
#include <linux/futex.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

/* How long a rank waits for the others before one iteration; the slowest case on the slowest machine takes
 * seconds. */
#define BOARD_DEADLINE_S 300

struct board_shared {
    struct job job;
    _Atomic uint32_t generation; /* futex; grows when all ranks have arrived */
    _Atomic uint32_t n_arrived;
    _Atomic uint32_t aborted;
    _Atomic uint32_t turn;       /* futex; number of the job */
    _Atomic uint32_t n_finished; /* futex; ranks that are done with it */
    _Atomic uint32_t over;
    uint32_t max_iterations;
    struct board_loss loss;
    struct counted counted;
    double memory_bytes[JOB_MAX_RANKS];
    char texts[JOB_MAX_RANKS + 1][BOARD_TEXT_BYTES]; /* one for a spare */
    double samples[];                                /* [n_ranks, 2, max_iterations]: times, launches */
};

static size_t board_size(const struct job *job, uint32_t max_iterations)
{
    return sizeof(struct board_shared) + sizeof(double) * 2 * job->n_ranks * max_iterations;
}

static enum epd_status board_map(struct board *board, int fd, size_t bytes)
{
    void *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (memory == MAP_FAILED) {
        fprintf(stderr, "epd-bench: mapping %zu bytes: %s\n", bytes, strerror(errno));
        return EPD_SYSTEM;
    }
    *board = (struct board){.shared = memory, .bytes = bytes, .fd = fd};
    return EPD_OK;
}

/* Nothing is known of the job yet. */
static void put_job(struct board_shared *shared, const struct job *job)
{
    shared->job = *job;
    shared->counted = COUNTED_NONE;
    for (uint32_t rank = 0; rank < JOB_MAX_RANKS; rank++)
        shared->memory_bytes[rank] = -1;
    memset(shared->samples, 0, sizeof(double) * 2 * job->n_ranks * shared->max_iterations);
}

enum epd_status board_create(struct board *board, const struct job *job, uint32_t max_iterations)
{
    const size_t bytes = board_size(job, max_iterations);
    int fd = memfd_create("epd-bench-board", 0); /* no MFD_CLOEXEC: the ranks inherit it */
    if (fd < 0 || ftruncate(fd, (off_t)bytes) != 0) {
        fprintf(stderr, "epd-bench: shared memory of %zu bytes: %s\n", bytes, strerror(errno));
        if (fd >= 0)
            close(fd);
        return EPD_SYSTEM;
    }
    enum epd_status status = board_map(board, fd, bytes);
    if (status != EPD_OK) {
        close(fd);
        return status;
    }
    board->shared->max_iterations = max_iterations;
    atomic_store(&board->shared->turn, 1);
    put_job(board->shared, job);
    return EPD_OK;
}

enum epd_status board_open(struct board *board, int fd)
{
    struct stat info;
    if (fstat(fd, &info) != 0 || (size_t)info.st_size < sizeof(struct board_shared)) {
        fprintf(stderr, "epd-bench: fd %d is not a board\n", fd);
        return EPD_INVALID_ARGUMENT;
    }
    return board_map(board, fd, (size_t)info.st_size);
}

void board_close(struct board *board)
{
    if (!board->shared)
        return;
    munmap(board->shared, board->bytes);
    close(board->fd);
    *board = (struct board){.fd = -1};
}

const struct job *board_job(const struct board *board)
{
    return &board->shared->job;
}

uint32_t board_max_marks(const struct board *board)
{
    return board->shared->max_iterations;
}

double *board_samples(const struct board *board, uint32_t rank)
{
    return board->shared->samples + (size_t)rank * 2 * board->shared->max_iterations;
}

double *board_launches(const struct board *board, uint32_t rank)
{
    return board_samples(board, rank) + board->shared->max_iterations;
}

double *board_memory(const struct board *board, uint32_t rank)
{
    return &board->shared->memory_bytes[rank];
}

char *board_text(const struct board *board, uint32_t rank)
{
    return board->shared->texts[rank];
}

struct board_loss *board_loss(const struct board *board)
{
    return &board->shared->loss;
}

struct counted *board_counted(const struct board *board)
{
    return &board->shared->counted;
}

static void bump(_Atomic uint32_t *word)
{
    atomic_fetch_add(word, 1);
    syscall(SYS_futex, word, FUTEX_WAKE, 0x7fffffff, NULL, NULL, 0);
}

static void wake_all(struct board_shared *shared)
{
    bump(&shared->generation);
}

void board_abort(struct board *board)
{
    atomic_store(&board->shared->aborted, 1);
    wake_all(board->shared);
    bump(&board->shared->turn);
}

void board_next_job(struct board *board, const struct job *job)
{
    atomic_store(&board->shared->n_finished, 0);
    put_job(board->shared, job);
    bump(&board->shared->turn);
}

void board_no_more_jobs(struct board *board)
{
    atomic_store(&board->shared->over, 1);
    bump(&board->shared->turn);
}

int board_wait_job(struct board *board, uint32_t *turn)
{
    struct board_shared *shared = board->shared;
    while (atomic_load(&shared->turn) == *turn)
        syscall(SYS_futex, &shared->turn, FUTEX_WAIT, *turn, NULL, NULL, 0);
    *turn = atomic_load(&shared->turn);
    return !atomic_load(&shared->over) && !atomic_load(&shared->aborted);
}

void board_finish(struct board *board)
{
    bump(&board->shared->n_finished);
}

enum epd_status board_wait_finished(struct board *board)
{
    struct board_shared *shared = board->shared;
    const struct timespec limit = {.tv_nsec = 100000000};
    const uint32_t n = atomic_load(&shared->n_finished);
    if (n < shared->job.n_ranks &&
        syscall(SYS_futex, &shared->n_finished, FUTEX_WAIT, n, &limit, NULL, 0) != 0 && errno == EINTR)
        return EPD_EVICTED;
    return atomic_load(&shared->n_finished) == shared->job.n_ranks ? EPD_OK : EPD_TIMEOUT;
}

enum epd_status board_barrier(struct board *board)
{
    struct board_shared *shared = board->shared;
    const uint32_t generation = atomic_load(&shared->generation);
    if (atomic_fetch_add(&shared->n_arrived, 1) + 1 == shared->job.n_ranks) {
        atomic_store(&shared->n_arrived, 0);
        wake_all(shared);
        return atomic_load(&shared->aborted) ? EPD_PEER_LOST : EPD_OK;
    }
    for (int second = 0; second < BOARD_DEADLINE_S; second++) {
        const struct timespec one_second = {.tv_sec = 1};
        while (atomic_load(&shared->generation) == generation)
            if (syscall(SYS_futex, &shared->generation, FUTEX_WAIT, generation, &one_second, NULL, 0) != 0 &&
                errno == ETIMEDOUT)
                break;
        if (atomic_load(&shared->aborted))
            return EPD_PEER_LOST;
        if (atomic_load(&shared->generation) != generation)
            return EPD_OK;
    }
    return EPD_TIMEOUT;
}
