#include "tests/fault/bystander.h"

#include <check.h>
#include <sys/mman.h>
#include <time.h>

#include "tests/fault/workload.h"

#define PAUSE_US   1000 /* between steps: the machine may have two cores */
#define DEADLINE_S 60

static void nap(long us)
{
    struct timespec t = {.tv_sec = us / 1000000, .tv_nsec = us % 1000000 * 1000};
    nanosleep(&t, NULL);
}

/* Rank 0 says which step comes next and which is the last, so that both ranks make the same number. */
static int next_step(struct bystander_shared *shared, unsigned rank, unsigned long step)
{
    if (rank == 0) {
        if (atomic_load(&shared->stop)) {
            atomic_store(&shared->end, step);
            return 0;
        }
        atomic_store(&shared->go, step + 1);
        return 1;
    }
    while (atomic_load(&shared->go) <= step) {
        if (atomic_load(&shared->end) == step && atomic_load(&shared->stop))
            return 0;
        nap(100);
    }
    return 1;
}

static void rank_main(const struct rank *rank)
{
    struct bystander_shared *shared = *(struct bystander_shared *const *)rank->arg;
    struct workload w;
    workload_open(&w, rank, &workload_case, 0);
    for (unsigned long step = 0; next_step(shared, rank->rank, step); step++) {
        RANK_CHECK(workload_step(&w) == EPD_OK);
        nap(PAUSE_US);
    }
    workload_close(&w);
}

void bystander_start(struct bystander *b, const char *socket_path)
{
    b->shared = mmap(NULL, sizeof *b->shared, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    ck_assert_ptr_ne(b->shared, MAP_FAILED);
    atomic_store(&b->shared->end, ~0ul);
    ranks_start(&b->team, socket_path, "bystander", 2, rank_main, &b->shared);
    for (int waited = 0; atomic_load(&b->shared->go) < 2; waited++) {
        ck_assert_msg(waited < 30000, "the bystanders do not get going");
        nap(1000);
    }
}

void bystander_stop(struct bystander *b)
{
    const unsigned long before = atomic_load(&b->shared->go);
    for (int waited = 0; atomic_load(&b->shared->go) == before && waited < 10000; waited++)
        nap(1000); /* one step more after all that has happened */
    ck_assert_msg(atomic_load(&b->shared->go) > before, "the bystanders are stuck");
    atomic_store(&b->shared->stop, 1);
    ck_assert_uint_eq(ranks_wait(&b->team, DEADLINE_S), 0);
    munmap(b->shared, sizeof *b->shared);
}
