/* What becomes of a fabric and its groups when nodes come late, are killed, or do not belong to it. */
#include <arpa/inet.h>
#include <check.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>

#include "client/epdctl/field.h"
#include "tests/integration/fabric/fabric_ranks.h"
#include "tests/reference/op_cases.h"
#include "tests/reference/values.h"

static struct fabric_process fabric;

/* A group of one node beside it: must not notice. */
static void bystander_rank(const struct rank *rank)
{
    struct layer layer;
    struct layer_tensor f[FORWARD_COUNT];
    layer_open(&layer, rank, op_case_named(FABRIC_CASE));
    struct epd_plan *plan = fabric_forward_plan(&layer, f);
    for (int i = 0; i < 300; i++) { /* three seconds and more */
        RANK_CHECK(layer_step(plan) == EPD_OK);
        fabric_sleep_ms(10);
    }
    struct epd_plan *last = fabric_barrier_plan(&layer);
    RANK_CHECK(layer_step(last) == EPD_OK); /* nobody leaves before the others have ended */
    epd_plan_destroy(plan);
    layer_close(&layer);
}

START_TEST(a_killed_node_ends_its_groups_with_its_name_and_comes_back)
{
    struct rank_team spanning, beside;
    fabric_start(&fabric, 2, 2, fabric_quick);
    ranks_start(&beside, fabric.nodes[0].socket_path, "beside", fabric_world_size(), bystander_rank, NULL);
    fabric_ranks_start(&fabric, &spanning, "spanning", fabric_world_size(), fabric_until_lost_rank, "node 1");
    fabric_await_group(&fabric, 1, "spanning", "open");
    fabric_kill_node(&fabric, 1);
    fabric_ranks_end(&fabric, &spanning, fabric_world_size() / 2);
    ck_assert_uint_eq(ranks_wait(&beside, 30), 0);
    fabric_start_node(&fabric, 1, NULL, fabric_quick);
    for (long began = fabric_now_ms(); fabric_log_count(&fabric, 0, "fabric complete") < 2;
         fabric_sleep_ms(5))
        ck_assert_msg(fabric_now_ms() - began < 10000, "the fabric does not form again");
    ck_assert_uint_eq(fabric_log_count(&fabric, 0, "broken name spanning"), 1);
    ck_assert_uint_eq(fabric_run(&fabric, "again", fabric_world_size(), fabric_healthy_rank, NULL), 0);
    for (unsigned node = 0; node < 2; node++) /* its ranks have left it, which is no fault */
        for (long began = fabric_now_ms(); fabric_log_count(&fabric, node, "closed name again") < 1;
             fabric_sleep_ms(5))
            ck_assert_msg(fabric_now_ms() - began < 10000, "node %u does not say that the group is closed",
                          node);
    fabric_stop(&fabric);
}
END_TEST

START_TEST(a_killed_coordinator_ends_the_groups_of_the_others)
{
    struct rank_team team;
    fabric_start(&fabric, 2, 2, fabric_quick);
    fabric_ranks_start(&fabric, &team, "spanning", fabric_world_size(), fabric_until_lost_rank, "node 0");
    fabric_await_group(&fabric, 1, "spanning", "open");
    fabric_kill_node(&fabric, 0);
    for (unsigned r = 0; r < fabric_world_size() / 2; r++) { /* those of node 1 are looked at */
        const pid_t pid = team.pids[r];
        team.pids[r] = team.pids[r + fabric_world_size() / 2];
        team.pids[r + fabric_world_size() / 2] = pid;
    }
    fabric_ranks_end(&fabric, &team, fabric_world_size() / 2);
    fabric_stop(&fabric);
}
END_TEST

/* ---- who belongs to it ---- */

