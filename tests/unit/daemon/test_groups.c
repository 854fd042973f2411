/* Joins, plans, launches and their failures, spoken as datagrams to a real daemon: the test decides who
 * speaks when. */
#include <check.h>
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include "daemon/clock.h"
#include "tests/unit/daemon/epd_process.h"
#include "tests/unit/daemon/raw_client.h"

static struct epd_process epd;
static struct raw_client clients[4];
static struct raw_client *const all[] = {&clients[0], &clients[1], &clients[2], &clients[3]};

static void start(void)
{
    static const char *const flags[] = {"--warn", "100ms", "--stuck", "300ms", "--dead", "700ms",
                                        "--join", "400ms", "--plan",  "400ms", NULL};
    epd_start(&epd, flags);
    for (int i = 0; i < 4; i++)
        raw_open(&clients[i], epd.socket);
}

static void stop(void)
{
    for (int i = 0; i < 4; i++)
        raw_close(&clients[i]);
    epd_stop(&epd);
}

START_TEST(all_ranks_of_a_barrier_are_released)
{
    struct raw_plan plans[4];
    raw_barrier_all(all, 4, raw_join_all(all, 4, "g"), plans);
    for (uint64_t seq = 1; seq <= 50; seq++) {
        for (int rank = 0; rank < 4; rank++)
            raw_launch(all[rank], &plans[rank], seq);
        for (int rank = 0; rank < 4; rank++)
            ck_assert_int_eq(raw_done(all[rank], &plans[rank], ""), EPD_OK);
    }
    for (int rank = 0; rank < 4; rank++)
        ck_assert_uint_eq(atomic_load(&clients[rank].page->plans[plans[rank].flag_idx].completed), 50);
}
END_TEST

START_TEST(join_names_the_field_that_differs)
{
    struct message other = raw_join("g", 2, 1);
    other.group_join.config.hidden = 48;
    raw_send(all[0], raw_join("g", 2, 0), -1);
    raw_send(all[1], other, -1);
    raw_expect_error(all[0], EPD_GROUP_MISMATCH, "hidden: rank 1 says 48, rank 0 says 16");
    raw_expect_error(all[1], EPD_GROUP_MISMATCH, "hidden: rank 1 says 48, rank 0 says 16");
    raw_join_all(all, 2, "g"); /* the name is free again */
}
END_TEST

START_TEST(join_times_out_and_names_the_missing_ranks)
{
    raw_send(all[1], raw_join("g", 4, 1), -1);
    raw_expect_error(all[1], EPD_TIMEOUT, "by rank 0 2 3");
}
END_TEST

/* Rank 0 has said what the others are compared with, and has gone: who is there is named. */
START_TEST(joiner_that_has_left_is_not_named)
{
    struct message other = raw_join("g", 3, 2);
    other.group_join.config.hidden = 48;
    raw_send(all[0], raw_join("g", 3, 0), -1);
    raw_send(all[1], raw_join("g", 3, 1), -1);
    raw_expect_silence(all[1], 20);
    raw_close(all[0]);
    raw_open(all[0], epd.socket); /* by then the daemon has heard of it */
    raw_send(all[2], other, -1);
    raw_expect_error(all[1], EPD_GROUP_MISMATCH, "hidden: rank 2 says 48, rank 1 says 16");
    raw_expect_error(all[2], EPD_GROUP_MISMATCH, "hidden: rank 2 says 48, rank 1 says 16");
}
END_TEST

/* Nobody else comes in its place before the join timer: the others learn of it now. */
START_TEST(refused_rank_ends_the_join_of_the_others)
{
    struct message refused = raw_join("g", 3, 2);
    refused.group_join.has_device = 1;
    memset(refused.group_join.device_uuid, 0xee, sizeof(refused.group_join.device_uuid));
    raw_send(all[0], raw_join("g", 3, 0), -1);
    raw_send(all[1], raw_join("g", 3, 1), -1);
    refused.group_join.rank = 1; /* that one is there: nobody waits for another */
    raw_send(all[2], refused, -1);
    raw_expect_error(all[2], EPD_INVALID_DEVICE, "");
    refused.group_join.rank = 2;
    refused.group_join.world_size = 6; /* another group, if any */
    raw_send(all[2], refused, -1);
    raw_expect_error(all[2], EPD_INVALID_DEVICE, "");
    raw_expect_silence(all[0], 20);
    refused.group_join.world_size = 3;
    raw_send(all[2], refused, -1);
    raw_expect_error(all[2], EPD_INVALID_DEVICE, "");
    raw_expect_error(all[0], EPD_INVALID_DEVICE, "group g: rank 2 was refused: ");
    raw_expect_error(all[1], EPD_INVALID_DEVICE, "group g: rank 2 was refused: ");
    raw_join_all(all, 3, "g"); /* the name is free again */
}
END_TEST

