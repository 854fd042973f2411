/* What the coordinator decides of joins and ends of groups that span nodes. */
#include <stdlib.h>
#include <string.h>

#include "daemon/group_fields.h"
#include "tests/unit/daemon/coordinator_fixture.h"
#include "tests/unit/daemon/suite.h"

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

START_TEST(a_lost_node_ends_its_groups_on_all_others)
{
    const struct epd_error why = {EPD_PEER_LOST, "node 1 is lost: cut"};
    const uint64_t group = join_all();
    coordinator_lose(the_coordinator, 1, &why);
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
    the_worker->config.join_ms = the_worker->config.stuck_ms = 1;
    say_join(0, 64);
    say_join(1, 64);
    usleep(5000);
    coordinator_check(the_coordinator, UINT64_MAX / 2);
    ck_assert_uint_eq(n_told, 2);
    ck_assert_int_eq(told[0].message.error.status, EPD_TIMEOUT);
    ck_assert_ptr_nonnull(strstr(told[0].message.error.text, "by node 2"));
    n_told = 0;
    const uint64_t group = join_all();
    ck_assert_int_eq(say_step(2, group, 1, 1, EPD_OK), EPD_OK);
    coordinator_check(the_coordinator, UINT64_MAX / 2);
    ck_assert_uint_eq(n_told, 3);
    ck_assert_ptr_nonnull(strstr(told[0].message.error.text, "by node 0 1"));
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
    coordinator_lose(the_coordinator, 2, &why);
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
    the_worker->config.join_ms = 1;
    the_fabric->config.n_nodes = 4;
    say_join_to(3, "moe", 3, 1);
    coordinator_check(the_coordinator, UINT64_MAX / 2);
    ck_assert_uint_eq(n_told, 1);
    ck_assert_int_eq(told[0].message.error.status, EPD_TIMEOUT);
    ck_assert_str_eq(told[0].message.error.text,
                     "group moe: not joined within 1 ms by the nodes of ranks 0 2; joined by node 3");
    n_told = 0;
    the_worker->config.stuck_ms = 1;
    const uint64_t group = join_two("moe", 3, 1);
    ck_assert_int_eq(say_step(1, group, 1, 1, EPD_OK), EPD_OK);
    coordinator_check(the_coordinator, UINT64_MAX / 2);
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
    the_fabric->config.n_nodes = EPD_MAX_NODES;
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

/* Who has left is not named: another node that has said the same is. */
START_TEST(a_node_that_has_left_a_join_is_not_named)
{
    const struct epd_error gone = {EPD_PEER_LOST, "node 0 is lost"};
    say_join(0, 64);
    say_join(2, 64);
    coordinator_lose(the_coordinator, 0, &gone);
    say_join(1, 72);
    ck_assert_uint_eq(n_told, 2);
    ck_assert_str_eq(told[0].message.error.text, "group g hidden: node 1 says 72, node 2 says 64");
}
END_TEST

/* Its node has not joined: the rank was refused first. The others hear of it, unless nobody waits for that rank. */
START_TEST(a_rank_that_is_refused_ends_the_join_of_all_nodes)
{
    struct fabric_message refused = join_of(1, "moe", 2, 1);
    refused.group = 0;
    refused.n_config = refused.n_addresses = 0;
    (void)error_set(&refused.error, EPD_QUOTA, "group moe: rank 1 on node 1 was refused: groups");
    ck_assert_int_eq(say(1, &refused), EPD_OK); /* nobody waits */
    say_join_to(0, "moe", 2, 0);
    refused.block = 0; /* it is there */
    ck_assert_int_eq(say(1, &refused), EPD_OK);
    refused.block = 1;
    refused.world_size = 3;
    ck_assert_int_eq(say(1, &refused), EPD_OK);
    refused.world_size = 2;
    refused.uid = 7; /* another group of the name */
    ck_assert_int_eq(say(1, &refused), EPD_OK);
    refused.uid = 0;
    ck_assert_uint_eq(n_told, 0);
    ck_assert_int_eq(say(1, &refused), EPD_OK);
    ck_assert_uint_eq(n_told, 1);
    ck_assert_uint_eq(told[0].node, 0);
    ck_assert_int_eq(told[0].message.kind, FABRIC_OPEN);
    ck_assert_int_eq(told[0].message.error.status, EPD_QUOTA);
    ck_assert_str_eq(told[0].message.error.text, refused.error.text);
    (void)join_two("moe", 0, 1);
    ck_assert_int_eq(say(1, &refused), EPD_OK); /* it is open */
    ck_assert_uint_eq(n_told, 0);
}
END_TEST

/* Of many nodes and of the longest name, the whole reason is told. */
START_TEST(a_reason_of_many_nodes_is_told_whole)
{
    char name[EPD_MAX_NAME_BYTES];
    memset(name, 'g', sizeof(name) - 1);
    name[sizeof(name) - 1] = 0;
    the_fabric->config.n_nodes = EPD_MAX_NODES;
    for (uint32_t node = 0; node < 60; node += 2)
        say_join_to(node, name, 60, node);
    coordinator_check(the_coordinator, UINT64_MAX / 2);
    ck_assert_uint_eq(n_told, 30);
    const char *text = told[0].message.error.text;
    ck_assert_uint_lt(strlen(text), EPD_ERROR_TEXT_BYTES - 1);
    ck_assert_ptr_nonnull(strstr(text, "by the nodes of ranks 1 3 5 7"));
    ck_assert_ptr_nonnull(strstr(text, " and more; joined by node 0 2 4 6"));
}
END_TEST

int main(void)
{
    const TTest *const tests[] = {a_group_opens_when_all_nodes_have_joined_alike,
                                  a_lost_node_ends_its_groups_on_all_others,
                                  who_does_not_come_is_named_at_the_deadline,
                                  more_groups_than_there_is_room_for_are_refused_to_who_asks,
                                  a_group_has_the_nodes_that_join_it_in_the_order_of_their_ranks,
                                  a_lost_node_leaves_the_groups_alone_that_it_is_not_in,
                                  two_nodes_with_the_same_ranks_are_both_told,
                                  a_name_stands_for_one_group_at_a_time,
                                  a_node_that_gives_up_what_has_just_opened_ends_it,
                                  missing_ranks_are_named_where_their_node_cannot_be,
                                  joins_and_words_of_dishonest_nodes_are_refused,
                                  a_fabric_may_have_sixty_four_nodes,
                                  a_node_that_has_left_a_join_is_not_named,
                                  a_rank_that_is_refused_ends_the_join_of_all_nodes,
                                  a_reason_of_many_nodes_is_told_whole,
                                  NULL};
    return suite_run("daemon_coordinator", tests, fixture_open, fixture_close);
}
