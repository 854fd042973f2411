#include "daemon/fabric_coordinator.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "daemon/clock.h"
#include "daemon/fabric_span.h"
#include "daemon/worker.h"

struct coordinator *coordinator_create(struct fabric *fabric)
{
    struct coordinator *coordinator = calloc(1, sizeof(*coordinator));
    if (!coordinator)
        return NULL;
    coordinator->fabric = fabric;
    /* Not those of a coordinator before this one. */
    coordinator->next_id = clock_unix_ms() << 16;
    list_init(&coordinator->spans);
    return coordinator;
}

void coordinator_count(const struct coordinator *coordinator, uint64_t *n_groups, uint64_t *n_plans)
{
    *n_groups = coordinator->n_spans;
    *n_plans = 0;
    list_each(node, after, &coordinator->spans)
    {
        *n_plans += list_owner(node, struct span, in_coordinator)->n_plans;
    }
}

static void free_span(struct coordinator *coordinator, struct span *span)
{
    span_free_plans(span);
    list_remove(&span->in_coordinator);
    coordinator->n_spans--;
    free(span->addresses);
    free(span);
}

void coordinator_destroy(struct coordinator *coordinator)
{
    if (!coordinator)
        return;
    while (!list_empty(&coordinator->spans))
        free_span(coordinator, list_owner(coordinator->spans.next, struct span, in_coordinator));
    free(coordinator);
}

/* ---- joins ---- */

static struct span *find_joining(struct coordinator *coordinator, uint32_t uid, const char *name)
{
    list_each(node, after, &coordinator->spans)
    {
        struct span *span = list_owner(node, struct span, in_coordinator);
        if (!span->id && span->uid == uid && strcmp(span->name, name) == 0)
            return span;
    }
    return NULL;
}

static struct span *find_open(struct coordinator *coordinator, uint64_t id)
{
    list_each(node, after, &coordinator->spans)
    {
        struct span *span = list_owner(node, struct span, in_coordinator);
        if (span->id && span->id == id)
            return span;
    }
    return NULL;
}

/* Every node that has joined hears why it comes to nothing. */
static void fail_join(struct coordinator *coordinator, struct span *span, const struct epd_error *error)
{
    struct fabric_message message;
    for (uint32_t node = 0; node < coordinator_n_nodes(coordinator); node++) {
        if (!(span->joined >> node & 1))
            continue;
        fabric_message_init(&message, FABRIC_OPEN);
        message.number = span->local_ids[node];
        message.error = *error;
        fabric_tell(coordinator->fabric, node, &message);
    }
    free_span(coordinator, span);
}

static struct span *create_span(struct coordinator *coordinator, uint32_t node,
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
    span->first_node = node;
    span->first_ns = clock_ns();
    list_init(&span->plans);
    list_append(&coordinator->spans, &span->in_coordinator);
    coordinator->n_spans++;
    return span;
}

/* To the node alone that asks: there is no group yet. */
static void refuse_join(struct coordinator *coordinator, uint32_t node, uint64_t local_id,
                        const struct epd_error *why)
{
    struct fabric_message message;
    fabric_message_init(&message, FABRIC_OPEN);
    message.number = local_id;
    message.error = *why;
    fabric_tell(coordinator->fabric, node, &message);
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
    return EPD_OK;
}

static void open_span(struct coordinator *coordinator, struct span *span)
{
    struct fabric_message message;
    span->id = ++coordinator->next_id;
    for (uint32_t node = 0; node < coordinator_n_nodes(coordinator); node++) {
        fabric_message_init(&message, FABRIC_OPEN);
        message.group = span->id;
        message.number = span->local_ids[node];
        message.world_size = span->world_size;
        message.n_addresses = span->world_size;
        message.addresses = span->addresses;
        fabric_tell(coordinator->fabric, node, &message);
    }
}

