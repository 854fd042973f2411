/* One rank's MoE layer through the daemon, bound to the inputs of an op case (tests/reference/op_cases.h):
 * group, buffers and plans. Everything fails the rank process (RANK_CHECK) when it does not work, except what
 * a test asks for. Owned by the rank process; one thread. */
#ifndef EPD_TESTS_INTEGRATION_LAYER_H
#define EPD_TESTS_INTEGRATION_LAYER_H

#include "tests/integration/rank_process.h"
#include "tests/reference/op_cases.h"

struct layer {
    const struct op_case *op_case;
    struct op_inputs inputs;
    const struct rank *rank;
    uint32_t n_tokens, n_local_experts;
    int64_t capacity_rows;
    struct epd_client *client;
    struct epd_group *group;
};

/* One tensor in a buffer of its own. data is poisoned unless source is given (then copied). */
struct layer_tensor {
    struct epd_tensor tensor;
    void *data;
    size_t n; /* elements */
};

/* Opens a client and joins the group. */
void layer_open(struct layer *layer, const struct rank *rank, const struct op_case *op_case);
void layer_close(struct layer *layer);
/* The group options of the case, for tests that join by themselves. */
struct epd_group_options layer_group_options(const struct layer *layer);

struct layer_tensor layer_tensor(struct layer *layer, enum epd_role role, enum epd_dtype dtype,
                                 const int64_t *shape, uint32_t n_dims, const void *source);
void layer_tensor_release(struct layer_tensor *tensor);

/* The input tensors of the case, by role (X, TOPK_IDX, TOPK_WEIGHTS, DOUT, W1, B1, W2, B2), with their
 * values; the outputs (OUT, DX, D_WEIGHTS, RECV_X, M_SPLITS, ...), poisoned. DW1.. have dtype f32. */
struct layer_tensor layer_input(struct layer *layer, enum epd_role role);
struct layer_tensor layer_output(struct layer *layer, enum epd_role role);

/* Creates a plan over the tensors ([n], those with role 0 are left out). */
struct epd_plan *layer_plan(struct layer *layer, struct epd_plan_options options,
                            const struct layer_tensor *tensors, uint32_t n);
/* Launches, waits, and returns the step's status. */
enum epd_status layer_step(struct epd_plan *plan);

/* Compares with the reference values [n] under a chain tolerance; fails the rank with the case's name and
 * `what`. */
void layer_expect(const struct layer *layer, const char *what, const struct layer_tensor *got,
                  const double *want, size_t n);

#endif
