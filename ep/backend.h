/* What a device has to be able to do: one table of functions per backend, all of them mandatory. Everything
 * else in ep is written once over this table; adding a backend adds a row to backend_find and nothing else.
 *
 * Threads: `available` and `n_devices` before any lane runs; `flag_release` on the loop thread; all others on
 * the lane thread of the device. Only device_*, memory_*, queue_create/destroy and gemm_create/destroy may
 * block or allocate.
 *
 * Order: calls that take a queue are done in the order of the calls. A backend may do them at once (host) or
 * enqueue them on a stream; queue_reached tells when. What a call reads or writes in device memory is valid
 * in that order; what copy_out writes may be read once queue_reached has said so.
 *
 * Pointers: owned memory is mapped at one address on every device of the node. */
#ifndef EPD_EP_BACKEND_H
#define EPD_EP_BACKEND_H

#include "ep/memory.h"
#include "ep/node.h"
#include "kernels/gemm/engine.h"
#include "kernels/kernels.h"
#include "proto/page.h"

struct backend_device; /* bodies are the backend's own */
struct backend_queue;  /* one per team and device: a stream */
struct backend_gemm;   /* one GEMM problem of a plan, prepared */

/* Owned memory. fd is -1 unless it was asked for. */
struct backend_block {
    void *data;
    uint64_t bytes; /* taken from the device: the size asked for, rounded up */
    int fd;
};

/* A client's memory, mapped. */
struct backend_import {
    void *data;            /* where the range starts */
    uint64_t mapped_bytes; /* newly mapped for it: 0 when a mapping made for another import serves it too */
    void *mapping;         /* the backend's own */
};

/* The hand-off words of a plan. */
struct backend_flag {
    struct page *page;
    uint32_t idx;
};

struct backend {
    enum epd_backend_kind kind;
    uint32_t
        tensor_alignment; /* bytes that the data of a bound tensor must be aligned to, besides its dtype */

    /* 1 if this machine can run it, else 0 and the reason. */
    int (*available)(struct epd_error *reason);
    enum epd_status (*n_devices)(const struct node_config *config, uint32_t *n_devices,
                                 struct epd_error *error);

    /* info: uuid, name and memory_bytes are filled. */
    enum epd_status (*device_open)(const struct node_config *config, uint32_t device_idx,
                                   struct backend_device **device, struct device_info *info,
                                   struct epd_error *error);
    void (*device_close)(struct backend_device *device);

    /* Zeroed. exported: with an fd that a client can map. */
    enum epd_status (*memory_alloc)(struct backend_device *device, uint64_t bytes, int exported,
                                    struct backend_block *block, struct epd_error *error);
    void (*memory_free)(struct backend_device *device, struct backend_block *block);
    /* The request's fd stays the caller's. */
    enum epd_status (*memory_import)(struct backend_device *device, const struct memory_request *request,
                                     struct backend_import *import, struct epd_error *error);
    /* Returns the bytes that were unmapped. */
    uint64_t (*memory_unimport)(struct backend_device *device, struct backend_import *import);

    enum epd_status (*queue_create)(struct backend_device *device, struct backend_queue **queue,
                                    struct epd_error *error);
    void (*queue_destroy)(struct backend_queue *queue);
    /* A barrier between queues of several devices is: every lane marks its queue, the lanes meet, every lane
     * joins the others' marks. barrier_idx counts the barriers of a step. */
    enum epd_status (*queue_mark)(struct backend_queue *queue, uint32_t barrier_idx, struct epd_error *error);
    enum epd_status (*queue_join)(struct backend_queue *queue, struct backend_queue *other,
                                  uint32_t barrier_idx, struct epd_error *error);
    /* A ticket for all that was put into the queue so far, and whether that is done. */
    enum epd_status (*queue_ticket)(struct backend_queue *queue, uint64_t *ticket, struct epd_error *error);
    int (*queue_reached)(struct backend_queue *queue, uint64_t ticket);

    /* Waits for `ready` in the order of the queue and clears it. Where flags are host memory the client has
     * set it before its datagram: EPD_PROTOCOL at once if not. */
    enum epd_status (*flag_ready)(struct backend_queue *queue, const struct backend_flag *flag,
                                  struct epd_error *error);
    /* Sets `done`. */
    void (*flag_done)(struct backend_queue *queue, const struct backend_flag *flag);
    /* For a launch that reached no queue: clears `ready`, sets `done`. Never blocks. */
    void (*flag_release)(const struct backend_flag *flag);

    enum epd_status (*zero)(struct backend_queue *queue, void *dst, uint64_t bytes, struct epd_error *error);
    enum epd_status (*copy)(struct backend_queue *queue, void *dst, const void *src, uint64_t bytes,
                            struct epd_error *error);
    /* From host memory, which may be reused at once; and to host memory. */
    enum epd_status (*copy_in)(struct backend_queue *queue, void *dst, const void *src, uint64_t bytes,
                               struct epd_error *error);
    enum epd_status (*copy_out)(struct backend_queue *queue, void *dst, const void *src, uint64_t bytes,
                                struct epd_error *error);

    enum epd_status (*route_count)(struct backend_queue *queue, const struct route_args *args,
                                   struct epd_error *error);
    enum epd_status (*route_layout)(struct backend_queue *queue, const struct route_args *args,
                                    struct epd_error *error);
    enum epd_status (*dispatch_push)(struct backend_queue *queue, const struct dispatch_args *args,
                                     struct epd_error *error);
    enum epd_status (*combine)(struct backend_queue *queue, const struct combine_args *args,
                               struct epd_error *error);
    enum epd_status (*gather_scalars)(struct backend_queue *queue, const struct gather_scalars_args *args,
                                      struct epd_error *error);
    enum epd_status (*weight_grad)(struct backend_queue *queue, const struct weight_grad_args *args,
                                   struct epd_error *error);
    enum epd_status (*activation)(struct backend_queue *queue, const struct activation_args *args,
                                  struct epd_error *error);
    enum epd_status (*activation_bwd)(struct backend_queue *queue, const struct activation_bwd_args *args,
                                      struct epd_error *error);
    enum epd_status (*bias_grad)(struct backend_queue *queue, const struct bias_grad_args *args,
                                 struct epd_error *error);

    /* EPD_UNSUPPORTED naming the property that no engine here can do. */
    enum epd_status (*gemm_create)(struct backend_device *device, const struct gemm_problem *problem,
                                   struct backend_gemm **gemm, struct epd_error *error);
    enum epd_status (*gemm_launch)(struct backend_queue *queue, struct backend_gemm *gemm,
                                   const struct gemm_args *args, struct epd_error *error);
    void (*gemm_destroy)(struct backend_gemm *gemm);
};

extern const struct backend backend_host;

/* NULL if this build has no such backend. */
const struct backend *backend_find(enum epd_backend_kind kind);

#endif