START_TEST(a_node_with_another_secret_is_kept_out)
{
    char secret[128];
    fabric_prepare(&fabric, 2, 1, 0);
    snprintf(secret, sizeof(secret), "%s/other", fabric.directory);
    FILE *file = fopen(secret, "w");
    fputs("another secret of this test", file);
    fclose(file);
    ck_assert_int_eq(chmod(secret, 0600), 0);
    fabric_start_node(&fabric, 0, NULL, fabric_quick);
    fabric_start_node(&fabric, 1, secret, fabric_quick);
    for (long began = fabric_now_ms(); !fabric_log_count(&fabric, 1, "does not know the secret");
         fabric_sleep_ms(5))
        ck_assert_msg(fabric_now_ms() - began < 10000, "nobody says why");
    fabric_sleep_ms(300);
    for (unsigned node = 0; node < 2; node++)
        ck_assert_uint_eq(fabric_log_count(&fabric, node, "fabric complete"), 0);
    unlink(secret);
    fabric_stop(&fabric);
}
END_TEST

static int dial(const struct fabric_process *at)
{
    struct sockaddr_in address = {.sin_family = AF_INET,
                                  .sin_port = htons((uint16_t)atoi(strchr(at->rendezvous, ':') + 1))};
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    const int fd = socket(AF_INET, SOCK_STREAM, 0);
    ck_assert_int_eq(connect(fd, (struct sockaddr *)&address, sizeof(address)), 0);
    return fd;
}

START_TEST(strangers_at_the_rendezvous_change_nothing)
{
    char bytes[4096];
    uint64_t seed = 7;
    fabric_start(&fabric, 2, 2, fabric_quick);
    int silent[40];
    for (size_t i = 0; i < sizeof(silent) / sizeof(*silent); i++)
        silent[i] = dial(&fabric);
    for (int i = 0; i < 50; i++) {
        const int fd = dial(&fabric);
        for (size_t j = 0; j < sizeof(bytes); j++)
            bytes[j] = (char)values_random(&seed);
        if (i % 2)
            memcpy(bytes, "epdfab1", 8);
        (void)!send(fd, bytes, i * 80 % sizeof(bytes) + 1, MSG_NOSIGNAL);
        close(fd);
    }
    ck_assert_uint_eq(fabric_run(&fabric, "spanning", fabric_world_size(), fabric_healthy_rank, NULL), 0);
    for (size_t i = 0; i < sizeof(silent) / sizeof(*silent); i++)
        close(silent[i]);
    ck_assert_uint_eq(fabric_log_count(&fabric, 0, "fabric incomplete"), 0);
    fabric_stop(&fabric);
}
END_TEST

/* ---- joins ---- */

/* What a service manager hears of the nodes, like systemd's. */
static int open_notify_socket(void)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    snprintf(address.sun_path, sizeof(address.sun_path), "%s/notify", fabric.directory);
    const int fd = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    ck_assert_int_eq(bind(fd, (struct sockaddr *)&address, sizeof(address)), 0);
    setenv("NOTIFY_SOCKET", address.sun_path, 1);
    return fd;
}

static unsigned count_ready(int fd)
{
    char text[256];
    unsigned n = 0;
    for (ssize_t bytes; (bytes = recv(fd, text, sizeof(text) - 1, 0)) > 0;) {
        text[bytes] = 0;
        n += strstr(text, "READY=1") != NULL;
    }
    return n;
}

START_TEST(a_late_node_is_waited_for_and_only_then_all_are_ready)
{
    struct rank_team team;
    fabric_prepare(&fabric, 2, 2, 0);
    const int notify = open_notify_socket();
    fabric_start_node(&fabric, 1, NULL, fabric_quick);
    fabric_sleep_ms(500);
    ck_assert_uint_eq(fabric_log_count(&fabric, 1, "fabric complete"), 0);
    ck_assert_uint_eq(count_ready(notify), 0);
    fabric_start_node(&fabric, 0, NULL, fabric_quick);
    fabric_wait_complete(&fabric, 1);
    unsigned n_ready = 0;
    for (long began = fabric_now_ms(); n_ready < 2; fabric_sleep_ms(5)) {
        n_ready += count_ready(notify);
        ck_assert_msg(fabric_now_ms() - began < 5000, "%u nodes are ready", n_ready);
    }
    close(notify);
    (void)unlink(getenv("NOTIFY_SOCKET"));
    unsetenv("NOTIFY_SOCKET");
    fabric_ranks_start(&fabric, &team, "spanning", fabric_world_size(), fabric_healthy_rank, NULL);
    ck_assert_uint_eq(ranks_wait(&team, 60), 0);
    fabric_stop(&fabric);
}
END_TEST

