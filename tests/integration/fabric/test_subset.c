/* Groups that span some nodes of a fabric: any of them, in any order, many at once; and what nodes outside may do to
 * them: nothing. */
#include <check.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "client/epdctl/field.h"
#include "tests/integration/fabric/fabric_ranks.h"
#include "tests/reference/op_cases.h"

static struct fabric_process fabric;

/* Shared by ranks and the test. */
struct watch {
    atomic_ulong n_steps;
    atomic_int ends; /* the ranks may end */
};

static struct watch *open_watch(void)
{
    struct watch *watch =
        mmap(NULL, sizeof(*watch), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    ck_assert(watch != MAP_FAILED);
    return watch;
}

/* Steps until it may end, all well. Ranks end at the same step, because the first one says when. */
static void steady_rank(const struct rank *rank)
{
    struct layer layer;
    struct layer_tensor f[FORWARD_COUNT];
    struct watch *watch = *(struct watch *const *)rank->arg;
    layer_open(&layer, rank, op_case_named(FABRIC_CASE));
    struct epd_plan *plan = fabric_forward_plan(&layer, f), *last = fabric_barrier_plan(&layer);
    int64_t *topk = f[FORWARD_IDX].data;
    for (;;) {
        const int ends = rank->rank == 0 && atomic_load(&watch->ends);
        const int64_t kept = topk[0];
        if (ends)
            topk[0] = 99; /* told to all */
        const enum epd_status status = layer_step(plan);
        topk[0] = kept;
        if (status == EPD_BAD_ROUTING)
            break;
        RANK_CHECK(status == EPD_OK);
        atomic_fetch_add(&watch->n_steps, 1);
    }
    RANK_CHECK(layer_step(last) == EPD_OK); /* nobody leaves before the others have ended */
    layer_close(&layer);
}

static void await_steps(const struct watch *watch, unsigned long n_more)
{
    const unsigned long from = atomic_load(&watch->n_steps);
    for (const long began_ms = fabric_now_ms(); atomic_load(&watch->n_steps) < from + n_more;
         fabric_sleep_ms(2)) {
        if (fabric_now_ms() - began_ms < 20000)
            continue;
        fabric_print_logs(&fabric);
        ck_abort_msg("%lu of %lu steps", atomic_load(&watch->n_steps) - from, n_more);
    }
}

/* ---- together ---- */

/* Every two of three nodes, in both orders; a lane would wait for ever if two nodes began steps in different orders. */
START_TEST(groups_with_nodes_in_common_step_at_once)
{
    static const unsigned nodes[][2] = {{0, 1}, {1, 2}, {0, 2}, {2, 1}};
    enum { N = sizeof(nodes) / sizeof(*nodes) };
    struct rank_team teams[N];
    char names[N][16];
    unsigned n_failed = 0;
    fabric_start(&fabric, 3, 2, NULL);
    for (int i = 0; i < N; i++) {
        snprintf(names[i], sizeof(names[i]), "group %d", i);
        fabric_ranks_start_on(&fabric, &teams[i], nodes[i], 2, names[i], fabric_world_size(),
                              fabric_ahead_rank, NULL);
    }
    for (int i = 0; i < N; i++)
        n_failed += ranks_wait(&teams[i], 90);
    if (n_failed)
        fabric_print_logs(&fabric);
    ck_assert_uint_eq(n_failed, 0);
    fabric_stop(&fabric);
}
END_TEST

/* ---- numbers ---- */

/* Some steps; then it waits, so that numbers can be looked at. */
static void counted_rank(const struct rank *rank)
{
    struct layer layer;
    struct layer_tensor f[FORWARD_COUNT];
    struct watch *watch = *(struct watch *const *)rank->arg;
    layer_open(&layer, rank, op_case_named(FABRIC_CASE));
    struct epd_plan *plan = fabric_forward_plan(&layer, f), *barrier = fabric_barrier_plan(&layer);
    for (int i = 0; i < 10; i++)
        RANK_CHECK(layer_step(plan) == EPD_OK);
    RANK_CHECK(layer_step(barrier) == EPD_OK);
    atomic_fetch_add(&watch->n_steps, 10);
    while (!atomic_load(&watch->ends))
        fabric_sleep_ms(5);
    layer_close(&layer);
}

/* Of a node with one group: its rail, and what its ops say that crossed. */
static void ask_bytes(unsigned node, double *sent, double *received, double *of_ops)
{
    size_t idx;
    json_t *op, *stats = fabric_ask_document(&fabric, node, CONTROL_STATS);
    json_t *document = fabric_ask_document(&fabric, node, CONTROL_FABRIC);
    const json_t *group = json_array_get(field_array(document, "groups"), 0);
    const json_t *rail = json_array_get(field_array(field_object(group, "rails"), "nodes"), 0);
    *sent = field_number(rail, "sent_bytes");
    *received = field_number(rail, "received_bytes");
    *of_ops = 0;
    json_array_foreach (field_array(stats, "ops"), idx, op)
        *of_ops += field_number(op, "network_bytes");
    json_decref(document);
    json_decref(stats);
}

/* A static plan for fewer tokens than the group allows, on every rank for another number: up to 8. */
static void few_rank(const struct rank *rank)
{
    static const int tokens[] = {FORWARD_X, FORWARD_IDX, FORWARD_WEIGHTS, FORWARD_OUT};
    struct layer layer;
    struct layer_tensor f[FORWARD_COUNT];
    struct watch *watch = *(struct watch *const *)rank->arg;
    layer_open(&layer, rank, op_case_named(FABRIC_CASE));
    epd_plan_destroy(fabric_forward_plan(&layer, f));
    for (size_t i = 0; i < sizeof(tokens) / sizeof(*tokens); i++)
        f[tokens[i]].tensor.shape[0] = 5 + rank->rank;
    struct epd_plan *plan = layer_plan(
        &layer, (struct epd_plan_options){.op = EPD_OP_MOE_FORWARD, .crossing = EPD_CROSSING_STATIC}, f,
        FORWARD_COUNT);
    struct epd_plan *barrier = fabric_barrier_plan(&layer);
    for (int i = 0; i < 10; i++)
        RANK_CHECK(layer_step(plan) == EPD_OK);
    RANK_CHECK(layer_step(barrier) == EPD_OK);
    atomic_fetch_add(&watch->n_steps, 10);
    while (!atomic_load(&watch->ends))
        fabric_sleep_ms(5);
    layer_close(&layer);
}

/* Of 127 tokens it would be 15 times as much. */
START_TEST(static_messages_are_as_long_as_the_largest_plan_of_all_nodes)
{
    static const unsigned nodes[] = {1, 0};
    const struct op_case *c = op_case_named(FABRIC_CASE);
    const double n_ranks = fabric_world_size() / 2, row_bytes = 4.0 * c->hidden;
    /* Heads, counts and choices of 64 bytes each; rows of 8 tokens there and back. */
    const double bytes = 10 * n_ranks * (5 * 64 + 2 * 8 * row_bytes);
    double sent, received, of_ops;
    struct rank_team team;
    struct watch *watch = open_watch();
    fabric_start(&fabric, 2, 2, NULL);
    fabric_ranks_start_on(&fabric, &team, nodes, 2, "few", fabric_world_size(), few_rank, &watch);
    await_steps(watch, 10 * fabric_world_size());
    ask_bytes(0, &sent, &received, &of_ops);
    ck_assert_double_ge(sent, bytes);
    ck_assert_double_le(sent, bytes + 11 * n_ranks * 1024); /* and what the nodes agree with */
    atomic_store(&watch->ends, 1);
    ck_assert_uint_eq(ranks_wait(&team, 30), 0);
    fabric_stop(&fabric);
    munmap(watch, sizeof(*watch));
}
END_TEST

START_TEST(what_crosses_is_counted_on_both_sides_and_both_ways)
{
    static const unsigned nodes[] = {2, 0};
    double sent[2], received[2], of_ops[2];
    struct rank_team team;
    struct watch *watch = open_watch();
    fabric_start(&fabric, 3, 2, NULL);
    fabric_ranks_start_on(&fabric, &team, nodes, 2, "counted", fabric_world_size(), counted_rank, &watch);
    await_steps(watch, 10 * fabric_world_size());
    for (const long began_ms = fabric_now_ms();; fabric_sleep_ms(5)) { /* the loops hear of the last step */
        for (int i = 0; i < 2; i++)
            ask_bytes(nodes[i], &sent[i], &received[i], &of_ops[i]);
        if ((of_ops[0] == sent[0] + received[0] && of_ops[1] == sent[1] + received[1]) ||
            fabric_now_ms() - began_ms > 10000)
            break;
    }
    ck_assert_double_gt(sent[0], 0);
    ck_assert_double_eq(sent[0], received[1]);
    ck_assert_double_eq(sent[1], received[0]);
    for (int i = 0; i < 2; i++)
        ck_assert_double_eq(of_ops[i], sent[i] + received[i]);
    atomic_store(&watch->ends, 1);
    ck_assert_uint_eq(ranks_wait(&team, 30), 0);
    fabric_stop(&fabric);
    munmap(watch, sizeof(*watch));
}
END_TEST

/* ---- losses ---- */

static void expect_nodes(const json_t *group, const json_t *rail, unsigned first, unsigned second,
                         unsigned other)
{
    const json_t *nodes = field_array(group, "nodes");
    ck_assert_uint_eq(json_array_size(nodes), 2);
    ck_assert_int_eq(json_integer_value(json_array_get(nodes, 0)), first);
    ck_assert_int_eq(json_integer_value(json_array_get(nodes, 1)), second);
    ck_assert_int_eq((int)field_number(rail, "node"), (int)other);
    ck_assert_double_gt(field_number(rail, "sent_bytes"), 0);
}

/* Node 3 has the first ranks of its group, node 0 the last. */
static void look_at_numbers(void)
{
    json_t *document = fabric_ask_document(&fabric, 3, CONTROL_FABRIC);
    const json_t *group = json_array_get(field_array(document, "groups"), 0);
    const json_t *rail = json_array_get(field_array(field_object(group, "rails"), "nodes"), 0);
    expect_nodes(group, rail, 3, 0, 0);
    ck_assert_int_eq((int)field_number(group, "first_rank"), 0);
    json_decref(document);
    document = fabric_ask_document(&fabric, 3, CONTROL_GROUPS);
    const json_t *ranks = field_array(json_array_get(field_array(document, "groups"), 0), "ranks");
    for (unsigned r = 0; r < fabric_world_size(); r++)
        ck_assert_int_eq((int)field_number(json_array_get(ranks, r), "node"),
                         r < fabric_world_size() / 2 ? 3 : 0);
    json_decref(document);
}

START_TEST(a_killed_node_ends_the_groups_that_it_is_in_and_no_other)
{
    static const unsigned inside[] = {1, 2}, with[] = {3, 0}, new[] = {2, 0};
    struct rank_team going, ended, later;
    struct watch *watch = open_watch();
    fabric_start(&fabric, 4, 2, fabric_quick);
    fabric_ranks_start_on(&fabric, &going, inside, 2, "going", fabric_world_size(), steady_rank, &watch);
    fabric_ranks_start_on(&fabric, &ended, (const unsigned[]){with[1], with[0]}, 2, "ended",
                          fabric_world_size(), fabric_until_lost_rank, "node 3");
    await_steps(watch, 50);
    fabric_await_group(&fabric, 3, "ended", "open");
    fabric_kill_node(&fabric, 3);
    fabric_ranks_end(&fabric, &ended, fabric_world_size() / 2);
    await_steps(watch, 100);
    /* What is missing is nobody's concern who is not in a group with it. */
    fabric_ranks_start_on(&fabric, &later, new, 2, "new", fabric_world_size(), fabric_healthy_rank, NULL);
    ck_assert_uint_eq(ranks_wait(&later, 30), 0);
    fabric_start_node(&fabric, 3, NULL, fabric_quick);
    for (const long began = fabric_now_ms(); fabric_log_count(&fabric, 0, "fabric complete") < 2;
         fabric_sleep_ms(5))
        ck_assert_msg(fabric_now_ms() - began < 10000, "the fabric does not form again");
    fabric_ranks_start_on(&fabric, &ended, with, 2, "ended", fabric_world_size(), fabric_until_lost_rank,
                          "node 0");
    fabric_await_group(&fabric, 3, "ended", "open");
    look_at_numbers();
    await_steps(watch, 100);
    atomic_store(&watch->ends, 1);
    ck_assert_uint_eq(ranks_wait(&going, 30), 0);
    fabric_kill_node(&fabric, 0);
    fabric_ranks_end(&fabric, &ended, fabric_world_size() / 2);
    fabric_stop(&fabric);
    munmap(watch, sizeof(*watch));
}
END_TEST

/* As in a job of eight nodes whose expert-parallel groups have two each. */
START_TEST(four_groups_of_two_nodes_share_a_fabric_of_eight)
{
    enum { N = 4, KILLED = 5 };
    struct rank_team teams[N], again;
    struct watch *watches[N];
    char names[N][16];
    const unsigned hit = KILLED / 2, pair[] = {2 * hit, 2 * hit + 1};
    fabric_start(&fabric, 2 * N, 1, fabric_quick);
    for (unsigned i = 0; i < N; i++) {
        const unsigned nodes[] = {2 * i, 2 * i + 1};
        watches[i] = open_watch();
        snprintf(names[i], sizeof(names[i]), "moe-%u", i);
        if (i == hit)
            fabric_ranks_start_on(&fabric, &teams[i], nodes, 2, names[i], fabric_world_size(),
                                  fabric_until_lost_rank, "node 5");
        else
            fabric_ranks_start_on(&fabric, &teams[i], nodes, 2, names[i], fabric_world_size(), steady_rank,
                                  &watches[i]);
    }
    for (unsigned i = 0; i < N; i++)
        if (i != hit)
            await_steps(watches[i], 20);
    fabric_await_group(&fabric, KILLED, names[hit], "open");
    fabric_kill_node(&fabric, KILLED);
    fabric_ranks_end(&fabric, &teams[hit], fabric_world_size() / 2);
    for (unsigned i = 0; i < N; i++)
        if (i != hit)
            await_steps(watches[i], 50);
    fabric_start_node(&fabric, KILLED, NULL, fabric_quick);
    for (const long began = fabric_now_ms(); fabric_log_count(&fabric, 0, "fabric complete") < 2;
         fabric_sleep_ms(5))
        ck_assert_msg(fabric_now_ms() - began < 10000, "the fabric does not form again");
    fabric_ranks_start_on(&fabric, &again, pair, 2, names[hit], fabric_world_size(), fabric_healthy_rank,
                          NULL);
    ck_assert_uint_eq(ranks_wait(&again, 30), 0);
    for (unsigned i = 0; i < N; i++) {
        atomic_store(&watches[i]->ends, 1);
        if (i != hit)
            ck_assert_uint_eq(ranks_wait(&teams[i], 30), 0);
        munmap(watches[i], sizeof(*watches[i]));
    }
    fabric_stop(&fabric);
}
END_TEST

START_TEST(losing_node_0_ends_groups_that_it_is_not_in)
{
    static const unsigned nodes[] = {2, 1};
    struct rank_team team;
    fabric_start(&fabric, 3, 2, fabric_quick);
    fabric_ranks_start_on(&fabric, &team, nodes, 2, "apart", fabric_world_size(), fabric_until_lost_rank,
                          "node 0");
    fabric_await_group(&fabric, 1, "apart", "open");
    fabric_kill_node(&fabric, 0);
    ck_assert_uint_eq(ranks_wait(&team, 30), 0);
    fabric_stop(&fabric);
}
END_TEST

/* ---- joins ---- */

/* A join that must fail. */
struct refusal {
    unsigned world_size, n_nodes, first_rank;
    enum epd_status status;
    const char *texts[3];
};

static void refused_rank(const struct rank *rank)
{
    const struct op_case *c = op_case_named(FABRIC_CASE);
    const struct refusal *refusal = rank->arg;
    struct layer layer = {.op_case = c, .rank = rank};
    struct epd_open_options open_options = {.size = sizeof(open_options), .socket_path = rank->socket_path};
    op_inputs_init(&layer.inputs, c);
    RANK_CHECK(epd_open(&open_options, &layer.client) == EPD_OK);
    struct epd_group_options options = layer_group_options(&layer);
    options.world_size = refusal->world_size;
    options.n_nodes = refusal->n_nodes;
    options.rank += refusal->first_rank;
    RANK_CHECK(epd_group_join(layer.client, &options, &layer.group) == refusal->status);
    for (int i = 0; i < 3 && refusal->texts[i]; i++)
        RANK_CHECK(strstr(epd_error_text(), refusal->texts[i]) != NULL);
    layer_close(&layer);
}

START_TEST(joins_that_cannot_be_are_told_why)
{
    static const unsigned zero[] = {0}, one[] = {1}, two[] = {2}, pair[] = {0, 2};
    static const struct refusal too_many = {4, 4, 0, EPD_INVALID_ARGUMENT, {"n_nodes: 4", "has 3"}},
                                uneven = {8, 3, 0, EPD_INVALID_ARGUMENT, {"world_size: 8", "n_nodes 3"}},
                                same = {2, 2, 1, EPD_GROUP_MISMATCH, {"node 1 says 1", "node 2 says 1"}},
                                lonely = {4, 2, 2, EPD_TIMEOUT, {"of ranks 0 1", "joined by node 2"}},
                                two_blocks = {4, 2, 1, EPD_GROUP_MISMATCH, {"rank", "node 2 has rank"}},
                                foreign = {2, 2, 0, EPD_INVALID_ARGUMENT, {"name: byte 0xc3"}},
                                taken = {2, 2, 0, EPD_IN_USE, {"open on nodes 0 2", "names of their own"}};
    struct rank_team first, second;
    struct watch *watch = open_watch();
    fabric_start(&fabric, 3, 2, fabric_quick);
    fabric_ranks_start_on(&fabric, &first, zero, 1, "many", 1, refused_rank, &too_many);
    ck_assert_uint_eq(ranks_wait(&first, 10), 0);
    fabric_ranks_start_on(&fabric, &first, zero, 1, "uneven", 1, refused_rank, &uneven);
    ck_assert_uint_eq(ranks_wait(&first, 10), 0);
    fabric_ranks_start_on(&fabric, &first, one, 1, "same", 1, refused_rank, &same);
    fabric_ranks_start_on(&fabric, &second, two, 1, "same", 1, refused_rank, &same);
    ck_assert_uint_eq(ranks_wait(&first, 10) + ranks_wait(&second, 10), 0);
    fabric_ranks_start_on(&fabric, &first, two, 1, "lonely", 2, refused_rank, &lonely);
    ck_assert_uint_eq(ranks_wait(&first, 10), 0);
    fabric_ranks_start_on(&fabric, &first, two, 1, "blocks", 2, refused_rank, &two_blocks);
    ck_assert_uint_eq(ranks_wait(&first, 10), 0);
    fabric_ranks_start_on(&fabric, &first, pair, 2, "moe", fabric_world_size(), steady_rank, &watch);
    await_steps(watch, 10);
    fabric_ranks_start_on(&fabric, &second, one, 1, "moe", 1, refused_rank, &taken);
    ck_assert_uint_eq(ranks_wait(&second, 10), 0);
    fabric_ranks_start_on(&fabric, &second, zero, 1, "m\303\266e", 1, refused_rank, &foreign);
    ck_assert_uint_eq(ranks_wait(&second, 10), 0);
    fabric_ranks_start_on(&fabric, &second, two, 1, "m\303\266e", 1, refused_rank, &foreign);
    ck_assert_uint_eq(ranks_wait(&second, 10), 0);
    await_steps(watch, 10);
    atomic_store(&watch->ends, 1);
    ck_assert_uint_eq(ranks_wait(&first, 30), 0);
    fabric_stop(&fabric);
    munmap(watch, sizeof(*watch));
}
END_TEST

/* Killed while their group waits for other nodes. Those that are left are told; who comes next under the name is a new
 * group; and nobody else notices. */
START_TEST(ranks_that_go_while_their_group_is_being_joined_leave_its_name_free)
{
    static const unsigned one[] = {1}, both[] = {1, 0}, bystanders[] = {2, 1};
    static const struct refusal gone = {4, 2, 0, EPD_PEER_LOST, {"rank 1", "is gone"}};
    struct rank_team team, steady;
    struct watch *watch = open_watch();
    fabric_start(&fabric, 3, 2, (const char *const[]){"--join", "60s", NULL});
    fabric_ranks_start_on(&fabric, &steady, bystanders, 2, "steady", fabric_world_size(), steady_rank,
                          &watch);
    await_steps(watch, 10);
    fabric_ranks_start_on(&fabric, &team, one, 1, "half", 2, refused_rank, &gone);
    fabric_await_group(&fabric, 1, "half", "joined");
    fabric_ranks_end(&fabric, &team, 0);
    fabric_ranks_start_on(&fabric, &team, both, 2, "half", fabric_world_size(), fabric_healthy_rank, NULL);
    ck_assert_uint_eq(ranks_wait(&team, 60), 0);
    fabric_ranks_start_on(&fabric, &team, one, 1, "half", 2, refused_rank, &gone);
    fabric_await_group(&fabric, 1, "half", "joined");
    ck_assert_int_eq(kill(team.pids[1], SIGKILL), 0);
    fabric_ranks_end(&fabric, &team, 1);
    await_steps(watch, 10);
    atomic_store(&watch->ends, 1);
    ck_assert_uint_eq(ranks_wait(&steady, 30), 0);
    fabric_stop(&fabric);
    munmap(watch, sizeof(*watch));
}
END_TEST

/* The fabric is never complete, and says so; its group works. */
START_TEST(a_group_needs_no_other_nodes_than_its_own)
{
    static const unsigned nodes[] = {1, 0};
    struct rank_team team;
    fabric_prepare(&fabric, 3, 2, 0);
    fabric_start_node(&fabric, 0, NULL, fabric_quick);
    fabric_start_node(&fabric, 1, NULL, fabric_quick);
    fabric_ranks_start_on(&fabric, &team, nodes, 2, "early", fabric_world_size(), fabric_healthy_rank, NULL);
    ck_assert_uint_eq(ranks_wait(&team, 60), 0);
    for (unsigned node = 0; node < 2; node++)
        ck_assert_uint_eq(fabric_log_count(&fabric, node, "fabric complete"), 0);
    fabric_stop(&fabric);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("subset");
    TCase *tests = tcase_create("subset");
    tcase_set_timeout(tests, 120);
    tcase_add_test(tests, groups_with_nodes_in_common_step_at_once);
    tcase_add_test(tests, what_crosses_is_counted_on_both_sides_and_both_ways);
    tcase_add_test(tests, static_messages_are_as_long_as_the_largest_plan_of_all_nodes);
    tcase_add_test(tests, a_killed_node_ends_the_groups_that_it_is_in_and_no_other);
    tcase_add_test(tests, four_groups_of_two_nodes_share_a_fabric_of_eight);
    tcase_add_test(tests, losing_node_0_ends_groups_that_it_is_not_in);
    tcase_add_test(tests, joins_that_cannot_be_are_told_why);
    tcase_add_test(tests, ranks_that_go_while_their_group_is_being_joined_leave_its_name_free);
    tcase_add_test(tests, a_group_needs_no_other_nodes_than_its_own);
    suite_add_tcase(suite, tests);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_ENV);
    int n_failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return n_failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
