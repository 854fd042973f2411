/* Owned memory of one GPU: VMM allocations that every GPU of the node has mapped at one address, cut into
 * blocks where nobody outside needs them. Lane thread. */
#ifndef EPD_EP_CUDA_HEAP_H
#define EPD_EP_CUDA_HEAP_H

#include "ep/backend.h"
#include "ep/cuda_devices.h"
#include "ep/cuda_driver.h"

/* One VMM allocation. */
struct cuda_chunk {
    CUdeviceptr base;
    CUmemGenericAllocationHandle handle;
    uint64_t bytes;
    struct cuda_range *free; /* owned, rising; NULL for a chunk that is one block */
    struct cuda_chunk *next;
};

struct cuda_heap {
    const struct cuda_driver *driver; /* borrowed from the device */
    const struct cuda_devices *peers; /* borrowed from the device: who maps the memory */
    int ordinal;
    uint64_t granularity;
    struct cuda_chunk *shared; /* owned: chunks that hold many small blocks */
    struct cuda_chunk *whole;  /* owned: chunks that are one block */
};

EPD_MUST_CHECK enum epd_status cuda_heap_init(struct cuda_heap *heap, const struct cuda_driver *driver,
                                              const struct cuda_devices *peers, int ordinal,
                                              struct epd_error *error);
/* Gives back what is left. */
void cuda_heap_fini(struct cuda_heap *heap);
/* Not zeroed. exported: a chunk of its own, with its fd. */
EPD_MUST_CHECK enum epd_status cuda_heap_alloc(struct cuda_heap *heap, uint64_t bytes, int exported,
                                               struct backend_block *block, struct epd_error *error);
/* The device has ended all work on it. */
void cuda_heap_free(struct cuda_heap *heap, const struct backend_block *block);

/* Maps an allocation for one GPU alone or for all peers: a client's. */
EPD_MUST_CHECK enum epd_status cuda_heap_map(const struct cuda_heap *heap,
                                             CUmemGenericAllocationHandle handle, uint64_t bytes,
                                             int for_peers, CUdeviceptr *base, struct epd_error *error);
void cuda_heap_unmap(const struct cuda_heap *heap, CUdeviceptr base, uint64_t bytes);

#endif
