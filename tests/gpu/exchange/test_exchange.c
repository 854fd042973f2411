/* Every kernel of the exchange against the reference, over a table of cases; results are poisoned first,
 * repeated five times in all ways of launching, and must be the same bits each time. */
#include <string.h>

#include "tests/gpu/exchange/compare.h"
#include "tests/gpu/exchange/test.h"

struct test_case {
    uint32_t n_ranks, max_tokens, top_k, n_experts, hidden, alignment;
    enum pattern pattern;
    enum epd_dtype dtype;
    int uneven;    /* odd ranks have no tokens */
    int64_t spare; /* capacity beyond the need of the fullest rank; negative: overflow */
};

static const struct test_case cases[] = {
    {1, 31, 2, 8, 136, 16, UNIFORM, EPD_BF16, 0, 0},
    {1, 1000, 8, 64, 136, 128, UNIFORM, EPD_BF16, 0, 7},
    {2, 0, 2, 8, 136, 16, UNIFORM, EPD_BF16, 0, 3},
    {2, 1, 1, 4, 8, 1, UNIFORM, EPD_BF16, 0, 0},
    {2, 33, 3, 6, 8, 16, SOME_NONE, EPD_F16, 0, 5},
    {2, 127, 8, 16, 2880, 128, UNIFORM, EPD_BF16, 1, 1},
    {4, 1, 8, 32, 136, 1, UNIFORM, EPD_BF16, 0, 0},
    {4, 31, 1, 8, 8, 1, UNIFORM, EPD_BF16, 0, 0},
    {4, 31, 2, 8, 136, 16, HOSTILE, EPD_BF16, 0, 2},
    {4, 33, 4, 64, 136, 128, UNIFORM, EPD_F16, 0, 0},
    {4, 33, 8, 256, 7168, 16, SOME_NONE, EPD_BF16, 0, 64},
    {4, 127, 8, 256, 7168, 1, UNIFORM, EPD_BF16, 0, 0},
    {4, 127, 8, 256, 7168, 128, UNIFORM, EPD_BF16, 1, 1000},
    {4, 127, 5, 20, 2880, 16, HOSTILE, EPD_F16, 0, 1},
    {4, 127, 1, 4, 136, 128, ALL_TO_ONE, EPD_BF16, 0, 0},
    {4, 127, 3, 12, 136, 16, NONE, EPD_BF16, 0, 16},
    {4, 1000, 6, 32, 136, 16, UNIFORM, EPD_BF16, 0, -1},
    {4, 1000, 8, 128, 136, 128, UNIFORM, EPD_BF16, 0, -700},
    {4, 1000, 7, 28, 8, 1, HOSTILE, EPD_BF16, 0, -1},
    {4, 1000, 1, 4, 136, 1, ALL_TO_ONE, EPD_F16, 0, -1},
    {4, 1000, 2, 8, 2880, 128, UNIFORM, EPD_F32, 0, 0},
    {4, 127, 8, 64, 7168, 16, SOME_NONE, EPD_F32, 0, 0},
    {4, 33, 32, 2048, 136, 1, UNIFORM, EPD_BF16, 0, 9},
    {4, 1000, 8, 4096, 8, 1, UNIFORM, EPD_BF16, 0, 0},
    {4, 1000, 12, 64, 2048, 16, SOME_NONE, EPD_BF16, 0, 5},
    {4, 600, 8, 32, 4096, 1, UNIFORM, EPD_F16, 1, 0},
};

static void upload_inputs(struct cluster *cluster, const struct rank_input *input)
{
    for (uint32_t rank = 0; rank < cluster->problem.n_ranks; rank++) {
        const struct rank_memory *m = &cluster->ranks[rank];
        const struct input_places places = {m->topk_idx, m->topk_weights, m->x, m->dout, m->y};
        upload_input(&cluster->problem, &input[rank], &places);
    }
}

