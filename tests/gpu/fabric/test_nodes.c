/* Two daemons with two GPUs each as two nodes, and the same ranks on one daemon with four: the same results. A node that is
 * killed in a step ends that group alone. "test_gpu_nodes EPD EPDCTL". */
#include <arpa/inet.h>
#include <dlfcn.h>
#include <fcntl.h>
#include <math.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "tests/gpu/backend/process.h"
#include "tests/gpu/fabric/node_rank.h"

/* A rank may take so long in all. */
#define RANKS_LIMIT_S 20
#define WORLD         4

static const char *epd, *epdctl;

struct nodes {
    unsigned n;
    char secret_path[32], rendezvous[32];
    struct process_daemon daemons[2];
};

/* ---- daemons ---- */

static unsigned free_port(void)
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t length = sizeof address;
    const int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (bind(fd, (struct sockaddr *)&address, length) != 0 ||
        getsockname(fd, (struct sockaddr *)&address, &length) != 0)
        abort();
    (void)close(fd);
    return ntohs(address.sin_port);
}

static void make_secret(struct nodes *nodes)
{
    (void)snprintf(nodes->secret_path, sizeof nodes->secret_path, "/tmp/epd-secret-XXXXXX");
    const int fd = mkstemp(nodes->secret_path); /* mode 0600 */
    if (fd < 0 || dprintf(fd, "a secret of this test, %ld\n", (long)getpid()) < 0)
        abort();
    (void)close(fd);
    (void)snprintf(nodes->rendezvous, sizeof nodes->rendezvous, "127.0.0.1:%u", free_port());
}

static void start_node(struct nodes *nodes, unsigned node)
{
    static const char *const devices[] = {"0,1", "2,3"};
    char host[16], number[8];
    (void)snprintf(host, sizeof host, "host%u", node);
    (void)snprintf(number, sizeof number, "%u", node);
    (void)setenv("NCCL_HOSTID", host, 1);
    const char *options[] = {"--devices",
                             devices[node],
                             "--nodes",
                             "2",
                             "--node-rank",
                             number,
                             "--rendezvous",
                             nodes->rendezvous,
                             "--secret-file",
                             nodes->secret_path,
                             "--node-dead",
                             "2s",
                             NULL};
    process_daemon_start(&nodes->daemons[node], epd, options);
    (void)unsetenv("NCCL_HOSTID");
}

static void nodes_start(struct nodes *nodes, unsigned n)
{
    static const char *const all[] = {"--devices", "0,1,2,3", NULL};
    *nodes = (struct nodes){.n = n};
    if (n == 1) {
        process_daemon_start(&nodes->daemons[0], epd, all);
        return;
    }
    make_secret(nodes);
    for (unsigned node = 0; node < n; node++)
        start_node(nodes, node);
}

static int nodes_stop(struct nodes *nodes)
{
    int failed = 0;
    for (unsigned node = 0; node < nodes->n; node++)
        if (nodes->daemons[node].pid)
            failed |= process_daemon_stop(&nodes->daemons[node]);
    if (nodes->n > 1)
        (void)unlink(nodes->secret_path);
    return failed;
}

/* The supervisor and its worker, at once. */
static void kill_node(struct process_daemon *daemon)
{
    char path[64], command[128];
    int worker = 0;
    (void)snprintf(path, sizeof path, "/proc/%d/task/%d/children", (int)daemon->pid, (int)daemon->pid);
    FILE *children = fopen(path, "r");
    if (!children || fscanf(children, "%d", &worker) != 1 || worker <= 0)
        abort();
    (void)fclose(children);
    (void)kill(daemon->pid, SIGKILL);
    (void)kill(worker, SIGKILL);
    (void)process_wait(daemon->pid);
    daemon->pid = 0;
    (void)snprintf(command, sizeof command, "rm -rf %s", daemon->directory);
    (void)!system(command);
}

/* ---- ranks ---- */

struct team {
    const char *mode, *group;
    unsigned world_size, n_nodes;
    const char *results; /* prefix of paths; NULL: none */
    pid_t pids[WORLD];
};

