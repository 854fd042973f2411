/* Steps that go wrong, steps of several groups at once, and plans that go away. */
#include <stdlib.h>
#include <string.h>

#include "tests/unit/ep/layer.h"

#define COUNT(array) (sizeof(array) / sizeof *(array))

static const struct layer_modes saved = {.saved = EPD_SAVED_CONTEXT};

static void count_gone(void *arg)
{
    ++*(int *)arg;
}

static void count_step(void *arg, const struct step_result *result)
{
    (void)result;
    ++*(uint32_t *)arg;
}

struct pair {
    struct harness harness;
    struct layer layer;
    struct layer_outputs outputs[HARNESS_MAX_RANKS];
    struct crew_plan forward, backward;
};

static void pair_init(struct pair *pair, uint32_t n_devices, const char *name)
{
    harness_open(&pair->harness, n_devices, 0);
    layer_init(&pair->layer, &pair->harness, op_case_named(name));
    layer_take_outputs(&pair->layer, pair->outputs);
    layer_forward_plan(&pair->layer, saved, pair->outputs, &pair->forward);
    layer_backward_plan(&pair->layer, saved, pair->outputs, &pair->forward, &pair->backward);
}

static void pair_fini(struct pair *pair)
{
    crew_plan_destroy(&pair->backward);
    crew_plan_destroy(&pair->forward);
    layer_fini(&pair->layer);
    harness_close(&pair->harness);
}

START_TEST(a_rank_that_did_not_set_ready_fails_alone_and_is_named)
{
    struct pair pair;
    struct outcome outcome;
    pair_init(&pair, 2, "uniform f32");
    for (uint32_t liar = 0; liar < 4; liar++) {
        launch_start(&pair.forward, pair.layer.n_tokens, 1u << liar, &outcome);
        launch_wait(&pair.forward, &outcome);
        for (uint32_t r = 0; r < 4; r++) {
            ck_assert_int_eq(outcome.ranks[r].status, r == liar ? EPD_PROTOCOL : EPD_PEER_LOST);
            ck_assert_int_eq(outcome.entries[r].rank, (int)liar);
            ck_assert_uint_eq(outcome.entries[r].phase, EPD_PHASE_GATHER);
            ck_assert_msg(strstr(outcome.entries[r].text, "launched without setting its ready flag") != NULL,
                          "%s", outcome.entries[r].text);
        }
    }
    launch_expect(&pair.forward, pair.layer.n_tokens, EPD_OK);
    layer_check_forward(&pair.layer, pair.outputs);
    pair_fini(&pair);
}
END_TEST

START_TEST(backward_needs_a_forward_since_the_last_backward)
{
    struct pair pair;
    struct outcome outcome;
    pair_init(&pair, 2, "uniform f32");
    launch(&pair.backward, pair.layer.n_tokens, &outcome);
    ck_assert_int_eq(outcome.ranks[0].status, EPD_INVALID_ARGUMENT);
    ck_assert_str_eq(outcome.entries[0].text, "moe_backward: its moe_forward plan has not run");
    ck_assert_str_eq(outcome.entries[1].text, "rank 0: moe_backward: its moe_forward plan has not run");
    launch_expect(&pair.forward, pair.layer.n_tokens, EPD_OK);
    launch_expect(&pair.backward, pair.layer.n_tokens, EPD_OK);
    launch(&pair.backward, pair.layer.n_tokens, &outcome);
    ck_assert_str_eq(outcome.entries[0].text,
                     "moe_backward: its moe_forward plan has not run since the last backward");
    /* A forward that failed leaves nothing to go back from. */
    int64_t *idx = pair.layer.ranks[1].topk_idx.data, kept = idx[0];
    idx[0] = 99;
    launch_expect(&pair.forward, pair.layer.n_tokens, EPD_BAD_ROUTING);
    idx[0] = kept;
    launch(&pair.backward, pair.layer.n_tokens, &outcome);
    ck_assert_str_eq(outcome.entries[0].text, "moe_backward: the last step of its moe_forward plan failed");
    launch_expect(&pair.forward, pair.layer.n_tokens, EPD_OK);
    uint32_t fewer[HARNESS_MAX_RANKS] = {127, 127, 126, 127};
    launch(&pair.backward, fewer, &outcome);
    ck_assert_str_eq(outcome.entries[2].text,
                     "moe_backward: n_tokens 126, want 127 (of the last step of its moe_forward plan)");
    /* Refused, so the context is still there. */
    launch_expect(&pair.backward, pair.layer.n_tokens, EPD_OK);
    layer_check_backward(&pair.layer, pair.outputs);
    pair_fini(&pair);
}
END_TEST

