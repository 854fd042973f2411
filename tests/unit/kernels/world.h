/* All ranks of a group inside one test: an op case, its inputs, the reference routing and what the host
 * kernels write. A stage is run for one rank after the other, which the stage contract of kernels.h allows.
 * Every output starts out as poison and buffers of rows have guard rows behind the capacity. */
#ifndef EPD_TESTS_UNIT_KERNELS_WORLD_H
#define EPD_TESTS_UNIT_KERNELS_WORLD_H

#include "kernels/host/host.h"
#include "tests/reference/op_cases.h"
#include "tests/reference/values.h"

#define WORLD_GUARD_ROWS 3

struct world_rank {
    struct routing routing; /* arrays owned */
    struct kernel_error error;
};

struct world {
    const struct op_case *op_case; /* borrowed */
    struct op_inputs inputs;
    struct reference_routing reference;
    struct host_scratch scratch;
    struct world_rank ranks[REFERENCE_MAX_RANKS];
    /* The inputs of every rank as the reference takes them. */
    double *x[REFERENCE_MAX_RANKS], *dout[REFERENCE_MAX_RANKS], *weights[REFERENCE_MAX_RANKS];
};

void world_init(struct world *world, const struct op_case *op_case);
void world_fini(struct world *world);

struct exchange_shape world_shape(const struct world *world, uint32_t rank);
struct row_groups world_groups(const struct world *world, uint32_t rank);
/* Rows of a received buffer, guard rows included. */
size_t world_buffer_rows(const struct world *world);
/* Rows of rank `rank` that dispatch writes: offsets[L]. */
size_t world_used_rows(const struct world *world, uint32_t rank);

/* Poisoned buffers, one per rank: [C + guard, width] of dtype, and [T, width]. Freed by world_free_buffers.
 */
void world_slot_buffers(const struct world *world, enum epd_dtype dtype, size_t width, void **buffers);
void world_token_buffers(const struct world *world, enum epd_dtype dtype, size_t width, void **buffers);
void world_free_buffers(const struct world *world, void **buffers);

/* Doubles per rank for the reference: [C + guard, width] and [T, width], zeroed. */
void world_slot_doubles(const struct world *world, size_t width, double **buffers);
void world_token_doubles(const struct world *world, size_t width, double **buffers);
void world_free_doubles(const struct world *world, double **buffers);

/* Stages 1 and 2 on all ranks, on poisoned outputs. */
void world_route(struct world *world);
struct route_args world_route_args(struct world *world, uint32_t rank);

/* Stage 3 on all ranks: x or dout, into recv_x [C, H] and recv_weights [C] (NULL: not wanted). */
enum world_input { WORLD_X, WORLD_DOUT };
void world_dispatch(struct world *world, enum world_input input, int scaled, void *const *recv_x,
                    float *const *recv_weights);
/* out [T, H] of all ranks. */
void world_combine(struct world *world, void *const *y, int weighted, void *const *out);
/* out [T, K] of all ranks = <dout, y>. */
void world_weight_grad(struct world *world, void *const *y, float *const *out);
/* out [T, K] of all ranks from value [C]. */
void world_gather(struct world *world, float *const *value, int accumulate, float *const *out);

/* Tensor views of the inputs of a rank. */
struct tensor world_tensor(void *data, enum epd_dtype dtype, int64_t n_rows, int64_t n_columns);

#endif
