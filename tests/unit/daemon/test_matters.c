/* What the coordinator decides of plans and steps of groups that span nodes. */
#include <stdlib.h>
#include <string.h>

#include "daemon/group_fields.h"
#include "tests/unit/daemon/coordinator_fixture.h"
#include "tests/unit/daemon/suite.h"

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
    coordinator_count(the_coordinator, &n_groups, &n_plans);
    return n_plans;
}

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

START_TEST(plans_are_ready_when_all_nodes_have_offered_like_ones)
{
    const uint64_t group = join_all();
    struct fabric_message message;
    fabric_message_init(&message, FABRIC_PLAN);
    message.group = group;
    message.number = 1;
    message.op = EPD_OP_BARRIER;
    message.hash = 5;
    for (uint32_t node = 0; node < 3; node++) {
        message.n_tokens = node == 1 ? 33 : 7 * node;
        ck_assert_int_eq(say(node, &message), EPD_OK);
    }
    ck_assert_uint_eq(n_told, 3);
    ck_assert_int_eq(told[0].message.error.status, EPD_OK);
    for (size_t i = 0; i < 3; i++)
        ck_assert_uint_eq(told[i].message.n_tokens, 33); /* the most of all */
    message.number = 3;
    message.n_tokens = 34; /* than the group allows */
    ck_assert_int_eq(say(1, &message), EPD_PROTOCOL);
    message.n_tokens = 0;
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

int main(void)
{
    const TTest *const tests[] = {steps_go_in_one_order_and_only_when_all_nodes_have_announced_them,
                                  a_failed_step_fails_for_all_in_its_turn_and_the_next_matches_again,
                                  plans_are_ready_when_all_nodes_have_offered_like_ones,
                                  more_plans_than_there_is_room_for_are_refused,
                                  a_failed_plan_goes_when_all_nodes_have_heard_of_it,
                                  NULL};
    return suite_run("daemon_matters", tests, fixture_open, fixture_close);
}
