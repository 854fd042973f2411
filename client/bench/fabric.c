#include "client/bench/fabric.h"

#include <arpa/inet.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <unistd.h>

#define SECRET_BYTES         32
#define FABRIC_DEVICES_BYTES 64

/* mkstemp's mode is what daemons ask of a secret. */
static enum epd_status make_secret(struct fabric *fabric)
{
    unsigned char secret[SECRET_BYTES];
    (void)snprintf(fabric->secret_path, sizeof(fabric->secret_path), "/tmp/epd-bench-secret-XXXXXX");
    const int fd = mkstemp(fabric->secret_path);
    const int made = fd >= 0 && getrandom(secret, sizeof(secret), 0) == (ssize_t)sizeof(secret) &&
                     write(fd, secret, sizeof(secret)) == (ssize_t)sizeof(secret);
    if (!made)
        fprintf(stderr, "epd-bench: %s: %s\n", fabric->secret_path, strerror(errno));
    if (fd >= 0)
        close(fd);
    else
        fabric->secret_path[0] = 0;
    return made ? EPD_OK : EPD_SYSTEM;
}

/* A port that nobody listens on: node 0 will. */
static enum epd_status choose_port(struct fabric *fabric)
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t length = sizeof(address);
    const int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    const int found = fd >= 0 && bind(fd, (struct sockaddr *)&address, length) == 0 &&
                      getsockname(fd, (struct sockaddr *)&address, &length) == 0;
    if (!found)
        fprintf(stderr, "epd-bench: no port for a fabric: %s\n", strerror(errno));
    if (fd >= 0)
        close(fd);
    (void)snprintf(fabric->rendezvous, sizeof(fabric->rendezvous), "127.0.0.1:%u", ntohs(address.sin_port));
    return found ? EPD_OK : EPD_SYSTEM;
}

/* The GPUs of the node, an even share of them in order; NULL: as the options say. */
static const char *devices_of(const struct daemon_options *options, uint32_t n_gpus,
                              char text[FABRIC_DEVICES_BYTES])
{
    const uint32_t n = n_gpus / options->n_nodes;
    size_t used = 0;
    if (options->n_nodes <= 1 || n_gpus == 0)
        return options->devices;
    for (uint32_t i = 0; i < n && used < FABRIC_DEVICES_BYTES; i++)
        used += (size_t)snprintf(text + used, FABRIC_DEVICES_BYTES - used, "%s%u", i ? "," : "",
                                 options->node * n + i);
    return text;
}

/* To NCCL each daemon is a host of its own, which the others reach over the loopback by sockets. */
static void name_host(const struct daemon_options *options)
{
    char host[16];
    if (options->n_nodes <= 1)
        return;
    (void)snprintf(host, sizeof(host), "node%u", options->node);
    (void)setenv("NCCL_HOSTID", host, 1);
    (void)setenv("NCCL_SOCKET_IFNAME", "lo", 0);
}

enum epd_status fabric_start(struct fabric *fabric, uint32_t n_nodes, uint32_t n_gpus,
                             const struct daemon_options *options)
{
    struct daemon_options node = *options;
    char devices[FABRIC_DEVICES_BYTES];
    enum epd_status status = EPD_OK;
    *fabric = (struct fabric){0};
    if (n_nodes > 1)
        status = make_secret(fabric);
    if (status == EPD_OK && n_nodes > 1)
        status = choose_port(fabric);
    node.n_nodes = n_nodes;
    node.secret_path = fabric->secret_path;
    node.rendezvous = fabric->rendezvous;
    while (status == EPD_OK && fabric->n_nodes < n_nodes) {
        node.node = fabric->n_nodes;
        node.devices = devices_of(&node, n_gpus, devices);
        name_host(&node);
        status = daemon_start(&fabric->nodes[fabric->n_nodes], &node);
        fabric->n_nodes += status == EPD_OK;
    }
    return status;
}

void fabric_stop(struct fabric *fabric)
{
    while (fabric->n_nodes > 0)
        daemon_stop(&fabric->nodes[--fabric->n_nodes]);
    if (fabric->secret_path[0])
        (void)unlink(fabric->secret_path);
    fabric->secret_path[0] = 0;
}

void fabric_print_logs(const struct fabric *fabric)
{
    for (uint32_t node = 0; node < fabric->n_nodes; node++)
        daemon_print_log(&fabric->nodes[node]);
}
