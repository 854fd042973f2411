#include "ep/cuda_flags.h"

#include <errno.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "ep/backend_cuda.h"

/* The flag words stay in the session page, host memory that both processes register with CUDA: streams wait
 * for and write them as they do device memory, and either side can still end a wait of the other by a plain
 * store. Each part of a session page that has flags in use is mapped and registered once for all of them: what is
 * registered can only be given back when the device is idle, which a device under constant load is not, so plans
 * that come and go must not each leave one behind. */
struct cuda_flag_page {
    struct cuda_flag_page *next; /* of the device, while it has users */
    const char *session;         /* where it lies in the session page; that is there while there are users */
    void *page;
    size_t bytes;
    CUdeviceptr words;
    uint32_t n_users;
};

static void end_page(struct backend_device *device, void *arg)
{
    struct cuda_flag_page *mapping = arg;
    (void)device;
    (void)cudaHostUnregister(mapping->page);
    (void)munmap(mapping->page, mapping->bytes);
    free(mapping);
}

/* Ends the mapping if it fails. */
static enum epd_status map_page(struct backend_device *device, struct cuda_flag_page *mapping,
                                struct epd_error *error)
{
    void *device_page;
    /* Of a shared mapping, "move zero bytes" makes another one. */
    mapping->page = mremap((void *)(uintptr_t)mapping->session, 0, mapping->bytes, MREMAP_MAYMOVE);
    if (mapping->page == MAP_FAILED) {
        error_set(error, EPD_SYSTEM, "flags: mremap: %s", strerror(errno));
        goto free_mapping;
    }
    if (cuda_runtime_check(cudaHostRegister(mapping->page, mapping->bytes, cudaHostRegisterMapped), "flags",
                           error))
        goto unmap;
    if (cuda_runtime_check(cudaHostGetDevicePointer(&device_page, mapping->page, 0), "flags", error)) {
        cuda_defer(device, 1, end_page, mapping);
        return error->status;
    }
    mapping->words = (CUdeviceptr)(uintptr_t)device_page;
    return EPD_OK;

unmap:
    (void)munmap(mapping->page, mapping->bytes);
free_mapping:
    free(mapping);
    return error->status;
}

static const char *start_of(const struct backend_flag *flag, size_t page_bytes)
{
    return (const char *)((uintptr_t)&flag->page->plans[flag->idx] & ~(uintptr_t)(page_bytes - 1));
}

enum epd_status cuda_flag_open(struct backend_device *device, struct backend_flag *flag,
                               struct epd_error *error)
{
    size_t page_bytes = (size_t)sysconf(_SC_PAGESIZE);
    const char *start = start_of(flag, page_bytes);
    for (struct cuda_flag_page *mapping = device->flag_pages; mapping; mapping = mapping->next) {
        if (mapping->session != start)
            continue;
        mapping->n_users++;
        flag->mapping = mapping;
        return EPD_OK;
    }
    struct cuda_flag_page *made = calloc(1, sizeof *made);
    if (!made)
        return error_set(error, EPD_NO_MEMORY, "flags: %zu bytes", sizeof *made);
    *made = (struct cuda_flag_page){
        .next = device->flag_pages, .session = start, .bytes = page_bytes, .n_users = 1};
    if (map_page(device, made, error))
        return error->status;
    device->flag_pages = made;
    flag->mapping = made;
    return EPD_OK;
}

/* Without users it is nobody's any more: another session's page may come to lie where this one's lay. */
void cuda_flag_close(struct backend_device *device, struct backend_flag *flag)
{
    struct cuda_flag_page *mapping = flag->mapping, **link = &device->flag_pages;
    flag->mapping = NULL;
    if (!mapping || --mapping->n_users)
        return;
    while (*link != mapping)
        link = &(*link)->next;
    *link = mapping->next;
    cuda_defer(device, 1, end_page, mapping);
}

static CUdeviceptr word_of(const struct backend_flag *flag, size_t offset)
{
    const struct cuda_flag_page *mapping = flag->mapping;
    uintptr_t line = (uintptr_t)&flag->page->plans[flag->idx] & (mapping->bytes - 1);
    return mapping->words + line + offset;
}

enum epd_status cuda_flag_ready(struct backend_queue *queue, const struct backend_flag *flag,
                                uint64_t *ticket, struct epd_error *error)
{
    return cuda_queue_await(queue, word_of(flag, offsetof(struct page_plan, ready)), ticket, error);
}

/* In one write: each operation of a stream takes a microsecond, and the client waits for this one. */
enum epd_status cuda_flag_done(struct backend_queue *queue, const struct backend_flag *flag,
                               struct epd_error *error)
{
    const struct cuda_driver *driver = &cuda_queue_device(queue)->driver;
    return cuda_driver_check(driver,
                             driver->cuStreamWriteValue64(cuda_queue_stream(queue),
                                                          word_of(flag, offsetof(struct page_plan, ready)),
                                                          PAGE_DONE_NOT_READY, CU_STREAM_WRITE_VALUE_DEFAULT),
                             "done flag", error);
}
