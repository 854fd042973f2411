/* What the coordinator decides: joins, plans, steps and ends of groups that span nodes. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "daemon/fabric.h"
#include "daemon/fabric_coordinator.h"
#include "daemon/group_fields.h"
#include "daemon/worker.h"
#include "tests/unit/daemon/suite.h"

static struct epd_error error;

#define MAX_TOLD 4096

/* What nodes were told, in order. */
static struct told {
    uint32_t node;
    struct fabric_message message;
} told[MAX_TOLD];
static size_t n_told;

/* Stands in for daemon/fabric.c, which is not linked. */
void fabric_tell(struct fabric *fabric, uint32_t node, const struct fabric_message *message)
{
    (void)fabric;
    ck_assert_uint_lt(n_told, MAX_TOLD);
    told[n_told++] = (struct told){node, *message};
}

static struct fabric *fabric;
static struct worker *worker;
static struct coordinator *coordinator;

static void setup(void)
{
    fabric = calloc(1, sizeof(*fabric));
    worker = calloc(1, sizeof(*worker));
    config_init(&worker->config);
    fabric->worker = worker;
    fabric->config.n_nodes = 3;
    coordinator = coordinator_create(fabric);
    n_told = 0;
}

static void teardown(void)
{
    coordinator_destroy(coordinator);
    free(worker);
    free(fabric);
}

static enum epd_status say(uint32_t node, const struct fabric_message *message)
{
    return coordinator_receive(coordinator, node, message, &error);
}

/* One rank on each of n_nodes nodes. */
static struct fabric_message join_of(uint32_t node, const char *name, uint32_t n_nodes, uint32_t block)
{
    static struct fabric_address addresses[EPD_MAX_NODES];
    struct fabric_message message;
    fabric_message_init(&message, FABRIC_JOIN);
    (void)snprintf(message.name, sizeof(message.name), "%s", name);
    message.group = 100 + node;
    message.world_size = n_nodes;
    message.n_config = GROUP_N_FIELDS;
    message.config[2] = 64;
    message.config[GROUP_FIELD_NODES] = n_nodes;
    message.block = block;
    message.n_addresses = 1;
    addresses[node] = (struct fabric_address){.bytes = 1, .data = {(uint8_t)(100 + node)}};
    message.addresses = &addresses[node];
    return message;
}

static void say_join(uint32_t node, int64_t hidden)
{
    struct fabric_message message = join_of(node, "g", 3, node);
    message.config[2] = hidden;
    ck_assert_int_eq(say(node, &message), EPD_OK);
}

static void say_join_to(uint32_t node, const char *name, uint32_t n_nodes, uint32_t block)
{
    const struct fabric_message message = join_of(node, name, n_nodes, block);
    ck_assert_int_eq(say(node, &message), EPD_OK);
}

static enum epd_status say_step(uint32_t node, uint64_t group, uint64_t number, uint64_t key,
                                enum epd_status failed)
{
    struct fabric_message message;
    fabric_message_init(&message, FABRIC_STEP);
    message.group = group;
    message.number = number;
    message.hash = key;
    message.op = EPD_OP_BARRIER;
    if (failed) {
        (void)error_set(&message.error, failed, "of node %u", node);
        message.rank = (int32_t)node;
    }
    return say(node, &message);
}

static uint64_t join_all(void)
{
    for (uint32_t node = 0; node < 3; node++)
        say_join(node, 64);
    ck_assert_uint_eq(n_told, 3);
    for (uint32_t i = 0; i < 3; i++) {
        ck_assert_int_eq(told[i].message.kind, FABRIC_OPEN);
        ck_assert_int_eq(told[i].message.error.status, EPD_OK);
        ck_assert_uint_eq(told[i].message.number, 100 + told[i].node);
        ck_assert_uint_eq(told[i].message.n_addresses, 3);
    }
    n_told = 0;
    return told[0].message.group;
}

