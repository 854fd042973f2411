/* How a step of a group that spans nodes ends where work goes on later: from the reports that the nodes' streams have
 * swapped. And what cannot be recorded as a graph there. Without CUDA: the backend is the host's, said to work later; the
 * other node, and the rails, are what the test makes them. */
#include <string.h>
#include <time.h>

#include "ep/clock.h"
#include "ep/node_impl.h"
#include "ep/plan_impl.h"
#include "ep/rails.h"
#include "ep/step_impl.h"
#include "tests/unit/ep/harness.h"

#define COUNT(array) (sizeof(array) / sizeof *(array))
#define N_RANKS      2 /* of this node, which is node 0 of 2 */
#define N_IN_FLIGHT  32
#define MS           1000000ull

static struct backend later;         /* made before any lane runs */
static struct hop_report other_says; /* of every rank of the other node; its step is put in */
static struct kernel_error records[N_RANKS][PLAN_RECORD_COUNT];
static _Atomic int busy; /* nothing in a queue ends */
static _Atomic int no_copies, no_report;
static _Atomic uint64_t n_checks, n_aborts;
static _Atomic int broken;
static _Atomic uint64_t step_of[N_RANKS];

/* ---- rails ---- */

enum epd_status __wrap_rails_check(struct rails *rails, uint32_t rank_idx, struct epd_error *error);
enum epd_status __wrap_rails_check(struct rails *rails, uint32_t rank_idx, struct epd_error *error)
{
    (void)rails, (void)rank_idx, (void)error;
    atomic_fetch_add(&n_checks, 1);
    return EPD_OK;
}

void __wrap_rails_abort(struct rails *rails, const struct epd_error *why);
void __wrap_rails_abort(struct rails *rails, const struct epd_error *why)
{
    (void)rails;
    ck_assert_int_ne(why->status, EPD_OK);
    atomic_fetch_add(&n_aborts, 1);
    atomic_store(&broken, 1);
}

int __wrap_rails_broken(const struct rails *rails, struct epd_error *why);
int __wrap_rails_broken(const struct rails *rails, struct epd_error *why)
{
    (void)rails;
    if (atomic_load(&broken))
        *why = (struct epd_error){EPD_PEER_LOST, "the rails are broken"};
    return atomic_load(&broken);
}

uint64_t __wrap_rails_moved_bytes(const struct rails *rails, uint32_t rank_idx);
uint64_t __wrap_rails_moved_bytes(const struct rails *rails, uint32_t rank_idx)
{
    (void)rails, (void)rank_idx;
    return 0;
}

/* ---- the other node ---- */

static void begin(const struct rank_run *runs, uint32_t n_runs, uint64_t step)
{
    for (uint32_t i = 0; i < n_runs; i++)
        atomic_store(&step_of[runs[i].plan->rank], step);
}

static void turn_off(const struct rank_run *runs, uint32_t n_runs)
{
    (void)runs, (void)n_runs;
}

static int only_followed(const struct rank_run *run)
{
    (void)run;
    return atomic_load(&broken);
}

static enum epd_status report(const struct rank_run *run, const struct hop_verdict *host,
                              struct hop_report *reports, struct epd_error *error)
{
    (void)host;
    if (atomic_load(&no_report))
        return error_set(error, EPD_INTERNAL, "no report");
    reports[1] = other_says;
    reports[1].step += atomic_load(&step_of[run->plan->rank]);
    reports[1].step_again += atomic_load(&step_of[run->plan->rank]);
    return EPD_OK;
}

static const struct hop_form form = {
    .begin = begin, .turn_off = turn_off, .only_followed = only_followed, .report = report};

/* ---- the device ---- */

static int queue_reached(struct backend_queue *queue, uint64_t ticket, struct epd_error *error)
{
    (void)queue, (void)ticket, (void)error;
    return !atomic_load(&busy);
}

