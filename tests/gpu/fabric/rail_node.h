/* One node of a rail, as a process of its own: what the tests of rails start two of. They find each other through a
 * socket pair that they inherit; NCCL takes them for two hosts (NCCL_HOSTID). */
#ifndef EPD_TESTS_GPU_FABRIC_RAIL_NODE_H
#define EPD_TESTS_GPU_FABRIC_RAIL_NODE_H

/* The rest of the process, in a role: "swaps", "connect", "speed", "abort", "kill", or, with node 0 alone, "alone" and "unused". Exits
 * 0, or says on stderr what was wrong and exits 1. Device: CUDA's number. */
_Noreturn void rail_node_run(const char *role, unsigned node, int device, int fd);

#endif
