/* Sets of nodes of a fabric: bit per node. Any thread. */
#ifndef EPD_DAEMON_FABRIC_NODES_H
#define EPD_DAEMON_FABRIC_NODES_H

#include <stdint.h>

/* Nodes 0 to n - 1; n is at most 64. */
static inline uint64_t fabric_nodes_first(uint32_t n)
{
    return n < 64 ? (1ull << n) - 1 : UINT64_MAX;
}

#endif
