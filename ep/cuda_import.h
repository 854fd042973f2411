/* Client memory on one GPU: cudaMalloc memory by IPC handle, VMM allocations by fd. Mapped on its own GPU
 * alone: no kernel of a peer touches it. CUDA itself counts how often an IPC handle is open, and knows a
 * reused address from an old one; here only the bytes are counted. Lane thread.
 *
 * Closing an IPC handle makes CUDA wait for the device, with locks held that other lanes need to wait for its marks
 * (backend_cuda.h): beside a fused exchange, whose kernel waits for a peer that is about to be launched behind such a mark, for
 * ever. So handles are closed when the device is idle (reclaim.h). Memory that is registered again before that keeps its
 * mapping; so does what its owner has freed: its handle opens as long as it is open here, and is the memory that it was. */
#ifndef EPD_EP_CUDA_IMPORT_H
#define EPD_EP_CUDA_IMPORT_H

#include "ep/cuda_heap.h"

struct cuda_mapping; /* one allocation of a client */

struct cuda_imports {
    const struct cuda_heap *heap; /* borrowed from the device */
    struct cuda_mapping *first;   /* owned */
    uint32_t n_to_close;          /* IPC handles that are open and of no import any more */
};

/* A VMM allocation of another GPU than this one is refused, and both are named. The IPC handle of one opens, and nothing that
 * CUDA says of the mapping tells it from memory of this GPU (CUDA 13.0, driver 580: all pointer attributes are those of the GPU
 * that it was opened for); kernels reach it over NVLink, so who lies about it slows down its own steps and harms nobody.
 * The range is checked against the allocation. The request's fd stays the caller's. */
EPD_MUST_CHECK enum epd_status cuda_import(struct cuda_imports *imports, const struct memory_request *request,
                                           struct backend_import *import, struct epd_error *error);
/* Waits for nothing. Returns the bytes unmapped: 0 of IPC memory, which cuda_imports_close unmaps. */
uint64_t cuda_unimport(struct cuda_imports *imports, struct cuda_mapping *mapping);
/* The device is idle: closes what is of no import any more. Returns the bytes unmapped. */
uint64_t cuda_imports_close(struct cuda_imports *imports);

#endif
