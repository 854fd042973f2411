/* The suites of test_gpu_fault, and what main has set up for them. */
#ifndef EPD_TESTS_GPU_FAULT_SUITES_H
#define EPD_TESTS_GPU_FAULT_SUITES_H

#include <check.h>

#include "tests/fault/baseline.h"
#include "tests/gpu/fault/team.h"
#include "tests/gpu/fault/worker_shim.h"
#include "tests/integration/daemon_process.h"

struct fixture {
    struct daemon_process daemon; /* one for all tests of a suite */
    struct board *board;
    int board_fd;
    unsigned world; /* ranks of a usual team: 2 on one GPU, else one of each GPU, at most 4 */
    int n_gpus;
    struct worker_shim *shim; /* the daemon has it preloaded */
};

/* libcheck hands tests nothing. */
extern struct fixture fixture;

void add_rank_tests(TCase *cases);
void add_worker_tests(TCase *cases);
void add_input_tests(TCase *cases);
void add_memory_tests(TCase *cases);
void add_mps_tests(TCase *cases);

/* All tests, or those whose name contains EPD_TEST_ONLY. */
void suite_add(TCase *cases, const TTest *test);
/* The same; with fewer GPUs the test would check nothing: then it says SKIP and stays out. */
void suite_add_on(TCase *cases, int n_gpus, const TTest *test);
/* Runs a role in a team of `world`; every rank must end well, and the worker must be the same. */
void expect_role(const char *role, unsigned world);
/* Starts a daemon with these arguments besides those of the fixture's. */
void fixture_start(struct daemon_process *daemon, const char *const *more);
/* A team of the fixture's board: role, group name, world and place on the board. */
struct team fixture_team(const char *role, const char *group_name, unsigned world, unsigned slot);
/* baseline_wait; if that fails, the daemon's own view is printed. */
int fixture_reclaimed(const struct baseline *before);
/* Free MiB of GPU 0, as a fresh process sees it. */
long fixture_free_mib(void);
/* Until that is no less than `before` but for `slack`; ends the test after 5 s. */
void fixture_expect_free(long before_mib, long slack_mib);

#endif
