/* Which experts a token goes to and with what weight. The scores of all experts are router x; the top_k best
 * are chosen and weighted by the softmax over the chosen scores, which is the softmax over all of them,
 * renormalised. */
#ifndef TRAIN_MOE_ROUTER_H
#define TRAIN_MOE_ROUTER_H

#include "model.h"

/* x [n_tokens, hidden] -> topk_idx, topk_weights [n_tokens, top_k], best first; of equal scores the lower
 * expert wins. */
void router_forward(const struct model *model, const float *x, int32_t *topk_idx, float *topk_weights);
/* d_weights [n_tokens, top_k] -> adds to the router's gradient and to dx [n_tokens, hidden]. */
void router_backward(struct model *model, const float *x, const int32_t *topk_idx, const float *topk_weights,
                     const float *d_weights, float *dx);

#endif
