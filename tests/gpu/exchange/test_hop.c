/* hop_test [few|bench]: the exchange of a group that spans nodes (ep/hop_cuda.h) on emulated nodes. Slots, layout, weights and
 * scalars are held against the one-node reference bit by bit, sums against it with the roundings that the hops add, and
 * against float64; results are poisoned first and repeated with other numbers of blocks, and with messages
 * as long as what crosses. */
#include <math.h>
#include <string.h>

#include "tests/gpu/exchange/compare.h"
#include "tests/gpu/exchange/nodes.h"
#include "tests/gpu/exchange/test.h"

struct test_case {
    uint32_t n_nodes, n_ranks, max_tokens, top_k, n_experts, hidden, alignment;
    enum pattern pattern;
    enum epd_dtype dtype;
    int uneven;    /* odd ranks have no tokens */
    int64_t spare; /* capacity beyond the need of the fullest rank; negative: overflow */
};

static const struct test_case cases[] = {
    {2, 2, 1, 1, 4, 8, 1, UNIFORM, EPD_BF16, 0, 0},
    {2, 2, 33, 3, 6, 8, 16, SOME_NONE, EPD_F16, 0, 5},
    {2, 4, 31, 2, 8, 136, 16, UNIFORM, EPD_BF16, 0, 2},
    {2, 4, 31, 2, 8, 136, 16, HOSTILE, EPD_BF16, 0, 2},
    {2, 4, 127, 8, 256, 7168, 16, UNIFORM, EPD_BF16, 0, 64},
    {2, 4, 127, 8, 256, 7168, 128, UNIFORM, EPD_BF16, 1, 1000},
    {2, 4, 127, 1, 4, 136, 128, ALL_TO_ONE, EPD_BF16, 0, 0},
    {2, 4, 127, 3, 12, 136, 16, NONE, EPD_BF16, 0, 16},
    {2, 4, 1300, 6, 32, 136, 16, UNIFORM, EPD_BF16, 0, -1},
    {2, 4, 1300, 8, 128, 136, 128, UNIFORM, EPD_F16, 0, -700},
    {2, 4, 2100, 2, 8, 2880, 128, UNIFORM, EPD_F32, 0, 0},
    {2, 4, 0, 2, 8, 136, 16, UNIFORM, EPD_BF16, 0, 3},
    {2, 6, 600, 8, 48, 2048, 1, SOME_NONE, EPD_BF16, 0, 0},
    {2, 8, 1100, 8, 64, 1024, 16, UNIFORM, EPD_BF16, 0, 7},
    {4, 4, 127, 8, 64, 136, 16, UNIFORM, EPD_BF16, 0, 1},
    {4, 4, 1300, 4, 4096, 136, 1, HOSTILE, EPD_F16, 0, -1},
    {4, 8, 257, 8, 256, 2880, 128, UNIFORM, EPD_BF16, 1, 0},
    {4, 8, 33, 32, 2048, 136, 1, UNIFORM, EPD_BF16, 0, 9},
    {3, 3, 1000, 7, 27, 8, 1, SOME_NONE, EPD_F32, 0, 0},
};

/* What a slot's scalar is: its rank and row. */
static float value_of(uint32_t rank, int32_t row)
{
    return (float)(rank + 1) + (float)row / 1048576.0f;
}

static void upload_inputs(struct nodes *nodes, const struct rank_input *input)
{
    const struct problem *p = &nodes->problem;
    float *value = malloc((size_t)p->capacity_rows * 4 + 4);
    for (uint32_t rank = 0; rank < p->n_ranks; rank++) {
        const struct node_rank *m = &nodes->ranks[rank];
        const struct input_places places = {m->topk_idx, m->topk_weights, m->x, m->dout, m->y};
        for (int32_t row = 0; row < p->capacity_rows; row++)
            value[row] = value_of(rank, row);
        upload_input(p, &input[rank], &places);
        upload(m->value, value, (size_t)p->capacity_rows * 4);
    }
    free(value);
}

/* Of every rank, what this node can know: its own routing, and the counts of its ranks and of their rails. */
static int check_counts(const struct nodes *nodes, const struct rank_expected *expected, uint32_t rank)
{
    const struct problem *p = &nodes->problem;
    return same("counts", rank, nodes->ranks[rank].routing.counts, expected[rank].counts,
                (size_t)p->n_ranks * p->n_experts * 4);
}

