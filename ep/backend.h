/* What a device has to be able to do: one table of functions per backend, all of them mandatory. Everything
 * else in ep is written once over this table; adding a backend adds a row to backend_find and nothing else.
 *
 * Threads: `available` and `n_devices` before any lane runs; all others on the lane thread of the device.
 * Only device_*, memory_*, queue_create/destroy, flag_open/close, copy_in and gemm_create/destroy may
 * allocate or wait for the device, and these never wait for what is in a queue: it may be waiting for a
 * client.
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

/* Marks of a queue. */
#define BACKEND_MARKS 64u

struct backend_device; /* bodies are the backend's own */
struct backend_queue;  /* one per team and device: a stream */
struct backend_gemm;   /* one GEMM problem of a plan, prepared */
struct backend_graph;  /* recorded calls of one queue */

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

/* The hand-off words of a plan, in the session page. */
struct backend_flag {
    struct page *page;
    uint32_t idx;
    void *mapping; /* the backend's own, from flag_open to flag_close */
};

/* The exchange ops, each a row of stages: every rank of the group has ended a stage before any begins the
 * next one. A backend cuts them as suits its kernels (n_stages). In the fused form an op is one stage whatever
 * n_stages says, and the ranks' kernels wait for each other while they run: every rank must be certain to
 * launch its own, and their blocks must be resident together (exchange_blocks). */
enum exchange_op {
    EXCHANGE_ROUTE_DISPATCH, /* reads the routing, and dispatches */
    EXCHANGE_DISPATCH,       /* with the routing that an earlier one left */
    EXCHANGE_COMBINE,
    EXCHANGE_GATHER_SCALARS,
    EXCHANGE_WEIGHT_GRAD,
    EXCHANGE_OP_COUNT
};

/* What the expert's side keeps of a routing besides struct routing; all NULL where the backend keeps none. */
struct exchange_slots {
    int32_t *row;    /* [R, max_tokens, K] */
    float *weight;   /* [R, max_tokens, K]; NULL: weights count as 1 */
    int32_t *tokens; /* [R] */
    /* [n_nodes, R] of the ranks of this one's local index, in the order of the nodes: tokens of it that rank r gets rows of.
     * This rank's own row is whole; of the others only the ranks of this node are written. */
    int32_t *sent;
};

/* Memory that a backend's exchange wants for each rank; 0 and 0 where it works in the tensors alone. */
struct exchange_sizes {
    uint64_t workspace_bytes; /* of a team, zeroed; ops of one team take turns in it */
    uint64_t dot_bytes;       /* of a weight_grad, while it runs */
    int keeps_slots;
};

/* One rank's part of an exchange op; what an op does not use is zero. Arrays [EPD_MAX_RANKS] hold what every
 * rank has. As in kernels.h: dispatch reads x and writes recv_*; combine reads y and writes out;
 * gather_scalars reads value, weight_grad x (dout) and y, and both write scalars. */
struct exchange_args {
    struct exchange_shape shape;
    struct exchange_set set; /* zero where the backend is asked */
    int fused;
    struct routing routing;
    struct exchange_slots slots;
    void *workspace[EPD_MAX_RANKS];
    float *dot;
    struct tensor topk_idx;
    int32_t *counts[EPD_MAX_RANKS];
    struct kernel_error *route_error, *layout_error; /* may be written both or the first alone */
    struct tensor x;
    struct tensor topk_weights; /* n_dims 0: 1 */
    int weights_kept;           /* topk_weights are those that the routing was made with */
    int scaled;
    void *recv_x[EPD_MAX_RANKS];
    float *recv_weights[EPD_MAX_RANKS];
    int32_t *recv_source[EPD_MAX_RANKS];
    int64_t *splits_out,
        *offsets_out; /* of a routing: second copies of m_splits and offsets; NULL: not wanted */
    const void *y[EPD_MAX_RANKS];
    struct tensor out;
    const float *value[EPD_MAX_RANKS];
    float *scalars;
};

