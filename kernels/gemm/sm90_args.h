/* What the host side (sm90.c) hands to the kernels (sm90_*.cu): one argument struct and one launcher per layout.
 *
 * All layouts are one product D[outer, inner] = A B^T per tile, tile 128 x (up to 256) per block, two blocks of a cluster
 * on neighbouring 128-row halves sharing B:
 *
 *            A (outer side)      B (inner side)     reduction
 *   TN       W, rows n           X, token rows      k
 *   NN       W, columns k        dY, token rows     n
 *   NT       dY, columns n       X, columns k       token rows
 *
 * Tokens are the inner side of TN and NN because that side of the instruction may be any multiple of 8: groups of any
 * size then cost their own rows and no padding worth naming. */
#ifndef EPD_KERNELS_GEMM_SM90_ARGS_H
#define EPD_KERNELS_GEMM_SM90_ARGS_H

#include <cuda.h>
#include <cuda_runtime_api.h>

#include "kernels/kernels.h"

#define SM90_OUTER_ROWS 128 /* of one block; a cluster has two blocks */
#define SM90_INNER_MAX  256
#define SM90_STEP       64 /* reduction elements of one pipeline stage */
#define SM90_MAX_STAGES 8

/* Device memory of a plan, zero between launches. */
struct sm90_counters {
    uint32_t next_tile;
    uint32_t n_finished;
};

struct sm90_args {
    CUtensorMap a;
    CUtensorMap b;
    CUtensorMap c;             /* where copies write c: 16-bit c; f32 c of NT; a round of a tile at a time */
    CUtensorMap c_rows;        /* TN, NN: the same, eight token rows at a time */
    CUtensorMap act, act_rows; /* of the output of an activation, likewise */
    CUtensorMap preact;        /* NN with an activation: its input, 64 token rows of gates or ups at a time */
    const CUtensorMap *a_parts;     /* [L] device, one map per group; NULL: `a` holds all groups */
    const CUtensorMap *c_parts_map; /* likewise for c of NT */
    const int64_t *m_splits;        /* [L] */
    const int64_t *offsets;         /* [L + 1] or NULL = packed */
    int64_t max_rows;
    uint32_t n_groups;
    uint32_t outer, inner, reduction; /* extents; tokens (inner of TN and NN, reduction of NT) are 0 */
    uint32_t tile_inner; /* TN, NN: most tokens of a tile, multiple of 8; NT: columns, 64..256 by 64 */
    uint32_t box_rows;   /* token rows that one copy of b brings (TN, NN) */
    uint32_t n_stages, stage_bytes;
    uint32_t n_clusters;
    enum epd_dtype dtype_c;
    enum epd_dtype dtype_bias;
    int accumulate;
    enum epd_activation activation;
    void *c_data; /* NULL with an activation: the pre-activation is not kept */
    void *const *c_parts;
    const void *bias;
    void *dbias;
    void *act_data;
    const float *row_weights;
    float *row_sums; /* NN with an activation: [ceil(outer / 64), max_rows] parts of d_row_weights, or NULL */
    struct sm90_counters *counters;
    struct kernel_error *error;
};

#ifdef __cplusplus
extern "C" {
#endif

/* Shared memory a launch with these stages needs. */
size_t sm90_smem_bytes(uint32_t n_stages, uint32_t stage_bytes);

/* Loads the kernel of the problem, so that the first launch loads nothing, lets it have smem_bytes of shared memory and
 * says how many clusters the current device runs at a time. gated: TN with an activation. */
cudaError_t sm90_tn_prepare(enum epd_dtype dtype, int gated, size_t smem_bytes, uint32_t *n_clusters);
cudaError_t sm90_nn_prepare(enum epd_dtype dtype, size_t smem_bytes, uint32_t *n_clusters);
cudaError_t sm90_backward_prepare(enum epd_dtype dtype, size_t smem_bytes, uint32_t *n_clusters);
cudaError_t sm90_nt_prepare(enum epd_dtype dtype, size_t smem_bytes, uint32_t *n_clusters);

/* Enqueue; the arguments are copied. */
cudaError_t sm90_tn_launch(const struct sm90_args *args, enum epd_dtype dtype, cudaStream_t stream);
cudaError_t sm90_nn_launch(const struct sm90_args *args, enum epd_dtype dtype, cudaStream_t stream);
/* NN with an activation. d_row_weights [max_rows], or NULL: not wanted. */
cudaError_t sm90_backward_launch(const struct sm90_args *args, enum epd_dtype dtype, float *d_row_weights,
                                 cudaStream_t stream);
cudaError_t sm90_nt_launch(const struct sm90_args *args, enum epd_dtype dtype, cudaStream_t stream);

cudaError_t sm90_parts_prepare(void);
/* maps[l] = *template_map with the address parts[l], parts being device memory. */
cudaError_t sm90_parts_launch(const CUtensorMap *template_map, const void *const *parts, uint32_t n_groups,
                              CUtensorMap *maps, cudaStream_t stream);

#ifdef __cplusplus
}
#endif

#endif
