/* A queue is a stream, its marks are events, and a ticket is a number that the stream writes to host memory
 * behind everything else: looking at it costs no call. */
#include <assert.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "ep/backend_cuda.h"

/* What steps in flight report: at dsv3's sizes 4.2 KiB each. */
#define STAGING_BYTES (8u << 20)
#define STAGING_SLOTS 4096u

/* One copy to host memory, on its way through pinned memory. */
struct copy_out {
    void *dst;
    uint64_t bytes;
    uint64_t end;    /* of its bytes in the ring, counted from the queue's beginning */
    uint64_t ticket; /* the first one behind it */
};

struct backend_queue {
    struct backend_device *device; /* borrowed from the lane */
    struct backend_queue *next;    /* of the device */
    cudaStream_t stream;
    cudaEvent_t marks[BACKEND_MARKS];
    char *pinned;               /* the ticket's word, then the staging ring; owned */
    _Atomic uint64_t *reached;  /* in pinned */
    CUdeviceptr reached_device; /* the same as the device sees it */
    uint64_t n_tickets;         /* ever given */
    struct copy_out copies[STAGING_SLOTS];
    uint64_t n_put, n_taken;     /* copies, ever */
    uint64_t put_end, taken_end; /* their bytes, ever */
};

#define TICKET_BYTES 64u

static enum epd_status make_pinned(struct backend_queue *queue, struct epd_error *error)
{
    void *device_word;
    if (cuda_runtime_check(cudaHostAlloc((void **)&queue->pinned, TICKET_BYTES + STAGING_BYTES,
                                         cudaHostAllocPortable | cudaHostAllocMapped),
                           "pinned memory", error))
        return error->status;
    memset(queue->pinned, 0, TICKET_BYTES);
    if (cuda_runtime_check(cudaHostGetDevicePointer(&device_word, queue->pinned, 0), "pinned memory", error))
        return error->status;
    queue->reached = (_Atomic uint64_t *)(void *)queue->pinned;
    queue->reached_device = (CUdeviceptr)(uintptr_t)device_word;
    return EPD_OK;
}

static enum epd_status make_stream(struct backend_queue *queue, struct epd_error *error)
{
    if (cuda_runtime_check(cudaStreamCreateWithFlags(&queue->stream, cudaStreamNonBlocking), "stream", error))
        return error->status;
    for (uint32_t i = 0; i < BACKEND_MARKS; i++)
        if (cuda_runtime_check(cudaEventCreateWithFlags(&queue->marks[i], cudaEventDisableTiming), "event",
                               error))
            return error->status;
    return EPD_OK;
}

static void queue_free(struct backend_queue *queue)
{
    for (uint32_t i = 0; i < BACKEND_MARKS; i++)
        if (queue->marks[i])
            (void)cudaEventDestroy(queue->marks[i]);
    if (queue->stream)
        (void)cudaStreamDestroy(queue->stream);
    if (queue->pinned)
        (void)cudaFreeHost(queue->pinned);
    free(queue);
}

enum epd_status cuda_queue_create(struct backend_device *device, struct backend_queue **queue,
                                  struct epd_error *error)
{
    struct backend_queue *created = calloc(1, sizeof *created);
    if (!created)
        return error_set(error, EPD_NO_MEMORY, "queue: %zu bytes", sizeof *created);
    created->device = device;
    if (make_pinned(created, error) || make_stream(created, error)) {
        queue_free(created);
        return error->status;
    }
    created->next = device->first_queue;
    device->first_queue = created;
    *queue = created;
    return EPD_OK;
}

static void queue_end(struct backend_device *device, void *arg)
{
    (void)device;
    queue_free(arg);
}

/* Its steps have ended; pinned memory goes when nothing is under way on the device, for that waits for it. */
void cuda_queue_destroy(struct backend_queue *queue)
{
    struct backend_device *device = queue->device;
    struct backend_queue **link = &device->first_queue;
    while (*link != queue)
        link = &(*link)->next;
    *link = queue->next;
    cuda_defer(device, 1, queue_end, queue);
}

cudaStream_t cuda_queue_stream(const struct backend_queue *queue)
{
    return queue->stream;
}

struct backend_device *cuda_queue_device(const struct backend_queue *queue)
{
    return queue->device;
}

enum epd_status cuda_queue_mark(struct backend_queue *queue, uint32_t barrier_idx, struct epd_error *error)
{
    assert(barrier_idx < BACKEND_MARKS);
    return cuda_runtime_check(cudaEventRecord(queue->marks[barrier_idx], queue->stream), "barrier", error);
}

enum epd_status cuda_queue_join(struct backend_queue *queue, struct backend_queue *other,
                                uint32_t barrier_idx, struct epd_error *error)
{
    return cuda_runtime_check(cudaStreamWaitEvent(queue->stream, other->marks[barrier_idx], 0), "barrier",
                              error);
}

enum epd_status cuda_queue_ticket(struct backend_queue *queue, uint64_t *ticket, struct epd_error *error)
{
    const struct cuda_driver *driver = &queue->device->driver;
    if (cuda_driver_check(driver,
                          driver->cuStreamWriteValue64(queue->stream, queue->reached_device,
                                                       queue->n_tickets + 1, CU_STREAM_WRITE_VALUE_DEFAULT),
                          "ticket", error))
        return error->status;
    *ticket = ++queue->n_tickets;
    return EPD_OK;
}

