/* The course of eager steps where work goes on later: what is told, what crosses then and later, who waits for whom, and
 * what becomes of a step that fails before or behind it. What the bytes are is for tests/gpu. */
#include <string.h>
#include <time.h>

#include "ep/clock.h"
#include "ep/node_impl.h"
#include "ep/plan_impl.h"
#include "ep/rails.h"
#include "ep/step_impl.h"
#include "tests/unit/ep/fake_nccl.h"
#include "tests/unit/ep/harness.h"
#include "tests/unit/ep/later.h"

#define COUNT(array) (sizeof(array) / sizeof *(array))
#define MS           1000000ull

extern const struct hop_form hop_form_cuda;

/* ---- a group ---- */

struct pair {
    struct harness harness;
    struct crew crew;
    struct crew_plan dispatch, combine;
};

static const uint32_t all_tokens[N_RANKS] = {MAX_TOKENS, MAX_TOKENS};
static const struct message_group_config config = {.n_experts = N_EXPERTS,
                                                   .top_k = TOP_K,
                                                   .hidden = HIDDEN,
                                                   .max_tokens = MAX_TOKENS,
                                                   .capacity_rows = 64,
                                                   .alignment = 1,
                                                   .dtype = EPD_F32,
                                                   .overflow = EPD_OVERFLOW_ERROR};

static void note(void *arg, const struct epd_error *error)
{
    ck_assert_msg(error->status == EPD_OK, "%s", error->text);
    *(int *)arg = 1;
}

static void connect_rails(struct pair *pair)
{
    struct transport_address addresses[2 * N_RANKS] = {{0}};
    const uint32_t devices[N_RANKS] = {0, 1};
    struct epd_error error = {.status = EPD_OK};
    struct rails **rails = &pair->crew.rails[0];
    int told = 0;
    ck_assert_int_eq(rails_open(pair->harness.node, 0, N_RANKS, devices, note, &told, rails, &error), EPD_OK);
    harness_wait(&pair->harness, &told);
    for (uint32_t rank = 0; rank < N_RANKS; rank++) {
        addresses[rank] = *rails_address(*rails, rank);
        addresses[N_RANKS + rank] = (struct transport_address){.bytes = 1, .node = 1};
    }
    told = 0;
    ck_assert_int_eq(rails_connect(*rails, 2, addresses, 60000 * MS, note, &told, &error), EPD_OK);
    harness_wait(&pair->harness, &told);
}

/* Before its first plan. */
static void span_two_nodes(struct pair *pair)
{
    struct team *team = pair->crew.team;
    struct epd_error error = {.status = EPD_OK};
    connect_rails(pair);
    ck_assert_int_eq(problem_init(&team->problem, &config, 2 * N_RANKS, &error), EPD_OK);
    ck_assert_int_eq(problem_span(&team->problem, 2, 0, &error), EPD_OK);
    team->rails = pair->crew.rails[0];
    team->hop = &hop_form_cuda;
}

static void bind_dispatch(struct draft *draft, struct crew *crew, uint32_t rank)
{
    static const int32_t topk_idx[MAX_TOKENS * TOP_K];
    struct client *client = &crew->clients[rank];
    const struct slab x = client_take(client, EPD_F32, 2, MAX_TOKENS, HIDDEN, 0);
    const struct slab topk = client_put(client, EPD_I32, 2, MAX_TOKENS, TOP_K, 0, topk_idx);
    const struct slab recv_x = client_take(client, EPD_F32, 2, 64, HIDDEN, 0);
    draft_bind(draft, crew, EPD_ROLE_X, &x);
    draft_bind(draft, crew, EPD_ROLE_TOPK_IDX, &topk);
    draft_bind(draft, crew, EPD_ROLE_RECV_X, &recv_x);
}

static void bind_combine(struct draft *draft, struct crew *crew, uint32_t rank)
{
    struct client *client = &crew->clients[rank];
    const struct slab y = client_take(client, EPD_F32, 2, 64, HIDDEN, 0);
    const struct slab out = client_take(client, EPD_F32, 2, MAX_TOKENS, HIDDEN, 0);
    draft_bind(draft, crew, EPD_ROLE_Y, &y);
    draft_bind(draft, crew, EPD_ROLE_OUT, &out);
}

