#include "ep/cuda_heap.h"

#include <assert.h>
#include <stdlib.h>
#include <unistd.h>

/* Blocks up to this lie together in chunks of SHARED_CHUNK_BYTES: a plan's control block has kilobytes, a VMM
 * allocation at least 2 MiB. */
#define SMALL_BLOCK_BYTES  (1u << 20)
#define SHARED_CHUNK_BYTES (8u << 20)
#define SMALL_UNIT_BYTES   512u

struct cuda_range {
    uint64_t offset, bytes;
    struct cuda_range *next;
};

static uint64_t round_up(uint64_t bytes, uint64_t unit)
{
    return (bytes + unit - 1) / unit * unit;
}

static CUmemAllocationProp allocation_on(int ordinal)
{
    return (CUmemAllocationProp){
        .type = CU_MEM_ALLOCATION_TYPE_PINNED,
        .requestedHandleTypes = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR,
        .location = {.type = CU_MEM_LOCATION_TYPE_DEVICE, .id = ordinal},
    };
}

enum epd_status cuda_heap_init(struct cuda_heap *heap, const struct cuda_driver *driver,
                               const struct cuda_devices *peers, int ordinal, struct epd_error *error)
{
    CUmemAllocationProp prop = allocation_on(ordinal);
    size_t granularity = 0;
    if (cuda_driver_check(
            driver,
            driver->cuMemGetAllocationGranularity(&granularity, &prop, CU_MEM_ALLOC_GRANULARITY_RECOMMENDED),
            "granularity of device memory", error))
        return error->status;
    *heap =
        (struct cuda_heap){.driver = driver, .peers = peers, .ordinal = ordinal, .granularity = granularity};
    return EPD_OK;
}

/* ---- mapping ---- */

enum epd_status cuda_heap_map(const struct cuda_heap *heap, CUmemGenericAllocationHandle handle,
                              uint64_t bytes, int for_peers, CUdeviceptr *base, struct epd_error *error)
{
    const struct cuda_driver *driver = heap->driver;
    CUmemAccessDesc access[EPD_MAX_DEVICES];
    size_t n_access = for_peers ? heap->peers->n : 1;
    CUdeviceptr at = 0;
    for (size_t i = 0; i < n_access; i++)
        access[i] = (CUmemAccessDesc){
            .location = {.type = CU_MEM_LOCATION_TYPE_DEVICE,
                         .id = for_peers ? heap->peers->ordinals[i] : heap->ordinal},
            .flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE,
        };
    if (cuda_driver_check(driver, driver->cuMemAddressReserve(&at, bytes, 0, 0, 0), "address space", error))
        return error->status;
    if (cuda_driver_check(driver, driver->cuMemMap(at, bytes, 0, handle, 0), "mapping of device memory",
                          error))
        goto free_address;
    if (cuda_driver_check(driver, driver->cuMemSetAccess(at, bytes, access, n_access),
                          "access to device memory", error))
        goto unmap;
    *base = at;
    return EPD_OK;

unmap:
    (void)driver->cuMemUnmap(at, bytes);
free_address:
    (void)driver->cuMemAddressFree(at, bytes);
    return error->status;
}

void cuda_heap_unmap(const struct cuda_heap *heap, CUdeviceptr base, uint64_t bytes)
{
    (void)heap->driver->cuMemUnmap(base, bytes);
    (void)heap->driver->cuMemAddressFree(base, bytes);
}

/* ---- chunks ---- */

static enum epd_status chunk_create(struct cuda_heap *heap, uint64_t bytes, struct cuda_chunk **chunk,
                                    struct epd_error *error)
{
    CUmemAllocationProp prop = allocation_on(heap->ordinal);
    struct cuda_chunk *created = calloc(1, sizeof *created);
    if (!created)
        return error_set(error, EPD_NO_MEMORY, "memory: %zu bytes", sizeof *created);
    created->bytes = bytes;
    if (cuda_driver_check(heap->driver, heap->driver->cuMemCreate(&created->handle, bytes, &prop, 0),
                          "device memory", error)) {
        if (error->status == EPD_NO_MEMORY)
            error_set(error, EPD_NO_MEMORY, "device memory: %llu bytes are not free",
                      (unsigned long long)bytes);
        goto free_chunk;
    }
    if (cuda_heap_map(heap, created->handle, bytes, 1, &created->base, error))
        goto release;
    *chunk = created;
    return EPD_OK;

release:
    (void)heap->driver->cuMemRelease(created->handle);
free_chunk:
    free(created);
    return error->status;
}

static void chunk_destroy(struct cuda_heap *heap, struct cuda_chunk *chunk)
{
    while (chunk->free) {
        struct cuda_range *range = chunk->free;
        chunk->free = range->next;
        free(range);
    }
    cuda_heap_unmap(heap, chunk->base, chunk->bytes);
    (void)heap->driver->cuMemRelease(chunk->handle);
    free(chunk);
}

void cuda_heap_fini(struct cuda_heap *heap)
{
    struct cuda_chunk **lists[] = {&heap->shared, &heap->whole};
    for (int i = 0; i < 2; i++)
        while (*lists[i]) {
            struct cuda_chunk *chunk = *lists[i];
            *lists[i] = chunk->next;
            chunk_destroy(heap, chunk);
        }
}