/* Tokens of `from` that have an expert on `to`. */
static int32_t tokens_for(const struct problem *p, const struct rank_expected *expected, uint32_t from,
                          uint32_t to)
{
    int32_t n = 0;
    for (uint32_t token = 0; token < p->n_tokens[from]; token++) {
        int goes = 0;
        for (uint32_t k = 0; k < p->top_k; k++) {
            int32_t expert = expected[from].expert[(size_t)token * p->top_k + k];
            goes |= expert >= 0 && (uint32_t)expert / (p->n_experts / p->n_ranks) == to;
        }
        n += goes;
    }
    return n;
}

/* What the ranks of this one's rail have for each rank: all that it has itself, of the others what is for this node. */
static int check_sent(const struct nodes *nodes, const struct rank_expected *expected, uint32_t rank)
{
    const struct problem *p = &nodes->problem;
    uint32_t n_here = p->n_ranks / nodes->n_nodes, here = rank / n_here;
    int32_t got[CLUSTER_MAX_RANKS * CLUSTER_MAX_RANKS];
    download(got, nodes->ranks[rank].slots.sent, (size_t)nodes->n_nodes * p->n_ranks * 4);
    int failed = 0;
    for (uint32_t node = 0; node < nodes->n_nodes; node++)
        for (uint32_t to = 0; to < p->n_ranks; to++) {
            uint32_t from = node * n_here + rank % n_here;
            int32_t is = got[node * p->n_ranks + to];
            if (node != here && to / n_here != here)
                continue;
            int32_t want = tokens_for(p, expected, from, to);
            if (is != want)
                failed += printf("  FAIL sent rank %u to %u: got %d, want %d\n", from, to, is, want) > 0;
        }
    return failed;
}

static int check_routing(const struct nodes *nodes, const struct rank_expected *expected)
{
    const struct problem *p = &nodes->problem;
    size_t n_local = p->n_experts / p->n_ranks;
    int failed = 0;
    for (uint32_t rank = 0; rank < p->n_ranks; rank++) {
        const struct node_rank *m = &nodes->ranks[rank];
        const struct rank_expected *want = &expected[rank];
        failed +=
            same("expert", rank, m->routing.expert, want->expert, (size_t)p->n_tokens[rank] * p->top_k * 4);
        failed += same("m_splits", rank, m->routing.m_splits, want->m_splits, n_local * 8);
        failed += same("offsets", rank, m->routing.offsets, want->offsets, (n_local + 1) * 8);
        failed += same("splits_out", rank, m->splits, want->m_splits, n_local * 8);
        failed += same("offsets_out", rank, m->offsets, want->offsets, (n_local + 1) * 8);
        failed += same("needed_rows", rank, m->routing.needed_rows, &want->needed_rows, 8);
        failed += same("dropped_rows", rank, m->routing.dropped_rows, &want->dropped_rows, 8);
        failed += same("error", rank, m->error, &want->error, sizeof want->error);
        failed += check_counts(nodes, expected, rank) + check_sent(nodes, expected, rank);
    }
    return failed;
}

/* What rows there are: x as it is, or dout scaled or not. */
enum rows { ROWS_X, ROWS_DOUT, ROWS_SCALED, N_ROWS };

/* What a case must give; made once. */
struct wanted {
    unsigned char *rows[N_ROWS][CLUSTER_MAX_RANKS]; /* [C, H] padding zero, the tail as it was */
    float *weights[CLUSTER_MAX_RANKS];              /* [C] likewise */
    unsigned char *out[2][CLUSTER_MAX_RANKS];       /* [max_tokens, H] unweighted, weighted */
    float *d_weights[CLUSTER_MAX_RANKS];            /* of the first repeat, NULL before it */
};

static void expect_row(const struct problem *p, const struct rank_input *from, enum rows rows, size_t slot,
                       void *want)
{
    const void *data = rows == ROWS_X ? from->x : from->dout;
    for (uint32_t h = 0; h < p->hidden; h++) {
        float value = element_get(data, slot / p->top_k * p->hidden + h, p->dtype);
        element_set(want, h, p->dtype, rows == ROWS_SCALED ? from->topk_weights[slot] * value : value);
    }
}

