/* One rank's tokens on their way through the model in one step: what lies before and after the MoE layer, the
 * same code for the rank processes and the reference. Only the step between tokens_enter and tokens_loss, and
 * the one between tokens_loss and tokens_leave, differ: there epd or the reference turns x into out, and dout
 * into dx_experts and d_weights. */
#ifndef TRAIN_MOE_TOKENS_H
#define TRAIN_MOE_TOKENS_H

#include "model.h"

/* Borrowed from the MoE layer: in a rank process these are the very buffers that the daemon works on. */
struct tokens {
    float *x;            /* [n_tokens, hidden] */
    int32_t *topk_idx;   /* [n_tokens, top_k] */
    float *topk_weights; /* [n_tokens, top_k] */
    float *out;          /* [n_tokens, hidden] of the layer */
    float *dout;         /* [n_tokens, hidden] */
    float *dx_experts;   /* [n_tokens, hidden] gradient of x through the experts */
    float *d_weights;    /* [n_tokens, top_k] */
};

/* Embedding and router: writes x, topk_idx, topk_weights. */
void tokens_enter(const struct model *model, const struct batch *batch, const struct tokens *tokens);
/* Head: reads x and out, writes dout; returns the sum of the losses. */
double tokens_loss(struct model *model, const struct batch *batch, const struct tokens *tokens);
/* Router and embedding backward; dx_experts becomes the whole gradient of x. */
void tokens_leave(struct model *model, const struct batch *batch, const struct tokens *tokens);

#endif
