#include "daemon/fabric.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "daemon/clock.h"
#include "daemon/fabric_coordinator.h"
#include "daemon/fabric_dial.h"
#include "daemon/fabric_nodes.h"
#include "daemon/group_span.h"
#include "daemon/number_set.h"
#include "daemon/worker.h"
#include "ep/transport.h"

/* A message of node 0 to itself: handed over by the loop, so that nobody is called by what he calls. */
struct letter {
    struct list in_fabric;
    int to_coordinator;
    size_t bytes;
    uint8_t data[];
};

static int is_coordinator(const struct fabric *fabric)
{
    return fabric->config.node == 0;
}

/* The state and the receiving part call each other: links are ended by what they bring. */
static void on_message(void *arg, struct fabric_link *link, const void *data, size_t bytes);

int fabric_complete(const struct fabric *fabric)
{
    return fabric->complete;
}

/* ---- who is there ---- */

static uint64_t present(const struct fabric *fabric)
{
    uint64_t there = 0;
    for (uint32_t node = 0; node < EPD_MAX_NODES; node++) /* those past n_nodes never are */
        there |= (uint64_t)(fabric->nodes[node].present != 0) << node;
    return there;
}

static void note_complete(struct fabric *fabric, int complete)
{
    struct worker *worker = fabric->worker;
    char missing[96];
    number_set_name(fabric_nodes_first(fabric->config.n_nodes) & ~present(fabric), missing, sizeof(missing));
    if (complete && !fabric->complete)
        log_write(worker->log, LOG_INFO, "fabric complete nodes %u node %u epoch %" PRIu64,
                  fabric->config.n_nodes, fabric->config.node, fabric->epoch);
    else if (!complete && fabric->complete)
        log_write(worker->log, LOG_WARN, "fabric incomplete nodes %u missing%s", fabric->config.n_nodes,
                  missing);
    fabric->complete = complete;
    if (!complete || fabric->was_complete)
        return;
    fabric->was_complete = 1;
    worker_fabric_complete(worker);
}

/* Node 0: what it knows, to all. */
static void tell_state(struct fabric *fabric)
{
    const uint64_t there = present(fabric);
    const int complete = (uint32_t)__builtin_popcountll(there) == fabric->config.n_nodes;
    struct fabric_message message;
    if (complete && !fabric->complete)
        fabric->epoch++;
    fabric_message_init(&message, FABRIC_STATE);
    message.epoch = fabric->epoch;
    message.present = there;
    if (!complete)
        (void)error_set(&message.error, EPD_PEER_LOST, "not all nodes are there");
    for (uint32_t node = 1; node < fabric->config.n_nodes; node++)
        fabric_tell(fabric, node, &message);
    note_complete(fabric, complete);
}

static void take_state(struct fabric *fabric, const struct fabric_message *message)
{
    const uint64_t now_ns = clock_ns();
    for (uint32_t node = 0; node < fabric->config.n_nodes; node++) {
        struct fabric_node *known = &fabric->nodes[node];
        const int there = (int)(message->present >> node & 1);
        if (node == 0 || node == fabric->config.node || known->present == there)
            continue;
        known->present = there;
        known->since_ns = now_ns;
        known->n_losses += !there;
    }
    fabric->epoch = message->epoch;
    note_complete(fabric, message->error.status == EPD_OK);
}

/* ---- sending ---- */

static void post_letter(struct fabric *fabric, int to_coordinator, const void *data, size_t bytes)
{
    struct letter *letter = malloc(sizeof(*letter) + bytes);
    if (!letter) {
        const struct epd_error error = {EPD_NO_MEMORY, "fabric: no memory for a message to itself"};
        worker_fail(fabric->worker, &error);
        return;
    }
    letter->to_coordinator = to_coordinator;
    letter->bytes = bytes;
    memcpy(letter->data, data, bytes);
    list_init(&letter->in_fabric);
    list_append(&fabric->to_self, &letter->in_fabric);
    (void)uv_async_send(&fabric->wake);
}