/* A session, and what a rank of the layer would join with. layer_close ends it. */
static struct epd_group_options connect_layer(struct layer *layer, const struct rank *rank)
{
    struct epd_open_options options = {.size = sizeof(options), .socket_path = rank->socket_path};
    *layer = (struct layer){.op_case = op_case_named(FABRIC_CASE), .rank = rank};
    op_inputs_init(&layer->inputs, layer->op_case);
    RANK_CHECK(epd_open(&options, &layer->client) == EPD_OK);
    return layer_group_options(layer);
}

/* A rank of one node joins with another hidden size. */
static void mismatch_rank(const struct rank *rank)
{
    struct layer layer;
    struct epd_group_options options = connect_layer(&layer, rank);
    if (rank->rank >= rank->world_size / 2)
        options.hidden += 8;
    RANK_CHECK(epd_group_join(layer.client, &options, &layer.group) == EPD_GROUP_MISMATCH);
    RANK_CHECK(strstr(epd_error_text(), "hidden") != NULL);
    RANK_CHECK(strstr(epd_error_text(), "node 0") != NULL && strstr(epd_error_text(), "node 1") != NULL);
    layer_close(&layer);
}

/* Both nodes come with the first half of the ranks. */
static void same_half_rank(const struct rank *rank)
{
    struct layer layer;
    struct epd_group_options options = connect_layer(&layer, rank);
    options.rank %= rank->world_size / 2;
    RANK_CHECK(epd_group_join(layer.client, &options, &layer.group) == EPD_GROUP_MISMATCH);
    RANK_CHECK(strstr(epd_error_text(), "node 0 says 0..1") && strstr(epd_error_text(), "node 1 says 0..1"));
    layer_close(&layer);
}

/* The other node's ranks do not come. */
static void alone_rank(const struct rank *rank)
{
    struct layer layer;
    struct epd_group_options options = connect_layer(&layer, rank);
    if (rank->rank < rank->world_size / 2) {
        RANK_CHECK(epd_group_join(layer.client, &options, &layer.group) == EPD_TIMEOUT);
        RANK_CHECK(strstr(epd_error_text(), "node 1") != NULL);
    }
    layer_close(&layer);
}

START_TEST(joins_that_do_not_meet_name_the_field_and_the_node)
{
    fabric_start(&fabric, 2, 2, fabric_quick);
    ck_assert_uint_eq(fabric_run(&fabric, "mismatch", fabric_world_size(), mismatch_rank, NULL), 0);
    ck_assert_uint_eq(fabric_run(&fabric, "same half", fabric_world_size(), same_half_rank, NULL), 0);
    ck_assert_uint_eq(fabric_run(&fabric, "alone", fabric_world_size(), alone_rank, NULL), 0);
    /* Names are free again. */
    ck_assert_uint_eq(fabric_run(&fabric, "mismatch", fabric_world_size(), fabric_healthy_rank, NULL), 0);
    fabric_stop(&fabric);
}
END_TEST

/* ---- plans and steps ---- */

