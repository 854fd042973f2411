/* The exchange ops of ep/backend.h by the CUDA kernels (kernels/cuda/cuda.h): stage by stage, where the lanes
 * meet between two stages and nothing ever polls on the device, or fused, one launch per kernel. Lane thread.
 */
#ifndef EPD_EP_CUDA_EXCHANGE_H
#define EPD_EP_CUDA_EXCHANGE_H

#include "ep/backend.h"

struct CUstream_st;

/* n_stages of each op. */
enum {
    CUDA_ROUTE_DISPATCH_STAGES = 3, /* send, layout, receive */
    CUDA_DISPATCH_STAGES = 2,       /* send, receive */
    CUDA_COMBINE_STAGES = 3,        /* publish weights, send, receive */
    CUDA_GATHER_STAGES = 2,         /* send, receive */
    CUDA_WEIGHT_GRAD_STAGES = 4,    /* a dispatch, then a gather */
};

/* Where the group spans nodes: of one rank, with a workspace for each node's tokens (hop_cuda.h). */
void cuda_exchange_sizes(const struct exchange_shape *shape, uint64_t row_bytes,
                         struct exchange_sizes *sizes);
EPD_MUST_CHECK enum epd_status cuda_exchange_reset(const struct exchange_shape *shape, uint64_t row_bytes,
                                                   void *workspace, struct CUstream_st *stream,
                                                   struct epd_error *error);
/* stage of the fused form: 0. */
EPD_MUST_CHECK enum epd_status cuda_exchange_launch(enum exchange_op op, uint32_t stage,
                                                    const struct exchange_args *args,
                                                    struct CUstream_st *stream, struct epd_error *error);

#endif
