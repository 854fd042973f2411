#include "router.h"

#include <math.h>

#include "vector.h"

#define MAX_EXPERTS 1024

/* Puts the k best of scores[n_experts] into idx; the chosen scores become -inf. */
static void choose(float *scores, uint32_t n_experts, uint32_t top_k, int32_t *idx, float *chosen)
{
    for (uint32_t k = 0; k < top_k; k++) {
        uint32_t best = 0;
        for (uint32_t e = 1; e < n_experts; e++)
            if (scores[e] > scores[best])
                best = e;
        idx[k] = (int32_t)best;
        chosen[k] = scores[best];
        scores[best] = -INFINITY;
    }
}

void router_forward(const struct model *model, const float *x, int32_t *topk_idx, float *topk_weights)
{
    const struct settings *settings = model->settings;
    const size_t hidden = settings->hidden;
    const uint32_t top_k = settings->top_k;
    float scores[MAX_EXPERTS];
    for (size_t t = 0; t < settings->n_tokens; t++) {
        for (size_t e = 0; e < settings->n_experts; e++)
            scores[e] = vector_dot(model->weights.router + e * hidden, x + t * hidden, hidden);
        float *weights = topk_weights + t * top_k;
        choose(scores, settings->n_experts, top_k, topk_idx + t * top_k, weights);
        const float top = weights[0];
        float sum = 0;
        for (uint32_t k = 0; k < top_k; k++)
            sum += weights[k] = expf(weights[k] - top);
        for (uint32_t k = 0; k < top_k; k++)
            weights[k] /= sum;
    }
}

void router_backward(struct model *model, const float *x, const int32_t *topk_idx, const float *topk_weights,
                     const float *d_weights, float *dx)
{
    const struct settings *settings = model->settings;
    const size_t hidden = settings->hidden;
    const uint32_t top_k = settings->top_k;
    for (size_t t = 0; t < settings->n_tokens; t++) {
        float mean = 0;
        for (size_t k = 0; k < top_k; k++)
            mean += topk_weights[t * top_k + k] * d_weights[t * top_k + k];
        for (size_t k = 0; k < top_k; k++) {
            const float d_score = topk_weights[t * top_k + k] * (d_weights[t * top_k + k] - mean);
            const size_t row = (size_t)topk_idx[t * top_k + k] * hidden;
            vector_add_scaled(model->grads.router + row, d_score, x + t * hidden, hidden);
            vector_add_scaled(dx + t * hidden, d_score, model->weights.router + row, hidden);
        }
    }
}
