#include "ep/memory_impl.h"

#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "ep/node_impl.h"

struct memory {
    struct lane *lane; /* borrowed from the node, outlives this */
    struct memory_request request;
    struct backend_block block;   /* HEAP */
    struct backend_import import; /* all others */
    uint32_t n_references;        /* loop thread, plans' included */
    uint32_t n_plan_references;

    struct lane_job job; /* acquire, later release */
    memory_callback callback;
    void *arg;
    struct epd_error error;
};

static struct memory *memory_of_job(struct lane_job *job)
{
    return (struct memory *)((char *)job - offsetof(struct memory, job));
}

static void memory_close_fd(const struct memory_request *request)
{
    if (request->fd >= 0)
        close(request->fd);
}

/* Lane thread. */
static void memory_run_acquire(struct lane_job *job, struct lane *lane)
{
    struct memory *memory = memory_of_job(job);
    memory->error.status = EPD_OK;
    if (memory->request.kind == EPD_MEMORY_HEAP) {
        (void)!heap_alloc(lane_heap(lane), memory->request.bytes, 1, &memory->block, &memory->error);
    } else if (lane_backend(lane)->memory_import(lane_device(lane), &memory->request, &memory->import,
                                                 &memory->error) == EPD_OK) {
        lane_count_import(lane, (int64_t)memory->import.mapped_bytes, 1);
    }
    memory_close_fd(&memory->request);
    memory->request.fd = -1;
}

/* Lane thread. */
static void memory_run_release(struct lane_job *job, struct lane *lane)
{
    struct memory *memory = memory_of_job(job);
    if (memory->request.kind == EPD_MEMORY_HEAP) {
        heap_free(lane_heap(lane), &memory->block);
        return;
    }
    uint64_t unmapped = lane_backend(lane)->memory_unimport(lane_device(lane), &memory->import);
    lane_count_import(lane, -(int64_t)unmapped, -1);
}

static void memory_complete_acquire(struct lane_job *job)
{
    struct memory *memory = memory_of_job(job);
    struct epd_error error = memory->error;
    memory_callback callback = memory->callback;
    void *arg = memory->arg;
    if (error.status) {
        free(memory);
        memory = NULL;
    }
    callback(arg, memory, &error);
}

static void memory_complete_release(struct lane_job *job)
{
    free(memory_of_job(job));
}

static enum epd_status memory_check(const struct node *node, const struct memory_request *request,
                                    struct epd_error *error)
{
    int wants_fd = request->kind == EPD_MEMORY_MEMFD || request->kind == EPD_MEMORY_CUDA_VMM;
    if (request->device_idx >= node->n_devices)
        return error_set(error, EPD_INVALID_DEVICE, "buffer device %u, want 0..%u", request->device_idx,
                         node->n_devices - 1);
    if (request->kind < EPD_MEMORY_HEAP || request->kind > EPD_MEMORY_CUDA_VMM)
        return error_set(error, EPD_INVALID_ARGUMENT, "buffer kind %d is unknown", (int)request->kind);
    if (request->bytes == 0 || request->offset > UINT64_MAX - request->bytes)
        return error_set(error, EPD_OUT_OF_RANGE, "buffer offset %llu bytes %llu",
                         (unsigned long long)request->offset, (unsigned long long)request->bytes);
    if (wants_fd != (request->fd >= 0))
        return error_set(error, EPD_INVALID_ARGUMENT, "buffer kind %d comes %s an fd", (int)request->kind,
                         wants_fd ? "with" : "without");
    return EPD_OK;
}

enum epd_status memory_acquire(struct node *node, const struct memory_request *request,
                               memory_callback callback, void *arg, struct epd_error *error)
{
    struct memory *memory = NULL;
    if (memory_check(node, request, error))
        goto close_fd;
    memory = calloc(1, sizeof *memory);
    if (!memory) {
        error_set(error, EPD_NO_MEMORY, "buffer: %zu bytes", sizeof *memory);
        goto close_fd;
    }
    memory->lane = node->lanes[request->device_idx];
    memory->request = *request;
    memory->n_references = 1;
    memory->callback = callback;
    memory->arg = arg;
    memory->job.run = memory_run_acquire;
    memory->job.complete = memory_complete_acquire;
    memory->job.what = "a buffer that is made";
    lane_post(memory->lane, &memory->job);
    return EPD_OK;

close_fd:
    memory_close_fd(request);
    return error->status;
}

void memory_retain(struct memory *memory)
{
    memory->n_references++;
}

void memory_release(struct memory *memory)
{
    assert(memory->n_references > 0);
    if (--memory->n_references)
        return;
    memory->job = (struct lane_job){
        .run = memory_run_release, .complete = memory_complete_release, .what = "a buffer that goes"};
    lane_post(memory->lane, &memory->job);
}

void memory_bind(struct memory *memory)
{
    memory->n_plan_references++;
    memory_retain(memory);
}

void memory_unbind(struct memory *memory)
{
    assert(memory->n_plan_references > 0);
    memory->n_plan_references--;
    memory_release(memory);
}

void *memory_data(const struct memory *memory)
{
    return memory->request.kind == EPD_MEMORY_HEAP ? memory->block.data : memory->import.data;
}

uint64_t memory_held_bytes(const struct memory *memory)
{
    return memory->request.kind == EPD_MEMORY_HEAP ? memory->block.bytes : memory->request.bytes;
}

uint64_t memory_bytes(const struct memory *memory)
{
    return memory->request.bytes;
}

uint32_t memory_device_idx(const struct memory *memory)
{
    return memory->request.device_idx;
}

uint32_t memory_references(const struct memory *memory)
{
    return memory->n_plan_references;
}

int memory_fd(const struct memory *memory)
{
    return memory->request.kind == EPD_MEMORY_HEAP ? memory->block.fd : -1;
}
