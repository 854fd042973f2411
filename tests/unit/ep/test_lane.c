/* The lane itself: order, jobs that end later, a full ring, and barriers between threads. */
#include <pthread.h>
#include <stdlib.h>

#include "ep/barrier.h"
#include "ep/lane.h"
#include "tests/unit/ep/harness.h"

#define COUNT(array) (sizeof(array) / sizeof *(array))

static struct lane *start_lane(void)
{
    struct epd_error error = {.status = EPD_OK};
    const struct node_config config = {.backend = EPD_BACKEND_HOST, .n_devices = 1};
    struct lane *lane = NULL;
    ck_assert_msg(lane_start(backend_find(EPD_BACKEND_HOST), &config, 0, &lane, &error) == EPD_OK, "%s",
                  error.text);
    return lane;
}

static void drain(struct lane *lane)
{
    while (lane_n_jobs(lane)) {
        lane_wait(lane);
        lane_poll(lane);
    }
}

struct numbered {
    struct lane_job job;
    uint32_t number;
    uint32_t polls_left;
    uint32_t *n_completed; /* loop thread */
};

static void run_nothing(struct lane_job *job, struct lane *lane)
{
    (void)job, (void)lane;
}

static int poll_later(struct lane_job *job, struct lane *lane)
{
    struct numbered *numbered = (struct numbered *)job;
    (void)lane;
    return numbered->polls_left-- == 0;
}

static void complete_in_order(struct lane_job *job)
{
    struct numbered *numbered = (struct numbered *)job;
    ck_assert_uint_eq(numbered->number, (*numbered->n_completed)++);
}

/* A job that ends when it is told to. */
struct waiting {
    struct lane_job job;
    _Atomic int may_end;
    int completed; /* loop thread */
};

static int poll_waiting(struct lane_job *job, struct lane *lane)
{
    (void)lane;
    return atomic_load(&((struct waiting *)job)->may_end);
}

static void complete_waiting(struct lane_job *job)
{
    ((struct waiting *)job)->completed = 1;
}

/* A step may wait for a client that waits for the answer to its next request. */
START_TEST(a_job_that_ends_later_holds_up_nobody)
{
    struct waiting first = {.job = {.run = run_nothing, .poll = poll_waiting, .complete = complete_waiting}};
    struct numbered jobs[8];
    uint32_t n_completed = 0;
    struct lane *lane = start_lane();
    lane_submit(lane, &first.job);
    for (uint32_t i = 0; i < COUNT(jobs); i++) {
        jobs[i] = (struct numbered){
            .job = {.run = run_nothing, .poll = i % 2 ? NULL : poll_later, .complete = complete_in_order},
            .number = i,
            .n_completed = &n_completed,
        };
        lane_submit(lane, &jobs[i].job);
    }
    while (n_completed < COUNT(jobs)) {
        lane_wait(lane);
        lane_poll(lane);
    }
    ck_assert(!first.completed);
    atomic_store(&first.may_end, 1);
    drain(lane);
    ck_assert(first.completed);
    lane_stop(lane);
}
END_TEST

START_TEST(a_full_ring_refuses_steps_but_no_housekeeping)
{
    enum { N = 5000 };
    static struct numbered jobs[N];
    uint32_t n_completed = 0, refused_at = 0;
    struct lane *lane = start_lane();
    for (uint32_t i = 0; i < N; i++) {
        jobs[i] = (struct numbered){.job = {.run = run_nothing, .complete = complete_in_order},
                                    .number = i,
                                    .n_completed = &n_completed};
        if (!refused_at && !lane_has_room(lane))
            refused_at = i;
        lane_post(lane, &jobs[i].job);
    }
    ck_assert_uint_eq(refused_at, 1024);
    ck_assert_uint_eq(lane_n_jobs(lane), N);
    drain(lane);
    ck_assert_uint_eq(n_completed, N);
    ck_assert(lane_has_room(lane));
    lane_stop(lane);
}
END_TEST

enum { N_THREADS = 4, N_ROUNDS = 300 };

struct meeting {
    struct barrier barrier;
    _Atomic uint32_t n_inside;
    _Atomic uint32_t n_released;
};

static void *meet_often(void *arg)
{
    struct meeting *meeting = arg;
    for (uint32_t round = 1; round <= N_ROUNDS; round++) {
        atomic_fetch_add(&meeting->n_inside, 1);
        ck_assert(barrier_wait(&meeting->barrier));
        ck_assert_uint_ge(atomic_load(&meeting->n_inside), round * N_THREADS);
    }
    return NULL;
}

START_TEST(nobody_passes_a_barrier_before_all_have_come)
{
    struct meeting meeting = {.n_inside = 0};
    pthread_t threads[N_THREADS];
    barrier_init(&meeting.barrier, N_THREADS);
    for (int i = 0; i < N_THREADS; i++)
        ck_assert_int_eq(pthread_create(&threads[i], NULL, meet_often, &meeting), 0);
    for (int i = 0; i < N_THREADS; i++)
        pthread_join(threads[i], NULL);
    ck_assert_uint_eq(atomic_load(&meeting.n_inside), N_THREADS * N_ROUNDS);
}
END_TEST

static void *wait_for_abort(void *arg)
{
    struct meeting *meeting = arg;
    while (barrier_wait(&meeting->barrier))
        ;
    atomic_fetch_add(&meeting->n_released, 1);
    return NULL;
}

START_TEST(an_aborted_barrier_releases_all)
{
    struct meeting meeting = {.n_inside = 0};
    pthread_t threads[N_THREADS - 1];
    barrier_init(&meeting.barrier, N_THREADS);
    for (int i = 0; i < N_THREADS - 1; i++)
        ck_assert_int_eq(pthread_create(&threads[i], NULL, wait_for_abort, &meeting), 0);
    ck_assert(barrier_wait(&meeting.barrier));
    barrier_abort(&meeting.barrier);
    ck_assert(!barrier_wait(&meeting.barrier));
    for (int i = 0; i < N_THREADS - 1; i++)
        pthread_join(threads[i], NULL);
    ck_assert_uint_eq(atomic_load(&meeting.n_released), N_THREADS - 1);
}
END_TEST

int main(void)
{
    const TTest *const tests[] = {
        a_job_that_ends_later_holds_up_nobody,
        a_full_ring_refuses_steps_but_no_housekeeping,
        nobody_passes_a_barrier_before_all_have_come,
        an_aborted_barrier_releases_all,
    };
    return suite_run("ep lane", tests, COUNT(tests));
}
