/* Rows 19, 20 and 21 of the faults: the device memory of a client holds what it must not. */
#include "tests/gpu/fault/suites.h"

START_TEST(wrong_routing_is_named_and_the_next_step_is_right)
{
    expect_role("routing", fixture.world);
}
END_TEST

START_TEST(routing_that_changes_while_the_step_runs_stays_in_bounds)
{
    expect_role("flicker", fixture.world);
}
END_TEST

START_TEST(one_row_more_than_the_capacity_is_an_error_that_says_how_many_would_do)
{
    expect_role("full", fixture.world);
    expect_role("full", 1);
}
END_TEST

START_TEST(no_tokens_and_no_experts_are_no_error)
{
    expect_role("empty", fixture.world);
}
END_TEST

START_TEST(padding_is_zero_and_a_nan_stays_in_its_token)
{
    expect_role("nan", fixture.world);
}
END_TEST

START_TEST(wrong_splits_are_refused_and_nothing_past_the_rows_is_written)
{
    expect_role("splits", 1);
}
END_TEST

void add_input_tests(TCase *cases)
{
    suite_add(cases, wrong_routing_is_named_and_the_next_step_is_right);
    suite_add(cases, routing_that_changes_while_the_step_runs_stays_in_bounds);
    suite_add(cases, one_row_more_than_the_capacity_is_an_error_that_says_how_many_would_do);
    suite_add(cases, no_tokens_and_no_experts_are_no_error);
    suite_add(cases, padding_is_zero_and_a_nan_stays_in_its_token);
    suite_add(cases, wrong_splits_are_refused_and_nothing_past_the_rows_is_written);
}
