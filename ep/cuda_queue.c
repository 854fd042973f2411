/* A queue is a stream, its marks are events, and a ticket is a number that the stream writes to host memory
 * behind everything else: looking at it costs no call. What is copied out goes there with it, in one launch.
 *
 * Hardware channels. Streams beyond CUDA_DEVICE_MAX_CONNECTIONS share one with others, and what waits for a
 * client in one would hold up another, on this device perhaps the one that on the next device holds up it. So
 * a device has at most MAX_QUEUES, each its own stream for as long as the device is open, handed from team to
 * team. */
#include <assert.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "ep/backend_cuda.h"
#include "ep/clock.h"
#include "kernels/cuda/cuda.h"

/* Of CUDA_CONNECTIONS channels: the others are of the device's own streams, and CUDA's default stream. */
#define MAX_QUEUES (CUDA_CONNECTIONS - 4)
/* How often a device that does not answer is asked whether it is well. */
#define QUERY_NS 1000000ull
/* Larger reports are copied by the copy engine. */
#define REPORT_BYTES 65536u
/* What steps in flight report: at dsv3's sizes 4.2 KiB each. */
#define STAGING_BYTES (8u << 20)
#define STAGING_SLOTS 4096u
/* Of the last tickets it is known which stand behind a wait for a client. */
#define AWAIT_BITS 8192u

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
    int in_use;
    cudaStream_t stream;
    cudaEvent_t marks[BACKEND_MARKS];
    char *pinned;                     /* the ticket's word, then the staging ring; owned */
    _Atomic uint64_t *reached;        /* in pinned */
    CUdeviceptr pinned_device;        /* the same as the device sees it */
    uint64_t n_tickets;               /* ever given */
    uint64_t queried_ns;              /* when CUDA was last asked about the stream */
    uint64_t awaits[AWAIT_BITS / 64]; /* a bit of each ticket, by its number: cuda_queue_await gave it */
    struct cuda_report_args report;   /* what the next ticket takes along */
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
    queue->pinned_device = (CUdeviceptr)(uintptr_t)device_word;
    queue->report.ticket = device_word;
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

static void end_queue(struct backend_device *device, void *arg)
{
    (void)device;
    queue_free(arg);
}

static enum epd_status check_channels(const struct backend_device *device, uint32_t n,
                                      struct epd_error *error)
{
    uint32_t n_queues = 0;
    for (const struct backend_queue *queue = device->first_queue; queue; queue = queue->next)
        n_queues++;
    if (n_queues + device->n_library_streams + n > MAX_QUEUES)
        return error_set(error, EPD_QUOTA,
                         "device %u: groups have or had %u queues on it, and rails between nodes have %u "
                         "streams, of %u; those of "
                         "closed rails come back when nothing runs on any device of the node",
                         device->device_idx, n_queues, device->n_library_streams, MAX_QUEUES);
    return EPD_OK;
}

enum epd_status cuda_streams_take(struct backend_device *device, uint32_t n, struct epd_error *error)
{
    if (check_channels(device, n, error))
        return error->status;
    device->n_library_streams += n;
    return EPD_OK;
}

void cuda_streams_give_back(struct backend_device *device, uint32_t n)
{
    assert(n <= device->n_library_streams);
    device->n_library_streams -= n;
}

enum epd_status cuda_queue_create(struct backend_device *device, struct backend_queue **queue,
                                  struct epd_error *error)
{
    for (struct backend_queue *free = device->first_queue; free; free = free->next) {
        if (free->in_use)
            continue;
        free->in_use = 1;
        *queue = free;
        return EPD_OK;
    }
    if (check_channels(device, 1, error))
        return error->status;
    struct backend_queue *created = calloc(1, sizeof *created);
    if (!created)
        return error_set(error, EPD_NO_MEMORY, "queue: %zu bytes", sizeof *created);
    created->device = device;
    if (make_pinned(created, error) || make_stream(created, error)) {
        cuda_defer(device, 1, end_queue, created);
        return error->status;
    }
    created->in_use = 1;
    created->next = device->first_queue;
    device->first_queue = created;
    *queue = created;
    return EPD_OK;
}

void cuda_queues_free(struct backend_device *device)
{
    while (device->first_queue) {
        struct backend_queue *queue = device->first_queue;
        device->first_queue = queue->next;
        queue_free(queue);
    }
}

