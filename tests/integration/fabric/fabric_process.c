#include "tests/integration/fabric/fabric_process.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>

#define COMPLETE_DEADLINE_MS 20000
#define RANKS_DEADLINE_S     120

static void sleep_ms(long ms)
{
    struct timespec t = {.tv_sec = ms / 1000, .tv_nsec = ms % 1000 * 1000000};
    nanosleep(&t, NULL);
}

static void die(const struct fabric_process *fabric, const char *what)
{
    fprintf(stderr, "fabric: %s\n", what);
    fabric_print_logs(fabric);
    abort();
}

unsigned fabric_wanted(void)
{
    const char *text = getenv("EPD_TEST_NODES");
    const int n = text ? atoi(text) : 1;
    if (n < 1 || n > FABRIC_PROCESS_MAX_NODES) {
        fprintf(stderr, "EPD_TEST_NODES is 1 to %d\n", FABRIC_PROCESS_MAX_NODES);
        exit(EXIT_FAILURE);
    }
    return (unsigned)n;
}

/* ---- network namespaces: one for each node, and one with the bridge between them ---- */

__attribute__((format(printf, 1, 2))) static int shell(const char *format, ...)
{
    char command[512];
    va_list args;
    va_start(args, format);
    vsnprintf(command, sizeof(command), format, args);
    va_end(args);
    return system(command);
}

/* The process that opened them, whose children make them. */
static int namespaces_id;

int fabric_namespaces_open(void)
{
    const int id = (int)getpid();
    const int made = geteuid() == 0 && shell("ip netns add epdt%d-try 2>/dev/null && "
                                             "ip -n epdt%d-try link add epdtry type bridge 2>/dev/null",
                                             id, id) == 0;
    (void)shell("ip netns del epdt%d-try 2>/dev/null", id);
    if (made)
        namespaces_id = id;
    return made;
}

void fabric_namespaces_close(void)
{
    (void)shell("ip netns list | grep -o '^epdt%d-[a-z0-9]*' | xargs -r -n 1 ip netns del", namespaces_id);
}

static void make_namespaces(const struct fabric_process *fabric)
{
    const int id = namespaces_id;
    int failed = shell("ip netns add epdt%d-hub && ip -n epdt%d-hub link add br0 type bridge && "
                       "ip -n epdt%d-hub link set br0 up",
                       id, id, id);
    for (unsigned i = 0; i < fabric->n_nodes; i++)
        failed |= shell("ip netns add epdt%d-n%u && "
                        "ip -n epdt%d-hub link add v%u type veth peer name eth0 netns epdt%d-n%u && "
                        "ip -n epdt%d-hub link set v%u master br0 up && "
                        "ip -n epdt%d-n%u addr add 10.77.0.%u/24 dev eth0 && "
                        "ip -n epdt%d-n%u link set eth0 up && ip -n epdt%d-n%u link set lo up",
                        id, i, id, i, id, i, id, i, id, i, i + 1, id, i, id, i);
    if (failed)
        die(fabric, "network namespaces cannot be made");
}

static void drop_namespaces(const struct fabric_process *fabric)
{
    for (unsigned i = 0; i < fabric->n_nodes; i++)
        (void)shell("ip netns del epdt%d-n%u", namespaces_id, i);
    (void)shell("ip netns del epdt%d-hub", namespaces_id);
}

void fabric_cut(const struct fabric_process *fabric, unsigned node, int cut)
{
    if (shell("ip -n epdt%d-hub link set v%u %s", namespaces_id, node, cut ? "down" : "up"))
        die(fabric, "the link cannot be set");
}

/* What is started between the two lives in the node's namespace. */
static int enter_namespace(const struct fabric_process *fabric, unsigned node)
{
    char path[96];
    const int home = open("/proc/self/ns/net", O_RDONLY | O_CLOEXEC);
    snprintf(path, sizeof(path), "/run/netns/epdt%d-n%u", namespaces_id, node);
    const int there = open(path, O_RDONLY | O_CLOEXEC);
    if (home < 0 || there < 0 || setns(there, CLONE_NEWNET) != 0)
        die(fabric, "the namespace cannot be entered");
    close(there);
    return home;
}