static void make_plan(struct crew *crew, enum epd_op op, enum epd_crossing crossing,
                      const struct crew_plan *context, struct crew_plan *plan)
{
    static struct draft drafts[N_RANKS];
    for (uint32_t rank = 0; rank < N_RANKS; rank++) {
        draft_init(&drafts[rank], crew, rank, op);
        drafts[rank].request.crossing = crossing;
        drafts[rank].request.context = context ? context->plans[rank] : NULL;
        if (op == EPD_OP_DISPATCH)
            bind_dispatch(&drafts[rank], crew, rank);
        if (op == EPD_OP_COMBINE)
            bind_combine(&drafts[rank], crew, rank);
    }
    crew_plan_create(plan, crew, drafts, N_RANKS);
}

static void pair_init(struct pair *pair)
{
    later_reset();
    harness_open(&pair->harness, N_RANKS, 0);
    pair->harness.node->backend = &later_backend;
    crew_init(&pair->crew, &pair->harness, &config, N_RANKS, 1 << 16);
    span_two_nodes(pair);
    make_plan(&pair->crew, EPD_OP_DISPATCH, EPD_CROSSING_EAGER, NULL, &pair->dispatch);
    make_plan(&pair->crew, EPD_OP_COMBINE, EPD_CROSSING_UNSPECIFIED, &pair->dispatch, &pair->combine);
    for (uint32_t rank = 0; rank < N_RANKS; rank++) {
        atomic_store(&later.sends[rank], 3 + rank);
        atomic_store(&later.comes[rank], 7 + rank);
    }
}

/* Its plans are gone. */
static void group_fini(struct pair *pair)
{
    crew_fini(&pair->crew);
    harness_settle(&pair->harness);
    harness_close(&pair->harness);
    fake_nccl_expect_clean(0);
    fake_stream_destroy(fake_nccl.queue_stream);
}

static void pair_fini(struct pair *pair)
{
    crew_plan_destroy(&pair->combine);
    crew_plan_destroy(&pair->dispatch);
    group_fini(pair);
}

static void expect(const struct outcome *outcome, enum epd_status status)
{
    for (uint32_t rank = 0; rank < N_RANKS; rank++)
        ck_assert_msg(outcome->ranks[rank].status == status, "rank %u: %s, %s", rank,
                      status_name(outcome->ranks[rank].status), outcome->entries[rank].text);
}

/* What a step of so many tokens moves on the rail of a rank, both ways. */
static void expect_bytes(const struct outcome *outcome, uint32_t rank, uint64_t n_told, uint64_t n_tokens,
                         uint64_t token_bytes)
{
    ck_assert_uint_eq(outcome->ranks[rank].network_bytes,
                      2 * (n_told * TOLD_BYTES + REPORT_BYTES) + n_tokens * token_bytes);
}

static void expect_dispatched(const struct outcome *outcome, uint32_t rank, uint64_t n_tokens)
{
    expect_bytes(outcome, rank, 1, n_tokens, CHOICE_BYTES + ROW_BYTES);
}

static void sleep_ms(long ms)
{
    const struct timespec time = {.tv_nsec = ms * 1000000};
    (void)nanosleep(&time, NULL);
}

static void poll_for(struct harness *harness, unsigned ms)
{
    for (unsigned i = 0; i < ms; i++) {
        (void)node_poll(harness->node);
        sleep_ms(1);
    }
}

/* ---- sizes ---- */

START_TEST(messages_are_as_long_as_what_crosses_there_and_back)
{
    struct pair pair;
    struct outcome outcome;
    pair_init(&pair);
    for (uint32_t n = 0; n < 4; n++) {
        for (uint32_t rank = 0; rank < N_RANKS; rank++) {
            atomic_store(&later.sends[rank], n == 1 ? 0 : 2 * n + rank);
            atomic_store(&later.comes[rank], n == 2 ? 0 : 3 * n + rank);
        }
        const uint64_t n_tokens[N_RANKS] = {later.sends[0] + later.comes[0], later.sends[1] + later.comes[1]};
        launch(&pair.dispatch, all_tokens, &outcome);
        expect(&outcome, EPD_OK);
        for (uint32_t rank = 0; rank < N_RANKS; rank++) {
            expect_dispatched(&outcome, rank, n_tokens[rank]);
            ck_assert_uint_eq(atomic_load(&later.took[rank]), later.comes[rank]);
        }
        for (int again = 0; again < 2; again++) {
            launch(&pair.combine, all_tokens, &outcome);
            expect(&outcome, EPD_OK);
            for (uint32_t rank = 0; rank < N_RANKS; rank++)
                expect_bytes(&outcome, rank, 0, n_tokens[rank], ROW_BYTES);
        }
    }
    pair_fini(&pair);
}
END_TEST

