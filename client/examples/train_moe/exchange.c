#include "exchange.h"

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

/* How long a rank waits for the others in one exchange: a step takes milliseconds, a stopped neighbour is an
 * error. */
#define EXCHANGE_DEADLINE_S 120

struct exchange_shared {
    _Atomic uint32_t generation; /* futex; grows when all ranks have arrived */
    _Atomic uint32_t n_arrived;
    _Atomic uint32_t aborted;
    uint32_t reserved;
    double partial_loss[2][MAX_RANKS];
    uint32_t well[2][MAX_RANKS]; /* votes */
    /* then: double losses[2][n_steps]; float slots[2][n_ranks][n_floats] */
};

static size_t shared_size(const struct settings *settings, size_t n_floats)
{
    return sizeof(struct exchange_shared) + 2 * (size_t)settings->n_steps * sizeof(double) +
           2 * (size_t)settings->n_ranks * n_floats * sizeof(float);
}

enum epd_status exchange_create(struct exchange *exchange, const struct settings *settings, size_t n_floats,
                                int *fd)
{
    int memory = memfd_create("train-moe-exchange", 0); /* no MFD_CLOEXEC: the ranks inherit it */
    if (memory < 0 || ftruncate(memory, (off_t)shared_size(settings, n_floats)) != 0) {
        fprintf(stderr, "epd-train-moe: shared memory of %zu bytes: %s\n", shared_size(settings, n_floats),
                strerror(errno));
        if (memory >= 0)
            close(memory);
        return EPD_SYSTEM;
    }
    enum epd_status status = exchange_open(exchange, settings, n_floats, memory);
    if (status == EPD_OK)
        *fd = memory;
    else
        close(memory);
    return status;
}

enum epd_status exchange_open(struct exchange *exchange, const struct settings *settings, size_t n_floats,
                              int fd)
{
    const size_t n_bytes = shared_size(settings, n_floats);
    struct stat stat;
    if (fstat(fd, &stat) != 0 || (size_t)stat.st_size != n_bytes) {
        fprintf(stderr, "epd-train-moe: fd %d is not the launcher's memory of %zu bytes\n", fd, n_bytes);
        return EPD_INVALID_ARGUMENT;
    }
    void *memory = mmap(NULL, n_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (memory == MAP_FAILED) {
        fprintf(stderr, "epd-train-moe: mapping %zu bytes: %s\n", n_bytes, strerror(errno));
        return EPD_SYSTEM;
    }
    *exchange = (struct exchange){
        .shared = memory, .shared_bytes = n_bytes, .settings = settings, .n_floats = n_floats};
    return EPD_OK;
}

void exchange_close(struct exchange *exchange)
{
    if (exchange->shared)
        munmap(exchange->shared, exchange->shared_bytes);
    *exchange = (struct exchange){0};
}

double *exchange_losses(struct exchange *exchange)
{
    return (double *)(exchange->shared + 1);
}

double *exchange_reference_losses(struct exchange *exchange)
{
    return exchange_losses(exchange) + exchange->settings->n_steps;
}

static float *exchange_slot(struct exchange *exchange, uint32_t half, uint32_t rank)
{
    float *slots = (float *)(exchange_losses(exchange) + 2 * (size_t)exchange->settings->n_steps);
    return slots + ((size_t)half * exchange->settings->n_ranks + rank) * exchange->n_floats;
}

static void futex_wake_all(_Atomic uint32_t *word)
{
    syscall(SYS_futex, word, FUTEX_WAKE, 0x7fffffff, NULL, NULL, 0);
}

void exchange_abort(struct exchange *exchange)
{
    atomic_store(&exchange->shared->aborted, 1);
    atomic_fetch_add(&exchange->shared->generation, 1);
    futex_wake_all(&exchange->shared->generation);
}

static enum epd_status exchange_barrier(struct exchange *exchange)
{
    struct exchange_shared *shared = exchange->shared;
    const uint32_t generation = atomic_load(&shared->generation);
    if (atomic_fetch_add(&shared->n_arrived, 1) + 1 == exchange->settings->n_ranks) {
        atomic_store(&shared->n_arrived, 0);
        atomic_fetch_add(&shared->generation, 1);
        futex_wake_all(&shared->generation);
        return atomic_load(&shared->aborted) ? EPD_PEER_LOST : EPD_OK;
    }
    for (int second = 0; second < EXCHANGE_DEADLINE_S; second++) {
        const struct timespec one_second = {.tv_sec = 1};
        while (atomic_load(&shared->generation) == generation) {
            if (syscall(SYS_futex, &shared->generation, FUTEX_WAIT, generation, &one_second, NULL, 0) != 0 &&
                errno == ETIMEDOUT)
                break;
        }
        if (atomic_load(&shared->aborted))
            return EPD_PEER_LOST;
        if (atomic_load(&shared->generation) != generation)
            return EPD_OK;
    }
    return EPD_TIMEOUT;
}

enum epd_status exchange_sum(struct exchange *exchange, float *values, double *loss)
{
    /* Two halves in turn: a rank that is already in the next exchange writes where nobody reads any more. */
    const uint32_t half = exchange->turn++ % 2;
    const uint32_t n_ranks = exchange->settings->n_ranks;
    struct exchange_shared *shared = exchange->shared;
    memcpy(exchange_slot(exchange, half, (uint32_t)exchange->settings->rank), values,
           exchange->n_floats * sizeof(float));
    shared->partial_loss[half][exchange->settings->rank] = *loss;
    enum epd_status status = exchange_barrier(exchange);
    if (status != EPD_OK)
        return status;
    memcpy(values, exchange_slot(exchange, half, 0), exchange->n_floats * sizeof(float));
    double sum = shared->partial_loss[half][0];
    for (uint32_t rank = 1; rank < n_ranks; rank++) {
        const float *slot = exchange_slot(exchange, half, rank);
        for (size_t i = 0; i < exchange->n_floats; i++)
            values[i] += slot[i];
        sum += shared->partial_loss[half][rank];
    }
    *loss = sum;
    return EPD_OK;
}

enum epd_status exchange_vote(struct exchange *exchange, int well, int *all_well)
{
    const uint32_t half = exchange->turn++ % 2;
    struct exchange_shared *shared = exchange->shared;
    shared->well[half][exchange->settings->rank] = well != 0;
    enum epd_status status = exchange_barrier(exchange);
    if (status != EPD_OK)
        return status;
    *all_well = 1;
    for (uint32_t rank = 0; rank < exchange->settings->n_ranks; rank++)
        *all_well = *all_well && shared->well[half][rank];
    return EPD_OK;
}
