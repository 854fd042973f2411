#include "daemon/fabric_config.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "proto/limits.h"

/* Copies [from, from + n) behind what is there; 0 if there is no room. */
static int append(char *host, size_t bytes, const char *from, size_t n)
{
    const size_t length = strlen(host);
    if (n >= bytes - length)
        return 0;
    memcpy(host + length, from, n);
    host[length + n] = 0;
    return 1;
}

/* The first entry of the list ends at the first comma outside brackets; of each bracket its first number counts. */
enum epd_status fabric_config_first_host(const char *list, char *host, size_t bytes, struct epd_error *error)
{
    char first[256] = "";
    const char *at = list;
    int whole = 1;
    while (whole && *at && *at != ',') {
        const size_t plain = strcspn(at, "[],");
        whole = at[plain] != ']' && append(first, sizeof(first), at, plain);
        at += plain;
        if (!whole || *at != '[')
            continue;
        const size_t number = strcspn(++at, "-,]["), rest = strcspn(at, "][");
        whole = number > 0 && at[rest] == ']' && append(first, sizeof(first), at, number);
        at += rest + (size_t)whole;
    }
    if (!whole || !first[0] || strlen(first) >= bytes)
        return error_set(error, EPD_INVALID_ARGUMENT, "fabric: SLURM_JOB_NODELIST %.120s: no first host",
                         list);
    memcpy(host, first, strlen(first) + 1);
    return EPD_OK;
}

enum epd_status fabric_config_split(const char *given, struct fabric_config *fabric, struct epd_error *error)
{
    const int bracketed = given[0] == '[';
    const char *host = given + bracketed;
    const char *colon = bracketed ? strchr(given, ']') : strrchr(given, ':');
    if (bracketed && colon)
        colon++;
    else if (colon && strchr(given, ':') != colon) /* an address of IPv6 by itself */
        colon = NULL;
    const size_t length = colon ? (size_t)(colon - host) - (size_t)bracketed : strlen(host);
    const char *port = colon && *colon ? colon + 1 : FABRIC_DEFAULT_PORT;
    if (!length || length >= sizeof(fabric->host) || (bracketed && (!colon || (*colon && *colon != ':'))) ||
        strspn(port, "0123456789") != strlen(port) || strlen(port) > 5 ||
        strtoul(port, NULL, 10) - 1 >= 65535)
        return error_set(error, EPD_INVALID_ARGUMENT,
                         "fabric rendezvous: %.120s, want host:port, [IPv6]:port or a host; port 1..65535",
                         given);
    (void)snprintf(fabric->host, sizeof(fabric->host), "%.*s", (int)length, host);
    (void)snprintf(fabric->port, sizeof(fabric->port), "%s", port);
    return EPD_OK;
}

static enum epd_status parse_number(const char *text, const char *name, uint32_t max, uint32_t *number,
                                    struct epd_error *error)
{
    char *end = NULL;
    errno = 0;
    const unsigned long value = strtoul(text, &end, 10);
    if (errno || end == text || *end || value > max)
        return error_set(error, EPD_INVALID_ARGUMENT, "fabric %s: %.60s, want 0..%u", name, text, max);
    *number = (uint32_t)value;
    return EPD_OK;
}

/* The first of the variables that is set. */
static const char *variable(const char *const *names, const char **name)
{
    for (; *names; names++) {
        const char *value = getenv(*names);
        if (value && *value) {
            *name = *names;
            return value;
        }
    }
    return NULL;
}

static const char *const nodes_variables[] = {"NNODES", "GROUP_WORLD_SIZE", "SLURM_NNODES",
                                              "SLURM_JOB_NUM_NODES", NULL};
static const char *const node_variables[] = {"GROUP_RANK", "NODE_RANK", "SLURM_NODEID", NULL};

static enum epd_status resolve_nodes(const struct config *config, struct fabric_config *fabric,
                                     struct epd_error *error)
{
    const char *name = "nodes", *value = variable(nodes_variables, &name);
    fabric->n_nodes = config->nodes ? (uint32_t)config->nodes : 1;
    /* A launcher's word alone makes no fabric: somebody must have made a secret for one. */
    if (config->nodes || !config->secret_file[0] || !value)
        return EPD_OK;
    if (parse_number(value, name, EPD_MAX_NODES, &fabric->n_nodes, error))
        return error->status;
    fabric->n_nodes = fabric->n_nodes ? fabric->n_nodes : 1;
    return EPD_OK;
}

static enum epd_status resolve_node(const struct config *config, struct fabric_config *fabric,
                                    struct epd_error *error)
{
    const char *name = "node_rank", *value = config->node_rank;
    if (!*value)
        value = variable(node_variables, &name);
    if (!value)
        return error_set(
            error, EPD_INVALID_ARGUMENT,
            "fabric node_rank: not given, and neither GROUP_RANK, NODE_RANK nor SLURM_NODEID is set");
    return parse_number(value, name, fabric->n_nodes - 1, &fabric->node, error);
}

static enum epd_status resolve_rendezvous(const struct config *config, struct fabric_config *fabric,
                                          struct epd_error *error)
{
    static const char *const names[] = {"MASTER_ADDR", NULL};
    const char *name, *master = variable(names, &name), *slurm = getenv("SLURM_JOB_NODELIST");
    char host[CONFIG_TEXT_BYTES];
    if (config->rendezvous[0])
        return fabric_config_split(config->rendezvous, fabric, error);
    if (master) /* MASTER_PORT is the launcher's own */
        return fabric_config_split(master, fabric, error);
    if (!slurm || !*slurm)
        return error_set(
            error, EPD_INVALID_ARGUMENT,
            "fabric rendezvous: not given, and neither MASTER_ADDR nor SLURM_JOB_NODELIST is set");
    if (fabric_config_first_host(slurm, host, sizeof(host), error))
        return error->status;
    return fabric_config_split(host, fabric, error);
}

enum epd_status fabric_config_resolve(const struct config *config, struct fabric_config *fabric,
                                      struct epd_error *error)
{
    *fabric = (struct fabric_config){.n_nodes = 1};
    if (resolve_nodes(config, fabric, error))
        return error->status;
    if (fabric->n_nodes == 1)
        return EPD_OK;
    if (!config->secret_file[0])
        return error_set(error, EPD_INVALID_ARGUMENT, "fabric secret_file: not given, and there are %u nodes",
                         fabric->n_nodes);
    if (resolve_node(config, fabric, error) || resolve_rendezvous(config, fabric, error))
        return error->status;
    (void)snprintf(fabric->rendezvous, sizeof(fabric->rendezvous),
                   strchr(fabric->host, ':') ? "[%s]:%s" : "%s:%s", fabric->host, fabric->port);
    return fabric_auth_read(config->secret_file, fabric->key, error);
}
