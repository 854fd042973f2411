#include "rank.h"

#include <stdio.h>

#include "adam.h"
#include "exchange.h"
#include "layer_epd.h"
#include "progress.h"

/* A daemon that is lost so often over one step is not coming back. */
#define RANK_MAX_RECOVERIES 20

struct rank {
    const struct settings *settings; /* borrowed */
    struct exchange exchange;
    struct text text;
    struct batch batch;
    struct model model;
    struct layer_epd layer;
    struct adam adam, adam_w1, adam_w2;
};

static enum epd_status rank_open(struct rank *rank)
{
    const struct settings *settings = rank->settings;
    enum epd_status status =
        exchange_open(&rank->exchange, settings, model_n_params(settings), settings->exchange_fd);
    if (status == EPD_OK)
        status = text_open(&rank->text, settings);
    if (status == EPD_OK)
        status = batch_init(&rank->batch, settings);
    if (status == EPD_OK)
        status = model_init(&rank->model, settings);
    if (status == EPD_OK)
        status = layer_epd_open(&rank->layer, settings);
    const uint32_t n_local = rank->layer.n_local_experts;
    const float rate = settings->learning_rate;
    if (status == EPD_OK)
        status = adam_init(&rank->adam, rank->model.n_params, rate);
    if (status == EPD_OK)
        status = adam_init(&rank->adam_w1, n_local * experts_w1_size(settings), rate);
    if (status == EPD_OK)
        status = adam_init(&rank->adam_w2, n_local * experts_w2_size(settings), rate);
    return status;
}

static void rank_close(struct rank *rank)
{
    adam_fini(&rank->adam_w2);
    adam_fini(&rank->adam_w1);
    adam_fini(&rank->adam);
    layer_epd_close(&rank->layer);
    model_fini(&rank->model);
    batch_fini(&rank->batch);
    text_close(&rank->text);
    exchange_close(&rank->exchange);
}

/* What of a step goes through the daemon. It changes no weights, so it may be repeated. */
static enum epd_status rank_pass(struct rank *rank, uint32_t step, double *loss)
{
    const struct settings *settings = rank->settings;
    struct model *model = &rank->model;
    struct layer_epd *layer = &rank->layer;
    batch_take(&rank->batch, &rank->text, settings, step, (uint32_t)settings->rank);
    model_zero_grads(model);

    tokens_enter(model, &rank->batch, &layer->tokens);
    enum epd_status status = layer_epd_forward(layer);
    if (status != EPD_OK)
        return status;
    *loss = tokens_loss(model, &rank->batch, &layer->tokens);
    status = layer_epd_backward(layer);
    if (status == EPD_OK)
        tokens_leave(model, &rank->batch, &layer->tokens);
    return status;
}

/* Every rank comes here after its part of the same thing, well or not. An error that no recovery helps against
 * ends the rank, and with it the run. */
static enum epd_status rank_agree(struct rank *rank, enum epd_status own, int *all_well)
{
    if (own != EPD_OK && !layer_epd_is_lost(own))
        return own;
    enum epd_status status = exchange_vote(&rank->exchange, own == EPD_OK, all_well);
    if (status != EPD_OK)
        fprintf(stderr, "epd-train-moe: rank %d: waiting for the other ranks: %s\n", rank->settings->rank,
                epd_status_text(status));
    return status;
}

/* Until every rank has its part of the daemon again: it may go another time meanwhile. */
static enum epd_status rank_recover(struct rank *rank, uint32_t step)
{
    int all_well = 0;
    if (rank->settings->rank == 0) {
        printf("epd  step %5u   the daemon was lost in the middle of it; repeating it\n", step + 1);
        fflush(stdout);
    }
    for (int i = 0; !all_well && i < RANK_MAX_RECOVERIES; i++) {
        enum epd_status status = rank_agree(rank, layer_epd_recover(&rank->layer), &all_well);
        if (status != EPD_OK)
            return status;
    }
    return all_well ? EPD_OK : EPD_RESTARTED;
}

/* One rank may have its results when the daemon dies under the others: whether a step counts is everybody's
 * decision. */
static enum epd_status rank_pass_all(struct rank *rank, uint32_t step, double *loss)
{
    for (int i = 0; i < RANK_MAX_RECOVERIES; i++) {
        int all_well;
        enum epd_status status = rank_agree(rank, rank_pass(rank, step, loss), &all_well);
        if (status != EPD_OK || all_well)
            return status;
        status = rank_recover(rank, step);
        if (status != EPD_OK)
            return status;
    }
    return EPD_RESTARTED;
}

/* *loss becomes the mean over the tokens of all ranks. */
static enum epd_status rank_step(struct rank *rank, uint32_t step, double *loss)
{
    const struct settings *settings = rank->settings;
    struct model *model = &rank->model;
    struct layer_epd *layer = &rank->layer;
    enum epd_status status = rank_pass_all(rank, step, loss);
    if (status != EPD_OK)
        return status;

    /* The experts' gradients are complete: their rank has seen the rows of all ranks. The rest is summed
     * here. */
    status = exchange_sum(&rank->exchange, model->grads.all, loss);
    if (status != EPD_OK) {
        fprintf(stderr, "epd-train-moe: rank %d: summing gradients: %s\n", settings->rank,
                epd_status_text(status));
        return status;
    }
    *loss /= (double)settings->n_tokens * settings->n_ranks;
    adam_step(&rank->adam, model->weights.all, model->grads.all);
    adam_step(&rank->adam_w1, layer->w1, layer->dw1);
    adam_step(&rank->adam_w2, layer->w2, layer->dw2);
    return EPD_OK;
}

enum epd_status rank_run(const struct settings *settings)
{
    struct rank rank = {.settings = settings};
    struct progress progress;
    enum epd_status status = rank_open(&rank);
    progress_init(&progress, settings, "epd");
    for (uint32_t step = 0; status == EPD_OK && step < settings->n_steps; step++) {
        double loss = 0;
        status = rank_step(&rank, step, &loss);
        if (status != EPD_OK || settings->rank != 0)
            continue;
        exchange_losses(&rank.exchange)[step] = loss;
        progress_step(&progress, step, loss);
    }
    rank_close(&rank);
    return status;
}
