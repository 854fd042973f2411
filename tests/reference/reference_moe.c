#include <stdlib.h>
#include <string.h>

#include "tests/reference/reference.h"
#include "tests/reference/values.h"

/* One expert applied to one token. */
struct expert_pass {
    const struct reference_layer *layer;
    size_t expert, hidden, ffn;
    const double *x;
    double *gate, *up, *act, *y; /* [F] [F] [F] [H] */
};

static void pass_init(struct expert_pass *pass, const struct reference_shape *shape,
                      const struct reference_layer *layer)
{
    *pass = (struct expert_pass){.layer = layer, .hidden = shape->hidden, .ffn = shape->ffn};
    pass->gate = values_alloc_doubles(pass->ffn);
    pass->up = values_alloc_doubles(pass->ffn);
    pass->act = values_alloc_doubles(pass->ffn);
    pass->y = values_alloc_doubles(pass->hidden);
}

static void pass_fini(struct expert_pass *pass)
{
    free(pass->gate);
    free(pass->up);
    free(pass->act);
    free(pass->y);
}

static double affine(const double *w, const double *x, size_t n, const double *bias)
{
    double sum = bias ? *bias : 0;
    for (size_t i = 0; i < n; i++)
        sum += w[i] * x[i];
    return sum;
}

static void pass_forward(struct expert_pass *pass, size_t expert, const double *x)
{
    const struct reference_layer *layer = pass->layer;
    size_t hidden = pass->hidden, ffn = pass->ffn;
    pass->expert = expert;
    pass->x = x;
    for (size_t f = 0; f < ffn; f++) {
        size_t g = expert * 2 * ffn + f, u = g + ffn;
        pass->gate[f] = affine(layer->w1 + g * hidden, x, hidden, layer->b1 ? layer->b1 + g : NULL);
        pass->up[f] = affine(layer->w1 + u * hidden, x, hidden, layer->b1 ? layer->b1 + u : NULL);
        pass->act[f] = reference_gate(layer->kind, pass->gate[f]) * pass->up[f];
    }
    for (size_t h = 0; h < hidden; h++) {
        size_t i = expert * hidden + h;
        pass->y[h] = affine(layer->w2 + i * ffn, pass->act, ffn, layer->b2 ? layer->b2 + i : NULL);
    }
}

void reference_moe_forward(const struct reference_routing *routing, const struct reference_layer *layer,
                           double *const *x, double *const *weights, double *const *out)
{
    const struct reference_shape *shape = &routing->shape;
    size_t hidden = shape->hidden;
    struct expert_pass pass;
    pass_init(&pass, shape, layer);
    for (uint32_t r = 0; r < shape->world_size; r++) {
        memset(out[r], 0, shape->n_tokens[r] * hidden * sizeof(double));
        for (size_t i = 0; i < (size_t)shape->n_tokens[r] * shape->top_k; i++) {
            size_t token = i / shape->top_k;
            if (routing->ranks[r].row[i] < 0)
                continue;
            pass_forward(&pass, (size_t)routing->ranks[r].expert[i], x[r] + token * hidden);
            for (size_t h = 0; h < hidden; h++)
                out[r][token * hidden + h] += weights[r][i] * pass.y[h];
        }
    }
    pass_fini(&pass);
}

/* Adds one row of W's gradient and what it hands down: z = <w_row, in> (+ bias) with gradient dz. */
static void affine_backward(const double *w_row, const double *in, size_t n, double dz, double *dw_row,
                            double *din)
{
    for (size_t i = 0; i < n; i++) {
        dw_row[i] += dz * in[i];
        din[i] += dz * w_row[i];
    }
}

/* Adds the gradients of <dy, y> of the last forward pass; dx [H] is added to, d_act [F] is scratch. */
static void pass_backward(const struct expert_pass *pass, const double *dy,
                          const struct reference_gradients *grads, double *dx, double *d_act)
{
    const struct reference_layer *layer = pass->layer;
    size_t hidden = pass->hidden, ffn = pass->ffn;
    memset(d_act, 0, ffn * sizeof(double));
    for (size_t h = 0; h < hidden; h++) {
        size_t i = pass->expert * hidden + h;
        affine_backward(layer->w2 + i * ffn, pass->act, ffn, dy[h], grads->dw2 + i * ffn, d_act);
        if (grads->db2)
            grads->db2[i] += dy[h];
    }
    for (size_t f = 0; f < ffn; f++) {
        size_t g = pass->expert * 2 * ffn + f, u = g + ffn;
        double d_gate = d_act[f] * pass->up[f] * reference_gate_slope(layer->kind, pass->gate[f]);
        double d_up = d_act[f] * reference_gate(layer->kind, pass->gate[f]);
        affine_backward(layer->w1 + g * hidden, pass->x, hidden, d_gate, grads->dw1 + g * hidden, dx);
        affine_backward(layer->w1 + u * hidden, pass->x, hidden, d_up, grads->dw1 + u * hidden, dx);
        if (grads->db1) {
            grads->db1[g] += d_gate;
            grads->db1[u] += d_up;
        }
    }
}

static void clear_gradients(const struct reference_shape *shape, const struct reference_gradients *grads)
{
    size_t hidden = shape->hidden, ffn = shape->ffn, n_experts = shape->n_experts;
    for (uint32_t r = 0; r < shape->world_size; r++) {
        memset(grads->dx[r], 0, shape->n_tokens[r] * hidden * sizeof(double));
        memset(grads->d_weights[r], 0, (size_t)shape->n_tokens[r] * shape->top_k * sizeof(double));
    }
    memset(grads->dw1, 0, n_experts * 2 * ffn * hidden * sizeof(double));
    memset(grads->dw2, 0, n_experts * ffn * hidden * sizeof(double));
    if (grads->db1)
        memset(grads->db1, 0, n_experts * 2 * ffn * sizeof(double));
    if (grads->db2)
        memset(grads->db2, 0, n_experts * hidden * sizeof(double));
}

void reference_moe_backward(const struct reference_routing *routing, const struct reference_layer *layer,
                            double *const *x, double *const *weights, double *const *dout,
                            const struct reference_gradients *gradients)
{
    const struct reference_shape *shape = &routing->shape;
    size_t hidden = shape->hidden;
    struct expert_pass pass;
    pass_init(&pass, shape, layer);
    double *d_act = values_alloc_doubles(shape->ffn), *dy = values_alloc_doubles(hidden);
    clear_gradients(shape, gradients);
    for (uint32_t r = 0; r < shape->world_size; r++) {
        for (size_t i = 0; i < (size_t)shape->n_tokens[r] * shape->top_k; i++) {
            size_t at = i / shape->top_k * hidden;
            if (routing->ranks[r].row[i] < 0)
                continue;
            pass_forward(&pass, (size_t)routing->ranks[r].expert[i], x[r] + at);
            for (size_t h = 0; h < hidden; h++) {
                dy[h] = weights[r][i] * dout[r][at + h];
                gradients->d_weights[r][i] += dout[r][at + h] * pass.y[h];
            }
            pass_backward(&pass, dy, gradients, gradients->dx[r] + at, d_act);
        }
    }
    free(d_act);
    free(dy);
    pass_fini(&pass);
}