static void poison(struct cluster *cluster)
{
    const struct problem *p = &cluster->problem;
    size_t row_bytes = p->hidden * dtype_bytes(p->dtype), rows = (size_t)p->capacity_rows;
    for (uint32_t rank = 0; rank < p->n_ranks; rank++) {
        struct rank_memory *m = &cluster->ranks[rank];
        MUST(cudaSetDevice(m->device));
        MUST(cudaMemset(m->recv_x, 0xff, rows * row_bytes));
        MUST(cudaMemset(m->dy, 0xff, rows * row_bytes));
        MUST(cudaMemset(m->out, 0xff, p->max_tokens * row_bytes));
        MUST(cudaMemset(m->recv_weights, 0xff, rows * 4));
        MUST(cudaMemset(m->routing.base.source, 0xff, rows * 4));
        MUST(cudaMemset(m->d_weights, 0xff, (size_t)p->max_tokens * p->top_k * 4));
        MUST(cudaMemset(m->error, 0, sizeof(*m->error)));
        MUST(cudaDeviceSynchronize());
    }
}

static int check_routing(struct cluster *cluster, const struct rank_expected *expected)
{
    const struct problem *p = &cluster->problem;
    size_t n_local = p->n_experts / p->n_ranks;
    int failed = 0;
    for (uint32_t rank = 0; rank < p->n_ranks; rank++) {
        const struct routing *r = &cluster->ranks[rank].routing.base;
        const struct rank_expected *want = &expected[rank];
        size_t slots = (size_t)p->n_tokens[rank] * p->top_k;
        failed += same("expert", rank, r->expert, want->expert, slots * 4);
        failed += same("row", rank, r->row, want->row, slots * 4);
        failed += same("counts", rank, r->counts, want->counts, (size_t)p->n_ranks * p->n_experts * 4);
        failed += same("m_splits", rank, r->m_splits, want->m_splits, n_local * 8);
        failed += same("offsets", rank, r->offsets, want->offsets, (n_local + 1) * 8);
        failed += same("needed_rows", rank, r->needed_rows, &want->needed_rows, 8);
        failed += same("dropped_rows", rank, r->dropped_rows, &want->dropped_rows, 8);
        failed += same("source", rank, r->source, want->source, (size_t)want->offsets[n_local] * 4);
        failed += same("error", rank, cluster->ranks[rank].error, &want->error, sizeof(want->error));
    }
    return failed;
}

/* Received rows: scaled or not, padding zero, the tail untouched. */
static int check_rows(struct cluster *cluster, const struct rank_input *input,
                      const struct rank_expected *expected, int bwd)
{
    const struct problem *p = &cluster->problem;
    size_t row_bytes = p->hidden * dtype_bytes(p->dtype), rows = (size_t)p->capacity_rows;
    size_t slots = (size_t)p->max_tokens * p->top_k, n_local = p->n_experts / p->n_ranks;
    unsigned char *want = malloc(rows * row_bytes + 1);
    float *weights = malloc(rows * 4 + 4);
    int failed = 0;
    for (uint32_t rank = 0; rank < p->n_ranks; rank++) {
        memset(want, 0xff, rows * row_bytes);
        memset(weights, 0xff, rows * 4);
        for (size_t row = 0; row < (size_t)expected[rank].offsets[n_local]; row++) {
            int32_t source = expected[rank].source[row];
            memset(want + row * row_bytes, 0, row_bytes);
            weights[row] = 0.0f;
            if (source < 0)
                continue;
            size_t from = (size_t)source / slots, i = (size_t)source % slots, token = i / p->top_k;
            weights[row] = input[from].topk_weights[i];
            for (uint32_t h = 0; h < p->hidden; h++) {
                size_t e = token * p->hidden + h;
                float value = bwd ? weights[row] * element_get(input[from].dout, e, p->dtype)
                                  : element_get(input[from].x, e, p->dtype);
                element_set(want + row * row_bytes, h, p->dtype, value);
            }
        }
        struct rank_memory *m = &cluster->ranks[rank];
        failed += same(bwd ? "dy" : "recv_x", rank, bwd ? m->dy : m->recv_x, want, rows * row_bytes);
        if (!bwd)
            failed += same("recv_weights", rank, m->recv_weights, weights, rows * 4);
    }
    free(want);
    free(weights);
    return failed;
}

