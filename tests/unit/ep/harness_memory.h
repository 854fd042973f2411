/* What the harness does differently on each backend: where a client's memory is, and how a test that lives on
 * the host sees it. Linked in one form per test program. */
#ifndef EPD_TESTS_UNIT_EP_HARNESS_MEMORY_H
#define EPD_TESTS_UNIT_EP_HARNESS_MEMORY_H

#include "tests/unit/ep/harness.h"

/* Before the first test; 0 if the backend cannot run here, after saying why. */
int harness_memory_begin(void);
enum epd_backend_kind harness_memory_backend(void);
/* The devices of one of n_nodes nodes, where a test would like n. */
uint32_t harness_memory_devices(uint32_t n, uint32_t n_nodes);
/* Which they are, as node_config has it; NULL: any. Valid until the next call. */
const char *harness_memory_device_list(uint32_t node, uint32_t n_nodes);
/* Maps the client's memory, of the daemon (memfd -1) or its own, at client->base. */
void harness_memory_map(struct client *client, int memfd);
void harness_memory_unmap(struct client *client);
/* Makes what the test wrote at client->base visible to the device, and the other way round. */
void harness_memory_push(struct client *client);
void harness_memory_pull(struct client *client);
/* How far a combine of terms in [-1, 1) may be off. */
struct tolerance harness_combine_tolerance(enum epd_dtype dtype, uint32_t top_k, uint32_t world_size);

#endif
