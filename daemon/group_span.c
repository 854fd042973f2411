#include "daemon/group_span.h"

#include <stdlib.h>
#include <string.h>

#include "daemon/clock.h"
#include "daemon/fabric.h"
#include "daemon/group_fields.h"
#include "daemon/joint_plan.h"
#include "daemon/member.h"
#include "daemon/session.h"

static const char *const state_names[] = {"gathering", "opening", "joined", "connecting", "open", "ended"};

const char *group_span_state_name(enum group_span_state state)
{
    return state_names[state];
}

static struct fabric *fabric_of(const struct group *group)
{
    return group->worker->fabric;
}

uint32_t group_first_rank(const struct group *group)
{
    return group->span ? group->span->first_rank : 0;
}

uint32_t group_n_ranks(const struct group *group)
{
    return group->span ? group->span->n_ranks : group->world_size;
}

int group_span_node(const struct group *group, uint32_t rank, uint32_t *node)
{
    const struct group_span *span = group->span;
    const uint32_t block = rank / span->n_ranks;
    if (!span->id && block != span->node)
        return 0;
    *node = block == span->node ? fabric_of(group)->config.node : span->nodes[block];
    return 1;
}

/* ---- joining ---- */

enum epd_status group_span_check(const struct worker *worker, const struct message_group_join *join,
                                 struct epd_error *error)
{
    const struct fabric *fabric = worker->fabric;
    const uint32_t n_nodes = join->config.n_nodes;
    if (n_nodes <= 1)
        return EPD_OK;
    if (!fabric)
        return error_set(error, EPD_UNSUPPORTED, "group %s n_nodes: %u, this daemon is in no fabric",
                         join->name, n_nodes);
    if (n_nodes > fabric->config.n_nodes)
        return error_set(error, EPD_INVALID_ARGUMENT, "group %s n_nodes: %u, the fabric has %u", join->name,
                         n_nodes, fabric->config.n_nodes);
    if (join->world_size % n_nodes)
        return error_set(
            error, EPD_INVALID_ARGUMENT,
            "group %s world_size: %u, want a multiple of n_nodes %u: each node has as many ranks", join->name,
            join->world_size, n_nodes);
    return rails_available(worker->node, error) ? EPD_OK : error->status;
}

enum epd_status group_span_compare(const struct group *group, const struct message_group_join *join,
                                   struct epd_error *error)
{
    const struct group_span *span = group->span;
    if (!span || join->rank / span->n_ranks == span->node)
        return EPD_OK;
    return error_set(error, EPD_GROUP_MISMATCH,
                     "group %s rank: node %u has rank %u and therefore %u..%u, rank %u is of another node "
                     "(world_size %u on n_nodes %u)",
                     group->name, fabric_of(group)->config.node, group->first_joiner, span->first_rank,
                     span->first_rank + span->n_ranks - 1, join->rank, group->world_size, span->n_nodes);
}

enum epd_status group_span_create(struct group *group, struct epd_error *error)
{
    if (group->config.n_nodes <= 1)
        return EPD_OK;
    struct group_span *span = calloc(1, sizeof(*span));
    if (!span)
        return error_set(error, EPD_NO_MEMORY, "group: no memory");
    span->n_nodes = group->config.n_nodes;
    span->n_ranks = group->world_size / span->n_nodes;
    span->node = group->first_joiner / span->n_ranks;
    span->first_rank = span->n_ranks * span->node;
    group->span = span;
    return EPD_OK;
}

void group_span_destroy(struct group *group)
{
    if (!group->span)
        return;
    if (group->span->rails)
        rails_close(group->span->rails);
    free(group->span);
    group->span = NULL;
}

void group_span_tell(struct group *group, const struct fabric_message *message)
{
    struct epd_error ignored;
    (void)!fabric_ask(fabric_of(group), message, &ignored);
}

static void join_message(const struct group *group, struct fabric_message *message)
{
    fabric_message_init(message, FABRIC_JOIN);
    message->group = group->id;
    memcpy(message->name, group->name, sizeof(message->name));
    message->uid = group->uid;
    message->world_size = group->world_size;
}

