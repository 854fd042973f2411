/* The MoE layer of the reference, written from its definition, one token after the other, with all experts in
 * one process:
 *
 *   out[t] = sum over k of topk_weights[t, k] * expert(topk_idx[t, k])(x[t])
 *
 * One owner, one thread. */
#ifndef TRAIN_MOE_LAYER_PLAIN_H
#define TRAIN_MOE_LAYER_PLAIN_H

#include "experts.h"
#include "tokens.h"

struct layer_plain {
    const struct settings *settings;    /* borrowed, outlives this */
    struct tokens tokens;               /* owned, of the rank being worked on */
    float *w1, *w2, *dw1, *dw2;         /* owned, of all experts */
    float *preact;                      /* owned, [n_tokens, top_k, 2 ffn] kept for the backward */
    float *y;                           /* owned, [n_tokens, top_k, hidden] what the experts answered */
    float *act, *d_act, *d_preact, *dy; /* owned, scratch of one token */
};

enum epd_status layer_plain_init(struct layer_plain *layer, const struct settings *settings);
void layer_plain_fini(struct layer_plain *layer);
void layer_plain_zero_grads(struct layer_plain *layer);
/* x, topk_idx, topk_weights -> out */
void layer_plain_forward(struct layer_plain *layer);
/* dout -> dx_experts, d_weights; adds to dw1 and dw2 */
void layer_plain_backward(struct layer_plain *layer);

#endif