static enum epd_status join(struct coordinator *coordinator, uint32_t node,
                            const struct fabric_message *message, struct epd_error *error)
{
    struct span *span = find_joining(coordinator, message->uid, message->name);
    struct epd_error why = message->error;
    if (why.status) { /* given up */
        if (span && span->joined >> node & 1) {
            span->joined &= ~(1ull << node);
            fail_join(coordinator, span, &why);
        }
        return EPD_OK;
    }
    const uint32_t n_here = message->world_size / coordinator_n_nodes(coordinator);
    if (message->n_config != GROUP_N_FIELDS || !message->world_size || message->n_addresses != n_here ||
        message->world_size % coordinator_n_nodes(coordinator))
        return error_set(error, EPD_PROTOCOL, "join of %u ranks on %u nodes, %u addresses, %u fields",
                         message->world_size, coordinator_n_nodes(coordinator), message->n_addresses,
                         message->n_config);
    if (!span)
        span = create_span(coordinator, node, message, &why);
    if (!span) {
        refuse_join(coordinator, node, message->group, &why);
        return EPD_OK;
    }
    span->joined |= 1ull << node;
    span->local_ids[node] = message->group;
    if (compare(span, node, message, &why) != EPD_OK) { /* nobody can tell who is right */
        fail_join(coordinator, span, &why);
        return EPD_OK;
    }
    memcpy(span->addresses + (size_t)node * n_here, message->addresses, n_here * sizeof(*span->addresses));
    if (span->joined == coordinator_all_nodes(coordinator))
        open_span(coordinator, span);
    return EPD_OK;
}

/* ---- steps ---- */

static struct matter *step_at(struct span *span, uint64_t number)
{
    return &span->steps[number % COORDINATOR_MAX_AHEAD];
}

/* Decides steps in their order, as far as nodes have spoken. */
static void release(struct coordinator *coordinator, struct span *span)
{
    for (;;) {
        const uint64_t number = span->n_gone + 1;
        struct matter *matter = step_at(span, number);
        if (!matter->n || (!matter->error.status && matter->there != coordinator_all_nodes(coordinator)))
            return;
        struct fabric_message message;
        fabric_message_init(&message, FABRIC_GO);
        message.group = span->id;
        message.number = number;
        message.hash = matter->hash;
        message.error = matter->error;
        message.rank = matter->rank;
        memset(matter, 0, sizeof(*matter));
        span->n_gone = number;
        span->gone_ns = clock_ns();
        for (uint32_t node = 0; node < coordinator_n_nodes(coordinator); node++)
            if (span->announced[node] < number)
                span->announced[node] = number;
        coordinator_tell(coordinator, &message, coordinator_all_nodes(coordinator));
    }
}

static enum epd_status step(struct coordinator *coordinator, uint32_t node,
                            const struct fabric_message *message, struct epd_error *error)
{
    struct span *span = find_open(coordinator, message->group);
    if (!span || message->number <= span->n_gone)
        return EPD_OK; /* it has ended meanwhile; the step has failed meanwhile */
    if (message->number != span->announced[node] + 1 ||
        message->number - span->n_gone >= COORDINATOR_MAX_AHEAD)
        return error_set(error, EPD_PROTOCOL, "step %" PRIu64 " of group %s, want %" PRIu64, message->number,
                         span->name, span->announced[node] + 1);
    struct matter *matter = step_at(span, message->number);
    span->announced[node] = message->number;
    matter_hear(matter, node, message);
    if (!matter->error.status && matter->hash != message->hash) {
        (void)error_set(&matter->error, EPD_SEQ_MISMATCH,
                        "step %" PRIu64 " of group %s: node %u launches %s (plan %" PRIu64
                        "), node %u launches %s (plan %" PRIu64 ")",
                        message->number, span->name, node, op_name((enum epd_op)message->op), message->hash,
                        matter->first_node, op_name((enum epd_op)matter->op), matter->hash);
        matter->rank = -1;
    }
    release(coordinator, span);
    return EPD_OK;
}

