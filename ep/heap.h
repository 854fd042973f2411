/* Owned memory of one device: backend allocations counted against the limit of the node. Allocated and freed
 * on the lane thread; the counters may be read by any thread. */
#ifndef EPD_EP_HEAP_H
#define EPD_EP_HEAP_H

#include <stdatomic.h>

#include "ep/backend.h"

struct heap {
    const struct backend *backend;
    struct backend_device *device; /* borrowed from the lane */
    uint32_t device_idx;
    uint64_t limit_bytes; /* 0: none */
    _Atomic uint64_t used_bytes, peak_bytes;
};

void heap_init(struct heap *heap, const struct backend *backend, struct backend_device *device,
               uint32_t device_idx, uint64_t limit_bytes);
/* Zeroed memory. EPD_NO_MEMORY names what was asked, what is left and the limit. */
EPD_MUST_CHECK enum epd_status heap_alloc(struct heap *heap, uint64_t bytes, int exported,
                                          struct backend_block *block, struct epd_error *error);
/* A block that was never allocated (data NULL) is legal. */
void heap_free(struct heap *heap, struct backend_block *block);

#endif
