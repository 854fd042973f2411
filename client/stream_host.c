/* Host backend: memory is shared by memfd, the flags are futex words in the session page, and the order of
 * the client's work is program order: one launch of a plan at a time, ended by epd_plan_wait. */
#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include "client/plan.h"

static enum epd_status host_map(int fd, uint64_t bytes, void **data, struct epd_error *error)
{
    struct stat file;

    if (fstat(fd, &file) < 0)
        return error_set(error, EPD_SYSTEM, "buffer: fstat: %s", strerror(errno));
    if (file.st_size < 0 || bytes > (uint64_t)file.st_size)
        return error_set(error, EPD_PROTOCOL, "buffer: %llu bytes, the daemon's memory has %lld",
                         (unsigned long long)bytes, (long long)file.st_size);
    void *mapping = mmap(NULL, (size_t)bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (mapping == MAP_FAILED)
        return error_set(error, EPD_NO_MEMORY, "buffer: mmap of %llu bytes: %s", (unsigned long long)bytes,
                         strerror(errno));
    *data = mapping;
    return EPD_OK;
}

static void host_unmap(void *data, uint64_t bytes)
{
    munmap(data, (size_t)bytes);
}

/* The new mapping is filled elsewhere first, then moved over the old one in one step. */
static enum epd_status host_remap(int fd, uint64_t bytes, void *data, struct epd_error *error)
{
    void *fresh;

    if (host_map(fd, bytes, &fresh, error))
        return error->status;
    memcpy(fresh, data, (size_t)bytes);
    if (mremap(fresh, (size_t)bytes, (size_t)bytes, MREMAP_MAYMOVE | MREMAP_FIXED, data) == MAP_FAILED) {
        error_set(error, EPD_NO_MEMORY, "buffer: mremap of %llu bytes: %s", (unsigned long long)bytes,
                  strerror(errno));
        host_unmap(fresh, bytes);
        return error->status;
    }
    return EPD_OK;
}

static enum epd_status host_unsupported(const char *call, struct epd_error *error)
{
    return error_set(error, EPD_UNSUPPORTED, "%s: only on the CUDA backend; the daemon runs the host backend",
                     call);
}

static enum epd_status host_describe(void *data, uint64_t bytes, struct message_buffer_register *request,
                                     int *fd, struct epd_error *error)
{
    (void)data, (void)bytes, (void)request, (void)fd;
    return host_unsupported("epd_buffer_register_cuda", error);
}

static enum epd_status host_range(const void *data, struct epd_memory_range *range, struct epd_error *error)
{
    (void)data, (void)range;
    return host_unsupported("epd_memory_range", error);
}

/* Launches that the daemon has ended, as the page counts them; only whether it changes is looked at. */
static uint64_t host_ended(struct epd_plan *plan)
{
    return atomic_load_explicit(&plan->flags->completed, memory_order_relaxed) +
           atomic_load_explicit(&plan->flags->failed, memory_order_relaxed);
}

static enum epd_status host_bind(struct epd_plan *plan, struct epd_error *error)
{
    (void)plan, (void)error;
    return EPD_OK;
}

static void host_unbind(struct epd_plan *plan)
{
    (void)plan;
}

static uint64_t host_outstanding(struct epd_plan *plan)
{
    return host_ended(plan) == plan->ended_before;
}

static enum epd_status host_begin(struct epd_plan *plan, void *stream, struct epd_error *error)
{
    unsigned idle = PLAN_IDLE;

    if (stream)
        return error_set(error, EPD_INVALID_ARGUMENT, "stream: %p, want NULL on the host backend", stream);
    if (!atomic_compare_exchange_strong(&plan->state, &idle, PLAN_BEGINNING))
        return error_set(error, EPD_BUSY, "plan %llu: its last launch was not waited for",
                         (unsigned long long)plan->reply.plan_id);
    plan->ended_before = host_ended(plan);
    plan->failed_before = atomic_load_explicit(&plan->flags->failed, memory_order_relaxed);
    atomic_store_explicit(&plan->flags->done, 0, memory_order_relaxed);
    /* Nobody sleeps on ready: it is set before the message that makes the lane look at it. */
    atomic_store_explicit(&plan->flags->ready, 1, memory_order_release);
    return EPD_OK;
}

static void host_cancel(struct epd_plan *plan, void *stream)
{
    (void)stream;
    atomic_store_explicit(&plan->flags->ready, 0, memory_order_relaxed);
    atomic_store(&plan->state, PLAN_IDLE);
}

static enum epd_status host_commit(struct epd_plan *plan, void *stream, struct epd_error *error)
{
    (void)stream, (void)error;
    atomic_store(&plan->state, PLAN_IN_FLIGHT);
    return EPD_OK;
}

/* done is only a reason to look: the counters, or the loss of the connection, say that the launch has ended.
 */
static enum epd_status host_wait(struct epd_plan *plan, uint64_t deadline_ns, struct epd_error *error)
{
    struct epd_error lost;

    while (atomic_load(&plan->state) == PLAN_IN_FLIGHT) {
        enum epd_status status = flag_wait(&plan->flags->done, deadline_ns);
        if (status == EPD_TIMEOUT)
            return error_set(error, EPD_TIMEOUT, "plan %llu: launch %llu has not ended yet",
                             (unsigned long long)plan->reply.plan_id, atomic_load(&plan->last_seq));
        if (status)
            return error_set(error, status, "plan %llu: futex: %s", (unsigned long long)plan->reply.plan_id,
                             strerror(errno));
        if (host_ended(plan) != plan->ended_before || connection_check(plan->group->connection, &lost))
            return EPD_OK;
    }
    return EPD_OK;
}

/* A launch that is beginning sees the loss itself, after this or before it sends. */
static uint64_t host_release(struct epd_plan *plan)
{
    if (atomic_load(&plan->state) != PLAN_IDLE)
        flag_set(&plan->flags->done);
    return 0;
}

static enum epd_status host_capture(struct epd_plan *plan, void *stream, struct epd_error *error)
{
    (void)plan, (void)stream;
    return host_unsupported("epd_plan_capture", error);
}

static enum epd_status host_copy(const struct epd_plan *plan, const struct epd_copy *copies,
                                 uint32_t n_copies, void *stream, struct epd_error *error)
{
    (void)plan, (void)copies, (void)n_copies, (void)stream;
    return host_unsupported("epd_plan_step", error);
}

static enum epd_status host_arm(struct epd_plan *plan, uint32_t n_launches, struct epd_error *error)
{
    (void)plan, (void)n_launches;
    return host_unsupported("epd_plan_arm", error);
}

const struct stream_ops stream_host = {
    .map = host_map,
    .unmap = host_unmap,
    .remap = host_remap,
    .describe = host_describe,
    .range = host_range,
    .bind = host_bind,
    .unbind = host_unbind,
    .outstanding = host_outstanding,
    .begin = host_begin,
    .cancel = host_cancel,
    .commit = host_commit,
    .wait = host_wait,
    .release = host_release,
    .capture = host_capture,
    .copy = host_copy,
    .arm = host_arm,
};
