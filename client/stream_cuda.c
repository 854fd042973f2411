/* CUDA backend: the flags are words of the session page, host memory that both processes register with CUDA,
 * so streams wait for them and write them while either host still can end a wait by a plain store. The order
 * of the client's work is that of its stream. */
#include <errno.h>
#include <pthread.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "client/copy_cuda.h"
#include "client/driver_cuda.h"
#include "client/plan.h"

/* How often a host that waits looks whether a launch has ended: first without sleeping, then in these steps.
 */
#define WAIT_SPINS    2000
#define WAIT_SLEEP_NS 20000

/* Calls that have no place in a stream's order may be made while this thread captures a graph: relaxed before them, and what
 * this leaves in *mode after them. */
static void exchange_capture_mode(CUstreamCaptureMode *mode)
{
    (void)driver()->cuThreadExchangeStreamCaptureMode(mode);
}

/* ---- memory ---- */

static enum epd_status current_device(CUdevice *device, struct epd_error *error)
{
    CUresult result = driver()->cuCtxGetDevice(device);
    if (result == CUDA_ERROR_INVALID_CONTEXT || result == CUDA_ERROR_NOT_INITIALIZED)
        return error_set(error, EPD_INVALID_DEVICE,
                         "no CUDA context is current on this thread: select the group's device first");
    return driver_result(result, "current device", error);
}

static enum epd_status rounded_bytes(CUdevice device, uint64_t bytes, uint64_t *rounded,
                                     struct epd_error *error)
{
    CUmemAllocationProp prop = {
        .type = CU_MEM_ALLOCATION_TYPE_PINNED,
        .requestedHandleTypes = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR,
        .location = {.type = CU_MEM_LOCATION_TYPE_DEVICE, .id = device},
    };
    size_t unit;
    if (driver_result(
            driver()->cuMemGetAllocationGranularity(&unit, &prop, CU_MEM_ALLOC_GRANULARITY_RECOMMENDED),
            "granularity of device memory", error))
        return error->status;
    *rounded = (bytes + unit - 1) / unit * unit;
    return EPD_OK;
}

/* Maps the allocation at an address that is reserved already. */
static enum epd_status map_at(CUdeviceptr at, uint64_t bytes, CUmemGenericAllocationHandle handle,
                              CUdevice device, struct epd_error *error)
{
    CUmemAccessDesc access = {.location = {.type = CU_MEM_LOCATION_TYPE_DEVICE, .id = device},
                              .flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE};
    if (driver_result(driver()->cuMemMap(at, bytes, 0, handle, 0), "buffer: mapping", error))
        return error->status;
    if (driver_result(driver()->cuMemSetAccess(at, bytes, &access, 1), "buffer: access", error)) {
        (void)driver()->cuMemUnmap(at, bytes);
        return error->status;
    }
    return EPD_OK;
}

static enum epd_status map_handle(CUmemGenericAllocationHandle handle, uint64_t bytes, CUdevice device,
                                  CUdeviceptr *data, struct epd_error *error)
{
    CUdeviceptr at;
    if (driver_result(driver()->cuMemAddressReserve(&at, bytes, 0, 0, 0), "buffer: address space", error))
        return error->status;
    if (map_at(at, bytes, handle, device, error)) {
        (void)driver()->cuMemAddressFree(at, bytes);
        return error->status;
    }
    *data = at;
    return EPD_OK;
}

static void unmap_rounded(CUdeviceptr at, uint64_t bytes)
{
    (void)driver()->cuMemUnmap(at, bytes);
    (void)driver()->cuMemAddressFree(at, bytes);
}

static enum epd_status import_fd(int fd, uint64_t bytes, CUdevice *device, uint64_t *rounded,
                                 CUmemGenericAllocationHandle *handle, struct epd_error *error)
{
    if (driver_check(error) || current_device(device, error) || rounded_bytes(*device, bytes, rounded, error))
        return error->status;
    return driver_result(driver()->cuMemImportFromShareableHandle(handle, (void *)(uintptr_t)fd,
                                                                  CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR),
                         "buffer: import", error);
}

