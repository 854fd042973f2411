/* Sets of nodes of a fabric: bit per node. Any thread. */
#ifndef EPD_DAEMON_FABRIC_NODES_H
#define EPD_DAEMON_FABRIC_NODES_H

#include <stddef.h>
#include <stdint.h>

/* Nodes 0 to n - 1; n is at most 64. */
static inline uint64_t fabric_nodes_first(uint32_t n)
{
    return n < 64 ? (1ull << n) - 1 : UINT64_MAX;
}

/* " 1 3", as far as there is room. */
void fabric_nodes_name(uint64_t nodes, char *text, size_t bytes);

#endif
