/* Local ops: grouped GEMMs and activations through plans, against the reference. */
#include <stdlib.h>
#include <string.h>

#include "tests/reference/op_cases.h"
#include "tests/unit/ep/harness.h"

#define COUNT(array) (sizeof(array) / sizeof *(array))

/* The group only gives the device: local ops bring their own sizes. */
static const struct message_group_config config = {
    .n_experts = 4,
    .top_k = 1,
    .hidden = 8,
    .ffn = 8,
    .max_tokens = 8,
    .alignment = 1,
    .dtype = EPD_BF16,
    .overflow = EPD_OVERFLOW_ERROR,
};

#define CLIENT_BYTES (512u << 20)
#define MAX_GROUPS   64

/* A gemm case with its tensors. */
struct gemm {
    struct gemm_case c;
    int64_t rows;
    int64_t m_splits[MAX_GROUPS], offsets[MAX_GROUPS + 1];
    struct slab splits, slab_offsets, a, b, out, bias;
};

static struct slab take_random(struct client *client, enum epd_dtype dtype, uint32_t n_dims, int64_t d0,
                               int64_t d1, int64_t d2, uint64_t *seed)
{
    struct slab slab = client_take(client, dtype, n_dims, d0, d1, d2);
    values_fill(dtype, slab.data, slab.bytes / dtype_bytes(dtype), -1.0, 1.0, seed);
    return slab;
}

static void gemm_init(struct gemm *gemm, struct client *client, const struct gemm_case *c, uint64_t seed)
{
    *gemm = (struct gemm){.c = *c};
    int64_t groups = c->n_groups, n = c->n, k = c->k;
    gemm->rows = gemm_case_rows(c, gemm->m_splits, gemm->offsets);
    /* More rows than the slabs need: the tail stays as it is. */
    int64_t max_rows = gemm->rows + 5;
    gemm->splits = client_put(client, EPD_I64, 1, groups, 0, 0, gemm->m_splits);
    gemm->slab_offsets = client_put(client, EPD_I64, 1, groups + 1, 0, 0, gemm->offsets);
    int a_columns_n = c->layout != EPD_GEMM_TN;
    gemm->a = take_random(client, c->dtype, 2, max_rows, a_columns_n ? n : k, 0, &seed);
    if (c->layout == EPD_GEMM_NT)
        gemm->b = take_random(client, c->dtype, 2, max_rows, k, 0, &seed);
    else
        gemm->b = take_random(client, c->dtype, 3, groups, n, k, &seed);
    if (c->layout != EPD_GEMM_NT)
        gemm->out = client_take(client, c->dtype_c, 2, max_rows, c->layout == EPD_GEMM_TN ? n : k, 0);
    else if (c->accumulate)
        gemm->out = take_random(client, c->dtype_c, 3, groups, n, k, &seed);
    else
        gemm->out = client_take(client, c->dtype_c, 3, groups, n, k);
    if (!c->dtype_bias)
        return;
    if (c->layout == EPD_GEMM_TN || c->accumulate)
        gemm->bias = take_random(client, c->dtype_bias, 2, groups, n, 0, &seed);
    else
        gemm->bias = client_take(client, c->dtype_bias, 2, groups, n, 0);
}

static void bind_list(struct draft *draft, struct crew *crew, enum epd_role role, const struct slab *slab)
{
    uint32_t n = (uint32_t)slab->shape[0];
    for (uint32_t i = 0; i < n; i++) {
        struct slab part = *slab;
        part.n_dims = 2;
        part.shape[0] = slab->shape[1];
        part.shape[1] = slab->shape[2];
        part.offset += slab->bytes / n * i;
        draft_bind_part(draft, crew, role, i, n, &part);
    }
}

static void gemm_draft(const struct gemm *gemm, struct crew *crew, struct draft *draft)
{
    const struct gemm_case *c = &gemm->c;
    enum epd_role weights = c->layout == EPD_GEMM_NT ? EPD_ROLE_C : EPD_ROLE_B;
    draft_init(draft, crew, 0, EPD_OP_GROUPED_GEMM);
    draft->request.layout = c->layout;
    draft->request.accumulate = c->accumulate;
    draft_bind(draft, crew, EPD_ROLE_M_SPLITS, &gemm->splits);
    if (c->alignment)
        draft_bind(draft, crew, EPD_ROLE_OFFSETS, &gemm->slab_offsets);
    draft_bind(draft, crew, EPD_ROLE_A, &gemm->a);
    if (c->parts && weights == EPD_ROLE_B)
        bind_list(draft, crew, EPD_ROLE_B, &gemm->b);
    else
        draft_bind(draft, crew, EPD_ROLE_B, &gemm->b);
    if (c->parts && weights == EPD_ROLE_C)
        bind_list(draft, crew, EPD_ROLE_C, &gemm->out);
    else
        draft_bind(draft, crew, EPD_ROLE_C, &gemm->out);
    if (c->dtype_bias)
        draft_bind(draft, crew, c->layout == EPD_GEMM_NT ? EPD_ROLE_DBIAS : EPD_ROLE_BIAS, &gemm->bias);
}