START_TEST(taken_rank_and_complete_group_are_in_use)
{
    raw_send(all[0], raw_join("g", 2, 0), -1);
    raw_send(all[1], raw_join("g", 2, 0), -1);
    raw_expect_error(all[1], EPD_IN_USE, "rank 0");
    raw_send(all[1], raw_join("g", 2, 1), -1);
    raw_expect(all[0], MESSAGE_REPLY_GROUP);
    raw_expect(all[1], MESSAGE_REPLY_GROUP);
    raw_send(all[2], raw_join("g", 2, 1), -1);
    raw_expect_error(all[2], EPD_IN_USE, "rank 1");
}
END_TEST

START_TEST(joiner_that_dies_leaves_its_place_free)
{
    raw_send(all[0], raw_join("g", 2, 0), -1);
    raw_send(all[1], raw_join("h", 2, 1), -1);
    raw_close(all[1]);
    raw_open(all[1], epd.socket);
    raw_send(all[1], raw_join("h", 2, 1), -1);
    raw_send(all[2], raw_join("h", 2, 0), -1);
    raw_expect(all[1], MESSAGE_REPLY_GROUP);
    raw_expect(all[2], MESSAGE_REPLY_GROUP);
}
END_TEST

/* Rank 1 of a group in a process of its own, with a child that outlives it and holds its socket. */
static pid_t start_rank_with_child(const char *name, int told[2], pid_t *grandchild)
{
    ck_assert_int_eq(pipe(told), 0);
    const pid_t pid = fork();
    ck_assert_int_ge(pid, 0);
    if (pid == 0) {
        static struct raw_client rank;
        raw_open(&rank, epd.socket);
        raw_send(&rank, raw_join(name, 2, 1), -1);
        const uint64_t group_id = raw_expect(&rank, MESSAGE_REPLY_GROUP)->reply_group.group_id;
        raw_send(&rank, raw_barrier(group_id), -1);
        (void)raw_take_plan(&rank);
        const pid_t child = fork();
        if (child != 0 && write(told[1], &child, sizeof(child)) != (ssize_t)sizeof(child))
            _exit(1);
        for (;;)
            (void)pause();
    }
    raw_send(all[0], raw_join(name, 2, 0), -1);
    const uint64_t group_id = raw_expect(all[0], MESSAGE_REPLY_GROUP)->reply_group.group_id;
    raw_send(all[0], raw_barrier(group_id), -1);
    ck_assert_int_eq(read(told[0], grandchild, sizeof(*grandchild)), (int)sizeof(*grandchild));
    return pid;
}

START_TEST(rank_whose_children_hold_its_socket_is_lost_when_it_is_killed)
{
    int told[2];
    pid_t child = -1;
    const pid_t pid = start_rank_with_child("g", told, &child);
    const struct raw_plan plan = raw_take_plan(all[0]);
    raw_launch(all[0], &plan, 1);
    raw_expect_silence(all[0], 20);
    const uint64_t before_ns = clock_ns();
    ck_assert_int_eq(kill(pid, SIGKILL), 0);
    ck_assert_int_eq(raw_done(all[0], &plan, "rank 1"), EPD_PEER_LOST);
    ck_assert_uint_lt(clock_ns() - before_ns, 200 * CLOCK_NS_PER_MS); /* no timer helped: stuck is 300 ms */
    ck_assert_int_eq(kill(child, SIGKILL), 0);                        /* it was there all the time */
    ck_assert_int_eq(waitpid(pid, NULL, 0), pid);
    char *stats = raw_control(epd.control, CONTROL_STATS);
    ck_assert_msg(strstr(stats, "\"peer_died\": 1") || strstr(stats, "\"peer_died\":1"), "%s", stats);
    free(stats);
}
END_TEST