struct backend {
    enum epd_backend_kind kind;
    /* bytes that the data of a bound tensor must be aligned to, besides its dtype */
    uint32_t tensor_alignment;
    /* 1: work goes on after the calls. `done` is set in the order of the queue, right behind the kernels;
     * what the step came to is known and reported later. 0: work is done when a call returns, and `done`
     * follows the report. */
    int works_later;
    uint32_t n_stages[EXCHANGE_OP_COUNT];
    /* 1: calls can be recorded and replayed (graph_*, gemm_recordable; NULL elsewhere). */
    int records;
    /* 1: a rank must not begin an exchange op before all ranks have ended the one before. */
    int exchange_takes_turns;
    /* 1: a weight_grad that is given recv_x writes there what a dispatch of x would: dout crosses once for both. */
    int weight_grad_pushes;

    /* 1 if this machine can run it, else 0 and the reason. */
    int (*available)(struct epd_error *reason);
    enum epd_status (*n_devices)(const struct node_config *config, uint32_t *n_devices,
                                 struct epd_error *error);

    /* info: uuid, name and memory_bytes are filled. */
    enum epd_status (*device_open)(const struct node_config *config, uint32_t device_idx,
                                   struct backend_device **device, struct device_info *info,
                                   struct epd_error *error);
    void (*device_close)(struct backend_device *device);
    /* EPD_CUDA if nothing works there any more, though nobody may have asked for anything. Waits for nothing; ends what
     * could be given back meanwhile. */
    enum epd_status (*device_check)(struct backend_device *device, struct epd_error *error);
    /* 1 if nothing is left in any of its queues, and nothing that was put there for others waits for another node. */
    int (*device_idle)(struct backend_device *device);
    /* How many things were given back whose end waits for the whole device: they go when it is idle (reclaim.h), by
     * device_give_back, which returns the bytes of imports that it unmapped. */
    uint32_t (*device_n_waiting)(struct backend_device *device);
    uint64_t (*device_give_back)(struct backend_device *device);

    /* Zeroed. exported: with an fd that a client can map. */
    enum epd_status (*memory_alloc)(struct backend_device *device, uint64_t bytes, int exported,
                                    struct backend_block *block, struct epd_error *error);
    void (*memory_free)(struct backend_device *device, struct backend_block *block);
    /* The request's fd stays the caller's. */
    enum epd_status (*memory_import)(struct backend_device *device, const struct memory_request *request,
                                     struct backend_import *import, struct epd_error *error);
    /* Returns the bytes that were unmapped at once; others go when device_give_back says so. */
    uint64_t (*memory_unimport)(struct backend_device *device, struct backend_import *import);

    enum epd_status (*queue_create)(struct backend_device *device, struct backend_queue **queue,
                                    struct epd_error *error);
    void (*queue_destroy)(struct backend_queue *queue);
    /* A barrier between queues of several devices is: every lane marks its queue, the lanes meet, every lane
     * joins the others' marks. barrier_idx, below BACKEND_MARKS, is not used again before all have joined. */
    enum epd_status (*queue_mark)(struct backend_queue *queue, uint32_t barrier_idx, struct epd_error *error);
    enum epd_status (*queue_join)(struct backend_queue *queue, struct backend_queue *other,
                                  uint32_t barrier_idx, struct epd_error *error);
    /* A ticket for all that was put into the queue so far, and whether that is done. 1 also when it never
     * will be: then *error says why, and is left alone otherwise. */
    enum epd_status (*queue_ticket)(struct backend_queue *queue, uint64_t *ticket, struct epd_error *error);
    int (*queue_reached)(struct backend_queue *queue, uint64_t ticket, struct epd_error *error);

    /* Before the first and after the last use of a plan's flags. */
    enum epd_status (*flag_open)(struct backend_device *device, struct backend_flag *flag,
                                 struct epd_error *error);
    void (*flag_close)(struct backend_device *device, struct backend_flag *flag);
    /* Waits for `ready` in the order of the queue; the ticket has been reached then. Where work is done at once the
     * client has set it before its datagram: it is cleared, or EPD_PROTOCOL at once if it is not set. */
    enum epd_status (*flag_ready)(struct backend_queue *queue, const struct backend_flag *flag,
                                  uint64_t *ticket, struct epd_error *error);
    /* Sets `done`; `ready` is clear then. */
    enum epd_status (*flag_done)(struct backend_queue *queue, const struct backend_flag *flag,
                                 struct epd_error *error);

