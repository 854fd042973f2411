#include "tests/unit/daemon/coordinator_fixture.h"

#include <stdio.h>
#include <stdlib.h>

#include "daemon/group_fields.h"
#include "tests/unit/daemon/suite.h"

struct epd_error said_error;

struct told told[MAX_TOLD];
size_t n_told;

/* Stands in for daemon/fabric.c, which is not linked. */
void fabric_tell(struct fabric *fabric, uint32_t node, const struct fabric_message *message)
{
    (void)fabric;
    ck_assert_uint_lt(n_told, MAX_TOLD);
    told[n_told++] = (struct told){node, *message};
}

struct fabric *the_fabric;
struct worker *the_worker;
struct coordinator *the_coordinator;

void fixture_open(void)
{
    the_fabric = calloc(1, sizeof(*the_fabric));
    the_worker = calloc(1, sizeof(*the_worker));
    config_init(&the_worker->config);
    the_fabric->worker = the_worker;
    the_fabric->config.n_nodes = 3;
    the_coordinator = coordinator_create(the_fabric);
    n_told = 0;
}

void fixture_close(void)
{
    coordinator_destroy(the_coordinator);
    free(the_worker);
    free(the_fabric);
}

enum epd_status say(uint32_t node, const struct fabric_message *message)
{
    return coordinator_receive(the_coordinator, node, message, &said_error);
}

/* One rank on each of n_nodes nodes. */
struct fabric_message join_of(uint32_t node, const char *name, uint32_t n_nodes, uint32_t block)
{
    static struct fabric_address addresses[EPD_MAX_NODES];
    struct fabric_message message;
    fabric_message_init(&message, FABRIC_JOIN);
    (void)snprintf(message.name, sizeof(message.name), "%s", name);
    message.group = 100 + node;
    message.world_size = n_nodes;
    message.n_config = GROUP_N_FIELDS;
    message.config[2] = 64;
    message.config[GROUP_FIELD_TOKENS] = 33;
    message.config[GROUP_FIELD_NODES] = n_nodes;
    message.block = block;
    message.n_addresses = 1;
    addresses[node] = (struct fabric_address){.bytes = 1, .data = {(uint8_t)(100 + node)}};
    message.addresses = &addresses[node];
    return message;
}

void say_join(uint32_t node, int64_t hidden)
{
    struct fabric_message message = join_of(node, "g", 3, node);
    message.config[2] = hidden;
    ck_assert_int_eq(say(node, &message), EPD_OK);
}

void say_join_to(uint32_t node, const char *name, uint32_t n_nodes, uint32_t block)
{
    const struct fabric_message message = join_of(node, name, n_nodes, block);
    ck_assert_int_eq(say(node, &message), EPD_OK);
}

enum epd_status say_step(uint32_t node, uint64_t group, uint64_t number, uint64_t key, enum epd_status failed)
{
    struct fabric_message message;
    fabric_message_init(&message, FABRIC_STEP);
    message.group = group;
    message.number = number;
    message.hash = key;
    message.op = EPD_OP_BARRIER;
    if (failed) {
        (void)error_set(&message.error, failed, "of node %u", node);
        message.rank = (int32_t)node;
    }
    return say(node, &message);
}

uint64_t join_all(void)
{
    for (uint32_t node = 0; node < 3; node++)
        say_join(node, 64);
    ck_assert_uint_eq(n_told, 3);
    for (uint32_t i = 0; i < 3; i++) {
        ck_assert_int_eq(told[i].message.kind, FABRIC_OPEN);
        ck_assert_int_eq(told[i].message.error.status, EPD_OK);
        ck_assert_uint_eq(told[i].message.number, 100 + told[i].node);
        ck_assert_uint_eq(told[i].message.n_addresses, 3);
    }
    n_told = 0;
    return told[0].message.group;
}

/* Opens a group of two nodes, `first` with the first block, and returns its id. */
uint64_t join_two(const char *name, uint32_t first, uint32_t second)
{
    n_told = 0;
    say_join_to(second, name, 2, 1);
    ck_assert_uint_eq(n_told, 0);
    say_join_to(first, name, 2, 0);
    ck_assert_uint_eq(n_told, 2);
    for (uint32_t i = 0; i < 2; i++) {
        const struct fabric_message *open = &told[i].message;
        ck_assert_uint_eq(told[i].node, i ? second : first);
        ck_assert_int_eq(open->kind, FABRIC_OPEN);
        ck_assert_int_eq(open->error.status, EPD_OK);
        ck_assert_uint_eq(open->number, 100 + told[i].node);
        ck_assert_uint_eq(open->n_nodes, 2);
        ck_assert_uint_eq(open->nodes[0], first);
        ck_assert_uint_eq(open->nodes[1], second);
        ck_assert_uint_eq(open->n_addresses, 2);
        ck_assert_uint_eq(open->addresses[0].data[0], 100 + first);
        ck_assert_uint_eq(open->addresses[1].data[0], 100 + second);
    }
    n_told = 0;
    return told[0].message.group;
}

uint64_t n_spanning(void)
{
    uint64_t n_groups, n_plans;
    coordinator_count(the_coordinator, &n_groups, &n_plans);
    return n_groups;
}