START_TEST(other_order_of_calls_is_a_mismatch_on_every_rank)
{
    const uint64_t group_id = raw_join_all(all, 3, "g");
    struct raw_plan first[3], second[3];
    raw_barrier_all(all, 3, group_id, first);
    raw_barrier_all(all, 3, group_id, second);
    raw_launch(all[0], &first[0], 1);
    raw_launch(all[1], &second[1], 1);
    const char *text = "rank 1 launches barrier (plan 2), rank 0 launches barrier (plan 1)";
    ck_assert_int_eq(raw_done(all[0], &first[0], text), EPD_SEQ_MISMATCH);
    ck_assert_int_eq(raw_done(all[1], &second[1], text), EPD_SEQ_MISMATCH);
    raw_launch(all[2], &first[2], 1); /* too late for its step: hears the same, at once */
    ck_assert_int_eq(raw_done(all[2], &first[2], text), EPD_SEQ_MISMATCH);
    for (int rank = 0; rank < 3; rank++)
        raw_launch(all[rank], &first[rank], 2);
    for (int rank = 0; rank < 3; rank++) /* and the next step matches again */
        ck_assert_int_eq(raw_done(all[rank], &first[rank], ""), EPD_OK);
}
END_TEST

START_TEST(wrong_seq_and_wrong_hash_are_named)
{
    struct raw_plan plans[2];
    raw_barrier_all(all, 2, raw_join_all(all, 2, "g"), plans);
    raw_launch(all[0], &plans[0], 1);
    raw_launch(all[1], &plans[1], 7);
    ck_assert_int_eq(raw_done(all[0], &plans[0], "rank 1 names seq 7, want 1"), EPD_SEQ_MISMATCH);
    ck_assert_int_eq(raw_done(all[1], &plans[1], "rank 1 names seq 7, want 1"), EPD_SEQ_MISMATCH);
    struct raw_plan other = plans[0];
    other.shape_hash ^= 1;
    raw_launch(all[0], &other, 2);
    raw_launch(all[1], &plans[1], 8);
    ck_assert_int_eq(raw_done(all[0], &plans[0], "another shape"), EPD_SEQ_MISMATCH);
    ck_assert_int_eq(raw_done(all[1], &plans[1], "another shape"), EPD_SEQ_MISMATCH);
}
END_TEST

START_TEST(missing_rank_is_named_and_evicted_when_it_stays_away)
{
    struct raw_plan plans[3];
    raw_barrier_all(all, 3, raw_join_all(all, 3, "g"), plans);
    raw_launch(all[0], &plans[0], 1);
    raw_launch(all[2], &plans[2], 1);
    ck_assert_int_eq(raw_done(all[0], &plans[0], "phase gather: not asked for within 300 ms by rank 1"),
                     EPD_TIMEOUT);
    ck_assert_int_eq(raw_done(all[2], &plans[2], "by rank 1"), EPD_TIMEOUT);
    raw_expect_closed(all[1], EPD_EVICTED, "missed rank 1");
    raw_launch(all[0], &plans[0], 2);
    ck_assert_int_eq(raw_done(all[0], &plans[0], "rank 1"), EPD_PEER_LOST);
}
END_TEST

START_TEST(late_rank_hears_of_the_timeout_and_goes_on)
{
    struct raw_plan plans[2];
    raw_barrier_all(all, 2, raw_join_all(all, 2, "g"), plans);
    raw_launch(all[0], &plans[0], 1);
    ck_assert_int_eq(raw_done(all[0], &plans[0], "rank 1"), EPD_TIMEOUT);
    raw_launch(all[1], &plans[1], 1);
    ck_assert_int_eq(raw_done(all[1], &plans[1], "rank 1"), EPD_TIMEOUT);
    for (int rank = 0; rank < 2; rank++)
        raw_launch(all[rank], &plans[rank], 2);
    for (int rank = 0; rank < 2; rank++)
        ck_assert_int_eq(raw_done(all[rank], &plans[rank], ""), EPD_OK);
    raw_expect_silence(all[1], 900); /* it is back: nobody evicts it */
}
END_TEST

