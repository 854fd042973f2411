/* Quiet moments: on all lanes at once, and never while one of them is at work. */
#include <time.h>

#include "ep/quiet.h"
#include "tests/unit/ep/harness.h"

#define N_LANES      3
#define COUNT(array) (sizeof(array) / sizeof *(array))

/* What lanes do in the moment: each looks whether all others are there. */
struct moment {
    _Atomic uint32_t n_inside, n_ran, n_missed;
    _Atomic int busy; /* a lane is at work */
    int done;
};

static void sleep_ms(long ms)
{
    const struct timespec time = {.tv_nsec = ms * 1000000};
    nanosleep(&time, NULL);
}

static void run(void *arg, struct lane *lane)
{
    struct moment *moment = arg;
    (void)lane;
    atomic_fetch_add(&moment->n_inside, 1);
    for (int i = 0; i < 2000 && atomic_load(&moment->n_inside) < N_LANES; i++)
        sleep_ms(1);
    if (atomic_load(&moment->n_inside) < N_LANES || atomic_load(&moment->busy))
        atomic_fetch_add(&moment->n_missed, 1);
    atomic_fetch_add(&moment->n_ran, 1);
}

static void on_done(void *arg)
{
    ((struct moment *)arg)->done++;
}

struct work {
    struct lane_job job;
    struct moment *moment;
    int left;
};

/* Some 50 ms of work, in several jobs' worth of turns of the lane. */
static void run_work(struct lane_job *job, struct lane *lane)
{
    struct work *work = (struct work *)job;
    (void)lane;
    atomic_fetch_add(&work->moment->busy, 1);
    sleep_ms(50);
    atomic_fetch_sub(&work->moment->busy, 1);
}

static void complete_work(struct lane_job *job)
{
    ((struct work *)job)->left = 0;
}

static void post(struct harness *harness, struct moment *moment)
{
    struct epd_error error;
    struct quiet *quiet;
    ck_assert_int_eq(quiet_create(harness->node, run, on_done, moment, &quiet, &error), EPD_OK);
    quiet_post(quiet);
}

START_TEST(all_lanes_are_in_it_at_once)
{
    struct harness harness;
    struct moment moments[4] = {0};
    harness_open(&harness, N_LANES, 0);
    for (size_t i = 0; i < COUNT(moments); i++)
        post(&harness, &moments[i]);
    for (size_t i = 0; i < COUNT(moments); i++) {
        harness_wait(&harness, &moments[i].done);
        ck_assert_uint_eq(atomic_load(&moments[i].n_ran), N_LANES);
        ck_assert_uint_eq(atomic_load(&moments[i].n_missed), 0);
    }
    harness_settle(&harness);
    for (size_t i = 0; i < COUNT(moments); i++)
        ck_assert_int_eq(moments[i].done, 1);
    harness_close(&harness);
}
END_TEST

START_TEST(a_lane_at_work_is_waited_for_and_holds_up_nobody)
{
    struct harness harness;
    struct moment moment = {0};
    struct work works[8];
    harness_open(&harness, N_LANES, 0);
    post(&harness, &moment);
    for (size_t i = 0; i < COUNT(works); i++) {
        works[i] =
            (struct work){.job = {.run = run_work, .complete = complete_work}, .moment = &moment, .left = 1};
        lane_post(harness.node->lanes[i % 2], &works[i].job);
    }
    harness_wait(&harness, &moment.done);
    harness_settle(&harness);
    ck_assert_uint_eq(atomic_load(&moment.n_missed), 0);
    ck_assert_uint_eq(atomic_load(&moment.n_ran), N_LANES);
    for (size_t i = 0; i < COUNT(works); i++)
        ck_assert_int_eq(works[i].left, 0);
    harness_close(&harness);
}
END_TEST

static void run_shortly(struct lane_job *job, struct lane *lane)
{
    const struct timespec time = {.tv_nsec = 100000};
    (void)job, (void)lane;
    nanosleep(&time, NULL);
}

/* A lane waits for the moment, and another one's part of it has not left the loop. */
START_TEST(a_node_closes_though_a_moment_waits_behind_a_full_ring)
{
    enum { N = 1500 };
    static struct work works[N];
    struct harness harness;
    struct moment moment = {0};
    harness_open(&harness, N_LANES, 0);
    for (size_t i = 0; i < N; i++) {
        works[i] = (struct work){.job = {.run = run_shortly, .complete = complete_work}, .left = 1};
        lane_post(harness.node->lanes[1], &works[i].job);
    }
    post(&harness, &moment);
    node_close(harness.node);
    ck_assert_int_eq(moment.done, 1);
    for (size_t i = 0; i < N; i++)
        ck_assert_int_eq(works[i].left, 0);
}
END_TEST

int main(void)
{
    const TTest *const tests[] = {all_lanes_are_in_it_at_once,
                                  a_lane_at_work_is_waited_for_and_holds_up_nobody,
                                  a_node_closes_though_a_moment_waits_behind_a_full_ring};
    return suite_run("ep quiet", tests, COUNT(tests));
}
