#include "daemon/fabric_coordinator.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "daemon/clock.h"
#include "daemon/fabric.h"
#include "daemon/group_fields.h"
#include "daemon/worker.h"

/* What nodes have said about one plan or one step. */
struct matter {
    uint32_t n;
    uint64_t there; /* bit per node */
    uint32_t first_node;
    uint64_t first_ns;
    uint32_t op;
    uint64_t hash;
    struct epd_error error; /* the first */
    int32_t rank;
};

struct plan_matter {
    struct list in_span;
    uint64_t key;
    struct matter matter;
};

/* A group that spans nodes: being joined until id is not 0. */
struct span {
    struct list in_coordinator;
    uint64_t id;
    char name[EPD_MAX_NAME_BYTES];
    uint32_t uid, world_size, first_node;
    int64_t config[GROUP_N_FIELDS];
    uint64_t joined;                   /* bit per node */
    uint64_t local_ids[EPD_MAX_NODES]; /* what each node calls it */
    uint64_t first_ns;
    struct fabric_address *addresses; /* [world_size] owned */
    struct list plans;                /* struct plan_matter: not decided */
    uint32_t n_plans;
    uint64_t n_gone;                            /* steps decided so far */
    uint64_t announced[EPD_MAX_NODES];          /* by node; at least n_gone */
    uint64_t gone_ns;                           /* when the last was decided */
    struct matter steps[COORDINATOR_MAX_AHEAD]; /* of step n at n modulo */
};

struct coordinator {
    struct fabric *fabric; /* borrowed */
    struct list spans;
    uint32_t n_spans;
    uint64_t next_id;
};

static uint32_t n_nodes(const struct coordinator *coordinator)
{
    return coordinator->fabric->config.n_nodes;
}

static uint64_t all_nodes(const struct coordinator *coordinator)
{
    return n_nodes(coordinator) == 64 ? UINT64_MAX : (1ull << n_nodes(coordinator)) - 1;
}

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

static void free_plan(struct span *span, struct plan_matter *plan)
{
    list_remove(&plan->in_span);
    span->n_plans--;
    free(plan);
}