static enum epd_status cuda_map(int fd, uint64_t bytes, void **data, struct epd_error *error)
{
    CUmemGenericAllocationHandle handle;
    CUdevice device;
    CUdeviceptr at = 0;
    uint64_t rounded = 0;
    if (import_fd(fd, bytes, &device, &rounded, &handle, error))
        return error->status;
    enum epd_status status = map_handle(handle, rounded, device, &at, error);
    (void)driver()->cuMemRelease(handle); /* the mapping holds the memory */
    if (status == EPD_OK)
        *data = (void *)(uintptr_t)at;
    return status;
}

static void cuda_unmap(void *data, uint64_t bytes)
{
    struct epd_error ignored;
    CUdevice device;
    uint64_t rounded = 0;
    if (driver_check(&ignored) || current_device(&device, &ignored) ||
        rounded_bytes(device, bytes, &rounded, &ignored))
        return; /* the context is gone, and its memory with it */
    unmap_rounded((CUdeviceptr)(uintptr_t)data, rounded);
}

static enum epd_status cuda_remap(int fd, uint64_t bytes, void *data, struct epd_error *error)
{
    CUmemGenericAllocationHandle handle;
    CUdevice device;
    CUdeviceptr old = (CUdeviceptr)(uintptr_t)data, fresh = 0;
    uint64_t rounded = 0;
    if (import_fd(fd, bytes, &device, &rounded, &handle, error))
        return error->status;
    if (map_handle(handle, rounded, device, &fresh, error))
        goto release;
    /* A copy inside the device goes on after the call: the old memory stays until it has ended. */
    if (driver_result(driver()->cuMemcpyDtoD(fresh, old, bytes), "buffer: copy of what it held", error) ||
        driver_result(driver()->cuStreamSynchronize(NULL), "buffer: copy of what it held", error) ||
        driver_result(driver()->cuMemUnmap(old, rounded), "buffer: unmapping", error))
        goto unmap_fresh;
    (void)!map_at(old, rounded, handle, device, error);
unmap_fresh:
    unmap_rounded(fresh, rounded);
release:
    (void)driver()->cuMemRelease(handle);
    return error->status;
}

/* ---- the client's own memory ---- */

static enum epd_status describe_ipc(CUdeviceptr base, struct message_buffer_register *request,
                                    struct epd_error *error)
{
    CUipcMemHandle handle;
    _Static_assert(sizeof handle == sizeof request->ipc_handle, "an IPC handle is what the wire carries");
    if (driver_result(driver()->cuIpcGetMemHandle(&handle, base), "buffer: IPC handle", error))
        return error->status;
    memcpy(request->ipc_handle, &handle, sizeof handle);
    request->kind = EPD_MEMORY_CUDA_IPC;
    return EPD_OK;
}

static enum epd_status describe_vmm(void *data, struct message_buffer_register *request, int *fd,
                                    struct epd_error *error)
{
    CUmemGenericAllocationHandle handle;
    if (driver_result(driver()->cuMemRetainAllocationHandle(&handle, data), "buffer: VMM allocation", error))
        return error->status;
    enum epd_status status = driver_result(
        driver()->cuMemExportToShareableHandle(fd, handle, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0),
        "buffer: export", error);
    (void)driver()->cuMemRelease(handle);
    request->kind = EPD_MEMORY_CUDA_VMM;
    return status;
}