static void join_nodes(struct group *group)
{
    struct group_span *span = group->span;
    struct fabric_message message;
    struct fabric_address addresses[EPD_MAX_WORLD_SIZE];
    join_message(group, &message);
    message.block = span->node;
    message.n_config = GROUP_N_FIELDS;
    group_field_values(&group->config, message.config);
    for (uint32_t i = 0; i < span->n_ranks; i++) {
        const struct transport_address *address = rails_address(span->rails, i);
        addresses[i].bytes = address->bytes;
        memcpy(addresses[i].data, address->data, address->bytes);
    }
    message.n_addresses = span->n_ranks;
    message.addresses = addresses;
    span->state = SPAN_JOINED;
    group_arm(group, clock_ns());     /* from now on the coordinator's deadline counts */
    group_span_tell(group, &message); /* or later: group_span_rejoin */
}

void group_span_refuse_rank(const struct session *session, const struct message_group_join *join,
                            const struct epd_error *error)
{
    struct fabric *fabric = session->worker->fabric;
    const uint32_t n_nodes = join->config.n_nodes;
    struct fabric_message message;
    struct epd_error ignored; /* the way to node 0 is gone: then nobody waits there */
    if (n_nodes <= 1 || !fabric || join->world_size % n_nodes || join->rank >= join->world_size)
        return;
    fabric_message_init(&message, FABRIC_JOIN); /* of no group that is known by an id */
    memcpy(message.name, join->name, sizeof(message.name));
    message.uid = session->peer.uid;
    message.world_size = join->world_size;
    message.block = join->rank / (join->world_size / n_nodes);
    (void)error_set(&message.error, error->status, "group %s: rank %u on node %u was refused: %s", join->name,
                    join->rank, fabric->config.node, error->text);
    (void)!fabric_ask(fabric, &message, &ignored);
}

/* Rails have been opened or connected, or the group has ended meanwhile. */
static int rails_done(struct group *group, const struct epd_error *error)
{
    struct group_span *span = group->span;
    span->job = 0;
    if (group->state != GROUP_JOINING)
        return 0;
    if (error->status == EPD_OK)
        return 1;
    group_fail_join(group, error);
    return 0;
}

static void on_rails_open(void *arg, const struct epd_error *error)
{
    struct group *group = arg;
    if (rails_done(group, error))
        join_nodes(group);
    group_release(group);
}

void group_span_begin(struct group *group)
{
    struct group_span *span = group->span;
    uint32_t devices[EPD_MAX_WORLD_SIZE];
    struct epd_error error = {0};
    for (uint32_t i = 0; i < span->n_ranks; i++)
        devices[i] = group->members[span->first_rank + i]->device_idx;
    span->state = SPAN_OPENING;
    if (rails_open(group->worker->node, span->node, span->n_ranks, devices, on_rails_open, group,
                   &span->rails, &error) != EPD_OK) {
        group_fail_join(group, &error);
        return;
    }
    span->job = 1;
    group_hold(group);
}

static void on_rails_connected(void *arg, const struct epd_error *error)
{
    struct group *group = arg;
    if (rails_done(group, error)) {
        const struct team_span team = {
            .n_nodes = group->span->n_nodes, .node = group->span->node, .rails = group->span->rails};
        group->span->state = SPAN_OPEN;
        group_open(group, &team);
    }
    group_release(group);
}

/* What node 0 says of the group's nodes: each once, and this one where it has joined. */
static enum epd_status take_nodes(struct group *group, const struct fabric_message *message,
                                  struct epd_error *error)
{
    struct group_span *span = group->span;
    const struct fabric *fabric = fabric_of(group);
    uint64_t seen = 0;
    int good = message->n_addresses == group->world_size && message->n_nodes == span->n_nodes &&
               message->nodes[span->node] == fabric->config.node;
    for (uint32_t i = 0; good && i < span->n_nodes; i++) {
        good = message->nodes[i] < fabric->config.n_nodes && !(seen >> message->nodes[i] & 1);
        seen |= 1ull << message->nodes[i];
    }
    if (!good)
        return error_set(error, EPD_PROTOCOL,
                         "group %s: node 0 opens it with %u addresses on %u nodes, which are not those of "
                         "%u ranks on %u nodes with node %u",
                         group->name, message->n_addresses, message->n_nodes, group->world_size,
                         span->n_nodes, fabric->config.node);
    memcpy(span->nodes, message->nodes, sizeof(span->nodes));
    return EPD_OK;
}