START_TEST(a_new_forward_takes_the_delayed_gradients_away)
{
    struct harness harness;
    struct layer layer;
    struct layer_outputs outputs[HARNESS_MAX_RANKS];
    struct crew_plan forward, backward, wgrad;
    struct outcome outcome;
    const struct layer_modes delayed = {.saved = EPD_SAVED_CONTEXT, .delay_wgrad = 1};
    harness_open(&harness, 1, 0);
    layer_init(&layer, &harness, op_case_named("one rank"));
    layer_take_outputs(&layer, outputs);
    layer_forward_plan(&layer, delayed, outputs, &forward);
    layer_backward_plan(&layer, delayed, outputs, &forward, &backward);
    layer_wgrad_plan(&layer, delayed, outputs, &backward, 0, &wgrad);
    launch_expect(&forward, layer.n_tokens, EPD_OK);
    launch(&wgrad, layer.n_tokens, &outcome);
    ck_assert_str_eq(outcome.entries[0].text,
                     "moe_wgrad: its moe_backward plan has not run since the last moe_wgrad");
    launch_expect(&backward, layer.n_tokens, EPD_OK);
    launch_expect(&forward, layer.n_tokens, EPD_OK);
    launch(&wgrad, layer.n_tokens, &outcome);
    ck_assert_str_eq(outcome.entries[0].text,
                     "moe_wgrad: the moe_forward plan has run again since the backward");
    launch_expect(&backward, layer.n_tokens, EPD_OK);
    launch_expect(&wgrad, layer.n_tokens, EPD_OK);
    layer_check_backward(&layer, outputs);
    crew_plan_destroy(&wgrad);
    crew_plan_destroy(&backward);
    crew_plan_destroy(&forward);
    layer_fini(&layer);
    harness_close(&harness);
}
END_TEST

START_TEST(submit_refuses_dead_plans_and_too_many_tokens)
{
    struct pair pair;
    struct epd_error error;
    const uint64_t seqs[HARNESS_MAX_RANKS] = {0};
    pair_init(&pair, 2, "uniform f32");
    uint32_t more[HARNESS_MAX_RANKS] = {127, 128, 127, 127};
    ck_assert_int_eq(step_submit(pair.forward.set, more, seqs, NULL, NULL, &error), EPD_INVALID_SHAPE);
    ck_assert_str_eq(error.text, "moe_forward: n_tokens 128 of rank 1, want at most 127 (T of its plan)");
    /* Backward holds the forward plans: they are dead at once, gone when the backward plans are. */
    static int gone;
    gone = 0;
    plan_destroy(pair.forward.plans[1], count_gone, &gone);
    ck_assert_int_eq(step_submit(pair.forward.set, pair.layer.n_tokens, seqs, NULL, NULL, &error),
                     EPD_UNKNOWN_ID);
    ck_assert_str_eq(error.text, "moe_forward: the plan of rank 1 was destroyed");
    harness_settle(&pair.harness);
    ck_assert_int_eq(gone, 0);
    crew_plan_destroy(&pair.backward);
    harness_wait(&pair.harness, &gone);
    ck_assert_int_eq(gone, 1);
    ck_assert_int_eq(step_submit(pair.forward.set, pair.layer.n_tokens, seqs, NULL, NULL, &error),
                     EPD_UNKNOWN_ID);
    crew_plan_destroy_sets(&pair.forward);
    for (uint32_t r = 0; r < 4; r++)
        if (r != 1)
            harness_destroy_plan(&pair.harness, pair.forward.plans[r]);
    layer_fini(&pair.layer);
    harness_close(&pair.harness);
}
END_TEST