static int check_out(struct cluster *cluster, const struct rank_input *input,
                     const struct rank_expected *expected, int weighted)
{
    const struct problem *p = &cluster->problem;
    size_t row_bytes = p->hidden * dtype_bytes(p->dtype);
    unsigned char *want = malloc(p->max_tokens * row_bytes + 1);
    int failed = 0;
    for (uint32_t rank = 0; rank < p->n_ranks; rank++) {
        memset(want, 0xff, p->max_tokens * row_bytes);
        for (uint32_t token = 0; token < p->n_tokens[rank]; token++)
            reference_combine_row(p, input, expected, rank, token, weighted, want + token * row_bytes);
        failed += same(weighted ? "out" : "out unweighted", rank, cluster->ranks[rank].out, want,
                       p->max_tokens * row_bytes);
    }
    free(want);
    return failed;
}

/* times: how often it was accumulated. */
static int check_d_weights(struct cluster *cluster, const struct rank_input *input,
                           const struct rank_expected *expected, int times)
{
    const struct problem *p = &cluster->problem;
    int failed = 0;
    for (uint32_t rank = 0; rank < p->n_ranks && !failed; rank++) {
        size_t n = (size_t)p->n_tokens[rank] * p->top_k;
        float *got = malloc(n * 4 + 4);
        download(got, cluster->ranks[rank].d_weights, n * 4);
        failed = check_dots(p, input, expected, rank, got, times);
        free(got);
    }
    return failed;
}

/* One way through all ops. */
static int run_ops(struct cluster *cluster, const struct rank_input *input,
                   const struct rank_expected *expected, int fused)
{
    const struct op_dispatch forward = {.route = 1, .weights = 1},
                             backward = {.scaled = 1, .dot = 1, .bwd = 1},
                             again = {.scaled = 1, .dot = 1, .bwd = 1, .weights = 1},
                             dots = {.dot = 1, .bwd = 1, .no_rows = 1};
    const struct op_combine saved = {.saved_weights = 1}, given = {.weights = 1}, plain = {0};
    const struct op_gather first = {0}, more = {.accumulate = 1};
    int failed = 0;
    poison(cluster);
    if (!cluster_run(cluster, launch_dispatch, &forward, fused))
        return printf("  FAIL dispatch did not end\n"), 1;
    failed += check_routing(cluster, expected);
    failed += check_rows(cluster, input, expected, 0);
    if (failed)
        return failed;
    const struct op_combine *combines[] = {&saved, &given, &plain};
    for (int i = 0; i < 3; i++) {
        poison(cluster);
        if (!cluster_run(cluster, launch_combine, combines[i], fused))
            return printf("  FAIL combine %d did not end\n", i), 1;
        failed += check_out(cluster, input, expected, i < 2);
    }
    const struct op_dispatch *dispatches[] = {&backward, &again, &dots};
    for (int i = 0; i < 3; i++) {
        poison(cluster);
        /* poison() clears base.source, which route = 0 leaves alone and gather_scalars needs. */
        for (uint32_t rank = 0; rank < cluster->problem.n_ranks; rank++)
            upload(cluster->ranks[rank].routing.base.source, expected[rank].source,
                   (size_t)cluster->problem.capacity_rows * 4);
        if (!cluster_run(cluster, launch_dispatch, dispatches[i], fused))
            return printf("  FAIL backward dispatch %d did not end\n", i), 1;
        failed += i < 2 ? check_rows(cluster, input, expected, 1) : 0;
        if (!cluster_run(cluster, launch_gather, &first, fused) ||
            (i == 1 && !cluster_run(cluster, launch_gather, &more, fused)))
            return printf("  FAIL gather_scalars did not end\n"), 1;
        failed += check_d_weights(cluster, input, expected, i == 1 ? 2 : 1);
    }
    return failed;
}

