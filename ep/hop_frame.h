/* The messages that cross between nodes, on one rail: a fixed head, and behind it the sections that its content names,
 * each at a multiple of HOP_ALIGNMENT. Numbers are those of the machine: all nodes of a fabric are of one kind. What
 * comes in is checked before it is used: a peer that lies costs the step, not the memory. Lane thread. */
#ifndef EPD_EP_HOP_FRAME_H
#define EPD_EP_HOP_FRAME_H

#include "ep/problem.h"

#define HOP_MAGIC     0x31706f68u /* "hop1" */
#define HOP_ALIGNMENT 64u

/* Sections, in this order. n is the head's n_tokens. */
enum hop_content {
    HOP_COUNTS = 1,   /* int32 [E]: what the sending rank routes to every expert */
    HOP_EXPERTS = 2,  /* int32 [n, K], -1 where there is none */
    HOP_WEIGHTS = 4,  /* f32 [n, K] */
    HOP_ROWS = 8,     /* [n, H] of the group's dtype */
    HOP_SUMS = 16,    /* f32 [n, H] */
    HOP_SCALARS = 32, /* f32 [n, K] */
    HOP_STATIC =
        64 /* sections are as long as for the limit, and the message with them; n rows of each count */
};

struct hop_head {
    uint32_t magic;
    uint32_t content;
    uint32_t status; /* of the sending rank: not EPD_OK: it is off, and nothing follows */
    uint32_t n_tokens;
    uint64_t step; /* of all ranks of the team */
    uint64_t reserved[5];
};
_Static_assert(sizeof(struct hop_head) == HOP_ALIGNMENT, "sections are aligned");

/* Where the sections lie; those that are not there are NULL. */
struct hop_frame {
    struct hop_head *head;
    int32_t *counts, *experts;
    float *weights;
    char *rows;
    float *sums, *scalars;
    uint64_t bytes; /* of all */
};

/* Of a routing: the tokens that may cross at most, max_tokens or less, and those that do. */
struct hop_tokens {
    uint32_t limit, n;
};

/* data NULL: only measures. */
void hop_frame_lay(struct hop_frame *frame, const struct problem *problem, uint32_t content,
                   struct hop_tokens tokens, void *data);
/* The same, and writes the head. */
void hop_frame_begin(struct hop_frame *frame, const struct problem *problem, uint32_t content,
                     struct hop_tokens tokens, uint64_t step, void *data);
/* What came from a node: EPD_PROTOCOL naming it if it is not what was due. tokens.n: what must come; UINT32_MAX: any
 * number up to the limit. Experts and counts are checked too, and compared for
 * the experts of this node. A head with a status is EPD_PEER_LOST. */
EPD_MUST_CHECK enum epd_status hop_frame_check(struct hop_frame *frame, const struct problem *problem,
                                               uint32_t content, struct hop_tokens tokens, uint64_t step,
                                               uint32_t node, void *data, uint64_t bytes,
                                               struct epd_error *error);

#endif
