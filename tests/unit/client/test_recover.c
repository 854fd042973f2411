/* epd_recover against a daemon that the test plays and lets die: what was made is made again, in order, under
 * the same handles. */
#include <check.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "tests/unit/client/fake_daemon.h"

static struct fake fake;
static int n_fds;

static void setup(void)
{
    n_fds = count_fds();
    fake_open(&fake);
}

static void teardown(void)
{
    fake_stop(&fake);
    ck_assert_int_eq(count_fds(), n_fds);
}

static void must(int condition)
{
    if (!condition)
        abort();
}

/* What the client makes, seen from the daemon; the ids go up by one from first_id. */
static void play_creation(struct fake *daemon, uint64_t first_id)
{
    daemon->next_id = first_id;
    fake_session(daemon); /* group: first_id */
    fake_expect(daemon, MESSAGE_BUFFER_ALLOC);
    must(daemon->last.buffer_alloc.group_id == first_id && daemon->last.buffer_alloc.bytes == 8192);
    fake_answer_buffer(daemon); /* + 1 */
    fake_expect(daemon, MESSAGE_BUFFER_REGISTER);
    must(daemon->last.buffer_register.offset == 4096 && daemon->last_fd >= 0);
    fake_answer_buffer(daemon); /* + 2 */
    fake_expect(daemon, MESSAGE_PLAN_CREATE);
    must(daemon->last.plan_create.group_id == first_id && daemon->last.plan_create.n_bindings == 2);
    must(daemon->last.plan_create.bindings[0].buffer_id == first_id + 1);
    must(daemon->last.plan_create.bindings[1].buffer_id == first_id + 2);
    fake_answer_plan(daemon, 1); /* + 3 */
    fake_expect(daemon, MESSAGE_PLAN_CREATE);
    must(daemon->last.plan_create.context_plan_id == first_id + 3);
}

static void play_death(struct fake *daemon)
{
    fake_hang_up(daemon);
    fake_accept(daemon); /* the client looks whether somebody is there */
    must(fake_peer_closed(daemon));
    fake_hang_up(daemon);
    daemon->boot++;
}

static void script(struct fake *daemon)
{
    play_creation(daemon, 100);
    fake_answer_plan(daemon, 2);        /* + 4 */
    fake_expect(daemon, MESSAGE_STATS); /* whether anything is lost */
    fake_answer_error(daemon, EPD_NO_MEMORY, "any answer will do");
    for (int i = 0; i < 3; i++) {
        fake_expect(daemon, MESSAGE_LAUNCH);
        must(daemon->last.launch.plan_id == 104 && daemon->last.launch.seq == (uint64_t)i + 1);
        if (i < 2)
            fake_complete(daemon, 2);
    }
    play_death(daemon);
    /* The second life refuses the last plan: what was made again is given up. */
    play_creation(daemon, 200);
    fake_answer_error(daemon, EPD_NO_MEMORY, "no room for it");
    fake_expect(daemon, MESSAGE_GROUP_LEAVE);
    must(daemon->last.group_leave.id == 200);
    fake_answer_ok(daemon);
    play_death(daemon);
    play_creation(daemon, 300);
    fake_answer_plan(daemon, 7);
    fake_expect(daemon, MESSAGE_LAUNCH);
    must(daemon->last.launch.plan_id == 304 && daemon->last.launch.seq == 1);
    fake_complete(daemon, 7);
    fake_expect(daemon, MESSAGE_PLAN_DESTROY);
    must(daemon->last.plan_destroy.id == 304);
    fake_answer_ok(daemon);
}

static int memfd(void)
{
    int fd = memfd_create("test", MFD_CLOEXEC | MFD_ALLOW_SEALING);

    ck_assert(fd >= 0 && ftruncate(fd, 8192) == 0 && fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK) == 0);
    return fd;
}

START_TEST(recover_makes_everything_again_under_the_same_handles)
{
    struct epd_buffer *owned, *registered;
    struct epd_plan *plan, *dependent;
    struct epd_group_info info = {.size = sizeof info};
    int fd = memfd();

    fake_start(&fake, script);
    struct epd_client *client = open_client(&fake);
    struct epd_group *group = join_group(client);
    ck_assert_int_eq(epd_buffer_alloc(group, 8192, &owned), EPD_OK);
    ck_assert_int_eq(epd_buffer_register_memfd(group, fd, 4096, 64, &registered), EPD_OK);
    close(fd);
    const struct epd_tensor tensors[] = {
        {.role = EPD_ROLE_X, .buffer = owned, .dtype = EPD_F32, .n_dims = 2, .shape = {8, 2}},
        {.role = EPD_ROLE_TOPK_IDX, .buffer = registered, .dtype = EPD_I32, .n_dims = 2, .shape = {8, 2}}};
    struct epd_plan_options options = {
        .size = sizeof options, .op = EPD_OP_DISPATCH, .n_tensors = 2, .tensors = tensors};
    ck_assert_int_eq(epd_plan_create(group, &options, &plan), EPD_OK);
    options.context = plan;
    ck_assert_int_eq(epd_plan_create(group, &options, &dependent), EPD_OK);
    ck_assert_int_eq(epd_recover(client, 100), EPD_OK); /* nothing is lost: nothing to do */
    for (int i = 0; i < 2; i++) {
        ck_assert_int_eq(epd_plan_launch(dependent, NULL), EPD_OK);
        ck_assert_int_eq(epd_plan_wait(dependent, 0), EPD_OK);
    }
    char *data = epd_buffer_data(owned);
    strcpy(data, "kept");
    strcpy(data + 8000, "to the end");
    ck_assert_int_eq(epd_plan_launch(dependent, NULL), EPD_OK);
    ck_assert_int_eq(epd_recover(client, 5000), EPD_BUSY); /* it asks, and so learns of the death */
    ck_assert_int_eq(epd_plan_wait(dependent, 0), EPD_RESTARTED);
    ck_assert_int_eq(epd_recover(client, 5000), EPD_NO_MEMORY);
    ck_assert_str_eq(epd_error_text(), "no room for it");
    ck_assert_int_eq(epd_plan_launch(dependent, NULL), EPD_RESTARTED);
    ck_assert_int_eq(epd_group_info(group, &info), EPD_RESTARTED);
    while (epd_recover(client, 5000) != EPD_OK) /* the death may not have been noticed yet */
        usleep(1000);
    ck_assert_ptr_eq(epd_buffer_data(owned), data);
    ck_assert_str_eq(data, "kept");
    ck_assert_str_eq(data + 8000, "to the end");
    ck_assert_int_eq(epd_plan_launch(dependent, NULL), EPD_OK);
    ck_assert_int_eq(epd_plan_wait(dependent, 0), EPD_OK);
    epd_plan_destroy(dependent);
    epd_close(client);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("client recover");
    TCase *cases = tcase_create("fake daemon");

    tcase_add_checked_fixture(cases, setup, teardown);
    tcase_set_timeout(cases, 30);
    tcase_add_test(cases, recover_makes_everything_again_under_the_same_handles);
    suite_add_tcase(suite, cases);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int n_failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return n_failed != 0;
}