START_TEST(plans_and_sets_may_go_while_a_step_runs)
{
    struct pair pair;
    struct outcome outcome;
    int gone = 0;
    pair_init(&pair, 2, "uniform f32");
    launch_start(&pair.forward, pair.layer.n_tokens, 0, &outcome);
    crew_plan_destroy_sets(&pair.forward);
    crew_plan_destroy_sets(&pair.backward);
    for (uint32_t r = 0; r < 4; r++) {
        plan_destroy(pair.forward.plans[r], count_gone, &gone);
        plan_destroy(pair.backward.plans[r], count_gone, &gone);
    }
    launch_wait(&pair.forward, &outcome);
    ck_assert_int_eq(outcome.ranks[3].status, EPD_OK);
    harness_settle(&pair.harness);
    ck_assert_int_eq(gone, 8);
    layer_fini(&pair.layer);
    harness_close(&pair.harness);
}
END_TEST

START_TEST(several_groups_run_at_once_with_many_steps_in_flight)
{
    enum { N_GROUPS = 3, N_STEPS = 40 };
    struct harness harness;
    static struct layer layers[N_GROUPS];
    static struct layer_outputs outputs[N_GROUPS][HARNESS_MAX_RANKS];
    struct crew_plan forward[N_GROUPS], backward[N_GROUPS];
    static struct outcome forwards[N_GROUPS], backwards[N_GROUPS];
    const char *names[N_GROUPS] = {"uniform f32", "odd sizes bf16", "eight ranks"};
    harness_open(&harness, 4, 0);
    for (int i = 0; i < N_GROUPS; i++) {
        layer_init(&layers[i], &harness, op_case_named(names[i]));
        layer_take_outputs(&layers[i], outputs[i]);
        layer_forward_plan(&layers[i], saved, outputs[i], &forward[i]);
        layer_backward_plan(&layers[i], saved, outputs[i], &forward[i], &backward[i]);
    }
    for (int step = 0; step < N_STEPS; step++) {
        for (int i = 0; i < N_GROUPS; i++) {
            launch_start(&forward[i], layers[i].n_tokens, 0, &forwards[i]);
            launch_start(&backward[i], layers[i].n_tokens, 0, &backwards[i]);
        }
        for (int i = 0; i < N_GROUPS; i++) {
            launch_wait(&forward[i], &forwards[i]);
            launch_wait(&backward[i], &backwards[i]);
            ck_assert_int_eq(forwards[i].ranks[0].status, EPD_OK);
            ck_assert_int_eq(backwards[i].ranks[0].status, EPD_OK);
        }
    }
    for (int i = 0; i < N_GROUPS; i++) {
        layer_check_forward(&layers[i], outputs[i]);
        layer_check_backward(&layers[i], outputs[i]);
        crew_plan_destroy(&backward[i]);
        crew_plan_destroy(&forward[i]);
        layer_fini(&layers[i]);
    }
    harness_close(&harness);
}
END_TEST

START_TEST(a_full_lane_answers_busy)
{
    struct pair pair;
    struct epd_error error = {.status = EPD_OK};
    const uint64_t seqs[HARNESS_MAX_RANKS] = {0};
    uint32_t n = 0;
    pair_init(&pair, 1, "one rank");
    struct page_plan *words = &pair.layer.crew.clients[0].page->plans[pair.forward.flag_idx[0]];
    static uint32_t n_ended;
    n_ended = 0;
    while (n < 2048 &&
           step_submit(pair.forward.set, pair.layer.n_tokens, seqs, count_step, &n_ended, &error) == EPD_OK)
        n++;
    ck_assert_uint_eq(n, 1024);
    ck_assert_int_eq(error.status, EPD_BUSY);
    harness_settle(&pair.harness);
    ck_assert_uint_eq(n_ended, 1024);
    /* None of them had its ready flag set. */
    ck_assert_uint_eq(atomic_load(&words->failed), 1024);
    ck_assert_uint_eq(atomic_load(&words->completed), 1024);
    ck_assert_int_eq(flag_wait(&words->done, 0), EPD_OK);
    pair.forward.seen[0] = atomic_load(&pair.layer.crew.clients[0].page->write_idx);
    launch_expect(&pair.forward, pair.layer.n_tokens, EPD_OK);
    pair_fini(&pair);
}
END_TEST