static int encode(struct fabric *fabric, const struct fabric_message *message, size_t *bytes)
{
    struct epd_error error = {0};
    if (fabric_encode(message, fabric->encoded, bytes, &error) == EPD_OK)
        return 1;
    worker_fail(fabric->worker, &error); /* our own message */
    return 0;
}

enum epd_status fabric_ask(struct fabric *fabric, const struct fabric_message *message,
                           struct epd_error *error)
{
    size_t bytes;
    struct fabric_node *first = &fabric->nodes[0];
    if (!is_coordinator(fabric) && (!first->link || !first->present))
        return error_set(error, EPD_PEER_LOST, "node 0 is not there: %.180s",
                         fabric->last_error[0] ? fabric->last_error : "not connected yet");
    if (!encode(fabric, message, &bytes))
        return error_set(error, EPD_INTERNAL, "fabric: a message that cannot be encoded");
    if (is_coordinator(fabric))
        post_letter(fabric, 1, fabric->encoded, bytes);
    else
        fabric_link_send(first->link, fabric->encoded, bytes);
    return EPD_OK;
}

void fabric_tell(struct fabric *fabric, uint32_t node, const struct fabric_message *message)
{
    size_t bytes;
    if (!encode(fabric, message, &bytes))
        return;
    if (node == fabric->config.node)
        post_letter(fabric, 0, fabric->encoded, bytes);
    else if (fabric->nodes[node].link && fabric->nodes[node].present)
        fabric_link_send(fabric->nodes[node].link, fabric->encoded, bytes);
}

static void send_on(struct fabric *fabric, struct fabric_link *link, const struct fabric_message *message)
{
    size_t bytes;
    if (encode(fabric, message, &bytes))
        fabric_link_send(link, fabric->encoded, bytes);
}

/* ---- receiving ---- */

static struct fabric_node *node_of(struct fabric *fabric, const struct fabric_link *link, uint32_t *number)
{
    for (uint32_t node = 0; node < fabric->config.n_nodes; node++)
        if (fabric->nodes[node].link == link) {
            *number = node;
            return &fabric->nodes[node];
        }
    return NULL;
}

/* Both sides say it; it makes the other side present. */
static enum epd_status take_hello(struct fabric *fabric, uint32_t number,
                                  const struct fabric_message *message, struct epd_error *error)
{
    struct fabric_node *node = &fabric->nodes[number];
    if (message->number != FABRIC_PROTOCOL)
        return error_set(error, EPD_VERSION_MISMATCH, "it speaks fabric protocol %" PRIu64 ", here it is %u",
                         message->number, FABRIC_PROTOCOL);
    memcpy(node->version, message->name, sizeof(node->version));
    if (node->present)
        return EPD_OK;
    node->present = 1;
    node->since_ns = clock_ns();
    node->last_error[0] = 0;
    fabric->retry_ms = FABRIC_RETRY_FIRST_MS;
    log_write(fabric->worker->log, LOG_INFO, "fabric node %u is there address %s version %s", number,
              node->address, node->version);
    if (is_coordinator(fabric))
        tell_state(fabric);
    else
        group_span_rejoin(fabric);
    return EPD_OK;
}

static enum epd_status handle(struct fabric *fabric, uint32_t number, struct fabric_message *message,
                              struct epd_error *error)
{
    struct fabric_node *node = &fabric->nodes[number];
    if (message->kind == FABRIC_HELLO)
        return take_hello(fabric, number, message, error);
    if (message->kind == FABRIC_PING) {
        message->kind = FABRIC_PONG;
        send_on(fabric, node->link, message);
        return EPD_OK;
    }
    if (message->kind == FABRIC_PONG) {
        node->rtt_ns = clock_ns() - message->time_ns;
        return EPD_OK;
    }
    if (!node->present)
        return error_set(error, EPD_PROTOCOL, "%s before hello", fabric_kind_name(message->kind));
    if (is_coordinator(fabric))
        return coordinator_receive(fabric->coordinator, number, message, error);
    if (message->kind == FABRIC_STATE)
        take_state(fabric, message);
    else
        group_span_receive(fabric, message);
    return EPD_OK;
}

