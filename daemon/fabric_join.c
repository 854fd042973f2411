/* How groups that span nodes come about: nodes join under a name of a uid, each with one block of the ranks, until every
 * block is there. A name stands for one group at a time, joined or open, in the whole fabric: two that are meant to be
 * apart would else be put together by who comes first. */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "daemon/clock.h"
#include "daemon/fabric_nodes.h"
#include "daemon/fabric_span.h"
#include "daemon/number_set.h"
#include "daemon/worker.h"

static struct span *find(struct coordinator *coordinator, uint32_t uid, const char *name)
{
    list_each(place, after, &coordinator->spans)
    {
        struct span *span = list_owner(place, struct span, in_coordinator);
        if (span->uid == uid && strcmp(span->name, name) == 0)
            return span;
    }
    return NULL;
}

static uint32_t ranks_per_node(const struct span *span)
{
    return span->world_size / span->n_nodes;
}

/* "4..7", the ranks of a block. */
static size_t name_block(const struct span *span, uint32_t block, char *text, size_t bytes)
{
    const uint32_t n = ranks_per_node(span), first = block * n;
    const int length =
        n == 1 ? snprintf(text, bytes, "%u", first) : snprintf(text, bytes, "%u..%u", first, first + n - 1);
    return (size_t)length;
}

/* ---- ends of a join ---- */

/* To the node alone that asks: it is in no group. */
static void refuse(struct coordinator *coordinator, uint32_t node, uint64_t local_id,
                   const struct epd_error *why)
{
    struct fabric_message message;
    fabric_message_init(&message, FABRIC_OPEN);
    message.number = local_id;
    message.error = *why;
    fabric_tell(coordinator->fabric, node, &message);
}

/* Every node that has joined hears why it comes to nothing. */
static void fail(struct coordinator *coordinator, struct span *span, const struct epd_error *error)
{
    for (uint32_t node = 0; node < coordinator_n_nodes(coordinator); node++)
        if (span_has_node(span, node))
            refuse(coordinator, node, span->local_ids[node], error);
    span_free(coordinator, span);
}

/* A rank of a block that the group waits for was refused by its node, before that node had joined. */
static int is_awaited(const struct span *span, uint32_t node, const struct fabric_message *message)
{
    return !message->group && !span->id && !span_has_node(span, node) &&
           message->world_size == span->world_size && message->block < span->n_nodes &&
           !(span->blocks >> message->block & 1);
}

/* The node's ranks wait no more. The group may have opened while this was on its way. */
static void leave(struct coordinator *coordinator, struct span *span, uint32_t node,
                  const struct fabric_message *message)
{
    if (!span->id) {
        span->nodes &= ~(1ull << node);
        fail(coordinator, span, &message->error);
        return;
    }
    struct fabric_message ended;
    fabric_message_init(&ended, FABRIC_BREAK);
    ended.group = span->id;
    ended.error = message->error;
    span_end(coordinator, span, node, &ended);
}

/* A node says that nothing comes of a join: of its own, or of one that it has not joined because a rank was refused. */
static void give_up(struct coordinator *coordinator, struct span *span, uint32_t node,
                    const struct fabric_message *message)
{
    if (span && is_awaited(span, node, message))
        fail(coordinator, span, &message->error);
    else if (span && span_has_node(span, node) && span->local_ids[node] == message->group)
        leave(coordinator, span, node, message);
}

void span_unjoin(struct coordinator *coordinator, struct span *span, uint32_t node)
{
    span->nodes &= ~(1ull << node);
    for (uint32_t block = 0; block < span->n_nodes; block++)
        if (span->node_of[block] == node)
            span->blocks &= ~(1ull << block);
    if (!span->nodes)
        span_free(coordinator, span);
    else if (span->first_node == node) /* whoever is left says the same, and is named */
        span->first_node = (uint32_t)__builtin_ctzll(span->nodes);
}

/* ---- joining ---- */

static enum epd_status check(const struct coordinator *coordinator, const struct fabric_message *message,
                             struct epd_error *error)
{
    const uint32_t n_all = coordinator_n_nodes(coordinator), n_ranks = message->world_size;
    const int64_t n_nodes = message->n_config == GROUP_N_FIELDS ? message->config[GROUP_FIELD_NODES] : 0;
    if (n_nodes < 2 || n_nodes > n_all || !n_ranks || n_ranks % n_nodes ||
        message->n_addresses != n_ranks / n_nodes || message->block >= n_nodes)
        return error_set(error, EPD_PROTOCOL,
                         "join of %u ranks on %" PRId64 " of %u nodes, block %u, %u addresses, %u fields",
                         n_ranks, n_nodes, n_all, message->block, message->n_addresses, message->n_config);
    return EPD_OK;
}

static struct span *create(struct coordinator *coordinator, uint32_t node,
                           const struct fabric_message *message, struct epd_error *why)
{
    if (coordinator->n_spans >= COORDINATOR_MAX_GROUPS) {
        (void)error_set(why, EPD_QUOTA, "group %s: the fabric has %u groups across nodes, at most %u",
                        message->name, coordinator->n_spans, COORDINATOR_MAX_GROUPS);
        return NULL;
    }
    struct span *span = calloc(1, sizeof(*span));
    struct fabric_address *addresses = calloc(message->world_size, sizeof(*addresses));
    if (!span || !addresses) {
        (void)error_set(why, EPD_NO_MEMORY, "group %s: node 0 has no memory for it", message->name);
        free(addresses);
        free(span);
        return NULL;
    }
    span->addresses = addresses;
    memcpy(span->name, message->name, sizeof(span->name));
    memcpy(span->config, message->config, sizeof(span->config));
    span->uid = message->uid;
    span->world_size = message->world_size;
    span->n_nodes = (uint32_t)message->config[GROUP_FIELD_NODES];
    span->first_node = node;
    span->first_ns = clock_ns();
    list_init(&span->plans);
    list_append(&coordinator->spans, &span->in_coordinator);
    coordinator->n_spans++;
    return span;
}

