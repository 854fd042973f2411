/* test_gpu_fault EPD SHIM SUITE[+SUITE...]: what the daemon survives on GPUs, with real clients in processes of their own.
 *   ranks   ranks that are killed, slow, out of order
 *   workers workers that are killed, contexts that are lost
 *   input   what device memory may hold
 *   memory  handles that lie, memory that is not there
 *   mps     the fault of a neighbour in the same MPS server (run it with one) */
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "tests/fault/control.h"
#include "tests/fault/spawn.h"
#include "tests/gpu/fault/suites.h"

#define SKIPPED     77
#define TEST_S      90
#define FREE_MS     5000
#define MAX_OPTIONS 24

struct fixture fixture;
static const char *shim_library;

static unsigned n_added, n_left_out;

void suite_add_on(TCase *cases, int n_gpus, const TTest *test)
{
    const char *only = getenv("EPD_TEST_ONLY");
    if (only && !strstr(test->name, only))
        return;
    if (fixture.n_gpus < n_gpus) {
        printf("SKIP: %s needs %d GPUs\n", test->name, n_gpus);
        n_left_out++;
        return;
    }
    tcase_add_test(cases, test);
    n_added++;
}

void suite_add(TCase *cases, const TTest *test)
{
    suite_add_on(cases, 1, test);
}

static void fixture_explain(void)
{
    static const enum control_verb verbs[] = {CONTROL_CLIENTS, CONTROL_GROUPS, CONTROL_PLANS,
                                              CONTROL_DEVICES};
    for (size_t i = 0; i < sizeof verbs / sizeof verbs[0]; i++) {
        json_t *document = control_ask(fixture.daemon.control_path, verbs[i], NULL);
        (void)json_dumpf(document, stderr, JSON_COMPACT);
        fputc('\n', stderr);
        json_decref(document);
    }
    daemon_print_log(&fixture.daemon);
}

struct team fixture_team(const char *role, const char *group_name, unsigned world, unsigned slot)
{
    return (struct team){.world = world,
                         .slot = slot,
                         .role = role,
                         .socket_path = fixture.daemon.socket_path,
                         .group_name = group_name,
                         .board = fixture.board,
                         .board_fd = fixture.board_fd,
                         .explain = fixture_explain};
}

void expect_role(const char *role, unsigned world)
{
    const pid_t worker = daemon_worker(&fixture.daemon);
    board_reset(fixture.board);
    const struct team team = fixture_team(role, role, world, 0);
    const unsigned n_failed = team_run(&team);
    if (n_failed || daemon_worker(&fixture.daemon) != worker)
        daemon_print_log(&fixture.daemon);
    ck_assert_uint_eq(n_failed, 0);
    ck_assert_int_eq(daemon_worker(&fixture.daemon), worker);
}

long fixture_free_mib(void)
{
    const unsigned slot = BOARD_MAX_RANKS - 1;
    const struct team team = fixture_team("free", "free", 1, slot);
    ck_assert_uint_eq(team_run(&team), 0);
    return (long)atomic_load(&fixture.board->ranks[slot].n_good);
}

void fixture_expect_free(long before_mib, long slack_mib)
{
    const double until = now_ms() + FREE_MS;
    long now = 0;
    while ((now = fixture_free_mib()) < before_mib - slack_mib)
        ck_assert_msg(now_ms() < until, "GPU 0 has %ld MiB free, before it had %ld", now, before_mib);
    printf("GPU 0: %ld MiB free before, %ld after\n", before_mib, now);
}

int fixture_reclaimed(const struct baseline *before)
{
    const int ms = baseline_wait(before, &fixture.daemon);
    if (ms < 0)
        fixture_explain();
    return ms;
}

void fixture_start(struct daemon_process *daemon, const char *const *more)
{
    const char *options[MAX_OPTIONS] = {"--backend",     "cuda",  "--restart-first", "10ms",
                                        "--restart-max", "200ms", "--restart-limit", "0"};
    int n = 8;
    for (int i = 0; more && more[i] && n < MAX_OPTIONS - 1; i++)
        options[n++] = more[i];
    setenv("LD_PRELOAD", shim_library, 1);
    daemon_start(daemon, 0, options);
    unsetenv("LD_PRELOAD");
}