static void on_message(void *arg, struct fabric_link *link, const void *data, size_t bytes)
{
    struct fabric *fabric = arg;
    struct fabric_message message;
    struct epd_error error = {0};
    uint32_t number = 0;
    if (!node_of(fabric, link, &number))
        return;
    enum epd_status status = fabric_decode(data, bytes, &fabric->arena, &message, &error);
    if (status == EPD_OK)
        status = handle(fabric, number, &message, &error);
    if (status != EPD_OK)
        fabric_link_close(link, &error);
}

static void on_wake(uv_async_t *wake)
{
    struct fabric *fabric = wake->data;
    while (!list_empty(&fabric->to_self)) {
        struct letter *letter = list_owner(fabric->to_self.next, struct letter, in_fabric);
        struct fabric_message message;
        struct epd_error error = {0};
        list_remove(&letter->in_fabric);
        enum epd_status status = fabric_decode(letter->data, letter->bytes, &fabric->arena, &message, &error);
        if (status == EPD_OK && letter->to_coordinator)
            status = coordinator_receive(fabric->coordinator, 0, &message, &error);
        else if (status == EPD_OK)
            group_span_receive(fabric, &message);
        free(letter);
        if (status != EPD_OK)
            worker_fail(fabric->worker, &error); /* our own message */
    }
}

/* ---- links ---- */

static void forget_stranger(struct fabric *fabric, const struct fabric_link *link)
{
    for (size_t i = 0; i < FABRIC_MAX_STRANGERS; i++)
        if (fabric->strangers[i] == link)
            fabric->strangers[i] = NULL;
}

static int on_open(void *arg, struct fabric_link *link, uint32_t number, struct epd_error *error)
{
    struct fabric *fabric = arg;
    struct fabric_node *node = &fabric->nodes[number];
    struct fabric_message hello;
    if (is_coordinator(fabric) && node->link) { /* it has come back before we noticed that it was gone */
        const struct epd_error again = {EPD_PEER_LOST, "it has connected anew"};
        fabric_link_close(node->link, &again);
    }
    if (!is_coordinator(fabric) && number != 0) {
        (void)error_set(error, EPD_GROUP_MISMATCH, "the rendezvous is node %u, want node 0", number);
        return 0;
    }
    forget_stranger(fabric, link);
    node->link = link;
    node->pinged_ns = clock_ns();
    (void)snprintf(node->address, sizeof(node->address), "%s", fabric_link_address(link));
    fabric_message_init(&hello, FABRIC_HELLO);
    hello.number = FABRIC_PROTOCOL;
    (void)snprintf(hello.name, sizeof(hello.name), "%s", EPD_VERSION);
    send_on(fabric, link, &hello);
    return 1;
}

/* The node itself, or all that is behind it. */
static void lose(struct fabric *fabric, uint32_t number, const struct epd_error *why)
{
    struct fabric_node *node = &fabric->nodes[number];
    struct epd_error lost;
    node->present = 0;
    node->since_ns = clock_ns();
    node->n_losses++;
    (void)error_set(&lost, EPD_PEER_LOST, "node %u is lost: %s", number, why->text);
    log_write(fabric->worker->log, LOG_WARN, "fabric node %u lost reason %s", number, why->text);
    if (is_coordinator(fabric)) {
        coordinator_lose(fabric->coordinator, number, &lost);
        tell_state(fabric);
        return;
    }
    for (uint32_t other = 1; other < fabric->config.n_nodes; other++)
        if (other != fabric->config.node)
            fabric->nodes[other].present = 0;
    group_span_lose_all(fabric, &lost);
    note_complete(fabric, 0);
}

