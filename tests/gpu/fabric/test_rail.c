/* Rails over NCCL between two processes that it takes for two hosts, each with a GPU. */
#include <check.h>
#include <cuda_runtime_api.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "ep/nccl_library.h"
#include "tests/gpu/fabric/rail_node.h"

#define SKIPPED  77
#define NODE_ARG "--rail-node"
#define LIMIT_S  15

/* As a process of its own: nothing of CUDA is inherited. */
static pid_t start_node(const char *role, unsigned node, int fd)
{
    const pid_t pid = fork();
    ck_assert_int_ge(pid, 0);
    if (pid)
        return pid;
    char node_text[8], fd_text[16], host[16];
    (void)snprintf(node_text, sizeof node_text, "%u", node);
    (void)snprintf(fd_text, sizeof fd_text, "%d", fd);
    (void)snprintf(host, sizeof host, "host%u", node);
    (void)setenv("NCCL_HOSTID", host, 1);
    (void)execl("/proc/self/exe", "test_gpu_rail", NODE_ARG, role, node_text, fd_text, (char *)NULL);
    _exit(127);
}

/* Its wait status; a node that does not end is killed. */
static int end_of(pid_t pid)
{
    const struct timespec nap = {.tv_nsec = 10000000};
    int status = 0;
    for (unsigned i = 0; i < LIMIT_S * 100; i++) {
        if (waitpid(pid, &status, WNOHANG) == pid)
            return status;
        (void)nanosleep(&nap, NULL);
    }
    (void)kill(pid, SIGKILL);
    (void)waitpid(pid, &status, 0);
    return status;
}

/* Ends of both nodes. */
static void run_nodes(const char *role, int ends[2])
{
    int fds[2];
    pid_t pids[2];
    ck_assert_int_eq(socketpair(AF_UNIX, SOCK_SEQPACKET, 0, fds), 0);
    for (unsigned node = 0; node < 2; node++)
        pids[node] = start_node(role, node, fds[node]);
    (void)close(fds[0]);
    (void)close(fds[1]);
    for (unsigned node = 0; node < 2; node++)
        ends[node] = end_of(pids[node]);
}

static void expect_well(const char *role)
{
    int ends[2];
    run_nodes(role, ends);
    for (unsigned node = 0; node < 2; node++)
        ck_assert_msg(WIFEXITED(ends[node]) && WEXITSTATUS(ends[node]) == 0, "%s: node %u ended with %#x",
                      role, node, (unsigned)ends[node]);
}

START_TEST(swaps_bring_what_was_sent_in_the_order_of_the_stream)
{
    expect_well("swaps");
}
END_TEST

START_TEST(connecting_holds_up_no_other_stream)
{
    expect_well("connect");
}
END_TEST

START_TEST(swaps_have_a_speed)
{
    expect_well("speed");
}
END_TEST

START_TEST(an_abort_frees_the_stream_that_waits_for_a_node_that_never_comes)
{
    expect_well("abort");
}
END_TEST

START_TEST(a_killed_node_is_noticed_and_the_stream_goes_on)
{
    int ends[2];
    run_nodes("kill", ends);
    ck_assert_msg(WIFEXITED(ends[0]) && WEXITSTATUS(ends[0]) == 0, "node 0 ended with %#x",
                  (unsigned)ends[0]);
    ck_assert(WIFSIGNALED(ends[1]) && WTERMSIG(ends[1]) == SIGKILL);
}
END_TEST

START_TEST(a_rail_whose_other_node_does_not_connect_ends_in_time_and_leaves_nothing)
{
    expect_well("alone");
}
END_TEST

START_TEST(a_rail_that_was_never_connected_leaves_nothing)
{
    expect_well("unused");
}
END_TEST

/* In a moment that is taken for quiet NCCL would wait for it, and all lanes with it. */
START_TEST(a_first_swap_that_is_not_answered_is_no_quiet_moment_and_leaves_in_time)
{
    expect_well("half");
}
END_TEST

int main(int argc, char **argv)
{
    int n_devices = 0;
    struct epd_error error;
    if (argc == 5 && strcmp(argv[1], NODE_ARG) == 0)
        rail_node_run(argv[2], (unsigned)atoi(argv[3]), atoi(argv[3]), atoi(argv[4]));
    if (cudaGetDeviceCount(&n_devices) != cudaSuccess || n_devices < 2) {
        (void)printf("skipped: %d GPUs, want 2\n", n_devices);
        return SKIPPED;
    }
    if (nccl_library_load("", &error) != EPD_OK) {
        (void)printf("skipped: %s\n", error.text);
        return SKIPPED;
    }
    Suite *suite = suite_create("rail");
    TCase *tests = tcase_create("nccl");
    tcase_set_timeout(tests, 0);
    tcase_add_test(tests, swaps_bring_what_was_sent_in_the_order_of_the_stream);
    tcase_add_test(tests, an_abort_frees_the_stream_that_waits_for_a_node_that_never_comes);
    tcase_add_test(tests, a_killed_node_is_noticed_and_the_stream_goes_on);
    tcase_add_test(tests, a_rail_whose_other_node_does_not_connect_ends_in_time_and_leaves_nothing);
    tcase_add_test(tests, a_rail_that_was_never_connected_leaves_nothing);
    tcase_add_test(tests, a_first_swap_that_is_not_answered_is_no_quiet_moment_and_leaves_in_time);
    tcase_add_test(tests, connecting_holds_up_no_other_stream);
    tcase_add_test(tests, swaps_have_a_speed);
    suite_add_tcase(suite, tests);
    SRunner *runner = srunner_create(suite);
    srunner_set_fork_status(runner, CK_NOFORK);
    srunner_run_all(runner, CK_VERBOSE);
    const int n_failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return n_failed ? 1 : 0;
}
