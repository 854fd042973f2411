/* Data that clients write and the daemon reads: wrong routing, wrong splits, overflow, NaN - and memory that
 * changes while a step runs. The step is blamed on who did it, nothing is touched outside, and the next step
 * is right. */
#include <check.h>
#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "tests/fault/baseline.h"
#include "tests/fault/bystander.h"
#include "tests/fault/suite.h"
#include "tests/fault/workload.h"
#include "tests/reference/values.h"

#define N_RACING_STEPS 400
#define N_HIDDEN       32

static struct daemon_process epd_daemon;
static struct bystander bystander;

static void start(void)
{
    daemon_start(&epd_daemon, 2, NULL);
    bystander_start(&bystander, epd_daemon.socket_path);
}

static void stop(void)
{
    bystander_stop(&bystander);
    daemon_stop(&epd_daemon);
}

static void run(const char *name, rank_function function, const struct op_case *op_case)
{
    unsigned n_failed = ranks_run(epd_daemon.socket_path, name, op_case->world_size, function, op_case);
    if (n_failed)
        daemon_print_log(&epd_daemon);
    ck_assert_uint_eq(n_failed, 0);
}

/* ---- routing ---- */

static void bad_routing_rank(const struct rank *rank)
{
    static const int64_t values[] = {4, -2, 77, INT64_MAX, INT64_MIN, INT64_C(1) << 32, INT32_MIN};
    struct workload w;
    workload_open(&w, rank, rank->arg, 0);
    int64_t *idx = w.idx.data;
    const size_t at = 5 * workload_case.top_k + 1; /* token 5 */
    const int64_t good = idx[at];
    RANK_CHECK(workload_step(&w) == EPD_OK);
    for (size_t i = 0; i <= sizeof(values) / sizeof(values[0]); i++) {
        struct epd_failure failure = {.size = sizeof(failure)};
        if (rank->rank == 1) /* the last one: the same expert twice */
            idx[at] = i < sizeof(values) / sizeof(values[0]) ? values[i] : idx[at - 1];
        RANK_CHECK(workload_step(&w) == EPD_BAD_ROUTING);
        RANK_CHECK(epd_plan_failure(w.forward, &failure) == EPD_OK);
        RANK_CHECK(failure.rank == 1 && strstr(failure.text, "token 5") != NULL);
        idx[at] = good;
        RANK_CHECK(workload_step(&w) == EPD_OK);
    }
    workload_close(&w);
}

START_TEST(bad_experts_are_blamed_on_rank_and_token_and_the_next_step_is_right)
{
    run("routing", bad_routing_rank, &workload_case);
}
END_TEST

struct racer {
    pthread_t thread;
    atomic_int stop;
    int64_t *words; /* shared with the daemon */
    size_t n;
    uint64_t seed;
};

/* Good and bad values in turn, as fast as it goes. */
static void *race(void *arg)
{
    struct racer *racer = arg;
    while (!atomic_load(&racer->stop)) {
        for (size_t i = 0; i < racer->n; i++) {
            const uint64_t random = values_random(&racer->seed);
            __atomic_store_n(&racer->words[i], random % 8 ? (int64_t)(random >> 8 & 3) : (int64_t)random,
                             __ATOMIC_RELAXED);
        }
    }
    return NULL;
}

static void race_start(struct racer *racer, void *words, size_t n)
{
    *racer = (struct racer){.words = words, .n = n, .seed = 5};
    RANK_CHECK(pthread_create(&racer->thread, NULL, race, racer) == 0);
}

static void race_stop(struct racer *racer)
{
    atomic_store(&racer->stop, 1);
    pthread_join(racer->thread, NULL);
}

static void racing_routes_rank(const struct rank *rank)
{
    struct workload w;
    struct racer racer;
    workload_open(&w, rank, rank->arg, 0);
    const size_t bytes = w.idx.n * sizeof(int64_t);
    int64_t *good = values_alloc(w.idx.n, sizeof(int64_t));
    memcpy(good, w.idx.data, bytes);
    RANK_CHECK(workload_step(&w) == EPD_OK);
    race_start(&racer, w.idx.data, w.idx.n);
    for (int i = 0; i < N_RACING_STEPS; i++) {
        RANK_CHECK(epd_plan_launch(w.forward, NULL) == EPD_OK);
        enum epd_status status = epd_plan_wait(w.forward, 0);
        RANK_CHECK(status == EPD_OK || status == EPD_BAD_ROUTING || status == EPD_CAPACITY_OVERFLOW);
    }
    race_stop(&racer);
    memcpy(w.idx.data, good, bytes);
    RANK_CHECK(workload_step(&w) == EPD_OK); /* bit by bit as before */
    free(good);
    workload_close(&w);
}

START_TEST(routing_that_changes_while_the_step_runs_stays_in_bounds)
{
    run("racing-routes", racing_routes_rank, &workload_case);
}
END_TEST