/* Its steps have ended. */
void cuda_queue_destroy(struct backend_queue *queue)
{
    queue->in_use = 0;
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

static uint64_t next_ticket(struct backend_queue *queue, int awaits)
{
    const uint64_t ticket = ++queue->n_tickets, bit = (uint64_t)1 << ticket % 64;
    uint64_t *word = &queue->awaits[ticket % AWAIT_BITS / 64];
    *word = awaits ? *word | bit : *word & ~bit;
    return ticket;
}

/* One call: the wait and the ticket. */
enum epd_status cuda_queue_await(struct backend_queue *queue, CUdeviceptr word, uint64_t *ticket,
                                 struct epd_error *error)
{
    const struct cuda_driver *driver = &queue->device->driver;
    CUstreamBatchMemOpParams ops[2];
    assert(queue->report.n_parts == 0);
    memset(ops, 0, sizeof ops);
    ops[0].waitValue.operation = CU_STREAM_MEM_OP_WAIT_VALUE_32;
    ops[0].waitValue.address = word;
    ops[0].waitValue.value = 1;
    ops[0].waitValue.flags = CU_STREAM_WAIT_VALUE_EQ;
    ops[1].writeValue.operation = CU_STREAM_MEM_OP_WRITE_VALUE_64;
    ops[1].writeValue.address = queue->pinned_device;
    ops[1].writeValue.value64 = queue->n_tickets + 1;
    if (cuda_driver_check(driver, driver->cuStreamBatchMemOp(queue->stream, 2, ops, 0),
                          "wait for a ready flag", error))
        return error->status;
    *ticket = next_ticket(queue, 1);
    return EPD_OK;
}

static enum epd_status put_ticket(struct backend_queue *queue, uint64_t value, struct epd_error *error)
{
    const struct cuda_driver *driver = &queue->device->driver;
    if (queue->report.n_parts) {
        queue->report.value = value;
        return cuda_report_launch(&queue->report, queue->stream, error);
    }
    return cuda_driver_check(driver,
                             driver->cuStreamWriteValue64(queue->stream, queue->pinned_device, value,
                                                          CU_STREAM_WRITE_VALUE_DEFAULT),
                             "ticket", error);
}

/* What was to be copied out in front of a ticket that was not given: whose it is may be gone when the next one comes. */
static void forget_copies(struct backend_queue *queue, uint64_t ticket)
{
    while (queue->n_put != queue->n_taken &&
           queue->copies[(queue->n_put - 1) % STAGING_SLOTS].ticket == ticket)
        queue->n_put--;
}

enum epd_status cuda_queue_ticket(struct backend_queue *queue, uint64_t *ticket, struct epd_error *error)
{
    enum epd_status status = put_ticket(queue, queue->n_tickets + 1, error);
    queue->report.n_parts = 0;
    if (status) {
        forget_copies(queue, queue->n_tickets + 1);
        return status;
    }
    *ticket = next_ticket(queue, 0);
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
        uint64_t now_ns = clock_now_ns();
        if (now_ns - queue->queried_ns < QUERY_NS)
            return 0;
        queue->queried_ns = now_ns;
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
static enum epd_status take_staging(struct backend_queue *queue, uint64_t bytes, uint64_t *start,
                                    struct epd_error *error)
{
    uint64_t at = queue->put_end;
    if (at % STAGING_BYTES + bytes > STAGING_BYTES)
        at = (at / STAGING_BYTES + 1) * STAGING_BYTES;
    if (queue->n_put - queue->n_taken == STAGING_SLOTS || at + bytes - queue->taken_end > STAGING_BYTES)
        return error_set(error, EPD_BUSY, "device %u: too many steps are in flight for their reports",
                         queue->device->device_idx);
    *start = at;
    return EPD_OK;
}

static enum epd_status copy_apart(struct backend_queue *queue, char *to, void *from, uint64_t bytes,
                                  int clear, struct epd_error *error)
{
    if (cuda_runtime_check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, queue->stream),
                           "copy to the host", error))
        return error->status;
    return clear ? cuda_runtime_check(cudaMemsetAsync(from, 0, bytes, queue->stream), "zeroing", error)
                 : EPD_OK;
}

enum epd_status cuda_queue_copy_out(struct backend_queue *queue, void *dst, void *src, uint64_t bytes,
                                    int clear, struct epd_error *error)
{
    struct cuda_report_args *report = &queue->report;
    uint64_t size = (bytes + 15) & ~(uint64_t)15, at = 0;
    if (bytes == 0)
        return EPD_OK;
    if (take_staging(queue, size, &at, error))
        return error->status;
    uint64_t place = TICKET_BYTES + at % STAGING_BYTES;
    if (bytes > REPORT_BYTES || bytes % 4 || report->n_parts == CUDA_REPORT_PARTS) {
        if (copy_apart(queue, queue->pinned + place, src, bytes, clear, error))
            return error->status;
    } else {
        report->parts[report->n_parts++] =
            (struct cuda_report_part){.to = (void *)(uintptr_t)(queue->pinned_device + place),
                                      .from = src,
                                      .bytes = (uint32_t)bytes,
                                      .clear = clear};
    }
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

/* All that it was given before a wait for a client is done, and what is behind the wait has not begun. */
static int queue_awaits_client(const struct backend_queue *queue)
{
    const uint64_t reached = atomic_load_explicit(queue->reached, memory_order_acquire), next = reached + 1;
    return reached < queue->n_tickets && queue->n_tickets - reached <= AWAIT_BITS &&
           queue->awaits[next % AWAIT_BITS / 64] >> next % 64 & 1;
}

int cuda_queues_idle(struct backend_device *device)
{
    if (atomic_load(&device->n_connecting))
        return 0;
    for (const struct backend_queue *queue = device->first_queue; queue; queue = queue->next)
        if (!queue_passed(queue, queue->n_tickets))
            return 0;
    return 1;
}

void cuda_queues_wait(struct backend_device *device)
{
    const struct timespec nap = {.tv_nsec = 20000};
    while (!cuda_queues_idle(device))
        (void)nanosleep(&nap, NULL);
}

/* A queue that is gone has been passed. One that waits for a client uses nothing that has been given back: what is behind the
 * wait are steps that have not ended, and they hold what they use. */
static int deferred_due(struct backend_device *device, const struct cuda_deferred *deferred)
{
    if (deferred->when_idle)
        return 0;
    for (const struct backend_queue *queue = device->first_queue; queue; queue = queue->next)
        for (uint32_t i = 0; i < deferred->n_queues; i++)
            if (deferred->passes[i].queue == queue && !queue_passed(queue, deferred->passes[i].ticket) &&
                !queue_awaits_client(queue))
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
        device->n_when_idle -= deferred->when_idle ? 1 : 0;
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
    if (!deferred) { /* standing still is all that is left to do */
        cuda_queues_wait(device);
        end(device, arg);
        return;
    }
    *deferred = (struct cuda_deferred){.when_idle = when_idle, .end = end, .arg = arg, .n_queues = n_queues};
    device->n_when_idle += when_idle ? 1 : 0;
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
