/* The fused form: which groups have it, that a launch which fails after others have gone leaves nobody waiting, and that
 * groups whose clients come in opposite orders do not keep each other out. */
#include <cuda_runtime_api.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "ep/cuda_exchange.h"
#include "ep/plan_impl.h"
#include "tests/gpu/backend/cases.h"
#include "tests/gpu/backend/pair.h"
#include "tests/unit/ep/harness_memory.h"

#define COUNT(array) (sizeof(array) / sizeof *(array))
/* Of a millisecond, until a queue whose client has come counts as held up. */
#define QUEUE_TRIES 2000

static const struct layer_modes saved = {.saved = EPD_SAVED_CONTEXT};

/* ---- a launch that fails ----
 * The linker puts this in the place of the real one (--wrap). */

static _Atomic int fail_rank = -1, fail_after;

enum epd_status __real_cuda_exchange_launch(enum exchange_op op, uint32_t stage,
                                            const struct exchange_args *args, struct CUstream_st *stream,
                                            struct epd_error *error);
enum epd_status __wrap_cuda_exchange_launch(enum exchange_op op, uint32_t stage,
                                            const struct exchange_args *args, struct CUstream_st *stream,
                                            struct epd_error *error);

enum epd_status __wrap_cuda_exchange_launch(enum exchange_op op, uint32_t stage,
                                            const struct exchange_args *args, struct CUstream_st *stream,
                                            struct epd_error *error)
{
    if ((int)args->shape.rank == atomic_load(&fail_rank) && atomic_fetch_sub(&fail_after, 1) == 0) {
        usleep(20000); /* the others have launched and wait */
        return error_set(error, EPD_CUDA, "injected");
    }
    return __real_cuda_exchange_launch(op, stage, args, stream, error);
}

static uint32_t n_gpus(void)
{
    int n = 0;
    return cudaGetDeviceCount(&n) == cudaSuccess ? (uint32_t)n : 0;
}

/* A case whose ranks have a device each. */
static const struct op_case *spread_case(void)
{
    return cuda_case_named(n_gpus() >= 4 ? "uniform bf16" : n_gpus() >= 2 ? "top-1" : "one rank bf16");
}

START_TEST(a_launch_that_fails_after_others_have_gone_frees_them_and_the_group_works_again)
{
    struct pair pair;
    struct outcome outcome;
    const struct op_case *c = spread_case();
    pair_init(&pair, c, EPD_SAVED_CONTEXT);
    ck_assert(team_is_fused(pair.layer.crew.team));
    launch_expect(&pair.forward, pair.layer.n_tokens, EPD_OK);
    for (uint32_t rank = 0; rank < c->world_size; rank++) {
        for (int after = 0; after < 2; after++) { /* the dispatch, the combine */
            atomic_store(&fail_after, after);
            atomic_store(&fail_rank, (int)rank);
            launch(&pair.forward, pair.layer.n_tokens, &outcome);
            atomic_store(&fail_rank, -1);
            for (uint32_t r = 0; r < c->world_size; r++) {
                ck_assert_int_eq(outcome.ranks[r].status, EPD_CUDA);
                ck_assert_int_eq(outcome.entries[r].rank, (int)rank);
            }
            layer_poison_outputs(&pair.layer, pair.outputs);
            launch_expect(&pair.forward, pair.layer.n_tokens, EPD_OK);
            layer_check_forward(&pair.layer, pair.outputs);
        }
    }
    launch_expect(&pair.backward, pair.layer.n_tokens, EPD_OK);
    layer_check_backward(&pair.layer, pair.outputs);
    pair_fini(&pair);
}
END_TEST

/* The next steps are submitted before anybody knows. */
START_TEST(steps_behind_a_failed_launch_end_and_later_ones_are_right)
{
    enum { N = 3 };
    struct pair pair;
    struct crew_plan behind[N];
    struct outcome failed, outcomes[N];
    pair_init(&pair, spread_case(), EPD_SAVED_CONTEXT);
    for (int i = 0; i < N; i++)
        layer_forward_plan(&pair.layer, saved, pair.outputs, &behind[i]);
    atomic_store(&fail_after, 0);
    atomic_store(&fail_rank, 0);
    launch_start(&pair.forward, pair.layer.n_tokens, 0, &failed);
    for (int i = 0; i < N; i++)
        launch_start(&behind[i], pair.layer.n_tokens, 0, &outcomes[i]);
    launch_wait(&pair.forward, &failed);
    ck_assert_int_eq(failed.ranks[0].status, EPD_CUDA);
    for (int i = 0; i < N; i++) {
        launch_wait(&behind[i], &outcomes[i]);
        enum epd_status status = outcomes[i].ranks[0].status;
        ck_assert(status == EPD_OK || status == EPD_BUSY || status == EPD_CUDA);
    }
    atomic_store(&fail_rank, -1);
    for (int i = 0; i < N; i++) {
        layer_poison_outputs(&pair.layer, pair.outputs);
        launch_expect(&behind[i], pair.layer.n_tokens, EPD_OK);
        layer_check_forward(&pair.layer, pair.outputs);
        crew_plan_destroy(&behind[i]);
    }
    pair_fini(&pair);
}
END_TEST