/* All its nodes have joined, or the join has come to nothing. */
static void take_open(struct group *group, const struct fabric_message *message)
{
    struct group_span *span = group->span;
    static struct transport_address addresses[EPD_MAX_WORLD_SIZE]; /* loop thread */
    struct epd_error error = message->error;
    if (span->state != SPAN_JOINED)
        return;
    if (error.status != EPD_OK) {
        span->state = SPAN_ENDED;
        group_fail_join(group, &error);
        return;
    }
    span->id = message->group;
    span->state = SPAN_CONNECTING;
    if (take_nodes(group, message, &error) != EPD_OK) {
        group_fail_join(group, &error);
        return;
    }
    for (uint32_t i = 0; i < group->world_size; i++) {
        addresses[i].bytes = message->addresses[i].bytes;
        addresses[i].node = span->nodes[i / span->n_ranks];
        memcpy(addresses[i].data, message->addresses[i].data, message->addresses[i].bytes);
    }
    const struct config *config = &group->worker->config;
    if (rails_connect(span->rails, span->n_nodes, addresses, 2 * clock_ms_to_ns(config->dead_ms),
                      on_rails_connected, group, &error) != EPD_OK) {
        group_fail_join(group, &error);
        return;
    }
    span->job = 1;
    group_hold(group);
}

/* ---- ends ---- */

/* What other nodes hear of it: a rank that has ended is known to them by its number, anything else is a matter of this
 * node. That its daemon drains or starts again is not what theirs does, whichever rank it met first. */
static void set_passed(const struct group *group, int32_t rank, const struct epd_error *error,
                       struct epd_error *passed)
{
    const int ours = error->status == EPD_RESTARTED || error->status == EPD_DRAINING;
    if (rank >= 0 && !ours)
        *passed = *error;
    else
        (void)error_set(passed, ours ? EPD_PEER_LOST : error->status, "node %u: %s",
                        fabric_of(group)->config.node, error->text);
}

void group_span_end(struct group *group, int32_t rank, const struct epd_error *error)
{
    struct group_span *span = group->span;
    struct fabric_message message;
    if (!span || span->state == SPAN_ENDED)
        return;
    if (span->state == SPAN_JOINED) {
        join_message(group, &message);
        set_passed(group, rank, error, &message.error);
        group_span_tell(group, &message);
    } else if (span->id) {
        fabric_message_init(&message, FABRIC_BREAK);
        message.group = span->id;
        message.number = span->n_gone;
        message.node = fabric_of(group)->config.node;
        message.rank = rank;
        if (!group->closed) /* no error: a rank has left on purpose */
            set_passed(group, rank, error, &message.error);
        group_span_tell(group, &message);
    }
    span->state = SPAN_ENDED;
}

/* Another node's part of the group has ended, or that node has. Steps that it has begun it also ends; what we have begun
 * beyond them would wait for it for ever. */
static void take_break(struct group *group, const struct fabric_message *message)
{
    struct group_span *span = group->span;
    struct epd_error error = message->error;
    const int orderly = error.status == EPD_OK && !group_asked(group);
    if (error.status == EPD_OK && message->rank >= 0)
        (void)error_set(&error, EPD_PEER_LOST, "rank %d of group %s is gone: it has left on node %u",
                        (int)message->rank, group->name, message->node);
    else if (error.status == EPD_OK)
        (void)error_set(&error, EPD_PEER_LOST, "node %u has ended group %s", message->node, group->name);
    span->state = SPAN_ENDED;
    if (span->rails && span->n_gone > message->number)
        rails_abort(span->rails, &error);
    if (group->state == GROUP_JOINING)
        group_fail_join(group, &error);
    else
        group_end(group, message->rank, &error, orderly);
}

/* ---- plans ---- */

