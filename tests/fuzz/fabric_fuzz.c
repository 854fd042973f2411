/* Whatever comes over the network: a link (daemon/fabric_link.h) opens only for who knows the secret, passes on only
 * frames that were marked, and no message, honest nodes' own included, makes the decoder (proto/fabric.h) or the
 * coordinator (daemon/fabric_coordinator.h) crash, read past its end or leave something behind.
 *
 * The first byte picks the way, the rest is parts (tests/fuzz/fabric_parts.h):
 *   messages   each part is a message of the node that `how` names, to the coordinator
 *   stranger   all parts are bytes on a connection
 *   impostor   the first part changes the hello, the second the proof; then bytes
 *   member     an honest authentication; then each part is a frame, rightly marked, wrongly marked or raw */
#include <arpa/inet.h>
#include <assert.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "daemon/fabric.h"
#include "daemon/fabric_coordinator.h"
#include "daemon/fabric_link.h"
#include "daemon/worker.h"
#include "tests/fuzz/fabric_parts.h"

#define N_NODES   3
#define MAX_PARTS 256
#define MAX_TURNS 1000000 /* of the loop without what must come */

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes);
int LLVMFuzzerInitialize(int *argc, char ***argv);

static const uint8_t key[FABRIC_KEY_BYTES] = {1, 2, 3};

/* libFuzzer hands nothing through from its initialisation to its inputs. */
static struct {
    uv_loop_t loop;
    uv_tcp_t server;
    struct sockaddr_in address;
    struct fabric_link_owner owner;
    struct arena arena;
} host;

/* One connection: what its other end knows, and what the link has said. */
static struct {
    struct fabric_link *link;
    int fd, opened, ended;
    uint64_t n_frames; /* sent in order, marked or not */
    struct fabric_part marked[MAX_PARTS];
    unsigned n_marked, n_passed;
} line;

/* ---- messages ---- */

static int same_addresses(const struct fabric_message *a, const struct fabric_message *b)
{
    int same = a->n_addresses == b->n_addresses;
    for (uint32_t i = 0; same && i < a->n_addresses; i++)
        same = a->addresses[i].bytes == b->addresses[i].bytes &&
               memcmp(a->addresses[i].data, b->addresses[i].data, a->addresses[i].bytes) == 0;
    return same;
}

static int same(const struct fabric_message *a, const struct fabric_message *b)
{
    return a->kind == b->kind && a->epoch == b->epoch && a->group == b->group && a->number == b->number &&
           a->node == b->node && a->rank == b->rank && a->error.status == b->error.status &&
           (!a->error.status || strcmp(a->error.text, b->error.text) == 0) && a->op == b->op &&
           a->hash == b->hash && a->present == b->present && a->time_ns == b->time_ns &&
           strcmp(a->name, b->name) == 0 && a->uid == b->uid && a->world_size == b->world_size &&
           a->n_config == b->n_config &&
           memcmp(a->config, b->config, a->n_config * sizeof(*a->config)) == 0 && a->block == b->block &&
           a->n_nodes == b->n_nodes && memcmp(a->nodes, b->nodes, a->n_nodes * sizeof(*a->nodes)) == 0 &&
           same_addresses(a, b);
}

/* 0: refused, and said why. What is taken can be sent on as it came. */
static int decode(const struct fabric_part *part, struct fabric_message *message)
{
    static uint8_t encoded[FABRIC_MAX_MESSAGE_BYTES];
    struct fabric_message again;
    struct epd_error error = {0};
    struct arena arena;
    size_t bytes;
    const enum epd_status status = fabric_decode(part->data, part->bytes, &host.arena, message, &error);
    assert(status == EPD_OK || (status == EPD_PROTOCOL && error.text[0]));
    if (status != EPD_OK)
        return 0;
    assert(fabric_encode(message, encoded, &bytes, &error) == EPD_OK);
    assert(arena_init(&arena, FABRIC_MAX_ARENA_BYTES) == EPD_OK);
    assert(fabric_decode(encoded, bytes, &arena, &again, &error) == EPD_OK);
    assert(same(message, &again));
    arena_fini(&arena);
    return 1;
}

/* ---- the coordinator ---- */

/* The groups that it has opened: their ids follow the clock, a script calls them 1, 2, ... */
static uint64_t groups[MAX_PARTS];
static size_t n_groups;

/* This stands in for daemon/fabric.c, which is not linked. Everything that is told must be able to travel. */
void fabric_tell(struct fabric *fabric, uint32_t node, const struct fabric_message *message)
{
    static uint8_t encoded[FABRIC_MAX_MESSAGE_BYTES];
    struct epd_error error = {0};
    size_t bytes;
    assert(node < fabric->config.n_nodes);
    assert(fabric_encode(message, encoded, &bytes, &error) == EPD_OK);
    const int first =
        n_groups == 0 || groups[n_groups - 1] != message->group; /* of the nodes that are told */
    if (message->kind == FABRIC_OPEN && message->group && first && n_groups < MAX_PARTS)
        groups[n_groups++] = message->group;
}

