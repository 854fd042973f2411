#include "layer_epd.h"

#include <stdio.h>

/* Prints what failed and why, in the words of the library or of the daemon. */
static enum epd_status layer_check(const struct layer_epd *layer, const char *what, enum epd_status status)
{
    if (status != EPD_OK)
        fprintf(stderr, "epd-train-moe: rank %d: %s: %s: %s\n", layer->settings->rank, what,
                epd_status_name(status), epd_error_text());
    return status;
}

static enum epd_status layer_connect(struct layer_epd *layer)
{
    char name[64];
    snprintf(name, sizeof(name), "train-moe rank %d", layer->settings->rank);
    const struct epd_open_options options = {
        .size = sizeof(options), .socket_path = layer->settings->socket_path, .client_name = name};
    enum epd_status status = layer_check(layer, "connecting", epd_open(&options, &layer->client));
    if (status != EPD_OK)
        return status;
    struct epd_client_info info = {.size = sizeof(info)};
    status = layer_check(layer, "asking for the backend", epd_client_info(layer->client, &info));
    if (status == EPD_OK && info.backend != EPD_BACKEND_HOST) {
        fprintf(stderr,
                "epd-train-moe: the daemon runs the CUDA backend; this example computes on the host and "
                "wants `epd --backend host`\n");
        return EPD_UNSUPPORTED;
    }
    return status;
}

static enum epd_status layer_join(struct layer_epd *layer)
{
    const struct settings *settings = layer->settings;
    char name[64];
    snprintf(name, sizeof(name), "train-moe-%d", settings->launcher_pid);
    const struct epd_group_options options = {
        .size = sizeof(options),
        .name = name,
        .world_size = settings->n_ranks,
        .rank = (uint32_t)settings->rank,
        .n_experts = settings->n_experts,
        .top_k = settings->top_k,
        .hidden = settings->hidden,
        .ffn = settings->ffn,
        .max_tokens = settings->n_tokens,
        .dtype = EPD_F32,
    };
    enum epd_status status =
        layer_check(layer, "joining the group", epd_group_join(layer->client, &options, &layer->group));
    if (status != EPD_OK)
        return status;
    struct epd_group_info info = {.size = sizeof(info)};
    status = layer_check(layer, "asking for the group", epd_group_info(layer->group, &info));
    layer->first_expert = info.first_expert;
    layer->n_local_experts = info.n_local_experts;
    return status;
}

/* Role, dtype and shape of every tensor; unused dimensions are 1. */
static struct epd_tensor layer_tensor(const struct layer_epd *layer, enum layer_tensor which)
{
    const struct settings *settings = layer->settings;
    const int64_t n_tokens = settings->n_tokens, hidden = settings->hidden, ffn = settings->ffn;
    const int64_t top_k = settings->top_k, n_local = layer->n_local_experts;
    const struct epd_tensor table[LAYER_N_TENSORS] = {
        [LAYER_X] = {EPD_ROLE_X, NULL, 0, EPD_F32, 2, {n_tokens, hidden, 1}, 0, 0},
        [LAYER_TOPK_IDX] = {EPD_ROLE_TOPK_IDX, NULL, 0, EPD_I32, 2, {n_tokens, top_k, 1}, 0, 0},
        [LAYER_TOPK_WEIGHTS] = {EPD_ROLE_TOPK_WEIGHTS, NULL, 0, EPD_F32, 2, {n_tokens, top_k, 1}, 0, 0},
        [LAYER_OUT] = {EPD_ROLE_OUT, NULL, 0, EPD_F32, 2, {n_tokens, hidden, 1}, 0, 0},
        [LAYER_DOUT] = {EPD_ROLE_DOUT, NULL, 0, EPD_F32, 2, {n_tokens, hidden, 1}, 0, 0},
        [LAYER_DX] = {EPD_ROLE_DX, NULL, 0, EPD_F32, 2, {n_tokens, hidden, 1}, 0, 0},
        [LAYER_D_WEIGHTS] = {EPD_ROLE_D_WEIGHTS, NULL, 0, EPD_F32, 2, {n_tokens, top_k, 1}, 0, 0},
        [LAYER_W1] = {EPD_ROLE_W1, NULL, 0, EPD_F32, 3, {n_local, 2 * ffn, hidden}, 0, 0},
        [LAYER_W2] = {EPD_ROLE_W2, NULL, 0, EPD_F32, 3, {n_local, hidden, ffn}, 0, 0},
        [LAYER_DW1] = {EPD_ROLE_DW1, NULL, 0, EPD_F32, 3, {n_local, 2 * ffn, hidden}, 0, 0},
        [LAYER_DW2] = {EPD_ROLE_DW2, NULL, 0, EPD_F32, 3, {n_local, hidden, ffn}, 0, 0},
    };
    struct epd_tensor tensor = table[which];
    tensor.buffer = layer->buffers[which];
    return tensor;
}