static enum epd_status cuda_range(const void *data, struct epd_memory_range *range, struct epd_error *error)
{
    CUdeviceptr at = (CUdeviceptr)(uintptr_t)data, base = 0;
    unsigned long long id = 0;
    size_t bytes = 0;
    int ordinal = -1;
    unsigned legacy = 0;
    CUuuid uuid;
    if (driver_check(error))
        return error->status;
    if (driver()->cuPointerGetAttribute(&ordinal, CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL, at) != CUDA_SUCCESS ||
        driver()->cuMemGetAddressRange(&base, &bytes, at) != CUDA_SUCCESS)
        return error_set(error, EPD_INVALID_ARGUMENT, "buffer %p: not device memory of this process", data);
    if (driver_result(driver()->cuDeviceGetUuid(&uuid, ordinal), "buffer: device", error) ||
        driver_result(
            driver()->cuPointerGetAttribute(&legacy, CU_POINTER_ATTRIBUTE_IS_LEGACY_CUDA_IPC_CAPABLE, at),
            "buffer: kind of memory", error) ||
        driver_result(driver()->cuPointerGetAttribute(&id, CU_POINTER_ATTRIBUTE_BUFFER_ID, at),
                      "buffer: allocation id", error))
        return error->status;
    range->base = (void *)(uintptr_t)base;
    range->bytes = bytes;
    range->allocation_id = id;
    range->is_vmm = !legacy;
    memcpy(range->device_uuid, uuid.bytes, sizeof range->device_uuid);
    return EPD_OK;
}

static enum epd_status cuda_describe(void *data, uint64_t bytes, struct message_buffer_register *request,
                                     int *fd, struct epd_error *error)
{
    struct epd_memory_range range = {.size = sizeof range};
    CUstreamCaptureMode mode = CU_STREAM_CAPTURE_MODE_RELAXED;
    *fd = -1;
    if (cuda_range(data, &range, error))
        return error->status;
    uint64_t offset = (uint64_t)((char *)data - (char *)range.base), left = range.bytes - offset;
    if (bytes > left)
        return error_set(error, EPD_OUT_OF_RANGE, "buffer %p: %llu bytes, its allocation has %llu left", data,
                         (unsigned long long)bytes, (unsigned long long)left);
    memcpy(request->device_uuid, range.device_uuid, sizeof request->device_uuid);
    request->offset = offset;
    request->allocation_bytes = range.is_vmm ? range.bytes : 0;
    exchange_capture_mode(&mode);
    enum epd_status status = range.is_vmm ? describe_vmm(data, request, fd, error)
                                          : describe_ipc((CUdeviceptr)(uintptr_t)range.base, request, error);
    exchange_capture_mode(&mode);
    return status;
}

/* ---- flags ---- */

/* A second mapping of the one page that the plan's words lie in, registered with CUDA. */
struct cuda_words {
    void *page;
    size_t bytes;
    CUdeviceptr words;
    uint64_t completed_before; /* as the page counted when the plan was bound */
    CUfunction copy;           /* of copy_cuda.h, in the context that the plan was bound in */
};

static CUdeviceptr word_of(const struct epd_plan *plan, size_t offset)
{
    return ((const struct cuda_words *)plan->stream_words)->words + offset;
}

