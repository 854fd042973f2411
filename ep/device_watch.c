#include "ep/device_watch.h"

#include <stddef.h>
#include <stdlib.h>

#include "ep/clock.h"
#include "ep/node_impl.h"

/* What may lie between two looks and counts as waiting: in more than that this process did not run itself. */
#define WATCH_MAX_PAUSE_NS 1000000000ull

struct look {
    struct lane_job job;
    struct device_watch *watch;
    /* Loop thread. */
    int under_way;
    int told; /* that it is slow */
    uint64_t waited_ns;
    struct epd_error error; /* the lane's, while it is under way */
};

struct device_watch {
    struct node *node; /* borrowed */
    struct device_watch_rules rules;
    int told;
    uint64_t looked_ns; /* the last time */
    struct look looks[EPD_MAX_DEVICES];
};

static struct look *look_of_job(struct lane_job *job)
{
    return (struct look *)((char *)job - offsetof(struct look, job));
}

/* Lane thread. */
static void look_run(struct lane_job *job, struct lane *lane)
{
    struct look *look = look_of_job(job);
    look->error.status = EPD_OK;
    (void)!lane_check_device(lane, &look->error);
}

static void tell_lost(struct device_watch *watch, const struct epd_error *error)
{
    if (watch->told)
        return;
    watch->told = 1;
    watch->rules.lost(watch->rules.arg, error);
}

static void look_complete(struct lane_job *job)
{
    struct look *look = look_of_job(job);
    look->under_way = 0;
    if (look->error.status == EPD_CUDA)
        tell_lost(look->watch, &look->error);
}

/* A look is the lane's last job: what it waits behind does not end. */
static void judge(struct device_watch *watch, uint32_t device_idx)
{
    const struct look *look = &watch->looks[device_idx];
    const char *doing = lane_doing(watch->node->lanes[device_idx]);
    struct epd_error error;
    if (watch->rules.stuck_ns && look->waited_ns >= watch->rules.stuck_ns) {
        (void)error_set(&error, EPD_CUDA,
                        "device %u: its lane has not gone on for %.3g s, and stands at %s: it is given up",
                        device_idx, (double)look->waited_ns / 1e9, doing);
        tell_lost(watch, &error);
    } else if (look->waited_ns >= watch->rules.slow_ns && !look->told) {
        watch->looks[device_idx].told = 1;
        watch->rules.slow(watch->rules.arg, device_idx, look->waited_ns, doing);
    }
}

enum epd_status device_watch_create(struct node *node, const struct device_watch_rules *rules,
                                    struct device_watch **watch, struct epd_error *error)
{
    struct device_watch *created = calloc(1, sizeof *created);
    if (!created)
        return error_set(error, EPD_NO_MEMORY, "device watch: %zu bytes", sizeof *created);
    *created = (struct device_watch){.node = node, .rules = *rules};
    *watch = created;
    return EPD_OK;
}

void device_watch_limits(struct device_watch *watch, uint64_t slow_ns, uint64_t stuck_ns)
{
    watch->rules.slow_ns = slow_ns;
    watch->rules.stuck_ns = stuck_ns;
}

void device_watch_look(struct device_watch *watch)
{
    const uint64_t now_ns = clock_now_ns(), since_ns = now_ns - watch->looked_ns;
    watch->looked_ns = now_ns;
    for (uint32_t i = 0; i < watch->node->n_devices; i++) {
        struct look *look = &watch->looks[i];
        if (look->under_way) {
            look->waited_ns += since_ns < WATCH_MAX_PAUSE_NS ? since_ns : WATCH_MAX_PAUSE_NS;
            judge(watch, i);
            continue;
        }
        look->watch = watch;
        look->under_way = 1;
        look->told = 0;
        look->waited_ns = 0;
        look->job = (struct lane_job){
            .run = look_run, .complete = look_complete, .what = "a look whether the device is well"};
        lane_post(watch->node->lanes[i], &look->job);
    }
}

void device_watch_destroy(struct device_watch *watch)
{
    free(watch);
}