START_TEST(a_group_opens_when_all_nodes_have_joined_alike)
{
    say_join(0, 64);
    say_join(2, 64);
    ck_assert_uint_eq(n_told, 0);
    say_join(1, 72);
    ck_assert_uint_eq(n_told, 3);
    for (uint32_t i = 0; i < 3; i++) {
        ck_assert_int_eq(told[i].message.error.status, EPD_GROUP_MISMATCH);
        ck_assert_str_eq(told[i].message.error.text, "group g hidden: node 1 says 72, node 0 says 64");
    }
    n_told = 0;
    (void)join_all(); /* the name is free */
}
END_TEST

START_TEST(steps_go_in_one_order_and_only_when_all_nodes_have_announced_them)
{
    const uint64_t group = join_all();
    for (uint64_t number = 1; number <= 3; number++) {
        ck_assert_int_eq(say_step(0, group, number, 1, EPD_OK), EPD_OK);
        ck_assert_int_eq(say_step(2, group, number, 1, EPD_OK), EPD_OK);
    }
    ck_assert_uint_eq(n_told, 0);
    ck_assert_int_eq(say_step(1, group, 1, 1, EPD_OK), EPD_OK);
    ck_assert_uint_eq(n_told, 3);
    ck_assert_int_eq(say_step(1, group, 2, 1, EPD_OK), EPD_OK);
    ck_assert_uint_eq(n_told, 6);
    for (size_t i = 0; i < n_told; i++) {
        ck_assert_int_eq(told[i].message.kind, FABRIC_GO);
        ck_assert_uint_eq(told[i].message.number, 1 + i / 3);
        ck_assert_int_eq(told[i].message.error.status, EPD_OK);
    }
    ck_assert_int_eq(say_step(0, group, 9, 1, EPD_OK), EPD_PROTOCOL); /* not the next */
}
END_TEST

START_TEST(a_failed_step_fails_for_all_in_its_turn_and_the_next_matches_again)
{
    const uint64_t group = join_all();
    ck_assert_int_eq(say_step(0, group, 1, 1, EPD_OK), EPD_OK);
    ck_assert_int_eq(say_step(0, group, 2, 1, EPD_TIMEOUT), EPD_OK);
    ck_assert_uint_eq(n_told, 0); /* step 1 is first */
    ck_assert_int_eq(say_step(1, group, 1, 1, EPD_OK), EPD_OK);
    ck_assert_int_eq(say_step(2, group, 1, 1, EPD_OK), EPD_OK);
    ck_assert_uint_eq(n_told, 6);
    ck_assert_int_eq(told[3].message.error.status, EPD_TIMEOUT);
    ck_assert_int_eq(told[3].message.rank, 0);
    n_told = 0;
    ck_assert_int_eq(say_step(1, group, 2, 1, EPD_OK), EPD_OK); /* was on its way */
    ck_assert_uint_eq(n_told, 0);
    ck_assert_int_eq(say_step(1, group, 3, 1, EPD_OK), EPD_OK);
    ck_assert_int_eq(say_step(2, group, 3, 4, EPD_OK), EPD_OK);
    ck_assert_uint_eq(n_told, 3);
    ck_assert_int_eq(told[0].message.error.status, EPD_SEQ_MISMATCH);
    ck_assert_ptr_nonnull(strstr(told[0].message.error.text, "node 2"));
}
END_TEST

START_TEST(a_lost_node_ends_its_groups_on_all_others)
{
    const struct epd_error why = {EPD_PEER_LOST, "node 1 is lost: cut"};
    const uint64_t group = join_all();
    coordinator_lose(coordinator, 1, &why);
    ck_assert_uint_eq(n_told, 2);
    for (size_t i = 0; i < 2; i++) {
        ck_assert_uint_ne(told[i].node, 1);
        ck_assert_int_eq(told[i].message.kind, FABRIC_BREAK);
        ck_assert_str_eq(told[i].message.error.text, "node 1 is lost: cut");
    }
    ck_assert_int_eq(say_step(0, group, 1, 1, EPD_OK), EPD_OK); /* too late, and no news */
    ck_assert_uint_eq(n_told, 2);
}
END_TEST

