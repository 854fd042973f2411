/* Plans against a daemon that the test plays: what is asked, what a launch sends, how launches end. */
#include <check.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "client/deadline.h"
#include "client/plan.h"
#include "tests/unit/client/group_fixture.h"

#define FLAG 5

static void script_activation(struct fake *daemon)
{
    fake_session(daemon);
    fake_expect(daemon, MESSAGE_BUFFER_ALLOC);
    fake_answer_buffer(daemon); /* 101 */
    fake_expect(daemon, MESSAGE_PLAN_CREATE);
    const struct message_plan_create *create = &daemon->last.plan_create;
    script_must(create->group_id == 100 && create->op == EPD_OP_DISPATCH && create->n_bindings == 2);
    script_must(create->bindings[1].role == EPD_ROLE_TOPK_IDX && create->bindings[1].buffer_id == 101);
    script_must(create->bindings[1].offset == 64 && create->bindings[1].shape[1] == 2);
    fake_answer_plan(daemon, FLAG); /* 102 */
    fake_expect(daemon, MESSAGE_PLAN_CREATE);
    script_must(daemon->last.plan_create.context_plan_id == 102);
    fake_answer_plan(daemon, FLAG + 1); /* 103 */
    for (uint64_t seq = 1; seq <= 2; seq++) {
        fake_expect(daemon, MESSAGE_LAUNCH);
        script_must(daemon->last.launch.plan_id == 102 && daemon->last.launch.seq == seq);
        script_must(daemon->last.launch.n_tokens == (seq == 1 ? 8 : 3));
        script_must(daemon->last.launch.shape_hash == 0xabcdef && daemon->last.launch.n_repeats == 1);
        fake_complete(daemon, FLAG);
    }
    fake_expect(daemon, MESSAGE_PLAN_DESTROY); /* the context goes after the plan that has it */
    script_must(daemon->last.plan_destroy.id == 103);
    fake_answer_ok(daemon);
    fake_expect(daemon, MESSAGE_PLAN_DESTROY);
    script_must(daemon->last.plan_destroy.id == 102);
    fake_answer_ok(daemon);
    fake_expect(daemon, MESSAGE_BUFFER_RELEASE);
    fake_answer_ok(daemon);
}

START_TEST(plan_is_created_launched_in_sequence_and_destroyed_after_its_dependents)
{
    struct epd_buffer *buffer;
    struct epd_plan *plan, *dependent;
    struct epd_plan_info info = {.size = sizeof info};

    start(script_activation);
    ck_assert_int_eq(epd_buffer_alloc(group, 1024, &buffer), EPD_OK);
    const struct epd_tensor tensors[] = {
        {.role = EPD_ROLE_X, .buffer = buffer, .dtype = EPD_F32, .n_dims = 2, .shape = {8, 2}},
        {.role = EPD_ROLE_TOPK_IDX,
         .buffer = buffer,
         .offset_bytes = 64,
         .dtype = EPD_I32,
         .n_dims = 2,
         .shape = {8, 2}},
    };
    struct epd_plan_options options = {
        .size = sizeof options, .op = EPD_OP_DISPATCH, .n_tensors = 2, .tensors = tensors};
    ck_assert_int_eq(epd_plan_create(group, &options, &plan), EPD_OK);
    options.context = plan;
    ck_assert_int_eq(epd_plan_create(group, &options, &dependent), EPD_OK);
    ck_assert_int_eq(epd_plan_wait(plan, 0), EPD_OK); /* nothing in flight */
    ck_assert_int_eq(epd_plan_launch(plan, NULL), EPD_OK);
    ck_assert_int_eq(epd_plan_wait(plan, 0), EPD_OK);
    ck_assert_int_eq(epd_plan_set_tokens(plan, 9), EPD_INVALID_ARGUMENT);
    ck_assert_str_eq(epd_error_text(), "dispatch n_tokens: 9, at most 8 (rows of its tensors)");
    ck_assert_int_eq(epd_plan_set_tokens(plan, 3), EPD_OK);
    ck_assert_int_eq(epd_plan_launch(plan, NULL), EPD_OK);
    ck_assert_int_eq(epd_plan_wait(plan, 5000), EPD_OK);
    ck_assert_int_eq(epd_plan_info(plan, &info), EPD_OK);
    ck_assert_uint_eq(info.plan_id, 102);
    ck_assert_uint_eq(info.launches, 2);
    ck_assert_uint_eq(info.saved_bytes, 40);
    ck_assert_int_eq(epd_buffer_release(buffer), EPD_IN_USE);
    ck_assert_str_eq(epd_error_text(), "buffer of 1024 bytes: 4 tensors of plans are bound to it");
    epd_plan_destroy(plan);
    epd_plan_destroy(dependent);
    ck_assert_int_eq(epd_buffer_release(buffer), EPD_OK);
}
END_TEST