static enum epd_status flag_ready(struct backend_queue *queue, const struct backend_flag *flag,
                                  uint64_t *ticket, struct epd_error *error)
{
    (void)queue, (void)error;
    atomic_store(&flag->page->plans[flag->idx].ready, 0);
    *ticket = 1;
    return EPD_OK;
}

static enum epd_status copy_out(struct backend_queue *queue, void *dst, void *src, uint64_t bytes, int clear,
                                struct epd_error *error)
{
    if (atomic_load(&no_copies))
        return error_set(error, EPD_BUSY, "no room for reports");
    return backend_host.copy_out(queue, dst, src, bytes, clear, error);
}

static enum epd_status graph_begin(struct backend_queue *queue, struct epd_error *error)
{
    (void)queue;
    return error_set(error, EPD_UNSUPPORTED, "nothing can be recorded here");
}

enum epd_status __real_lane_start(const struct backend *backend, const struct node_config *config,
                                  uint32_t device_idx, struct lane **lane, struct epd_error *error);
enum epd_status __wrap_lane_start(const struct backend *backend, const struct node_config *config,
                                  uint32_t device_idx, struct lane **lane, struct epd_error *error);
enum epd_status __wrap_lane_start(const struct backend *backend, const struct node_config *config,
                                  uint32_t device_idx, struct lane **lane, struct epd_error *error)
{
    (void)backend;
    return __real_lane_start(&later, config, device_idx, lane, error);
}

/* ---- a group ---- */

struct pair {
    struct harness harness;
    struct crew crew;
    struct crew_plan plan; /* a barrier: nothing is computed */
};

static void pair_init(struct pair *pair)
{
    const struct message_group_config config = {.n_experts = 4,
                                                .top_k = 1,
                                                .hidden = 8,
                                                .max_tokens = 8,
                                                .capacity_rows = 16,
                                                .alignment = 1,
                                                .dtype = EPD_F32,
                                                .overflow = EPD_OVERFLOW_ERROR};
    struct draft drafts[N_RANKS];
    later = backend_host;
    later.works_later = 1;
    later.queue_reached = queue_reached;
    later.flag_ready = flag_ready;
    later.copy_out = copy_out;
    later.graph_begin = graph_begin;
    memset(&other_says, 0, sizeof other_says);
    other_says.rank = -1;
    memset(records, 0, sizeof records);
    atomic_store(&busy, 0);
    atomic_store(&no_copies, 0);
    atomic_store(&no_report, 0);
    atomic_store(&broken, 0);
    atomic_store(&n_checks, 0);
    atomic_store(&n_aborts, 0);
    harness_open(&pair->harness, N_RANKS, 0);
    pair->harness.node->backend = &later;
    crew_init(&pair->crew, &pair->harness, &config, N_RANKS, 1 << 16);
    for (uint32_t rank = 0; rank < N_RANKS; rank++)
        draft_init(&drafts[rank], &pair->crew, rank, EPD_OP_BARRIER);
    crew_plan_create(&pair->plan, &pair->crew, drafts, N_RANKS);
}

/* Before its first step. */
static void span_two_nodes(struct pair *pair)
{
    struct team *team = pair->crew.team;
    team->rails = (struct rails *)(void *)&form; /* nobody looks at it */
    team->hop = &form;
    team->problem.n_nodes = 2;
    team->problem.world_size = 2 * N_RANKS;
    for (uint32_t rank = 0; rank < N_RANKS; rank++)
        pair->plan.plans[rank]->records = records[rank];
}

static void pair_fini(struct pair *pair)
{
    struct team *team = pair->crew.team;
    atomic_store(&busy, 0);
    harness_settle(&pair->harness);
    team->rails = NULL;
    team->problem.n_nodes = 1;
    team->problem.world_size = N_RANKS;
    for (uint32_t rank = 0; rank < N_RANKS; rank++)
        pair->plan.plans[rank]->records = NULL;
    crew_plan_destroy(&pair->plan);
    crew_fini(&pair->crew);
    harness_close(&pair->harness);
}

