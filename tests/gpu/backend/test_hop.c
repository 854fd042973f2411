/* Groups over two nodes on CUDA: a rank whose host fails in the midst of a step. Nobody may wait for anybody: the step ends
 * soon on all nodes and names the rank, and the next one goes well; and every repeat gives the same bits. */
#include <stdlib.h>
#include <string.h>

#include "ep/clock.h"
#include "ep/cuda_exchange.h"
#include "tests/gpu/backend/cases.h"
#include "tests/gpu/backend/pair.h"

#define COUNT(array) (sizeof(array) / sizeof *(array))
/* Far less than the limit of a swap (60 s in the harness). */
#define STEP_LIMIT_NS 10000000000ull

/* ---- a launch that fails ----
 * The linker puts this in the place of the real one (--wrap). */

static _Atomic int fail_rank = -1, fail_after, n_seen;

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
    const uint32_t rank = args->set.first_rank + args->shape.rank;
    if (rank == 0)
        atomic_fetch_add(&n_seen, 1);
    if ((int)rank == atomic_load(&fail_rank) && atomic_fetch_sub(&fail_after, 1) == 0)
        return error_set(error, EPD_INTERNAL, "injected");
    return __real_cuda_exchange_launch(op, stage, args, stream, error);
}

static void check_pair(struct pair *pair)
{
    layer_poison_outputs(&pair->layer, pair->outputs);
    launch_expect(&pair->forward, pair->layer.n_tokens, EPD_OK);
    launch_expect(&pair->backward, pair->layer.n_tokens, EPD_OK);
    layer_check_forward(&pair->layer, pair->outputs);
    layer_check_backward(&pair->layer, pair->outputs);
}

/* The number-th launch of the rank in a step of the plan fails. */
static void check_failure(struct crew_plan *plan, const uint32_t *n_tokens, int rank, int number)
{
    struct outcome outcome;
    const uint64_t begun_ns = clock_now_ns();
    atomic_store(&fail_after, number);
    atomic_store(&fail_rank, rank);
    launch(plan, n_tokens, &outcome);
    atomic_store(&fail_rank, -1);
    ck_assert_msg(clock_now_ns() - begun_ns < STEP_LIMIT_NS, "rank %d launch %d: nodes waited", rank, number);
    for (uint32_t r = 0; r < plan->n; r++) {
        ck_assert_msg(outcome.ranks[r].status == EPD_INTERNAL, "rank %d launch %d: rank %u gets %s (%s)",
                      rank, number, r, status_name(outcome.ranks[r].status), outcome.entries[r].text);
        ck_assert_msg(outcome.entries[r].rank == rank, "rank %d launch %d: rank %u is told of rank %d (%s)",
                      rank, number, r, outcome.entries[r].rank, outcome.entries[r].text);
    }
}

/* Four launches, of the first and the last rank by turns. */
static void check_failures(struct crew_plan *before, struct crew_plan *plan, const uint32_t *n_tokens)
{
    if (before)
        launch_expect(before, n_tokens, EPD_OK);
    atomic_store(&n_seen, 0);
    launch_expect(plan, n_tokens, EPD_OK);
    const int last = atomic_load(&n_seen) - 1, numbers[] = {0, 1, last / 2, last};
    for (size_t i = 0; i < COUNT(numbers); i++) {
        if (before)
            launch_expect(before, n_tokens, EPD_OK);
        check_failure(plan, n_tokens, i % 2 ? (int)plan->n - 1 : 0, numbers[i]);
    }
}

START_TEST(a_rank_that_fails_in_a_layer_lets_no_node_wait)
{
    static const enum epd_saved kept[] = {EPD_SAVED_CONTEXT, EPD_SAVED_RECOMPUTE};
    for (size_t i = 0; i < COUNT(kept); i++) {
        struct pair pair;
        pair_init(&pair, cuda_case_named("uniform bf16"), kept[i]);
        check_pair(&pair);
        check_failures(NULL, &pair.forward, pair.layer.n_tokens);
        check_failures(&pair.forward, &pair.backward, pair.layer.n_tokens);
        check_pair(&pair);
        pair_fini(&pair);
    }
}
END_TEST

START_TEST(repeats_over_nodes_give_the_same_bits)
{
    struct pair pair;
    struct layer_outputs first[HARNESS_MAX_RANKS];
    struct crew_plan forward, backward;
    const struct layer_modes modes = {.saved = EPD_SAVED_CONTEXT};
    pair_init(&pair, cuda_case_named("uniform bf16"), modes.saved);
    layer_take_outputs(&pair.layer, first);
    layer_forward_plan(&pair.layer, modes, first, &forward);
    layer_backward_plan(&pair.layer, modes, first, &forward, &backward);
    launch_expect(&forward, pair.layer.n_tokens, EPD_OK);
    launch_expect(&backward, pair.layer.n_tokens, EPD_OK);
    for (int i = 0; i < 5; i++) {
        check_pair(&pair);
        layer_check_same(&pair.layer, pair.outputs, first);
    }
    crew_plan_destroy(&backward);
    crew_plan_destroy(&forward);
    pair_fini(&pair);
}
END_TEST

int main(void)
{
    const TTest *const tests[] = {
        repeats_over_nodes_give_the_same_bits,
        a_rank_that_fails_in_a_layer_lets_no_node_wait,
    };
    (void)setenv("EPD_TEST_NODES", "2", 1);
    (void)setenv("NCCL_NVLS_ENABLE", "0", 1);
    return suite_run("gpu hop", tests, COUNT(tests));
}