static void script_fail(struct fake *daemon)
{
    struct page_entry entry = {
        .status = EPD_PEER_LOST, .phase = EPD_PHASE_GATHER, .rank = 3, .text = "rank 3 is gone in gather"};

    fake_session(daemon);
    fake_expect(daemon, MESSAGE_PLAN_CREATE);
    fake_answer_plan(daemon, FLAG);
    entry.plan_id = daemon->next_id - 1;
    fake_expect(daemon, MESSAGE_LAUNCH);
    entry.seq = daemon->last.launch.seq;
    fake_fail(daemon, FLAG, &entry);
    fake_expect(daemon, MESSAGE_LAUNCH);
    fake_complete(daemon, FLAG);
}

START_TEST(failed_launch_tells_status_phase_rank_and_sentence)
{
    struct epd_failure failure = {.size = sizeof failure};

    start(script_fail);
    struct epd_plan *plan = create_barrier(group);
    ck_assert_int_eq(epd_plan_failure(plan, &failure), EPD_UNKNOWN_ID);
    ck_assert_int_eq(epd_plan_launch(plan, NULL), EPD_OK);
    ck_assert_int_eq(epd_plan_wait(plan, 0), EPD_PEER_LOST);
    ck_assert_str_eq(epd_error_text(), "rank 3 is gone in gather");
    ck_assert_int_eq(epd_plan_failure(plan, &failure), EPD_OK);
    ck_assert_int_eq(failure.status, EPD_PEER_LOST);
    ck_assert_int_eq(failure.phase, EPD_PHASE_GATHER);
    ck_assert_int_eq(failure.rank, 3);
    ck_assert_uint_eq(failure.seq, 1);
    ck_assert_str_eq(failure.text, "rank 3 is gone in gather");
    ck_assert_int_eq(epd_plan_launch(plan, NULL), EPD_OK); /* the plan goes on */
    ck_assert_int_eq(epd_plan_wait(plan, 0), EPD_OK);
}
END_TEST

static void script_flood(struct fake *daemon)
{
    struct page_entry entry = {.status = EPD_TIMEOUT, .text = "why"};

    fake_session(daemon);
    fake_expect(daemon, MESSAGE_PLAN_CREATE);
    fake_answer_plan(daemon, FLAG);
    fake_expect(daemon, MESSAGE_LAUNCH);
    entry.plan_id = 1000; /* another plan's reports fill the ring */
    for (int i = 0; i < EPD_PAGE_RING_ENTRIES - 1; i++)
        page_report(daemon->page, &entry);
    entry.plan_id = 1001;
    fake_fail(daemon, FLAG, &entry);
}

START_TEST(failed_launch_whose_report_is_missing_is_still_a_failure)
{
    start(script_flood);
    struct epd_plan *plan = create_barrier(group);
    ck_assert_int_eq(epd_plan_launch(plan, NULL), EPD_OK);
    ck_assert_int_eq(epd_plan_wait(plan, 0), EPD_INTERNAL);
    ck_assert_ptr_nonnull(strstr(epd_error_text(), "newer reports have overwritten why"));
}
END_TEST

static void script_slow(struct fake *daemon)
{
    fake_session(daemon);
    fake_expect(daemon, MESSAGE_PLAN_CREATE);
    fake_answer_plan(daemon, FLAG);
    fake_expect(daemon, MESSAGE_LAUNCH);
    fake_expect(daemon, MESSAGE_STATS);        /* the client's sign to end the launch */
    flag_set(&daemon->page->plans[FLAG].done); /* a wake-up that means nothing */
    fake_answer_error(daemon, EPD_UNSUPPORTED, "none");
    fake_expect(daemon, MESSAGE_STATS);
    fake_complete(daemon, FLAG);
    fake_answer_error(daemon, EPD_UNSUPPORTED, "none");
}