START_TEST(what_crosses_of_a_static_routing_cannot_cross_eagerly)
{
    struct pair pair;
    struct crew_plan fixed, back;
    struct outcome outcome;
    struct epd_error error = {.status = EPD_OK};
    static struct draft draft;
    pair_init(&pair);
    make_plan(&pair.crew, EPD_OP_DISPATCH, EPD_CROSSING_STATIC, NULL, &fixed);
    draft_init(&draft, &pair.crew, 0, EPD_OP_COMBINE);
    draft.request.context = fixed.plans[0];
    draft.request.crossing = EPD_CROSSING_EAGER;
    bind_combine(&draft, &pair.crew, 0);
    ck_assert_ptr_null(draft_create(&draft, &pair.crew, &error));
    ck_assert_int_eq(error.status, EPD_UNSUPPORTED);
    ck_assert_msg(strstr(error.text, "its dispatch plan crosses static") != NULL, "%s", error.text);
    /* The other way round they know more than they need. */
    make_plan(&pair.crew, EPD_OP_COMBINE, EPD_CROSSING_STATIC, &pair.dispatch, &back);
    launch_expect(&pair.dispatch, all_tokens, EPD_OK);
    launch(&back, all_tokens, &outcome);
    expect(&outcome, EPD_OK);
    expect_bytes(&outcome, 0, 0, 2 * MAX_TOKENS, ROW_BYTES);
    launch_expect(&fixed, all_tokens, EPD_OK);
    ck_assert_uint_eq(atomic_load(&later.took[0]), MAX_TOKENS);
    crew_plan_destroy(&back);
    crew_plan_destroy(&fixed);
    pair_fini(&pair);
}
END_TEST

/* ---- waiting ---- */

static struct page_plan *words_of(const struct crew_plan *plan, uint32_t rank)
{
    return &plan->crew->clients[rank].page->plans[plan->flag_idx[rank]];
}

START_TEST(a_step_that_waits_holds_up_its_own_group_alone)
{
    struct pair pair;
    struct crew other;
    struct crew_plan barrier, refused;
    struct outcome first, second, third, prompt;
    pair_init(&pair);
    crew_init(&other, &pair.harness, &config, N_RANKS, 1 << 16);
    make_plan(&other, EPD_OP_BARRIER, EPD_CROSSING_UNSPECIFIED, NULL, &barrier);
    make_plan(&pair.crew, EPD_OP_DISPATCH, EPD_CROSSING_EAGER, NULL, &refused);
    launch_expect(&pair.dispatch, all_tokens, EPD_OK);
    for (uint32_t i = 0; i < N_RANKS; i++) {
        const uint64_t begun = fake_nccl.n_swaps;
        atomic_store(&later.held, pair.crew.team->lanes[i].queue);
        launch_start(&pair.dispatch, all_tokens, 0, &first);
        launch_start(&pair.combine, all_tokens, 0, &second);
        plan_fail(refused.plans[i], 1, &(struct epd_error){EPD_TIMEOUT, "too late"}, EPD_PHASE_GATHER, -1);
        launch_start(&pair.combine, all_tokens, 0, &third);
        for (int n = 0; n < 50; n++)
            launch_expect(&barrier, all_tokens, EPD_OK);
        poll_for(&pair.harness, 20);
        ck_assert(!first.ended && !second.ended && !third.ended);
        ck_assert_uint_eq(atomic_load(&words_of(&refused, i)->done), 0);
        ck_assert_uint_eq(atomic_load(&words_of(&refused, i)->completed), 0);
        /* Heads on both lanes, and on the one that knows what it needs the parts behind them. */
        ck_assert_uint_le(fake_nccl.n_swaps - begun, 3);
        atomic_store(&later.held, NULL);
        harness_wait(&pair.harness, &first.ended);
        harness_wait(&pair.harness, &second.ended);
        harness_wait(&pair.harness, &third.ended);
        harness_settle(&pair.harness);
        expect(&first, EPD_OK);
        expect(&second, EPD_OK);
        expect(&third, EPD_OK);
        ck_assert_uint_eq(atomic_load(&words_of(&refused, i)->done), 1);
        launch(&barrier, all_tokens, &prompt);
        expect(&prompt, EPD_OK);
    }
    crew_plan_destroy(&refused);
    crew_plan_destroy(&barrier);
    crew_fini(&other);
    pair_fini(&pair);
}
END_TEST

