#include "ep/node_impl.h"

#include <assert.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const struct backend *const backends[] = {
    &backend_host,
#ifdef EPD_HAVE_CUDA
    &backend_cuda,
#endif
};

const struct backend *backend_find(enum epd_backend_kind kind)
{
    for (size_t i = 0; i < sizeof backends / sizeof *backends; i++)
        if (backends[i]->kind == kind)
            return backends[i];
    return NULL;
}

int node_backend_available(enum epd_backend_kind backend, struct epd_error *reason)
{
    const struct backend *found = backend_find(backend);
    if (!found) {
        error_set(reason, EPD_UNSUPPORTED, "backend %s: not in this build", backend_name(backend));
        return 0;
    }
    return found->available(reason);
}

enum epd_status node_open(const struct node_config *config, struct node **node, struct epd_error *error)
{
    if (!node_backend_available(config->backend, error))
        return error->status;
    struct node *opened = calloc(1, sizeof *opened);
    if (!opened)
        return error_set(error, EPD_NO_MEMORY, "node: %zu bytes", sizeof *opened);
    uint32_t n_devices;
    opened->backend = backend_find(config->backend);
    opened->comm_blocks = config->comm_blocks;
    opened->replays = config->graphs;
    opened->step_lost_ns = NODE_STEP_LOST_NS;
    if (opened->backend->n_devices(config, &n_devices, error))
        goto close_node;
    struct node_config counted = *config;
    counted.n_devices = n_devices;
    for (uint32_t i = 0; i < n_devices; i++) {
        if (lane_start(opened->backend, &counted, i, &opened->lanes[i], error))
            goto close_node;
        opened->n_devices++;
    }
    *node = opened;
    return EPD_OK;

close_node:
    node_close(opened);
    return error->status;
}

static int node_busy(const struct node *node)
{
    for (uint32_t i = 0; i < node->n_devices; i++)
        if (lane_n_jobs(node->lanes[i]))
            return 1;
    return 0;
}

void node_close(struct node *node)
{
    while (node_busy(node)) {
        if (node_poll(node))
            continue;
        for (uint32_t i = 0; i < node->n_devices; i++)
            if (lane_n_jobs(node->lanes[i])) {
                lane_wait(node->lanes[i]);
                break;
            }
    }
    for (uint32_t i = 0; i < node->n_devices; i++)
        lane_stop(node->lanes[i]);
    free(node);
}

uint32_t node_poll(struct node *node)
{
    uint32_t n = 0;
    for (uint32_t i = 0; i < node->n_devices; i++)
        n += lane_poll(node->lanes[i]);
    return n;
}

enum epd_backend_kind node_backend(const struct node *node)
{
    return node->backend->kind;
}

uint32_t node_n_devices(const struct node *node)
{
    return node->n_devices;
}

void node_device_info(const struct node *node, uint32_t device_idx, struct device_info *info)
{
    assert(device_idx < node->n_devices);
    lane_info(node->lanes[device_idx], info);
}

static void uuid_text(const uint8_t uuid[EPD_UUID_BYTES], char text[2 * EPD_UUID_BYTES + 1])
{
    for (int i = 0; i < EPD_UUID_BYTES; i++)
        snprintf(text + 2 * i, 3, "%02x", uuid[i]);
}

enum epd_status node_find_device(const struct node *node, const uint8_t uuid[EPD_UUID_BYTES],
                                 uint32_t *device_idx, struct epd_error *error)
{
    struct device_info info;
    char wanted[2 * EPD_UUID_BYTES + 1], known[EPD_ERROR_TEXT_BYTES] = "";
    size_t used = 0;
    for (uint32_t i = 0; i < node->n_devices; i++) {
        node_device_info(node, i, &info);
        if (memcmp(info.uuid, uuid, EPD_UUID_BYTES) == 0) {
            *device_idx = i;
            return EPD_OK;
        }
        if (used + 2 * EPD_UUID_BYTES + 2 < sizeof known) {
            known[used++] = ' ';
            uuid_text(info.uuid, known + used);
            used += 2 * EPD_UUID_BYTES;
        }
    }
    uuid_text(uuid, wanted);
    return error_set(error, EPD_INVALID_DEVICE, "device %s is not here; there are%s", wanted, known);
}