static void want_rows(const struct problem *p, const struct rank_input *input,
                      const struct rank_expected *expected, uint32_t rank, struct wanted *wanted)
{
    size_t row_bytes = p->hidden * dtype_bytes(p->dtype), rows = (size_t)p->capacity_rows;
    size_t slots = (size_t)p->max_tokens * p->top_k, n_local = p->n_experts / p->n_ranks;
    wanted->weights[rank] = malloc(rows * 4 + 4);
    memset(wanted->weights[rank], 0xff, rows * 4);
    for (int which = 0; which < N_ROWS; which++) {
        unsigned char *want = wanted->rows[which][rank] = malloc(rows * row_bytes + 1);
        memset(want, 0xff, rows * row_bytes);
        for (size_t row = 0; row < (size_t)expected[rank].offsets[n_local]; row++) {
            int32_t source = expected[rank].source[row];
            memset(want + row * row_bytes, 0, row_bytes);
            wanted->weights[rank][row] = 0.0f;
            if (source < 0)
                continue;
            const struct rank_input *from = &input[(size_t)source / slots];
            wanted->weights[rank][row] = from->topk_weights[(size_t)source % slots];
            expect_row(p, from, (enum rows)which, (size_t)source % slots, want + row * row_bytes);
        }
    }
}

static int check_rows(const struct nodes *nodes, const struct wanted *wanted, enum rows which)
{
    const struct problem *p = &nodes->problem;
    size_t row_bytes = p->hidden * dtype_bytes(p->dtype), rows = (size_t)p->capacity_rows;
    int failed = 0;
    for (uint32_t rank = 0; rank < p->n_ranks; rank++) {
        const struct node_rank *m = &nodes->ranks[rank];
        failed += same(which == ROWS_X ? "recv_x" : "dy", rank, which == ROWS_X ? m->recv_x : m->dy,
                       wanted->rows[which][rank], rows * row_bytes);
        if (which == ROWS_X)
            failed += same("recv_weights", rank, m->recv_weights, wanted->weights[rank], rows * 4);
    }
    return failed;
}

/* The same sum in float64, which knows no order: within the roundings of the dtype. */
static int check_close(const struct problem *p, const struct rank_input *input,
                       const struct rank_expected *expected, uint32_t rank, uint32_t token, int weighted,
                       const void *out)
{
    double unit = p->dtype == EPD_BF16 ? 1.0 / 128 : p->dtype == EPD_F16 ? 1.0 / 1024 : 1.0 / 1048576;
    for (uint32_t h = 0; h < p->hidden; h += 5) {
        double want = 0.0, size = 0.0;
        for (uint32_t k = 0; k < p->top_k; k++) {
            size_t i = (size_t)token * p->top_k + k;
            int32_t row = expected[rank].row[i];
            if (row < 0)
                continue;
            uint32_t at = (uint32_t)expected[rank].expert[i] / (p->n_experts / p->n_ranks);
            double term = element_get(input[at].y, (size_t)row * p->hidden + h, p->dtype);
            term *= weighted ? (double)input[rank].topk_weights[i] : 1.0;
            want += term;
            size += fabs(term);
        }
        double got = element_get(out, h, p->dtype);
        if (!(fabs(got - want) <= 2.0 * unit * size + 1e-30))
            return printf("  FAIL out rank %u token %u [%u]: got %g, want %g\n", rank, token, h, got, want),
                   1;
    }
    return 0;
}

/* Returns the count of sums that are not within what the roundings allow. */
static int want_out(const struct problem *p, const struct rank_input *input,
                    const struct rank_expected *expected, uint32_t n_nodes, uint32_t rank,
                    struct wanted *wanted)
{
    size_t row_bytes = p->hidden * dtype_bytes(p->dtype);
    int failed = 0;
    for (int weighted = 0; weighted < 2; weighted++) {
        unsigned char *want = wanted->out[weighted][rank] = malloc(p->max_tokens * row_bytes + 1);
        memset(want, 0xff, p->max_tokens * row_bytes);
        for (uint32_t token = 0; token < p->n_tokens[rank]; token++)
            reference_hop_row(p, input, expected, n_nodes, rank, token, weighted, want + token * row_bytes);
        for (uint32_t token = 0; token < p->n_tokens[rank] && !failed; token += 3)
            failed += check_close(p, input, expected, rank, token, weighted, want + token * row_bytes);
    }
    return failed;
}

static int check_out(const struct nodes *nodes, const struct wanted *wanted, int weighted)
{
    const struct problem *p = &nodes->problem;
    int failed = 0;
    for (uint32_t rank = 0; rank < p->n_ranks; rank++)
        failed += same(weighted ? "out" : "out unweighted", rank, nodes->ranks[rank].out,
                       wanted->out[weighted][rank], p->max_tokens * p->hidden * dtype_bytes(p->dtype));
    return failed;
}

