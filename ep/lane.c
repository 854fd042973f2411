#include "ep/lane.h"

#include <assert.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "ep/clock.h"
#include "ep/futex.h"
#include "ep/reclaim.h"

/* Jobs that may be out at once, ended but not yet polled ones included: so neither ring can overflow. */
#define LANE_RING_JOBS 1024u
/* How long an idle lane looks for the next job before it sleeps: the gap between two launches of a client
 * that waits for each. An idle daemon sleeps. */
#define LANE_SPIN_NS 20000u
/* How often a lane that has nothing else to do looks at a device that works by itself. */
#define LANE_POLL_NS 20000
/* How long lane_wait sleeps at most. */
#define LANE_WAIT_NS 5000000

struct lane_ring {
    struct lane_job *jobs[LANE_RING_JOBS];
    _Atomic uint32_t n_put, n_taken; /* ever; one thread puts, one takes */
};

struct lane {
    const struct backend *backend;
    const struct node_config *config; /* borrowed until the lane has started */
    void (*notify)(void *arg);
    void *notify_arg;
    uint32_t device_idx;
    pthread_t thread;
    uint32_t spin_ns;

    struct lane_ring in;     /* loop -> lane */
    struct lane_ring out;    /* lane -> loop */
    _Atomic uint32_t bell;   /* futex word: a job was put, or stop */
    _Atomic uint32_t asleep; /* the lane is about to wait for the bell */
    _Atomic uint32_t ended;  /* futex word: jobs ever ended */
    _Atomic uint32_t waited; /* lane_wait is about to wait for it */
    _Atomic uint32_t stopping;

    /* Loop thread. */
    uint32_t n_out; /* in a ring or running */
    uint32_t n_backlog;
    struct lane_job *backlog_first, *backlog_last;
    struct epd_error given_up; /* the first reason, written before gave_up */
    _Atomic int gave_up;       /* read by the lane */

    /* Lane thread. */
    struct backend_device *device;
    struct heap heap;
    struct reclaim reclaim;
    struct lane_job *pending_first, *pending_last; /* run, not yet ended */
    struct epd_error lost;                         /* EPD_OK: the device is well, as far as anybody knows */

    /* Written before lane_start returns. */
    struct device_info info;
    struct epd_error open_error;
    _Atomic uint32_t opened; /* futex word */

    _Atomic uint64_t jobs_done, busy_ns, imported_bytes;
    _Atomic uint32_t n_imports;
    const char *_Atomic doing; /* static words */
};

static void ring_put(struct lane_ring *ring, struct lane_job *job)
{
    uint32_t n_put = atomic_load_explicit(&ring->n_put, memory_order_relaxed);
    assert(n_put - atomic_load_explicit(&ring->n_taken, memory_order_acquire) < LANE_RING_JOBS);
    ring->jobs[n_put % LANE_RING_JOBS] = job;
    atomic_store(&ring->n_put, n_put + 1);
}

static struct lane_job *ring_take(struct lane_ring *ring)
{
    uint32_t n_taken = atomic_load_explicit(&ring->n_taken, memory_order_relaxed);
    if (n_taken == atomic_load(&ring->n_put))
        return NULL;
    struct lane_job *job = ring->jobs[n_taken % LANE_RING_JOBS];
    atomic_store_explicit(&ring->n_taken, n_taken + 1, memory_order_release);
    return job;
}

static int ring_empty(struct lane_ring *ring)
{
    return atomic_load(&ring->n_put) == atomic_load(&ring->n_taken);
}

/* Lane thread. */

static void lane_do(struct lane *lane, const char *what)
{
    atomic_store_explicit(&lane->doing, what, memory_order_relaxed);
}

static void lane_give_back(struct lane *lane)
{
    if (!reclaim_look(&lane->reclaim))
        return;
    lane_do(lane, "memory that is unmapped");
    lane_count_import(lane, -(int64_t)reclaim_end(&lane->reclaim), 0);
}

static void lane_end(struct lane *lane, struct lane_job *job)
{
    atomic_fetch_add_explicit(&lane->jobs_done, 1, memory_order_relaxed);
    ring_put(&lane->out, job);
    atomic_fetch_add(&lane->ended, 1);
    if (atomic_load(&lane->waited))
        futex_wake_all(&lane->ended);
    if (lane->notify)
        lane->notify(lane->notify_arg);
}

/* Jobs of one queue end in its order; jobs of different queues in any. */
static void lane_poll_pending(struct lane *lane)
{
    struct lane_job **link = &lane->pending_first, *last = NULL;
    while (*link) {
        struct lane_job *job = *link;
        lane_do(lane, job->what);
        if (job->poll(job, lane)) {
            *link = job->next;
            lane_end(lane, job);
        } else {
            last = job;
            link = &job->next;
        }
    }
    lane->pending_last = last;
}