static enum epd_status compare(const struct span *span, uint32_t node, const struct fabric_message *message,
                               struct epd_error *error)
{
    if (message->world_size != span->world_size)
        return error_set(error, EPD_GROUP_MISMATCH, "group %s world_size: node %u says %u, node %u says %u",
                         span->name, node, message->world_size, span->first_node, span->world_size);
    for (size_t i = 0; i < GROUP_N_FIELDS; i++) {
        char given[24], want[24];
        if (message->config[i] == span->config[i])
            continue;
        group_field_format(i, message->config[i], given, sizeof(given));
        group_field_format(i, span->config[i], want, sizeof(want));
        return error_set(error, EPD_GROUP_MISMATCH, "group %s %s: node %u says %s, node %u says %s",
                         span->name, group_field_name(i), node, given, span->first_node, want);
    }
    if (span->blocks >> message->block & 1) {
        char ranks[24];
        (void)name_block(span, message->block, ranks, sizeof(ranks));
        return error_set(error, EPD_GROUP_MISMATCH,
                         "group %s rank: node %u says %s, node %u says %s too: each rank joins once, and "
                         "groups of other nodes need names of their own",
                         span->name, node, ranks, span->node_of[message->block], ranks);
    }
    return EPD_OK;
}

static void open_span(struct coordinator *coordinator, struct span *span)
{
    struct fabric_message message;
    span->id = ++coordinator->next_id;
    fabric_message_init(&message, FABRIC_OPEN);
    message.group = span->id;
    message.world_size = span->world_size;
    message.n_addresses = span->world_size;
    message.addresses = span->addresses;
    message.n_nodes = span->n_nodes;
    memcpy(message.nodes, span->node_of, sizeof(message.nodes));
    for (uint32_t block = 0; block < span->n_nodes; block++) {
        message.number = span->local_ids[span->node_of[block]];
        fabric_tell(coordinator->fabric, span->node_of[block], &message);
    }
}

/* A group of the name is open on other nodes. */
static void refuse_name(struct coordinator *coordinator, const struct span *span, uint32_t node,
                        const struct fabric_message *message)
{
    char nodes[96];
    struct epd_error why;
    number_set_name(span->nodes, nodes, sizeof(nodes));
    (void)error_set(&why, EPD_IN_USE,
                    "group %s: open on nodes%s; groups of other nodes need names of their own", span->name,
                    nodes);
    refuse(coordinator, node, message->group, &why);
}

enum epd_status span_take_join(struct coordinator *coordinator, uint32_t node,
                               const struct fabric_message *message, struct epd_error *error)
{
    struct span *span = find(coordinator, message->uid, message->name);
    struct epd_error why;
    if (message->error.status) {
        give_up(coordinator, span, node, message);
        return EPD_OK;
    }
    if (check(coordinator, message, error) != EPD_OK)
        return error->status;
    if (span && span->id) {
        refuse_name(coordinator, span, node, message);
        return EPD_OK;
    }
    if (span && span_has_node(span, node))
        return error_set(error, EPD_PROTOCOL, "join of group %s twice", span->name);
    if (!span)
        span = create(coordinator, node, message, &why);
    if (!span) {
        refuse(coordinator, node, message->group, &why);
        return EPD_OK;
    }
    span->nodes |= 1ull << node;
    span->local_ids[node] = message->group;
    if (compare(span, node, message, &why) != EPD_OK) { /* nobody can tell who is right */
        fail(coordinator, span, &why);
        return EPD_OK;
    }
    span->blocks |= 1ull << message->block;
    span->node_of[message->block] = node;
    memcpy(span->addresses + (size_t)message->block * message->n_addresses, message->addresses,
           message->n_addresses * sizeof(*span->addresses));
    if (span->blocks == fabric_nodes_first(span->n_nodes))
        open_span(coordinator, span);
    return EPD_OK;
}

/* ---- deadline ---- */

/* The ranks that no node has brought. */
static uint64_t missing_ranks(const struct span *span)
{
    const uint32_t n = ranks_per_node(span);
    uint64_t ranks = 0;
    for (uint32_t rank = 0; rank < span->world_size; rank++)
        ranks |= (uint64_t) !(span->blocks >> rank / n & 1) << rank;
    return ranks;
}

void span_check_join(struct coordinator *coordinator, struct span *span, uint64_t now_ns)
{
    const uint32_t n_all = coordinator_n_nodes(coordinator);
    const uint64_t limit_ms = coordinator->fabric->worker->config.join_ms;
    if (now_ns < span->first_ns + clock_ms_to_ns(limit_ms))
        return;
    char missing[56], there[40]; /* so that the whole fits into an error's text */
    struct epd_error error;
    if (span->n_nodes == n_all) { /* it is plain which */
        number_set_name(fabric_nodes_first(n_all) & ~span->nodes, missing, sizeof(missing));
        (void)error_set(&error, EPD_TIMEOUT, "group %s: not joined within %" PRIu64 " ms by node%s",
                        span->name, limit_ms, missing);
    } else {
        number_set_name(missing_ranks(span), missing, sizeof(missing));
        number_set_name(span->nodes, there, sizeof(there));
        (void)error_set(
            &error, EPD_TIMEOUT,
            "group %s: not joined within %" PRIu64 " ms by the node%s of ranks%s; joined by node%s",
            span->name, limit_ms, span->n_nodes - (uint32_t)__builtin_popcountll(span->blocks) > 1 ? "s" : "",
            missing, there);
    }
    fail(coordinator, span, &error);
}
