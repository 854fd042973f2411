/* Groups over two nodes on CUDA: a rank whose host fails in the midst of a step. Nobody may wait for anybody: the step ends
 * soon on all nodes and names the rank, and the next one goes well; and every repeat gives the same bits. */
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "ep/clock.h"
#include "ep/cuda_exchange.h"
#include "ep/hop.h"
#include "ep/plan_impl.h"
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

/* ---- eager ---- */

/* Tokens that a rank's rail carries there and back of one step: its own to the other node, and those of the rank there. */
static uint64_t count_crossing(const struct layer *layer, uint32_t rank)
{
    const struct op_case *c = layer->op_case;
    const uint32_t n_here = c->world_size / 2, other = (rank + n_here) % c->world_size;
    const uint32_t from[] = {rank, other};
    uint64_t n = 0;
    for (int i = 0; i < 2; i++)
        for (size_t t = 0; t < layer->n_tokens[from[i]]; t++) {
            int crosses = 0;
            for (uint32_t k = 0; k < c->top_k; k++) {
                const int64_t expert = layer->routing.ranks[from[i]].expert[t * c->top_k + k];
                crosses |= expert >= 0 && (size_t)expert / layer->n_local / n_here != from[i] / n_here;
            }
            n += (uint64_t)crosses;
        }
    return n;
}

/* As client/epd.h says, both ways, of so many tokens. */
static uint64_t crossing_bytes(const struct layer *layer, uint64_t n_tokens)
{
    const struct op_case *c = layer->op_case;
    const uint64_t row = c->hidden * dtype_bytes(c->dtype), choices = 4 * c->top_k;
    const uint64_t told = 256 + (4ull * c->n_experts + 255) / 256 * 256;
    return 2 * (told + sizeof(struct hop_report)) + n_tokens * (2 * choices + 2 * row);
}

START_TEST(eager_messages_bring_the_same_bits_in_as_many_bytes_as_cross)
{
    static const char *const names[] = {"uniform bf16", "zero tokens rank", "receives nothing", "zipf",
                                        "no tokens at all"};
    for (size_t i = 0; i < COUNT(names); i++) {
        struct pair pair;
        struct layer_outputs outputs[HARNESS_MAX_RANKS];
        struct crew_plan forward, backward;
        struct outcome outcome;
        struct layer_modes modes = {.saved = EPD_SAVED_CONTEXT, .crossing = EPD_CROSSING_EAGER};
        pair_init(&pair, cuda_case_named(names[i]), modes.saved);
        layer_take_outputs(&pair.layer, outputs);
        layer_forward_plan(&pair.layer, modes, outputs, &forward);
        layer_backward_plan(&pair.layer, modes, outputs, &forward, &backward);
        check_pair(&pair);
        for (int turn = 0; turn < 3; turn++) {
            layer_poison_outputs(&pair.layer, outputs);
            launch(&forward, pair.layer.n_tokens, &outcome);
            for (uint32_t r = 0; r < forward.n; r++) {
                ck_assert_msg(outcome.ranks[r].status == EPD_OK, "%s", outcome.entries[r].text);
                ck_assert_uint_eq(outcome.ranks[r].network_bytes,
                                  crossing_bytes(&pair.layer, count_crossing(&pair.layer, r)));
            }
            launch_expect(&backward, pair.layer.n_tokens, EPD_OK);
            layer_check_same(&pair.layer, outputs, pair.outputs);
        }
        crew_plan_destroy(&backward);
        crew_plan_destroy(&forward);
        pair_fini(&pair);
    }
}
END_TEST

/* Plans for fewer tokens than the group allows: up to 8. */
static void leave_few_tokens(struct layer *layer)
{
    for (uint32_t r = 0; r < layer->op_case->world_size; r++) {
        struct layer_inputs *in = &layer->ranks[r];
        struct slab *all[] = {&in->x, &in->topk_idx, &in->topk_weights, &in->dout};
        layer->n_tokens[r] = 5 + r;
        for (size_t i = 0; i < COUNT(all); i++) {
            all[i]->bytes = all[i]->bytes / (uint64_t)all[i]->shape[0] * layer->n_tokens[r];
            all[i]->shape[0] = layer->n_tokens[r];
        }
    }
}