/* ---- splits ---- */

enum { GEMM_ROWS = 12, GEMM_GROUPS = 4, GEMM_N = 8, GEMM_K = 16, GUARD_ROWS = 4 };

/* A grouped_gemm with splits and offsets of the client; c has rows behind its end that nobody may touch. */
struct gemm {
    struct layer layer;
    struct layer_tensor a, b, c, splits, offsets;
    struct epd_plan *plan;
};

static void gemm_open(struct gemm *g, const struct rank *rank)
{
    layer_open(&g->layer, rank, &workload_case);
    float a[GEMM_ROWS * GEMM_K], b[GEMM_GROUPS * GEMM_N * GEMM_K];
    uint64_t seed = 3;
    values_fill(EPD_F32, a, GEMM_ROWS * GEMM_K, -1, 1, &seed);
    values_fill(EPD_F32, b, GEMM_GROUPS * GEMM_N * GEMM_K, -1, 1, &seed);
    g->a = layer_tensor(&g->layer, EPD_ROLE_A, EPD_F32, (int64_t[]){GEMM_ROWS, GEMM_K}, 2, a);
    g->b = layer_tensor(&g->layer, EPD_ROLE_B, EPD_F32, (int64_t[]){GEMM_GROUPS, GEMM_N, GEMM_K}, 3, b);
    g->c = layer_tensor(&g->layer, EPD_ROLE_C, EPD_F32, (int64_t[]){GEMM_ROWS + GUARD_ROWS, GEMM_N}, 2, NULL);
    g->c.tensor.shape[0] = GEMM_ROWS;
    g->splits = layer_tensor(&g->layer, EPD_ROLE_M_SPLITS, EPD_I64, (int64_t[]){GEMM_GROUPS}, 1, NULL);
    g->offsets = layer_tensor(&g->layer, EPD_ROLE_OFFSETS, EPD_I64, (int64_t[]){GEMM_GROUPS + 1}, 1, NULL);
    const struct epd_plan_options options = {.op = EPD_OP_GROUPED_GEMM, .layout = EPD_GEMM_TN};
    g->plan =
        layer_plan(&g->layer, options, (struct layer_tensor[]){g->a, g->b, g->c, g->splits, g->offsets}, 5);
}

static void expect_guard(const struct gemm *g)
{
    RANK_CHECK(values_poisoned((float *)g->c.data + GEMM_ROWS * GEMM_N, GUARD_ROWS * GEMM_N * sizeof(float)));
}

static void set_splits(struct gemm *g, const int64_t *splits, const int64_t *offsets)
{
    memcpy(g->splits.data, splits, GEMM_GROUPS * sizeof(int64_t));
    memcpy(g->offsets.data, offsets, (GEMM_GROUPS + 1) * sizeof(int64_t));
}

static void bad_splits_rank(const struct rank *rank)
{
    static const int64_t good[] = {3, 3, 3, 3}, even[] = {0, 3, 6, 9, 12};
    static const int64_t splits[][GEMM_GROUPS] = {
        {-1, 3, 3, 3},           {3, 3, 3, 4},         {13, 0, 0, 0},
        {INT64_MAX, 3, 3, 3},    {INT64_MIN, 3, 3, 3}, {INT64_MAX, INT64_MAX, INT64_MAX, INT64_MAX},
        {3, 3, 3, INT64_MAX - 8}};
    static const int64_t offsets[][GEMM_GROUPS + 1] = {
        {-1, 3, 6, 9, 12}, {0, 3, 6, 13, 13}, {INT64_MAX, 3, 6, 9, 12}, {INT64_MIN, 3, 6, 9, 12}};
    struct gemm g;
    gemm_open(&g, rank);
    set_splits(&g, good, even);
    RANK_CHECK(layer_step(g.plan) == EPD_OK);
    for (size_t i = 0; i < sizeof(splits) / sizeof(splits[0]); i++) {
        set_splits(&g, splits[i], even);
        RANK_CHECK(layer_step(g.plan) == EPD_BAD_SPLITS);
        expect_guard(&g);
    }
    for (size_t i = 0; i < sizeof(offsets) / sizeof(offsets[0]); i++) {
        set_splits(&g, good, offsets[i]);
        RANK_CHECK(layer_step(g.plan) == EPD_BAD_SPLITS);
        expect_guard(&g);
    }
    set_splits(&g, good, even);
    RANK_CHECK(layer_step(g.plan) == EPD_OK);
    expect_guard(&g);
    layer_close(&g.layer);
}

START_TEST(bad_splits_and_offsets_are_refused_and_nothing_past_the_end_is_written)
{
    run("splits", bad_splits_rank, &workload_case);
}
END_TEST

