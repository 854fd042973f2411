/* Daemons with GPUs of their own as nodes, and the same ranks on one daemon with all of these GPUs: the same results, with as
 * many ranks as GPUs and with twice as many. A node that is killed in a step ends its group alone. Groups of some of three
 * nodes and of all, of which the last shares a GPU with the first where there are two, open, step and end beside each other.
 * "test_gpu_nodes EPD EPDCTL": two nodes of two GPUs, or of one where there are fewer than four. EPD_TEST_ONLY names the
 * tests that run; EPD_TEST_CROSSING=eager: with eager plans. */
#include <dlfcn.h>
#include <signal.h>
#include <string.h>
#include <unistd.h>

#include "tests/gpu/fabric/node_rank.h"
#include "tests/gpu/fabric/node_result.h"
#include "tests/gpu/fabric/node_team.h"

struct bench {
    const char *epd, *epdctl;
    unsigned n_gpus; /* that are used: 2 or 4 */
};

/* ---- results ---- */

/* On this machine's GPUs as two nodes, and as one. */
static const char *const *devices_of(const struct bench *bench, unsigned n_nodes)
{
    static const char *const one[] = {"0,1"}, *const one_of_four[] = {"0,1,2,3"};
    static const char *const two[] = {"0", "1"}, *const two_of_four[] = {"0,1", "2,3"};
    if (n_nodes == 1)
        return bench->n_gpus == 4 ? one_of_four : one;
    return bench->n_gpus == 4 ? two_of_four : two;
}

static struct node_team layer_team(const struct bench *bench, const char *group, unsigned world_size,
                                   unsigned n_nodes)
{
    return (struct node_team){.mode = "layer",
                              .group = group,
                              .world_size = world_size,
                              .n_nodes = n_nodes,
                              .nodes = {0, 1, 2},
                              .epdctl = bench->epdctl};
}

/* The first team has a GPU for each rank, the second one for two. */
static int run_layers(const struct bench *bench, unsigned n_nodes, struct node_team teams[2])
{
    struct node_daemons nodes;
    unsigned n_failed = 0;
    teams[0] = layer_team(bench, "layer", bench->n_gpus, n_nodes);
    teams[1] = layer_team(bench, "shared", 2 * bench->n_gpus, n_nodes);
    node_daemons_start(&nodes, bench->epd, n_nodes, devices_of(bench, n_nodes));
    for (int i = 0; i < 2; i++) {
        node_team_start(&teams[i], &nodes);
        n_failed += node_team_end(&teams[i], teams[i].world_size);
    }
    const int stopped = node_daemons_stop(&nodes);
    printf("layers on %u nodes: %u ranks failed, daemons ended %s\n", n_nodes, n_failed,
           stopped ? "badly" : "well");
    return n_failed || stopped;
}

static int compare_teams(const struct node_team *one, const struct node_team *several)
{
    return node_results_compare(one->prefix, several->prefix, one->world_size, several->n_nodes);
}

static void remove_results(const struct node_team *teams, int n)
{
    for (int i = 0; i < n; i++)
        node_results_remove(teams[i].prefix, teams[i].world_size);
}

static int two_nodes_are_as_one(const struct bench *bench)
{
    struct node_team one[2], two[2];
    int failed = run_layers(bench, 1, one) | run_layers(bench, 2, two);
    for (int i = 0; i < 2 && !failed; i++)
        failed = compare_teams(&one[i], &two[i]);
    remove_results(one, 2);
    remove_results(two, 2);
    return failed;
}

/* ---- a node that goes ---- */

/* Another group of the surviving node goes on all the while, and when the node is back groups span both again. */
static int a_killed_node_ends_its_group_alone(const struct bench *bench)
{
    const unsigned per_node = bench->n_gpus / 2;
    struct node_daemons nodes;
    struct node_team lost = layer_team(bench, "lost", bench->n_gpus, 2);
    struct node_team other = layer_team(bench, "other", per_node, 1);
    struct node_team after = layer_team(bench, "after", bench->n_gpus, 2);
    lost.mode = "until_lost";
    other.mode = "for:2";
    after.mode = "check";
    node_daemons_start(&nodes, bench->epd, 2, devices_of(bench, 2));
    node_team_start(&lost, &nodes);
    node_team_start(&other, &nodes);
    int failed = node_team_steps(&lost) | node_team_steps(&other);
    (void)usleep(300000); /* in the midst of their steps */
    node_daemon_kill(&nodes, 1);
    const double killed = process_seconds();
    unsigned n_failed = node_team_end(&lost, per_node);
    printf("ranks of the other node ended %.2f s after the kill, %u failed\n", process_seconds() - killed,
           n_failed);
    node_daemon_start(&nodes, 1);
    n_failed += node_team_end(&other, per_node);
    node_team_start(&after, &nodes);
    n_failed += node_team_end(&after, after.world_size);
    failed |= node_daemons_stop(&nodes);
    remove_results(&after, 1);
    printf("a killed node: %u ranks failed, the rest %s\n", n_failed, failed ? "went badly" : "went well");
    return n_failed || failed;
}

