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

void span_free(struct coordinator *coordinator, struct span *span)
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
        span_free(coordinator, list_owner(coordinator->spans.next, struct span, in_coordinator));
    free(coordinator);
}

static struct span *find_open(struct coordinator *coordinator, uint64_t id)
{
    list_each(place, after, &coordinator->spans)
    {
        struct span *span = list_owner(place, struct span, in_coordinator);
        if (span->id && span->id == id)
            return span;
    }
    return NULL;
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
        if (!matter->n || (!matter->error.status && matter->there != span->nodes))
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
        coordinator_tell(coordinator, &message, span->nodes);
    }
}

static enum epd_status step(struct coordinator *coordinator, struct span *span, uint32_t node,
                            const struct fabric_message *message, struct epd_error *error)
{
    if (message->number <= span->n_gone)
        return EPD_OK; /* it has failed meanwhile */
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

void span_end(struct coordinator *coordinator, struct span *span, uint32_t from,
              const struct fabric_message *message)
{
    struct fabric_message passed = *message;
    passed.node = from;
    passed.n_addresses = passed.n_nodes = 0;
    coordinator_tell(coordinator, &passed, span->nodes & ~(1ull << from));
    span_free(coordinator, span);
}

/* Of an open group. */
static enum epd_status take(struct coordinator *coordinator, struct span *span, uint32_t node,
                            const struct fabric_message *message, struct epd_error *error)
{
    if (!span_has_node(span, node))
        return error_set(error, EPD_PROTOCOL, "%s of group %s, in which it is not",
                         fabric_kind_name(message->kind), span->name);
    switch (message->kind) {
    case FABRIC_PLAN:
        return span_take_plan(coordinator, span, node, message, error);
    case FABRIC_HEARD:
        span_take_heard(coordinator, span, node, message);
        return EPD_OK;
    case FABRIC_STEP:
        return step(coordinator, span, node, message, error);
    default:
        span_end(coordinator, span, node, message);
        return EPD_OK;
    }
}

enum epd_status coordinator_receive(struct coordinator *coordinator, uint32_t node,
                                    const struct fabric_message *message, struct epd_error *error)
{
    struct span *span;
    switch (message->kind) {
    case FABRIC_JOIN:
        return span_take_join(coordinator, node, message, error);
    case FABRIC_PLAN:
    case FABRIC_HEARD:
    case FABRIC_STEP:
    case FABRIC_BREAK: /* of a group that has ended meanwhile: no news */
        span = find_open(coordinator, message->group);
        return span ? take(coordinator, span, node, message, error) : EPD_OK;
    default:
        return error_set(error, EPD_PROTOCOL, "a message of kind %s", fabric_kind_name(message->kind));
    }
}

void coordinator_lose(struct coordinator *coordinator, uint32_t node, const struct epd_error *why)
{
    list_each(place, after, &coordinator->spans)
    {
        struct span *span = list_owner(place, struct span, in_coordinator);
        if (!span_has_node(span, node))
            continue;
        if (!span->id) {
            span_unjoin(coordinator, span, node);
            continue;
        }
        struct fabric_message message;
        fabric_message_init(&message, FABRIC_BREAK);
        message.group = span->id;
        message.error = *why;
        span_end(coordinator, span, node, &message);
    }
}

static void check_step(struct coordinator *coordinator, struct span *span, uint64_t now_ns)
{
    struct matter *matter = step_at(span, span->n_gone + 1);
    const uint64_t asked_ms = (uint64_t)span->config[GROUP_FIELD_DEADLINE];
    const uint64_t limit_ms = asked_ms ? asked_ms : coordinator->fabric->worker->config.stuck_ms;
    const uint64_t from_ns = matter->first_ns > span->gone_ns ? matter->first_ns : span->gone_ns;
    if (!matter->n || now_ns < from_ns + clock_ms_to_ns(limit_ms + COORDINATOR_GRACE_MS))
        return;
    matter_overdue(matter, span, "step", span->n_gone + 1, limit_ms);
    release(coordinator, span);
}

void coordinator_check(struct coordinator *coordinator, uint64_t now_ns)
{
    list_each(place, after, &coordinator->spans)
    {
        struct span *span = list_owner(place, struct span, in_coordinator);
        if (!span->id) {
            span_check_join(coordinator, span, now_ns);
            continue;
        }
        span_check_plans(coordinator, span, now_ns);
        check_step(coordinator, span, now_ns);
    }
}