START_TEST(who_does_not_come_is_named_at_the_deadline)
{
    worker->config.join_ms = worker->config.stuck_ms = 1;
    say_join(0, 64);
    say_join(1, 64);
    usleep(5000);
    coordinator_check(coordinator, UINT64_MAX / 2);
    ck_assert_uint_eq(n_told, 2);
    ck_assert_int_eq(told[0].message.error.status, EPD_TIMEOUT);
    ck_assert_ptr_nonnull(strstr(told[0].message.error.text, "by node 2"));
    n_told = 0;
    const uint64_t group = join_all();
    ck_assert_int_eq(say_step(2, group, 1, 1, EPD_OK), EPD_OK);
    coordinator_check(coordinator, UINT64_MAX / 2);
    ck_assert_uint_eq(n_told, 3);
    ck_assert_ptr_nonnull(strstr(told[0].message.error.text, "by node 0 1"));
}
END_TEST

START_TEST(plans_are_ready_when_all_nodes_have_offered_like_ones)
{
    const uint64_t group = join_all();
    struct fabric_message message;
    fabric_message_init(&message, FABRIC_PLAN);
    message.group = group;
    message.number = 1;
    message.op = EPD_OP_BARRIER;
    message.hash = 5;
    for (uint32_t node = 0; node < 3; node++)
        ck_assert_int_eq(say(node, &message), EPD_OK);
    ck_assert_uint_eq(n_told, 3);
    ck_assert_int_eq(told[0].message.error.status, EPD_OK);
    message.number = 2;
    ck_assert_int_eq(say(0, &message), EPD_OK);
    ck_assert_int_eq(say(0, &message), EPD_PROTOCOL); /* twice */
    message.hash = 6;
    ck_assert_int_eq(say(1, &message), EPD_OK);
    ck_assert_uint_eq(n_told, 6); /* at once: nobody waits for the third */
    ck_assert_int_eq(told[3].message.error.status, EPD_PLAN_MISMATCH);
    ck_assert_int_eq(say(2, &message), EPD_OK);
    ck_assert_uint_eq(n_told, 6);
}
END_TEST

START_TEST(more_groups_than_there_is_room_for_are_refused_to_who_asks)
{
    struct fabric_message message = join_of(0, "", 3, 0);
    for (uint32_t i = 0; i <= COORDINATOR_MAX_GROUPS; i++) {
        ck_assert_uint_eq(n_told, 0);
        snprintf(message.name, sizeof(message.name), "g%u", i);
        message.group = i;
        ck_assert_int_eq(say(0, &message), EPD_OK);
    }
    ck_assert_uint_eq(n_told, 1);
    ck_assert_uint_eq(told[0].node, 0);
    ck_assert_int_eq(told[0].message.kind, FABRIC_OPEN);
    ck_assert_uint_eq(told[0].message.number, COORDINATOR_MAX_GROUPS);
    ck_assert_int_eq(told[0].message.error.status, EPD_QUOTA);
    ck_assert_str_eq(told[0].message.error.text,
                     "group g4096: the fabric has 4096 groups across nodes, at most 4096");
}
END_TEST

static enum epd_status say_plan(enum fabric_kind kind, uint32_t node, uint64_t group, uint64_t key,
                                enum epd_status failed)
{
    struct fabric_message message;
    fabric_message_init(&message, kind);
    message.group = group;
    message.number = key;
    message.op = EPD_OP_BARRIER;
    if (failed)
        (void)error_set(&message.error, failed, "of node %u", node);
    return say(node, &message);
}

static uint64_t n_unsettled(void)
{
    uint64_t n_groups, n_plans;
    coordinator_count(coordinator, &n_groups, &n_plans);
    return n_plans;
}

/* All are told, so that nobody waits for a plan that cannot be; what another node has said of it meanwhile is cleared
 * away. */