START_TEST(groups_whose_blocks_do_not_fit_or_whose_ranks_share_a_device_go_stage_by_stage)
{
    enum { MAX_PAIRS = 16 };
    struct harness harness;
    const struct op_case *c = spread_case();
    static struct layer layers[MAX_PAIRS];
    static struct layer_outputs outputs[MAX_PAIRS][HARNESS_MAX_RANKS];
    struct crew_plan plans[MAX_PAIRS];
    uint32_t n = 0, n_fused = 0;
    harness_open(&harness, c->world_size, 0);
    do {
        layer_init(&layers[n], &harness, c);
        layer_take_outputs(&layers[n], outputs[n]);
        layer_forward_plan(&layers[n], saved, outputs[n], &plans[n]);
        n_fused += (uint32_t)team_is_fused(layers[n].crew.team);
    } while (team_is_fused(layers[n++].crew.team) && n < MAX_PAIRS);
    printf("%u groups fused, the next stage by stage\n", n_fused);
    ck_assert_uint_eq(n_fused, n - 1);
    ck_assert_uint_ge(n_fused, 1);
    for (uint32_t i = 0; i < n; i++) {
        launch_expect(&plans[i], layers[i].n_tokens, EPD_OK);
        layer_check_forward(&layers[i], outputs[i]);
    }
    for (uint32_t i = 0; i < n; i++) {
        crew_plan_destroy(&plans[i]);
        layer_fini(&layers[i]);
    }
    harness_settle(&harness);
    layer_init(&layers[0], &harness, c);
    ck_assert(team_is_fused(layers[0].crew.team)); /* the room is back */
    layer_fini(&layers[0]);
    harness_close(&harness);

    harness_open(&harness, 1, 0);
    const struct op_case *shared = cuda_case_named("eight ranks");
    layer_init(&layers[0], &harness, shared);
    ck_assert_int_eq(team_is_fused(layers[0].crew.team), shared->world_size <= n_gpus());
    layer_fini(&layers[0]);
    harness_close(&harness);
}
END_TEST

/* On each device the clients of one group come first, and it is not the same one: streams of both wait, and kernels of
 * neither before all of its clients are there. */
START_TEST(groups_whose_clients_come_in_opposite_orders_both_end)
{
    enum { N = 2, ROUNDS = 20 };
    struct harness harness;
    const struct op_case *c = spread_case();
    static struct layer layers[N];
    static struct layer_outputs outputs[N][HARNESS_MAX_RANKS];
    struct crew_plan plans[N];
    struct outcome outcome[N];
    uint32_t all = (1u << c->world_size) - 1;
    harness_open(&harness, c->world_size, 0);
    for (int g = 0; g < N; g++) {
        layer_init(&layers[g], &harness, c);
        layer_take_outputs(&layers[g], outputs[g]);
        layer_forward_plan(&layers[g], saved, outputs[g], &plans[g]);
    }
    for (int round = 0; round < ROUNDS; round++) {
        for (int g = 0; g < N; g++)
            launch_start(&plans[g], layers[g].n_tokens, all, &outcome[g]);
        for (uint32_t step = 0; step < 2 * c->world_size; step++) {
            /* Group 0 from the first rank on, group 1 from the last. */
            int g = (int)(step % 2);
            uint32_t r = step % 2 ? c->world_size - 1 - step / 2 : step / 2;
            usleep(500);
            flag_set(&layers[g].crew.clients[r].page->plans[plans[g].flag_idx[r]].ready);
        }
        for (int g = 0; g < N; g++) {
            launch_wait(&plans[g], &outcome[g]);
            ck_assert_int_eq(outcome[g].ranks[0].status, EPD_OK);
        }
    }
    for (int g = 0; g < N; g++) {
        layer_check_forward(&layers[g], outputs[g]);
        crew_plan_destroy(&plans[g]);
        layer_fini(&layers[g]);
    }
    harness_close(&harness);
}
END_TEST