START_TEST(static_messages_are_as_long_as_the_largest_plan_of_all_ranks)
{
    static const enum epd_crossing crossings[] = {EPD_CROSSING_STATIC, EPD_CROSSING_EAGER};
    struct harness harness;
    struct layer layer;
    struct layer_outputs outputs[2][HARNESS_MAX_RANKS];
    harness_open(&harness, 4, 0);
    layer_init(&layer, &harness, cuda_case_named("uniform bf16"));
    leave_few_tokens(&layer);
    for (int i = 0; i < 2; i++) {
        layer_take_outputs(&layer, outputs[i]);
        const struct layer_modes modes = {.saved = EPD_SAVED_CONTEXT, .crossing = crossings[i]};
        struct crew_plan forward, backward;
        struct outcome outcome;
        layer_forward_plan(&layer, modes, outputs[i], &forward);
        layer_backward_plan(&layer, modes, outputs[i], &forward, &backward);
        launch(&forward, layer.n_tokens, &outcome);
        for (uint32_t r = 0; r < forward.n; r++) {
            const uint64_t n = i == 0 ? 2 * layer.n_tokens[forward.n - 1] : count_crossing(&layer, r);
            ck_assert_msg(outcome.ranks[r].status == EPD_OK, "%s", outcome.entries[r].text);
            ck_assert_uint_eq(outcome.ranks[r].network_bytes, crossing_bytes(&layer, n));
        }
        launch_expect(&backward, layer.n_tokens, EPD_OK);
        crew_plan_destroy(&backward);
        crew_plan_destroy(&forward);
    }
    layer_check_same(&layer, outputs[0], outputs[1]);
    layer_fini(&layer);
    harness_close(&harness);
}
END_TEST

START_TEST(what_crosses_of_a_static_routing_cannot_cross_eagerly)
{
    struct pair pair;
    struct epd_error error = {.status = EPD_OK};
    struct draft *draft = values_alloc(1, sizeof *draft);
    pair_init(&pair, cuda_case_named("uniform bf16"), EPD_SAVED_CONTEXT);
    const enum epd_crossing crossing = pair.forward.plans[0]->crossing;
    draft_init(draft, &pair.layer.crew, 0, EPD_OP_MOE_BACKWARD);
    draft->request.context = pair.forward.plans[0];
    draft->request.crossing = EPD_CROSSING_EAGER;
    draft_bind(draft, &pair.layer.crew, EPD_ROLE_DOUT, &pair.layer.ranks[0].dout);
    struct plan *plan = draft_create(draft, &pair.layer.crew, &error);
    ck_assert_int_eq(error.status, crossing == EPD_CROSSING_EAGER ? EPD_OK : EPD_UNSUPPORTED);
    if (plan)
        harness_destroy_plan(&pair.harness, plan);
    free(draft);
    pair_fini(&pair);
}
END_TEST

static void set_ready(const struct crew_plan *plan, uint32_t first)
{
    for (uint32_t i = first; i < plan->n; i++)
        flag_set(&plan->crew->clients[plan->ranks[i]].page->plans[plan->flag_idx[i]].ready);
}