START_TEST(a_lane_that_waits_for_another_gives_nothing_back_that_waits_for_its_own_work)
{
    struct pair pair;
    struct outcome outcome;
    pair_init(&pair);
    launch_expect(&pair.dispatch, all_tokens, EPD_OK);
    const uint64_t begun = fake_nccl.n_swaps;
    atomic_store(&later.held, pair.crew.team->lanes[1].queue);
    launch_start(&pair.dispatch, all_tokens, 0, &outcome);
    /* Heads on both lanes, and what rank 0's have told. */
    while (fake_nccl.n_swaps - begun < 3)
        poll_for(&pair.harness, 1);
    poll_for(&pair.harness, 5);
    atomic_store(&later.n_to_give_back, 1);
    while (atomic_load(&later.n_to_give_back))
        poll_for(&pair.harness, 1);
    ck_assert(!outcome.ended);
    ck_assert_uint_eq(atomic_load(&later.n_disturbed), 0);
    atomic_store(&later.held, NULL);
    harness_wait(&pair.harness, &outcome.ended);
    expect(&outcome, EPD_OK);
    pair_fini(&pair);
}
END_TEST

START_TEST(an_abort_ends_the_waiting_on_all_lanes)
{
    struct pair pair;
    struct outcome first, second;
    pair_init(&pair);
    fake_nccl.answers = 0;
    launch_start(&pair.dispatch, all_tokens, 0, &first);
    launch_start(&pair.combine, all_tokens, 0, &second);
    poll_for(&pair.harness, 50);
    ck_assert(!first.ended);
    const uint64_t begun_ns = clock_now_ns();
    rails_abort(pair.crew.rails[0], &(struct epd_error){EPD_PEER_LOST, "node 1 is gone"});
    harness_wait(&pair.harness, &first.ended);
    harness_wait(&pair.harness, &second.ended);
    ck_assert_uint_lt(clock_now_ns() - begun_ns, 2000 * MS);
    expect(&first, EPD_PEER_LOST);
    for (uint32_t rank = 0; rank < N_RANKS; rank++)
        ck_assert_int_ne(second.ranks[rank].status, EPD_OK);
    fake_nccl.answers = 1;
    pair_fini(&pair);
}
END_TEST

static void count_gone(void *arg)
{
    ++*(int *)arg;
}

/* Its flag is set for it; the other node, which may have its tokens already, hears of it by the rails. */
START_TEST(a_client_that_is_evicted_before_its_launch_ends_the_waiting)
{
    struct pair pair;
    struct outcome first;
    int gone = 0;
    pair_init(&pair);
    launch_expect(&pair.dispatch, all_tokens, EPD_OK);
    atomic_store(&later.absent, words_of(&pair.dispatch, 1));
    launch_start(&pair.dispatch, all_tokens, 0, &first);
    poll_for(&pair.harness, 20);
    ck_assert(!first.ended);
    crew_plan_destroy_sets(&pair.dispatch);
    plan_destroy(pair.dispatch.plans[1], count_gone, &gone);
    harness_wait(&pair.harness, &first.ended);
    expect(&first, EPD_PEER_LOST);
    ck_assert_int_eq(atomic_load(&words_of(&pair.dispatch, 1)->ready), 1);
    struct epd_error why = {.status = EPD_OK};
    ck_assert(rails_broken(pair.crew.rails[0], &why));
    ck_assert_msg(strstr(why.text, "rank 1 ended before it reached the launch") != NULL, "%s", why.text);
    atomic_store(&later.absent, NULL);
    crew_plan_destroy(&pair.combine);
    harness_destroy_plan(&pair.harness, pair.dispatch.plans[0]);
    harness_wait(&pair.harness, &gone);
    group_fini(&pair);
}
END_TEST

START_TEST(a_head_that_is_none_breaks_the_rails)
{
    struct pair pair;
    struct outcome outcome;
    struct epd_error why = {.status = EPD_OK};
    for (int too_many = 0; too_many < 2; too_many++) {
        pair_init(&pair);
        atomic_store(&later.no_head, !too_many);
        atomic_store(&later.comes[0], too_many ? MAX_TOKENS + 1 : 1);
        launch(&pair.dispatch, all_tokens, &outcome);
        expect(&outcome, EPD_PROTOCOL);
        ck_assert_msg(strstr(outcome.entries[0].text, "node 1: its frame is none") != NULL, "%s",
                      outcome.entries[0].text);
        ck_assert(rails_broken(pair.crew.rails[0], &why));
        pair_fini(&pair);
    }
}
END_TEST

/* ---- failures ---- */

