#include "tests/gpu/fabric/node_rank.h"

#include <cuda_runtime_api.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "client/public.h"
#include "ep/hop.h"
#include "tests/gpu/backend/process.h"
#include "tests/gpu/fabric/node_result.h"

#define STEP_TIMEOUT_MS 60000
#define N_REPEATS       3
#define N_TIMED         30
/* Ranks that step together are at most a step apart: so far ahead their end is said. */
#define STEPS_TO_THE_END 20

enum { X, IDX, WEIGHTS, W1, W2, OUT, DOUT, DX, D_WEIGHTS, DW1, DW2, N_TENSORS };

struct layer {
    const struct node_rank_options *options;
    struct epd_client *client;
    struct epd_group *group;
    cudaStream_t stream;
    void *data[N_TENSORS];
    struct epd_buffer *buffers[N_TENSORS];
    struct epd_tensor tensors[N_TENSORS];
    struct epd_plan *forward, *backward;
};

static uint16_t bf16_of(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static uint32_t next(uint32_t *state)
{
    *state = *state * 1664525u + 1013904223u;
    return *state >> 8;
}

/* In -scale..scale. */
static float uniform(uint32_t *state, float scale)
{
    return scale * ((float)next(state) / (float)(1 << 23) - 1.0f);
}

/* ---- tensors ---- */

struct shape {
    enum epd_role role;
    enum epd_dtype dtype;
    uint32_t n_dims;
    int64_t dims[3];
};

static void make_tensor(struct layer *layer, int i, struct shape shape)
{
    size_t n = 1;
    for (uint32_t d = 0; d < shape.n_dims; d++)
        n *= (size_t)shape.dims[d];
    const size_t bytes = n * (shape.dtype == EPD_BF16 ? 2 : 4);
    MUST(cudaMalloc(&layer->data[i], bytes) == cudaSuccess);
    MUST(cudaMemset(layer->data[i], 0xff, bytes) == cudaSuccess);
    MUST(epd_buffer_register_cuda(layer->group, layer->data[i], bytes, &layer->buffers[i]) == EPD_OK);
    layer->tensors[i] = (struct epd_tensor){.role = shape.role,
                                            .buffer = layer->buffers[i],
                                            .dtype = shape.dtype,
                                            .n_dims = shape.n_dims,
                                            .shape = {shape.dims[0], shape.dims[1], shape.dims[2]}};
}

static void make_tensors(struct layer *layer)
{
    const int64_t n_local = NODE_E / layer->options->world_size;
    make_tensor(layer, X, (struct shape){EPD_ROLE_X, EPD_BF16, 2, {NODE_T, NODE_H}});
    make_tensor(layer, IDX, (struct shape){EPD_ROLE_TOPK_IDX, EPD_I32, 2, {NODE_T, NODE_K}});
    make_tensor(layer, WEIGHTS, (struct shape){EPD_ROLE_TOPK_WEIGHTS, EPD_F32, 2, {NODE_T, NODE_K}});
    make_tensor(layer, W1, (struct shape){EPD_ROLE_W1, EPD_BF16, 3, {n_local, 2 * NODE_F, NODE_H}});
    make_tensor(layer, W2, (struct shape){EPD_ROLE_W2, EPD_BF16, 3, {n_local, NODE_H, NODE_F}});
    make_tensor(layer, OUT, (struct shape){EPD_ROLE_OUT, EPD_BF16, 2, {NODE_T, NODE_H}});
    make_tensor(layer, DOUT, (struct shape){EPD_ROLE_DOUT, EPD_BF16, 2, {NODE_T, NODE_H}});
    make_tensor(layer, DX, (struct shape){EPD_ROLE_DX, EPD_BF16, 2, {NODE_T, NODE_H}});
    make_tensor(layer, D_WEIGHTS, (struct shape){EPD_ROLE_D_WEIGHTS, EPD_F32, 2, {NODE_T, NODE_K}});
    make_tensor(layer, DW1, (struct shape){EPD_ROLE_DW1, EPD_F32, 3, {n_local, 2 * NODE_F, NODE_H}});
    make_tensor(layer, DW2, (struct shape){EPD_ROLE_DW2, EPD_F32, 3, {n_local, NODE_H, NODE_F}});
}

static void fill_bf16(struct layer *layer, int i, size_t n, uint32_t seed, float scale)
{
    uint16_t *host = malloc(n * sizeof *host);
    uint32_t state = seed * 2654435761u + layer->options->rank * 40503u + 1;
    MUST(host != NULL);
    for (size_t at = 0; at < n; at++)
        host[at] = bf16_of(uniform(&state, scale));
    process_upload(layer->data[i], host, n * sizeof *host);
    free(host);
}

/* K different experts for each token, some with none, and weights. */
static void fill_routing(struct layer *layer, uint32_t seed)
{
    static int32_t idx[NODE_T * NODE_K];
    static float weights[NODE_T * NODE_K];
    uint32_t state = seed * 2246822519u + layer->options->rank * 3266489917u + 7;
    for (int t = 0; t < NODE_T; t++)
        for (int k = 0; k < NODE_K; k++) {
            int32_t expert = (int32_t)(next(&state) % NODE_E);
            for (int other = 0; other < k; other++)
                if (idx[t * NODE_K + other] == expert) {
                    expert = (expert + 1) % NODE_E;
                    other = -1;
                }
            idx[t * NODE_K + k] = expert;
            weights[t * NODE_K + k] = 0.5f + uniform(&state, 0.4f);
        }
    for (int t = 3; t < NODE_T; t += 97)
        idx[t * NODE_K + 1] = -1;
    process_upload(layer->data[IDX], idx, sizeof idx);
    process_upload(layer->data[WEIGHTS], weights, sizeof weights);
}

static void fill_all(struct layer *layer)
{
    const size_t n_local = NODE_E / layer->options->world_size;
    fill_bf16(layer, X, (size_t)NODE_T * NODE_H, 1, 1.0f);
    fill_bf16(layer, DOUT, (size_t)NODE_T * NODE_H, 2, 1.0f);
    fill_bf16(layer, W1, n_local * 2 * NODE_F * NODE_H, 3, 1.7f / sqrtf(NODE_H));
    fill_bf16(layer, W2, n_local * NODE_H * NODE_F, 4, 1.7f / sqrtf(NODE_F));
    fill_routing(layer, 5);
}

/* ---- the layer ---- */

static enum epd_crossing crossing(void)
{
    const char *text = getenv("EPD_TEST_CROSSING");
    return text && strcmp(text, "eager") == 0 ? EPD_CROSSING_EAGER : EPD_CROSSING_STATIC;
}

static void make_plans(struct layer *layer)
{
    static const int backward_tensors[] = {DOUT, DX, D_WEIGHTS, DW1, DW2};
    struct epd_tensor backward[5];
    for (int i = 0; i < 5; i++)
        backward[i] = layer->tensors[backward_tensors[i]];
    struct epd_plan_options options = {.size = sizeof options,
                                       .op = EPD_OP_MOE_FORWARD,
                                       .saved = EPD_SAVED_CONTEXT,
                                       .n_tensors = OUT + 1,
                                       .tensors = layer->tensors,
                                       .crossing = crossing()};
    MUST(epd_plan_create(layer->group, &options, &layer->forward) == EPD_OK);
    options = (struct epd_plan_options){.size = sizeof options,
                                        .op = EPD_OP_MOE_BACKWARD,
                                        .context = layer->forward,
                                        .n_tensors = 5,
                                        .tensors = backward};
    MUST(epd_plan_create(layer->group, &options, &layer->backward) == EPD_OK);
}

static void layer_open(struct layer *layer, const struct node_rank_options *options)
{
    const struct epd_open_options open = {
        .size = sizeof open, .socket_path = options->socket_path, .timeout_ms = STEP_TIMEOUT_MS};
    const struct epd_group_options join = {.size = sizeof join,
                                           .name = options->group,
                                           .world_size = options->world_size,
                                           .rank = options->rank,
                                           .n_experts = NODE_E,
                                           .top_k = NODE_K,
                                           .hidden = NODE_H,
                                           .ffn = NODE_F,
                                           .max_tokens = NODE_T,
                                           .dtype = EPD_BF16,
                                           .n_nodes = options->n_nodes};
    *layer = (struct layer){.options = options};
    MUST(cudaSetDevice((int)options->device) == cudaSuccess);
    MUST(cudaStreamCreateWithFlags(&layer->stream, cudaStreamNonBlocking) == cudaSuccess);
    MUST(epd_open(&open, &layer->client) == EPD_OK);
    const double begin = process_seconds();
    MUST(epd_group_join(layer->client, &join, &layer->group) == EPD_OK);
    if (options->rank == 0)
        printf("group %s: joined in %.2f s\n", options->group, process_seconds() - begin);
    make_tensors(layer);
    fill_all(layer);
    make_plans(layer);
}

static void layer_close(struct layer *layer)
{
    epd_plan_destroy(layer->backward);
    epd_plan_destroy(layer->forward);
    for (int i = 0; i < N_TENSORS; i++)
        MUST(epd_buffer_release(layer->buffers[i]) == EPD_OK);
    epd_group_leave(layer->group);
    epd_close(layer->client);
}

static enum epd_status run(struct layer *layer, struct epd_plan *plan)
{
    enum epd_status status = epd_plan_launch(plan, layer->stream);
    MUST(cudaStreamSynchronize(layer->stream) == cudaSuccess);
    const enum epd_status waited = epd_plan_wait(plan, STEP_TIMEOUT_MS);
    return status ? status : waited;
}

static void fetch(const struct layer *layer, int i, void *to, size_t bytes)
{
    MUST(cudaMemcpy(to, layer->data[i], bytes, cudaMemcpyDeviceToHost) == cudaSuccess);
}

static void fetch_all(const struct layer *layer, struct node_result *result)
{
    static const int tensors[NODE_PARTS] = {OUT, DX, D_WEIGHTS, DW1, DW2};
    for (int part = 0; part < NODE_PARTS; part++) {
        void *to;
        const size_t bytes = node_result_part(result, (enum node_part)part, layer->options->world_size, &to);
        fetch(layer, tensors[part], to, bytes);
    }
}

static void check_repeats(struct layer *layer, struct node_result *result)
{
    struct node_result *again = calloc(1, sizeof *again);
    MUST(again != NULL);
    for (int repeat = 0; repeat < N_REPEATS; repeat++) {
        MUST(run(layer, layer->forward) == EPD_OK && run(layer, layer->backward) == EPD_OK);
        fetch_all(layer, repeat ? again : result);
        MUST(repeat == 0 || memcmp(again, result, sizeof *result) == 0);
    }
    free(again);
}

/* The client's own graph, replayed while its routing changes: the same bits as launches. */
static void check_graph(struct layer *layer)
{
    static uint16_t wanted[2][NODE_T * NODE_H], got[NODE_T * NODE_H];
    cudaGraph_t graph;
    cudaGraphExec_t replay;
    for (int routing = 0; routing < 2; routing++) {
        fill_routing(layer, 20 + (uint32_t)routing);
        MUST(run(layer, layer->forward) == EPD_OK);
        fetch(layer, OUT, wanted[routing], sizeof wanted[routing]);
    }
    MUST(cudaStreamBeginCapture(layer->stream, cudaStreamCaptureModeThreadLocal) == cudaSuccess);
    MUST(epd_plan_capture(layer->forward, layer->stream) == EPD_OK);
    MUST(cudaStreamEndCapture(layer->stream, &graph) == cudaSuccess);
    MUST(cudaGraphInstantiate(&replay, graph, 0) == cudaSuccess);
    for (int i = 0; i < 6; i++) {
        fill_routing(layer, 20 + (uint32_t)(i % 2));
        MUST(epd_plan_arm(layer->forward, 1) == EPD_OK);
        MUST(cudaGraphLaunch(replay, layer->stream) == cudaSuccess);
        MUST(cudaStreamSynchronize(layer->stream) == cudaSuccess);
        MUST(epd_plan_wait(layer->forward, STEP_TIMEOUT_MS) == EPD_OK);
        fetch(layer, OUT, got, sizeof got);
        MUST(memcmp(got, wanted[i % 2], sizeof got) == 0);
    }
    MUST(cudaGraphExecDestroy(replay) == cudaSuccess && cudaGraphDestroy(graph) == cudaSuccess);
}

/* A step that fails on one rank fails on all, names it, and hurts no other. */
static void check_bad_step(struct layer *layer)
{
    const int32_t bad = NODE_E + 3;
    fill_routing(layer, 5);
    if (layer->options->rank == layer->options->world_size - 1)
        process_upload((int32_t *)layer->data[IDX] + 11 * NODE_K, &bad, sizeof bad);
    MUST(run(layer, layer->forward) == EPD_BAD_ROUTING);
    char name[32];
    (void)snprintf(name, sizeof name, "rank %u", layer->options->world_size - 1);
    MUST(strstr(epd_error_text(), name) != NULL);
    MUST(run(layer, layer->backward) == EPD_INVALID_ARGUMENT);
    fill_routing(layer, 5);
}

static void time_steps(struct layer *layer)
{
    double forward_s = 0, both_s = 0;
    for (int i = 0; i < N_TIMED; i++) {
        const double begin = process_seconds();
        MUST(run(layer, layer->forward) == EPD_OK);
        forward_s += process_seconds() - begin;
        MUST(run(layer, layer->backward) == EPD_OK);
        both_s += process_seconds() - begin;
    }
    if (layer->options->rank == 0)
        printf("group %s nodes %u: forward %.0f us, backward %.0f us\n", layer->options->group,
               layer->options->n_nodes, forward_s / N_TIMED * 1e6, (both_s - forward_s) / N_TIMED * 1e6);
}

static void print_fabric(const struct node_rank_options *options)
{
    char command[512];
    if (options->rank != 0 || strcmp(options->epdctl, "-") == 0)
        return;
    (void)fflush(stdout);
    (void)snprintf(command, sizeof command, "%s --control-socket %s --json fabric", options->epdctl,
                   options->control_path);
    (void)!system(command);
}

/* ---- what crosses ---- */

static double section(double bytes)
{
    return ceil(bytes / 256) * 256;
}

/* Of a static plan, both ways, of one rank in one launch: heads and counts as kernels/cuda/hop.h lays them out, experts, weights
 * and rows with the routing, rows alone where it is known, rows and scalars back; and what the rank has come to. */
static double static_bytes(const struct layer *layer, int backward)
{
    const double choices = 4.0 * NODE_T * NODE_K, rows = 2.0 * NODE_T * NODE_H;
    const double routed = 256 + section(4.0 * NODE_E) + 2 * choices + rows;
    const double there = backward ? rows : routed, back = backward ? choices + rows : rows;
    return 2 * (layer->options->n_nodes - 1.0) * (there + back + (double)sizeof(struct hop_report));
}

struct counted {
    double launches, bytes;
};

static struct counted count_network(const struct layer *layer, const char *op)
{
    char key[64], *text = NULL;
    MUST(epd_stats(layer->client, &text) == EPD_OK);
    (void)snprintf(key, sizeof key, "\"op\":\"%s\"", op);
    const struct counted counted = {fmax(process_number(text, key, "launches"), 0),
                                    fmax(process_number(text, key, "network_bytes"), 0)};
    epd_free(text);
    return counted;
}

/* The group's ranks are the only ones of the daemon that step. */
static void check_network(const struct layer *layer, const char *op, int backward, struct counted before)
{
    const struct counted after = count_network(layer, op);
    const double launches = after.launches - before.launches, bytes = after.bytes - before.bytes;
    const double want = launches * static_bytes(layer, backward);
    printf("group %s rank %u: %s: network_bytes %.0f in %.0f launches, of static messages %.0f\n",
           layer->options->group, layer->options->rank, op, bytes, launches, want);
    MUST(launches > 0 && (crossing() == EPD_CROSSING_STATIC ? bytes == want : bytes > 0 && bytes < want));
}

/* ---- modes ---- */

static void check_results(struct layer *layer)
{
    const struct node_rank_options *options = layer->options;
    struct node_result *result = calloc(1, sizeof *result);
    MUST(result != NULL);
    check_repeats(layer, result);
    if (strcmp(options->prefix, "-") != 0)
        MUST(node_result_write(result, options->world_size, options->prefix, options->rank) == 0);
    free(result);
}

static void run_layer(struct layer *layer)
{
    const struct counted forward = count_network(layer, "moe_forward");
    const struct counted backward = count_network(layer, "moe_backward");
    check_results(layer);
    if (layer->options->n_nodes > 1) {
        check_network(layer, "moe_forward", 0, forward);
        check_network(layer, "moe_backward", 1, backward);
    }
    print_fabric(layer->options);
    check_bad_step(layer);
    check_graph(layer);
    fill_routing(layer, 5);
    time_steps(layer);
}

static void run_check(struct layer *layer)
{
    check_results(layer);
    check_bad_step(layer);
}

static void say_stepping(const struct layer *layer)
{
    char path[128];
    if (layer->options->rank != 0)
        return;
    (void)snprintf(path, sizeof path, "%s.steps", layer->options->prefix);
    FILE *file = fopen(path, "w");
    MUST(file && fclose(file) == 0);
}

/* Steps until one fails: to ranks of the other node it must name the one that was killed. */
static void run_until_lost(struct layer *layer)
{
    enum epd_status status = EPD_OK;
    double begin = 0;
    int n = 0;
    while (status == EPD_OK) {
        begin = process_seconds();
        status = run(layer, layer->forward);
        if (n++ == 0)
            say_stepping(layer);
    }
    printf("rank %u: step %d failed after %.2f s: %s: %s\n", layer->options->rank, n,
           process_seconds() - begin, epd_status_name(status), epd_error_text());
    if (layer->options->rank < layer->options->world_size / layer->options->n_nodes)
        MUST(status == EPD_PEER_LOST && strstr(epd_error_text(), "node 1") != NULL);
}

/* The last step: rank 0 says it when time is over, the others look. 0: not known yet. */
static int last_step(const struct layer *layer, int n, int is_over)
{
    char path[128], written[160];
    int last = 0;
    (void)snprintf(path, sizeof path, "%s.last", layer->options->prefix);
    (void)snprintf(written, sizeof written, "%s.written", path);
    if (layer->options->rank == 0 && is_over) {
        last = n + STEPS_TO_THE_END;
        FILE *file = fopen(written, "w");
        MUST(file && fprintf(file, "%d", last) > 0 && fclose(file) == 0 && rename(written, path) == 0);
    } else if (layer->options->rank != 0 && access(path, R_OK) == 0) {
        FILE *file = fopen(path, "r");
        MUST(file && fscanf(file, "%d", &last) == 1 && fclose(file) == 0);
    }
    return last;
}

/* Nothing may fail; how long the longest step took is printed, not judged. */
static void run_for(struct layer *layer, double seconds)
{
    const double until = process_seconds() + seconds;
    double longest = 0;
    int n = 0, last = 0;
    for (; last == 0 || n < last; n++) {
        const double begin = process_seconds();
        MUST(run(layer, layer->forward) == EPD_OK && run(layer, layer->backward) == EPD_OK);
        longest = fmax(longest, process_seconds() - begin);
        if (n == 0)
            say_stepping(layer);
        if (last == 0)
            last = last_step(layer, n, process_seconds() > until);
    }
    printf("group %s rank %u: %d steps, the longest %.0f ms\n", layer->options->group, layer->options->rank,
           n, longest * 1e3);
}

_Noreturn void node_rank_main(char **argv)
{
    const struct node_rank_options options = {.mode = argv[2],
                                              .group = argv[3],
                                              .rank = (unsigned)atoi(argv[4]),
                                              .world_size = (unsigned)atoi(argv[5]),
                                              .n_nodes = (unsigned)atoi(argv[6]),
                                              .device = (unsigned)atoi(argv[7]),
                                              .socket_path = argv[8],
                                              .prefix = argv[9],
                                              .epdctl = argv[10],
                                              .control_path = argv[11]};
    struct layer layer;
    layer_open(&layer, &options);
    if (strcmp(options.mode, "layer") == 0)
        run_layer(&layer);
    else if (strcmp(options.mode, "check") == 0)
        run_check(&layer);
    else if (strcmp(options.mode, "until_lost") == 0)
        run_until_lost(&layer);
    else
        run_for(&layer, atof(options.mode + strlen("for:")));
    if (strcmp(options.mode, "until_lost") != 0)
        layer_close(&layer);
    exit(0);
}