START_TEST(more_plans_than_there_is_room_for_are_refused)
{
    const uint64_t group = join_all();
    for (uint32_t key = 1; key <= COORDINATOR_MAX_PLANS; key++)
        ck_assert_int_eq(say_plan(FABRIC_PLAN, 0, group, key, EPD_OK), EPD_OK);
    ck_assert_uint_eq(n_told, 0);
    ck_assert_int_eq(say_plan(FABRIC_PLAN, 0, group, COORDINATOR_MAX_PLANS + 1, EPD_OK), EPD_OK);
    ck_assert_uint_eq(n_told, 3);
    for (size_t i = 0; i < 3; i++) {
        ck_assert_int_eq(told[i].message.kind, FABRIC_READY);
        ck_assert_uint_eq(told[i].message.number, COORDINATOR_MAX_PLANS + 1);
        ck_assert_int_eq(told[i].message.error.status, EPD_QUOTA);
    }
    ck_assert_str_eq(told[0].message.error.text,
                     "plan 4097 of group g: 4096 of its plans wait for nodes, at most 4096");
    for (uint32_t node = 0; node < 3; node++)
        ck_assert_int_eq(say_plan(FABRIC_HEARD, node, group, COORDINATOR_MAX_PLANS + 1, EPD_OK), EPD_OK);
    n_told = 0;
    for (uint32_t node = 1; node < 3; node++)
        ck_assert_int_eq(say_plan(FABRIC_PLAN, node, group, 1, EPD_OK), EPD_OK);
    ck_assert_uint_eq(n_told, 3); /* there is room for one again */
    ck_assert_int_eq(told[0].message.error.status, EPD_OK);
    n_told = 0;
    ck_assert_int_eq(say_plan(FABRIC_PLAN, 1, group, COORDINATOR_MAX_PLANS + 1, EPD_OK),
                     EPD_OK); /* was late */
    ck_assert_uint_eq(n_unsettled(), COORDINATOR_MAX_PLANS);
    ck_assert_int_eq(say_plan(FABRIC_HEARD, 1, group, COORDINATOR_MAX_PLANS + 1, EPD_OK), EPD_OK);
    ck_assert_uint_eq(n_told, 3);
    ck_assert_int_eq(told[0].message.error.status, EPD_QUOTA);
    for (uint32_t node = 0; node < 3; node++)
        ck_assert_int_eq(say_plan(FABRIC_HEARD, node, group, COORDINATOR_MAX_PLANS + 1, EPD_OK), EPD_OK);
    ck_assert_uint_eq(n_unsettled(), COORDINATOR_MAX_PLANS - 1);
}
END_TEST

START_TEST(a_failed_plan_goes_when_all_nodes_have_heard_of_it)
{
    const uint64_t group = join_all();
    for (uint32_t key = 1; key <= 2 * COORDINATOR_MAX_PLANS; key++) {
        n_told = 0;
        ck_assert_int_eq(say_plan(FABRIC_PLAN, 2, group, key, EPD_INVALID_SHAPE), EPD_OK);
        ck_assert_uint_eq(n_told, 3);
        if (key % 2) /* was on its way */
            ck_assert_int_eq(say_plan(FABRIC_PLAN, 1, group, key, EPD_OK), EPD_OK);
        for (uint32_t node = 0; node < 3; node++) {
            ck_assert_uint_eq(n_unsettled(), 1);
            ck_assert_int_eq(say_plan(FABRIC_HEARD, node, group, key, EPD_OK), EPD_OK);
        }
        ck_assert_uint_eq(n_unsettled(), 0);
        ck_assert_uint_eq(n_told, 3);
    }
}
END_TEST

/* ---- groups of some of the nodes ---- */

/* Opens a group of two nodes, `first` with the first block, and returns its id. */
static uint64_t join_two(const char *name, uint32_t first, uint32_t second)
{
    n_told = 0;
    say_join_to(second, name, 2, 1);
    ck_assert_uint_eq(n_told, 0);
    say_join_to(first, name, 2, 0);
    ck_assert_uint_eq(n_told, 2);
    for (uint32_t i = 0; i < 2; i++) {
        const struct fabric_message *open = &told[i].message;
        ck_assert_uint_eq(told[i].node, i ? second : first);
        ck_assert_int_eq(open->kind, FABRIC_OPEN);
        ck_assert_int_eq(open->error.status, EPD_OK);
        ck_assert_uint_eq(open->number, 100 + told[i].node);
        ck_assert_uint_eq(open->n_nodes, 2);
        ck_assert_uint_eq(open->nodes[0], first);
        ck_assert_uint_eq(open->nodes[1], second);
        ck_assert_uint_eq(open->n_addresses, 2);
        ck_assert_uint_eq(open->addresses[0].data[0], 100 + first);
        ck_assert_uint_eq(open->addresses[1].data[0], 100 + second);
    }
    n_told = 0;
    return told[0].message.group;
}