static void racing_splits_rank(const struct rank *rank)
{
    static const int64_t good[] = {3, 3, 3, 3}, even[] = {0, 3, 6, 9, 12};
    struct gemm g;
    struct racer splits, offsets;
    gemm_open(&g, rank);
    race_start(&splits, g.splits.data, GEMM_GROUPS);
    race_start(&offsets, g.offsets.data, GEMM_GROUPS + 1);
    for (int i = 0; i < N_RACING_STEPS; i++) {
        enum epd_status status = layer_step(g.plan);
        RANK_CHECK(status == EPD_OK || status == EPD_BAD_SPLITS);
    }
    race_stop(&splits);
    race_stop(&offsets);
    expect_guard(&g);
    set_splits(&g, good, even);
    RANK_CHECK(layer_step(g.plan) == EPD_OK);
    layer_close(&g.layer);
}

START_TEST(splits_that_change_while_the_step_runs_stay_in_bounds)
{
    run("racing-splits", racing_splits_rank, &workload_case);
}
END_TEST

/* ---- overflow ---- */

static void overflow_rank(const struct rank *rank)
{
    struct workload w;
    workload_open(&w, rank, rank->arg, 0);
    const enum op_capacity capacity = w.layer.op_case->capacity;
    enum epd_status status = epd_plan_launch(w.forward, NULL);
    RANK_CHECK(status == EPD_OK);
    status = epd_plan_wait(w.forward, 0);
    if (capacity != OP_CAPACITY_SHORT) {
        RANK_CHECK(status == EPD_OK);
    } else {
        struct epd_failure failure = {.size = sizeof(failure)};
        char needed[32];
        snprintf(needed, sizeof needed, "%lld", (long long)w.layer.capacity_rows + 1);
        RANK_CHECK(status == EPD_CAPACITY_OVERFLOW);
        RANK_CHECK(epd_plan_failure(w.forward, &failure) == EPD_OK);
        RANK_CHECK(strstr(failure.text, needed) != NULL); /* the size that would have done */
    }
    workload_close(&w);
}

START_TEST(one_row_too_many_is_an_error_that_says_how_many_would_do_and_one_less_is_none)
{
    static const enum op_pattern patterns[] = {OP_UNIFORM, OP_ALL_TO_ONE, OP_EMPTY_EXPERTS};
    for (size_t i = 0; i < sizeof(patterns) / sizeof(patterns[0]); i++) {
        struct op_case op_case = workload_case;
        op_case.pattern = patterns[i];
        op_case.capacity = OP_CAPACITY_EXACT;
        run("exact", overflow_rank, &op_case);
        op_case.capacity = OP_CAPACITY_SHORT;
        run("short", overflow_rank, &op_case);
    }
}
END_TEST

/* ---- NaN ---- */

static void nan_rank(const struct rank *rank)
{
    static const float poisons[] = {NAN, INFINITY, -INFINITY};
    struct workload w;
    workload_open(&w, rank, rank->arg, 0);
    RANK_CHECK(workload_step(&w) == EPD_OK);
    const size_t row = N_HIDDEN * sizeof(float), token = 3;
    float *x = w.x.data;
    const float good = x[token * N_HIDDEN + 7];
    for (size_t i = 0; i < sizeof(poisons) / sizeof(poisons[0]); i++) {
        if (rank->rank == 1)
            x[token * N_HIDDEN + 7] = poisons[i];
        RANK_CHECK(epd_plan_launch(w.forward, NULL) == EPD_OK && epd_plan_wait(w.forward, 0) == EPD_OK);
        for (size_t t = 0; t < w.layer.n_tokens; t++) {
            const char *got = (const char *)w.out.data + t * row, *want = (const char *)w.first + t * row;
            const int poisoned = rank->rank == 1 && t == token;
            RANK_CHECK(poisoned == (memcmp(got, want, row) != 0)); /* others: not a bit */
        }
        x[token * N_HIDDEN + 7] = good;
        RANK_CHECK(workload_step(&w) == EPD_OK); /* and it does not linger */
    }
    workload_close(&w);
}

START_TEST(a_nan_stays_in_its_token_and_does_not_linger)
{
    struct op_case aligned = workload_case;
    aligned.alignment = 16; /* with padding rows between the experts */
    run("nan", nan_rank, &workload_case);
    run("nan-aligned", nan_rank, &aligned);
}
END_TEST

int main(void)
{
    const TTest *const tests[] = {
        bad_experts_are_blamed_on_rank_and_token_and_the_next_step_is_right,
        routing_that_changes_while_the_step_runs_stays_in_bounds,
        bad_splits_and_offsets_are_refused_and_nothing_past_the_end_is_written,
        splits_that_change_while_the_step_runs_stay_in_bounds,
        one_row_too_many_is_an_error_that_says_how_many_would_do_and_one_less_is_none,
        a_nan_stays_in_its_token_and_does_not_linger,
    };
    return suite_run("data", tests, SUITE_COUNT(tests), start, stop);
}
