/* What two hops cost beside one: the same MoE layer with its ranks on one daemon and on the daemons of two nodes, all on
 * this machine, host backend, UCX over the loopback. One JSON line for each; the bytes that crossed stand beside what
 * the routing asks for:
 *
 *   there: sum over tokens and other nodes with one of the token's experts of H * e + 8 K bytes (row, experts, weights)
 *   back:  the same tokens, 4 H bytes each (fp32 sums)
 *
 * Once with each step waited for before the next is launched, and once four deep: then the agreement about a step runs
 * while earlier ones are on the lanes.
 *
 * bench_fabric [steps] [tokens] [hidden] [ffn] */
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#include "client/epdctl/field.h"
#include "client/epdctl/link.h"
#include "tests/integration/fabric/fabric_process.h"
#include "tests/integration/layer.h"

#define N_RANKS   4
#define MAX_STEPS 10000
#define MAX_DEPTH 8
#define STUCK_NS  60e9 /* without another step */

struct bench {
    struct op_case op_case;
    unsigned n_steps, depth; /* steps launched ahead of the one that is waited for */
    double *step_ns;         /* [MAX_STEPS] of rank 0, shared */
};

static double now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e9 + (double)t.tv_nsec;
}

static void bench_rank(const struct rank *rank)
{
    static const enum epd_role roles[] = {EPD_ROLE_X, EPD_ROLE_TOPK_IDX, EPD_ROLE_TOPK_WEIGHTS, EPD_ROLE_W1,
                                          EPD_ROLE_W2};
    const struct bench *bench = rank->arg;
    struct layer layer;
    struct layer_tensor t[6];
    layer_open(&layer, rank, &bench->op_case);
    for (int i = 0; i < 5; i++)
        t[i] = layer_input(&layer, roles[i]);
    t[5] = layer_output(&layer, EPD_ROLE_OUT);
    struct epd_plan *barrier = layer_plan(&layer, (struct epd_plan_options){.op = EPD_OP_BARRIER}, t, 0);
    struct epd_plan *plans[MAX_DEPTH];
    for (unsigned i = 0; i < bench->depth; i++)
        plans[i] = layer_plan(&layer, (struct epd_plan_options){.op = EPD_OP_MOE_FORWARD}, t, 6);
    double began = now_ns();
    for (unsigned i = 0; i < bench->n_steps + bench->depth; i++) {
        struct epd_plan *plan = plans[i % bench->depth];
        if (i >= bench->depth) {
            RANK_CHECK(epd_plan_wait(plan, 0) == EPD_OK);
            const double ended = now_ns();
            if (rank->rank == 0)
                bench->step_ns[i - bench->depth] = ended - began;
            began = ended;
        }
        if (i < bench->n_steps)
            RANK_CHECK(epd_plan_launch(plan, NULL) == EPD_OK);
    }
    RANK_CHECK(layer_step(barrier) == EPD_OK);
    usleep(300000); /* the numbers are read while the group lives */
    layer_close(&layer);
}

/* Tokens that cross, counted once per other node. */
static double crossing_tokens(const struct op_case *c)
{
    struct op_inputs inputs;
    double n = 0;
    op_inputs_init(&inputs, c);
    const uint32_t per_node = c->n_experts / 2;
    for (uint32_t r = 0; r < c->world_size; r++)
        for (uint32_t t = 0; t < inputs.shape.n_tokens[r]; t++) {
            int crosses = 0;
            for (uint32_t k = 0; k < c->top_k; k++) {
                const int64_t expert = inputs.topk_idx[r][t * c->top_k + k];
                crosses |= expert >= 0 && (uint32_t)expert / per_node != r / (c->world_size / 2);
            }
            n += crosses;
        }
    op_inputs_fini(&inputs);
    return n;
}