static uint64_t n_spanning(void)
{
    uint64_t n_groups, n_plans;
    coordinator_count(coordinator, &n_groups, &n_plans);
    return n_groups;
}

START_TEST(a_group_has_the_nodes_that_join_it_in_the_order_of_their_ranks)
{
    const uint64_t one = join_two("one", 2, 0), other = join_two("other", 1, 2);
    ck_assert_int_eq(say_step(2, one, 1, 1, EPD_OK), EPD_OK);
    ck_assert_int_eq(say_step(2, other, 1, 1, EPD_OK), EPD_OK);
    ck_assert_int_eq(say_step(1, other, 1, 1, EPD_OK), EPD_OK);
    ck_assert_uint_eq(n_told, 2); /* the nodes of the other alone, whatever the first waits for */
    for (size_t i = 0; i < 2; i++) {
        ck_assert_int_eq(told[i].message.kind, FABRIC_GO);
        ck_assert_uint_eq(told[i].message.group, other);
        ck_assert_uint_eq(told[i].node, 1 + i);
    }
    n_told = 0;
    ck_assert_int_eq(say_step(0, one, 1, 1, EPD_OK), EPD_OK);
    ck_assert_uint_eq(n_told, 2);
    ck_assert_uint_eq(told[0].node, 0);
    ck_assert_uint_eq(told[1].node, 2);
}
END_TEST

START_TEST(a_lost_node_leaves_the_groups_alone_that_it_is_not_in)
{
    const struct epd_error why = {EPD_PEER_LOST, "node 2 is lost: cut"};
    const uint64_t apart = join_two("apart", 0, 1), with = join_two("with", 1, 2);
    say_join_to(1, "joining", 2, 0); /* waits for any node */
    say_join_to(2, "half", 2, 0);
    coordinator_lose(coordinator, 2, &why);
    ck_assert_uint_eq(n_told, 1);
    ck_assert_uint_eq(told[0].node, 1);
    ck_assert_int_eq(told[0].message.kind, FABRIC_BREAK);
    ck_assert_uint_eq(told[0].message.group, with);
    ck_assert_uint_eq(n_spanning(), 2); /* apart, joining */
    n_told = 0;
    ck_assert_int_eq(say_step(0, apart, 1, 1, EPD_OK), EPD_OK);
    ck_assert_int_eq(say_step(1, apart, 1, 1, EPD_OK), EPD_OK);
    ck_assert_uint_eq(n_told, 2);
    ck_assert_int_eq(told[0].message.kind, FABRIC_GO);
    n_told = 0;
    say_join_to(0, "joining", 2, 1); /* no need of node 2 */
    ck_assert_uint_eq(n_told, 2);
    ck_assert_int_eq(told[0].message.error.status, EPD_OK);
    (void)join_two("half", 0, 1); /* it had joined, and its block is free */
}
END_TEST

START_TEST(two_nodes_with_the_same_ranks_are_both_told)
{
    say_join_to(0, "moe", 2, 0);
    say_join_to(2, "moe", 2, 0);
    ck_assert_uint_eq(n_told, 2);
    for (size_t i = 0; i < 2; i++) {
        ck_assert_uint_eq(told[i].node, 2 * i);
        ck_assert_int_eq(told[i].message.error.status, EPD_GROUP_MISMATCH);
        ck_assert_str_eq(told[i].message.error.text,
                         "group moe rank: node 2 says 0, node 0 says 0 too: each rank joins once, and groups "
                         "of other nodes need names of their own");
    }
    n_told = 0;
    say_join_to(0, "moe", 2, 0);
    say_join_to(1, "moe", 3, 1);
    ck_assert_uint_eq(n_told, 2);
    ck_assert_str_eq(told[0].message.error.text, "group moe world_size: node 1 says 3, node 0 says 2");
    ck_assert_uint_eq(n_spanning(), 0);
}
END_TEST