START_TEST(launch_in_flight_is_busy_until_its_wait_has_seen_the_end)
{
    char *json;

    start(script_slow);
    struct epd_plan *plan = create_barrier(group);
    ck_assert_int_eq(epd_plan_launch(plan, &client), EPD_INVALID_ARGUMENT);
    ck_assert_ptr_nonnull(strstr(epd_error_text(), "want NULL on the host backend"));
    ck_assert_int_eq(epd_plan_launch(plan, NULL), EPD_OK);
    ck_assert_int_eq(epd_plan_launch(plan, NULL), EPD_BUSY);
    ck_assert_int_eq(epd_plan_wait(plan, 20), EPD_TIMEOUT);
    ck_assert_int_eq(epd_stats(client, &json), EPD_UNSUPPORTED);
    ck_assert_int_eq(epd_plan_wait(plan, 20), EPD_TIMEOUT);
    ck_assert_int_eq(epd_plan_launch(plan, NULL), EPD_BUSY);
    ck_assert_int_eq(epd_stats(client, &json), EPD_UNSUPPORTED);
    ck_assert_int_eq(epd_plan_wait(plan, 0), EPD_OK);
    ck_assert_int_eq(epd_plan_step(plan, NULL, NULL, 0, 0), EPD_UNSUPPORTED);
    ck_assert_int_eq(epd_plan_capture(plan, NULL), EPD_UNSUPPORTED);
    ck_assert_int_eq(epd_plan_arm(plan, 3), EPD_UNSUPPORTED);
}
END_TEST

static void script_die_in_launch(struct fake *daemon)
{
    fake_session(daemon);
    for (int i = 0; i < 3; i++) {
        fake_expect(daemon, MESSAGE_PLAN_CREATE);
        fake_answer_plan(daemon, FLAG + (uint32_t)i);
    }
    for (int i = 0; i < 3; i++)
        fake_expect(daemon, MESSAGE_LAUNCH);
    fake_complete(daemon, FLAG + 2); /* ended, whatever comes */
    fake_hang_up(daemon);
}

static void *wait_for_plan(void *plan)
{
    return (void *)(intptr_t)epd_plan_wait(plan, 0);
}

START_TEST(worker_that_dies_ends_every_launch_in_flight_restarted_and_no_other)
{
    struct epd_plan *plans[3];
    struct epd_failure failure = {.size = sizeof failure};
    pthread_t waiter;
    void *status;

    start(script_die_in_launch);
    for (int i = 0; i < 3; i++)
        plans[i] = create_barrier(group);
    ck_assert_int_eq(epd_plan_launch(plans[0], NULL), EPD_OK);
    pthread_create(&waiter, NULL, wait_for_plan, plans[0]);
    usleep(20000); /* the waiter sleeps on the flag */
    ck_assert_int_eq(epd_plan_wait(plans[0], 0), EPD_BUSY);
    ck_assert_int_eq(epd_plan_launch(plans[1], NULL), EPD_OK);
    ck_assert_int_eq(epd_plan_launch(plans[2], NULL), EPD_OK);
    pthread_join(waiter, &status);
    ck_assert_int_eq((int)(intptr_t)status, EPD_RESTARTED);
    ck_assert_int_eq(epd_plan_failure(plans[0], &failure), EPD_OK);
    ck_assert_int_eq(failure.status, EPD_RESTARTED);
    ck_assert_uint_eq(failure.seq, 1);
    ck_assert_int_eq(failure.rank, -1);
    ck_assert_int_eq(epd_plan_wait(plans[1], 0), EPD_RESTARTED);
    ck_assert_int_eq(epd_plan_wait(plans[2], 0), EPD_OK);
    ck_assert_int_eq(epd_plan_wait(plans[2], 0), EPD_RESTARTED);
    ck_assert_int_eq(epd_plan_launch(plans[2], NULL), EPD_RESTARTED);
    ck_assert_int_eq(epd_plan_set_tokens(plans[2], 0), EPD_RESTARTED);
    epd_plan_destroy(plans[0]);
}
END_TEST

static void script_full_socket(struct fake *daemon)
{
    fake_session(daemon);
    for (int i = 0; i < 2; i++) {
        fake_expect(daemon, MESSAGE_PLAN_CREATE);
        fake_answer_plan(daemon, FLAG + (uint32_t)i);
    }
    /* Reads nothing until the client has filled the socket, then everything. */
    usleep(200000);
    for (uint64_t seq = 1; seq <= 2000; seq++) {
        fake_expect(daemon, MESSAGE_LAUNCH);
        script_must(daemon->last.launch.seq == seq);
    }
    atomic_fetch_add(&daemon->page->plans[FLAG].completed, 1);
    flag_set(&daemon->page->plans[FLAG].done);
}