static void team_start(struct team *team, const struct nodes *nodes)
{
    for (unsigned rank = 0; rank < team->world_size; rank++) {
        const struct process_daemon *daemon = &nodes->daemons[rank / (team->world_size / team->n_nodes)];
        char numbers[3][16], result[96] = "-";
        (void)snprintf(numbers[0], sizeof numbers[0], "%u", rank);
        (void)snprintf(numbers[1], sizeof numbers[1], "%u", team->world_size);
        (void)snprintf(numbers[2], sizeof numbers[2], "%u", team->n_nodes);
        if (team->results)
            (void)snprintf(result, sizeof result, "%s.%u", team->results, rank);
        const char *argv[] = {"/proc/self/exe", "rank",     team->mode,           team->group,
                              numbers[0],       numbers[1], numbers[2],           daemon->socket_path,
                              result,           epdctl,     daemon->control_path, NULL};
        team->pids[rank] = process_start(argv);
    }
}

/* Of the first n; how many did not end well. What is left when one has failed, or time is over, is killed. */
static unsigned team_end(struct team *team, unsigned n)
{
    const double until = process_seconds() + RANKS_LIMIT_S;
    unsigned n_failed = 0;
    for (unsigned left = n; left;) {
        for (unsigned rank = 0; rank < n; rank++) {
            int status;
            if (!team->pids[rank] || waitpid(team->pids[rank], &status, WNOHANG) != team->pids[rank])
                continue;
            n_failed += !WIFEXITED(status) || WEXITSTATUS(status) != 0;
            team->pids[rank] = 0;
            left--;
        }
        (void)usleep(2000);
        for (unsigned rank = 0; rank < n && (n_failed || process_seconds() > until); rank++)
            if (team->pids[rank])
                (void)kill(team->pids[rank], SIGKILL);
    }
    for (unsigned rank = n; rank < team->world_size; rank++) {
        (void)kill(team->pids[rank], SIGKILL);
        (void)process_wait(team->pids[rank]);
    }
    return n_failed;
}

/* ---- comparison ---- */

static float bf16_value(uint16_t bits)
{
    const uint32_t wide = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &wide, sizeof value);
    return value;
}

/* The largest difference, as a part of the largest value; NaN counts as infinite. */
static double difference(const void *a, const void *b, size_t n, int is_bf16)
{
    double largest = 0, value = 0;
    for (size_t i = 0; i < n; i++) {
        const double x = is_bf16 ? bf16_value(((const uint16_t *)a)[i]) : ((const float *)a)[i];
        const double y = is_bf16 ? bf16_value(((const uint16_t *)b)[i]) : ((const float *)b)[i];
        if (!isfinite(x) || !isfinite(y))
            return INFINITY;
        largest = fmax(largest, fabs(x - y));
        value = fmax(value, fabs(x));
    }
    return value > 0 ? largest / value : INFINITY;
}

static void read_result(const char *prefix, unsigned rank, struct node_result *result)
{
    char path[96];
    (void)snprintf(path, sizeof path, "%s.%u", prefix, rank);
    FILE *file = fopen(path, "r");
    if (!file || fread(result, sizeof *result, 1, file) != 1)
        abort();
    (void)fclose(file);
    (void)unlink(path);
}

/* Slots hold the same bits on one node and on two, and so does all that is made of them; sums of tokens are rounded once
 * more for each node. */
#define BF16_UNIT (1.0 / 256)

static int compare(const char *one, const char *two)
{
    static struct node_result a, b;
    int failed = 0;
    for (unsigned rank = 0; rank < WORLD; rank++) {
        read_result(one, rank, &a);
        read_result(two, rank, &b);
        const double out = difference(a.out, b.out, sizeof a.out / 2, 1);
        const double dx = difference(a.dx, b.dx, sizeof a.dx / 2, 1);
        const double d_weights = difference(a.d_weights, b.d_weights, sizeof a.d_weights / 4, 0);
        const double dw1 = difference(a.dw1, b.dw1, sizeof a.dw1 / 4, 0);
        const double dw2 = difference(a.dw2, b.dw2, sizeof a.dw2 / 4, 0);
        printf("rank %u: one node against two: out %.2e dx %.2e d_weights %.2e dw1 %.2e dw2 %.2e\n", rank,
               out, dx, d_weights, dw1, dw2);
        failed |= out > 3 * BF16_UNIT || dx > 3 * BF16_UNIT || d_weights > 1e-5 || dw1 > 1e-5 || dw2 > 1e-5;
    }
    return failed;
}

/* ---- tests ---- */