/* Two layers over the same inputs: one submitted launch by launch, the other replayed from its third step on. */
START_TEST(a_replayed_layer_is_the_same_bits_whatever_is_routed)
{
    enum { N_ROUTINGS = 6 };
    struct pair pair;
    struct layer_outputs replayed[HARNESS_MAX_RANKS];
    struct crew_plan forward, backward;
    /* With room for any routing. */
    pair_init(&pair, n_gpus() >= 4 ? cuda_case_named("top-8") : spread_case(), EPD_SAVED_CONTEXT);
    layer_take_outputs(&pair.layer, replayed);
    layer_forward_plan(&pair.layer, saved, replayed, &forward);
    layer_backward_plan(&pair.layer, saved, replayed, &forward, &backward);
    for (uint64_t seed = 1; seed <= N_ROUTINGS; seed++) {
        layer_reroute(&pair.layer, seed);
        layer_poison_outputs(&pair.layer, pair.outputs);
        layer_poison_outputs(&pair.layer, replayed);
        pair.harness.node->replays = 0;
        launch_expect(&pair.forward, pair.layer.n_tokens, EPD_OK);
        launch_expect(&pair.backward, pair.layer.n_tokens, EPD_OK);
        pair.harness.node->replays = 1;
        launch_expect(&forward, pair.layer.n_tokens, EPD_OK);
        launch_expect(&backward, pair.layer.n_tokens, EPD_OK);
        layer_check_forward(&pair.layer, replayed);
        layer_check_backward(&pair.layer, pair.outputs);
        layer_check_backward(&pair.layer, replayed);
        layer_check_same(&pair.layer, pair.outputs, replayed);
    }
    for (uint32_t r = 0; r < pair.layer.crew.world_size; r++) {
        ck_assert_ptr_nonnull(forward.plans[r]->graph);
        ck_assert_ptr_nonnull(backward.plans[r]->graph);
        ck_assert_ptr_null(pair.forward.plans[r]->graph);
    }
    /* Another number of tokens: launch by launch, then recorded anew. */
    uint32_t fewer[HARNESS_MAX_RANKS];
    for (uint32_t r = 0; r < pair.layer.crew.world_size; r++)
        fewer[r] = pair.layer.n_tokens[r] / 2;
    for (int i = 0; i < 3; i++)
        launch_expect(&forward, fewer, EPD_OK);
    for (uint32_t r = 0; r < pair.layer.crew.world_size; r++)
        ck_assert_uint_eq(forward.plans[r]->graph_tokens, fewer[r]);
    launch_expect(&forward, pair.layer.n_tokens, EPD_OK);
    layer_poison_outputs(&pair.layer, replayed);
    launch_expect(&forward, pair.layer.n_tokens, EPD_OK);
    layer_check_forward(&pair.layer, replayed);
    crew_plan_destroy(&backward);
    crew_plan_destroy(&forward);
    pair_fini(&pair);
}
END_TEST

/* The second step would be recorded; its first launch is refused, and it goes well all the same. */
START_TEST(a_layer_that_cannot_be_recorded_goes_on_launch_by_launch)
{
    struct pair pair;
    pair_init(&pair, spread_case(), EPD_SAVED_CONTEXT);
    pair.harness.node->replays = 1;
    launch_expect(&pair.forward, pair.layer.n_tokens, EPD_OK);
    atomic_store(&fail_after, 0);
    atomic_store(&fail_rank, 0);
    for (int i = 0; i < 2; i++) {
        layer_poison_outputs(&pair.layer, pair.outputs);
        launch_expect(&pair.forward, pair.layer.n_tokens, EPD_OK);
        layer_check_forward(&pair.layer, pair.outputs);
    }
    atomic_store(&fail_rank, -1);
    ck_assert_ptr_null(pair.forward.plans[0]->graph);
    for (uint32_t r = 1; r < pair.layer.crew.world_size; r++)
        ck_assert_ptr_nonnull(pair.forward.plans[r]->graph);
    pair_fini(&pair);
}
END_TEST

