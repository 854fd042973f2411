#include "tests/gpu/fabric/node_daemons.h"

#include <arpa/inet.h>
#include <signal.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

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

static void make_secret(struct node_daemons *nodes)
{
    (void)snprintf(nodes->secret_path, sizeof nodes->secret_path, "/tmp/epd-secret-XXXXXX");
    const int fd = mkstemp(nodes->secret_path); /* mode 0600 */
    if (fd < 0 || dprintf(fd, "a secret of this test, %ld\n", (long)getpid()) < 0)
        abort();
    (void)close(fd);
    (void)snprintf(nodes->rendezvous, sizeof nodes->rendezvous, "127.0.0.1:%u", free_port());
}

void node_daemon_start(struct node_daemons *nodes, unsigned node)
{
    char host[16], number[8], n_nodes[8];
    (void)snprintf(host, sizeof host, "host%u", node);
    (void)snprintf(number, sizeof number, "%u", node);
    (void)snprintf(n_nodes, sizeof n_nodes, "%u", nodes->n);
    (void)setenv("NCCL_HOSTID", host, 1);
    const char *options[] = {"--devices",
                             nodes->devices[node],
                             "--nodes",
                             n_nodes,
                             "--node-rank",
                             number,
                             "--rendezvous",
                             nodes->rendezvous,
                             "--secret-file",
                             nodes->secret_path,
                             "--node-dead",
                             "2s",
                             NULL};
    process_daemon_start(&nodes->daemons[node], nodes->epd, options);
    (void)unsetenv("NCCL_HOSTID");
}

void node_daemons_start(struct node_daemons *nodes, const char *epd, unsigned n, const char *const *devices)
{
    *nodes = (struct node_daemons){.epd = epd, .n = n, .devices = devices};
    if (n == 1) {
        const char *options[] = {"--devices", devices[0], NULL};
        process_daemon_start(&nodes->daemons[0], epd, options);
        return;
    }
    make_secret(nodes);
    for (unsigned node = 0; node < n; node++)
        node_daemon_start(nodes, node);
}

int node_daemons_stop(struct node_daemons *nodes)
{
    int failed = 0;
    for (unsigned node = 0; node < nodes->n; node++)
        if (nodes->daemons[node].pid)
            failed |= process_daemon_stop(&nodes->daemons[node]);
    if (nodes->n > 1)
        (void)unlink(nodes->secret_path);
    return failed;
}

void node_daemon_kill(struct node_daemons *nodes, unsigned node)
{
    struct process_daemon *daemon = &nodes->daemons[node];
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

unsigned node_daemon_device(const struct node_daemons *nodes, unsigned node, unsigned i)
{
    unsigned list[8], n = 0;
    for (const char *at = nodes->devices[node]; at && n < 8; at = strchr(at, ',')) {
        at += *at == ',';
        list[n++] = (unsigned)atoi(at);
    }
    return list[i % n];
}
