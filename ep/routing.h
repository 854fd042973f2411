/* The memory of a routing context: what one dispatch leaves for its combine and its backward. Carved out of
 * the control block of the plan that routes; written by kernels only. */
#ifndef EPD_EP_ROUTING_H
#define EPD_EP_ROUTING_H

#include "ep/backend.h"
#include "ep/hop_cuda.h"
#include "ep/hop_routing.h"
#include "ep/layout.h"
#include "ep/problem.h"

struct routing_context {
    struct routing routing;
    struct exchange_slots slots; /* NULL unless the backend keeps them */
    float *recv_weights;         /* [C]; NULL unless asked for */
    struct hop_routing hop;      /* of a team that spans nodes; the one or the other */
    struct hop_cuda_routing hop_cuda;
    struct hop_cuda_counts hop_counts; /* lane thread of the rank */
    /* Lane thread of the rank. */
    int valid;         /* the latest step of the plan that routes went well */
    int stepped;       /* it has run at all */
    uint32_t n_tokens; /* of that step */
};

/* Numbers in exchange_slots.sent. */
uint64_t routing_n_sent(const struct problem *problem);
/* The same numbers where work is done at once and nobody keeps them: from the routing of a step of so many tokens.
 * O(tokens of the rail * K). */
void routing_count_sent(const struct routing_context *context, const struct problem *problem,
                        uint32_t n_tokens, int32_t *sent);

/* Takes the arrays from the layout (pointers are NULL while it measures). */
void routing_carve(struct routing_context *context, const struct problem *problem, int with_weights,
                   int with_slots, struct layout *layout);

#endif
