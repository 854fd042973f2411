/* Client memory on one GPU: cudaMalloc memory by IPC handle, VMM allocations by fd. Mapped on its own GPU
 * alone: no kernel of a peer touches it. CUDA itself counts how often an IPC handle is open, and knows a
 * reused address from an old one; here only the bytes are counted. Lane thread.
 *
 * Closing an IPC handle makes CUDA wait for whole devices, with locks held that a launch of any lane needs: beside a fused
 * exchange, whose kernels wait for a launch that is yet to come, for ever. So handles are closed in quiet moments only
 * (quiet.h), and memory that is registered again before one keeps its mapping. */
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
/* In a quiet moment: closes what is of no import any more. Returns the bytes unmapped. */
uint64_t cuda_imports_close(struct cuda_imports *imports);

#endif