static void run_messages(struct fabric_script *script)
{
    struct fabric *fabric = calloc(1, sizeof(*fabric));
    struct worker *worker = calloc(1, sizeof(*worker));
    struct fabric_message message;
    struct fabric_part part;
    struct epd_error error = {0}, why;
    config_init(&worker->config);
    fabric->worker = worker;
    fabric->config.n_nodes = N_NODES;
    struct coordinator *coordinator = coordinator_create(fabric);
    (void)error_set(&why, EPD_PEER_LOST, "the fuzzer has lost it");
    n_groups = 0;
    while (fabric_part_take(script, &part)) {
        const uint32_t node = part.how % N_NODES;
        if (part.how >= FABRIC_HOW_LATE)
            coordinator_check(coordinator, UINT64_MAX / 2);
        if (!decode(&part, &message))
            continue;
        if (message.kind != FABRIC_JOIN && message.group > 0 && message.group <= n_groups)
            message.group = groups[message.group - 1];
        if (coordinator_receive(coordinator, node, &message, &error) != EPD_OK)
            coordinator_lose(coordinator, node, &error); /* as its link ends */
    }
    coordinator_lose(coordinator, 1, &why);
    coordinator_check(coordinator, UINT64_MAX / 2);
    coordinator_destroy(coordinator);
    free(worker);
    free(fabric);
}

/* ---- the listening end ---- */

static int on_open(void *arg, struct fabric_link *link, uint32_t node, struct epd_error *error)
{
    (void)arg, (void)error;
    assert(link == line.link && node > 0 && node < N_NODES && !line.opened && !line.ended);
    line.opened = 1;
    return 1;
}

static void on_message(void *arg, struct fabric_link *link, const void *data, size_t bytes)
{
    struct fabric_message message;
    (void)arg;
    assert(link == line.link && line.opened && !line.ended && line.n_passed < line.n_marked);
    const struct fabric_part *want = &line.marked[line.n_passed++];
    assert(bytes == want->bytes && memcmp(data, want->data, bytes) == 0);
    if (!decode(&(struct fabric_part){.data = data, .bytes = bytes}, &message))
        fabric_link_close(link, &(struct epd_error){.status = EPD_PROTOCOL});
}

static void on_end(void *arg, struct fabric_link *link, const struct epd_error *why)
{
    (void)arg;
    assert(link == line.link && !line.ended && why->status != EPD_OK);
    line.ended = 1;
}

static void on_connection(uv_stream_t *server, int status)
{
    struct epd_error error = {0};
    assert(status == 0 && !line.link);
    assert(fabric_link_accept(&host.owner, server, &line.link, &error) == EPD_OK);
}

int LLVMFuzzerInitialize(int *argc, char ***argv)
{
    struct epd_error error = {0};
    int length = sizeof(host.address);
    (void)argc, (void)argv;
    assert(fabric_auth_available(&error));
    assert(arena_init(&host.arena, FABRIC_MAX_ARENA_BYTES) == EPD_OK);
    assert(uv_loop_init(&host.loop) == 0 && uv_tcp_init(&host.loop, &host.server) == 0);
    assert(uv_ip4_addr("127.0.0.1", 0, &host.address) == 0);
    assert(uv_tcp_bind(&host.server, (const struct sockaddr *)&host.address, 0) == 0);
    assert(uv_tcp_getsockname(&host.server, (struct sockaddr *)&host.address, &length) == 0);
    assert(uv_listen((uv_stream_t *)&host.server, 4, on_connection) == 0);
    host.owner = (struct fabric_link_owner){.loop = &host.loop,
                                            .key = key,
                                            .n_nodes = N_NODES,
                                            .on_open = on_open,
                                            .on_message = on_message,
                                            .on_end = on_end};
    return 0;
}

/* ---- the connecting end ---- */

static void turn(void)
{
    (void)uv_run(&host.loop, UV_RUN_NOWAIT);
}

static void turn_until(const int *happened)
{
    for (int turns = 0; !*happened; turns++) {
        assert(turns < MAX_TURNS);
        turn();
    }
}

static void connect_line(void)
{
    const struct linger reset = {.l_onoff = 1}; /* no port is left waiting */
    memset(&line, 0, sizeof(line));
    line.fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    assert(line.fd >= 0 && setsockopt(line.fd, SOL_SOCKET, SO_LINGER, &reset, sizeof(reset)) == 0);
    assert(connect(line.fd, (const struct sockaddr *)&host.address, sizeof(host.address)) == 0);
    for (int turns = 0; !line.link; turns++) {
        assert(turns < MAX_TURNS);
        turn();
    }
}