/* Two groups on the same GPUs: the first one's client comes late. */
START_TEST(an_eager_step_whose_client_is_late_holds_up_its_own_group_alone)
{
    const struct layer_modes modes = {.saved = EPD_SAVED_CONTEXT, .crossing = EPD_CROSSING_EAGER};
    const struct op_case *c = cuda_case_named("uniform bf16");
    struct pair late;
    struct crew_plan late_forward, late_backward;
    struct layer prompt;
    struct layer_outputs outputs[HARNESS_MAX_RANKS];
    struct crew_plan forward;
    struct outcome first, second, other;
    pair_init(&late, c, EPD_SAVED_CONTEXT);
    layer_init(&prompt, &late.harness, c);
    layer_take_outputs(&prompt, outputs);
    layer_forward_plan(&prompt, modes, outputs, &forward);
    layer_forward_plan(&late.layer, modes, late.outputs, &late_forward);
    layer_backward_plan(&late.layer, modes, late.outputs, &late_forward, &late_backward);
    layer_poison_outputs(&late.layer, late.outputs);
    launch_start(&late_forward, late.layer.n_tokens, UINT32_MAX, &first);
    launch_start(&late_backward, late.layer.n_tokens, 0, &second);
    for (int i = 0; i < 20; i++) {
        layer_poison_outputs(&prompt, outputs);
        launch(&forward, prompt.n_tokens, &other);
        layer_check_forward(&prompt, outputs);
    }
    ck_assert(!first.ended && !second.ended);
    set_ready(&late_forward, 0);
    launch_wait(&late_forward, &first);
    launch_wait(&late_backward, &second);
    for (uint32_t r = 0; r < late_forward.n; r++)
        ck_assert_msg(!first.ranks[r].status && !second.ranks[r].status, "%s; %s", first.entries[r].text,
                      second.entries[r].text);
    layer_check_forward(&late.layer, late.outputs);
    layer_check_backward(&late.layer, late.outputs);
    crew_plan_destroy(&forward);
    crew_plan_destroy(&late_backward);
    crew_plan_destroy(&late_forward);
    layer_fini(&prompt);
    pair_fini(&late);
}
END_TEST

static void poll_for(struct harness *harness, unsigned ms)
{
    const struct timespec nap = {.tv_nsec = 1000000};
    for (unsigned i = 0; i < ms; i++) {
        for (uint32_t node = 0; node < harness->n_nodes; node++)
            (void)node_poll(harness->nodes[node]);
        (void)nanosleep(&nap, NULL);
    }
}

/* Node 0 has told what crosses, and waits for node 1, whose clients do not come: both are given up. */
START_TEST(an_abort_ends_an_eager_step_that_waits_for_another_node)
{
    const struct layer_modes modes = {.saved = EPD_SAVED_CONTEXT, .crossing = EPD_CROSSING_EAGER};
    const struct epd_error why = {EPD_PEER_LOST, "given up"};
    struct pair pair;
    struct crew_plan forward, backward;
    struct outcome first, second;
    pair_init(&pair, cuda_case_named("uniform bf16"), EPD_SAVED_CONTEXT);
    layer_forward_plan(&pair.layer, modes, pair.outputs, &forward);
    layer_backward_plan(&pair.layer, modes, pair.outputs, &forward, &backward);
    const uint32_t n_here = forward.n / 2, there = ~0u << n_here;
    launch_start(&forward, pair.layer.n_tokens, there, &first);
    launch_start(&backward, pair.layer.n_tokens, 0, &second);
    poll_for(&pair.harness, 100);
    ck_assert(!first.ended && !second.ended);
    const uint64_t begun_ns = clock_now_ns();
    for (uint32_t node = 0; node < 2; node++)
        rails_abort(pair.layer.crew.rails[node], &why);
    set_ready(&forward, n_here);
    launch_wait(&forward, &first);
    launch_wait(&backward, &second);
    ck_assert_msg(clock_now_ns() - begun_ns < STEP_LIMIT_NS, "somebody waited");
    for (uint32_t r = 0; r < forward.n; r++) {
        ck_assert_msg(first.ranks[r].status == EPD_PEER_LOST, "%s", first.entries[r].text);
        ck_assert_int_ne(second.ranks[r].status, EPD_OK);
    }
    crew_plan_destroy(&backward);
    crew_plan_destroy(&forward);
    pair_fini(&pair);
}
END_TEST

int main(void)
{
    const TTest *const tests[] = {
        eager_messages_bring_the_same_bits_in_as_many_bytes_as_cross,
        static_messages_are_as_long_as_the_largest_plan_of_all_ranks,
        what_crosses_of_a_static_routing_cannot_cross_eagerly,
        an_eager_step_whose_client_is_late_holds_up_its_own_group_alone,
        an_abort_ends_an_eager_step_that_waits_for_another_node,
        repeats_over_nodes_give_the_same_bits,
        a_rank_that_fails_in_a_layer_lets_no_node_wait,
    };
    (void)setenv("EPD_TEST_NODES", "2", 1);
    (void)setenv("NCCL_NVLS_ENABLE", "0", 1);
    return suite_run("gpu hop", tests, COUNT(tests));
}