/* ---- nodes ---- */

/* 1 if this process has now the name of the port, in the abstract namespace of Unix sockets; kept until it ends. */
static int reserve(unsigned port)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    const int length = snprintf(address.sun_path + 1, sizeof(address.sun_path) - 1, "epd-test-port-%u", port);
    const int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (bind(fd, (struct sockaddr *)&address,
             (socklen_t)(offsetof(struct sockaddr_un, sun_path) + 1 + (size_t)length)) == 0)
        return 1;
    close(fd);
    return 0;
}

static int is_free(unsigned port)
{
    const struct sockaddr_in address = {
        .sin_family = AF_INET, .sin_port = htons((uint16_t)port), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    const int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    const int free = bind(fd, (const struct sockaddr *)&address, sizeof(address)) == 0;
    close(fd);
    return free;
}

/* Below the ports that the system hands out by itself: a connection of any program could take one of those while the
 * worker that listens there restarts. */
static unsigned free_port(void)
{
    enum { FIRST = 12000, COUNT = 16000 };
    for (unsigned i = 0; i < COUNT; i++) {
        const unsigned port = FIRST + ((unsigned)getpid() + i) % COUNT;
        if (reserve(port) && is_free(port))
            return port;
    }
    abort();
}

static void choose_group_nodes(struct fabric_process *fabric)
{
    const char *text = getenv("EPD_TEST_GROUP_NODES");
    for (unsigned i = 0; !text && i < fabric->n_nodes; i++)
        fabric->group_nodes[fabric->n_group_nodes++] = i;
    for (; text && *text; text += *text == ',') {
        char *end;
        const unsigned long node = strtoul(text, &end, 10);
        if (end == text || node >= fabric->n_nodes || fabric->n_group_nodes == FABRIC_PROCESS_MAX_NODES)
            die(fabric, "EPD_TEST_GROUP_NODES has numbers of nodes, with commas between them");
        fabric->group_nodes[fabric->n_group_nodes++] = (unsigned)node;
        text = end;
    }
}

void fabric_prepare(struct fabric_process *fabric, unsigned n_nodes, unsigned n_devices, int in_namespaces)
{
    *fabric =
        (struct fabric_process){.n_nodes = n_nodes, .n_devices = n_devices, .in_namespaces = in_namespaces};
    choose_group_nodes(fabric);
    snprintf(fabric->directory, sizeof(fabric->directory), "/tmp/epd-fabric-XXXXXX");
    if (!mkdtemp(fabric->directory))
        abort();
    snprintf(fabric->secret_path, sizeof(fabric->secret_path), "%s/secret", fabric->directory);
    const int fd = open(fabric->secret_path, O_WRONLY | O_CREAT, 0600);
    dprintf(fd, "a secret of this test, %ld\n", (long)getpid());
    close(fd);
    snprintf(fabric->rendezvous, sizeof(fabric->rendezvous), "%s:%u",
             in_namespaces ? "10.77.0.1" : "127.0.0.1", free_port());
    if (in_namespaces)
        make_namespaces(fabric);
}

void fabric_start_node(struct fabric_process *fabric, unsigned node, const char *secret_path,
                       const char *const *extra)
{
    char nodes[8], rank[8];
    const char *arguments[32] = {"--nodes",       nodes,
                                 "--node-rank",   rank,
                                 "--rendezvous",  fabric->rendezvous,
                                 "--secret-file", secret_path ? secret_path : fabric->secret_path};
    int n = fabric->n_nodes > 1 ? 8 : 0;
    snprintf(nodes, sizeof(nodes), "%u", fabric->n_nodes);
    snprintf(rank, sizeof(rank), "%u", node);
    for (int i = 0; extra && extra[i] && n < 31; i++)
        arguments[n++] = extra[i];
    arguments[n] = NULL;
    const int home = fabric->in_namespaces ? enter_namespace(fabric, node) : -1;
    daemon_start(&fabric->nodes[node], fabric->n_devices, arguments);
    if (home >= 0 && setns(home, CLONE_NEWNET) != 0)
        abort();
    if (home >= 0)
        close(home);
}

void fabric_wait_complete(const struct fabric_process *fabric, unsigned n_times)
{
    if (fabric->n_nodes == 1)
        return;
    for (unsigned i = 0; i < fabric->n_nodes; i++)
        for (int waited = 0; fabric_log_count(fabric, i, "fabric complete") < n_times; waited += 5) {
            if (waited > COMPLETE_DEADLINE_MS)
                die(fabric, "is not complete");
            sleep_ms(5);
        }
}

static void start_all(struct fabric_process *fabric, const char *const *extra)
{
    for (unsigned i = 0; i < fabric->n_nodes; i++)
        fabric_start_node(fabric, i, NULL, extra);
    fabric_wait_complete(fabric, 1);
}

void fabric_start(struct fabric_process *fabric, unsigned n_nodes, unsigned n_devices,
                  const char *const *extra)
{
    fabric_prepare(fabric, n_nodes, n_devices, 0);
    start_all(fabric, extra);
}

void fabric_start_in_namespaces(struct fabric_process *fabric, unsigned n_nodes, unsigned n_devices,
                                const char *const *extra)
{
    fabric_prepare(fabric, n_nodes, n_devices, 1);
    start_all(fabric, extra);
}

void fabric_stop(struct fabric_process *fabric)
{
    for (unsigned i = 0; i < fabric->n_nodes; i++)
        if (fabric->nodes[i].pid)
            daemon_stop(&fabric->nodes[i]);
    if (fabric->in_namespaces)
        drop_namespaces(fabric);
    unlink(fabric->secret_path);
    rmdir(fabric->directory);
}

void fabric_kill_node(struct fabric_process *fabric, unsigned node)
{
    struct daemon_process *daemon = &fabric->nodes[node];
    const pid_t worker = daemon_worker(daemon);
    kill(daemon->pid, SIGKILL);
    if (worker > 0)
        kill(worker, SIGKILL);
    waitpid(daemon->pid, NULL, 0);
    daemon->pid = 0;
    (void)shell("rm -rf %s", daemon->directory);
}

/* ---- logs, ranks ---- */

unsigned fabric_log_count(const struct fabric_process *fabric, unsigned node, const char *text)
{
    char line[1024];
    unsigned n = 0;
    FILE *log = fopen(fabric->nodes[node].log_path, "r");
    while (log && fgets(line, sizeof(line), log))
        n += strstr(line, text) != NULL;
    if (log)
        fclose(log);
    return n;
}

void fabric_print_logs(const struct fabric_process *fabric)
{
    for (unsigned i = 0; i < fabric->n_nodes; i++) {
        fprintf(stderr, "---- node %u\n", i);
        daemon_print_log(&fabric->nodes[i]);
    }
}

void fabric_ranks_start(const struct fabric_process *fabric, struct rank_team *team, const char *group,
                        unsigned world_size, rank_function function, const void *arg)
{
    const unsigned n = fabric->n_group_nodes;
    fabric_ranks_start_on(fabric, team, fabric->group_nodes, world_size % n ? 1 : n, group, world_size,
                          function, arg);
}

void fabric_ranks_start_on(const struct fabric_process *fabric, struct rank_team *team, const unsigned *nodes,
                           unsigned n_nodes, const char *group, unsigned world_size, rank_function function,
                           const void *arg)
{
    const char *paths[FABRIC_PROCESS_MAX_NODES];
    for (unsigned i = 0; i < n_nodes; i++)
        paths[i] = fabric->nodes[nodes[i]].socket_path;
    ranks_start_on(team, paths, n_nodes, group, world_size, function, arg);
}

unsigned fabric_run(const struct fabric_process *fabric, const char *group, unsigned world_size,
                    rank_function function, const void *arg)
{
    struct rank_team team;
    fabric_ranks_start(fabric, &team, group, world_size, function, arg);
    const unsigned n_failed = ranks_wait(&team, RANKS_DEADLINE_S);
    if (n_failed)
        fabric_print_logs(fabric);
    return n_failed;
}
