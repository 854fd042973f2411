/* A rank that leaves: what the others of its group hear. The rails of the group are made up: whether they are broken, the test
 * says (linked with --wrap). */
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "daemon/group_span.h"
#include "daemon/member.h"
#include "daemon/session.h"
#include "ep/node.h"
#include "tests/unit/daemon/suite.h"

static int broken;

int __wrap_rails_broken(const struct rails *rails, struct epd_error *why);
enum epd_backend_kind __wrap_node_backend(const struct node *node);

int __wrap_rails_broken(const struct rails *rails, struct epd_error *why)
{
    (void)rails;
    if (broken)
        (void)error_set(why, EPD_PEER_LOST, "node 1 is lost");
    return broken;
}

enum epd_backend_kind __wrap_node_backend(const struct node *node)
{
    (void)node;
    return EPD_BACKEND_HOST;
}

static struct worker *worker;
static struct session *sessions[2];
static struct group *group;
static struct member *members[2];
static struct log daemon_log;

static void open_group(void)
{
    struct epd_error error;
    worker = calloc(1, sizeof(*worker));
    group = calloc(1, sizeof(*group));
    log_init(&daemon_log, "test", LOG_ERROR, open("/dev/null", O_WRONLY | O_CLOEXEC));
    worker->log = &daemon_log;
    config_init(&worker->config);
    quota_init(&worker->accounts);
    list_init(&worker->blocked);
    *group = (struct group){
        .worker = worker, .name = "g", .state = GROUP_OPEN, .world_size = 2, .lost_rank = -1, .n_refs = 1};
    list_init(&group->joint_plans);
    list_init(&group->in_blocked);
    group->span = calloc(1, sizeof(*group->span));
    *group->span = (struct group_span){
        .n_nodes = 2, .n_ranks = 2, .state = SPAN_ENDED, .rails = (struct rails *)(void *)worker};
    for (uint32_t rank = 0; rank < 2; rank++) {
        sessions[rank] = calloc(1, sizeof(*sessions[rank]));
        sessions[rank]->worker = worker;
        list_init(&sessions[rank]->members);
        list_init(&sessions[rank]->buffers);
        ck_assert_int_eq(quota_open(&worker->accounts, &worker->config, 0, &sessions[rank]->quota, &error),
                         EPD_OK);
        ck_assert_int_eq(member_create(group, sessions[rank], rank, rank, 1, &members[rank], &error), EPD_OK);
    }
}

static void close_group(void)
{
    const struct epd_error gone = {EPD_PEER_LOST, "gone"};
    for (uint32_t rank = 0; rank < 2; rank++)
        if (group->members[rank])
            member_leave(group->members[rank], &gone, 0);
    for (uint32_t device = 0; device < 2; device++)
        if (group->queues[device])
            quota_give_shared_queues(group->account, device, group->queues[device]);
    for (uint32_t rank = 0; rank < 2; rank++) {
        quota_close(&worker->accounts, &sessions[rank]->quota);
        free(sessions[rank]);
    }
    free(group->span);
    free(group);
    free(worker);
    (void)close(daemon_log.fd);
    log_fini(&daemon_log);
}

START_TEST(a_rank_that_leaves_is_named)
{
    const struct epd_error left = {EPD_PEER_LOST, "it has left"};
    broken = 0;
    member_leave(members[0], &left, 1);
    ck_assert_int_eq(group->state, GROUP_BROKEN);
    ck_assert_str_eq(group->lost.text, "rank 0 of group g is gone: it has left");
    ck_assert_int_eq(group->lost_rank, 0);
    ck_assert_str_eq(group_state_name(group), "closed");
}
END_TEST

START_TEST(a_rank_that_dies_is_named_and_its_group_is_broken)
{
    const struct epd_error died = {EPD_DISCONNECTED, "it died"};
    broken = 0;
    member_leave(members[0], &died, 0);
    ck_assert_str_eq(group->lost.text, "rank 0 of group g is gone: it died");
    ck_assert_str_eq(group_state_name(group), "broken");
}
END_TEST

/* Its lane has told it, and it was faster than the loop. */
START_TEST(a_rank_that_leaves_a_lost_node_does_not_hide_it)
{
    for (int on_purpose = 0; on_purpose < 2; on_purpose++) {
        const struct epd_error left = {EPD_PEER_LOST, "it has left"};
        broken = 1;
        member_leave(members[0], &left, on_purpose);
        ck_assert_str_eq(group->lost.text, "node 1 is lost");
        ck_assert_int_eq(group->lost_rank, -1);
        ck_assert_str_eq(group_state_name(group), "broken");
        close_group();
        open_group();
    }
}
END_TEST

/* The whole daemon ends: that is told, whatever else is lost by then. */
START_TEST(a_daemon_that_ends_is_what_all_hear_of)
{
    const struct epd_error restart = {EPD_RESTARTED, "the worker starts again"};
    broken = 1;
    member_leave(members[1], &restart, 0);
    ck_assert_int_eq(group->lost.status, EPD_RESTARTED);
    ck_assert_str_eq(group->lost.text, "group g: the worker starts again");
    ck_assert_int_eq(group->lost_rank, -1);
}
END_TEST

int main(void)
{
    const TTest *const tests[] = {
        a_rank_that_leaves_is_named, a_rank_that_dies_is_named_and_its_group_is_broken,
        a_rank_that_leaves_a_lost_node_does_not_hide_it, a_daemon_that_ends_is_what_all_hear_of, NULL};
    return suite_run("daemon_member", tests, open_group, close_group);
}