static void set_up(void)
{
    char path[] = "/tmp/epd-gpu-shim-XXXXXX";
    int fd = mkstemp(path);
    if (fd < 0 || ftruncate(fd, sizeof *fixture.shim) != 0)
        abort();
    fixture.shim = mmap(NULL, sizeof *fixture.shim, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    atomic_store(&fixture.shim->crash_device, -1);
    setenv("FAULT_GPU_SHIM", path, 1); /* every worker opens it, so it stays until the end */
    fixture.board = board_create(&fixture.board_fd);
    fixture_start(&fixture.daemon, NULL);
}

static void tear_down(void)
{
    daemon_stop(&fixture.daemon);
    unlink(getenv("FAULT_GPU_SHIM"));
}

static double began_ms;

static void say_when(void)
{
    printf("at %.1f s\n", (now_ms() - began_ms) / 1e3);
    fflush(stdout);
}

static const struct {
    const char *name;
    void (*add)(TCase *cases);
} suites[] = {{"ranks", add_rank_tests},
              {"workers", add_worker_tests},
              {"input", add_input_tests},
              {"memory", add_memory_tests},
              {"mps", add_mps_tests}};

/* All of the names, joined by '+', are suites. */
static int names_known(const char *names)
{
    for (const char *name = names;; name++) {
        const size_t length = strcspn(name, "+");
        int known = 0;
        for (size_t i = 0; i < sizeof suites / sizeof suites[0]; i++)
            known |= strlen(suites[i].name) == length && strncmp(name, suites[i].name, length) == 0;
        if (!known) {
            fprintf(stderr, "no suite \"%.*s\"\n", (int)length, name);
            return 0;
        }
        name += length;
        if (!*name)
            return 1;
    }
}

/* names: one or more, joined by '+'. */
static int run(const char *names)
{
    Suite *suite = suite_create(names);
    TCase *cases = tcase_create(names);
    began_ms = now_ms();
    tcase_set_timeout(cases, TEST_S);
    tcase_add_unchecked_fixture(cases, set_up, tear_down);
    tcase_add_checked_fixture(cases, say_when, say_when);
    for (size_t i = 0; i < sizeof suites / sizeof suites[0]; i++)
        if (strstr(names, suites[i].name))
            suites[i].add(cases);
    suite_add_tcase(suite, cases);
    if (!n_added) {
        if (!n_left_out)
            fprintf(stderr, "EPD_TEST_ONLY names no test of %s\n", names);
        return n_left_out ? SKIPPED : 2;
    }
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_VERBOSE);
    const int n_failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return n_failed != 0;
}

int main(int argc, char **argv)
{
    int code = 0;
    if (team_rank_main(argc, argv, &code))
        return code;
    if (argc != 4 || !names_known(argv[3])) {
        fprintf(stderr, "usage: %s EPD SHIM SUITE[+SUITE...], of ranks, workers, input, memory, mps\n",
                argv[0]);
        return 2;
    }
    fixture.n_gpus = team_count_gpus();
    if (!fixture.n_gpus || (strstr(argv[3], "mps") && !getenv("CUDA_MPS_PIPE_DIRECTORY"))) {
        printf("SKIP: no %s\n", fixture.n_gpus ? "MPS server (CUDA_MPS_PIPE_DIRECTORY)" : "GPU");
        return SKIPPED;
    }
    fixture.world = fixture.n_gpus < 2 ? 2 : fixture.n_gpus < 4 ? (unsigned)fixture.n_gpus : 4;
    fixture.world = fixture.world == 3 ? 2 : fixture.world; /* divides the experts */
    setenv("EPD_TEST_EPD", argv[1], 1);
    shim_library = argv[2];
    return run(argv[3]);
}