    enum epd_status (*zero)(struct backend_queue *queue, void *dst, uint64_t bytes, struct epd_error *error);
    enum epd_status (*copy)(struct backend_queue *queue, void *dst, const void *src, uint64_t bytes,
                            struct epd_error *error);
    /* From host memory into fresh memory that nothing in a queue uses yet; done when it returns. */
    enum epd_status (*copy_in)(struct backend_device *device, void *dst, const void *src, uint64_t bytes,
                               struct epd_error *error);
    /* To host memory; bytes a multiple of 4. clear: src is zeroed behind it. It may wait for the next ticket. */
    enum epd_status (*copy_out)(struct backend_queue *queue, void *dst, void *src, uint64_t bytes, int clear,
                                struct epd_error *error);

    /* Any thread. */
    void (*exchange_sizes)(const struct exchange_shape *shape, uint64_t row_bytes,
                           struct exchange_sizes *sizes);
    /* Blocks that an op of the fused form keeps on a device while it waits for other ranks; 0: there is no such
     * form. Any thread. */
    uint32_t (*exchange_blocks)(const struct exchange_shape *shape);
    /* Ends the waiting of a fused op on all ranks, though one of them was not launched: their workspaces
     * [n_ranks] are void until every rank, all idle, has reset its own and the queues have met. Returns when it
     * has been told; waits for nothing that is in a queue. */
    enum epd_status (*exchange_abort)(struct backend_queue *queue, void *const *workspaces, uint32_t n_ranks,
                                      struct epd_error *error);
    enum epd_status (*exchange_reset)(struct backend_queue *queue, const struct exchange_shape *shape,
                                      uint64_t row_bytes, void *workspace, struct epd_error *error);
    enum epd_status (*exchange)(struct backend_queue *queue, enum exchange_op op, uint32_t stage,
                                const struct exchange_args *args, struct epd_error *error);
    enum epd_status (*activation)(struct backend_queue *queue, const struct activation_args *args,
                                  struct epd_error *error);
    enum epd_status (*activation_bwd)(struct backend_queue *queue, const struct activation_bwd_args *args,
                                      struct epd_error *error);
    enum epd_status (*bias_grad)(struct backend_queue *queue, const struct bias_grad_args *args,
                                 struct epd_error *error);

    /* EPD_UNSUPPORTED naming the property that no engine here can do. The problem may ask for fused epilogues:
     * refused likewise where no engine has them, and the caller makes a plain one and a pass of its own. */
    enum epd_status (*gemm_create)(struct backend_device *device, const struct gemm_problem *problem,
                                   struct backend_gemm **gemm, struct epd_error *error);
    enum epd_status (*gemm_launch)(struct backend_queue *queue, struct backend_gemm *gemm,
                                   const struct gemm_launch *launch, struct epd_error *error);
    void (*gemm_destroy)(struct backend_gemm *gemm);

    /* From graph_begin to graph_end calls on the queue are not done but recorded: exchanges of the fused form,
     * gemms that are recordable, activations, copies. graph_end with NULL throws them away. A graph is replayed
     * on its queue alone, in its order; everything its calls were given must still be there. graph_begin and
     * graph_end may allocate. */
    enum epd_status (*graph_begin)(struct backend_queue *queue, struct epd_error *error);
    enum epd_status (*graph_end)(struct backend_queue *queue, struct backend_graph **graph,
                                 struct epd_error *error);
    enum epd_status (*graph_launch)(struct backend_queue *queue, struct backend_graph *graph,
                                    struct epd_error *error);
    void (*graph_destroy)(struct backend_device *device, struct backend_graph *graph);
    /* 1 if launching it reads nothing from the device. */
    int (*gemm_recordable)(const struct backend_gemm *gemm);
};

extern const struct backend backend_host;
#ifdef EPD_HAVE_CUDA
extern const struct backend backend_cuda;
#endif

/* NULL if this build has no such backend. */
const struct backend *backend_find(enum epd_backend_kind kind);

#endif
