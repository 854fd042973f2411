#include "ep/quiet.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <time.h>

#include "ep/clock.h"
#include "ep/futex.h"

/* Lanes look for each other at the beginning of every period, for so long: idle ones wait no longer than that. */
#define QUIET_PERIOD_NS 20000000ull
#define QUIET_WINDOW_NS 300000ull

struct quiet_lane {
    struct lane_job job;
    struct quiet *quiet;
};

struct quiet {
    struct node *node; /* borrowed */
    void (*run)(void *arg, struct lane *lane);
    void (*done)(void *arg);
    void *arg;
    uint32_t n_lanes;
    _Atomic uint32_t n_met;   /* lanes that are here; once it is n_lanes it stays so */
    _Atomic uint32_t n_ended; /* that have run */
    uint32_t n_left;          /* loop thread */
    struct quiet_lane lanes[];
};

static struct quiet_lane *lane_of_job(struct lane_job *job)
{
    return (struct quiet_lane *)((char *)job - offsetof(struct quiet_lane, job));
}

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

static int poll_lane(struct lane_job *job, struct lane *lane)
{
    const struct timespec nap = {.tv_nsec = 50000};
    struct quiet *quiet = lane_of_job(job)->quiet;
    if (!in_window() || !lane_backend(lane)->device_idle(lane_device(lane)) || !meet(quiet))
        return 0;
    quiet->run(quiet->arg, lane);
    atomic_fetch_add(&quiet->n_ended, 1);
    while (atomic_load(&quiet->n_ended) < quiet->n_lanes)
        (void)nanosleep(&nap, NULL);
    return 1;
}

static void begin_lane(struct lane_job *job, struct lane *lane)
{
    (void)job, (void)lane;
}

static void complete_lane(struct lane_job *job)
{
    struct quiet *quiet = lane_of_job(job)->quiet;
    if (--quiet->n_left)
        return;
    quiet->done(quiet->arg);
    free(quiet);
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
    created->n_lanes = created->n_left = node->n_devices;
    *quiet = created;
    return EPD_OK;
}

void quiet_post(struct quiet *quiet)
{
    for (uint32_t i = 0; i < quiet->n_lanes; i++) {
        quiet->lanes[i].quiet = quiet;
        quiet->lanes[i].job =
            (struct lane_job){.run = begin_lane, .poll = poll_lane, .complete = complete_lane};
        lane_post(quiet->node->lanes[i], &quiet->lanes[i].job);
    }
}

void quiet_destroy(struct quiet *quiet)
{
    free(quiet);
}
