/* What an op has to move, counted in the routing that the ranks will draw. */
#ifndef EPD_BENCH_TRAFFIC_H
#define EPD_BENCH_TRAFFIC_H

#include "client/bench/job.h"

/* Of the rank with the most of it, in either direction. A token counts once per rank that holds one of its experts, however many of
 * them: rows * hidden * element, twice for a layer. */
struct traffic {
    double wire_bytes;  /* to or from other ranks */
    double moved_bytes; /* with what stays on the rank */
    double rows;        /* (token, expert) pairs that a rank receives */
    /* Between nodes, mean of the ranks of node 0: tokens that leave for other nodes and those that come from there, once for each node
     * that holds one of their experts; 0 of one node. */
    double network_bytes;
};

/* Zeros for ops that move no tokens. EPD_NO_MEMORY. */
enum epd_status traffic_count(const struct job *job, struct traffic *traffic);

#endif