static int by_value(const void *a, const void *b)
{
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static json_t *ask(const char *socket)
{
    struct link link;
    struct epd_error error = {0};
    json_t *document = NULL;
    if (link_open(&link, socket, 5000, &error) != EPD_OK ||
        link_request(&link, &(struct message_control){.verb = CONTROL_FABRIC}, &document, &error) != EPD_OK)
        fprintf(stderr, "bench_fabric: %s\n", error.text);
    link_close(&link);
    return document;
}

static double sent_by(const json_t *document)
{
    size_t idx, node_idx;
    json_t *group, *node;
    double bytes = 0;
    json_array_foreach (field_array(document, "groups"), idx, group)
        json_array_foreach (field_array(field_object(group, "rails"), "nodes"), node_idx, node)
            bytes += field_number(node, "sent_bytes");
    return bytes;
}

/* What has crossed, as members of a JSON object; 0 if a node does not tell. */
static int tell_crossing(const struct bench *bench, const struct fabric_process *fabric, char *text,
                         size_t size)
{
    const struct op_case *c = &bench->op_case;
    const double tokens = crossing_tokens(c);
    double sent = 0;
    json_t *document = NULL;
    for (unsigned i = 0; i < fabric->n_nodes; i++) {
        json_decref(document);
        document = ask(fabric->nodes[i].control_path);
        if (!document)
            return 0;
        sent += sent_by(document);
    }
    snprintf(text, size,
             ", \"crossing_tokens\": %.0f, \"wire_bytes_per_step\": %.0f, \"formula_bytes\": %.0f"
             ", \"agreement_mean_us\": %.1f, \"agreement_max_us\": %.1f, \"agreed_ahead\": %.0f",
             tokens, sent / bench->n_steps,
             tokens * (c->hidden * (double)dtype_bytes(c->dtype) + 8 * c->top_k + 4 * c->hidden),
             field_number_in(document, "agreement", "mean_ns") * 1e-3,
             field_number_in(document, "agreement", "max_ns") * 1e-3,
             field_number_in(document, "agreement", "ahead"));
    json_decref(document);
    return 1;
}

static int wait_for_steps(const struct bench *bench)
{
    double since = now_ns();
    for (unsigned n = 0; n < bench->n_steps;) {
        if (((volatile double *)bench->step_ns)[n] != 0) {
            since = now_ns();
            n++;
        } else if (now_ns() - since > STUCK_NS) {
            fprintf(stderr, "bench_fabric: no step after %u of %u\n", n, bench->n_steps);
            return 0;
        } else {
            usleep(10000);
        }
    }
    return 1;
}

/* 0 if anything went wrong; then there are no numbers. */
static int run(struct bench *bench, unsigned n_nodes)
{
    struct fabric_process fabric;
    struct rank_team team;
    char crossing[512] = "";
    const struct op_case *c = &bench->op_case;
    fabric_start(&fabric, n_nodes, N_RANKS / n_nodes, NULL);
    memset(bench->step_ns, 0, MAX_STEPS * sizeof(double));
    fabric_ranks_start(&fabric, &team, "bench", N_RANKS, bench_rank, bench);
    const int stepped = wait_for_steps(bench);
    int good = stepped && (n_nodes == 1 || tell_crossing(bench, &fabric, crossing, sizeof(crossing)));
    if (ranks_wait(&team, stepped ? 60 : 0)) {
        fabric_print_logs(&fabric);
        good = 0;
    }
    fabric_stop(&fabric);
    if (!good)
        return 0;
    qsort(bench->step_ns, bench->n_steps, sizeof(double), by_value);
    printf("{\"bench\": \"fabric\", \"nodes\": %u, \"depth\": %u, \"ranks\": %d, \"tokens\": %u, \"hidden\": "
           "%u, \"ffn\": %u%s, \"step_median_us\": %.1f, \"step_p99_us\": %.1f}\n",
           n_nodes, bench->depth, N_RANKS, c->max_tokens, c->hidden, c->ffn, crossing,
           bench->step_ns[bench->n_steps / 2] * 1e-3, bench->step_ns[bench->n_steps * 99 / 100] * 1e-3);
    fflush(stdout);
    return 1;
}

int main(int argc, char **argv)
{
    struct bench bench = {.op_case = *op_case_named("uniform bf16"), .n_steps = 300};
    bench.step_ns =
        mmap(NULL, MAX_STEPS * sizeof(double), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    bench.op_case.capacity = OP_CAPACITY_AMPLE;
    bench.op_case.biased = 0;
    if (argc > 1)
        bench.n_steps = (unsigned)atoi(argv[1]);
    if (bench.n_steps < 1 || bench.n_steps > MAX_STEPS) {
        fprintf(stderr, "bench_fabric: steps must be 1 to %d\n", MAX_STEPS);
        return 2;
    }
    if (argc > 2)
        bench.op_case.max_tokens = (uint32_t)atoi(argv[2]);
    if (argc > 3)
        bench.op_case.hidden = (uint32_t)atoi(argv[3]);
    if (argc > 4)
        bench.op_case.ffn = (uint32_t)atoi(argv[4]);
    for (bench.depth = 1; bench.depth <= 4; bench.depth += 3) {
        if (!run(&bench, 1) || !run(&bench, 2))
            return 1;
    }
    return 0;
}