START_TEST(stopped_daemon_blames_nobody)
{
    struct raw_plan plans[2];
    raw_barrier_all(all, 2, raw_join_all(all, 2, "g"), plans);
    raw_launch(all[0], &plans[0], 1);
    raw_expect_silence(all[0], 50);
    const pid_t worker = (pid_t)epd_status_number(&epd, "pid");
    kill(worker, SIGSTOP);
    raw_launch(all[1], &plans[1], 1);
    usleep(1200000);
    kill(worker, SIGCONT);
    ck_assert_int_eq(raw_done(all[0], &plans[0], ""), EPD_OK);
    ck_assert_int_eq(raw_done(all[1], &plans[1], ""), EPD_OK);
}
END_TEST

START_TEST(lost_rank_ends_pending_and_later_launches_and_frees_the_name)
{
    struct raw_plan plans[3];
    const uint64_t group_id = raw_join_all(all, 3, "g");
    raw_barrier_all(all, 3, group_id, plans);
    raw_launch(all[0], &plans[0], 1);
    raw_close(all[2]);
    ck_assert_int_eq(raw_done(all[0], &plans[0], "rank 2 of group g is gone"), EPD_PEER_LOST);
    raw_launch(all[1], &plans[1], 1);
    ck_assert_int_eq(raw_done(all[1], &plans[1], "rank 2"), EPD_PEER_LOST);
    raw_send(all[0], raw_barrier(group_id), -1);
    raw_expect_error(all[0], EPD_PEER_LOST, "rank 2");
    raw_open(all[2], epd.socket);
    raw_send(all[0], (struct message){.kind = MESSAGE_GROUP_LEAVE, .group_leave = {.id = group_id}}, -1);
    raw_expect(all[0], MESSAGE_REPLY_OK);
    ck_assert_uint_ne(raw_join_all(all, 3, "g"), group_id);
}
END_TEST

START_TEST(plans_of_other_ops_fail_on_every_rank)
{
    const uint64_t group_id = raw_join_all(all, 2, "g");
    struct message combine = raw_barrier(group_id);
    combine.plan_create.op = EPD_OP_COMBINE;
    raw_send(all[0], raw_barrier(group_id), -1);
    raw_expect_silence(all[0], 50); /* the daemon has it */
    raw_send(all[1], combine, -1);
    raw_expect_error(all[0], EPD_PLAN_MISMATCH, "rank 1 creates combine, rank 0 creates barrier");
    raw_expect_error(all[1], EPD_PLAN_MISMATCH, "rank 1 creates combine, rank 0 creates barrier");
    struct raw_plan plans[2];
    raw_barrier_all(all, 2, group_id, plans); /* the next plans match again */
    ck_assert_uint_eq(plans[0].plan_key, 2);
}
END_TEST

START_TEST(refused_plan_fails_on_every_rank_with_its_reason)
{
    const uint64_t group_id = raw_join_all(all, 2, "g");
    struct message_binding binding = {
        .role = EPD_ROLE_X, .buffer_id = 12345, .dtype = EPD_F32, .n_dims = 2, .shape = {8, 16, 1}};
    struct message dispatch = raw_barrier(group_id);
    dispatch.plan_create.op = EPD_OP_DISPATCH;
    dispatch.plan_create.n_bindings = 1;
    dispatch.plan_create.bindings = &binding;
    raw_send(all[0], dispatch, -1);
    raw_expect_error(all[0], EPD_UNKNOWN_ID, "x: buffer 12345 does not exist");
    raw_send(all[1], dispatch, -1);
    raw_expect_error(all[1], EPD_UNKNOWN_ID, "rank 0: dispatch x: buffer 12345");
}
END_TEST

START_TEST(plan_that_a_rank_never_creates_times_out)
{
    const uint64_t group_id = raw_join_all(all, 2, "g");
    raw_send(all[0], raw_barrier(group_id), -1);
    raw_expect_error(all[0], EPD_TIMEOUT, "by rank 1");
}
END_TEST

