/* A byte range known to the daemon: owned (symmetric heap) or imported (client memory by handle). Counted references:
 * plans hold the memories they are bound to. Loop thread; see node.h. */
#ifndef EPD_EP_MEMORY_H
#define EPD_EP_MEMORY_H

#include "ep/node.h"

struct memory;

struct memory_request {
    uint32_t device_idx;
    enum epd_memory_kind kind;
    uint64_t bytes;
    uint64_t offset;           /* imported: where the range starts inside the client's allocation */
    uint64_t allocation_bytes; /* CUDA_VMM: of the whole allocation; 0: it ends with the range */
    int fd;                    /* MEMFD, CUDA_VMM: taken over by memory_acquire in every case; -1 otherwise */
    uint8_t ipc_handle[EPD_IPC_HANDLE_BYTES];
};

/* memory is NULL unless error->status is EPD_OK; it comes with one reference. */
typedef void (*memory_callback)(void *arg, struct memory *memory, const struct epd_error *error);

/* Allocates or imports on the lane of the device, then calls back. An immediate error means that callback will not run.
 * Imports check the range against the real allocation, and that a memfd is sealed against shrinking. */
EPD_MUST_CHECK enum epd_status memory_acquire(struct node *node, const struct memory_request *request,
                                              memory_callback callback, void *arg, struct epd_error *error);
void memory_retain(struct memory *memory);
/* The last release unmaps and frees on the lane; device_info counts the bytes back when that is done. */
void memory_release(struct memory *memory);

uint64_t memory_bytes(const struct memory *memory);
/* What it takes of its device: of owned memory the whole allocation, which the backend rounds up (on CUDA to 2 MiB). */
uint64_t memory_held_bytes(const struct memory *memory);
uint32_t memory_device_idx(const struct memory *memory);
/* References held by plans (memory_release is legal but the bytes stay until they go). */
uint32_t memory_references(const struct memory *memory);
/* An owned memory's fd for the client: borrowed, valid while the memory lives. -1 for imports. */
int memory_fd(const struct memory *memory);

#endif