/* What a step sends: a token once to each other rank that has one of its experts. */
START_TEST(wire_bytes_count_a_token_once_for_each_rank)
{
    struct pair pair;
    struct outcome outcome;
    const struct op_case *c = spread_case();
    pair_init(&pair, c, EPD_SAVED_CONTEXT);
    launch(&pair.forward, pair.layer.n_tokens, &outcome);
    uint64_t crossing[HARNESS_MAX_RANKS] = {0};
    uint32_t n_local = c->n_experts / c->world_size;
    for (uint32_t r = 0; r < c->world_size; r++) {
        const int64_t *idx = pair.layer.ranks[r].topk_idx.data;
        const int32_t *idx32 = pair.layer.ranks[r].topk_idx.data;
        int wide = pair.layer.ranks[r].topk_idx.dtype == EPD_I64;
        for (uint32_t t = 0; t < pair.layer.n_tokens[r]; t++) {
            uint32_t ranks = 0;
            for (uint32_t k = 0; k < c->top_k; k++) {
                int64_t expert = wide ? idx[t * c->top_k + k] : idx32[t * c->top_k + k];
                if (expert >= 0)
                    ranks |= 1u << (uint32_t)expert / n_local;
            }
            for (uint32_t to = 0; to < c->world_size; to++)
                if (to != r && (ranks >> to & 1)) {
                    crossing[r]++;  /* dispatch */
                    crossing[to]++; /* combine */
                }
        }
    }
    for (uint32_t r = 0; r < c->world_size; r++)
        ck_assert_uint_eq(outcome.ranks[r].wire_bytes, crossing[r] * c->hidden * dtype_bytes(c->dtype));
    pair_fini(&pair);
}
END_TEST

/* A launch is armed and its client does not come; meanwhile other plans are made and go. */
START_TEST(plans_come_and_go_while_a_launch_waits_for_its_client)
{
    struct pair pair;
    struct outcome outcome;
    const struct op_case *c = spread_case();
    pair_init(&pair, c, EPD_SAVED_CONTEXT);
    launch_expect(&pair.forward, pair.layer.n_tokens, EPD_OK);
    launch_start(&pair.backward, pair.layer.n_tokens, (1u << c->world_size) - 1, &outcome);
    for (int i = 0; i < 3; i++) {
        struct crew_plan other;
        layer_forward_plan(&pair.layer, saved, pair.outputs, &other);
        crew_plan_destroy(&other);
    }
    ck_assert_int_eq(outcome.ended, 0);
    for (uint32_t r = 0; r < c->world_size; r++)
        flag_set(&pair.layer.crew.clients[r].page->plans[pair.backward.flag_idx[r]].ready);
    launch_wait(&pair.backward, &outcome);
    ck_assert_int_eq(outcome.ranks[0].status, EPD_OK);
    layer_check_backward(&pair.layer, pair.outputs);
    pair_fini(&pair);
}
END_TEST

/* The first queue that did not get through on its own. Then all are let through: streams that wait would hold up
 * the end of the process. */
static uint32_t queue_held_up(struct backend_queue *const *queues, struct page *page, const uint64_t *ready,
                              const uint64_t *end, uint32_t n)
{
    const struct backend *backend = &backend_cuda;
    struct epd_error error = {.status = EPD_OK};
    uint32_t held_up = n;
    for (uint32_t i = n; i-- > 0;) {
        flag_set(&page->plans[i].ready);
        for (int tries = 0; held_up == n && !backend->queue_reached(queues[i], end[i], &error); tries++) {
            if (tries == QUEUE_TRIES)
                held_up = i;
            usleep(1000);
        }
        for (uint32_t other = 0; other < i && held_up == n; other++)
            if (backend->queue_reached(queues[other], ready[other], &error))
                held_up = other; /* nobody has come there */
    }
    ck_assert_msg(error.status == EPD_OK, "%s", error.text);
    return held_up;
}