static const uint32_t no_tokens[N_RANKS];

static void run(struct pair *pair, struct outcome *outcome)
{
    launch_start(&pair->plan, no_tokens, 0, outcome);
    harness_wait(&pair->harness, &outcome->ended);
}

static void expect(const struct outcome *outcome, enum epd_status status)
{
    for (uint32_t rank = 0; rank < N_RANKS; rank++)
        ck_assert_msg(outcome->ranks[rank].status == status, "rank %u: %d, %s", rank,
                      (int)outcome->ranks[rank].status, outcome->entries[rank].text);
}

START_TEST(a_step_goes_well_when_all_nodes_say_so)
{
    struct pair pair;
    struct outcome outcome;
    pair_init(&pair);
    span_two_nodes(&pair);
    for (int i = 0; i < 3; i++) {
        run(&pair, &outcome);
        expect(&outcome, EPD_OK);
    }
    ck_assert_uint_eq(n_aborts, 0);
    pair_fini(&pair);
}
END_TEST

START_TEST(what_a_rank_of_another_node_has_met_is_told_with_its_rank)
{
    struct pair pair;
    struct outcome outcome;
    pair_init(&pair);
    span_two_nodes(&pair);
    other_says.status = EPD_TIMEOUT;
    other_says.rank = 3;
    strcpy(other_says.text, "it came too late");
    launch(&pair.plan, no_tokens, &outcome);
    expect(&outcome, EPD_TIMEOUT);
    ck_assert_int_eq(outcome.entries[0].rank, 3);
    ck_assert_msg(strstr(outcome.entries[0].text, "it came too late") != NULL, "%s", outcome.entries[0].text);
    pair_fini(&pair);
}
END_TEST

START_TEST(what_a_kernel_of_another_node_has_recorded_is_told)
{
    struct pair pair;
    struct outcome outcome;
    pair_init(&pair);
    span_two_nodes(&pair);
    other_says.records[PLAN_RECORD_ROUTE] =
        (struct kernel_error){.status = EPD_BAD_ROUTING, .expert = -1, .token = 7, .got = 99, .allowed = 3};
    launch(&pair.plan, no_tokens, &outcome);
    expect(&outcome, EPD_BAD_ROUTING);
    ck_assert_int_eq(outcome.entries[1].rank, N_RANKS);
    ck_assert_msg(strstr(outcome.entries[1].text, "token 7") != NULL, "%s", outcome.entries[1].text);
    pair_fini(&pair);
}
END_TEST

START_TEST(a_report_that_is_none_is_a_lost_peer)
{
    for (int what = 0; what < 6; what++) {
        struct pair pair;
        struct outcome outcome;
        pair_init(&pair);
        span_two_nodes(&pair);
        other_says.status = what < 3 ? EPD_OK : EPD_TIMEOUT;
        other_says.step += what == 0;
        other_says.step_again -= what == 1;
        other_says.phase = what == 2 ? EPD_PHASE_COUNT : EPD_PHASE_NONE;
        other_says.status = what == 3 ? 0xffffff : other_says.status;
        other_says.rank = what == 4 ? 2 * N_RANKS : what == 5 ? -2 : other_says.rank;
        run(&pair, &outcome);
        expect(&outcome, EPD_PEER_LOST);
        pair_fini(&pair);
    }
}
END_TEST

/* The other node has this one's report, which says that all is well. */
START_TEST(records_that_cannot_be_copied_behind_the_report_break_the_rails)
{
    struct pair pair;
    struct outcome outcome;
    pair_init(&pair);
    span_two_nodes(&pair);
    atomic_store(&no_copies, 1);
    run(&pair, &outcome);
    expect(&outcome, EPD_BUSY);
    ck_assert_uint_eq(n_aborts, N_RANKS);
    pair_fini(&pair);
}
END_TEST

