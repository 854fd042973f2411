/* Makes the seeds of fabric_fuzz: fabric_seed DIRECTORY. A group's whole life of three nodes as the coordinator hears it,
 * and the same messages as frames of a member, of a stranger and of one who does not know the secret. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "proto/fabric.h"
#include "tests/fuzz/fabric_parts.h"

#define N_NODES    3
#define MAX_SCRIPT 65536

struct seed {
    uint8_t data[MAX_SCRIPT];
    size_t bytes;
};

static void add(struct seed *seed, uint8_t how, const void *data, size_t bytes)
{
    uint8_t *to = seed->data + seed->bytes;
    if (seed->bytes + 3 + bytes > sizeof(seed->data))
        abort();
    to[0] = how, to[1] = (uint8_t)bytes, to[2] = (uint8_t)(bytes >> 8);
    memcpy(to + 3, data, bytes);
    seed->bytes += 3 + bytes;
}

static void say(struct seed *seed, uint8_t how, const struct fabric_message *message)
{
    static uint8_t data[FABRIC_MAX_MESSAGE_BYTES];
    struct epd_error error = {0};
    size_t bytes;
    if (fabric_encode(message, data, &bytes, &error) != EPD_OK)
        abort();
    add(seed, how, data, bytes);
}

static struct fabric_message of_group(enum fabric_kind kind, uint64_t group, uint64_t number)
{
    struct fabric_message message;
    fabric_message_init(&message, kind);
    message.group = group;
    message.number = number;
    return message;
}

/* `how`: NULL, the node. */
static void say_join(struct seed *seed, const uint8_t *how, const char *name, uint8_t node, uint32_t n_nodes,
                     uint32_t block)
{
    static const struct fabric_address addresses[2] = {{.bytes = 4, .data = "one"},
                                                       {.bytes = 4, .data = "two"}};
    struct fabric_message message = of_group(FABRIC_JOIN, 100u + node, 0);
    (void)snprintf(message.name, sizeof(message.name), "%s", name);
    message.world_size = 2 * n_nodes;
    message.n_config = 11;
    message.config[9] = 1000;
    message.config[10] = n_nodes;
    message.block = block;
    message.n_addresses = 2;
    message.addresses = addresses;
    say(seed, how ? *how : node, &message);
}

static void say_step(struct seed *seed, uint8_t node, uint64_t group, uint64_t number)
{
    struct fabric_message message = of_group(FABRIC_STEP, group, number);
    message.op = EPD_OP_MOE_FORWARD;
    message.hash = 1;
    say(seed, node, &message);
}

/* All nodes join, make a plan, take two steps; then one breaks the group. */
static void say_life(struct seed *seed, const uint8_t *how)
{
    struct fabric_message message;
    for (uint8_t node = 0; node < N_NODES; node++)
        say_join(seed, how, "layer", node, N_NODES, node);
    for (uint8_t node = 0; node < N_NODES; node++) {
        message = of_group(FABRIC_PLAN, 1, 1);
        message.op = EPD_OP_MOE_FORWARD;
        message.hash = 77;
        say(seed, how ? *how : node, &message);
    }
    for (uint64_t step = 1; step <= 2; step++)
        for (uint8_t node = 0; node < N_NODES; node++)
            say_step(seed, how ? *how : node, 1, step);
    message = of_group(FABRIC_BREAK, 1, 2);
    message.rank = 3;
    (void)error_set(&message.error, EPD_PEER_LOST, "rank 3 has left");
    say(seed, how ? *how : 1, &message);
}

/* Groups of two of the three nodes, which step in turn; a block that is taken, a name that is; then words of a node that is
 * not in the group, whose link ends for it. */
static void say_parts(struct seed *seed)
{
    say_join(seed, NULL, "a", 1, 2, 0);
    say_join(seed, NULL, "a", 0, 2, 1);
    say_join(seed, NULL, "b", 2, 2, 1);
    say_join(seed, NULL, "b", 1, 2, 0);
    for (uint64_t step = 1; step <= 2; step++) {
        say_step(seed, 1, 1, step);
        say_step(seed, 1, 2, step);
        say_step(seed, 2, 2, step);
        say_step(seed, 0, 1, step);
    }
    say_join(seed, NULL, "c", 0, 2, 0);
    say_join(seed, NULL, "c", 2, 2, 0);
    say_join(seed, NULL, "a", 2, 2, 0);
    say_join(seed, NULL, "d", 1, 2, 1);
    say_step(seed, 2, 1, 3);
    say_join(seed, NULL, "d", 2, 2, 2);
}

static void say_each(struct seed *seed)
{
    static const enum fabric_kind kinds[] = {FABRIC_PING, FABRIC_PONG,  FABRIC_HELLO, FABRIC_STATE,
                                             FABRIC_OPEN, FABRIC_READY, FABRIC_GO,    FABRIC_HEARD};
    for (size_t i = 0; i < sizeof(kinds) / sizeof(*kinds); i++) {
        struct fabric_message message = of_group(kinds[i], 1, FABRIC_PROTOCOL);
        message.time_ns = 123456789, message.present = 7, message.epoch = 2;
        say(seed, FABRIC_FRAME_MARKED, &message);
    }
}

static int save(const char *directory, const char *name, const struct seed *seed)
{
    char path[4096];
    snprintf(path, sizeof(path), "%s/%s", directory, name);
    FILE *file = fopen(path, "wb");
    if (!file || fwrite(seed->data, 1, seed->bytes, file) != seed->bytes || fclose(file) != 0) {
        fprintf(stderr, "fabric_seed: %s: %s\n", path, strerror(errno));
        return -1;
    }
    return 0;
}

static struct seed *begin(enum fabric_way way)
{
    static struct seed seed;
    seed.bytes = 1;
    seed.data[0] = (uint8_t)way;
    return &seed;
}

static int save_all(const char *directory)
{
    static const uint8_t marked = FABRIC_FRAME_MARKED, raw = FABRIC_FRAME_RAW, zeros[64], one[32] = {1};
    int failed = 0;
    struct seed *seed = begin(FABRIC_WAY_MESSAGES);
    say_life(seed, NULL);
    failed |= save(directory, "life", seed);
    seed = begin(FABRIC_WAY_MESSAGES);
    say_parts(seed);
    failed |= save(directory, "parts", seed);
    seed = begin(FABRIC_WAY_MEMBER);
    say_each(seed);
    say_life(seed, &marked);
    failed |= save(directory, "member", seed);
    say_life(seed, &raw);
    failed |= save(directory, "member_raw", seed);
    seed = begin(FABRIC_WAY_MEMBER);
    say_each(seed);
    add(seed, FABRIC_FRAME_FORGED, one, sizeof(one));
    failed |= save(directory, "member_forges", seed);
    seed = begin(FABRIC_WAY_STRANGER);
    add(seed, 0, "epdfab1", 8);
    add(seed, 0, zeros, sizeof(zeros));
    say_life(seed, &raw);
    failed |= save(directory, "stranger", seed);
    seed = begin(FABRIC_WAY_IMPOSTOR);
    add(seed, 0, zeros, sizeof(zeros));
    add(seed, 0, one, sizeof(one));
    failed |= save(directory, "impostor", seed);
    return failed;
}

int main(int argc, char **argv)
{
    if (argc != 2) {
        fprintf(stderr, "usage: fabric_seed DIRECTORY\n");
        return 2;
    }
    if (mkdir(argv[1], 0755) < 0 && errno != EEXIST) {
        fprintf(stderr, "fabric_seed: %s: %s\n", argv[1], strerror(errno));
        return 1;
    }
    return save_all(argv[1]) ? 1 : 0;
}
