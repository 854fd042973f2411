#include "layer_plain.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "vector.h"

static int allocate(float **array, size_t n)
{
    *array = calloc(n, sizeof(float));
    return *array != NULL;
}

enum epd_status layer_plain_init(struct layer_plain *layer, const struct settings *settings)
{
    *layer = (struct layer_plain){.settings = settings};
    struct tokens *tokens = &layer->tokens;
    const size_t n_pairs = (size_t)settings->n_tokens * settings->top_k;
    const size_t n_x = (size_t)settings->n_tokens * settings->hidden;
    const size_t n_w1 = settings->n_experts * experts_w1_size(settings);
    const size_t n_w2 = settings->n_experts * experts_w2_size(settings);
    tokens->topk_idx = calloc(n_pairs, sizeof(int32_t));
    int complete = tokens->topk_idx && allocate(&tokens->x, n_x) &&
                   allocate(&tokens->topk_weights, n_pairs) && allocate(&tokens->out, n_x) &&
                   allocate(&tokens->dout, n_x) && allocate(&tokens->dx_experts, n_x) &&
                   allocate(&tokens->d_weights, n_pairs) && allocate(&layer->w1, n_w1) &&
                   allocate(&layer->w2, n_w2) && allocate(&layer->dw1, n_w1) && allocate(&layer->dw2, n_w2) &&
                   allocate(&layer->preact, n_pairs * 2 * settings->ffn) &&
                   allocate(&layer->y, n_pairs * settings->hidden) && allocate(&layer->act, settings->ffn) &&
                   allocate(&layer->d_act, settings->ffn) && allocate(&layer->d_preact, 2 * settings->ffn) &&
                   allocate(&layer->dy, settings->hidden);
    if (!complete) {
        layer_plain_fini(layer);
        return EPD_NO_MEMORY;
    }
    experts_init(settings, 0, settings->n_experts, layer->w1, layer->w2);
    return EPD_OK;
}

void layer_plain_fini(struct layer_plain *layer)
{
    struct tokens *tokens = &layer->tokens;
    free(tokens->topk_idx);
    float *arrays[] = {tokens->x,          tokens->topk_weights,
                       tokens->out,        tokens->dout,
                       tokens->dx_experts, layer->w1,
                       layer->w2,          layer->dw1,
                       layer->dw2,         tokens->d_weights,
                       layer->act,         layer->preact,
                       layer->d_act,       layer->y,
                       layer->d_preact,    layer->dy};
    for (size_t i = 0; i < sizeof(arrays) / sizeof(arrays[0]); i++)
        free(arrays[i]);
    *layer = (struct layer_plain){0};
}

void layer_plain_zero_grads(struct layer_plain *layer)
{
    const struct settings *settings = layer->settings;
    memset(layer->dw1, 0, settings->n_experts * experts_w1_size(settings) * sizeof(float));
    memset(layer->dw2, 0, settings->n_experts * experts_w2_size(settings) * sizeof(float));
}

/* act[f] = silu(g[f]) * u[f] */
static void swiglu(const float *preact, float *act, size_t ffn)
{
    for (size_t f = 0; f < ffn; f++)
        act[f] = preact[f] / (1.0f + expf(-preact[f])) * preact[ffn + f];
}

/* silu'(g) = s (1 + g (1 - s)) with s = 1 / (1 + exp(-g)) */
static void swiglu_backward(const float *preact, const float *d_act, float *d_preact, size_t ffn)
{
    for (size_t f = 0; f < ffn; f++) {
        const float gate = preact[f], up = preact[ffn + f];
        const float sigmoid = 1.0f / (1.0f + expf(-gate));
        d_preact[f] = d_act[f] * up * sigmoid * (1.0f + gate * (1.0f - sigmoid));
        d_preact[ffn + f] = d_act[f] * gate * sigmoid;
    }
}

void layer_plain_forward(struct layer_plain *layer)
{
    const struct settings *settings = layer->settings;
    const struct tokens *tokens = &layer->tokens;
    const size_t hidden = settings->hidden, ffn = settings->ffn;
    memset(tokens->out, 0, settings->n_tokens * hidden * sizeof(float));
    for (size_t pair = 0; pair < (size_t)settings->n_tokens * settings->top_k; pair++) {
        const size_t t = pair / settings->top_k, expert = (size_t)tokens->topk_idx[pair];
        const float *w1 = layer->w1 + expert * experts_w1_size(settings);
        const float *w2 = layer->w2 + expert * experts_w2_size(settings);
        float *preact = layer->preact + pair * 2 * ffn, *y = layer->y + pair * hidden;
        for (size_t j = 0; j < 2 * ffn; j++)
            preact[j] = vector_dot(w1 + j * hidden, tokens->x + t * hidden, hidden);
        swiglu(preact, layer->act, ffn);
        for (size_t h = 0; h < hidden; h++)
            y[h] = vector_dot(w2 + h * ffn, layer->act, ffn);
        vector_add_scaled(tokens->out + t * hidden, tokens->topk_weights[pair], y, hidden);
    }
}

/* One (token, expert) pair: dy is the gradient of the expert's answer. */
static void expert_backward(struct layer_plain *layer, size_t pair, const float *dy)
{
    const struct settings *settings = layer->settings;
    const struct tokens *tokens = &layer->tokens;
    const size_t hidden = settings->hidden, ffn = settings->ffn;
    const size_t t = pair / settings->top_k, expert = (size_t)tokens->topk_idx[pair];
    const size_t w1_start = expert * experts_w1_size(settings), w2_start = expert * experts_w2_size(settings);
    const float *preact = layer->preact + pair * 2 * ffn;
    swiglu(preact, layer->act, ffn);
    memset(layer->d_act, 0, ffn * sizeof(float));
    for (size_t h = 0; h < hidden; h++) {
        vector_add_scaled(layer->d_act, dy[h], layer->w2 + w2_start + h * ffn, ffn);
        vector_add_scaled(layer->dw2 + w2_start + h * ffn, dy[h], layer->act, ffn);
    }
    swiglu_backward(preact, layer->d_act, layer->d_preact, ffn);
    for (size_t j = 0; j < 2 * ffn; j++) {
        vector_add_scaled(tokens->dx_experts + t * hidden, layer->d_preact[j],
                          layer->w1 + w1_start + j * hidden, hidden);
        vector_add_scaled(layer->dw1 + w1_start + j * hidden, layer->d_preact[j], tokens->x + t * hidden,
                          hidden);
    }
}

void layer_plain_backward(struct layer_plain *layer)
{
    const struct settings *settings = layer->settings;
    const struct tokens *tokens = &layer->tokens;
    const size_t hidden = settings->hidden;
    memset(tokens->dx_experts, 0, settings->n_tokens * hidden * sizeof(float));
    for (size_t pair = 0; pair < (size_t)settings->n_tokens * settings->top_k; pair++) {
        const float *dout = tokens->dout + pair / settings->top_k * hidden;
        tokens->d_weights[pair] = vector_dot(dout, layer->y + pair * hidden, hidden);
        for (size_t h = 0; h < hidden; h++)
            layer->dy[h] = tokens->topk_weights[pair] * dout[h];
        expert_backward(layer, pair, layer->dy);
    }
}
