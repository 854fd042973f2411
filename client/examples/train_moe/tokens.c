#include "tokens.h"

#include "router.h"
#include "vector.h"

void tokens_enter(const struct model *model, const struct batch *batch, const struct tokens *tokens)
{
    model_embed(model, batch, tokens->x);
    router_forward(model, tokens->x, tokens->topk_idx, tokens->topk_weights);
}

double tokens_loss(struct model *model, const struct batch *batch, const struct tokens *tokens)
{
    return model_head(model, batch, tokens->x, tokens->out, tokens->dout);
}

void tokens_leave(struct model *model, const struct batch *batch, const struct tokens *tokens)
{
    /* x reaches the output by the residual path as well: its gradient there is dout itself. */
    const size_t n = (size_t)model->settings->n_tokens * model->settings->hidden;
    vector_add_scaled(tokens->dx_experts, 1.0f, tokens->dout, n);
    router_backward(model, tokens->x, tokens->topk_idx, tokens->topk_weights, tokens->d_weights,
                    tokens->dx_experts);
    model_embed_backward(model, batch, tokens->dx_experts);
}