static int run_case(const struct test_case *c, int fused)
{
    struct problem p = {.n_ranks = c->n_ranks,
                        .top_k = c->top_k,
                        .n_experts = c->n_experts,
                        .hidden = c->hidden,
                        .alignment = c->alignment,
                        .max_tokens = c->max_tokens,
                        .dtype = c->dtype,
                        .idx_dtype = c->max_tokens % 2 ? EPD_I64 : EPD_I32};
    struct rank_input input[CLUSTER_MAX_RANKS];
    struct rank_expected expected[CLUSTER_MAX_RANKS];
    static struct cluster cluster;
    inputs_make(&p, c->pattern, c->uneven, input);
    p.capacity_rows = inputs_needed_rows(&p, input) + c->spare;
    reference_route(&p, input, expected);
    inputs_make_y(&p, input);
    cluster_open(&cluster, &p);
    upload_inputs(&cluster, input);
    /* Five repeats in different ways; each is held against the same bits. */
    const struct {
        int fused;
        uint32_t max_blocks, send_blocks;
    } ways[] = {{0, 0, 0}, {1, 8, 0}, {0, 1, 0}, {1, 2, 0}, {1, 1, 0}};
    int failed = 0, n_devices = device_count();
    for (size_t i = 0; i < sizeof(ways) / sizeof(ways[0]); i++) {
        if (ways[i].fused && !fused)
            continue;
        cluster.max_blocks = ways[i].max_blocks;
        if (ways[i].max_blocks == 8 && n_devices >= (int)p.n_ranks)
            cluster.max_blocks = 0;
        int way_failed = run_ops(&cluster, input, expected, ways[i].fused);
        if (way_failed)
            printf("  way: fused %d, blocks %u\n", ways[i].fused, cluster.max_blocks);
        failed += way_failed;
    }
    cluster_close(&cluster);
    reference_free(&p, expected);
    inputs_free(&p, input);
    return failed;
}

int test_exchange(int fused, int small)
{
    int failed = 0, n = 0;
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        const struct test_case *c = &cases[i];
        if (small && ((size_t)c->max_tokens * c->hidden > 40000 || (small > 1 && i % 3 != 2)))
            continue;
        int case_failed = run_case(c, fused);
        printf("%s R=%u T=%u K=%u E=%u H=%u align=%u %s %s spare=%ld\n", case_failed ? "FAIL" : "ok  ",
               c->n_ranks, c->max_tokens, c->top_k, c->n_experts, c->hidden, c->alignment,
               pattern_names[c->pattern], dtype_name(c->dtype), (long)c->spare);
        fflush(stdout);
        failed += case_failed;
        n++;
    }
    printf("exchange: %d cases, %d failures\n", n, failed);
    return failed;
}

/* A rank that never comes: the others wait, the abort word frees them, and after a reset the group works. */
int test_abort(void)
{
    const struct problem p = {.n_ranks = 4,
                              .top_k = 2,
                              .n_experts = 8,
                              .hidden = 136,
                              .alignment = 16,
                              .max_tokens = 33,
                              .n_tokens = {33, 33, 33, 33},
                              .capacity_rows = 512,
                              .dtype = EPD_BF16,
                              .idx_dtype = EPD_I32};
    static struct cluster cluster;
    const struct op_dispatch forward = {.route = 1, .weights = 1};
    struct epd_error error;
    cluster_open(&cluster, &p);
    for (uint32_t rank = 0; rank < p.n_ranks; rank++) {
        int32_t idx[33 * 2];
        for (int i = 0; i < 66; i++)
            idx[i] = i % 8;
        upload(cluster.ranks[rank].topk_idx, idx, sizeof(idx));
    }
    cluster.max_blocks = 8;
    for (uint32_t rank = 0; rank < 3; rank++) {
        MUST(cudaSetDevice(cluster.ranks[rank].device));
        if (launch_dispatch(&cluster, rank, CUDA_STAGE_ALL, &forward, &error) != EPD_OK)
            return printf("FAIL abort: %s\n", error.text), 1;
    }
    int ended = cluster_wait(&cluster, 0.05);
    int works = cluster_run(&cluster, launch_dispatch, &forward, 1);
    cluster_close(&cluster);
    printf("%s abort frees the ranks that wait, a reset makes them work again\n",
           !ended && works ? "ok  " : "FAIL");
    return !(!ended && works);
}
