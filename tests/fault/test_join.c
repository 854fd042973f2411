/* Sessions that go, or are refused, while a group across nodes is being joined: node 0 of two, and the other only where a test wants it. */
#include <check.h>
#include <signal.h>
#include <string.h>

#include "tests/fault/control.h"
#include "tests/fault/spawn.h"
#include "tests/fault/suite.h"
#include "tests/fault/wire.h"
#include "tests/integration/fabric/fabric_process.h"

#define SETTLE_MS 10000

static struct fabric_process fabric;
static struct wire a, b; /* large */

static void start(void)
{
    fabric_prepare(&fabric, 2, 2, 0);
    fabric_start_node(&fabric, 0, NULL, NULL);
    wire_open(&a, fabric.nodes[0].socket_path);
    wire_open(&b, fabric.nodes[0].socket_path);
}

static void stop(void)
{
    wire_close(&a);
    wire_close(&b);
    fabric_stop(&fabric);
}

static struct message join_message(uint32_t rank)
{
    struct message join = wire_join_message("half", 4, rank);
    join.group_join.config.n_nodes = 2;
    return join;
}

static int is_joined(void)
{
    json_t *document = control_ask(fabric.nodes[0].control_path, CONTROL_FABRIC, NULL);
    const json_t *group = json_array_get(json_object_get(document, "groups"), 0);
    const char *state = json_string_value(json_object_get(group, "state"));
    const int joined = state && strcmp(state, "joined") == 0;
    json_decref(document);
    return joined;
}

/* Both ranks of this node: no answer before the other node comes. */
static void join_both(void)
{
    struct message joins[] = {join_message(0), join_message(1)};
    ck_assert_int_eq(wire_send(&a, &joins[0], -1), 0);
    ck_assert_int_eq(wire_send(&b, &joins[1], -1), 0);
    for (int waited = 0; !is_joined(); waited++, sleep_ms(1))
        ck_assert_int_lt(waited, SETTLE_MS);
}

static long long n_groups(void)
{
    json_t *status = control_ask(fabric.nodes[0].control_path, CONTROL_STATUS, NULL);
    const long long n = control_number(status, "groups");
    json_decref(status);
    return n;
}

START_TEST(who_waits_with_a_rank_that_goes_is_told)
{
    join_both();
    wire_close(&b);
    ck_assert_int_eq(wire_answer(&a), EPD_PEER_LOST);
    ck_assert_msg(strstr(a.why, "rank 1 of group half is gone") != NULL, "%s", a.why);
}
END_TEST

/* It asks for the place of a rank that has hung up, and is gone itself: that the group ends cannot be told to it. */
START_TEST(a_join_by_who_is_gone_in_place_of_who_is_gone_harms_nobody)
{
    struct message again = join_message(1);
    join_both();
    const pid_t worker = daemon_worker(&fabric.nodes[0]);
    ck_assert_int_eq(kill(worker, SIGSTOP), 0); /* it finds all of this at once, in this order */
    ck_assert_int_eq(wire_send(&a, &again, -1), 0);
    wire_close(&b);
    wire_close(&a);
    ck_assert_int_eq(kill(worker, SIGCONT), 0);
    for (int waited = 0; n_groups(); waited++, sleep_ms(1))
        ck_assert_int_lt(waited, SETTLE_MS);
    ck_assert_int_eq(daemon_worker(&fabric.nodes[0]), worker);
}
END_TEST

/* Of a group of one rank on each node: the rank of node 1 may be in no more groups. Those on node 0 learn of it. */
START_TEST(a_rank_that_is_refused_on_another_node_ends_the_join_here)
{
    static struct wire refused;
    struct message join = wire_join_message("apart", 2, 0), other = wire_join_message("apart", 2, 1);
    join.group_join.config.n_nodes = other.group_join.config.n_nodes = 2;
    fabric_start_node(&fabric, 1, NULL, (const char *const[]){"--groups-per-session", "1", NULL});
    fabric_wait_complete(&fabric, 1);
    ck_assert_int_eq(wire_send(&a, &join, -1), 0);
    for (int waited = 0; !is_joined(); waited++, sleep_ms(1))
        ck_assert_int_lt(waited, SETTLE_MS);
    wire_open(&refused, fabric.nodes[1].socket_path);
    (void)wire_join_alone(&refused, "own");
    ck_assert_int_eq(wire_call(&refused, &other, -1), EPD_QUOTA);
    ck_assert_int_eq(wire_answer(&a), EPD_QUOTA);
    ck_assert_msg(strstr(a.why, "group apart: rank 1 on node 1 was refused: groups of this session") != NULL,
                  "%s", a.why);
    wire_close(&refused);
}
END_TEST

int main(void)
{
    const TTest *const tests[] = {
        who_waits_with_a_rank_that_goes_is_told,
        a_join_by_who_is_gone_in_place_of_who_is_gone_harms_nobody,
        a_rank_that_is_refused_on_another_node_ends_the_join_here,
    };
    return suite_run("join", tests, SUITE_COUNT(tests), start, stop);
}