/* And the rank says why itself, instead of blaming rails that it has broken. */
START_TEST(a_report_that_cannot_be_given_breaks_the_rails_for_its_own_reason)
{
    struct pair pair;
    struct outcome outcome;
    pair_init(&pair);
    span_two_nodes(&pair);
    atomic_store(&no_report, 1);
    run(&pair, &outcome);
    expect(&outcome, EPD_INTERNAL);
    ck_assert_uint_eq(n_aborts, N_RANKS);
    pair_fini(&pair);
}
END_TEST

START_TEST(records_that_cannot_be_copied_break_nothing_inside_a_node)
{
    struct pair pair;
    struct outcome outcome;
    pair_init(&pair);
    for (uint32_t rank = 0; rank < N_RANKS; rank++)
        pair.plan.plans[rank]->records = records[rank];
    atomic_store(&no_copies, 1);
    run(&pair, &outcome);
    expect(&outcome, EPD_BUSY);
    ck_assert_uint_eq(n_aborts, 0);
    pair_fini(&pair);
}
END_TEST

static void sleep_ms(long ms)
{
    const struct timespec time = {.tv_nsec = ms * 1000000};
    (void)nanosleep(&time, NULL);
}

START_TEST(steps_in_flight_ask_their_rails_now_and_then)
{
    static struct outcome outcomes[N_IN_FLIGHT];
    struct pair pair;
    pair_init(&pair);
    span_two_nodes(&pair);
    atomic_store(&busy, 1);
    for (size_t i = 0; i < COUNT(outcomes); i++)
        launch_start(&pair.plan, no_tokens, 0, &outcomes[i]);
    sleep_ms(20);
    const uint64_t begun_ns = clock_now_ns(), before = n_checks;
    sleep_ms(100);
    const uint64_t asked = n_checks - before, passed_ns = clock_now_ns() - begun_ns;
    ck_assert_uint_gt(asked, 0);
    ck_assert_uint_le(asked, N_RANKS * (passed_ns / STEP_RAILS_NS + 2));
    atomic_store(&busy, 0);
    for (size_t i = 0; i < COUNT(outcomes); i++) {
        harness_wait(&pair.harness, &outcomes[i].ended);
        expect(&outcomes[i], EPD_OK);
    }
    pair_fini(&pair);
}
END_TEST

START_TEST(a_plan_that_cannot_be_recorded_runs_and_is_counted)
{
    struct pair pair;
    struct outcome outcome;
    struct epd_error why = {.status = EPD_OK};
    pair_init(&pair);
    struct team *team = pair.crew.team;
    team->fused = 1;
    pair.harness.node->replays = 1;
    for (uint32_t rank = 0; rank < N_RANKS; rank++)
        pair.plan.plans[rank]->recordable = 1;
    run(&pair, &outcome);
    ck_assert_uint_eq(team_n_unrecorded(team, &why), 0);
    ck_assert_int_eq(why.status, EPD_OK);
    for (int i = 0; i < 3; i++) {
        run(&pair, &outcome);
        expect(&outcome, EPD_OK);
    }
    ck_assert_uint_eq(team_n_unrecorded(team, &why), N_RANKS);
    ck_assert_int_eq(why.status, EPD_UNSUPPORTED);
    ck_assert_str_eq(why.text, "nothing can be recorded here");
    team->fused = 0;
    pair_fini(&pair);
}
END_TEST

int main(void)
{
    const TTest *const tests[] = {
        a_step_goes_well_when_all_nodes_say_so,
        what_a_rank_of_another_node_has_met_is_told_with_its_rank,
        what_a_kernel_of_another_node_has_recorded_is_told,
        a_report_that_is_none_is_a_lost_peer,
        records_that_cannot_be_copied_behind_the_report_break_the_rails,
        a_report_that_cannot_be_given_breaks_the_rails_for_its_own_reason,
        records_that_cannot_be_copied_break_nothing_inside_a_node,
        steps_in_flight_ask_their_rails_now_and_then,
        a_plan_that_cannot_be_recorded_runs_and_is_counted,
    };
    return suite_run("report", tests, COUNT(tests));
}
