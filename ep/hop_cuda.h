/* The exchange of a rank of a team that lies on several nodes, on CUDA: in the two hops of ep/hop.h, put into a stream.
 * Static: the rail of ep/transport.h moves as many tokens of every frame (kernels/cuda/hop.h) as any of them can have, so the
 * host knows no count and waits for nothing, and what a step puts into its streams is the same every time. Eager: a routing
 * takes one stage more, in which only the heads and counts of the frames cross; when the host has read them (hop_cuda_learn)
 * the parts of the frames follow, as long as there are tokens in them. What crosses later of that routing is known then, and
 * waits for nothing.
 *
 * A rank has n_nodes sets of tokens: its own, and in the frame of each other node those of the rank with its local index
 * there. Inside the node every set is an exchange of its own among the ranks of this node, with a workspace of its own;
 * all of them lay their rows into the same slabs, in the order of the nodes, so that slots hold what they hold on one node,
 * bit for bit. Combine is the way back: the node's sum of a token is made as on one node and rounded to the dtype, the
 * sums cross, and the token's rank adds them in the order of the nodes, in fp32, and rounds once more. So each node that
 * has rows of a token adds one rounding to the one-node result; the same in every repeat.
 *
 * Stages are those of cuda_exchange.h; the rail is swapped within them. Lane thread of the rank. */
#ifndef EPD_EP_HOP_CUDA_H
#define EPD_EP_HOP_CUDA_H

#include "ep/backend.h"
#include "ep/layout.h"
#include "ep/transport.h"

struct CUstream_st;
struct cuda_hop_head;

/* What a dispatch leaves besides struct routing and struct exchange_slots, which hold R / n_nodes ranks for each set, one
 * set behind the other. Of struct routing, expert is of the group, and row is not used. Device memory. */
struct hop_cuda_routing {
    int32_t *
        expert; /* [n_nodes, max_tokens, K] of each set, counted from the first expert of this node; -1: not here */
    int32_t *row;   /* [n_nodes, max_tokens, K] likewise */
    int32_t *place; /* [n_nodes, max_tokens] of this rank's tokens in the frames; -1: does not go there */
};

/* Memory of one rank that swaps, for a group of up to max_tokens. */
struct hop_cuda_frames {
    void *out, *in;  /* [n_nodes - 1] frames each */
    int32_t *unused; /* counts that nobody reads */
};

/* Tokens of this rank that cross to each node, and of the rail's rank there that cross here: of an eager routing, what the
 * host has learnt; else zeros. [EPD_MAX_NODES] */
struct hop_cuda_counts {
    uint32_t sent[EPD_MAX_NODES], came[EPD_MAX_NODES];
};

/* As transport.rail_swap_on. */
typedef enum epd_status (*hop_cuda_swap)(void *arg, const struct transport_move *moves, uint32_t n_parts,
                                         struct CUstream_st *stream, struct epd_error *error);

/* One rank's side; pointers are borrowed. */
struct hop_cuda {
    struct hop_cuda_frames frames;
    struct hop_cuda_routing routing; /* that the op uses */
    uint32_t row_bytes;              /* of the group's dtype */
    uint32_t
        limit; /* tokens that any rank can have of that routing: max_tokens or less, on all nodes the same */
    const struct hop_cuda_counts *counts; /* of that routing, if it is an eager one; else NULL */
    int eager;                            /* messages are as long as what crosses; there are counts */
    int off;  /* the rank's step is off: no kernel runs, and what the op swaps is swapped all the same */
    int told; /* of a rank that is off: its heads went out before; else they say that nothing comes */
    hop_cuda_swap swap;
    void *swap_arg;
};

void hop_cuda_carve_routing(struct hop_cuda_routing *routing, const struct exchange_shape *shape,
                            struct layout *layout);
void hop_cuda_carve_frames(struct hop_cuda_frames *frames, const struct exchange_shape *shape,
                           uint64_t row_bytes, struct layout *layout);

/* The heads of the frames from and to a node, in device memory: there behind the first stage of an eager routing. */
void hop_cuda_heads(const struct hop_cuda_frames *frames, const struct exchange_shape *shape,
                    uint64_t row_bytes, uint32_t node, struct cuda_hop_head **out, struct cuda_hop_head **in);
/* What they say, copied to the host: [n_nodes], those of this node are not looked at. -1, or the node whose head is none:
 * counts are as they were, and nothing of the routing can cross. */
int hop_cuda_learn(const struct exchange_shape *shape, const struct cuda_hop_head *out,
                   const struct cuda_hop_head *in, struct hop_cuda_counts *counts);

/* args: of the whole group; arrays by rank hold those of this node, at their numbers of the group. stage: of an eager routing
 * one more than cuda_exchange.h says, the first; before the second the host has learnt the counts. */
EPD_MUST_CHECK enum epd_status hop_cuda_launch(const struct hop_cuda *hop, enum exchange_op op,
                                               uint32_t stage, const struct exchange_args *args,
                                               struct CUstream_st *stream, struct epd_error *error);

#endif
