/* Everything of the language model that all ranks hold alike: embedding, router weights, output head. The
 * experts are elsewhere (experts.h); the rank processes and the reference use this very code for the rest.
 *
 *   x[t]      = sum over c of embedding[c][context[t][c]]        a vector per (position, byte)
 *   h[t]      = x[t] + moe(x[t])
 *   logits[t] = head h[t] + head_bias                            softmax cross entropy against target[t] */
#ifndef TRAIN_MOE_MODEL_H
#define TRAIN_MOE_MODEL_H

#include "text.h"

/* Views into one array, so that averaging and Adam see a single vector. */
struct model_weights {
    float *all;       /* owned, [n_params] */
    float *embedding; /* [context_bytes, 256, hidden] */
    float *router;    /* [n_experts, hidden] */
    float *head;      /* [256, hidden] */
    float *head_bias; /* [256] */
};

struct model {
    const struct settings *settings; /* borrowed, outlives this */
    size_t n_params;
    struct model_weights weights;
    struct model_weights grads; /* of the mean loss over the tokens of all ranks; this rank's part */
};

size_t model_n_params(const struct settings *settings);
/* Weights from the seed, gradients zero. */
enum epd_status model_init(struct model *model, const struct settings *settings);
void model_fini(struct model *model);
void model_zero_grads(struct model *model);

/* x [n_tokens, hidden] */
void model_embed(const struct model *model, const struct batch *batch, float *x);
/* Head forward and backward at once: returns the sum of the tokens' losses, adds to the gradients of the
 * head, and writes dh = gradient of h = gradient of moe's output [n_tokens, hidden]. */
double model_head(struct model *model, const struct batch *batch, const float *x, const float *moe_out,
                  float *dh);
/* Adds the gradient of the embedding; dx [n_tokens, hidden] is the whole gradient of x. */
void model_embed_backward(struct model *model, const struct batch *batch, const float *dx);

#endif
