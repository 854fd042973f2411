#include "layer_epd.h"

#include <math.h>
#include <stdio.h>

#include "device.h"

/* Prints what failed and why, in the words of the library or of the daemon. */
static enum epd_status layer_check(const struct layer_epd *layer, const char *what, enum epd_status status)
{
    char who[24] = "";
    if (layer->settings->rank >= 0)
        snprintf(who, sizeof(who), "rank %d: ", layer->settings->rank);
    if (status != EPD_OK)
        fprintf(stderr, "epd-train-moe: %s%s: %s: %s\n", who, what, epd_status_name(status),
                epd_error_text());
    return status;
}

static enum epd_dtype layer_dtype(const struct settings *settings, enum epd_backend_kind backend)
{
    if (settings->dtype != EPD_DTYPE_UNSPECIFIED)
        return settings->dtype;
    return backend == EPD_BACKEND_CUDA ? EPD_BF16 : EPD_F32;
}

static enum epd_status layer_connect(struct layer_epd *layer, struct epd_client_info *info)
{
    char name[64] = "train-moe launcher";
    if (layer->settings->rank >= 0)
        snprintf(name, sizeof(name), "train-moe rank %d", layer->settings->rank);
    const struct epd_open_options options = {
        .size = sizeof(options), .socket_path = layer->settings->socket_path, .client_name = name};
    enum epd_status status = layer_check(layer, "connecting", epd_open(&options, &layer->client));
    if (status != EPD_OK)
        return status;
    *info = (struct epd_client_info){.size = sizeof(*info)};
    status = layer_check(layer, "asking for the backend", epd_client_info(layer->client, info));
    layer->dtype = layer_dtype(layer->settings, info->backend);
    layer->on_gpu = info->backend == EPD_BACKEND_CUDA;
    return status;
}

enum epd_status layer_epd_meet(struct settings *settings)
{
    struct layer_epd layer = {.settings = settings};
    struct epd_client_info info;
    enum epd_status status = layer_connect(&layer, &info);
    epd_close(layer.client);
    if (status != EPD_OK)
        return status;
    static const char *const names[] = {[EPD_F32] = "fp32", [EPD_BF16] = "bf16", [EPD_F16] = "fp16"};
    settings->dtype = (int)layer.dtype;
    printf("backend %s, %u devices, the first %s; the layer computes in %s\n", layer.on_gpu ? "cuda" : "host",
           info.n_devices, info.devices[0].name, names[layer.dtype]);
    return EPD_OK;
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
        .dtype = layer->dtype,
    };
    enum epd_status status =
        layer_check(layer, "joining the group", epd_group_join(layer->client, &options, &layer->group));
    if (status != EPD_OK)
        return status;
    struct epd_group_info info = {.size = sizeof(info)};
    status = layer_check(layer, "asking for the group", epd_group_info(layer->group, &info));
    layer->first_expert = info.first_expert;
    layer->n_local_experts = info.n_local_experts;
    /* Ranks share GPUs where there are fewer of them: the group says which one is ours. */
    return status == EPD_OK && layer->on_gpu ? device_select(info.device_uuid) : status;
}

/* Role, dtype and shape of every tensor; unused dimensions are 1. */
static struct epd_tensor layer_tensor(const struct layer_epd *layer, enum layer_tensor which)
{
    const struct settings *settings = layer->settings;
    const int64_t n_tokens = settings->n_tokens, hidden = settings->hidden, ffn = settings->ffn;
    const int64_t top_k = settings->top_k, n_local = layer->n_local_experts;
    const enum epd_dtype dtype = layer->dtype;
    const struct epd_tensor table[LAYER_N_TENSORS] = {
        [LAYER_X] = {EPD_ROLE_X, NULL, 0, dtype, 2, {n_tokens, hidden, 1}, 0, 0},
        [LAYER_TOPK_IDX] = {EPD_ROLE_TOPK_IDX, NULL, 0, EPD_I32, 2, {n_tokens, top_k, 1}, 0, 0},
        [LAYER_TOPK_WEIGHTS] = {EPD_ROLE_TOPK_WEIGHTS, NULL, 0, EPD_F32, 2, {n_tokens, top_k, 1}, 0, 0},
        [LAYER_OUT] = {EPD_ROLE_OUT, NULL, 0, dtype, 2, {n_tokens, hidden, 1}, 0, 0},
        [LAYER_DOUT] = {EPD_ROLE_DOUT, NULL, 0, dtype, 2, {n_tokens, hidden, 1}, 0, 0},
        [LAYER_DX] = {EPD_ROLE_DX, NULL, 0, dtype, 2, {n_tokens, hidden, 1}, 0, 0},
        [LAYER_D_WEIGHTS] = {EPD_ROLE_D_WEIGHTS, NULL, 0, EPD_F32, 2, {n_tokens, top_k, 1}, 0, 0},
        [LAYER_W1] = {EPD_ROLE_W1, NULL, 0, dtype, 3, {n_local, 2 * ffn, hidden}, 0, 0},
        [LAYER_W2] = {EPD_ROLE_W2, NULL, 0, dtype, 3, {n_local, hidden, ffn}, 0, 0},
        [LAYER_DW1] = {EPD_ROLE_DW1, NULL, 0, EPD_F32, 3, {n_local, 2 * ffn, hidden}, 0, 0},
        [LAYER_DW2] = {EPD_ROLE_DW2, NULL, 0, EPD_F32, 3, {n_local, hidden, ffn}, 0, 0},
    };
    struct epd_tensor tensor = table[which];
    tensor.buffer = layer->buffers[which];
    return tensor;
}