START_TEST(launches_wait_for_room_in_the_socket_and_none_is_lost)
{
    uint64_t last_seq = 0;
    struct epd_error error;

    start(script_full_socket);
    struct epd_plan *plan = create_barrier(group);
    struct epd_plan *other = create_barrier(group);
    ck_assert_int_eq(epd_plan_launch(plan, NULL), EPD_OK);
    last_seq = group->last_seq;
    (void)other;
    for (int i = 1; i < 2000; i++) {
        struct message_launch launch = {.plan_id = 102, .n_repeats = 1};
        ck_assert_int_eq(connection_launch(group->connection, &launch, &last_seq, &error), EPD_OK);
    }
    ck_assert_int_eq(epd_plan_wait(plan, 0), EPD_OK);
}
END_TEST

#define N_THREADS  4
#define N_LAUNCHES 200

static void script_threads(struct fake *daemon)
{
    fake_session(daemon);
    for (uint32_t i = 0; i < N_THREADS; i++) {
        fake_expect(daemon, MESSAGE_PLAN_CREATE);
        fake_answer_plan(daemon, i); /* ids from 101 */
    }
    for (uint64_t seq = 1; seq <= N_THREADS * N_LAUNCHES; seq++) {
        fake_expect(daemon, MESSAGE_LAUNCH);
        script_must(daemon->last.launch.seq == seq);
        fake_complete(daemon, (uint32_t)daemon->last.launch.plan_id - 101);
    }
}

static void *launch_and_wait(void *plan)
{
    for (int i = 0; i < N_LAUNCHES; i++)
        if (epd_plan_launch(plan, NULL) || epd_plan_wait(plan, 0))
            return plan;
    return NULL;
}

START_TEST(launches_of_several_threads_leave_in_the_order_of_their_numbers)
{
    struct epd_plan *plans[N_THREADS];
    pthread_t threads[N_THREADS];
    void *failed;

    start(script_threads);
    for (int i = 0; i < N_THREADS; i++)
        plans[i] = create_barrier(group);
    for (int i = 0; i < N_THREADS; i++)
        pthread_create(&threads[i], NULL, launch_and_wait, plans[i]);
    for (int i = 0; i < N_THREADS; i++) {
        pthread_join(threads[i], &failed);
        ck_assert_ptr_null(failed);
    }
}
END_TEST

static void *wait_until_lost(void *plan)
{
    while (epd_plan_wait(plan, 0) == EPD_OK)
        ;
    return NULL;
}

static void script_die_busy(struct fake *daemon)
{
    fake_session(daemon);
    fake_expect(daemon, MESSAGE_PLAN_CREATE);
    fake_answer_plan(daemon, 0);
    for (int i = 0; i < 50; i++) {
        fake_expect(daemon, MESSAGE_LAUNCH);
        fake_complete(daemon, 0);
    }
    fake_hang_up(daemon);
}

START_TEST(one_thread_launches_and_another_waits_until_the_daemon_dies)
{
    pthread_t waiter;
    enum epd_status status;

    start(script_die_busy);
    struct epd_plan *plan = create_barrier(group);
    pthread_create(&waiter, NULL, wait_until_lost, plan);
    do
        status = epd_plan_launch(plan, NULL);
    while (status == EPD_OK || status == EPD_BUSY);
    ck_assert_int_eq(status, EPD_RESTARTED);
    pthread_join(waiter, NULL);
}
END_TEST

#define N_CHECKED 300

/* Every third launch fails, a little after it was sent, so that checks and waits meet its end together. */
static void script_checked(struct fake *daemon)
{
    fake_session(daemon);
    fake_expect(daemon, MESSAGE_PLAN_CREATE);
    fake_answer_plan(daemon, FLAG);
    for (uint64_t seq = 1; seq <= N_CHECKED; seq++) {
        const struct page_entry entry = {
            .plan_id = 101, .seq = seq, .status = EPD_TIMEOUT, .rank = 1, .text = "rank 1 did not come"};
        fake_expect(daemon, MESSAGE_LAUNCH);
        usleep(seq % 7 * 20);
        if (seq % 3)
            fake_complete(daemon, FLAG);
        else
            fake_fail(daemon, FLAG, &entry);
    }
}

struct checker {
    struct epd_plan *plan;
    atomic_int stop;
    int n_failures, n_others;
};

static void *check_until_stopped(void *arg)
{
    struct checker *checker = arg;

    while (!atomic_load(&checker->stop)) {
        enum epd_status status = epd_plan_check(checker->plan);
        checker->n_failures += status == EPD_TIMEOUT;
        checker->n_others += status != EPD_OK && status != EPD_TIMEOUT;
    }
    return NULL;
}