/* The second node's ranks create another plan, then a like one, then launch in another order. */
static void disagree_rank(const struct rank *rank)
{
    struct layer layer;
    struct layer_tensor f[FORWARD_COUNT];
    const int second = rank->rank >= rank->world_size / 2;
    layer_open(&layer, rank, op_case_named(FABRIC_CASE));
    struct epd_plan *plan = fabric_forward_plan(&layer, f), *barrier = NULL, *none = NULL;
    struct epd_plan_options options = {.size = sizeof(options), .op = EPD_OP_BARRIER};
    RANK_CHECK(epd_plan_create(layer.group, &options, &barrier) == EPD_OK);
    struct epd_tensor tensors[FORWARD_COUNT];
    uint32_t n = 0;
    for (int i = FORWARD_X; i <= FORWARD_OUT; i++)
        tensors[n++] = f[i].tensor;
    options = (struct epd_plan_options){.size = sizeof(options),
                                        .op = EPD_OP_MOE_FORWARD,
                                        .activation = second ? EPD_GEGLU : EPD_SWIGLU,
                                        .tensors = tensors,
                                        .n_tensors = n};
    RANK_CHECK(epd_plan_create(layer.group, &options, &none) == EPD_PLAN_MISMATCH);
    RANK_CHECK(strstr(epd_error_text(), "node") != NULL);
    options.activation = EPD_SWIGLU;
    options.crossing = second ? EPD_CROSSING_STATIC : EPD_CROSSING_EAGER;
    RANK_CHECK(epd_plan_create(layer.group, &options, &none) == EPD_PLAN_MISMATCH);
    options.crossing = EPD_CROSSING_STATIC;
    RANK_CHECK(epd_plan_create(layer.group, &options, &none) == EPD_OK);
    RANK_CHECK(layer_step(none) == EPD_OK);
    RANK_CHECK(layer_step(plan) == EPD_OK);
    RANK_CHECK(layer_step(second ? barrier : plan) == EPD_SEQ_MISMATCH);
    RANK_CHECK(strstr(epd_error_text(), "node") != NULL);
    RANK_CHECK(layer_step(barrier) == EPD_OK); /* the next step matches again */
    RANK_CHECK(layer_step(plan) == EPD_OK);
    layer_close(&layer);
}

/* A token of one node is routed badly: every rank of both nodes hears of it, and the next step is good. */
static void bad_token_rank(const struct rank *rank)
{
    struct layer layer;
    struct layer_tensor f[FORWARD_COUNT];
    layer_open(&layer, rank, op_case_named(FABRIC_CASE));
    struct epd_plan *plan = fabric_forward_plan(&layer, f);
    int64_t *topk = f[FORWARD_IDX].data, kept = topk[0];
    RANK_CHECK(layer_step(plan) == EPD_OK);
    if (rank->rank + 1 == rank->world_size)
        topk[0] = 99;
    RANK_CHECK(layer_step(plan) == EPD_BAD_ROUTING);
    RANK_CHECK(strstr(epd_error_text(), "rank 3") != NULL && strstr(epd_error_text(), "99") != NULL);
    topk[0] = kept;
    RANK_CHECK(layer_step(plan) == EPD_OK);
    layer_close(&layer);
}

START_TEST(disagreements_about_plans_and_steps_name_the_nodes)
{
    fabric_start(&fabric, 2, 2, fabric_quick);
    ck_assert_uint_eq(fabric_run(&fabric, "disagree", fabric_world_size(), disagree_rank, NULL), 0);
    ck_assert_uint_eq(fabric_run(&fabric, "bad token", fabric_world_size(), bad_token_rank, NULL), 0);
    fabric_stop(&fabric);
}
END_TEST

/* More than node 0 keeps of a group at once, and than a node keeps. */
#define N_FAILING 4200

/* Shared by the ranks and the test. */
struct failing {
    atomic_uint n_done;
    atomic_int looked_at;
};

