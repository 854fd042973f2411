/* The float64 reference of every op, written from the mathematical definitions and not from any backend:
 * plain loops, arrays of doubles, all ranks of a group in one call. Used by the unit tests of the host
 * kernels, by tests through the daemon and by the tests of the CUDA kernels. Not fast; any thread; nothing
 * here fails.
 *
 * An argument `double *const *v` holds one array per rank; shapes are given per rank. Symbols as in
 * kernels/kernels.h. */
#ifndef EPD_TESTS_REFERENCE_REFERENCE_H
#define EPD_TESTS_REFERENCE_REFERENCE_H

#include <stdint.h>

#include "proto/words.h"

#define REFERENCE_MAX_RANKS 64

struct reference_shape {
    uint32_t world_size, n_experts, top_k, hidden, ffn;
    uint32_t alignment;
    int64_t capacity_rows;
    uint32_t n_tokens[REFERENCE_MAX_RANKS];
};

/* What is wrong with the routing of a rank: the first bad (token, k). token -1: nothing. */
struct reference_bad_routing {
    int64_t token, got;
    int64_t expert; /* -1: out of range; else the expert that the token names twice */
};

/* Where a received row comes from; rank -1: padding. */
struct reference_source {
    int64_t rank, token, k;
};

/* One rank's view of a dispatch. */
struct reference_rank {
    int64_t *expert;   /* [T, K] -1: not routed or bad */
    int64_t *row;      /* [T, K] row at the expert's rank; -1: none */
    int64_t *m_splits; /* [L] */
    int64_t *offsets;  /* [L + 1] */
    int64_t needed_rows, dropped_rows;
    struct reference_source *source; /* [offsets[L]] */
    struct reference_bad_routing bad;
};

struct reference_routing {
    struct reference_shape shape;
    struct reference_rank ranks[REFERENCE_MAX_RANKS];
};

/* topk_idx [T, K] per rank. The result is freed by reference_routing_fini. */
void reference_route(struct reference_routing *routing, const struct reference_shape *shape,
                     int64_t *const *topk_idx);
void reference_routing_fini(struct reference_routing *routing);

/* recv_x [offsets[L], H] and recv_weights [offsets[L]] (or NULL) of every rank: row = x[t], times w[t, k] if
 * scaled. weights NULL: 1. */
void reference_dispatch(const struct reference_routing *routing, double *const *x, double *const *weights,
                        int scaled, double *const *recv_x, double *const *recv_weights);
/* out [T, H] = sum over k of w[t, k] y(t, k); weights NULL: 1. */
void reference_combine(const struct reference_routing *routing, double *const *y, double *const *weights,
                       double *const *out);
/* out [T, K] = <dout[t], y(t, k)>. */
void reference_weight_grad(const struct reference_routing *routing, double *const *dout, double *const *y,
                           double *const *out);
/* out [T, K] = value of the row of (t, k), 0 if it has none. */
void reference_gather(const struct reference_routing *routing, double *const *value, double *const *out);

/* Rows offsets[l] .. offsets[l] + m_splits[l] - 1 belong to group l. */
struct reference_groups {
    uint32_t n_groups;
    const int64_t *m_splits, *offsets;
};

/* Y = X W^T (+ bias [L, N]), dX = dY W, dW (+)= dY^T X, dbias (+)= column sums of dY (NULL: not wanted). Rows
 * of no group are left alone. Sizes: x [M, K], w [L, N, K], y [M, N]. */
void reference_gemm_tn(const struct reference_groups *groups, uint32_t n, uint32_t k, const double *x,
                       const double *w, const double *bias, double *y);
void reference_gemm_nn(const struct reference_groups *groups, uint32_t n, uint32_t k, const double *dy,
                       const double *w, double *dx);
void reference_gemm_nt(const struct reference_groups *groups, uint32_t n, uint32_t k, const double *dy,
                       const double *x, int accumulate, double *dw, double *dbias);

/* f(g) and its derivative. */
double reference_gate(enum epd_activation kind, double g);
double reference_gate_slope(enum epd_activation kind, double g);

/* act [M, F] = f(gate) up, times row_weights [M] unless NULL; preact [M, 2F]. */
void reference_activation(const struct reference_groups *groups, enum epd_activation kind, uint32_t ffn,
                          const double *preact, const double *row_weights, double *act);

struct reference_activation_bwd {
    enum epd_activation kind;
    uint32_t ffn, hidden;
    const double *preact, *d_act;    /* [M, 2F], [M, F] */
    const double *row_weights;       /* [M] or NULL */
    const double *dy, *bias2;        /* [M, H], [L, H] or NULL */
    double *d_preact, *weighted_act; /* [M, 2F], [M, F] */
    double *d_row_weights;           /* [M] */
};
void reference_activation_bwd(const struct reference_groups *groups,
                              const struct reference_activation_bwd *args);

/* The experts of a whole layer: all E of them, in the order of their numbers. */
struct reference_layer {
    enum epd_activation kind;
    const double *w1, *b1; /* [E, 2F, H], [E, 2F] or NULL */
    const double *w2, *b2; /* [E, H, F], [E, H] or NULL */
};

/* out[t] = sum over k of w[t, k] (W2_e act(W1_e x[t] + b1_e) + b2_e); (t, k) that the routing dropped add
 * nothing. */
void reference_moe_forward(const struct reference_routing *routing, const struct reference_layer *layer,
                           double *const *x, double *const *weights, double *const *out);

/* Gradients of sum over ranks and tokens of <dout[t], out[t]>. All are overwritten; db1 and db2 may be NULL.
 */
struct reference_gradients {
    double *const *dx;        /* [T, H] */
    double *const *d_weights; /* [T, K] */
    double *dw1, *db1, *dw2, *db2;
};
void reference_moe_backward(const struct reference_routing *routing, const struct reference_layer *layer,
                            double *const *x, double *const *weights, double *const *dout,
                            const struct reference_gradients *gradients);

#endif