static double *decoded(const struct slab *slab)
{
    return slab->bytes ? values_decoded(slab->dtype, slab->data, slab->bytes / dtype_bytes(slab->dtype))
                       : NULL;
}

/* What the reference makes of the inputs; `out` and `bias` hold what was there before. */
static void gemm_reference(const struct gemm *gemm, double *out, double *bias)
{
    const struct gemm_case *c = &gemm->c;
    struct reference_groups groups = {
        .n_groups = c->n_groups, .m_splits = gemm->m_splits, .offsets = gemm->offsets};
    double *a = decoded(&gemm->a), *b = decoded(&gemm->b);
    if (c->layout == EPD_GEMM_TN)
        reference_gemm_tn(&groups, c->n, c->k, a, b, bias, out);
    else if (c->layout == EPD_GEMM_NN)
        reference_gemm_nn(&groups, c->n, c->k, a, b, out);
    else
        reference_gemm_nt(&groups, c->n, c->k, a, b, c->accumulate, out, bias);
    free(a);
    free(b);
}

static void check(const char *what, const struct slab *got, size_t first, const double *want, size_t n,
                  struct tolerance tolerance)
{
    char text[VALUES_TEXT_BYTES];
    const char *data = (const char *)got->data + first * dtype_bytes(got->dtype);
    ck_assert_msg(values_match(got->dtype, data, want + first, n, tolerance, text), "%s: %s", what, text);
}

/* The rows of the groups are as wanted; between the groups and behind them nothing was written. */
static void check_groups(const char *what, const struct slab *got, const struct reference_groups *groups,
                         size_t width, const double *want, struct tolerance tolerance)
{
    size_t element = dtype_bytes(got->dtype), end = 0;
    for (uint32_t g = 0; g < groups->n_groups; g++) {
        size_t first = (size_t)groups->offsets[g] * width, n = (size_t)groups->m_splits[g] * width;
        ck_assert_msg(values_poisoned((char *)got->data + end * element, (first - end) * element),
                      "%s: written before group %u", what, g);
        check(what, got, first, want, n, tolerance);
        end = first + n;
    }
    ck_assert_msg(values_poisoned((char *)got->data + end * element, got->bytes - end * element),
                  "%s: written behind the last group", what);
}

static void gemm_check(const struct gemm *gemm, const double *out, const double *bias)
{
    const struct gemm_case *c = &gemm->c;
    char what[GEMM_CASE_TEXT_BYTES];
    gemm_case_text(c, what);
    if (c->layout == EPD_GEMM_NT) {
        struct tolerance tolerance = tolerance_sum(c->dtype_c, (size_t)gemm->rows, 0.6);
        check(what, &gemm->out, 0, out, (size_t)c->n_groups * c->n * c->k, tolerance);
        if (c->dtype_bias)
            check(what, &gemm->bias, 0, bias, (size_t)c->n_groups * c->n,
                  tolerance_sum(c->dtype_bias, (size_t)gemm->rows, 0.6));
        return;
    }
    const struct reference_groups groups = {
        .n_groups = c->n_groups, .m_splits = gemm->m_splits, .offsets = gemm->offsets};
    size_t width = c->layout == EPD_GEMM_TN ? c->n : c->k, n_terms = c->layout == EPD_GEMM_TN ? c->k : c->n;
    check_groups(what, &gemm->out, &groups, width, out, tolerance_sum(c->dtype_c, n_terms, 0.6));
}

static void run_gemm(struct crew *crew, const struct gemm_case *c, uint64_t seed)
{
    struct gemm gemm;
    struct draft *draft = values_alloc(1, sizeof *draft);
    struct crew_plan plan;
    struct outcome outcome;
    uint32_t no_tokens = 0;
    gemm_init(&gemm, &crew->clients[0], c, seed);
    double *out = decoded(&gemm.out), *bias = decoded(&gemm.bias);
    gemm_reference(&gemm, out, bias);
    gemm_draft(&gemm, crew, draft);
    crew_plan_create(&plan, crew, draft, 1);
    launch(&plan, &no_tokens, &outcome);
    ck_assert_msg(outcome.ranks[0].status == EPD_OK, "%s", outcome.entries[0].text);
    int64_t rows = 0;
    for (uint32_t g = 0; g < c->n_groups; g++)
        rows += gemm.m_splits[g];
    ck_assert_int_eq(outcome.ranks[0].rows, rows);
    ck_assert_uint_eq(outcome.ranks[0].flops, 2 * (uint64_t)rows * c->n * c->k);
    gemm_check(&gemm, out, bias);
    crew_plan_destroy(&plan);
    free(out);
    free(bias);
    free(draft);
}

