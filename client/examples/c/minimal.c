/* The smallest complete use of epd: a group of one rank runs one MoE layer (route, dispatch, two grouped
 * GEMMs with SwiGLU between, combine) on random tokens and prints a number of the result. Host backend. */
#include <epd.h>
#include <stdio.h>
#include <stdlib.h>

enum { T = 64, H = 32, F = 48, E = 8, K = 2 }; /* tokens, hidden, ffn, experts, top-k */

static void must(enum epd_status status)
{
    if (status)
        fprintf(stderr, "%s: %s\n", epd_status_name(status), epd_error_text()), exit(1);
}

/* A tensor in a buffer of its own: random floats, or expert numbers that differ within a token. */
static struct epd_tensor fill(struct epd_group *group, enum epd_role role, int64_t a, int64_t b, int64_t c)
{
    struct epd_tensor tensor = {.role = role, .n_dims = c > 1 ? 3 : 2, .shape = {a, b, c}};
    int is_index = role == EPD_ROLE_TOPK_IDX;
    tensor.dtype = is_index ? EPD_I32 : EPD_F32;
    must(epd_buffer_alloc(group, (uint64_t)(a * b * c) * 4, &tensor.buffer));
    for (int64_t i = 0; i < a * b * c; i++)
        if (is_index)
            ((int32_t *)epd_buffer_data(tensor.buffer))[i] = (int32_t)(i % E);
        else
            ((float *)epd_buffer_data(tensor.buffer))[i] = (float)rand() / (float)RAND_MAX - 0.5f;
    return tensor;
}

int main(void)
{
    struct epd_client *client;
    struct epd_group *group;
    struct epd_plan *plan;
    const struct epd_group_options options = {.size = sizeof options,
                                              .name = "minimal",
                                              .world_size = 1,
                                              .n_experts = E,
                                              .top_k = K,
                                              .hidden = H,
                                              .ffn = F,
                                              .max_tokens = T,
                                              .dtype = EPD_F32};

    must(epd_open(NULL, &client));
    must(epd_group_join(client, &options, &group));
    const struct epd_tensor tensors[] = {fill(group, EPD_ROLE_X, T, H, 1),
                                         fill(group, EPD_ROLE_TOPK_IDX, T, K, 1),
                                         fill(group, EPD_ROLE_TOPK_WEIGHTS, T, K, 1),
                                         fill(group, EPD_ROLE_W1, E, 2 * F, H),
                                         fill(group, EPD_ROLE_W2, E, H, F),
                                         fill(group, EPD_ROLE_OUT, T, H, 1)};
    const struct epd_plan_options layer = {
        .size = sizeof layer, .op = EPD_OP_MOE_FORWARD, .n_tensors = 6, .tensors = tensors};
    must(epd_plan_create(group, &layer, &plan));
    must(epd_plan_launch(plan, NULL)); /* one message; the daemon works on the buffers in place */
    must(epd_plan_wait(plan, 0));
    const float *out = epd_buffer_data(tensors[5].buffer);
    printf("first number of the layer's output: %f\n", out[0]);
    epd_close(client); /* ends the group, the buffers and the plan too */
    return 0;
}
