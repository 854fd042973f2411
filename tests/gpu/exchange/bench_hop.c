/* What two hops cost beside one: the same ranks as one node (its exchange, stage by stage) and as two. The rail between
 * them is the copy engine of the same machine. */
#include "tests/gpu/exchange/inputs.h"
#include "tests/gpu/exchange/nodes.h"
#include "tests/gpu/exchange/test.h"

static void bench_op(struct nodes *nodes, const char *name, const struct nodes_op *op)
{
    enum { N_TIMES = 20 };
    (void)nodes_run(nodes, op, 3);
    printf("{\"op\": \"%s\", \"nodes\": %u, \"ranks\": %u, \"tokens\": %u, \"us\": %.1f}\n", name,
           nodes->n_nodes, nodes->problem.n_ranks, nodes->problem.max_tokens,
           (double)nodes_run(nodes, op, N_TIMES) * 1000.0 / N_TIMES);
    fflush(stdout);
}

static void bench(uint32_t n_nodes, uint32_t max_tokens)
{
    static const struct nodes_op forward = {.op = EXCHANGE_ROUTE_DISPATCH, .weights = 1},
                                 saved = {.op = EXCHANGE_COMBINE, .weights = 1, .weights_kept = 1};
    struct problem p = {.n_ranks = 4,
                        .top_k = 8,
                        .n_experts = 256,
                        .hidden = 7168,
                        .alignment = 1,
                        .max_tokens = max_tokens,
                        .dtype = EPD_BF16,
                        .idx_dtype = EPD_I64};
    static struct nodes nodes;
    struct rank_input input[CLUSTER_MAX_RANKS];
    inputs_make(&p, UNIFORM, 0, input);
    p.capacity_rows = (int64_t)max_tokens * p.top_k * 5 / 4;
    nodes_open(&nodes, &p, n_nodes);
    for (uint32_t rank = 0; rank < p.n_ranks; rank++) {
        upload(nodes.ranks[rank].topk_idx, input[rank].topk_idx, (size_t)max_tokens * p.top_k * 8);
        upload(nodes.ranks[rank].topk_weights, input[rank].topk_weights, (size_t)max_tokens * p.top_k * 4);
        upload(nodes.ranks[rank].x, input[rank].x, (size_t)max_tokens * p.hidden * 2);
    }
    inputs_free(&p, input);
    bench_op(&nodes, "dispatch", &forward);
    bench_op(&nodes, "combine", &saved);
    nodes_close(&nodes);
}

void bench_hop(void)
{
    for (uint32_t n_nodes = 1; n_nodes <= 2; n_nodes++) {
        bench(n_nodes, 4096);
        bench(n_nodes, 128);
    }
}