START_TEST(a_name_stands_for_one_group_at_a_time)
{
    const uint64_t group = join_two("moe", 0, 2);
    struct fabric_message other_uid = join_of(1, "moe", 2, 0), ended;
    say_join_to(1, "moe", 2, 0);
    ck_assert_uint_eq(n_told, 1);
    ck_assert_uint_eq(told[0].node, 1);
    ck_assert_uint_eq(told[0].message.number, 101);
    ck_assert_int_eq(told[0].message.error.status, EPD_IN_USE);
    ck_assert_str_eq(told[0].message.error.text,
                     "group moe: open on nodes 0 2; groups of other nodes need names of their own");
    other_uid.uid = 7;
    ck_assert_int_eq(say(1, &other_uid), EPD_OK);
    ck_assert_uint_eq(n_told, 1);
    fabric_message_init(&ended, FABRIC_BREAK);
    ended.group = group;
    ck_assert_int_eq(say(2, &ended), EPD_OK);
    (void)join_two("moe", 1, 2); /* the name is free */
}
END_TEST

/* The ranks of node 1 go while OPEN is on its way to them; others come. */
START_TEST(a_node_that_gives_up_what_has_just_opened_ends_it)
{
    const uint64_t group = join_two("moe", 0, 1);
    struct fabric_message gone = join_of(1, "moe", 2, 1);
    gone.group = 50; /* another group of it, long gone */
    (void)error_set(&gone.error, EPD_PEER_LOST, "rank 1 has left");
    ck_assert_int_eq(say(1, &gone), EPD_OK);
    ck_assert_uint_eq(n_told, 0);
    gone.group = 101;
    ck_assert_int_eq(say(1, &gone), EPD_OK);
    ck_assert_uint_eq(n_told, 1);
    ck_assert_uint_eq(told[0].node, 0);
    ck_assert_int_eq(told[0].message.kind, FABRIC_BREAK);
    ck_assert_uint_eq(told[0].message.group, group);
    ck_assert_str_eq(told[0].message.error.text, "rank 1 has left");
    (void)join_two("moe", 0, 1);
}
END_TEST

START_TEST(missing_ranks_are_named_where_their_node_cannot_be)
{
    worker->config.join_ms = 1;
    fabric->config.n_nodes = 4;
    say_join_to(3, "moe", 3, 1);
    coordinator_check(coordinator, UINT64_MAX / 2);
    ck_assert_uint_eq(n_told, 1);
    ck_assert_int_eq(told[0].message.error.status, EPD_TIMEOUT);
    ck_assert_str_eq(told[0].message.error.text,
                     "group moe: not joined within 1 ms by the nodes of ranks 0 2; joined by node 3");
    n_told = 0;
    worker->config.stuck_ms = 1;
    const uint64_t group = join_two("moe", 3, 1);
    ck_assert_int_eq(say_step(1, group, 1, 1, EPD_OK), EPD_OK);
    coordinator_check(coordinator, UINT64_MAX / 2);
    ck_assert_uint_eq(n_told, 2);
    ck_assert_ptr_nonnull(strstr(told[0].message.error.text, "by node 3"));
    ck_assert_ptr_null(strstr(told[0].message.error.text, "by node 3 "));
}
END_TEST