static int check_gathered(const struct nodes *nodes, const struct rank_expected *expected)
{
    const struct problem *p = &nodes->problem;
    int failed = 0;
    for (uint32_t rank = 0; rank < p->n_ranks; rank++) {
        size_t n = (size_t)p->n_tokens[rank] * p->top_k;
        float *want = malloc(n * 4 + 4);
        for (size_t i = 0; i < n; i++) {
            int32_t row = expected[rank].row[i];
            want[i] = row < 0
                          ? 0.0f
                          : value_of((uint32_t)expected[rank].expert[i] / (p->n_experts / p->n_ranks), row);
        }
        failed += same("scalars", rank, nodes->ranks[rank].d_weights, want, n * 4);
        free(want);
    }
    return failed;
}

/* The first ones must be right, the others the same. */
static int check_d_weights(const struct nodes *nodes, const struct rank_input *input,
                           const struct rank_expected *expected, struct wanted *wanted)
{
    const struct problem *p = &nodes->problem;
    int failed = 0;
    for (uint32_t rank = 0; rank < p->n_ranks; rank++) {
        size_t bytes = (size_t)p->n_tokens[rank] * p->top_k * 4;
        if (wanted->d_weights[rank]) {
            failed += same("d_weights", rank, nodes->ranks[rank].d_weights, wanted->d_weights[rank], bytes);
            continue;
        }
        wanted->d_weights[rank] = malloc(bytes + 4);
        download(wanted->d_weights[rank], nodes->ranks[rank].d_weights, bytes);
        failed += check_dots(p, input, expected, rank, wanted->d_weights[rank], 1);
    }
    return failed;
}

/* One way through all ops, forward and back. */
static int run_ops(struct nodes *nodes, const struct rank_input *input, const struct rank_expected *expected,
                   struct wanted *wanted)
{
    static const struct nodes_op forward = {.op = EXCHANGE_ROUTE_DISPATCH, .weights = 1},
                                 combines[] = {{.op = EXCHANGE_COMBINE, .weights = 1, .weights_kept = 1},
                                               {.op = EXCHANGE_COMBINE, .weights = 1},
                                               {.op = EXCHANGE_COMBINE}},
                                 plain = {.op = EXCHANGE_DISPATCH, .bwd = 1},
                                 scaled = {.op = EXCHANGE_DISPATCH, .bwd = 1, .weights = 1, .scaled = 1},
                                 gather = {.op = EXCHANGE_GATHER_SCALARS},
                                 dots = {.op = EXCHANGE_WEIGHT_GRAD, .bwd = 1, .no_rows = 1},
                                 both = {.op = EXCHANGE_WEIGHT_GRAD, .bwd = 1, .weights = 1, .scaled = 1};
    nodes_poison(nodes);
    nodes_run(nodes, &forward, 1);
    int failed = check_routing(nodes, expected) + check_rows(nodes, wanted, ROWS_X);
    if (failed)
        return failed;
    for (int i = 0; i < 3; i++) {
        nodes_poison(nodes);
        nodes_run(nodes, &combines[i], 1);
        failed += check_out(nodes, wanted, i < 2);
    }
    nodes_poison(nodes);
    nodes_run(nodes, &plain, 1);
    failed += check_rows(nodes, wanted, ROWS_DOUT);
    nodes_poison(nodes);
    nodes_run(nodes, &scaled, 1);
    failed += check_rows(nodes, wanted, ROWS_SCALED);
    nodes_poison(nodes);
    nodes_run(nodes, &gather, 1);
    failed += check_gathered(nodes, expected);
    nodes_poison(nodes);
    nodes_run(nodes, &dots, 1);
    failed += check_d_weights(nodes, input, expected, wanted);
    nodes_poison(nodes);
    nodes_run(nodes, &both, 1);
    return failed + check_d_weights(nodes, input, expected, wanted) + check_rows(nodes, wanted, ROWS_SCALED);
}

