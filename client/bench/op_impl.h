/* Between op.c (connection, plans) and op_tensor.c (buffers and what is in them). */
#ifndef EPD_BENCH_OP_IMPL_H
#define EPD_BENCH_OP_IMPL_H

#include "client/bench/op.h"

struct shape {
    uint32_t n_dims;
    int64_t d[3];
};

/* Passes status on; keeps what and libepd's text of it. */
enum epd_status op_check(struct op *op, const char *what, enum epd_status status);

/* Gives the role a buffer of its own, zeros: in the daemon's heap or, on CUDA, memory of this process. */
enum epd_status op_tensor(struct op *op, enum epd_role role, enum epd_dtype dtype, struct shape shape);
/* The same with random values of the job's dtype. */
enum epd_status op_input(struct op *op, enum epd_role role, struct shape shape, float scale);
/* X, TOPK_IDX and TOPK_WEIGHTS. */
enum epd_status op_routing(struct op *op);
/* M_SPLITS: n_rows spread evenly over the local experts. */
enum epd_status op_even_splits(struct op *op, int64_t n_rows);

#endif