/* The link to the chunk that holds the address, or to the end of the list. */
static struct cuda_chunk **chunk_find(struct cuda_chunk **list, CUdeviceptr address)
{
    while (*list && !(address >= (*list)->base && address - (*list)->base < (*list)->bytes))
        list = &(*list)->next;
    return list;
}

/* ---- whole chunks ---- */

static enum epd_status alloc_whole(struct cuda_heap *heap, uint64_t bytes, int exported,
                                   struct backend_block *block, struct epd_error *error)
{
    struct cuda_chunk *chunk;
    int fd = -1;
    if (chunk_create(heap, round_up(bytes, heap->granularity), &chunk, error))
        return error->status;
    if (exported && cuda_driver_check(heap->driver,
                                      heap->driver->cuMemExportToShareableHandle(
                                          &fd, chunk->handle, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0),
                                      "export of device memory", error)) {
        chunk_destroy(heap, chunk);
        return error->status;
    }
    chunk->next = heap->whole;
    heap->whole = chunk;
    *block = (struct backend_block){.data = (void *)(uintptr_t)chunk->base, .bytes = chunk->bytes, .fd = fd};
    return EPD_OK;
}

/* ---- small blocks ---- */

static enum epd_status add_shared(struct cuda_heap *heap, struct epd_error *error)
{
    struct cuda_range *all = calloc(1, sizeof *all);
    struct cuda_chunk *chunk;
    if (!all)
        return error_set(error, EPD_NO_MEMORY, "memory: %zu bytes", sizeof *all);
    if (chunk_create(heap, round_up(SHARED_CHUNK_BYTES, heap->granularity), &chunk, error)) {
        free(all);
        return error->status;
    }
    all->bytes = chunk->bytes;
    chunk->free = all;
    chunk->next = heap->shared;
    heap->shared = chunk;
    return EPD_OK;
}

/* First fit. The last range of a chunk is kept even when it is empty, so that giving back allocates nothing
 * more than a range between two blocks. */
static int take_small(struct cuda_chunk *chunk, uint64_t bytes, struct backend_block *block)
{
    for (struct cuda_range *range = chunk->free; range; range = range->next) {
        if (range->bytes < bytes)
            continue;
        *block = (struct backend_block){
            .data = (void *)(uintptr_t)(chunk->base + range->offset), .bytes = bytes, .fd = -1};
        range->offset += bytes;
        range->bytes -= bytes;
        return 1;
    }
    return 0;
}

static enum epd_status alloc_small(struct cuda_heap *heap, uint64_t bytes, struct backend_block *block,
                                   struct epd_error *error)
{
    bytes = round_up(bytes, SMALL_UNIT_BYTES);
    for (struct cuda_chunk *chunk = heap->shared; chunk; chunk = chunk->next)
        if (take_small(chunk, bytes, block))
            return EPD_OK;
    if (add_shared(heap, error))
        return error->status;
    int taken = take_small(heap->shared, bytes, block);
    assert(taken);
    return EPD_OK;
}

/* Joins what lies side by side; empty ranges go. */
static void ranges_join(struct cuda_chunk *chunk)
{
    struct cuda_range **link = &chunk->free;
    while (*link) {
        struct cuda_range *range = *link, *next = range->next;
        if (next && (range->bytes == 0 || range->offset + range->bytes == next->offset)) {
            if (range->bytes) {
                next->bytes += range->bytes;
                next->offset = range->offset;
            }
            *link = next;
            free(range);
        } else {
            link = &range->next;
        }
    }
}

/* Without memory for the range the block stays taken until the chunk goes. */
static void free_small(struct cuda_chunk *chunk, CUdeviceptr address, uint64_t bytes)
{
    struct cuda_range *range = calloc(1, sizeof *range), **link = &chunk->free;
    if (!range)
        return;
    *range = (struct cuda_range){.offset = address - chunk->base, .bytes = bytes};
    while (*link && (*link)->offset < range->offset)
        link = &(*link)->next;
    range->next = *link;
    *link = range;
    ranges_join(chunk);
}

enum epd_status cuda_heap_alloc(struct cuda_heap *heap, uint64_t bytes, int exported,
                                struct backend_block *block, struct epd_error *error)
{
    if (bytes == 0 || bytes > (uint64_t)1 << 48)
        return error_set(error, EPD_INVALID_ARGUMENT, "memory: %llu bytes, want 1..2^48",
                         (unsigned long long)bytes);
    if (!exported && bytes <= SMALL_BLOCK_BYTES)
        return alloc_small(heap, bytes, block, error);
    return alloc_whole(heap, bytes, exported, block, error);
}

void cuda_heap_free(struct cuda_heap *heap, const struct backend_block *block)
{
    CUdeviceptr address = (CUdeviceptr)(uintptr_t)block->data;
    struct cuda_chunk **link = chunk_find(&heap->whole, address);
    if (*link) {
        struct cuda_chunk *chunk = *link;
        *link = chunk->next;
        chunk_destroy(heap, chunk);
    } else {
        link = chunk_find(&heap->shared, address);
        assert(*link);
        struct cuda_chunk *chunk = *link;
        free_small(chunk, address, block->bytes);
        if (chunk->free && chunk->free->bytes == chunk->bytes) {
            *link = chunk->next;
            chunk_destroy(heap, chunk);
        }
    }
    if (block->fd >= 0)
        close(block->fd);
}