START_TEST(grouped_gemms_match_the_reference)
{
    struct gemm_case c;
    struct harness harness;
    harness_open(&harness, 1, 0);
    /* Every case of modest size; the kernels' own test runs the large ones. */
    for (size_t i = 0; gemm_case_at(i, &c); i++) {
        struct crew crew;
        if ((double)c.n_rows * c.n * c.k > 2e6 || c.n_groups > 40 || i % 3)
            continue;
        crew_init(&crew, &harness, &config, 1, CLIENT_BYTES);
        run_gemm(&crew, &c, i);
        crew_fini(&crew);
    }
    harness_close(&harness);
}
END_TEST

/* 3 GEMMs 128 x 128 in bf16, splits 64, 96, 80 in 320 rows. */
static const struct gemm_case plain_case = {.layout = EPD_GEMM_TN,
                                            .dtype = EPD_BF16,
                                            .dtype_c = EPD_BF16,
                                            .n_groups = 3,
                                            .n = 128,
                                            .k = 128,
                                            .n_rows = 240};

START_TEST(bad_splits_are_named_and_clamped)
{
    struct harness harness;
    struct crew crew;
    struct gemm gemm;
    struct draft *draft = values_alloc(1, sizeof *draft);
    struct crew_plan plan;
    struct outcome outcome;
    uint32_t no_tokens = 0;
    harness_open(&harness, 1, 0);
    crew_init(&crew, &harness, &config, 1, CLIENT_BYTES);
    gemm_init(&gemm, &crew.clients[0], &plain_case, 1);
    gemm_draft(&gemm, &crew, draft);
    crew_plan_create(&plan, &crew, draft, 1);
    int64_t *splits = gemm.splits.data;
    const int64_t bad[] = {-1, 1000, INT64_MAX, INT64_MIN};
    for (size_t i = 0; i < COUNT(bad); i++) {
        splits[1] = bad[i];
        launch(&plan, &no_tokens, &outcome);
        ck_assert_int_eq(outcome.ranks[0].status, EPD_BAD_SPLITS);
        ck_assert_int_eq(outcome.ranks[0].record.expert, 1);
        ck_assert_msg(strstr(outcome.entries[0].text, "grouped_gemm: m_splits of rank 0 expert 1: rows") !=
                          NULL,
                      "%s", outcome.entries[0].text);
    }
    splits[0] = splits[1] = splits[2] = 0;
    launch_expect(&plan, &no_tokens, EPD_OK);
    crew_plan_destroy(&plan);
    crew_fini(&crew);
    harness_close(&harness);
    free(draft);
}
END_TEST

/* One activation, forward and backward. */
struct activation {
    struct activation_case c;
    int64_t m_splits[MAX_GROUPS], offsets[MAX_GROUPS + 1];
    struct slab splits, slab_offsets, preact, act, row_weights, d_act, d_preact, weighted_act, d_row_weights;
};

static void activation_init(struct activation *t, struct client *client, const struct activation_case *c)
{
    uint64_t seed = 5;
    *t = (struct activation){.c = *c};
    /* More rows than the slabs need: the tail stays as it is. */
    int64_t f = c->ffn, groups = c->n_groups;
    int64_t rows = 4 + op_split_rows(c->split, c->n_groups, c->n_rows, c->alignment, t->m_splits, t->offsets);
    t->splits = client_put(client, EPD_I64, 1, groups, 0, 0, t->m_splits);
    t->slab_offsets = client_put(client, EPD_I64, 1, groups + 1, 0, 0, t->offsets);
    t->preact = take_random(client, c->dtype, 2, rows, 2 * f, 0, &seed);
    t->act = client_take(client, c->dtype, 2, rows, f, 0);
    t->row_weights = take_random(client, EPD_F32, 1, rows, 0, 0, &seed);
    t->d_act = take_random(client, c->dtype, 2, rows, f, 0, &seed);
    t->d_preact = client_take(client, c->dtype, 2, rows, 2 * f, 0);
    t->weighted_act = client_take(client, c->dtype, 2, rows, f, 0);
    t->d_row_weights = client_take(client, EPD_F32, 1, rows, 0, 0);
}