static void on_end(void *arg, struct fabric_link *link, const struct epd_error *why)
{
    struct fabric *fabric = arg;
    uint32_t number = 0;
    struct fabric_node *node = node_of(fabric, link, &number);
    (void)snprintf(fabric->last_error, sizeof(fabric->last_error), "%.60s: %.180s",
                   fabric_link_address(link)[0] ? fabric_link_address(link) : fabric->config.rendezvous,
                   why->text);
    if (!node) {
        const int accepted = is_coordinator(fabric); /* the others connect */
        forget_stranger(fabric, link);
        if (!fabric->stopped)
            (void)log_limited(fabric->worker->log, accepted ? LOG_WARN : LOG_INFO, "fabric_refused",
                              clock_ns(), "fabric %s %.200s", accepted ? "refused" : "not connected",
                              fabric->last_error);
        return;
    }
    uint64_t sent, received;
    fabric_link_bytes(link, &sent, &received);
    node->sent_bytes += sent;
    node->received_bytes += received;
    node->link = NULL;
    (void)snprintf(node->last_error, sizeof(node->last_error), "%s", why->text);
    fabric->retry_at_ns = clock_ns() + clock_ms_to_ns(fabric->retry_ms);
    if (fabric->stopped)
        return;
    if (node->present)
        lose(fabric, number, why);
    else
        (void)log_limited(fabric->worker->log, LOG_WARN, "fabric_early", clock_ns(),
                          "fabric node %u ended before it was there reason %s", number, why->text);
}

/* ---- the beat ---- */

static void check_link(struct fabric *fabric, struct fabric_node *node, uint64_t now_ns)
{
    const uint64_t dead_ns = clock_ms_to_ns(fabric->worker->config.node_dead_ms);
    struct fabric_message ping;
    struct epd_error why;
    if (now_ns - fabric_link_heard_ns(node->link) > dead_ns) {
        (void)error_set(&why, EPD_PEER_LOST, "nothing heard of it for %" PRIu64 " ms",
                        fabric->worker->config.node_dead_ms);
        fabric_link_close(node->link, &why);
        return;
    }
    if (now_ns - node->pinged_ns < dead_ns / 4)
        return;
    node->pinged_ns = now_ns;
    fabric_message_init(&ping, FABRIC_PING);
    ping.time_ns = now_ns;
    send_on(fabric, node->link, &ping);
}

static void on_beat(uv_timer_t *beat)
{
    struct fabric *fabric = beat->data;
    const uint64_t now_ns = clock_ns();
    for (uint32_t node = 0; node < fabric->config.n_nodes; node++)
        if (fabric->nodes[node].link)
            check_link(fabric, &fabric->nodes[node], now_ns);
    group_span_beat(fabric, now_ns);
    if (is_coordinator(fabric))
        coordinator_check(fabric->coordinator, now_ns);
    else
        fabric_dial(fabric, now_ns);
}

/* ---- life ---- */

static enum epd_status load(struct fabric *fabric, enum epd_backend_kind backend, struct epd_error *error)
{
    const struct config *config = &fabric->worker->config;
    const struct transport_options options = {.ways = config->network, .devices = config->network_devices};
    const struct transport *transport = transport_find(backend, error);
    if (!transport || !fabric_auth_available(error))
        return error->status;
    if (transport->load(&options, error) != EPD_OK)
        return error->status;
    if (arena_init(&fabric->arena, FABRIC_MAX_ARENA_BYTES) != EPD_OK)
        return error_set(error, EPD_NO_MEMORY, "fabric: no memory for its messages");
    return EPD_OK;
}

