/* Several daemons on one machine as the nodes of a fabric, on the host backend: on the loopback, or each in a network
 * namespace of its own where that can be had (root). Owned by the test; one thread. */
#ifndef EPD_TESTS_INTEGRATION_FABRIC_PROCESS_H
#define EPD_TESTS_INTEGRATION_FABRIC_PROCESS_H

#include "tests/integration/daemon_process.h"
#include "tests/integration/rank_process.h"

#define FABRIC_PROCESS_MAX_NODES 8

struct fabric_process {
    unsigned n_nodes, n_devices;
    /* Of fabric_run and fabric_ranks_start, in the order of their ranks: $EPD_TEST_GROUP_NODES ("2,0"), or all. */
    unsigned n_group_nodes, group_nodes[FABRIC_PROCESS_MAX_NODES];
    int in_namespaces;
    char directory[64], secret_path[96], rendezvous[64];
    struct daemon_process nodes[FABRIC_PROCESS_MAX_NODES];
};

/* EPD_TEST_NODES, or 1: a daemon by itself. */
unsigned fabric_wanted(void);
/* 1 if this process may make network namespaces; it and its children can from now on. Before any fabric in them; closing
 * removes what a child that ended early has left. */
int fabric_namespaces_open(void);
void fabric_namespaces_close(void);

/* Starts all nodes and waits until the fabric is complete. extra: arguments of every node. */
void fabric_start(struct fabric_process *fabric, unsigned n_nodes, unsigned n_devices,
                  const char *const *extra);
void fabric_start_in_namespaces(struct fabric_process *fabric, unsigned n_nodes, unsigned n_devices,
                                const char *const *extra);
/* Everything but the nodes; and one of them. secret_path NULL: that of the fabric. */
void fabric_prepare(struct fabric_process *fabric, unsigned n_nodes, unsigned n_devices, int in_namespaces);
void fabric_start_node(struct fabric_process *fabric, unsigned node, const char *secret_path,
                       const char *const *extra);
/* Waits until every node's log says n times that the fabric is complete. */
void fabric_wait_complete(const struct fabric_process *fabric, unsigned n_times);
/* Ends those nodes that run, checks that they exit with 0, removes everything. */
void fabric_stop(struct fabric_process *fabric);
/* SIGKILL to supervisor and worker of a node; it can be started again. */
void fabric_kill_node(struct fabric_process *fabric, unsigned node);
/* Cuts a node's network, or joins it again. Namespaces only. */
void fabric_cut(const struct fabric_process *fabric, unsigned node, int cut);

/* Lines of a node's log that hold the text. */
unsigned fabric_log_count(const struct fabric_process *fabric, unsigned node, const char *text);
void fabric_print_logs(const struct fabric_process *fabric);
/* Ranks on the nodes of groups, if they divide by them, else on the first; how many failed (logs are printed then). */
unsigned fabric_run(const struct fabric_process *fabric, const char *group, unsigned world_size,
                    rank_function function, const void *arg);
void fabric_ranks_start(const struct fabric_process *fabric, struct rank_team *team, const char *group,
                        unsigned world_size, rank_function function, const void *arg);
/* Ranks on these nodes in this order, as many on each. */
void fabric_ranks_start_on(const struct fabric_process *fabric, struct rank_team *team, const unsigned *nodes,
                           unsigned n_nodes, const char *group, unsigned world_size, rank_function function,
                           const void *arg);

#endif
