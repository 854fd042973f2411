#include "reference.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "adam.h"
#include "layer_plain.h"
#include "progress.h"

struct reference {
    const struct settings *settings; /* borrowed */
    struct text text;
    struct batch batch;
    struct model model;
    struct layer_plain layer;
    float *summed; /* owned, [n_params] gradients of the ranks so far */
    struct adam adam, adam_w1, adam_w2;
};

static enum epd_status reference_open(struct reference *reference)
{
    const struct settings *settings = reference->settings;
    enum epd_status status = text_open(&reference->text, settings);
    if (status == EPD_OK)
        status = batch_init(&reference->batch, settings);
    if (status == EPD_OK)
        status = model_init(&reference->model, settings);
    if (status == EPD_OK)
        status = layer_plain_init(&reference->layer, settings);
    const float rate = settings->learning_rate;
    if (status == EPD_OK)
        status = adam_init(&reference->adam, reference->model.n_params, rate);
    if (status == EPD_OK)
        status = adam_init(&reference->adam_w1, settings->n_experts * experts_w1_size(settings), rate);
    if (status == EPD_OK)
        status = adam_init(&reference->adam_w2, settings->n_experts * experts_w2_size(settings), rate);
    if (status == EPD_OK && !(reference->summed = malloc(reference->model.n_params * sizeof(float))))
        status = EPD_NO_MEMORY;
    return status;
}

static void reference_close(struct reference *reference)
{
    free(reference->summed);
    adam_fini(&reference->adam_w2);
    adam_fini(&reference->adam_w1);
    adam_fini(&reference->adam);
    layer_plain_fini(&reference->layer);
    model_fini(&reference->model);
    batch_fini(&reference->batch);
    text_close(&reference->text);
}

/* The part of one rank: its gradients of the replicated weights are left in model.grads. */
static double reference_rank(struct reference *reference, uint32_t step, uint32_t rank)
{
    struct model *model = &reference->model;
    struct layer_plain *layer = &reference->layer;
    batch_take(&reference->batch, &reference->text, reference->settings, step, rank);
    model_zero_grads(model);
    tokens_enter(model, &reference->batch, &layer->tokens);
    layer_plain_forward(layer);
    double loss = tokens_loss(model, &reference->batch, &layer->tokens);
    layer_plain_backward(layer);
    tokens_leave(model, &reference->batch, &layer->tokens);
    return loss;
}

/* All ranks in turn; sums are made in the same order as in exchange_sum. */
static double reference_step(struct reference *reference, uint32_t step)
{
    struct model *model = &reference->model;
    struct layer_plain *layer = &reference->layer;
    double loss = 0;
    layer_plain_zero_grads(layer);
    for (uint32_t rank = 0; rank < reference->settings->n_ranks; rank++) {
        loss += reference_rank(reference, step, rank);
        if (rank == 0)
            memcpy(reference->summed, model->grads.all, model->n_params * sizeof(float));
        for (size_t i = 0; rank > 0 && i < model->n_params; i++)
            reference->summed[i] += model->grads.all[i];
    }
    adam_step(&reference->adam, model->weights.all, reference->summed);
    adam_step(&reference->adam_w1, layer->w1, layer->dw1);
    adam_step(&reference->adam_w2, layer->w2, layer->dw2);
    return loss / ((double)reference->settings->n_tokens * reference->settings->n_ranks);
}

enum epd_status reference_run(const struct settings *settings, int print_progress, double *losses)
{
    struct reference reference = {.settings = settings};
    enum epd_status status = reference_open(&reference);
    if (status != EPD_OK) {
        fprintf(stderr, "epd-train-moe: reference: %s\n", epd_status_text(status));
        reference_close(&reference);
        return status;
    }
    struct progress progress;
    progress_init(&progress, settings, "reference");
    for (uint32_t step = 0; step < settings->n_steps; step++) {
        losses[step] = reference_step(&reference, step);
        if (print_progress)
            progress_step(&progress, step, losses[step]);
    }
    reference_close(&reference);
    return EPD_OK;
}
