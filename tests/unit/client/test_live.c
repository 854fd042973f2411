/* libepd against the real daemon, where the daemon's life matters: a worker that is killed with launches in
 * flight, a daemon that stops, a rank that is missing. Two ranks are two clients on two threads of this
 * process. */
#include <check.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "client/epd.h"
#include "tests/integration/daemon_process.h"

#define WORLD_SIZE 2

static struct daemon_process process;

struct member {
    struct epd_client *client;
    struct epd_group *group;
    struct epd_buffer *buffer;
    struct epd_plan *barrier;
    uint32_t rank;
    pthread_t thread;
    enum epd_status status;
};

static struct member members[WORLD_SIZE];

static void must(enum epd_status status, const char *what)
{
    if (status == EPD_OK)
        return;
    fprintf(stderr, "%s: %s: %s\n", what, epd_status_name(status), epd_error_text());
    abort();
}

static void *member_join(void *arg)
{
    struct member *member = arg;
    const struct epd_open_options open = {.size = sizeof open, .socket_path = process.socket_path};
    const struct epd_group_options join = {.size = sizeof join,
                                           .name = "live",
                                           .world_size = WORLD_SIZE,
                                           .rank = member->rank,
                                           .n_experts = 4,
                                           .top_k = 2,
                                           .hidden = 8,
                                           .max_tokens = 16,
                                           .dtype = EPD_F32,
                                           .deadline_ms = 2000};
    const struct epd_plan_options barrier = {.size = sizeof barrier, .op = EPD_OP_BARRIER};

    must(epd_open(&open, &member->client), "open");
    must(epd_group_join(member->client, &join, &member->group), "join");
    must(epd_buffer_alloc(member->group, 100000, &member->buffer), "alloc");
    must(epd_plan_create(member->group, &barrier, &member->barrier), "barrier");
    return NULL;
}

static void *member_step(void *arg)
{
    struct member *member = arg;

    member->status = epd_plan_launch(member->barrier, NULL);
    if (member->status == EPD_OK)
        member->status = epd_plan_wait(member->barrier, 0);
    return NULL;
}

/* The worker may be starting again for as long as the supervisor's first pauses last. */
static void *member_recover(void *arg)
{
    struct member *member = arg;

    member->status = epd_recover(member->client, 20000);
    return NULL;
}

static void everybody(void *(*function)(void *))
{
    for (uint32_t rank = 0; rank < WORLD_SIZE; rank++)
        pthread_create(&members[rank].thread, NULL, function, &members[rank]);
    for (uint32_t rank = 0; rank < WORLD_SIZE; rank++)
        pthread_join(members[rank].thread, NULL);
}

static void setup(void)
{
    daemon_start(&process, WORLD_SIZE, NULL);
    for (uint32_t rank = 0; rank < WORLD_SIZE; rank++)
        members[rank].rank = rank;
    everybody(member_join);
}

static void teardown(void)
{
    for (uint32_t rank = 0; rank < WORLD_SIZE; rank++)
        epd_close(members[rank].client);
    if (process.pid)
        daemon_stop(&process);
}

START_TEST(ranks_step_together_and_a_missing_one_is_named)
{
    struct epd_failure failure = {.size = sizeof failure};
    char *json;

    for (int i = 0; i < 100; i++) {
        everybody(member_step);
        ck_assert_int_eq(members[0].status, EPD_OK);
        ck_assert_int_eq(members[1].status, EPD_OK);
    }
    member_step(&members[0]); /* alone */
    ck_assert_int_eq(members[0].status, EPD_TIMEOUT);
    ck_assert_int_eq(epd_plan_failure(members[0].barrier, &failure), EPD_OK);
    ck_assert_int_eq(failure.phase, EPD_PHASE_GATHER);
    ck_assert_int_eq(failure.rank, 1);
    must(epd_stats(members[0].client, &json), "stats");
    ck_assert_int_eq(json[0], '{');
    epd_free(json);
}
END_TEST

START_TEST(rank_that_leaves_is_named_to_the_others)
{
    struct epd_failure failure = {.size = sizeof failure};

    epd_group_leave(members[1].group);
    member_step(&members[0]);
    ck_assert_int_eq(members[0].status, EPD_PEER_LOST);
    ck_assert_int_eq(epd_plan_failure(members[0].barrier, &failure), EPD_OK);
    ck_assert_int_eq(failure.rank, 1);
}
END_TEST

START_TEST(killed_worker_ends_launches_restarted_and_recover_goes_on)
{
    for (int life = 0; life < 3; life++) {
        pid_t worker = daemon_worker(&process);
        char *data = epd_buffer_data(members[0].buffer);
        strcpy(data + 99000, "kept");
        pthread_create(&members[0].thread, NULL, member_step, &members[0]); /* waits for rank 1 */
        usleep(50000);
        kill(worker, SIGKILL);
        pthread_join(members[0].thread, NULL);
        ck_assert_int_eq(members[0].status, EPD_RESTARTED);
        while (members[1].status != EPD_RESTARTED)
            member_step(&members[1]);
        everybody(member_recover);
        ck_assert_int_eq(members[0].status, EPD_OK);
        ck_assert_int_eq(members[1].status, EPD_OK);
        ck_assert_ptr_eq(epd_buffer_data(members[0].buffer), data);
        ck_assert_str_eq(data + 99000, "kept");
        for (int i = 0; i < 10; i++) {
            everybody(member_step);
            ck_assert_int_eq(members[0].status, EPD_OK);
            ck_assert_int_eq(members[1].status, EPD_OK);
        }
    }
}
END_TEST

START_TEST(stopped_daemon_says_so_and_nobody_hangs)
{
    pthread_create(&members[0].thread, NULL, member_step, &members[0]);
    usleep(50000);
    daemon_stop(&process);
    pthread_join(members[0].thread, NULL);
    ck_assert_int_ne(members[0].status, EPD_OK);
    member_step(&members[1]);
    ck_assert_int_eq(members[1].status, EPD_DRAINING);
    ck_assert_int_eq(epd_reconnect(members[1].client, 100), EPD_DISCONNECTED);
}
END_TEST

START_TEST(killed_daemon_ends_launches_and_cannot_be_reached_again)
{
    pid_t worker = daemon_worker(&process);
    char command[128];

    pthread_create(&members[0].thread, NULL, member_step, &members[0]);
    usleep(50000);
    kill(process.pid, SIGKILL);
    process.pid = 0;
    while (kill(worker, 0) == 0) /* it ends with its supervisor */
        usleep(10000);
    pthread_join(members[0].thread, NULL);
    /* Which failure it is depends on what the worker still found time to say. */
    ck_assert_int_ne(members[0].status, EPD_OK);
    ck_assert_int_eq(epd_reconnect(members[0].client, 100), EPD_DISCONNECTED);
    snprintf(command, sizeof command, "rm -r %s", process.directory);
    ck_assert_int_eq(system(command), 0);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("client live");
    TCase *cases = tcase_create("real daemon");

    tcase_add_checked_fixture(cases, setup, teardown);
    tcase_set_timeout(cases, 60);
    tcase_add_test(cases, ranks_step_together_and_a_missing_one_is_named);
    tcase_add_test(cases, rank_that_leaves_is_named_to_the_others);
    tcase_add_test(cases, killed_worker_ends_launches_restarted_and_recover_goes_on);
    tcase_add_test(cases, stopped_daemon_says_so_and_nobody_hangs);
    tcase_add_test(cases, killed_daemon_ends_launches_and_cannot_be_reached_again);
    suite_add_tcase(suite, cases);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int n_failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return n_failed != 0;
}