/* Plans that fail on this node, on the other, on both at once; then a good step. */
static void failing_rank(const struct rank *rank)
{
    struct layer layer;
    struct layer_tensor f[FORWARD_COUNT];
    struct failing *failing = *(struct failing *const *)rank->arg;
    layer_open(&layer, rank, op_case_named("top-8 of 8"));
    struct epd_plan *good = fabric_forward_plan(&layer, f), *none = NULL;
    for (uint32_t i = 0; i < N_FAILING; i++) {
        const int refused = i % 3 == 2 || rank->rank == i % 3; /* has no tensors */
        const struct epd_plan_options options = {.size = sizeof(options),
                                                 .op = refused ? EPD_OP_DISPATCH : EPD_OP_BARRIER};
        const enum epd_status status = epd_plan_create(layer.group, &options, &none);
        RANK_CHECK(status != EPD_OK && status != EPD_QUOTA && status != EPD_TIMEOUT);
    }
    RANK_CHECK(layer_step(good) == EPD_OK);
    atomic_fetch_add(&failing->n_done, 1);
    while (!atomic_load(&failing->looked_at))
        fabric_sleep_ms(5);
    layer_close(&layer);
}

START_TEST(plans_that_fail_again_and_again_leave_nothing_behind)
{
    struct rank_team team;
    struct failing *failing =
        mmap(NULL, sizeof(*failing), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    ck_assert(failing != MAP_FAILED);
    fabric_start(&fabric, 2, 1, NULL);
    fabric_ranks_start(&fabric, &team, "failing", 2, failing_rank, &failing);
    for (const long began_ms = fabric_now_ms(); atomic_load(&failing->n_done) < 2; fabric_sleep_ms(20)) {
        if (fabric_now_ms() - began_ms < 80000)
            continue;
        fabric_print_logs(&fabric);
        ck_abort_msg("%u of 2 ranks are done", atomic_load(&failing->n_done));
    }
    for (unsigned node = 0; node < 2; node++) {
        json_t *document = fabric_ask_document(&fabric, node, CONTROL_FABRIC);
        const json_t *group = json_array_get(field_array(document, "groups"), 0);
        ck_assert_int_eq((int)field_number(group, "joint_plans"), 1); /* the good one */
        if (node == 0)
            ck_assert_int_eq((int)field_number_in(document, "coordinator", "unsettled_plans"), 0);
        json_decref(document);
    }
    atomic_store(&failing->looked_at, 1);
    ck_assert_uint_eq(ranks_wait(&team, 30), 0);
    fabric_stop(&fabric);
    munmap(failing, sizeof(*failing));
}
END_TEST

START_TEST(many_groups_step_at_once_and_far_ahead)
{
    enum { N = 3 };
    struct rank_team teams[N];
    char names[N][16];
    fabric_start(&fabric, 2, 2, NULL);
    for (int i = 0; i < N; i++) {
        snprintf(names[i], sizeof(names[i]), "group %d", i);
        fabric_ranks_start(&fabric, &teams[i], names[i], fabric_world_size(), fabric_ahead_rank, NULL);
    }
    for (int i = 0; i < N; i++)
        ck_assert_uint_eq(ranks_wait(&teams[i], 60), 0);
    fabric_stop(&fabric);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("fabric");
    TCase *tests = tcase_create("fabric");
    tcase_set_timeout(tests, 120);
    tcase_add_test(tests, a_killed_node_ends_its_groups_with_its_name_and_comes_back);
    tcase_add_test(tests, a_killed_coordinator_ends_the_groups_of_the_others);
    tcase_add_test(tests, a_node_with_another_secret_is_kept_out);
    tcase_add_test(tests, strangers_at_the_rendezvous_change_nothing);
    tcase_add_test(tests, a_late_node_is_waited_for_and_only_then_all_are_ready);
    tcase_add_test(tests, joins_that_do_not_meet_name_the_field_and_the_node);
    tcase_add_test(tests, disagreements_about_plans_and_steps_name_the_nodes);
    tcase_add_test(tests, plans_that_fail_again_and_again_leave_nothing_behind);
    tcase_add_test(tests, many_groups_step_at_once_and_far_ahead);
    suite_add_tcase(suite, tests);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_ENV);
    int n_failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return n_failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
