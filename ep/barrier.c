#include "ep/barrier.h"

#include "ep/futex.h"

/* Looks before sleeping: some 5 us, about what a sleep and wake-up costs. */
#define BARRIER_SPINS 100

void barrier_init(struct barrier *barrier, uint32_t n_lanes)
{
    barrier->n_lanes = n_lanes;
    atomic_store(&barrier->n_arrived, 0);
    atomic_store(&barrier->generation, 0);
    atomic_store(&barrier->aborted, 0);
}

static void barrier_release(struct barrier *barrier)
{
    atomic_fetch_add(&barrier->generation, 1);
    futex_wake_all(&barrier->generation);
}

uint32_t barrier_arrive(struct barrier *barrier)
{
    const uint32_t generation = atomic_load(&barrier->generation);
    if (atomic_load(&barrier->aborted) || atomic_fetch_add(&barrier->n_arrived, 1) + 1 < barrier->n_lanes)
        return generation;
    atomic_store(&barrier->n_arrived, 0);
    barrier_release(barrier);
    return generation;
}

enum barrier_seen barrier_look(struct barrier *barrier, uint32_t arrived)
{
    for (int i = 0; i < BARRIER_SPINS && atomic_load(&barrier->generation) == arrived; i++)
        futex_relax();
    if (atomic_load(&barrier->aborted))
        return BARRIER_ABORTED;
    return atomic_load(&barrier->generation) == arrived ? BARRIER_NOT_YET : BARRIER_PASSED;
}

int barrier_wait(struct barrier *barrier)
{
    if (barrier->n_lanes == 1)
        return !atomic_load(&barrier->aborted);
    const uint32_t arrived = barrier_arrive(barrier);
    enum barrier_seen seen = barrier_look(barrier, arrived);
    while (seen == BARRIER_NOT_YET) {
        futex_wait(&barrier->generation, arrived, NULL);
        seen = barrier_look(barrier, arrived);
    }
    return seen == BARRIER_PASSED;
}

void barrier_abort(struct barrier *barrier)
{
    atomic_store(&barrier->aborted, 1);
    barrier_release(barrier);
}
