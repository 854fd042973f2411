/* Inside of the CUDA backend: a GPU and its queues. Lane thread. */
#ifndef EPD_EP_BACKEND_CUDA_H
#define EPD_EP_BACKEND_CUDA_H

#include "ep/backend.h"
#include "ep/cuda_heap.h"
#include "ep/cuda_import.h"
#include "kernels/gemm/engine.h"

/* Channels that CUDA is told to make on each device (CUDA_DEVICE_MAX_CONNECTIONS): the most there are. */
#define CUDA_CONNECTIONS 32

struct backend_device {
    struct cuda_driver driver;
    struct cuda_devices peers; /* the GPUs of the node, this one among them */
    uint32_t device_idx;       /* in the node */
    int ordinal;               /* CUDA's number */
    struct cuda_heap heap;
    struct cuda_imports imports;
    cudaStream_t setup;                /* work that waits for no client */
    cudaEvent_t sign_of_life;          /* recorded in setup by every device_check, looked at by the next */
    cudaStream_t urgent;               /* what must get through while all queues wait */
    const struct gemm_engine *engine;  /* the one that was asked for; NULL: the best */
    struct backend_queue *first_queue; /* all that were ever made; owned */
    uint32_t n_library_streams;        /* cuda_streams_take */
    _Atomic uint32_t n_connecting;     /* rails whose own streams may wait for other nodes (cuda_rail.h) */
    struct cuda_deferred *deferred;    /* owned: what goes when the queues have passed it */
    uint32_t n_when_idle;              /* of these, what goes when nothing is in the queues */
    struct cuda_flag_page *flag_pages; /* owned: those with flags in use */
};

EPD_MUST_CHECK enum epd_status cuda_queue_create(struct backend_device *device, struct backend_queue **queue,
                                                 struct epd_error *error);
void cuda_queue_destroy(struct backend_queue *queue);
/* Streams that a library makes for itself: they take channels too, of those that queues have. EPD_QUOTA if there are no
 * more. */
EPD_MUST_CHECK enum epd_status cuda_streams_take(struct backend_device *device, uint32_t n,
                                                 struct epd_error *error);
void cuda_streams_give_back(struct backend_device *device, uint32_t n);
/* 1 if nothing is left in any of them, nor in the stream of a rail that connects: what makes CUDA wait for the whole device
 * would wait for a node that may be gone. */
int cuda_queues_idle(struct backend_device *device);
/* Returns when it is so. Where there is no memory to come back later: the lane stands still, and holds no lock of CUDA. */
void cuda_queues_wait(struct backend_device *device);
/* All of a device that closes. */
void cuda_queues_free(struct backend_device *device);
/* Waits for word == 1. */
EPD_MUST_CHECK enum epd_status cuda_queue_await(struct backend_queue *queue, CUdeviceptr word,
                                                uint64_t *ticket, struct epd_error *error);
cudaStream_t cuda_queue_stream(const struct backend_queue *queue);
struct backend_device *cuda_queue_device(const struct backend_queue *queue);
EPD_MUST_CHECK enum epd_status cuda_queue_mark(struct backend_queue *queue, uint32_t barrier_idx,
                                               struct epd_error *error);
EPD_MUST_CHECK enum epd_status cuda_queue_join(struct backend_queue *queue, struct backend_queue *other,
                                               uint32_t barrier_idx, struct epd_error *error);
EPD_MUST_CHECK enum epd_status cuda_queue_ticket(struct backend_queue *queue, uint64_t *ticket,
                                                 struct epd_error *error);
int cuda_queue_reached(struct backend_queue *queue, uint64_t ticket, struct epd_error *error);
EPD_MUST_CHECK enum epd_status cuda_queue_copy_out(struct backend_queue *queue, void *dst, void *src,
                                                   uint64_t bytes, int clear, struct epd_error *error);

/* Runs end(device, arg) once nothing that is in the device's queues now can use it any more; at once if so. A queue that
 * waits for a client is no hindrance. Work outside of steps has a ticket behind it.
 *
 * when_idle: not before a moment in which every queue is empty (reclaim.h). For what makes CUDA wait for the whole device,
 * and so for clients: cudaFree, cudaFreeHost, cudaHostUnregister and cudaIpcCloseMemHandle, of the last opening or not.
 * They wait for their own device only, but until then no other thread gets through with anything of its context, not even
 * to let a stream of another GPU wait for one of its events. VMM calls, events, streams, cudaMalloc, cudaHostAlloc,
 * cudaHostRegister and cudaIpcOpenMemHandle wait for nothing. (Measured behind a stream that waited for a flag and behind a
 * kernel that did, on either of two GPUs: CUDA 13.0, driver 580.) */
void cuda_defer(struct backend_device *device, int when_idle, void (*end)(struct backend_device *, void *),
                void *arg);
/* Ends what may be ended now; all of it when nothing is in the queues. */
void cuda_deferred_end(struct backend_device *device, int all);

#endif
