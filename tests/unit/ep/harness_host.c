/* Host backend: the memory is shared. */
#include <sys/mman.h>
#include <unistd.h>

#include "tests/unit/ep/harness_memory.h"

int harness_memory_begin(void)
{
    return 1;
}

enum epd_backend_kind harness_memory_backend(void)
{
    return EPD_BACKEND_HOST;
}

uint32_t harness_memory_devices(uint32_t n, uint32_t n_nodes)
{
    (void)n_nodes;
    return n;
}

const char *harness_memory_device_list(uint32_t node, uint32_t n_nodes)
{
    (void)node;
    (void)n_nodes;
    return NULL;
}

void harness_memory_map(struct client *client, int memfd)
{
    int fd = memfd >= 0 ? memfd : memory_fd(client->memory);
    client->base = mmap(NULL, client->bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    ck_assert(client->base != MAP_FAILED);
}

void harness_memory_unmap(struct client *client)
{
    munmap(client->base, client->bytes);
}

void harness_memory_push(struct client *client)
{
    (void)client;
}

void harness_memory_pull(struct client *client)
{
    (void)client;
}

struct tolerance harness_combine_tolerance(enum epd_dtype dtype, uint32_t top_k, uint32_t world_size)
{
    (void)world_size;
    return tolerance_sum(dtype, top_k, 1.0);
}
