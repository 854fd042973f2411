/* The cost model of the sm90 engine: how a problem is cut. A pure function, any thread. */
#ifndef EPD_KERNELS_GEMM_SM90_CONFIG_H
#define EPD_KERNELS_GEMM_SM90_CONFIG_H

#include "kernels/gemm/engine.h"

struct sm90_config {
    uint32_t
        tile_inner; /* TN, NN: most tokens of a tile, multiple of 8; NT: columns of a tile, multiple of 64 */
    uint32_t box_rows; /* token rows of one copy: 8, 16, 32 or 64 */
    uint32_t n_stages;
    uint32_t stage_bytes;
};

/* n_clusters: how many run at a time (half the multiprocessors). */
struct sm90_config sm90_config_choose(const struct gemm_problem *problem, uint32_t n_clusters);

#endif
