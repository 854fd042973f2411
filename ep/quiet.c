#include "ep/quiet.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <time.h>

#include "ep/clock.h"
#include "ep/futex.h"

/* Lanes look for each other at the beginning of every period, for so long: idle ones wait no longer than that. */
#define QUIET_PERIOD_NS 20000000ull
#define QUIET_WINDOW_NS 300000ull
/* If they have not met in so long they stand still, for so long at most: some steps. Each time that it was in vain both
 * double, up to these. So nobody is held up for more than a tenth of the time, and for more than one per cent of it in the
 * end. */
#define QUIET_PATIENCE_NS     100000000ull
#define QUIET_HOLD_NS         10000000ull
#define QUIET_MAX_PATIENCE_NS 10000000000ull
#define QUIET_MAX_HOLD_NS     100000000ull

struct quiet_lane {
    struct lane_job job;
    struct quiet *quiet;
};

/* How a hold comes out: the same for all lanes. */
enum quiet_hold {
    HOLD_OPEN,
    HOLD_MET, /* all are idle, and nobody puts anything in */
    HOLD_OFF, /* one of them has waited long enough */
};

struct quiet {
    struct node *node; /* borrowed */
    void (*run)(void *arg, struct lane *lane);
    void (*done)(void *arg);
    void *arg;
    uint32_t n_lanes;
    _Atomic uint32_t n_met;   /* lanes that are here; once it is n_lanes it stays so */
    _Atomic uint32_t n_ended; /* that have run */
    _Atomic uint32_t hold;    /* enum quiet_hold */
    /* Loop thread; lanes read them while their jobs are out. */
    uint64_t patience_ns, hold_ns;
    uint64_t until_ns; /* looking for each other in windows */
    uint32_t n_left;
    int holds; /* the jobs that are out stand still */
    struct quiet_lane lanes[];
};

static struct quiet_lane *lane_of_job(struct lane_job *job)
{
    return (struct quiet_lane *)((char *)job - offsetof(struct quiet_lane, job));
}

static int is_idle(struct lane *lane)
{
    return lane_backend(lane)->device_idle(lane_device(lane));
}

/* All lanes are here. */
static void run_lane(struct quiet *quiet, struct lane *lane)
{
    const struct timespec nap = {.tv_nsec = 50000};
    quiet->run(quiet->arg, lane);
    atomic_fetch_add(&quiet->n_ended, 1);
    while (atomic_load(&quiet->n_ended) < quiet->n_lanes)
        (void)nanosleep(&nap, NULL);
}

/* ---- in windows ---- */

static int in_window(void)
{
    return clock_now_ns() % QUIET_PERIOD_NS < QUIET_WINDOW_NS;
}

/* 0 if not all lanes have come in this window. */
static int meet(struct quiet *quiet)
{
    uint32_t met = atomic_fetch_add(&quiet->n_met, 1) + 1;
    while (met < quiet->n_lanes) {
        if (!in_window() && atomic_compare_exchange_strong(&quiet->n_met, &met, met - 1))
            return 0;
        futex_relax();
        met = atomic_load(&quiet->n_met);
    }
    return 1;
}

/* A lane that leaves is missed by the others, which then leave as well. */
static int poll_window(struct lane_job *job, struct lane *lane)
{
    struct quiet *quiet = lane_of_job(job)->quiet;
    if (!in_window())
        return clock_now_ns() > quiet->until_ns;
    if (!is_idle(lane) || !meet(quiet))
        return 0;
    run_lane(quiet, lane);
    return 1;
}

static void run_nothing(struct lane_job *job, struct lane *lane)
{
    (void)job, (void)lane;
}

/* ---- standing still ---- */

/* What is in the queue of one lane may wait for what another has yet to put in: not here, for all stand at the same place
 * in the order of jobs, and each gets to it. */
static int hold_until_idle(struct quiet *quiet, struct lane *lane)
{
    const struct timespec nap = {.tv_nsec = 20000};
    const uint64_t until_ns = clock_now_ns() + quiet->hold_ns;
    int counted = 0;
    while (atomic_load(&quiet->hold) == HOLD_OPEN) {
        uint32_t open = HOLD_OPEN;
        if (!counted && is_idle(lane)) {
            counted = 1;
            if (atomic_fetch_add(&quiet->n_met, 1) + 1 == quiet->n_lanes)
                (void)atomic_compare_exchange_strong(&quiet->hold, &open, HOLD_MET);
        } else if (clock_now_ns() > until_ns) {
            (void)atomic_compare_exchange_strong(&quiet->hold, &open, HOLD_OFF);
        } else {
            (void)nanosleep(&nap, NULL);
        }
    }
    return atomic_load(&quiet->hold) == HOLD_MET;
}

static void run_hold(struct lane_job *job, struct lane *lane)
{
    struct quiet *quiet = lane_of_job(job)->quiet;
    if (hold_until_idle(quiet, lane))
        run_lane(quiet, lane);
}

/* ---- loop thread ---- */

static void complete_lane(struct lane_job *job);

/* On all lanes in one go, as steps are. */
static void post(struct quiet *quiet, int holds)
{
    quiet->holds = holds;
    quiet->n_left = quiet->n_lanes;
    quiet->until_ns = clock_now_ns() + quiet->patience_ns;
    atomic_store(&quiet->n_met, 0);
    atomic_store(&quiet->hold, HOLD_OPEN);
    for (uint32_t i = 0; i < quiet->n_lanes; i++) {
        quiet->lanes[i].quiet = quiet;
        quiet->lanes[i].job = (struct lane_job){.run = holds ? run_hold : run_nothing,
                                                .poll = holds ? NULL : poll_window,
                                                .complete = complete_lane,
                                                .what = "a moment in which nothing runs"};
        lane_post(quiet->node->lanes[i], &quiet->lanes[i].job);
    }
}

static uint64_t doubled(uint64_t value, uint64_t most)
{
    return value < most / 2 ? 2 * value : most;
}

static void complete_lane(struct lane_job *job)
{
    struct quiet *quiet = lane_of_job(job)->quiet;
    if (--quiet->n_left)
        return;
    if (atomic_load(&quiet->n_ended) == quiet->n_lanes) {
        quiet->done(quiet->arg);
        free(quiet);
        return;
    }
    if (quiet->holds) {
        quiet->patience_ns = doubled(quiet->patience_ns, QUIET_MAX_PATIENCE_NS);
        quiet->hold_ns = doubled(quiet->hold_ns, QUIET_MAX_HOLD_NS);
    }
    post(quiet, !quiet->holds);
}

enum epd_status quiet_create(struct node *node, void (*run)(void *arg, struct lane *lane),
                             void (*done)(void *arg), void *arg, struct quiet **quiet,
                             struct epd_error *error)
{
    struct quiet *created = calloc(1, sizeof *created + node->n_devices * sizeof created->lanes[0]);
    if (!created)
        return error_set(error, EPD_NO_MEMORY, "quiet: %u lanes", node->n_devices);
    created->node = node;
    created->run = run;
    created->done = done;
    created->arg = arg;
    created->n_lanes = node->n_devices;
    created->patience_ns = QUIET_PATIENCE_NS;
    created->hold_ns = QUIET_HOLD_NS;
    *quiet = created;
    return EPD_OK;
}

void quiet_post(struct quiet *quiet)
{
    post(quiet, 0);
}

void quiet_destroy(struct quiet *quiet)
{
    free(quiet);
}