/* Before, a wait that met a check was told that another thread waits, and nobody was told of the failure. */
START_TEST(check_beside_a_wait_disturbs_it_not_and_each_failure_is_told_once)
{
    struct checker checker = {0};
    pthread_t thread;
    int n_failures = 0;

    start(script_checked);
    checker.plan = create_barrier(group);
    pthread_create(&thread, NULL, check_until_stopped, &checker);
    for (int i = 0; i < N_CHECKED; i++) {
        ck_assert_int_eq(epd_plan_launch(checker.plan, NULL), EPD_OK);
        if (i % 2)
            usleep(60); /* the check may come first */
        enum epd_status status = epd_plan_wait(checker.plan, 0);
        ck_assert_msg(status == EPD_OK || status == EPD_TIMEOUT, "%s", epd_error_text());
        n_failures += status == EPD_TIMEOUT;
    }
    atomic_store(&checker.stop, 1);
    pthread_join(thread, NULL);
    ck_assert_int_eq(n_failures + checker.n_failures, N_CHECKED / 3);
    ck_assert_int_eq(checker.n_others, 0);
}
END_TEST

static void script_hang_up_in_launch(struct fake *daemon)
{
    fake_session(daemon);
    fake_expect(daemon, MESSAGE_PLAN_CREATE);
    fake_answer_plan(daemon, FLAG);
    fake_expect(daemon, MESSAGE_LAUNCH);
    fake_hang_up(daemon);
}

/* A launch that was armed and never replayed: nobody takes its flag. */
static uint64_t release_one_for_ever(struct epd_plan *plan)
{
    (void)plan;
    return 1;
}

/* The thread of the connection reads it, too. */
static void use(const struct stream_ops *ops)
{
    pthread_mutex_lock(&client->lock);
    group->ops = ops;
    pthread_mutex_unlock(&client->lock);
}

/* Not the second times what a short nap takes longer than it was asked for. */
START_TEST(flags_that_no_stream_takes_are_given_up_after_a_second)
{
    struct stream_ops ops;

    start(script_hang_up_in_launch);
    struct epd_plan *plan = create_barrier(group);
    ops = *group->ops;
    ops.release = release_one_for_ever;
    use(&ops);
    ck_assert_int_eq(epd_plan_launch(plan, NULL), EPD_OK);
    while (epd_plan_check(plan) == EPD_OK)
        usleep(1000);
    const uint64_t start_ns = deadline_now_ns();
    epd_close(client); /* waits for the thread that releases */
    client = NULL;
    const uint64_t took_ns = deadline_now_ns() - start_ns;
    ck_assert_uint_ge(took_ns, 900000000);
    ck_assert_uint_le(took_ns, 2000000000);
}
END_TEST

static void script_one_plan(struct fake *daemon)
{
    fake_session(daemon);
    fake_expect(daemon, MESSAGE_PLAN_CREATE);
    fake_answer_plan(daemon, FLAG);
    script_must(fake_peer_closed(daemon));
}

/* Counts as the CUDA backend does; then the connection ends. */
static enum epd_status arm_and_lose(struct epd_plan *plan, uint32_t n_launches, struct epd_error *error)
{
    (void)error;
    atomic_fetch_add(&plan->n_launched, n_launches);
    connection_stop(plan->group->connection);
    return EPD_OK;
}

/* A wait, or the end of the plan, would wait for ever for launches that nobody knows of. */
START_TEST(replays_that_were_not_announced_are_not_in_flight)
{
    struct stream_ops ops;

    start(script_one_plan);
    struct epd_plan *plan = create_barrier(group);
    ops = *group->ops;
    ops.arm = arm_and_lose;
    use(&ops);
    ck_assert_int_eq(epd_plan_arm(plan, 65537), EPD_INVALID_ARGUMENT);
    ck_assert_str_eq(epd_error_text(), "plan 101: 65537 launches to arm, want 1..65536");
    ck_assert_int_eq(epd_plan_arm(plan, 0), EPD_INVALID_ARGUMENT);
    ck_assert_uint_eq(atomic_load(&plan->n_launched), 0);
    ck_assert_int_eq(epd_plan_arm(plan, 3), EPD_DISCONNECTED);
    ck_assert_uint_eq(atomic_load(&plan->n_launched), 0);
    epd_close(client);
    client = NULL;
}
END_TEST

