#include <math.h>
#include <string.h>

#include "tests/reference/reference.h"

void reference_gemm_tn(const struct reference_groups *groups, uint32_t n, uint32_t k, const double *x,
                       const double *w, const double *bias, double *y)
{
    for (uint32_t l = 0; l < groups->n_groups; l++) {
        for (int64_t row = groups->offsets[l]; row < groups->offsets[l] + groups->m_splits[l]; row++) {
            for (uint32_t i = 0; i < n; i++) {
                const double *w_row = w + ((size_t)l * n + i) * k;
                double sum = bias ? bias[(size_t)l * n + i] : 0;
                for (uint32_t j = 0; j < k; j++)
                    sum += x[(size_t)row * k + j] * w_row[j];
                y[(size_t)row * n + i] = sum;
            }
        }
    }
}

void reference_gemm_nn(const struct reference_groups *groups, uint32_t n, uint32_t k, const double *dy,
                       const double *w, double *dx)
{
    for (uint32_t l = 0; l < groups->n_groups; l++) {
        for (int64_t row = groups->offsets[l]; row < groups->offsets[l] + groups->m_splits[l]; row++) {
            memset(dx + (size_t)row * k, 0, k * sizeof(double));
            for (uint32_t i = 0; i < n; i++)
                for (uint32_t j = 0; j < k; j++)
                    dx[(size_t)row * k + j] += dy[(size_t)row * n + i] * w[((size_t)l * n + i) * k + j];
        }
    }
}

void reference_gemm_nt(const struct reference_groups *groups, uint32_t n, uint32_t k, const double *dy,
                       const double *x, int accumulate, double *dw, double *dbias)
{
    if (!accumulate) {
        memset(dw, 0, (size_t)groups->n_groups * n * k * sizeof(double));
        if (dbias)
            memset(dbias, 0, (size_t)groups->n_groups * n * sizeof(double));
    }
    for (uint32_t l = 0; l < groups->n_groups; l++) {
        for (int64_t row = groups->offsets[l]; row < groups->offsets[l] + groups->m_splits[l]; row++) {
            for (uint32_t i = 0; i < n; i++) {
                double d = dy[(size_t)row * n + i];
                for (uint32_t j = 0; j < k; j++)
                    dw[((size_t)l * n + i) * k + j] += d * x[(size_t)row * k + j];
                if (dbias)
                    dbias[(size_t)l * n + i] += d;
            }
        }
    }
}

static double gelu_angle(double g)
{
    return sqrt(2 / M_PI) * (g + 0.044715 * g * g * g);
}

double reference_gate(enum epd_activation kind, double g)
{
    switch (kind) {
    case EPD_SWIGLU:
        return g / (1 + exp(-g));
    case EPD_GEGLU:
        return 0.5 * g * (1 + tanh(gelu_angle(g)));
    case EPD_RELU2:
        return g > 0 ? g * g : 0;
    default:
        return NAN;
    }
}

double reference_gate_slope(enum epd_activation kind, double g)
{
    double e = exp(-g), t = tanh(gelu_angle(g));
    switch (kind) {
    case EPD_SWIGLU:
        return (1 + e + g * e) / ((1 + e) * (1 + e));
    case EPD_GEGLU:
        return 0.5 * (1 + t) + 0.5 * g * (1 - t * t) * sqrt(2 / M_PI) * (1 + 3 * 0.044715 * g * g);
    case EPD_RELU2:
        return g > 0 ? 2 * g : 0;
    default:
        return NAN;
    }
}

void reference_activation(const struct reference_groups *groups, enum epd_activation kind, uint32_t ffn,
                          const double *preact, const double *row_weights, double *act)
{
    for (uint32_t l = 0; l < groups->n_groups; l++) {
        for (int64_t row = groups->offsets[l]; row < groups->offsets[l] + groups->m_splits[l]; row++) {
            const double *gate = preact + (size_t)row * 2 * ffn, *up = gate + ffn;
            for (uint32_t f = 0; f < ffn; f++)
                act[(size_t)row * ffn + f] =
                    reference_gate(kind, gate[f]) * up[f] * (row_weights ? row_weights[row] : 1);
        }
    }
}

static void activation_bwd_row(const struct reference_activation_bwd *args, uint32_t group, int64_t row)
{
    size_t ffn = args->ffn;
    const double *gate = args->preact + (size_t)row * 2 * ffn, *up = gate + ffn;
    const double *d_act = args->d_act + (size_t)row * ffn;
    double *d_gate = args->d_preact + (size_t)row * 2 * ffn, *d_up = d_gate + ffn;
    double weight = args->row_weights ? args->row_weights[row] : 1, dot = 0;
    for (size_t f = 0; f < ffn; f++) {
        double act = reference_gate(args->kind, gate[f]) * up[f];
        d_gate[f] = weight * d_act[f] * up[f] * reference_gate_slope(args->kind, gate[f]);
        d_up[f] = weight * d_act[f] * reference_gate(args->kind, gate[f]);
        args->weighted_act[(size_t)row * ffn + f] = weight * act;
        dot += d_act[f] * act;
    }
    for (size_t h = 0; args->bias2 && h < args->hidden; h++)
        dot += args->dy[(size_t)row * args->hidden + h] * args->bias2[(size_t)group * args->hidden + h];
    args->d_row_weights[row] = dot;
}

void reference_activation_bwd(const struct reference_groups *groups,
                              const struct reference_activation_bwd *args)
{
    for (uint32_t l = 0; l < groups->n_groups; l++)
        for (int64_t row = groups->offsets[l]; row < groups->offsets[l] + groups->m_splits[l]; row++)
            activation_bwd_row(args, l, row);
}