/* One buffer per tensor, in the daemon's heap; both element types have 4 bytes. */
static enum epd_status layer_allocate(struct layer_epd *layer)
{
    for (enum layer_tensor i = 0; i < LAYER_N_TENSORS; i++) {
        const struct epd_tensor tensor = layer_tensor(layer, i);
        const uint64_t n = (uint64_t)(tensor.shape[0] * tensor.shape[1] * tensor.shape[2]);
        enum epd_status status =
            layer_check(layer, "allocating", epd_buffer_alloc(layer->group, 4 * n, &layer->buffers[i]));
        if (status != EPD_OK)
            return status;
    }
    layer->tokens = (struct tokens){
        .x = epd_buffer_data(layer->buffers[LAYER_X]),
        .topk_idx = epd_buffer_data(layer->buffers[LAYER_TOPK_IDX]),
        .topk_weights = epd_buffer_data(layer->buffers[LAYER_TOPK_WEIGHTS]),
        .out = epd_buffer_data(layer->buffers[LAYER_OUT]),
        .dout = epd_buffer_data(layer->buffers[LAYER_DOUT]),
        .dx_experts = epd_buffer_data(layer->buffers[LAYER_DX]),
        .d_weights = epd_buffer_data(layer->buffers[LAYER_D_WEIGHTS]),
    };
    layer->w1 = epd_buffer_data(layer->buffers[LAYER_W1]);
    layer->w2 = epd_buffer_data(layer->buffers[LAYER_W2]);
    layer->dw1 = epd_buffer_data(layer->buffers[LAYER_DW1]);
    layer->dw2 = epd_buffer_data(layer->buffers[LAYER_DW2]);
    return EPD_OK;
}

static enum epd_status layer_plan(struct layer_epd *layer)
{
    const struct epd_tensor forward_tensors[] = {
        layer_tensor(layer, LAYER_X),
        layer_tensor(layer, LAYER_TOPK_IDX),
        layer_tensor(layer, LAYER_TOPK_WEIGHTS),
        layer_tensor(layer, LAYER_W1),
        layer_tensor(layer, LAYER_W2),
        layer_tensor(layer, LAYER_OUT),
    };
    const struct epd_plan_options forward = {
        .size = sizeof(forward),
        .op = EPD_OP_MOE_FORWARD,
        .activation = EPD_SWIGLU,
        .saved = EPD_SAVED_CONTEXT,
        .n_tensors = sizeof(forward_tensors) / sizeof(forward_tensors[0]),
        .tensors = forward_tensors,
    };
    enum epd_status status =
        layer_check(layer, "forward plan", epd_plan_create(layer->group, &forward, &layer->forward));
    if (status != EPD_OK)
        return status;
    const struct epd_tensor backward_tensors[] = {
        layer_tensor(layer, LAYER_DOUT), layer_tensor(layer, LAYER_W1),        layer_tensor(layer, LAYER_W2),
        layer_tensor(layer, LAYER_DX),   layer_tensor(layer, LAYER_D_WEIGHTS), layer_tensor(layer, LAYER_DW1),
        layer_tensor(layer, LAYER_DW2),
    };
    const struct epd_plan_options backward = {
        .size = sizeof(backward),
        .op = EPD_OP_MOE_BACKWARD,
        .context = layer->forward,
        .activation = EPD_SWIGLU,
        .n_tensors = sizeof(backward_tensors) / sizeof(backward_tensors[0]),
        .tensors = backward_tensors,
    };
    return layer_check(layer, "backward plan", epd_plan_create(layer->group, &backward, &layer->backward));
}

enum epd_status layer_epd_open(struct layer_epd *layer, const struct settings *settings)
{
    *layer = (struct layer_epd){.settings = settings};
    enum epd_status status = layer_connect(layer);
    if (status == EPD_OK)
        status = layer_join(layer);
    if (status == EPD_OK)
        status = layer_allocate(layer);
    if (status == EPD_OK)
        status = layer_plan(layer);
    if (status != EPD_OK) {
        layer_epd_close(layer);
        return status;
    }
    experts_init(settings, layer->first_expert, layer->n_local_experts, layer->w1, layer->w2);
    return EPD_OK;
}

void layer_epd_close(struct layer_epd *layer)
{
    epd_close(layer->client); /* ends the plans, buffers and the group with it */
    *layer = (struct layer_epd){0};
}

static enum epd_status layer_run(struct layer_epd *layer, struct epd_plan *plan, const char *what)
{
    enum epd_status status = epd_plan_launch(plan, NULL);
    if (status == EPD_OK)
        status = epd_plan_wait(plan, 0);
    return layer_check(layer, what, status);
}

enum epd_status layer_epd_forward(struct layer_epd *layer)
{
    return layer_run(layer, layer->forward, "moe_forward");
}

enum epd_status layer_epd_backward(struct layer_epd *layer)
{
    return layer_run(layer, layer->backward, "moe_backward");
}

int layer_epd_is_lost(enum epd_status status)
{
    return status == EPD_RESTARTED || status == EPD_DISCONNECTED;
}

enum epd_status layer_epd_recover(struct layer_epd *layer)
{
    return layer_check(layer, "recovering", epd_recover(layer->client, 0));
}
