/* Gated activations, forward and backward, a block of columns at a time in fp32.
 *   swiglu  f(g) = g s(g)            f'(g) = s + g s (1 - s)            s(x) = 1 / (1 + exp(-x))
 *   geglu   f(g) = g s(2 p(g))       f'(g) = s + g s (1 - s) 2 p'(g)    p(g) = sqrt(2/pi) (g + 0.044715 g^3)
 *   relu2   f(g) = max(g, 0)^2       f'(g) = 2 max(g, 0)
 * geglu is gelu by tanh: (1 + tanh p) / 2 = s(2 p), which does not cancel for negative g. */
#include <assert.h>
#include <math.h>

#include "kernels/host/dtype.h"
#include "kernels/host/groups.h"
#include "kernels/host/host.h"

#define ACTIVATION_BLOCK 512

#define GELU_TWO_SQRT_2_OVER_PI 1.5957691216057308f
#define GELU_CUBIC              0.044715f

static float sigmoid(float x)
{
    return 1.0f / (1.0f + expf(-x));
}

/* f(g), and f'(g) unless slope is NULL. */
static void gate_swiglu(const float *gate, float *value, float *slope, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        float g = gate[i], s = sigmoid(g);
        value[i] = g * s;
        if (slope)
            slope[i] = s + g * s * (1.0f - s);
    }
}

static void gate_geglu(const float *gate, float *value, float *slope, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        float g = gate[i], g2 = g * g;
        float s = sigmoid(GELU_TWO_SQRT_2_OVER_PI * g * (1.0f + GELU_CUBIC * g2));
        value[i] = g * s;
        if (slope)
            slope[i] = s + g * s * (1.0f - s) * GELU_TWO_SQRT_2_OVER_PI * (1.0f + 3.0f * GELU_CUBIC * g2);
    }
}

static void gate_relu2(const float *gate, float *value, float *slope, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        float g = gate[i] < 0.0f ? 0.0f : gate[i]; /* keeps a NaN */
        value[i] = g * g;
        if (slope)
            slope[i] = 2.0f * g;
    }
}

static void gate_block(enum epd_activation kind, const float *gate, float *value, float *slope, size_t n)
{
    switch (kind) {
    case EPD_SWIGLU:
        gate_swiglu(gate, value, slope, n);
        return;
    case EPD_GEGLU:
        gate_geglu(gate, value, slope, n);
        return;
    case EPD_RELU2:
        gate_relu2(gate, value, slope, n);
        return;
    default:
        assert(!"a known activation");
    }
}

static void *element_at(const void *base, size_t idx, enum epd_dtype dtype)
{
    return (char *)base + idx * dtype_bytes(dtype);
}

static size_t block_width(size_t column, size_t n_columns)
{
    return n_columns - column < ACTIVATION_BLOCK ? n_columns - column : ACTIVATION_BLOCK;
}

static void activate_row(const struct activation_args *args, int64_t row)
{
    float gate_buffer[ACTIVATION_BLOCK], up_buffer[ACTIVATION_BLOCK], value[ACTIVATION_BLOCK];
    size_t ffn = args->ffn;
    enum epd_dtype dtype = args->dtype;
    float weight = args->row_weights ? args->row_weights[row] : 1.0f;
    for (size_t column = 0; column < ffn; column += ACTIVATION_BLOCK) {
        size_t n = block_width(column, ffn), at = (size_t)row * 2 * ffn + column;
        const float *gate = dtype_view(element_at(args->preact, at, dtype), dtype, n, gate_buffer);
        const float *up = dtype_view(element_at(args->preact, at + ffn, dtype), dtype, n, up_buffer);
        gate_block(args->kind, gate, value, NULL, n);
        for (size_t i = 0; i < n; i++)
            value[i] *= up[i] * weight;
        dtype_store(element_at(args->act, (size_t)row * ffn + column, dtype), value, dtype, n);
    }
}

enum epd_status host_activation(const struct activation_args *args)
{
    struct group_cursor cursor;
    struct group_rows rows;
    group_cursor_init(&cursor, &args->groups, args->error);
    while (group_cursor_next(&cursor, &rows))
        for (int64_t row = rows.first_row; row < rows.first_row + rows.n_rows; row++)
            activate_row(args, row);
    return EPD_OK;
}

/* One block of one row backward; returns its part of <d_act, act>. Everything is loaded before anything is
 * stored, because d_preact may be preact and weighted_act may be d_act. */
static float backward_block(const struct activation_bwd_args *args, int64_t row, size_t column)
{
    float gate[ACTIVATION_BLOCK], up[ACTIVATION_BLOCK], d_act[ACTIVATION_BLOCK];
    float value[ACTIVATION_BLOCK], slope[ACTIVATION_BLOCK];
    size_t ffn = args->ffn, n = block_width(column, ffn);
    size_t at_gate = (size_t)row * 2 * ffn + column, at_up = at_gate + ffn,
           at_act = (size_t)row * ffn + column;
    enum epd_dtype dtype = args->dtype;
    float weight = args->row_weights ? args->row_weights[row] : 1.0f;

    dtype_load(gate, element_at(args->preact, at_gate, dtype), dtype, n);
    dtype_load(up, element_at(args->preact, at_up, dtype), dtype, n);
    dtype_load(d_act, element_at(args->d_act, at_act, dtype), dtype, n);
    gate_block(args->kind, gate, value, slope, n);
    float dot = 0.0f;
    if (args->d_row_weights) {
        for (size_t i = 0; i < n; i++)
            gate[i] = value[i] * up[i];
        dot = dtype_dot(d_act, gate, EPD_F32, n);
    }
    for (size_t i = 0; i < n; i++) {
        float da = weight * d_act[i];
        gate[i] = da * up[i] * slope[i];
        d_act[i] = weight * value[i] * up[i];
        up[i] = da * value[i];
    }
    dtype_store(element_at(args->d_preact, at_gate, dtype), gate, dtype, n);
    dtype_store(element_at(args->d_preact, at_up, dtype), up, dtype, n);
    if (args->weighted_act)
        dtype_store(element_at(args->weighted_act, at_act, dtype), d_act, dtype, n);
    return dot;
}

static void backward_row(const struct activation_bwd_args *args, uint32_t group_idx, int64_t row)
{
    float dot = 0.0f;
    for (size_t column = 0; column < args->ffn; column += ACTIVATION_BLOCK)
        dot += backward_block(args, row, column);
    if (!args->d_row_weights)
        return;
    if (args->bias2) {
        const void *dy = element_at(args->dy, (size_t)row * args->hidden, args->dtype);
        const void *bias = element_at(args->bias2, (size_t)group_idx * args->hidden, args->dtype);
        dot += dtype_dot(dy, bias, args->dtype, args->hidden);
    }
    args->d_row_weights[row] = dot;
}

enum epd_status host_activation_bwd(const struct activation_bwd_args *args)
{
    struct group_cursor cursor;
    struct group_rows rows;
    group_cursor_init(&cursor, &args->groups, args->error);
    while (group_cursor_next(&cursor, &rows))
        for (int64_t row = rows.first_row; row < rows.first_row + rows.n_rows; row++)
            backward_row(args, rows.group_idx, row);
    return EPD_OK;
}
