/* A client belongs to the process that opened it: in a forked child every call says so and touches nothing;
 * an exec'd child inherits no fd. */
#include <check.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "client/stamp.h"
#include "tests/unit/client/fake_daemon.h"

static struct fake fake;

static void script(struct fake *daemon)
{
    fake_session(daemon);
    fake_expect(daemon, MESSAGE_BUFFER_ALLOC);
    fake_answer_buffer(daemon);
    fake_expect(daemon, MESSAGE_PLAN_CREATE);
    fake_answer_plan(daemon, 0);
    fake_expect(daemon, MESSAGE_LAUNCH); /* the parent's; nothing of the child came before it */
    fake_complete(daemon, 0);
    if (!fake_peer_closed(daemon))
        abort();
}

/* Exit code of the child: 0, or the number of the first call that was wrong. */
static int child(struct epd_client *client, struct epd_group *group, struct epd_buffer *buffer,
                 struct epd_plan *plan)
{
    struct epd_client_info info = {.size = sizeof info};
    struct epd_failure failure = {.size = sizeof failure};
    struct epd_buffer *fresh;
    char *json;

    if (epd_stats(client, &json) != EPD_INVALID_ARGUMENT || !strstr(epd_error_text(), "before fork()"))
        return 1;
    if (epd_client_info(client, &info) != EPD_INVALID_ARGUMENT ||
        epd_reconnect(client, 1) != EPD_INVALID_ARGUMENT)
        return 2;
    if (epd_buffer_alloc(group, 64, &fresh) != EPD_INVALID_ARGUMENT)
        return 3;
    if (epd_buffer_release(buffer) != EPD_INVALID_ARGUMENT)
        return 4;
    if (epd_plan_launch(plan, NULL) != EPD_INVALID_ARGUMENT || epd_plan_wait(plan, 1) != EPD_INVALID_ARGUMENT)
        return 5;
    if (epd_plan_failure(plan, &failure) != EPD_INVALID_ARGUMENT)
        return 6;
    epd_plan_destroy(plan);
    epd_group_leave(group);
    epd_close(client);
    return 0;
}

START_TEST(forked_child_cannot_use_its_parents_client)
{
    struct epd_buffer *buffer;
    int ended;

    fake_open(&fake);
    fake_start(&fake, script);
    struct epd_client *client = open_client(&fake);
    struct epd_group *group = join_group(client);
    ck_assert_int_eq(epd_buffer_alloc(group, 64, &buffer), EPD_OK);
    struct epd_plan *plan = create_barrier(group);
    pid_t pid = fork();
    if (pid == 0)
        _exit(child(client, group, buffer, plan));
    ck_assert_int_eq(waitpid(pid, &ended, 0), pid);
    ck_assert_msg(WIFEXITED(ended) && WEXITSTATUS(ended) == 0, "child ended 0x%x", (unsigned)ended);
    ck_assert_int_eq(epd_plan_launch(plan, NULL), EPD_OK);
    ck_assert_int_eq(epd_plan_wait(plan, 0), EPD_OK);
    epd_close(client);
    fake_stop(&fake);
}
END_TEST

START_TEST(every_fd_of_a_client_is_closed_on_exec)
{
    int inherited[64]; /* what was open before, epd or not */

    fake_open(&fake);
    for (int fd = 0; fd < 64; fd++)
        inherited[fd] = fcntl(fd, F_GETFD) >= 0;
    fake_start(&fake, script);
    struct epd_client *client = open_client(&fake);
    struct epd_group *group = join_group(client);
    struct epd_buffer *buffer;
    ck_assert_int_eq(epd_buffer_alloc(group, 64, &buffer), EPD_OK);
    for (int fd = 0; fd < 64; fd++) {
        int flags = fcntl(fd, F_GETFD);
        ck_assert_msg(inherited[fd] || flags < 0 || (flags & FD_CLOEXEC), "fd %d stays open", fd);
    }
    struct epd_plan *plan = create_barrier(group);
    ck_assert_int_eq(epd_plan_launch(plan, NULL), EPD_OK);
    ck_assert_int_eq(epd_plan_wait(plan, 0), EPD_OK);
    epd_close(client);
    fake_stop(&fake);
}
END_TEST

START_TEST(stamp_knows_parent_and_child_with_and_without_the_kernels_help)
{
    struct stamp stamp;
    struct epd_error error;
    int ended;

    ck_assert_int_eq(stamp_init(&stamp, &error), EPD_OK);
    for (int pass = 0; pass < 2; pass++) {
        ck_assert(stamp_is_mine(&stamp));
        pid_t pid = fork();
        if (pid == 0)
            _exit(stamp_is_mine(&stamp));
        ck_assert_int_eq(waitpid(pid, &ended, 0), pid);
        ck_assert_int_eq(ended, 0);
        stamp.wipes = 0;
    }
    stamp_fini(&stamp);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("client fork");
    TCase *cases = tcase_create("fork");

    tcase_set_timeout(cases, 30);
    tcase_add_test(cases, forked_child_cannot_use_its_parents_client);
    tcase_add_test(cases, every_fd_of_a_client_is_closed_on_exec);
    tcase_add_test(cases, stamp_knows_parent_and_child_with_and_without_the_kernels_help);
    suite_add_tcase(suite, cases);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int n_failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return n_failed != 0;
}