static void free_span(struct coordinator *coordinator, struct span *span)
{
    while (!list_empty(&span->plans))
        free_plan(span, list_owner(span->plans.next, struct plan_matter, in_span));
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

static void tell_all(struct coordinator *coordinator, const struct fabric_message *message, uint64_t nodes)
{
    for (uint32_t node = 0; node < n_nodes(coordinator); node++)
        if (nodes >> node & 1)
            fabric_tell(coordinator->fabric, node, message);
}

/* ---- matters ---- */

/* A node's word. The first error counts. */
static void hear(struct matter *matter, uint32_t node, const struct fabric_message *message)
{
    if (!matter->n) {
        matter->first_node = node;
        matter->first_ns = clock_ns();
        matter->op = message->op;
        matter->hash = message->hash;
        matter->rank = -1;
    }
    matter->n++;
    matter->there |= 1ull << node;
    if (message->error.status && !matter->error.status) {
        matter->error = message->error;
        matter->rank = message->rank;
    }
}

static void overdue(struct matter *matter, const struct coordinator *coordinator, const struct span *span,
                    const char *what, uint64_t number, uint64_t limit_ms)
{
    char missing[96];
    fabric_name_missing(n_nodes(coordinator), matter->there, missing, sizeof(missing));
    (void)error_set(&matter->error, EPD_TIMEOUT,
                    "%s %" PRIu64 " (%s) of group %s: not asked for within %" PRIu64 " ms by node%s", what,
                    number, op_name((enum epd_op)matter->op), span->name, limit_ms, missing);
    matter->rank = -1;
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
    for (uint32_t node = 0; node < n_nodes(coordinator); node++) {
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
                                const struct fabric_message *message)
{
    struct span *span = coordinator->n_spans < COORDINATOR_MAX_GROUPS ? calloc(1, sizeof(*span)) : NULL;
    if (!span)
        return NULL;
    span->addresses = calloc(message->world_size, sizeof(*span->addresses));
    if (!span->addresses) {
        free(span);
        return NULL;
    }
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
    for (uint32_t node = 0; node < n_nodes(coordinator); node++) {
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
    const uint32_t n_here = message->world_size / n_nodes(coordinator);
    if (message->n_config != GROUP_N_FIELDS || !message->world_size || message->n_addresses != n_here ||
        message->world_size % n_nodes(coordinator))
        return error_set(error, EPD_PROTOCOL, "join of %u ranks on %u nodes, %u addresses, %u fields",
                         message->world_size, n_nodes(coordinator), message->n_addresses, message->n_config);
    if (!span)
        span = create_span(coordinator, node, message);
    if (!span)
        return error_set(error, EPD_NO_MEMORY, "no room for group %s", message->name);
    span->joined |= 1ull << node;
    span->local_ids[node] = message->group;
    if (compare(span, node, message, &why) != EPD_OK) { /* nobody can tell who is right */
        fail_join(coordinator, span, &why);
        return EPD_OK;
    }
    memcpy(span->addresses + (size_t)node * n_here, message->addresses, n_here * sizeof(*span->addresses));
    if (span->joined == all_nodes(coordinator))
        open_span(coordinator, span);
    return EPD_OK;
}

/* ---- plans ---- */

static struct plan_matter *find_plan(struct span *span, uint64_t key)
{
    list_each(node, after, &span->plans)
    {
        struct plan_matter *plan = list_owner(node, struct plan_matter, in_span);
        if (plan->key == key)
            return plan;
    }
    if (span->n_plans >= COORDINATOR_MAX_PLANS)
        return NULL;
    struct plan_matter *plan = calloc(1, sizeof(*plan));
    if (!plan)
        return NULL;
    plan->key = key;
    list_append(&span->plans, &plan->in_span);
    span->n_plans++;
    return plan;
}

/* Every node has spoken, or there is no need to wait for the others. A failed plan stays until all have: what they say
 * of it later is no news. */
static void decide_plan(struct coordinator *coordinator, struct span *span, struct plan_matter *plan)
{
    struct fabric_message message;
    fabric_message_init(&message, FABRIC_READY);
    message.group = span->id;
    message.number = plan->key;
    message.error = plan->matter.error;
    message.rank = plan->matter.rank;
    tell_all(coordinator, &message, all_nodes(coordinator));
}

static enum epd_status plan(struct coordinator *coordinator, uint32_t node,
                            const struct fabric_message *message, struct epd_error *error)
{
    struct span *span = find_open(coordinator, message->group);
    if (!span)
        return EPD_OK; /* it has ended meanwhile */
    struct plan_matter *found = find_plan(span, message->number);
    if (!found)
        return error_set(error, EPD_QUOTA, "group %s has %u undecided plans", span->name, span->n_plans);
    struct matter *matter = &found->matter;
    if (matter->there >> node & 1)
        return error_set(error, EPD_PROTOCOL, "plan %" PRIu64 " of group %s twice", message->number,
                         span->name);
    const int decided = matter->error.status != EPD_OK;
    hear(matter, node, message);
    if (!matter->error.status && matter->op != message->op)
        (void)error_set(&matter->error, EPD_PLAN_MISMATCH,
                        "plan %" PRIu64 " of group %s: node %u creates %s, node %u creates %s", found->key,
                        span->name, node, op_name((enum epd_op)message->op), matter->first_node,
                        op_name((enum epd_op)matter->op));
    else if (!matter->error.status && matter->hash != message->hash)
        (void)error_set(&matter->error, EPD_PLAN_MISMATCH,
                        "plan %" PRIu64
                        " (%s) of group %s: node %u and node %u differ in its modes, its dtypes, "
                        "its context or which tensors are bound",
                        found->key, op_name((enum epd_op)matter->op), span->name, node, matter->first_node);
    const int all = matter->there == all_nodes(coordinator);
    if (!decided && (all || matter->error.status))
        decide_plan(coordinator, span, found);
    if (all)
        free_plan(span, found);
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
        if (!matter->n || (!matter->error.status && matter->there != all_nodes(coordinator)))
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
        for (uint32_t node = 0; node < n_nodes(coordinator); node++)
            if (span->announced[node] < number)
                span->announced[node] = number;
        tell_all(coordinator, &message, all_nodes(coordinator));
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
    hear(matter, node, message);
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
    tell_all(coordinator, &passed, all_nodes(coordinator) & ~(1ull << from));
    free_span(coordinator, span);
}

enum epd_status coordinator_receive(struct coordinator *coordinator, uint32_t node,
                                    const struct fabric_message *message, struct epd_error *error)
{
    struct span *span;
    switch (message->kind) {
    case FABRIC_JOIN:
        return join(coordinator, node, message, error);
    case FABRIC_PLAN:
        return plan(coordinator, node, message, error);
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
    fabric_name_missing(n_nodes(coordinator), span->joined, missing, sizeof(missing));
    (void)error_set(&error, EPD_TIMEOUT, "group %s: not joined within %" PRIu64 " ms by node%s", span->name,
                    limit_ms, missing);
    fail_join(coordinator, span, &error);
}

static void check_plans(struct coordinator *coordinator, struct span *span, uint64_t now_ns)
{
    const uint64_t limit_ms = coordinator->fabric->worker->config.plan_ms;
    list_each(place, after, &span->plans)
    {
        struct plan_matter *found = list_owner(place, struct plan_matter, in_span);
        struct matter *matter = &found->matter;
        if (matter->error.status ||
            now_ns < matter->first_ns + clock_ms_to_ns(limit_ms + COORDINATOR_GRACE_MS))
            continue;
        overdue(matter, coordinator, span, "plan", found->key, limit_ms);
        decide_plan(coordinator, span, found);
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
    overdue(matter, coordinator, span, "step", span->n_gone + 1, limit_ms);
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
        check_plans(coordinator, span, now_ns);
        check_step(coordinator, span, now_ns);
    }
}