static void script_plan_refused(struct fake *daemon)
{
    fake_session(daemon);
    fake_expect(daemon, MESSAGE_BUFFER_ALLOC);
    fake_answer_buffer(daemon);
    fake_expect(daemon, MESSAGE_PLAN_CREATE);
    fake_answer_error(daemon, EPD_INVALID_SHAPE, "dispatch x: hidden 2, want 8");
    fake_expect(daemon, MESSAGE_BUFFER_RELEASE);
    fake_answer_ok(daemon);
}

START_TEST(plan_that_is_refused_binds_nothing)
{
    struct epd_buffer *buffer;
    struct epd_plan *plan = NULL;

    start(script_plan_refused);
    ck_assert_int_eq(epd_buffer_alloc(group, 1024, &buffer), EPD_OK);
    struct epd_tensor tensors[2] = {
        {.role = EPD_ROLE_X, .buffer = buffer, .dtype = EPD_F32, .n_dims = 2, .shape = {8, 2}},
        {.role = EPD_ROLE_TOPK_IDX, .dtype = EPD_I32, .n_dims = 2, .shape = {8, 2}}};
    struct epd_plan_options options = {
        .size = sizeof options, .op = EPD_OP_DISPATCH, .n_tensors = 2, .tensors = tensors};
    ck_assert_int_eq(epd_plan_create(group, &options, &plan), EPD_INVALID_ARGUMENT);
    ck_assert_str_eq(epd_error_text(), "dispatch tensor 1 (topk_idx): buffer is NULL");
    tensors[1].buffer = buffer;
    tensors[1].n_dims = 4;
    ck_assert_int_eq(epd_plan_create(group, &options, &plan), EPD_INVALID_ARGUMENT);
    tensors[1].n_dims = 2;
    ck_assert_int_eq(epd_plan_create(group, &options, &plan), EPD_INVALID_SHAPE);
    ck_assert_str_eq(epd_error_text(), "dispatch x: hidden 2, want 8");
    ck_assert_ptr_null(plan);
    ck_assert_int_eq(epd_buffer_release(buffer), EPD_OK);
}
END_TEST

static void script_two_groups(struct fake *daemon)
{
    fake_session(daemon);
    fake_expect(daemon, MESSAGE_PLAN_CREATE);
    fake_answer_plan(daemon, 0);
    fake_expect(daemon, MESSAGE_GROUP_JOIN);
    fake_answer_group(daemon);
    script_must(fake_peer_closed(daemon));
}

/* Refused before anything of it was sent. */
START_TEST(plan_with_the_context_of_another_group_is_refused)
{
    struct epd_plan *plan = NULL;

    start(script_two_groups);
    struct epd_plan *context = create_barrier(group);
    struct epd_group *other = join_group(client);
    const struct epd_plan_options options = {
        .size = sizeof options, .op = EPD_OP_COMBINE, .context = context};
    ck_assert_int_eq(epd_plan_create(other, &options, &plan), EPD_FOREIGN_ID);
    ck_assert_str_eq(epd_error_text(), "combine context: a plan of another group");
    ck_assert_ptr_null(plan);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("client plans");
    TCase *cases = tcase_create("fake daemon");

    tcase_add_checked_fixture(cases, setup, teardown);
    tcase_set_timeout(cases, 30);
    tcase_add_test(cases, plan_is_created_launched_in_sequence_and_destroyed_after_its_dependents);
    tcase_add_test(cases, failed_launch_tells_status_phase_rank_and_sentence);
    tcase_add_test(cases, failed_launch_whose_report_is_missing_is_still_a_failure);
    tcase_add_test(cases, launch_in_flight_is_busy_until_its_wait_has_seen_the_end);
    tcase_add_test(cases, worker_that_dies_ends_every_launch_in_flight_restarted_and_no_other);
    tcase_add_test(cases, launches_wait_for_room_in_the_socket_and_none_is_lost);
    tcase_add_test(cases, launches_of_several_threads_leave_in_the_order_of_their_numbers);
    tcase_add_test(cases, one_thread_launches_and_another_waits_until_the_daemon_dies);
    tcase_add_test(cases, check_beside_a_wait_disturbs_it_not_and_each_failure_is_told_once);
    tcase_add_test(cases, flags_that_no_stream_takes_are_given_up_after_a_second);
    tcase_add_test(cases, replays_that_were_not_announced_are_not_in_flight);
    tcase_add_test(cases, plan_that_is_refused_binds_nothing);
    tcase_add_test(cases, plan_with_the_context_of_another_group_is_refused);
    suite_add_tcase(suite, cases);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int n_failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return n_failed != 0;
}
