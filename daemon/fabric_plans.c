/* The collective plans of groups that span nodes, and what all matters that nodes speak about have in common. */
#include <inttypes.h>
#include <stdlib.h>

#include "daemon/clock.h"
#include "daemon/fabric_span.h"
#include "daemon/number_set.h"
#include "daemon/worker.h"

void coordinator_tell(struct coordinator *coordinator, const struct fabric_message *message, uint64_t nodes)
{
    for (uint32_t node = 0; node < coordinator_n_nodes(coordinator); node++)
        if (nodes >> node & 1)
            fabric_tell(coordinator->fabric, node, message);
}

/* ---- matters ---- */

void matter_hear(struct matter *matter, uint32_t node, const struct fabric_message *message)
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

void matter_overdue(struct matter *matter, const struct span *span, const char *what, uint64_t number,
                    uint64_t limit_ms)
{
    char missing[96];
    number_set_name(span->nodes & ~matter->there, missing, sizeof(missing));
    (void)error_set(&matter->error, EPD_TIMEOUT,
                    "%s %" PRIu64 " (%s) of group %s: not asked for within %" PRIu64 " ms by node%s", what,
                    number, op_name((enum epd_op)matter->op), span->name, limit_ms, missing);
    matter->rank = -1;
}

/* ---- plans ---- */

static void free_plan(struct span *span, struct plan_matter *plan)
{
    list_remove(&plan->in_span);
    span->n_plans--;
    free(plan);
}

static struct plan_matter *find_plan(struct span *span, uint64_t key)
{
    list_each(node, after, &span->plans)
    {
        struct plan_matter *plan = list_owner(node, struct plan_matter, in_span);
        if (plan->key == key)
            return plan;
    }
    return NULL;
}

static struct plan_matter *create_plan(struct span *span, uint64_t key, struct epd_error *why)
{
    if (span->n_plans >= COORDINATOR_MAX_PLANS) {
        (void)error_set(why, EPD_QUOTA,
                        "plan %" PRIu64 " of group %s: %u of its plans wait for nodes, at most %u", key,
                        span->name, span->n_plans, COORDINATOR_MAX_PLANS);
        return NULL;
    }
    struct plan_matter *plan = calloc(1, sizeof(*plan));
    if (!plan) {
        (void)error_set(why, EPD_NO_MEMORY, "plan %" PRIu64 " of group %s: node 0 has no memory for it", key,
                        span->name);
        return NULL;
    }
    plan->key = key;
    list_append(&span->plans, &plan->in_span);
    span->n_plans++;
    return plan;
}

static void tell_plan(struct coordinator *coordinator, const struct span *span, uint64_t key,
                      uint32_t n_tokens, const struct epd_error *error, int32_t rank)
{
    struct fabric_message message;
    fabric_message_init(&message, FABRIC_READY);
    message.group = span->id;
    message.number = key;
    message.n_tokens = error->status ? 0 : n_tokens;
    message.error = *error;
    message.rank = rank;
    coordinator_tell(coordinator, &message, span->nodes);
}

/* Every node has spoken, or there is no need to wait for the others. A failed plan stays until all have heard of it:
 * what they have said before that is no news. */
static void decide_plan(struct coordinator *coordinator, struct span *span, struct plan_matter *plan)
{
    tell_plan(coordinator, span, plan->key, plan->n_tokens, &plan->matter.error, plan->matter.rank);
    if (plan->matter.error.status == EPD_OK)
        free_plan(span, plan);
}

enum epd_status span_take_plan(struct coordinator *coordinator, struct span *span, uint32_t node,
                               const struct fabric_message *message, struct epd_error *error)
{
    struct epd_error why = {0};
    struct plan_matter *found = find_plan(span, message->number);
    if (!found)
        found = create_plan(span, message->number, &why);
    if (!found) { /* all are told: it can come to nothing on the others either */
        tell_plan(coordinator, span, message->number, 0, &why, -1);
        return EPD_OK;
    }
    struct matter *matter = &found->matter;
    if (matter->there >> node & 1)
        return error_set(error, EPD_PROTOCOL, "plan %" PRIu64 " of group %s twice", message->number,
                         span->name);
    if (message->n_tokens > span->config[GROUP_FIELD_TOKENS])
        return error_set(error, EPD_PROTOCOL,
                         "plan %" PRIu64 " of group %s: %u tokens, want at most %" PRId64, message->number,
                         span->name, message->n_tokens, span->config[GROUP_FIELD_TOKENS]);
    const int decided = matter->error.status != EPD_OK;
    matter_hear(matter, node, message);
    found->n_tokens = message->n_tokens > found->n_tokens ? message->n_tokens : found->n_tokens;
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
    if (!decided && (matter->error.status || matter->there == span->nodes))
        decide_plan(coordinator, span, found);
    return EPD_OK;
}

/* The node knows that the plan has failed. */
void span_take_heard(struct coordinator *coordinator, struct span *span, uint32_t node,
                     const struct fabric_message *message)
{
    struct plan_matter *found = find_plan(span, message->number);
    if (!found)
        return; /* it was never kept */
    struct matter *matter = &found->matter;
    found->heard |= 1ull << node;
    if (!matter->error.status) { /* refused for another node, before this one's word of it came */
        (void)error_set(&matter->error, EPD_QUOTA, "plan %" PRIu64 " of group %s was refused on node %u",
                        found->key, span->name, node);
        tell_plan(coordinator, span, found->key, 0, &matter->error, -1);
    }
    if (found->heard == span->nodes)
        free_plan(span, found);
}

void span_free_plans(struct span *span)
{
    while (!list_empty(&span->plans))
        free_plan(span, list_owner(span->plans.next, struct plan_matter, in_span));
}

void span_check_plans(struct coordinator *coordinator, struct span *span, uint64_t now_ns)
{
    const uint64_t limit_ms = coordinator->fabric->worker->config.plan_ms;
    list_each(place, after, &span->plans)
    {
        struct plan_matter *found = list_owner(place, struct plan_matter, in_span);
        struct matter *matter = &found->matter;
        if (matter->error.status ||
            now_ns < matter->first_ns + clock_ms_to_ns(limit_ms + COORDINATOR_GRACE_MS))
            continue;
        matter_overdue(matter, span, "plan", found->key, limit_ms);
        decide_plan(coordinator, span, found);
    }
}