/* Frames that are none, and experts that are none: recorded, within bounds, and the next step is well. */
static int run_broken(struct nodes *nodes, const struct rank_input *input,
                      const struct rank_expected *expected, struct wanted *wanted)
{
    static const struct nodes_op ops[] = {{.op = EXCHANGE_ROUTE_DISPATCH, .weights = 1},
                                          {.op = EXCHANGE_COMBINE, .weights = 1},
                                          {.op = EXCHANGE_DISPATCH, .bwd = 1, .weights = 1, .scaled = 1},
                                          {.op = EXCHANGE_WEIGHT_GRAD, .bwd = 1, .weights = 1},
                                          {.op = EXCHANGE_GATHER_SCALARS}};
    int failed = 0;
    for (enum rail_mode mode = RAIL_VOID; mode <= RAIL_LIES; mode++) {
        nodes_poison(nodes);
        nodes->rail_mode = mode;
        nodes_run(nodes, &ops[0], 1);
        for (uint32_t rank = 0; rank < nodes->problem.n_ranks; rank++) {
            struct kernel_error error;
            download(&error, nodes->ranks[rank].error, sizeof error);
            if (mode == RAIL_VOID && error.status != EPD_PROTOCOL && expected[rank].error.status == 0)
                failed += printf("  FAIL rank %u took a void frame: status %u\n", rank, error.status) > 0;
        }
        for (size_t i = 1; i < sizeof ops / sizeof ops[0]; i++)
            nodes_run(nodes, &ops[i], 1);
        nodes->rail_mode = RAIL_TRUE;
        failed += run_ops(nodes, input, expected, wanted);
    }
    return failed;
}

static void wanted_free(struct wanted *wanted)
{
    for (uint32_t rank = 0; rank < CLUSTER_MAX_RANKS; rank++) {
        for (int which = 0; which < N_ROWS; which++)
            free(wanted->rows[which][rank]);
        free(wanted->weights[rank]);
        free(wanted->out[0][rank]);
        free(wanted->out[1][rank]);
        free(wanted->d_weights[rank]);
    }
}

static int run_case(const struct test_case *c, int n_repeats)
{
    struct problem p = {.n_ranks = c->n_ranks,
                        .top_k = c->top_k,
                        .n_experts = c->n_experts,
                        .hidden = c->hidden,
                        .alignment = c->alignment,
                        .max_tokens = c->max_tokens,
                        .dtype = c->dtype,
                        .idx_dtype = c->max_tokens % 2 ? EPD_I64 : EPD_I32};
    static const uint32_t max_blocks[] = {0, 1, 0, 3, 0};
    struct rank_input input[CLUSTER_MAX_RANKS];
    struct rank_expected expected[CLUSTER_MAX_RANKS];
    struct wanted wanted = {.weights = {NULL}};
    static struct nodes nodes;
    inputs_make(&p, c->pattern, c->uneven, input);
    p.capacity_rows = inputs_needed_rows(&p, input) + c->spare;
    reference_route(&p, input, expected);
    inputs_make_y(&p, input);
    int failed = 0;
    for (uint32_t rank = 0; rank < p.n_ranks; rank++) {
        want_rows(&p, input, expected, rank, &wanted);
        failed += want_out(&p, input, expected, c->n_nodes, rank, &wanted);
    }
    nodes_open(&nodes, &p, c->n_nodes);
    upload_inputs(&nodes, input);
    for (int i = 0; i < n_repeats; i++) {
        nodes.max_blocks = max_blocks[i];
        nodes.eager = i == 2 || i == 3;
        int way_failed = run_ops(&nodes, input, expected, &wanted);
        if (way_failed)
            printf("  repeat %d, blocks %u%s\n", i, max_blocks[i], nodes.eager ? ", eager" : "");
        failed += way_failed;
    }
    nodes.eager = 0;
    if (c->max_tokens < 300)
        failed += run_broken(&nodes, input, expected, &wanted);
    nodes_close(&nodes);
    reference_free(&p, expected);
    inputs_free(&p, input);
    wanted_free(&wanted);
    return failed;
}

static int test(int few)
{
    int failed = 0;
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        const struct test_case *c = &cases[i];
        if (few && (size_t)c->max_tokens * c->hidden > 5000)
            continue;
        int case_failed = run_case(c, few ? 1 : 5);
        printf("%s nodes=%u R=%u T=%u K=%u E=%u H=%u align=%u %s %s spare=%ld\n",
               case_failed ? "FAIL" : "ok  ", c->n_nodes, c->n_ranks, c->max_tokens, c->top_k, c->n_experts,
               c->hidden, c->alignment, pattern_names[c->pattern], dtype_name(c->dtype), (long)c->spare);
        fflush(stdout);
        failed += case_failed;
    }
    printf("%s: %d devices, %d failures\n", failed ? "FAILED" : "PASSED", device_count(), failed);
    return failed;
}

int main(int argc, char **argv)
{
    setenv("CUDA_MODULE_LOADING", "EAGER", 1);
    if (device_count() == 0) {
        printf("SKIP: no GPU\n");
        return 77;
    }
    devices_start();
    if (argc > 1 && strcmp(argv[1], "bench") == 0) {
        bench_hop();
        return 0;
    }
    return test(argc > 1 && strcmp(argv[1], "few") == 0) != 0;
}
