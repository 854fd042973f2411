#include "daemon/fabric_config.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "proto/limits.h"

enum epd_status fabric_config_first_host(const char *list, char *host, size_t bytes, struct epd_error *error)
{
    const size_t prefix = strcspn(list, "[,");
    size_t number = 0;
    if (list[prefix] == '[')
        number = strcspn(list + prefix + 1, "-,]");
    if (prefix + number == 0 || prefix + number >= bytes || (list[prefix] == '[' && number == 0))
        return error_set(error, EPD_INVALID_ARGUMENT, "fabric: SLURM_JOB_NODELIST %.120s: no first host",
                         list);
    memcpy(host, list, prefix);
    memcpy(host + prefix, list + prefix + 1, number);
    host[prefix + number] = 0;
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

static const char *const nodes_variables[] = {"NNODES", "SLURM_NNODES", "SLURM_JOB_NUM_NODES", NULL};
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
    const char *given = config->rendezvous, *slurm = getenv("SLURM_JOB_NODELIST");
    const char *colon = strrchr(given, ':');
    (void)snprintf(fabric->port, sizeof(fabric->port), "%s", FABRIC_DEFAULT_PORT);
    if (*given) {
        const size_t length = colon ? (size_t)(colon - given) : strlen(given);
        if (!length || (colon && (strlen(colon + 1) == 0 || strlen(colon + 1) > 5)))
            return error_set(error, EPD_INVALID_ARGUMENT, "fabric rendezvous: %.120s, want host:port", given);
        (void)snprintf(fabric->host, sizeof(fabric->host), "%.*s", (int)length, given);
        if (colon)
            (void)snprintf(fabric->port, sizeof(fabric->port), "%s", colon + 1);
        return EPD_OK;
    }
    if (getenv("MASTER_ADDR")) {
        (void)snprintf(fabric->host, sizeof(fabric->host), "%.200s", getenv("MASTER_ADDR"));
        return EPD_OK;
    }
    if (slurm)
        return fabric_config_first_host(slurm, fabric->host, sizeof(fabric->host), error);
    return error_set(error, EPD_INVALID_ARGUMENT,
                     "fabric rendezvous: not given, and neither MASTER_ADDR nor SLURM_JOB_NODELIST is set");
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
    return fabric_auth_read(config->secret_file, fabric->key, error);
}
