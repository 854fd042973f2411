#include "ep/device_watch.h"

#include <stddef.h>
#include <stdlib.h>

#include "ep/node_impl.h"

struct look {
    struct lane_job job;
    struct device_watch *watch;
    int under_way; /* loop thread */
    struct epd_error error;
};

struct device_watch {
    struct node *node; /* borrowed */
    void (*lost)(void *arg, const struct epd_error *error);
    void *arg;
    int told;
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

static void look_complete(struct lane_job *job)
{
    struct look *look = look_of_job(job);
    struct device_watch *watch = look->watch;
    look->under_way = 0;
    if (look->error.status != EPD_CUDA || watch->told)
        return;
    watch->told = 1;
    watch->lost(watch->arg, &look->error);
}

enum epd_status device_watch_create(struct node *node, void (*lost)(void *arg, const struct epd_error *error),
                                    void *arg, struct device_watch **watch, struct epd_error *error)
{
    struct device_watch *created = calloc(1, sizeof *created);
    if (!created)
        return error_set(error, EPD_NO_MEMORY, "device watch: %zu bytes", sizeof *created);
    *created = (struct device_watch){.node = node, .lost = lost, .arg = arg};
    *watch = created;
    return EPD_OK;
}

void device_watch_look(struct device_watch *watch)
{
    for (uint32_t i = 0; i < watch->node->n_devices; i++) {
        struct look *look = &watch->looks[i];
        if (look->under_way)
            continue;
        look->watch = watch;
        look->under_way = 1;
        look->job = (struct lane_job){.run = look_run, .complete = look_complete};
        lane_post(watch->node->lanes[i], &look->job);
    }
}

void device_watch_destroy(struct device_watch *watch)
{
    free(watch);
}