/* One buffer per tensor, in the daemon's heap. */
static enum epd_status layer_allocate(struct layer_epd *layer)
{
    for (enum layer_tensor i = 0; i < LAYER_N_TENSORS; i++) {
        const struct epd_tensor tensor = layer_tensor(layer, i);
        const uint64_t n = (uint64_t)(tensor.shape[0] * tensor.shape[1] * tensor.shape[2]);
        const uint64_t bytes = n * (tensor.dtype == EPD_BF16 || tensor.dtype == EPD_F16 ? 2 : 4);
        enum epd_status status =
            layer_check(layer, "allocating", epd_buffer_alloc(layer->group, bytes, &layer->buffers[i]));
        if (status == EPD_OK)
            status = staging_init(&layer->staging[i], layer->buffers[i], tensor.dtype, n, layer->on_gpu);
        if (status != EPD_OK)
            return status;
    }
    layer->tokens = (struct tokens){
        .x = layer->staging[LAYER_X].values,
        .topk_idx = layer->staging[LAYER_TOPK_IDX].values,
        .topk_weights = layer->staging[LAYER_TOPK_WEIGHTS].values,
        .out = layer->staging[LAYER_OUT].values,
        .dout = layer->staging[LAYER_DOUT].values,
        .dx_experts = layer->staging[LAYER_DX].values,
        .d_weights = layer->staging[LAYER_D_WEIGHTS].values,
    };
    layer->w1 = layer->staging[LAYER_W1].values;
    layer->w2 = layer->staging[LAYER_W2].values;
    layer->dw1 = layer->staging[LAYER_DW1].values;
    layer->dw2 = layer->staging[LAYER_DW2].values;
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
    struct epd_client_info info;
    enum epd_status status = layer_connect(layer, &info);
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
    for (enum layer_tensor i = 0; i < LAYER_N_TENSORS; i++)
        staging_fini(&layer->staging[i]);
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

static enum epd_status layer_push(struct layer_epd *layer, enum layer_tensor first, enum layer_tensor last)
{
    enum epd_status status = EPD_OK;
    for (enum layer_tensor i = first; status == EPD_OK && i <= last; i++)
        status = staging_push(&layer->staging[i]);
    return status;
}

static enum epd_status layer_pull(struct layer_epd *layer, enum layer_tensor first, enum layer_tensor last)
{
    enum epd_status status = EPD_OK;
    for (enum layer_tensor i = first; status == EPD_OK && i <= last; i++)
        status = staging_pull(&layer->staging[i]);
    return status;
}

enum epd_status layer_epd_forward(struct layer_epd *layer)
{
    enum epd_status status = layer_push(layer, LAYER_X, LAYER_TOPK_WEIGHTS);
    if (status == EPD_OK)
        status = layer_push(layer, LAYER_W1, LAYER_W2);
    if (status == EPD_OK)
        status = layer_run(layer, layer->forward, "moe_forward");
    return status == EPD_OK ? layer_pull(layer, LAYER_OUT, LAYER_OUT) : status;
}

/* Gradients of a mean over the tokens are below what fp16 has full precision for (6e-5): with them the layer computes the gradients
 * of about the sum. A power of two, so that scaling there and back is exact. */
static float layer_gradient_scale(const struct layer_epd *layer)
{
    const float n_tokens = (float)layer->settings->n_tokens * (float)layer->settings->n_ranks;
    return layer->dtype == EPD_F16 ? exp2f(ceilf(log2f(n_tokens))) : 1.0f;
}

static void layer_scale(struct layer_epd *layer, enum layer_tensor first, enum layer_tensor last, float scale)
{
    for (enum layer_tensor i = first; scale != 1.0f && i <= last; i++)
        staging_scale(&layer->staging[i], scale);
}

enum epd_status layer_epd_backward(struct layer_epd *layer)
{
    const float scale = layer_gradient_scale(layer);
    layer_scale(layer, LAYER_DOUT, LAYER_DOUT, scale);
    enum epd_status status = layer_push(layer, LAYER_DOUT, LAYER_DOUT);
    layer_scale(layer, LAYER_DOUT, LAYER_DOUT, 1 / scale);
    if (status == EPD_OK)
        status = layer_run(layer, layer->backward, "moe_backward");
    if (status == EPD_OK)
        status = layer_pull(layer, LAYER_DX, LAYER_DW2);
    if (status == EPD_OK)
        layer_scale(layer, LAYER_DX, LAYER_DW2, 1 / scale);
    return status;
}

int layer_epd_is_lost(enum epd_status status)
{
    return status == EPD_RESTARTED || status == EPD_DISCONNECTED;
}

enum epd_status layer_epd_recover(struct layer_epd *layer)
{
    return layer_check(layer, "recovering", epd_recover(layer->client, 0));
}