static enum epd_status cuda_bind(struct epd_plan *plan, struct epd_error *error)
{
    size_t page_bytes = (size_t)sysconf(_SC_PAGESIZE);
    uintptr_t line = (uintptr_t)plan->flags, start = line & ~(page_bytes - 1);
    CUstreamCaptureMode mode = CU_STREAM_CAPTURE_MODE_RELAXED;
    CUdeviceptr device_page;
    CUdevice device;
    if (driver_check(error) || current_device(&device, error))
        return error->status;
    struct cuda_words *words = calloc(1, sizeof *words);
    if (!words)
        return error_set(error, EPD_NO_MEMORY, "plan: no memory for %zu bytes", sizeof *words);
    words->bytes = page_bytes;
    words->completed_before = atomic_load(&plan->flags->completed);
    /* Of a shared mapping, "move zero bytes" makes another one. */
    words->page = mremap((void *)start, 0, page_bytes, MREMAP_MAYMOVE);
    if (words->page == MAP_FAILED) {
        error_set(error, EPD_SYSTEM, "plan: mremap of its flags: %s", strerror(errno));
        goto free_words;
    }
    exchange_capture_mode(&mode);
    CUresult registered = driver()->cuMemHostRegister(
        words->page, page_bytes, CU_MEMHOSTREGISTER_PORTABLE | CU_MEMHOSTREGISTER_DEVICEMAP);
    enum epd_status copies = registered == CUDA_SUCCESS ? copy_load(&words->copy, error) : EPD_OK;
    exchange_capture_mode(&mode);
    if (driver_result(registered, "plan: flags", error))
        goto unmap;
    if (copies)
        goto unregister;
    if (driver_result(driver()->cuMemHostGetDevicePointer(&device_page, words->page, 0), "plan: flags",
                      error))
        goto unregister;
    words->words = device_page + (line - start);
    plan->stream_words = words;
    atomic_store(&plan->n_launched, 0);
    atomic_store(&plan->untaken, 0);
    plan->n_released = 0;
    return EPD_OK;

unregister:
    (void)driver()->cuMemHostUnregister(words->page);
unmap:
    (void)munmap(words->page, page_bytes);
free_words:
    free(words);
    return error->status;
}

static void cuda_unbind(struct epd_plan *plan)
{
    struct cuda_words *words = plan->stream_words;
    if (!words)
        return;
    (void)driver()->cuMemHostUnregister(words->page);
    (void)munmap(words->page, words->bytes);
    free(words);
    plan->stream_words = NULL;
}

/* ---- launches ---- */

static uint64_t cuda_outstanding(struct epd_plan *plan)
{
    const struct cuda_words *words = plan->stream_words;
    uint64_t ended = atomic_load(&plan->flags->completed) - words->completed_before;
    uint64_t launched = atomic_load(&plan->n_launched);
    return launched > ended ? launched - ended : 0;
}

/* A launch in the stream, in one call: sets ready, waits for done, and clears both words in one write, for each operation of a
 * stream takes a microsecond. ready too: a launch that the daemon ended before this stream came to it leaves it set. */
static enum epd_status hand_over(struct epd_plan *plan, void *stream, struct epd_error *error)
{
    CUstreamBatchMemOpParams ops[3];
    memset(ops, 0, sizeof ops);
    ops[0].writeValue.operation = CU_STREAM_MEM_OP_WRITE_VALUE_32;
    ops[0].writeValue.address = word_of(plan, offsetof(struct page_plan, ready));
    ops[0].writeValue.value = 1;
    ops[1].waitValue.operation = CU_STREAM_MEM_OP_WAIT_VALUE_32;
    ops[1].waitValue.address = word_of(plan, offsetof(struct page_plan, done));
    ops[1].waitValue.value = 1;
    ops[1].waitValue.flags = CU_STREAM_WAIT_VALUE_EQ;
    ops[2].writeValue.operation = CU_STREAM_MEM_OP_WRITE_VALUE_64;
    ops[2].writeValue.address = word_of(plan, offsetof(struct page_plan, ready));
    return driver_result(driver()->cuStreamBatchMemOp(stream, 3, ops, 0), "stream: launch", error);
}

/* From idle, what the page counts now is what came before. */
static void count_launches(struct epd_plan *plan, uint32_t n)
{
    atomic_fetch_add(&plan->n_launched, n);
    if (atomic_exchange(&plan->state, PLAN_IN_FLIGHT) == PLAN_IDLE)
        plan->failed_before = atomic_load_explicit(&plan->flags->failed, memory_order_relaxed);
}

/* The stream is told behind the message: the daemon has its part to put into streams of its own meanwhile, and a message that
 * cannot be sent leaves nothing in this one. So what can be wrong with the stream is found here, before there is a message. */
