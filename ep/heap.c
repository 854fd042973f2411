#include "ep/heap.h"

#include <assert.h>

void heap_init(struct heap *heap, const struct backend *backend, struct backend_device *device,
               uint32_t device_idx, uint64_t limit_bytes)
{
    *heap = (struct heap){
        .backend = backend, .device = device, .device_idx = device_idx, .limit_bytes = limit_bytes};
}

enum epd_status heap_alloc(struct heap *heap, uint64_t bytes, int exported, struct backend_block *block,
                           struct epd_error *error)
{
    uint64_t used = atomic_load(&heap->used_bytes);
    struct backend_block taken;
    if (heap->limit_bytes && (used >= heap->limit_bytes || bytes > heap->limit_bytes - used))
        return error_set(error, EPD_NO_MEMORY,
                         "heap of device %u: %llu bytes asked, %llu of %llu in use (heap limit)",
                         heap->device_idx, (unsigned long long)bytes, (unsigned long long)used,
                         (unsigned long long)heap->limit_bytes);
    if (heap->backend->memory_alloc(heap->device, bytes, exported, &taken, error))
        return error->status;
    used = atomic_fetch_add(&heap->used_bytes, taken.bytes) + taken.bytes;
    if (used > atomic_load(&heap->peak_bytes))
        atomic_store(&heap->peak_bytes, used); /* only the lane writes it */
    *block = taken;
    return EPD_OK;
}

void heap_free(struct heap *heap, struct backend_block *block)
{
    if (!block->data)
        return;
    assert(atomic_load(&heap->used_bytes) >= block->bytes);
    atomic_fetch_sub(&heap->used_bytes, block->bytes);
    heap->backend->memory_free(heap->device, block);
    *block = (struct backend_block){.fd = -1};
}