static void put(const void *data, size_t bytes)
{
    for (size_t done = 0; done < bytes && !line.ended; turn()) {
        const ssize_t n = send(line.fd, (const char *)data + done, bytes - done, MSG_NOSIGNAL | MSG_DONTWAIT);
        if (n < 0 && errno != EAGAIN)
            return; /* the link has ended, or is about to */
        done += n > 0 ? (size_t)n : 0;
    }
}

/* 0 if the link ended instead. */
static int get(void *data, size_t bytes)
{
    for (size_t got = 0, turns = 0; got < bytes; turns++) {
        assert(turns < MAX_TURNS);
        turn();
        const ssize_t n = recv(line.fd, (char *)data + got, bytes - got, MSG_DONTWAIT);
        if (n == 0 || (n < 0 && errno != EAGAIN))
            return 0;
        got += n > 0 ? (size_t)n : 0;
    }
    return 1;
}

/* 1 if a byte was changed. */
static int change(void *data, size_t bytes, const struct fabric_part *by)
{
    int changed = 0;
    for (size_t i = 0; i < bytes && i < by->bytes; i++) {
        ((uint8_t *)data)[i] ^= by->data[i];
        changed |= by->data[i] != 0;
    }
    return changed;
}

/* Shows the secret, but for what the parts change. 1 and the keys if the link has opened. */
static int prove(const struct fabric_part *to_hello, const struct fabric_part *to_proof,
                 struct fabric_keys *keys)
{
    struct {
        struct fabric_hello hello;
        uint8_t mac[FABRIC_MAC_BYTES];
    } theirs;
    struct fabric_hello mine;
    uint8_t mac[FABRIC_MAC_BYTES];
    fabric_auth_hello(&mine, 1, N_NODES);
    (void)change(&mine, sizeof(mine), to_hello);
    put(&mine, sizeof(mine));
    if (!get(&theirs, sizeof(theirs)))
        return 0;
    assert(fabric_auth_check(key, FABRIC_LISTENER, &mine, &theirs.hello, theirs.mac));
    fabric_auth_prove(key, FABRIC_CONNECTOR, &mine, &theirs.hello, mac);
    const int forged = change(mac, sizeof(mac), to_proof);
    put(mac, sizeof(mac));
    for (int turns = 0; !line.opened && !line.ended; turns++) {
        assert(turns < MAX_TURNS);
        turn();
    }
    assert(line.opened == !forged);
    fabric_auth_derive(key, FABRIC_CONNECTOR, &mine, &theirs.hello, keys);
    return line.opened;
}

static void put_frame(const struct fabric_part *part, const struct fabric_keys *keys, int marked)
{
    uint8_t mac[FABRIC_MAC_BYTES];
    const uint8_t head[] = {(uint8_t)part->bytes, (uint8_t)(part->bytes >> 8), 0, 0};
    if (marked)
        line.marked[line.n_marked++] = *part;
    fabric_auth_mark(keys->send, line.n_frames++ + !marked, part->data, part->bytes, mac);
    put(head, sizeof(head));
    put(part->data, part->bytes);
    put(mac, sizeof(mac));
}

static void run_line(enum fabric_way way, struct fabric_script *script)
{
    static const struct fabric_part nothing;
    struct fabric_part part, proof;
    struct fabric_keys keys;
    int is_member = 0;
    connect_line();
    if (way == FABRIC_WAY_MEMBER)
        is_member = prove(&nothing, &nothing, &keys);
    else if (way == FABRIC_WAY_IMPOSTOR && fabric_part_take(script, &part))
        (void)prove(&part, fabric_part_take(script, &proof) ? &proof : &nothing, &keys);
    assert(is_member || way != FABRIC_WAY_MEMBER);
    int intact = is_member; /* raw bytes shift every frame that comes after them */
    for (int i = 0; i < MAX_PARTS && !line.ended && fabric_part_take(script, &part); i++) {
        if (!is_member || part.how % 4 == FABRIC_FRAME_RAW) {
            put(part.data, part.bytes);
            intact &= part.bytes == 0;
        } else {
            intact &= part.how % 4 != FABRIC_FRAME_FORGED;
            put_frame(&part, &keys, intact);
        }
    }
    (void)shutdown(line.fd, SHUT_WR);
    turn_until(&line.ended);
    assert(way != FABRIC_WAY_STRANGER || !line.opened);
    turn(); /* libuv lets go of its handles */
    turn();
    (void)close(line.fd);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
    if (bytes < 1)
        return 0;
    struct fabric_script script = {data + 1, bytes - 1};
    const enum fabric_way way = (enum fabric_way)(data[0] % FABRIC_WAY_COUNT);
    if (way == FABRIC_WAY_MESSAGES)
        run_messages(&script);
    else
        run_line(way, &script);
    return 0;
}