/* What no honest node says ends its link, and nothing else. */
START_TEST(joins_and_words_of_dishonest_nodes_are_refused)
{
    struct fabric_message bad;
    bad = join_of(0, "moe", 2, 2); /* no such block */
    ck_assert_int_eq(say(0, &bad), EPD_PROTOCOL);
    bad = join_of(0, "moe", 2, 0);
    bad.config[GROUP_FIELD_NODES] = 4; /* more than the fabric has */
    ck_assert_int_eq(say(0, &bad), EPD_PROTOCOL);
    bad.config[GROUP_FIELD_NODES] = 1;
    ck_assert_int_eq(say(0, &bad), EPD_PROTOCOL);
    bad.config[GROUP_FIELD_NODES] = -2;
    ck_assert_int_eq(say(0, &bad), EPD_PROTOCOL);
    bad = join_of(0, "moe", 2, 0);
    bad.world_size = 3; /* do not divide */
    ck_assert_int_eq(say(0, &bad), EPD_PROTOCOL);
    bad.world_size = 4; /* two on each, one address */
    ck_assert_int_eq(say(0, &bad), EPD_PROTOCOL);
    bad.world_size = 0;
    ck_assert_int_eq(say(0, &bad), EPD_PROTOCOL);
    bad = join_of(0, "moe", 2, 0);
    bad.n_config = GROUP_N_FIELDS - 1;
    ck_assert_int_eq(say(0, &bad), EPD_PROTOCOL);
    ck_assert_uint_eq(n_spanning(), 0);
    say_join_to(0, "twice", 2, 0);
    bad = join_of(0, "twice", 2, 0);
    ck_assert_int_eq(say(0, &bad), EPD_PROTOCOL);
    bad = join_of(0, "twice", 2, 1); /* both blocks are not here */
    ck_assert_int_eq(say(0, &bad), EPD_PROTOCOL);
    const uint64_t group = join_two("moe", 1, 2);
    static const enum fabric_kind kinds[] = {FABRIC_PLAN, FABRIC_HEARD, FABRIC_STEP, FABRIC_BREAK};
    for (size_t i = 0; i < sizeof(kinds) / sizeof(*kinds); i++) {
        fabric_message_init(&bad, kinds[i]);
        bad.group = group;
        bad.number = 1;
        ck_assert_int_eq(say(0, &bad), EPD_PROTOCOL); /* of a group that it is not in */
    }
    ck_assert_uint_eq(n_told, 0);
    ck_assert_int_eq(say_step(1, group, 1, 1, EPD_OK), EPD_OK);
    ck_assert_int_eq(say_step(2, group, 1, 1, EPD_OK), EPD_OK);
    ck_assert_uint_eq(n_told, 2);
}
END_TEST

/* In bits of 64. */
START_TEST(a_fabric_may_have_sixty_four_nodes)
{
    fabric->config.n_nodes = EPD_MAX_NODES;
    const uint64_t group = join_two("ends", 63, 0);
    ck_assert_int_eq(say_step(0, group, 1, 1, EPD_OK), EPD_OK);
    ck_assert_int_eq(say_step(63, group, 1, 1, EPD_OK), EPD_OK);
    ck_assert_uint_eq(n_told, 2);
    n_told = 0;
    for (uint32_t node = 0; node < EPD_MAX_NODES; node++)
        say_join_to(node, "all", EPD_MAX_NODES, EPD_MAX_NODES - 1 - node);
    ck_assert_uint_eq(n_told, EPD_MAX_NODES);
    ck_assert_int_eq(told[0].message.error.status, EPD_OK);
    ck_assert_uint_eq(told[0].node, 63);
}
END_TEST

int main(void)
{
    const TTest *const tests[] = {a_group_opens_when_all_nodes_have_joined_alike,
                                  steps_go_in_one_order_and_only_when_all_nodes_have_announced_them,
                                  a_failed_step_fails_for_all_in_its_turn_and_the_next_matches_again,
                                  a_lost_node_ends_its_groups_on_all_others,
                                  who_does_not_come_is_named_at_the_deadline,
                                  plans_are_ready_when_all_nodes_have_offered_like_ones,
                                  more_groups_than_there_is_room_for_are_refused_to_who_asks,
                                  more_plans_than_there_is_room_for_are_refused,
                                  a_failed_plan_goes_when_all_nodes_have_heard_of_it,
                                  a_group_has_the_nodes_that_join_it_in_the_order_of_their_ranks,
                                  a_lost_node_leaves_the_groups_alone_that_it_is_not_in,
                                  two_nodes_with_the_same_ranks_are_both_told,
                                  a_name_stands_for_one_group_at_a_time,
                                  a_node_that_gives_up_what_has_just_opened_ends_it,
                                  missing_ranks_are_named_where_their_node_cannot_be,
                                  joins_and_words_of_dishonest_nodes_are_refused,
                                  a_fabric_may_have_sixty_four_nodes,
                                  NULL};
    return suite_run("daemon_coordinator", tests, setup, teardown);
}