static enum epd_status cuda_begin(struct epd_plan *plan, void *stream, struct epd_error *error)
{
    CUstreamCaptureStatus capture;
    if (atomic_load(&plan->untaken))
        return error_set(error, EPD_CUDA,
                         "plan %llu: its stream did not take an earlier launch; make the plan again",
                         (unsigned long long)plan->reply.plan_id);
    if (driver_result(driver()->cuStreamIsCapturing(stream, &capture), "stream: launch", error))
        return error->status;
    if (capture != CU_STREAM_CAPTURE_STATUS_NONE)
        return error_set(error, EPD_INVALID_ARGUMENT,
                         "the stream is capturing a graph: epd_plan_capture puts a launch into it");
    count_launches(plan, 1);
    return EPD_OK;
}

static void cuda_cancel(struct epd_plan *plan, void *stream)
{
    (void)stream;
    atomic_fetch_sub(&plan->n_launched, 1);
}

/* In vain, the daemon ends the launch as that of a client that does not come, and its done, which nobody takes, would end the
 * wait of the next one. */
static enum epd_status cuda_commit(struct epd_plan *plan, void *stream, struct epd_error *error)
{
    const enum epd_status status = hand_over(plan, stream, error);
    if (status)
        atomic_store(&plan->untaken, 1);
    return status;
}

static uint64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

/* How the launches ended is known a little after `done`: the page's counters say it. */
static enum epd_status cuda_wait(struct epd_plan *plan, uint64_t deadline_ns, struct epd_error *error)
{
    const struct timespec pause = {.tv_nsec = WAIT_SLEEP_NS};
    struct epd_error lost;
    for (uint64_t i = 0; atomic_load(&plan->state) == PLAN_IN_FLIGHT && cuda_outstanding(plan); i++) {
        if (i < WAIT_SPINS)
            continue;
        if (connection_check(plan->group->connection, &lost))
            return EPD_OK;
        if (now_ns() > deadline_ns)
            return error_set(error, EPD_TIMEOUT, "plan %llu: launch %llu has not ended yet",
                             (unsigned long long)plan->reply.plan_id, atomic_load(&plan->last_seq));
        nanosleep(&pause, NULL);
    }
    return EPD_OK;
}

/* One done flag for each launch that the daemon did not end; the stream takes one at a time. */
static uint64_t cuda_release(struct epd_plan *plan)
{
    uint64_t n = atomic_load(&plan->state) == PLAN_IDLE ? 0 : cuda_outstanding(plan);
    if (plan->n_released < n && !atomic_load(&plan->flags->done)) {
        atomic_store(&plan->flags->done, 1);
        plan->n_released++;
    }
    return n > plan->n_released ? n - plan->n_released : 0;
}

static enum epd_status cuda_capture(struct epd_plan *plan, void *stream, struct epd_error *error)
{
    return hand_over(plan, stream, error);
}

static enum epd_status cuda_copy(const struct epd_plan *plan, const struct epd_copy *copies,
                                 uint32_t n_copies, void *stream, struct epd_error *error)
{
    const struct cuda_words *words = plan->stream_words;
    return copy_enqueue(words->copy, copies, n_copies, stream, error);
}

static enum epd_status cuda_arm(struct epd_plan *plan, uint32_t n_launches, struct epd_error *error)
{
    (void)error;
    count_launches(plan, n_launches);
    return EPD_OK;
}

const struct stream_ops stream_cuda = {
    .map = cuda_map,
    .unmap = cuda_unmap,
    .remap = cuda_remap,
    .describe = cuda_describe,
    .range = cuda_range,
    .bind = cuda_bind,
    .unbind = cuda_unbind,
    .outstanding = cuda_outstanding,
    .launches_overlap = 1,
    .begin = cuda_begin,
    .cancel = cuda_cancel,
    .commit = cuda_commit,
    .wait = cuda_wait,
    .release = cuda_release,
    .capture = cuda_capture,
    .copy = cuda_copy,
    .arm = cuda_arm,
};