/* Hands over what lies in front of the ticket. */
static void deliver(struct backend_queue *queue, uint64_t ticket)
{
    while (queue->n_taken != queue->n_put) {
        const struct copy_out *copy = &queue->copies[queue->n_taken % STAGING_SLOTS];
        if (copy->ticket > ticket)
            return;
        const char *from = queue->pinned + TICKET_BYTES + (copy->end - copy->bytes) % STAGING_BYTES;
        memcpy(copy->dst, from, copy->bytes);
        queue->taken_end = copy->end;
        queue->n_taken++;
    }
}

/* The word is all there is to see while the device is well; whether it is, only a call tells. */
int cuda_queue_reached(struct backend_queue *queue, uint64_t ticket, struct epd_error *error)
{
    if (atomic_load_explicit(queue->reached, memory_order_acquire) < ticket) {
        cudaError_t result = cudaStreamQuery(queue->stream);
        if (result == cudaErrorNotReady)
            return 0;
        if (cuda_runtime_check(result, "device", error))
            return 1;
        if (atomic_load_explicit(queue->reached, memory_order_acquire) < ticket)
            return 0;
    }
    deliver(queue, ticket);
    cuda_deferred_end(queue->device, 0);
    return 1;
}

/* Bytes of one copy lie in one piece: what is left at the ring's end is passed over. */
enum epd_status cuda_queue_copy_out(struct backend_queue *queue, void *dst, const void *src, uint64_t bytes,
                                    struct epd_error *error)
{
    uint64_t size = (bytes + 15) & ~(uint64_t)15, at = queue->put_end;
    if (bytes == 0)
        return EPD_OK;
    if (at % STAGING_BYTES + size > STAGING_BYTES)
        at = (at / STAGING_BYTES + 1) * STAGING_BYTES;
    if (queue->n_put - queue->n_taken == STAGING_SLOTS || at + size - queue->taken_end > STAGING_BYTES)
        return error_set(error, EPD_BUSY, "device %u: too many steps are in flight for their reports",
                         queue->device->device_idx);
    if (cuda_runtime_check(cudaMemcpyAsync(queue->pinned + TICKET_BYTES + at % STAGING_BYTES, src, bytes,
                                           cudaMemcpyDeviceToHost, queue->stream),
                           "copy to the host", error))
        return error->status;
    queue->copies[queue->n_put++ % STAGING_SLOTS] =
        (struct copy_out){.dst = dst, .bytes = bytes, .end = at + bytes, .ticket = queue->n_tickets + 1};
    queue->put_end = at + size;
    return EPD_OK;
}

/* ---- what has to wait for the queues ---- */

struct cuda_deferred {
    struct cuda_deferred *next;
    int when_idle;
    void (*end)(struct backend_device *device, void *arg);
    void *arg;
    uint32_t n_queues;
    struct {
        const struct backend_queue *queue;
        uint64_t ticket;
    } passes[]; /* that must have been reached */
};

static int queue_passed(const struct backend_queue *queue, uint64_t ticket)
{
    return atomic_load_explicit(queue->reached, memory_order_acquire) >= ticket;
}

static int device_idle(const struct backend_device *device)
{
    for (const struct backend_queue *queue = device->first_queue; queue; queue = queue->next)
        if (!queue_passed(queue, queue->n_tickets))
            return 0;
    return 1;
}

/* A queue that is gone has been passed. */
static int deferred_due(const struct backend_device *device, const struct cuda_deferred *deferred)
{
    if (deferred->when_idle)
        return device_idle(device);
    for (const struct backend_queue *queue = device->first_queue; queue; queue = queue->next)
        for (uint32_t i = 0; i < deferred->n_queues; i++)
            if (deferred->passes[i].queue == queue && !queue_passed(queue, deferred->passes[i].ticket))
                return 0;
    return 1;
}

void cuda_deferred_end(struct backend_device *device, int all)
{
    struct cuda_deferred **link = &device->deferred;
    while (*link) {
        struct cuda_deferred *deferred = *link;
        if (!all && !deferred_due(device, deferred)) {
            link = &deferred->next;
            continue;
        }
        *link = deferred->next;
        deferred->end(device, deferred->arg);
        free(deferred);
    }
}

void cuda_defer(struct backend_device *device, int when_idle, void (*end)(struct backend_device *, void *),
                void *arg)
{
    uint32_t n_queues = 0;
    for (const struct backend_queue *queue = device->first_queue; queue; queue = queue->next)
        n_queues++;
    struct cuda_deferred *deferred = calloc(1, sizeof *deferred + n_queues * sizeof *deferred->passes);
    if (!deferred) { /* waiting for the whole device is all that is left to do */
        (void)cudaDeviceSynchronize();
        end(device, arg);
        return;
    }
    *deferred = (struct cuda_deferred){.when_idle = when_idle, .end = end, .arg = arg, .n_queues = n_queues};
    uint32_t i = 0;
    for (const struct backend_queue *queue = device->first_queue; queue; queue = queue->next, i++) {
        deferred->passes[i].queue = queue;
        deferred->passes[i].ticket = queue->n_tickets;
    }
    /* In the order of the calls. */
    struct cuda_deferred **link = &device->deferred;
    while (*link)
        link = &(*link)->next;
    *link = deferred;
    cuda_deferred_end(device, 0);
}
