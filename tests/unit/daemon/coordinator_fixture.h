/* A coordinator of three nodes without a network: a test speaks for the nodes and looks at what they are told. One thread, one
 * test at a time. */
#ifndef EPD_TESTS_UNIT_DAEMON_COORDINATOR_FIXTURE_H
#define EPD_TESTS_UNIT_DAEMON_COORDINATOR_FIXTURE_H

#include "daemon/fabric.h"
#include "daemon/fabric_coordinator.h"
#include "daemon/worker.h"

#define MAX_TOLD 4096

/* What nodes were told, in order. */
struct told {
    uint32_t node;
    struct fabric_message message;
};
extern struct told told[MAX_TOLD];
extern size_t n_told;

extern struct fabric *the_fabric;
extern struct worker *the_worker;
extern struct coordinator *the_coordinator;

/* Around every test. */
void fixture_open(void);
void fixture_close(void);

enum epd_status say(uint32_t node, const struct fabric_message *message);
/* One rank on each of n_nodes nodes. */
struct fabric_message join_of(uint32_t node, const char *name, uint32_t n_nodes, uint32_t block);
void say_join(uint32_t node, int64_t hidden);
void say_join_to(uint32_t node, const char *name, uint32_t n_nodes, uint32_t block);
enum epd_status say_step(uint32_t node, uint64_t group, uint64_t number, uint64_t key,
                         enum epd_status failed);
/* Opens a group of all nodes, or of two of them, `first` with the first block, and returns its id. */
uint64_t join_all(void);
uint64_t join_two(const char *name, uint32_t first, uint32_t second);
/* Groups that the coordinator keeps. */
uint64_t n_spanning(void);

#endif