static struct crew_plan activation_plan(struct crew *crew, const struct activation *t, enum epd_op op)
{
    struct crew_plan plan;
    struct draft *draft = values_alloc(1, sizeof *draft);
    draft_init(draft, crew, 0, op);
    draft->request.activation = t->c.kind;
    draft_bind(draft, crew, EPD_ROLE_M_SPLITS, &t->splits);
    if (t->c.alignment)
        draft_bind(draft, crew, EPD_ROLE_OFFSETS, &t->slab_offsets);
    draft_bind(draft, crew, EPD_ROLE_PREACT, &t->preact);
    if (t->c.weighted)
        draft_bind(draft, crew, EPD_ROLE_RECV_WEIGHTS, &t->row_weights);
    if (op == EPD_OP_ACTIVATION) {
        draft_bind(draft, crew, EPD_ROLE_ACT, &t->act);
    } else {
        draft_bind(draft, crew, EPD_ROLE_D_ACT, &t->d_act);
        draft_bind(draft, crew, EPD_ROLE_D_PREACT, &t->d_preact);
        draft_bind(draft, crew, EPD_ROLE_ACT, &t->weighted_act);
        if (t->c.weighted)
            draft_bind(draft, crew, EPD_ROLE_D_RECV_WEIGHTS, &t->d_row_weights);
    }
    crew_plan_create(&plan, crew, draft, 1);
    free(draft);
    return plan;
}

static void activation_check(const struct activation *t)
{
    const struct activation_case *c = &t->c;
    const struct reference_groups groups = {
        .n_groups = c->n_groups, .m_splits = t->m_splits, .offsets = t->offsets};
    size_t rows = (size_t)t->preact.shape[0], f = c->ffn;
    double *preact = decoded(&t->preact), *d_act = decoded(&t->d_act);
    double *row_weights = c->weighted ? decoded(&t->row_weights) : NULL;
    double *act = values_alloc_doubles(rows * f), *d_preact = values_alloc_doubles(rows * 2 * f);
    double *weighted_act = values_alloc_doubles(rows * f), *d_row_weights = values_alloc_doubles(rows);
    const struct reference_activation_bwd bwd = {.kind = c->kind,
                                                 .ffn = c->ffn,
                                                 .preact = preact,
                                                 .d_act = d_act,
                                                 .row_weights = row_weights,
                                                 .d_preact = d_preact,
                                                 .weighted_act = weighted_act,
                                                 .d_row_weights = d_row_weights};
    reference_activation(&groups, c->kind, c->ffn, preact, row_weights, act);
    reference_activation_bwd(&groups, &bwd);
    check_groups("act", &t->act, &groups, f, act, tolerance_of(c->dtype));
    check_groups("d_preact", &t->d_preact, &groups, 2 * f, d_preact, tolerance_of(c->dtype));
    check_groups("weighted_act", &t->weighted_act, &groups, f, weighted_act, tolerance_of(c->dtype));
    if (c->weighted)
        check_groups("d_row_weights", &t->d_row_weights, &groups, 1, d_row_weights,
                     tolerance_sum(EPD_F32, f, 0.5));
    double *owned[] = {preact, row_weights, d_act, act, d_preact, weighted_act, d_row_weights};
    for (size_t i = 0; i < COUNT(owned); i++)
        free(owned[i]);
}

static void run_activation(struct crew *crew, const struct activation_case *c)
{
    uint32_t no_tokens = 0;
    struct activation t;
    activation_init(&t, &crew->clients[0], c);
    struct crew_plan forward = activation_plan(crew, &t, EPD_OP_ACTIVATION);
    struct crew_plan backward = activation_plan(crew, &t, EPD_OP_ACTIVATION_BWD);
    launch_expect(&forward, &no_tokens, EPD_OK);
    launch_expect(&backward, &no_tokens, EPD_OK);
    activation_check(&t);
    crew_plan_destroy(&forward);
    crew_plan_destroy(&backward);
}

START_TEST(activations_match_the_reference)
{
    struct activation_case c;
    struct harness harness;
    harness_open(&harness, 1, 0);
    for (size_t i = 0; activation_case_at(i, &c); i++) {
        struct crew crew;
        crew_init(&crew, &harness, &config, 1, CLIENT_BYTES);
        run_activation(&crew, &c);
        crew_fini(&crew);
    }
    harness_close(&harness);
}
END_TEST

int main(void)
{
    const TTest *const tests[] = {
        grouped_gemms_match_the_reference,
        bad_splits_are_named_and_clamped,
        activations_match_the_reference,
    };
    return suite_run("ep expert", tests, COUNT(tests));
}
