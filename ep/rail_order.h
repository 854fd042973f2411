/* In which order the nodes of a rail turn to each other in a swap: in every round each to another one, and nobody is
 * turned to twice; so no node has all others' messages come at once while its own wait. Any thread. */
#ifndef EPD_EP_RAIL_ORDER_H
#define EPD_EP_RAIL_ORDER_H

#include <stdint.h>

/* round 0..n_nodes - 2. */
static inline uint32_t rail_peer(uint32_t n_nodes, uint32_t node, uint32_t round)
{
    return (node + round + 1) % n_nodes;
}

#endif
