#include "model.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "random.h"
#include "vector.h"

enum { KEY_EMBEDDING = 1, KEY_ROUTER, KEY_HEAD };

static void weights_divide(struct model_weights *weights, const struct settings *settings)
{
    float *next = weights->all;
    weights->embedding = next;
    next += (size_t)settings->context_bytes * VOCABULARY * settings->hidden;
    weights->router = next;
    next += (size_t)settings->n_experts * settings->hidden;
    weights->head = next;
    next += (size_t)VOCABULARY * settings->hidden;
    weights->head_bias = next;
}

size_t model_n_params(const struct settings *settings)
{
    size_t n_rows = (size_t)settings->context_bytes * VOCABULARY + settings->n_experts + VOCABULARY;
    return n_rows * settings->hidden + VOCABULARY;
}

enum epd_status model_init(struct model *model, const struct settings *settings)
{
    *model = (struct model){.settings = settings, .n_params = model_n_params(settings)};
    model->weights.all = calloc(model->n_params, sizeof(float));
    model->grads.all = calloc(model->n_params, sizeof(float));
    if (!model->weights.all || !model->grads.all) {
        model_fini(model);
        return EPD_NO_MEMORY;
    }
    weights_divide(&model->weights, settings);
    weights_divide(&model->grads, settings);
    const uint64_t seed = settings->seed << 8;
    const size_t hidden = settings->hidden;
    /* x has deviation 1; the head starts near zero, so that the first loss is close to ln 256. */
    random_fill(seed + KEY_EMBEDDING, 1.0f / sqrtf((float)settings->context_bytes), model->weights.embedding,
                settings->context_bytes * VOCABULARY * hidden);
    random_fill(seed + KEY_ROUTER, 1.0f / sqrtf((float)hidden), model->weights.router,
                settings->n_experts * hidden);
    random_fill(seed + KEY_HEAD, 0.1f / sqrtf((float)hidden), model->weights.head, VOCABULARY * hidden);
    return EPD_OK;
}

void model_fini(struct model *model)
{
    free(model->weights.all);
    free(model->grads.all);
    *model = (struct model){0};
}

void model_zero_grads(struct model *model)
{
    memset(model->grads.all, 0, model->n_params * sizeof(float));
}

/* The row of the embedding (or of its gradient) for one context byte of one token. */
static float *embedding_row(const struct model *model, float *embedding, const struct batch *batch,
                            uint32_t token, uint32_t back)
{
    const struct settings *settings = model->settings;
    size_t byte = batch->context[(size_t)token * settings->context_bytes + back];
    return embedding + ((size_t)back * VOCABULARY + byte) * settings->hidden;
}

void model_embed(const struct model *model, const struct batch *batch, float *x)
{
    const struct settings *settings = model->settings;
    const size_t hidden = settings->hidden;
    memset(x, 0, settings->n_tokens * hidden * sizeof(float));
    for (uint32_t t = 0; t < settings->n_tokens; t++)
        for (uint32_t back = 0; back < settings->context_bytes; back++)
            vector_add_scaled(x + t * hidden, 1.0f,
                              embedding_row(model, model->weights.embedding, batch, t, back), hidden);
}

void model_embed_backward(struct model *model, const struct batch *batch, const float *dx)
{
    const struct settings *settings = model->settings;
    const size_t hidden = settings->hidden;
    for (uint32_t t = 0; t < settings->n_tokens; t++)
        for (uint32_t back = 0; back < settings->context_bytes; back++)
            vector_add_scaled(embedding_row(model, model->grads.embedding, batch, t, back), 1.0f,
                              dx + t * hidden, hidden);
}

/* Turns logits into the gradient of scale * loss and returns the loss. */
static double cross_entropy(float logits[VOCABULARY], unsigned target, float scale)
{
    float top = logits[0];
    for (size_t v = 1; v < VOCABULARY; v++)
        top = fmaxf(top, logits[v]);
    double sum = 0;
    const double target_logit = logits[target];
    for (size_t v = 0; v < VOCABULARY; v++) {
        logits[v] = expf(logits[v] - top);
        sum += logits[v];
    }
    const float normal = scale / (float)sum;
    for (size_t v = 0; v < VOCABULARY; v++)
        logits[v] *= normal;
    logits[target] -= scale;
    return log(sum) + top - target_logit;
}

double model_head(struct model *model, const struct batch *batch, const float *x, const float *moe_out,
                  float *dh)
{
    const struct settings *settings = model->settings;
    const size_t hidden = settings->hidden;
    const float scale = 1.0f / ((float)settings->n_tokens * (float)settings->n_ranks);
    float h[MAX_HIDDEN], logits[VOCABULARY];
    double loss = 0;
    for (size_t t = 0; t < settings->n_tokens; t++) {
        for (size_t i = 0; i < hidden; i++)
            h[i] = x[t * hidden + i] + moe_out[t * hidden + i];
        for (size_t v = 0; v < VOCABULARY; v++)
            logits[v] = vector_dot(model->weights.head + v * hidden, h, hidden) + model->weights.head_bias[v];
        loss += cross_entropy(logits, batch->target[t], scale);
        memset(dh + t * hidden, 0, hidden * sizeof(float));
        for (size_t v = 0; v < VOCABULARY; v++) {
            vector_add_scaled(dh + t * hidden, logits[v], model->weights.head + v * hidden, hidden);
            vector_add_scaled(model->grads.head + v * hidden, logits[v], h, hidden);
            model->grads.head_bias[v] += logits[v];
        }
    }
    return loss;
}