static int run_layers(unsigned n_nodes, const char *results)
{
    struct nodes nodes;
    struct team team = {
        .mode = "layer", .group = "layer", .world_size = WORLD, .n_nodes = n_nodes, .results = results};
    nodes_start(&nodes, n_nodes);
    team_start(&team, &nodes);
    const unsigned n_failed = team_end(&team, WORLD);
    const int stopped = nodes_stop(&nodes);
    printf("layers on %u nodes: %u ranks failed, daemons ended %s\n", n_nodes, n_failed,
           stopped ? "badly" : "well");
    return n_failed || stopped;
}

static int two_nodes_are_as_one(void)
{
    char one[64], two[64];
    (void)snprintf(one, sizeof one, "/tmp/epd-one-%d", (int)getpid());
    (void)snprintf(two, sizeof two, "/tmp/epd-two-%d", (int)getpid());
    return run_layers(1, one) || run_layers(2, two) || compare(one, two);
}

/* Another group of the surviving node goes on all the while, and when the node is back groups span both again. */
static int a_killed_node_ends_its_group_alone(void)
{
    struct nodes nodes;
    struct team lost = {.mode = "until_lost", .group = "lost", .world_size = WORLD, .n_nodes = 2};
    struct team other = {.mode = "for:3", .group = "other", .world_size = 2, .n_nodes = 1};
    struct team after = {.mode = "layer", .group = "after", .world_size = WORLD, .n_nodes = 2};
    nodes_start(&nodes, 2);
    team_start(&lost, &nodes);
    (void)sleep(6); /* joined, and in the midst of its steps */
    team_start(&other, &nodes);
    (void)sleep(2);
    kill_node(&nodes.daemons[1]);
    const double killed = process_seconds();
    unsigned n_failed = team_end(&lost, 2);
    printf("ranks of the other node ended %.2f s after the kill, %u failed\n", process_seconds() - killed,
           n_failed);
    start_node(&nodes, 1);
    n_failed += team_end(&other, 2);
    team_start(&after, &nodes);
    n_failed += team_end(&after, WORLD);
    const int stopped = nodes_stop(&nodes);
    printf("a killed node: %u ranks failed, daemons ended %s\n", n_failed, stopped ? "badly" : "well");
    return n_failed || stopped;
}

/* Groups that span nodes open and end while others run, and hold them up for a moment only. */
static int groups_open_and_end_beside_others(void)
{
    struct nodes nodes;
    struct team other = {.mode = "for:5", .group = "other", .world_size = 2, .n_nodes = 1};
    struct team first = {.mode = "layer", .group = "first", .world_size = WORLD, .n_nodes = 2};
    struct team second = {.mode = "layer", .group = "second", .world_size = WORLD, .n_nodes = 2};
    nodes_start(&nodes, 2);
    team_start(&other, &nodes);
    (void)sleep(6); /* in the midst of its steps */
    team_start(&first, &nodes);
    unsigned n_failed = team_end(&first, WORLD);
    n_failed += team_end(&other, 2);
    team_start(&second, &nodes);
    n_failed += team_end(&second, WORLD);
    const int stopped = nodes_stop(&nodes);
    printf("beside others: %u ranks failed, daemons ended %s\n", n_failed, stopped ? "badly" : "well");
    return n_failed || stopped;
}

int main(int argc, char **argv)
{
    (void)setvbuf(stdout, NULL, _IOLBF, 0);
    if (argc == 11 && strcmp(argv[1], "rank") == 0)
        node_rank_main(argv);
    if (argc == 2 && strcmp(argv[1], "count") == 0)
        return process_count_main();
    if (argc != 3)
        return 2;
    epd = argv[1];
    epdctl = argv[2];
    if (process_count_gpus() < WORLD) {
        printf("skipped: %d GPUs, want %d\n", process_count_gpus(), WORLD);
        return PROCESS_SKIPPED;
    }
    if (!dlopen("libnccl.so.2", RTLD_LAZY | RTLD_LOCAL)) {
        printf("skipped: %s\n", dlerror());
        return PROCESS_SKIPPED;
    }
    (void)setenv("NCCL_SOCKET_IFNAME", "lo", 0);
    int failed = two_nodes_are_as_one();
    failed |= a_killed_node_ends_its_group_alone();
    failed |= groups_open_and_end_beside_others();
    return failed;
}