void group_span_offer(struct group *group, const struct joint_plan *joint, uint64_t hash, uint32_t n_tokens)
{
    struct fabric_message message;
    fabric_message_init(&message, FABRIC_PLAN);
    message.group = group->span->id;
    message.number = joint->key;
    message.op = joint->op;
    message.hash = hash;
    message.n_tokens = n_tokens;
    group_span_tell(group, &message);
}

void group_span_refuse(struct group *group, const struct joint_plan *joint, const struct epd_error *error)
{
    struct fabric_message message;
    if (group->span->state != SPAN_OPEN)
        return;
    fabric_message_init(&message, FABRIC_PLAN);
    message.group = group->span->id;
    message.number = joint->key;
    message.op = joint->op;
    message.error = *error;
    group_span_tell(group, &message);
}

/* ---- messages ---- */

static struct group *find(const struct fabric *fabric, const struct fabric_message *message)
{
    list_each(node, after, &fabric->worker->groups)
    {
        struct group *group = list_owner(node, struct group, in_worker);
        if (!group->span)
            continue;
        if (message->kind == FABRIC_OPEN ? group->id == message->number
                                         : group->span->id && group->span->id == message->group)
            return group;
    }
    return NULL;
}

/* Nobody waits for a group that this node has given up: the coordinator must not think that it is open here. */
static void disown(struct fabric *fabric, const struct fabric_message *open)
{
    struct fabric_message message;
    struct epd_error ignored;
    if (!open->group)
        return;
    fabric_message_init(&message, FABRIC_BREAK);
    message.group = open->group;
    message.node = fabric->config.node;
    (void)error_set(&message.error, EPD_PEER_LOST, "node %u has given the group up", fabric->config.node);
    (void)!fabric_ask(fabric, &message, &ignored);
}

void group_span_receive(struct fabric *fabric, const struct fabric_message *message)
{
    struct group *group = find(fabric, message);
    if (!group || group->state == GROUP_BROKEN) {
        if (message->kind == FABRIC_OPEN)
            disown(fabric, message);
        return;
    }
    group_hold(group);
    switch (message->kind) {
    case FABRIC_OPEN:
        take_open(group, message);
        break;
    case FABRIC_READY:
        joint_plan_agreed(group, message);
        break;
    case FABRIC_GO:
        group_span_take_go(fabric, group, message);
        break;
    case FABRIC_BREAK:
        take_break(group, message);
        break;
    default:
        break; /* of a newer coordinator */
    }
    group_release(group);
}

void group_span_rejoin(struct fabric *fabric)
{
    list_each(node, after, &fabric->worker->groups)
    {
        struct group *group = list_owner(node, struct group, in_worker);
        if (group->span && group->state == GROUP_JOINING && group->span->state == SPAN_JOINED)
            join_nodes(group);
    }
}

static void lose(struct group *group, const struct epd_error *why)
{
    struct group_span *span = group->span;
    span->state = SPAN_ENDED;
    if (span->rails && span->n_gone)
        span->abort_at_ns = clock_ns() + clock_ms_to_ns(SPAN_ABORT_MS);
    if (group->state == GROUP_JOINING)
        group_fail_join(group, why);
    else
        group_break(group, -1, why);
}

void group_span_lose_all(struct fabric *fabric, const struct epd_error *why)
{
    for (int again = 1; again;) { /* breaking one may free others */
        again = 0;
        list_each(node, after, &fabric->worker->groups)
        {
            struct group *group = list_owner(node, struct group, in_worker);
            if (!group->span || !group->span->id || group->span->state == SPAN_ENDED)
                continue;
            group_hold(group);
            lose(group, why);
            group_release(group);
            again = 1;
            break;
        }
    }
}

void group_span_beat(struct fabric *fabric, uint64_t now_ns)
{
    list_each(node, after, &fabric->worker->groups)
    {
        struct group *group = list_owner(node, struct group, in_worker);
        if (!group->span || !group->span->abort_at_ns || now_ns < group->span->abort_at_ns)
            continue;
        group->span->abort_at_ns = 0;
        rails_abort(group->span->rails, &group->lost);
    }
}