/* Tokens that a rank's rail has carried, of whom the other lane's failure may have reached before it told of its own. */
static uint64_t tokens_told(const struct outcome *outcome, uint32_t rank)
{
    const uint64_t bytes = outcome->ranks[rank].network_bytes - 2 * (TOLD_BYTES + REPORT_BYTES);
    const uint64_t n = bytes / (CHOICE_BYTES + ROW_BYTES);
    ck_assert_uint_eq(bytes % (CHOICE_BYTES + ROW_BYTES), 0);
    ck_assert(n == later.comes[rank] || n == later.comes[rank] + later.sends[rank]);
    return n;
}

START_TEST(a_rank_that_fails_before_it_tells_says_that_nothing_comes)
{
    struct pair pair;
    struct outcome outcome;
    pair_init(&pair);
    atomic_store(&later.choose_fails, 1);
    launch(&pair.dispatch, all_tokens, &outcome);
    expect(&outcome, EPD_INTERNAL);
    ck_assert_int_eq(outcome.entries[0].rank, 1);
    const uint64_t told = tokens_told(&outcome, 0);
    expect_dispatched(&outcome, 1, later.comes[1]);
    /* What was to come back of it comes back: the other node sends, and takes, as much. */
    launch(&pair.combine, all_tokens, &outcome);
    expect(&outcome, EPD_INVALID_ARGUMENT);
    expect_bytes(&outcome, 0, 0, told, ROW_BYTES);
    expect_bytes(&outcome, 1, 0, later.comes[1], ROW_BYTES);
    launch(&pair.dispatch, all_tokens, &outcome);
    expect(&outcome, EPD_OK);
    expect_dispatched(&outcome, 1, later.sends[1] + later.comes[1]);
    pair_fini(&pair);
}
END_TEST

START_TEST(a_rank_that_fails_behind_its_heads_swaps_what_they_have_told)
{
    struct pair pair;
    struct outcome outcome;
    pair_init(&pair);
    atomic_store(&later.set_fails, 1);
    launch(&pair.dispatch, all_tokens, &outcome);
    expect(&outcome, EPD_INTERNAL);
    (void)tokens_told(&outcome, 0);
    expect_dispatched(&outcome, 1, later.sends[1] + later.comes[1]);
    launch_expect(&pair.dispatch, all_tokens, EPD_OK);
    launch_expect(&pair.combine, all_tokens, EPD_OK);
    pair_fini(&pair);
}
END_TEST

START_TEST(a_combine_that_may_not_run_before_its_dispatch_swaps_nothing)
{
    struct pair pair;
    struct outcome outcome;
    pair_init(&pair);
    launch(&pair.combine, all_tokens, &outcome);
    expect(&outcome, EPD_INVALID_ARGUMENT);
    for (uint32_t rank = 0; rank < N_RANKS; rank++)
        expect_bytes(&outcome, rank, 0, 0, ROW_BYTES);
    launch_expect(&pair.dispatch, all_tokens, EPD_OK);
    pair_fini(&pair);
}
END_TEST

START_TEST(an_overflow_on_the_other_node_ends_the_step_and_no_rail)
{
    struct pair pair;
    struct outcome outcome;
    pair_init(&pair);
    atomic_store(&later.other_overflows, 1);
    launch(&pair.dispatch, all_tokens, &outcome);
    expect(&outcome, EPD_CAPACITY_OVERFLOW);
    atomic_store(&later.other_overflows, 0);
    launch(&pair.combine, all_tokens, &outcome);
    expect(&outcome, EPD_INVALID_ARGUMENT);
    for (uint32_t rank = 0; rank < N_RANKS; rank++)
        expect_bytes(&outcome, rank, 0, later.sends[rank] + later.comes[rank], ROW_BYTES);
    launch_expect(&pair.dispatch, all_tokens, EPD_OK);
    launch_expect(&pair.combine, all_tokens, EPD_OK);
    pair_fini(&pair);
}
END_TEST

int main(void)
{
    const TTest *const tests[] = {
        messages_are_as_long_as_what_crosses_there_and_back,
        what_crosses_of_a_static_routing_cannot_cross_eagerly,
        a_step_that_waits_holds_up_its_own_group_alone,
        a_lane_that_waits_for_another_gives_nothing_back_that_waits_for_its_own_work,
        an_abort_ends_the_waiting_on_all_lanes,
        a_client_that_is_evicted_before_its_launch_ends_the_waiting,
        a_head_that_is_none_breaks_the_rails,
        a_rank_that_fails_before_it_tells_says_that_nothing_comes,
        a_rank_that_fails_behind_its_heads_swaps_what_they_have_told,
        a_combine_that_may_not_run_before_its_dispatch_swaps_nothing,
        an_overflow_on_the_other_node_ends_the_step_and_no_rail,
    };
    return suite_run("ep eager", tests, COUNT(tests));
}