/* ---- ends ---- */

static void end_span(struct coordinator *coordinator, struct span *span, uint32_t from,
                     const struct fabric_message *message)
{
    struct fabric_message passed = *message;
    passed.node = from;
    passed.n_addresses = 0;
    coordinator_tell(coordinator, &passed, coordinator_all_nodes(coordinator) & ~(1ull << from));
    free_span(coordinator, span);
}

enum epd_status coordinator_receive(struct coordinator *coordinator, uint32_t node,
                                    const struct fabric_message *message, struct epd_error *error)
{
    struct span *span;
    switch (message->kind) {
    case FABRIC_JOIN:
        return join(coordinator, node, message, error);
    case FABRIC_PLAN: /* of a group that has ended meanwhile: no news */
        span = find_open(coordinator, message->group);
        return span ? span_take_plan(coordinator, span, node, message, error) : EPD_OK;
    case FABRIC_HEARD:
        span = find_open(coordinator, message->group);
        if (span)
            span_take_heard(coordinator, span, node, message);
        return EPD_OK;
    case FABRIC_STEP:
        return step(coordinator, node, message, error);
    case FABRIC_BREAK:
        span = find_open(coordinator, message->group);
        if (span)
            end_span(coordinator, span, node, message);
        return EPD_OK;
    default:
        return error_set(error, EPD_PROTOCOL, "a message of kind %s", fabric_kind_name(message->kind));
    }
}

void coordinator_lose(struct coordinator *coordinator, uint32_t node, const struct epd_error *why)
{
    list_each(place, after, &coordinator->spans)
    {
        struct span *span = list_owner(place, struct span, in_coordinator);
        if (!span->id) {
            span->joined &= ~(1ull << node); /* it may come back in time */
            if (!span->joined)
                free_span(coordinator, span);
            continue;
        }
        struct fabric_message message;
        fabric_message_init(&message, FABRIC_BREAK);
        message.group = span->id;
        message.error = *why;
        end_span(coordinator, span, node, &message);
    }
}

static void check_joining(struct coordinator *coordinator, struct span *span, uint64_t now_ns)
{
    const uint64_t limit_ms = coordinator->fabric->worker->config.join_ms;
    if (now_ns < span->first_ns + clock_ms_to_ns(limit_ms))
        return;
    char missing[96];
    struct epd_error error;
    fabric_name_missing(coordinator_n_nodes(coordinator), span->joined, missing, sizeof(missing));
    (void)error_set(&error, EPD_TIMEOUT, "group %s: not joined within %" PRIu64 " ms by node%s", span->name,
                    limit_ms, missing);
    fail_join(coordinator, span, &error);
}

static void check_step(struct coordinator *coordinator, struct span *span, uint64_t now_ns)
{
    struct matter *matter = step_at(span, span->n_gone + 1);
    const uint64_t asked_ms = (uint64_t)span->config[GROUP_FIELD_DEADLINE];
    const uint64_t limit_ms = asked_ms ? asked_ms : coordinator->fabric->worker->config.stuck_ms;
    const uint64_t from_ns = matter->first_ns > span->gone_ns ? matter->first_ns : span->gone_ns;
    if (!matter->n || now_ns < from_ns + clock_ms_to_ns(limit_ms + COORDINATOR_GRACE_MS))
        return;
    matter_overdue(matter, coordinator, span, "step", span->n_gone + 1, limit_ms);
    release(coordinator, span);
}

void coordinator_check(struct coordinator *coordinator, uint64_t now_ns)
{
    list_each(place, after, &coordinator->spans)
    {
        struct span *span = list_owner(place, struct span, in_coordinator);
        if (!span->id) {
            check_joining(coordinator, span, now_ns);
            continue;
        }
        span_check_plans(coordinator, span, now_ns);
        check_step(coordinator, span, now_ns);
    }
}
