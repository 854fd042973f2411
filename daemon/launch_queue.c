#include "daemon/launch_queue.h"

#include <assert.h>
#include <stdlib.h>

#define FIRST_CAPACITY 16

void launch_queue_fini(struct launch_queue *queue)
{
    free(queue->ring);
    *queue = (struct launch_queue){0};
}

struct launch *launch_queue_at(struct launch_queue *queue, uint32_t i)
{
    return &queue->ring[(queue->first + i) & (queue->capacity - 1)];
}

static enum epd_status grow(struct launch_queue *queue, struct epd_error *error)
{
    const uint32_t capacity = queue->capacity ? queue->capacity * 2 : FIRST_CAPACITY;
    struct launch *ring = calloc(capacity, sizeof(*ring));
    if (!ring)
        return error_set(error, EPD_NO_MEMORY, "launch: no memory for a queue of %u", capacity);
    for (uint32_t i = 0; i < queue->count; i++)
        ring[i] = *launch_queue_at(queue, i);
    free(queue->ring);
    queue->ring = ring;
    queue->capacity = capacity;
    queue->first = 0;
    return EPD_OK;
}

enum epd_status launch_queue_append(struct launch_queue *queue, const struct launch *launch,
                                    struct epd_error *error)
{
    if (queue->count == queue->capacity) {
        enum epd_status status = grow(queue, error);
        if (status != EPD_OK)
            return status;
    }
    queue->count++;
    queue->n_launches += launch->n_left;
    *launch_queue_at(queue, queue->count - 1) = *launch;
    return EPD_OK;
}

struct launch *launch_queue_first(struct launch_queue *queue)
{
    return queue->count ? launch_queue_at(queue, 0) : NULL;
}

int launch_queue_pop(struct launch_queue *queue)
{
    struct launch *launch = launch_queue_first(queue);
    assert(launch && launch->n_left > 0);
    launch->seq++;
    queue->n_launches--;
    if (--launch->n_left)
        return 0;
    queue->first = (queue->first + 1) & (queue->capacity - 1);
    queue->count--;
    return 1;
}

uint32_t launch_queue_drop(struct launch_queue *queue)
{
    struct launch *launch = launch_queue_first(queue);
    assert(launch && launch->n_left > 0);
    const uint32_t n_left = launch->n_left;
    queue->n_launches -= n_left - 1;
    launch->n_left = 1;
    (void)launch_queue_pop(queue);
    return n_left;
}