START_TEST(launch_of_a_plan_that_a_rank_destroyed_fails)
{
    struct raw_plan plans[2];
    raw_barrier_all(all, 2, raw_join_all(all, 2, "g"), plans);
    raw_send(all[1], (struct message){.kind = MESSAGE_PLAN_DESTROY, .plan_destroy = {.id = plans[1].plan_id}},
             -1);
    raw_expect(all[1], MESSAGE_REPLY_OK);
    raw_launch(all[0], &plans[0], 1);
    ck_assert_int_eq(raw_done(all[0], &plans[0], "rank 1 has destroyed its plan 1"), EPD_UNKNOWN_ID);
}
END_TEST

START_TEST(plan_with_waiting_launches_is_not_destroyed)
{
    struct raw_plan plans[2];
    raw_barrier_all(all, 2, raw_join_all(all, 2, "g"), plans);
    raw_launch(all[0], &plans[0], 1);
    raw_send(all[0], (struct message){.kind = MESSAGE_PLAN_DESTROY, .plan_destroy = {.id = plans[0].plan_id}},
             -1);
    raw_expect_error(all[0], EPD_IN_USE, "1 launches wait");
    raw_launch(all[1], &plans[1], 1);
    ck_assert_int_eq(raw_done(all[0], &plans[0], ""), EPD_OK);
}
END_TEST

/* On the host backend only the first one finds its ready flag set; what counts here is that all of them end,
 * in order. */
START_TEST(armed_launches_count_one_by_one)
{
    struct raw_plan plans[2];
    raw_barrier_all(all, 2, raw_join_all(all, 2, "g"), plans);
    for (int rank = 0; rank < 2; rank++) {
        struct message launch = {.kind = MESSAGE_LAUNCH,
                                 .launch = {.plan_id = plans[rank].plan_id,
                                            .seq = 1,
                                            .shape_hash = plans[rank].shape_hash,
                                            .n_repeats = 20}};
        flag_set(&clients[rank].page->plans[plans[rank].flag_idx].ready);
        raw_send(all[rank], launch, -1);
    }
    for (int rank = 0; rank < 2; rank++) {
        struct page_plan *flags = &clients[rank].page->plans[plans[rank].flag_idx];
        for (int waited = 0; atomic_load(&flags->completed) < 20; waited++) {
            ck_assert_int_lt(waited, RAW_DEADLINE_MS);
            usleep(1000);
        }
        (void)raw_done(all[rank], &plans[rank], "");
    }
    for (int rank = 0; rank < 2; rank++)
        raw_launch(all[rank], &plans[rank], 21);
    for (int rank = 0; rank < 2; rank++)
        ck_assert_int_eq(raw_done(all[rank], &plans[rank], ""), EPD_OK);
}
END_TEST

START_TEST(group_has_its_own_deadline)
{
    struct raw_plan plans[2];
    for (uint32_t rank = 0; rank < 2; rank++) {
        struct message join = raw_join("g", 2, rank);
        join.group_join.config.deadline_ms = 50;
        raw_send(all[rank], join, -1);
    }
    uint64_t group_id = raw_expect(all[0], MESSAGE_REPLY_GROUP)->reply_group.group_id;
    raw_expect(all[1], MESSAGE_REPLY_GROUP);
    raw_barrier_all(all, 2, group_id, plans);
    raw_launch(all[0], &plans[0], 1);
    ck_assert_int_eq(raw_done(all[0], &plans[0], "within 50 ms"), EPD_TIMEOUT);
}
END_TEST