static void lane_run_job(struct lane *lane, struct lane_job *job)
{
    uint64_t begin_ns = clock_now_ns();
    lane_do(lane, job->what);
    job->run(job, lane);
    lane_give_back(lane);
    job->next = NULL;
    if (!job->poll) {
        lane_end(lane, job);
    } else if (lane->pending_first) {
        lane->pending_last = lane->pending_last->next = job;
    } else {
        lane->pending_first = lane->pending_last = job;
    }
    lane_poll_pending(lane);
    atomic_fetch_add_explicit(&lane->busy_ns, clock_now_ns() - begin_ns, memory_order_relaxed);
}

/* Whether there is something to look after while no job comes. */
static int lane_is_pending(const struct lane *lane)
{
    return lane->pending_first || lane->reclaim.waits;
}

/* Waits for the bell: spins, then sleeps. Returns without it only while something is pending. */
static void lane_idle(struct lane *lane)
{
    const struct timespec poll_interval = {.tv_nsec = LANE_POLL_NS};
    uint64_t until_ns = clock_now_ns() + lane->spin_ns;
    do {
        for (int i = 0; i < 16; i++) {
            if (!ring_empty(&lane->in))
                return;
            futex_relax();
        }
    } while (clock_now_ns() < until_ns);

    uint32_t bell = atomic_load(&lane->bell);
    atomic_store(&lane->asleep, 1);
    if (ring_empty(&lane->in) && !atomic_load(&lane->stopping))
        futex_wait(&lane->bell, bell, lane_is_pending(lane) ? &poll_interval : NULL);
    atomic_store(&lane->asleep, 0);
}

/* No job is taken: its queues run empty. */
static void lane_hold(struct lane *lane)
{
    const struct timespec poll_interval = {.tv_nsec = LANE_POLL_NS};
    lane_do(lane, "queues that run empty");
    (void)nanosleep(&poll_interval, NULL);
}

static void lane_open_device(struct lane *lane)
{
    const struct backend *backend = lane->backend;
    lane->open_error.status = EPD_OK;
    if (backend->device_open(lane->config, lane->device_idx, &lane->device, &lane->info, &lane->open_error) ==
        EPD_OK)
        heap_init(&lane->heap, backend, lane->device, lane->device_idx, lane->config->heap_limit_bytes);
    reclaim_init(&lane->reclaim, backend, lane->device);
    lane->config = NULL;
    atomic_store(&lane->opened, 1);
    futex_wake_all(&lane->opened);
}

static void *lane_main(void *arg)
{
    struct lane *lane = arg;
    lane_open_device(lane);
    if (lane->open_error.status)
        return NULL;
    for (;;) {
        const int holds = reclaim_holds(&lane->reclaim);
        struct lane_job *job = holds ? NULL : ring_take(&lane->in);
        if (job)
            lane_run_job(lane, job);
        else if (holds)
            lane_hold(lane);
        else if (lane->pending_first || !atomic_load(&lane->stopping))
            lane_idle(lane);
        else
            break;
        lane_poll_pending(lane);
        lane_give_back(lane);
    }
    assert(atomic_load(&lane->heap.used_bytes) == 0);
    lane->backend->device_close(lane->device);
    return NULL;
}

const struct backend *lane_backend(const struct lane *lane)
{
    return lane->backend;
}

struct backend_device *lane_device(struct lane *lane)
{
    return lane->device;
}

struct heap *lane_heap(struct lane *lane)
{
    return &lane->heap;
}

void lane_lose_device(struct lane *lane, const struct epd_error *error)
{
    if (lane->lost.status)
        return;
    lane->lost = *error;
    lane->lost.status = EPD_CUDA;
}

enum epd_status lane_check_device(struct lane *lane, struct epd_error *error)
{
    if (!lane->lost.status && atomic_load(&lane->gave_up))
        lane_lose_device(lane, &lane->given_up);
    if (!lane->lost.status)
        return lane->backend->device_check(lane->device, error);
    *error = lane->lost;
    return error->status;
}

void lane_count_import(struct lane *lane, int64_t bytes, int imports)
{
    atomic_fetch_add(&lane->imported_bytes, (uint64_t)bytes);
    atomic_fetch_add(&lane->n_imports, (uint32_t)imports);
}

/* Loop thread. */

/* With fewer cores than threads a spinning lane would only keep the one it waits for from running. */
static uint32_t lane_spin_ns(const struct node_config *config)
{
    return sysconf(_SC_NPROCESSORS_ONLN) > (long)config->n_devices ? LANE_SPIN_NS : 0;
}

