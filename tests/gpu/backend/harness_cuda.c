/* CUDA backend: the test works on a copy of the client's memory in host memory, which goes to the device
 * before a launch and comes back after it. */
#include <cuda_runtime_api.h>
#include <stdio.h>
#include <stdlib.h>

#include "ep/memory_impl.h"
#include "tests/gpu/backend/cases.h"
#include "tests/unit/ep/harness_memory.h"

static int n_gpus(void)
{
    int n = 0;
    return cudaGetDeviceCount(&n) == cudaSuccess ? n : 0;
}

int harness_memory_begin(void)
{
    struct epd_error reason = {.status = EPD_OK};
    if (!node_backend_available(EPD_BACKEND_CUDA, &reason)) {
        printf("SKIP: %s\n", reason.text);
        return 0;
    }
    const char *nodes = getenv("EPD_TEST_NODES");
    if (nodes && n_gpus() < atoi(nodes)) {
        printf("SKIP: %d GPUs, want one for each of %s nodes: those of one process are one host to NCCL, "
               "which has no "
               "GPU twice then\n",
               n_gpus(), nodes);
        return 0;
    }
    printf("%d GPUs\n", n_gpus());
    cuda_cases_make();
    return 1;
}

enum epd_backend_kind harness_memory_backend(void)
{
    return EPD_BACKEND_CUDA;
}

/* No two nodes share a GPU: NCCL has none twice in a rail. */
uint32_t harness_memory_devices(uint32_t n, uint32_t n_nodes)
{
    const uint32_t n_there = (uint32_t)n_gpus() / n_nodes;
    return n < n_there ? n : n_there;
}

const char *harness_memory_device_list(uint32_t node, uint32_t n_nodes)
{
    static char list[64];
    const uint32_t n_there = (uint32_t)n_gpus() / n_nodes;
    size_t used = 0;
    if (n_nodes == 1)
        return NULL;
    for (uint32_t i = 0; i < n_there; i++)
        used += (size_t)snprintf(list + used, sizeof list - used, "%s%u", i ? "," : "", node * n_there + i);
    return list;
}

void harness_memory_map(struct client *client, int memfd)
{
    ck_assert_int_lt(memfd, 0);
    client->base = calloc(client->bytes, 1);
    ck_assert_ptr_nonnull(client->base);
    client->device = memory_data(client->memory);
}

void harness_memory_unmap(struct client *client)
{
    free(client->base);
}

/* cudaMemcpy returns when it has read pageable memory: what it writes may still be on its way, and no queue waits for it. */
/* Another node's memory is mapped on its own GPUs alone. */
static void copy(const struct client *client, void *to, const void *from)
{
    struct cudaPointerAttributes attributes;
    cudaError_t result = cudaPointerGetAttributes(&attributes, client->device);
    if (result == cudaSuccess)
        result = cudaSetDevice(attributes.device);
    if (result == cudaSuccess)
        result = cudaMemcpy(to, from, client->used, cudaMemcpyDefault);
    if (result == cudaSuccess) /* from pageable memory it may be on its way */
        result = cudaStreamSynchronize(cudaStreamLegacy);
    ck_assert_msg(result == cudaSuccess, "%s", cudaGetErrorString(result));
}

void harness_memory_push(struct client *client)
{
    copy(client, client->device, client->base);
}

void harness_memory_pull(struct client *client)
{
    copy(client, client->base, client->device);
}

/* Each rank that holds slots of a token rounds its partial sum once, to the dtype, and so does each node of several. */
struct tolerance harness_combine_tolerance(enum epd_dtype dtype, uint32_t top_k, uint32_t world_size)
{
    struct tolerance tolerance = tolerance_sum(dtype, top_k, 1.0);
    double unit = dtype == EPD_BF16 ? 1.0 / 256 : dtype == EPD_F16 ? 1.0 / 2048 : 0.0;
    if (world_size > 1)
        tolerance.atol += unit * top_k;
    if (world_size > 1 && getenv("EPD_TEST_NODES"))
        tolerance.atol += unit * top_k;
    return tolerance;
}
