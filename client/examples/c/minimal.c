/* The smallest complete use of epd: a group of one rank runs one MoE layer (route, dispatch, two grouped
 * GEMMs with SwiGLU between, combine) on random tokens and prints the sum of the result. Needs a daemon on
 * the host backend. */
#include <epd.h>
#include <stdio.h>
#include <stdlib.h>

enum { T = 64, H = 32, F = 48, E = 8, K = 2 };

#define TRY(call)                                                                                            \
    if (call) {                                                                                              \
        fprintf(stderr, "%s: %s\n", #call, epd_error_text());                                                \
        exit(1);                                                                                             \
    }

/* A float buffer of n random numbers in [-0.5, 0.5). */
static struct epd_buffer *random_floats(struct epd_group *group, size_t n)
{
    struct epd_buffer *buffer;
    TRY(epd_buffer_alloc(group, n * sizeof(float), &buffer));
    for (size_t i = 0; i < n; i++)
        ((float *)epd_buffer_data(buffer))[i] = (float)rand() / (float)RAND_MAX - 0.5f;
    return buffer;
}

int main(void)
{
    struct epd_client *client;
    struct epd_group *group;
    struct epd_buffer *idx;
    struct epd_plan *plan;

    TRY(epd_open(NULL, &client));
    TRY(epd_group_join(client,
                       &(struct epd_group_options){.size = sizeof(struct epd_group_options),
                                                   .name = "minimal",
                                                   .world_size = 1,
                                                   .n_experts = E,
                                                   .top_k = K,
                                                   .hidden = H,
                                                   .ffn = F,
                                                   .max_tokens = T,
                                                   .dtype = EPD_F32},
                       &group));
    TRY(epd_buffer_alloc(group, T * K * sizeof(int32_t), &idx));
    for (int i = 0; i < T * K; i++)
        ((int32_t *)epd_buffer_data(idx))[i] = i % E; /* the K experts of a token differ */
    struct epd_buffer *out = random_floats(group, T * H);
    const struct epd_tensor tensors[] = {
        {.role = EPD_ROLE_X,
         .buffer = random_floats(group, T * H),
         .dtype = EPD_F32,
         .n_dims = 2,
         .shape = {T, H}},
        {.role = EPD_ROLE_TOPK_IDX, .buffer = idx, .dtype = EPD_I32, .n_dims = 2, .shape = {T, K}},
        {.role = EPD_ROLE_TOPK_WEIGHTS,
         .buffer = random_floats(group, T * K),
         .dtype = EPD_F32,
         .n_dims = 2,
         .shape = {T, K}},
        {.role = EPD_ROLE_W1,
         .buffer = random_floats(group, E * 2 * F * H),
         .dtype = EPD_F32,
         .n_dims = 3,
         .shape = {E, 2 * F, H}},
        {.role = EPD_ROLE_W2,
         .buffer = random_floats(group, E * H * F),
         .dtype = EPD_F32,
         .n_dims = 3,
         .shape = {E, H, F}},
        {.role = EPD_ROLE_OUT, .buffer = out, .dtype = EPD_F32, .n_dims = 2, .shape = {T, H}},
    };
    TRY(epd_plan_create(group,
                        &(struct epd_plan_options){.size = sizeof(struct epd_plan_options),
                                                   .op = EPD_OP_MOE_FORWARD,
                                                   .n_tensors = 6,
                                                   .tensors = tensors},
                        &plan));
    TRY(epd_plan_launch(plan, NULL));
    TRY(epd_plan_wait(plan, 0));
    double sum = 0;
    for (int i = 0; i < T * H; i++)
        sum += ((const float *)epd_buffer_data(out))[i];
    printf("sum of the layer's output: %f\n", sum);
    epd_close(client); /* ends the group, the buffers and the plan too */
    return 0;
}