/* ---- some of the nodes ---- */

static int run_check(struct node_team *team, const struct node_daemons *nodes)
{
    team->mode = "check";
    node_team_start(team, nodes);
    return node_team_end(team, team->world_size) != 0;
}

static int run_pair(struct node_team *team, const struct node_daemons *nodes, unsigned first, unsigned second)
{
    team->nodes[0] = first;
    team->nodes[1] = second;
    return run_check(team, nodes);
}

/* Two ranks and three on one daemon, for the comparison. */
static int run_references(const struct bench *bench, struct node_team references[2])
{
    static const char *const devices[] = {"0,1"};
    struct node_daemons nodes;
    references[0] = layer_team(bench, "pair", 2, 1);
    references[1] = layer_team(bench, "three", 3, 1);
    node_daemons_start(&nodes, bench->epd, 1, devices);
    const int failed = run_check(&references[0], &nodes) || run_check(&references[1], &nodes);
    return node_daemons_stop(&nodes) || failed;
}

/* One of nodes 0 and 1 and one of node 0 alone step all the while; then, with a GPU that two nodes share where there are two, of
 * 1 and 2, of 2 and 0, and of all three. */
static int groups_of_some_nodes_open_and_end_beside_others(const struct bench *bench)
{
    static const char *const devices[] = {"0", "1", "0"}, *const devices_of_four[] = {"0", "1", "2"};
    struct node_daemons nodes;
    struct node_team references[2], teams[3];
    struct node_team first = layer_team(bench, "first", 2, 2), alone = layer_team(bench, "alone", 1, 1);
    int failed = run_references(bench, references);
    teams[0] = layer_team(bench, "second", 2, 2);
    teams[1] = layer_team(bench, "third", 2, 2);
    teams[2] = layer_team(bench, "all", 3, 3);
    first.mode = alone.mode = "for:8";
    node_daemons_start(&nodes, bench->epd, 3, bench->n_gpus == 4 ? devices_of_four : devices);
    node_team_start(&first, &nodes);
    node_team_start(&alone, &nodes);
    failed |= node_team_steps(&first) | node_team_steps(&alone);
    failed |= run_pair(&teams[0], &nodes, 1, 2) || run_pair(&teams[1], &nodes, 2, 0) ||
              run_check(&teams[2], &nodes);
    const unsigned n_failed = node_team_end(&first, 2) + node_team_end(&alone, 1);
    failed |= node_daemons_stop(&nodes);
    printf("some of three nodes: %u ranks of the others failed, the rest %s\n", n_failed,
           failed ? "went badly" : "went well");
    for (int i = 0; i < 3 && !failed; i++)
        failed = compare_teams(&references[i == 2], &teams[i]);
    remove_results(references, 2);
    remove_results(teams, 3);
    return n_failed || failed;
}

/* ---- all ---- */

static int run_tests(const struct bench *bench)
{
    static const struct {
        const char *name;
        int (*run)(const struct bench *bench);
    } tests[] = {
        {"two_nodes_are_as_one", two_nodes_are_as_one},
        {"a_killed_node_ends_its_group_alone", a_killed_node_ends_its_group_alone},
        {"groups_of_some_nodes_open_and_end_beside_others", groups_of_some_nodes_open_and_end_beside_others},
    };
    const char *only = getenv("EPD_TEST_ONLY");
    int failed = 0, n_run = 0;
    for (size_t i = 0; i < sizeof tests / sizeof *tests; i++) {
        if (only && !strstr(tests[i].name, only))
            continue;
        const double begin = process_seconds();
        const int bad = tests[i].run(bench);
        printf("%s: %s, %.1f s\n", tests[i].name, bad ? "FAILED" : "ok", process_seconds() - begin);
        failed |= bad;
        n_run++;
    }
    return failed || !n_run;
}

int main(int argc, char **argv)
{
    (void)setvbuf(stdout, NULL, _IOLBF, 0);
    if (argc == NODE_RANK_ARGUMENTS && strcmp(argv[1], "rank") == 0)
        node_rank_main(argv);
    if (argc == 2 && strcmp(argv[1], "count") == 0)
        return process_count_main();
    if (argc != 3)
        return 2;
    const int n_gpus = process_count_gpus();
    const struct bench bench = {.epd = argv[1], .epdctl = argv[2], .n_gpus = n_gpus < 4 ? 2 : 4};
    if (n_gpus < 2) {
        printf("skipped: %d GPUs, want 2\n", n_gpus);
        return PROCESS_SKIPPED;
    }
    if (!dlopen("libnccl.so.2", RTLD_LAZY | RTLD_LOCAL)) {
        printf("skipped: %s\n", dlerror());
        return PROCESS_SKIPPED;
    }
    (void)setenv("NCCL_SOCKET_IFNAME", "lo", 0);
    return run_tests(&bench);
}