START_TEST(buffers_are_allocated_registered_bound_and_released)
{
    const uint64_t group_id = raw_join_all(all, 1, "solo");
    struct message alloc = {.kind = MESSAGE_BUFFER_ALLOC,
                            .buffer_alloc = {.group_id = group_id, .bytes = 8192}};
    raw_send(all[0], alloc, -1);
    const uint64_t buffer_id = raw_expect(all[0], MESSAGE_REPLY_BUFFER)->reply_buffer.buffer_id;
    ck_assert_int_ge(clients[0].message_fd, 0);
    void *memory = mmap(NULL, 8192, PROT_READ | PROT_WRITE, MAP_SHARED, clients[0].message_fd, 0);
    ck_assert_ptr_ne(memory, MAP_FAILED);
    munmap(memory, 8192);
    struct message release = {.kind = MESSAGE_BUFFER_RELEASE, .buffer_release = {.id = buffer_id}};
    raw_send(all[1], release, -1);
    raw_expect_error(all[1], EPD_FOREIGN_ID, "another session");
    raw_send(all[0], release, -1);
    raw_expect(all[0], MESSAGE_REPLY_OK);
    raw_send(all[0], release, -1);
    raw_expect_error(all[0], EPD_UNKNOWN_ID, "does not exist");

    int fd = memfd_create("client", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    ck_assert_int_eq(ftruncate(fd, 4096), 0);
    struct message with_fd = {
        .kind = MESSAGE_BUFFER_REGISTER,
        .buffer_register = {.group_id = group_id, .kind = EPD_MEMORY_MEMFD, .offset = 0, .bytes = 4096}};
    raw_send(all[0], with_fd, fd);
    raw_expect(all[0], MESSAGE_REPLY_ERROR); /* not sealed */
    ck_assert_int_eq(fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK), 0);
    raw_send(all[0], with_fd, fd);
    raw_expect(all[0], MESSAGE_REPLY_BUFFER);
    raw_send(all[0], with_fd, -1);
    raw_expect_error(all[0], EPD_INVALID_ARGUMENT, "no fd");
    close(fd);
}
END_TEST

START_TEST(groups_of_others_are_foreign)
{
    const uint64_t group_id = raw_join_all(all, 1, "solo");
    raw_send(all[1], raw_barrier(group_id), -1);
    raw_expect_error(all[1], EPD_FOREIGN_ID, "not a rank of it");
    raw_send(all[1], raw_barrier(group_id + 100), -1);
    raw_expect_error(all[1], EPD_UNKNOWN_ID, "does not exist");
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("daemon_groups");
    TCase *tcase = tcase_create("groups");
    tcase_add_checked_fixture(tcase, start, stop);
    tcase_set_timeout(tcase, 30);
    tcase_add_test(tcase, all_ranks_of_a_barrier_are_released);
    tcase_add_test(tcase, join_names_the_field_that_differs);
    tcase_add_test(tcase, join_times_out_and_names_the_missing_ranks);
    tcase_add_test(tcase, joiner_that_has_left_is_not_named);
    tcase_add_test(tcase, refused_rank_ends_the_join_of_the_others);
    tcase_add_test(tcase, taken_rank_and_complete_group_are_in_use);
    tcase_add_test(tcase, joiner_that_dies_leaves_its_place_free);
    tcase_add_test(tcase, rank_whose_children_hold_its_socket_is_lost_when_it_is_killed);
    tcase_add_test(tcase, other_order_of_calls_is_a_mismatch_on_every_rank);
    tcase_add_test(tcase, wrong_seq_and_wrong_hash_are_named);
    tcase_add_test(tcase, missing_rank_is_named_and_evicted_when_it_stays_away);
    tcase_add_test(tcase, late_rank_hears_of_the_timeout_and_goes_on);
    tcase_add_test(tcase, stopped_daemon_blames_nobody);
    tcase_add_test(tcase, lost_rank_ends_pending_and_later_launches_and_frees_the_name);
    tcase_add_test(tcase, plans_of_other_ops_fail_on_every_rank);
    tcase_add_test(tcase, refused_plan_fails_on_every_rank_with_its_reason);
    tcase_add_test(tcase, plan_that_a_rank_never_creates_times_out);
    tcase_add_test(tcase, launch_of_a_plan_that_a_rank_destroyed_fails);
    tcase_add_test(tcase, plan_with_waiting_launches_is_not_destroyed);
    tcase_add_test(tcase, armed_launches_count_one_by_one);
    tcase_add_test(tcase, group_has_its_own_deadline);
    tcase_add_test(tcase, buffers_are_allocated_registered_bound_and_released);
    tcase_add_test(tcase, groups_of_others_are_foreign);
    suite_add_tcase(suite, tcase);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int n_failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return n_failed != 0;
}