enum epd_status fabric_create(struct worker *worker, enum epd_backend_kind backend, struct fabric **result,
                              struct epd_error *error)
{
    struct fabric_config config;
    *result = NULL;
    if (fabric_config_resolve(&worker->config, &config, error) != EPD_OK)
        return error->status;
    if (config.n_nodes == 1)
        return EPD_OK;
    struct fabric *fabric = calloc(1, sizeof(*fabric));
    if (!fabric)
        return error_set(error, EPD_NO_MEMORY, "fabric: no memory");
    fabric->worker = worker;
    fabric->config = config;
    fabric->retry_ms = FABRIC_RETRY_FIRST_MS / 2;
    list_init(&fabric->to_self);
    list_init(&fabric->gos);
    if (load(fabric, backend, error) != EPD_OK) {
        free(fabric);
        return error->status;
    }
    if (is_coordinator(fabric) && !(fabric->coordinator = coordinator_create(fabric))) {
        arena_fini(&fabric->arena);
        free(fabric);
        return error_set(error, EPD_NO_MEMORY, "fabric: no memory");
    }
    *result = fabric;
    return EPD_OK;
}

static void on_rails_begun(void *arg, const struct epd_error *error)
{
    struct fabric *fabric = arg;
    if (error->status != EPD_OK)
        worker_fail(fabric->worker, error); /* no group could span nodes here */
}

enum epd_status fabric_start(struct fabric *fabric, struct epd_error *error)
{
    uv_loop_t *loop = &fabric->worker->loop;
    struct fabric_node *self = &fabric->nodes[fabric->config.node];
    fabric->owner = (struct fabric_link_owner){.loop = loop,
                                               .key = fabric->config.key,
                                               .node = fabric->config.node,
                                               .n_nodes = fabric->config.n_nodes,
                                               .arg = fabric,
                                               .on_open = on_open,
                                               .on_message = on_message,
                                               .on_end = on_end};
    self->present = 1;
    self->since_ns = clock_ns();
    (void)snprintf(self->version, sizeof(self->version), "%s", EPD_VERSION);
    fabric->lookup.data = fabric;
    (void)uv_timer_init(loop, &fabric->beat); /* cannot fail */
    fabric->beat.data = fabric->wake.data = fabric;
    if (uv_async_init(loop, &fabric->wake, on_wake) != 0)
        return error_set(error, EPD_SYSTEM, "fabric: no fds for its wake-up");
    if (is_coordinator(fabric) && fabric_listen(fabric, error) != EPD_OK)
        return error->status;
    if (rails_begin(fabric->worker->node, on_rails_begun, fabric, error) != EPD_OK)
        return error->status;
    (void)uv_timer_start(&fabric->beat, on_beat, is_coordinator(fabric) ? FABRIC_BEAT_MS : 1, FABRIC_BEAT_MS);
    log_write(fabric->worker->log, LOG_INFO, "fabric node %u of %u rendezvous %s", fabric->config.node,
              fabric->config.n_nodes, fabric->config.rendezvous);
    return EPD_OK;
}

void fabric_stop(struct fabric *fabric)
{
    const struct epd_error why = {EPD_DRAINING, "this daemon ends"};
    if (!fabric || fabric->stopped)
        return;
    fabric->stopped = 1;
    (void)uv_timer_stop(&fabric->beat);
    group_span_beat(fabric, UINT64_MAX); /* nothing waits for the next */
    for (size_t i = 0; i < FABRIC_MAX_STRANGERS; i++)
        if (fabric->strangers[i])
            fabric_link_close(fabric->strangers[i], &why);
    for (uint32_t node = 0; node < fabric->config.n_nodes; node++)
        if (fabric->nodes[node].link)
            fabric_link_close(fabric->nodes[node].link, &why);
}

void fabric_destroy(struct fabric *fabric)
{
    if (!fabric)
        return;
    while (!list_empty(&fabric->to_self)) {
        struct letter *letter = list_owner(fabric->to_self.next, struct letter, in_fabric);
        list_remove(&letter->in_fabric);
        free(letter);
    }
    coordinator_destroy(fabric->coordinator);
    arena_fini(&fabric->arena);
    free(fabric);
}
