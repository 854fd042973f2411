/* CUDA kernels at both ends of a rail, where a group spans nodes (ep/hop_cuda.h): which tokens go to which node, each
 * once; their rows, experts and weights one behind the other in the frame of that node; and what came in the frames from
 * there. Places are those of max_tokens: no kernel has to know how much of a frame crosses.
 *
 * A token goes by its place in the frame, rising with the token. Of the sets of tokens that a rank has (struct
 * exchange_set) the one of its own node is its own tokens, and that of any other node what came from the rank of the same
 * local index there: experts [max_tokens, K] count from the first one of this node, -1 where there is none here.
 *
 * What arrived is not trusted: after a swap that failed it is anything. Every expert that is no one of this node counts as
 * none, and there are never more than max_tokens tokens; what indexes memory is made of that here: the rows of a set are
 * laid out by the experts that are there, counted again by the exchange of the set. Counts that came are for the books
 * alone, each within 0 and max_tokens: those of a frame whose counts and experts differ are wrong numbers in the step's
 * rows and traffic, and nothing else (the host backend, which lays out by them, compares them: ep/hop_frame.h).
 * Launchers as in cuda.h. */
#ifndef EPD_KERNELS_CUDA_HOP_H
#define EPD_KERNELS_CUDA_HOP_H

#include "kernels/cuda/cuda.h"

/* What a frame begins with; written for every routing. */
#define CUDA_HOP_MAGIC 0x32706f68u /* "hop2" */
struct cuda_hop_head {
    uint32_t magic;
    uint32_t n_tokens; /* in the frame */
};

/* Where things are in a frame, byte offsets, each a multiple of 256; the way back uses the same places: scalars
 * [max_tokens, K] f32 at experts, sums [max_tokens, H] at rows. Head, counts and experts
 * cross with a routing alone; then, and later of the same routing, the parts that are needed: rows, weights, or both; sums or
 * scalars back. ep/hop_cuda.h says how much of each. */
struct cuda_hop_frame {
    size_t head;
    size_t counts;  /* i32 [E]: rows that the sending rank has for each expert of the group */
    size_t experts; /* i32 [max_tokens, K] */
    size_t weights; /* f32 [max_tokens, K] */
    size_t rows;    /* [max_tokens, H] */
    size_t bytes;   /* of all */
};
void cuda_hop_frame_layout(const struct exchange_shape *shape, size_t row_bytes,
                           struct cuda_hop_frame *frame);

/* What all of them need, of one rank. */
struct cuda_hop {
    struct exchange_shape
        shape; /* of the group: rank and experts count over all nodes; n_tokens of this rank */
    uint32_t node;
    uint32_t row_bytes; /* a multiple of 16 */
    struct cuda_hop_frame frame;
    char *out, *in;        /* frames of the other nodes, in order */
    const int32_t *expert; /* [max_tokens, K] of the group, checked: written by choose */
    const int32_t *place;  /* [n_nodes, max_tokens] of each token, -1: it does not go there; likewise */
};

/* Checks topk_idx by the rule of routing (route.cuh), and says where each token goes. Writes heads and counts into the
 * frames that go out. */
struct cuda_hop_choose_args {
    struct cuda_hop hop;
    struct tensor topk_idx; /* [T, K] i32 or i64 */
    int32_t *expert, *place;
    int32_t *expert_here; /* [max_tokens, K] experts of the own set */
    int32_t *counts
        [EPD_MAX_RANKS]; /* routing.counts [R, E] of every rank of this node, by local index; row `rank` */
    int32_t *
        sent_tokens; /* [R]: of other nodes' ranks: tokens of this rank that have an expert there; NULL: not wanted */
    struct kernel_error *error;
};
EPD_MUST_CHECK enum epd_status cuda_hop_choose_launch(const struct cuda_hop_choose_args *args,
                                                      struct CUstream_st *stream, struct epd_error *error);

/* Fills the frames that go out. NULL: not wanted. */
struct cuda_hop_pack_args {
    struct cuda_hop hop;
    int experts;
    const float *weights; /* [T, K] */
    const void *x;        /* [T, H], 16-byte aligned */
};
EPD_MUST_CHECK enum epd_status cuda_hop_pack_launch(const struct cuda_hop_pack_args *args,
                                                    struct CUstream_st *stream, struct epd_error *error);

/* The experts of the frames that came in, and their counts, for all ranks of this node. A frame that is none is recorded
 * as EPD_PROTOCOL, token the number of its node, and counts as empty. */
struct cuda_hop_take_args {
    struct cuda_hop hop;
    int32_t *experts_here;          /* [n_nodes, max_tokens, K]; that of this node is left alone */
    int32_t *counts[EPD_MAX_RANKS]; /* as in choose; rows of the rail's other ranks */
    struct kernel_error *error;
};
EPD_MUST_CHECK enum epd_status cuda_hop_take_launch(const struct cuda_hop_take_args *args,
                                                    struct CUstream_st *stream, struct epd_error *error);

/* out[t] holds the sum of this node, rounded; becomes the sum over the nodes, in order, in fp32, rounded once more. The
 * sums of the others came back into the frames that had gone out. */
struct cuda_hop_finish_args {
    struct cuda_hop hop;
    struct tensor out; /* [T, H] */
};
EPD_MUST_CHECK enum epd_status cuda_hop_finish_launch(const struct cuda_hop_finish_args *args,
                                                      struct CUstream_st *stream, struct epd_error *error);

/* scalars [T, K] hold those of this node; the others' come from the frames as in finish. */
struct cuda_hop_collect_args {
    struct cuda_hop hop;
    float *scalars;
};
EPD_MUST_CHECK enum epd_status cuda_hop_collect_launch(const struct cuda_hop_collect_args *args,
                                                       struct CUstream_st *stream, struct epd_error *error);

#endif