enum epd_status lane_start(const struct backend *backend, const struct node_config *config,
                           uint32_t device_idx, struct lane **lane, struct epd_error *error)
{
    struct lane *started = calloc(1, sizeof *started);
    if (!started)
        return error_set(error, EPD_NO_MEMORY, "lane %u: %zu bytes", device_idx, sizeof *started);
    started->backend = backend;
    started->config = config;
    started->notify = config->notify;
    started->notify_arg = config->notify_arg;
    started->device_idx = device_idx;
    started->spin_ns = lane_spin_ns(config);
    int failed = pthread_create(&started->thread, NULL, lane_main, started);
    if (failed) {
        error_set(error, EPD_SYSTEM, "lane %u: pthread_create: %s", device_idx, strerror(failed));
        goto free_lane;
    }
    while (!atomic_load(&started->opened))
        futex_wait(&started->opened, 0, NULL);
    if (started->open_error.status) {
        *error = started->open_error;
        pthread_join(started->thread, NULL);
        goto free_lane;
    }
    *lane = started;
    return EPD_OK;

free_lane:
    free(started);
    return error->status;
}

static void lane_ring_bell(struct lane *lane)
{
    atomic_fetch_add(&lane->bell, 1);
    if (atomic_load(&lane->asleep))
        futex_wake_all(&lane->bell);
}

void lane_stop(struct lane *lane)
{
    assert(lane_n_jobs(lane) == 0);
    atomic_store(&lane->stopping, 1);
    lane_ring_bell(lane);
    pthread_join(lane->thread, NULL);
    free(lane);
}

int lane_has_room(const struct lane *lane)
{
    return lane->n_out < LANE_RING_JOBS && !lane->backlog_first;
}

void lane_submit(struct lane *lane, struct lane_job *job)
{
    assert(lane_has_room(lane));
    lane->n_out++;
    ring_put(&lane->in, job);
    lane_ring_bell(lane);
}

void lane_post(struct lane *lane, struct lane_job *job)
{
    if (lane_has_room(lane)) {
        lane_submit(lane, job);
        return;
    }
    job->next = NULL;
    if (lane->backlog_first)
        lane->backlog_last->next = job;
    else
        lane->backlog_first = job;
    lane->backlog_last = job;
    lane->n_backlog++;
}

static void lane_submit_backlog(struct lane *lane)
{
    while (lane->backlog_first && lane->n_out < LANE_RING_JOBS) {
        struct lane_job *job = lane->backlog_first;
        lane->backlog_first = job->next;
        lane->n_backlog--;
        lane->n_out++;
        ring_put(&lane->in, job);
        lane_ring_bell(lane);
    }
}

uint32_t lane_poll(struct lane *lane)
{
    uint32_t n = 0;
    struct lane_job *job;
    /* At most one ring full, so that jobs which give new ones cannot keep the loop here. */
    while (n < LANE_RING_JOBS && (job = ring_take(&lane->out))) {
        lane->n_out--;
        lane_submit_backlog(lane);
        job->complete(job);
        n++;
    }
    return n;
}

void lane_wait(struct lane *lane)
{
    const struct timespec limit = {.tv_nsec = LANE_WAIT_NS};
    uint32_t ended = atomic_load(&lane->ended);
    atomic_store(&lane->waited, 1);
    if (lane->n_out && ring_empty(&lane->out))
        futex_wait(&lane->ended, ended, &limit);
    atomic_store(&lane->waited, 0);
}

const char *lane_doing(const struct lane *lane)
{
    const char *what = atomic_load_explicit(&lane->doing, memory_order_relaxed);
    return what ? what : "a step or a plan";
}

void lane_give_up(struct lane *lane, const struct epd_error *error)
{
    if (atomic_load(&lane->gave_up))
        return;
    lane->given_up = *error;
    atomic_store(&lane->gave_up, 1);
}

uint32_t lane_n_jobs(const struct lane *lane)
{
    return lane->n_out + lane->n_backlog;
}

void lane_info(const struct lane *lane, struct device_info *info)
{
    *info = lane->info;
    info->heap_bytes = atomic_load(&lane->heap.used_bytes);
    info->heap_peak_bytes = atomic_load(&lane->heap.peak_bytes);
    info->imported_bytes = atomic_load(&lane->imported_bytes);
    info->n_imports = atomic_load(&lane->n_imports);
    info->jobs_done = atomic_load(&lane->jobs_done);
    info->jobs_queued = lane_n_jobs(lane);
    info->busy_ns = atomic_load(&lane->busy_ns);
}