START_TEST(a_launch_that_never_ran_is_failed_by_the_loop)
{
    struct pair pair;
    struct page_entry entry;
    uint64_t seen = 0;
    pair_init(&pair, 1, "one rank");
    struct page *page = pair.layer.crew.clients[0].page;
    struct page_plan *words = &page->plans[pair.forward.flag_idx[0]];
    const struct epd_error error = {.status = EPD_TIMEOUT, .text = "rank 1 did not come"};
    flag_set(&words->ready);
    plan_fail(pair.forward.plans[0], 42, &error, EPD_PHASE_GATHER, 1);
    ck_assert_int_eq(flag_wait(&words->done, 0), EPD_OK);
    ck_assert_uint_eq(atomic_load(&words->ready), 0);
    ck_assert_uint_eq(atomic_load(&words->failed), 1);
    ck_assert_uint_eq(atomic_load(&words->completed), 1);
    ck_assert_int_eq(page_take(page, 1000 + pair.forward.flag_idx[0], &seen, &entry), 1);
    ck_assert_uint_eq(entry.status, EPD_TIMEOUT);
    ck_assert_uint_eq(entry.seq, 42);
    ck_assert_int_eq(entry.rank, 1);
    ck_assert_str_eq(entry.text, "rank 1 did not come");
    pair_fini(&pair);
}
END_TEST

START_TEST(a_barrier_brings_all_ranks_together)
{
    struct harness harness;
    struct layer layer;
    struct draft *drafts = values_alloc(HARNESS_MAX_RANKS, sizeof *drafts);
    struct crew_plan plan;
    harness_open(&harness, 3, 0);
    layer_init(&layer, &harness, op_case_named("eight ranks"));
    for (uint32_t r = 0; r < 8; r++)
        draft_init(&drafts[r], &layer.crew, r, EPD_OP_BARRIER);
    crew_plan_create(&plan, &layer.crew, drafts, 8);
    if (layer.crew.n_nodes == 1) /* else it has what it swaps with */
        ck_assert_uint_eq(team_heap_bytes(layer.crew.team, 0), 0);
    for (int i = 0; i < 200; i++)
        launch_expect(&plan, layer.n_tokens, EPD_OK);
    crew_plan_destroy(&plan);
    free(drafts);
    layer_fini(&layer);
    harness_close(&harness);
}
END_TEST

/* What a moe step takes is counted per rank, and the plans of a team share their scratch. */
START_TEST(heap_bytes_are_counted_per_rank)
{
    struct pair pair;
    struct device_info info;
    pair_init(&pair, 4, "uniform f32");
    struct layer *layer = &pair.layer;
    const uint32_t node = 2 / (4 / layer->crew.n_nodes);
    struct team *team = layer->crew.teams[node];
    uint64_t before = team_heap_bytes(team, 2);
    struct crew_plan more;
    layer_forward_plan(layer, (struct layer_modes){.saved = EPD_SAVED_RECOMPUTE}, pair.outputs, &more);
    uint64_t with_slots = team_heap_bytes(team, 2);
    crew_plan_destroy(&more);
    harness_settle(&pair.harness);
    /* The regions stay with the team; the routing of the plan is gone. */
    uint64_t after = team_heap_bytes(team, 2);
    ck_assert_uint_gt(with_slots, after);
    layer_forward_plan(layer, (struct layer_modes){.saved = EPD_SAVED_RECOMPUTE}, pair.outputs, &more);
    ck_assert_uint_eq(team_heap_bytes(team, 2), with_slots);
    crew_plan_destroy(&more);
    ck_assert_uint_ge(after, before);
    node_device_info(pair.harness.nodes[node], 2, &info);
    ck_assert_uint_eq(info.heap_bytes, after + memory_bytes(layer->crew.clients[2].memory));
    pair_fini(&pair);
}
END_TEST

int main(void)
{
    const TTest *const tests[] = {
        a_rank_that_did_not_set_ready_fails_alone_and_is_named,
        backward_needs_a_forward_since_the_last_backward,
        a_new_forward_takes_the_delayed_gradients_away,
        submit_refuses_dead_plans_and_too_many_tokens,
        plans_and_sets_may_go_while_a_step_runs,
        several_groups_run_at_once_with_many_steps_in_flight,
        a_full_lane_answers_busy,
        a_launch_that_never_ran_is_failed_by_the_loop,
        a_barrier_brings_all_ranks_together,
        heap_bytes_are_counted_per_rank,
    };
    return suite_run("ep step", tests, COUNT(tests));
}