/* All queues that a device has wait for their clients; the last one made gets through first. */
START_TEST(queues_do_not_hold_up_each_other)
{
    enum { MAX = 64 };
    const struct node_config config = {.backend = EPD_BACKEND_CUDA};
    const struct backend *backend = &backend_cuda;
    struct backend_device *device;
    struct device_info info;
    struct epd_error error = {.status = EPD_OK};
    struct backend_queue *queues[MAX];
    struct backend_flag flags[MAX];
    struct page *page;
    uint64_t ready[MAX], end[MAX];
    int fd;
    uint32_t n = 0;
    ck_assert(backend->device_open(&config, 0, &device, &info, &error) == EPD_OK);
    ck_assert(page_create(&page, &fd, &error) == EPD_OK);
    while (n < MAX && backend->queue_create(device, &queues[n], &error) == EPD_OK) {
        flags[n] = (struct backend_flag){.page = page, .idx = n};
        ck_assert(backend->flag_open(device, &flags[n], &error) == EPD_OK);
        n++;
    }
    printf("%u queues: %s\n", n, error.text);
    ck_assert_int_eq(error.status, EPD_QUOTA);
    ck_assert_uint_ge(n, 24);
    for (uint32_t i = 0; i < n; i++)
        ck_assert(backend->flag_ready(queues[i], &flags[i], &ready[i], &error) == EPD_OK &&
                  backend->queue_ticket(queues[i], &end[i], &error) == EPD_OK);
    const uint32_t held_up = queue_held_up(queues, page, ready, end, n);
    ck_assert_msg(held_up == n, "queue %u of %u waits behind others, or not for its client", held_up, n);
    for (uint32_t i = 0; i < n; i++) {
        backend->flag_close(device, &flags[i]);
        backend->queue_destroy(queues[i]);
    }
    backend->device_close(device);
    page_close(page);
    close(fd);
}
END_TEST

START_TEST(rows_that_are_no_multiple_of_16_bytes_are_refused_when_the_plan_is_made)
{
    struct harness harness;
    struct crew crew;
    struct draft draft;
    struct epd_error error = {.status = EPD_OK};
    const struct message_group_config config = {.dtype = EPD_BF16,
                                                .overflow = EPD_OVERFLOW_ERROR,
                                                .n_experts = 8,
                                                .top_k = 2,
                                                .hidden = 68,
                                                .ffn = 64,
                                                .max_tokens = 32,
                                                .capacity_rows = 128,
                                                .alignment = 1};
    harness_open(&harness, 1, 0);
    crew_init(&crew, &harness, &config, 1, 1u << 20);
    struct slab x = client_take(&crew.clients[0], EPD_BF16, 2, 32, 68, 0);
    draft_init(&draft, &crew, 0, EPD_OP_DISPATCH);
    draft_bind(&draft, &crew, EPD_ROLE_X, &x);
    ck_assert_ptr_null(draft_create(&draft, &crew, &error));
    ck_assert_int_eq(error.status, EPD_INVALID_SHAPE);
    ck_assert_str_eq(
        error.text,
        "dispatch: hidden 68 of bf16 makes rows of 136 bytes, the cuda backend wants a multiple of 16");
    crew_fini(&crew);
    harness_close(&harness);
}
END_TEST

int main(void)
{
    enum { MAX_TESTS = 16 };
    const struct {
        const TTest *test;
        uint32_t n_gpus; /* with fewer it would check nothing */
    } all[] = {
        {queues_do_not_hold_up_each_other, 1},
        {a_launch_that_fails_after_others_have_gone_frees_them_and_the_group_works_again, 2},
        {steps_behind_a_failed_launch_end_and_later_ones_are_right, 1},
        {groups_whose_blocks_do_not_fit_or_whose_ranks_share_a_device_go_stage_by_stage, 1},
        {groups_whose_clients_come_in_opposite_orders_both_end, 2},
        {wire_bytes_count_a_token_once_for_each_rank, 2},
        {plans_come_and_go_while_a_launch_waits_for_its_client, 1},
        {a_replayed_layer_is_the_same_bits_whatever_is_routed, 1},
        {a_layer_that_cannot_be_recorded_goes_on_launch_by_launch, 1},
        {rows_that_are_no_multiple_of_16_bytes_are_refused_when_the_plan_is_made, 1},
    };
    const TTest *tests[MAX_TESTS];
    size_t n = 0;
    struct epd_error reason = {.status = EPD_OK};
    _Static_assert(COUNT(all) <= MAX_TESTS, "room for all");
    /* Before CUDA is asked anything: what the backend wants of it is read when it starts. */
    if (!node_backend_available(EPD_BACKEND_CUDA, &reason)) {
        printf("SKIP: %s\n", reason.text);
        return HARNESS_SKIPPED;
    }
    for (size_t i = 0; i < COUNT(all); i++) {
        if (all[i].n_gpus <= 1 || n_gpus() >= all[i].n_gpus)
            tests[n++] = all[i].test;
        else
            printf("SKIP: %s needs %u GPUs\n", all[i].test->name, all[i].n_gpus);
    }
    return suite_run("fused exchange", tests, n);
}
