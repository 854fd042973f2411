/* What `epdctl fabric` shows. */
#include "daemon/clock.h"
#include "daemon/fabric.h"
#include "daemon/fabric_coordinator.h"
#include "daemon/group_span.h"
#include "daemon/worker.h"

static json_t *number(uint64_t value)
{
    return json_integer((json_int_t)value);
}

static void set(json_t *object, const char *key, json_t *value)
{
    (void)json_object_set_new(object, key, value);
}

static const char *state_of(const struct fabric *fabric, uint32_t node)
{
    if (node == fabric->config.node)
        return "self";
    return fabric->nodes[node].present ? "present" : "missing";
}

static json_t *node_document(const struct fabric *fabric, uint32_t number_of_node, uint64_t now_ns)
{
    const struct fabric_node *node = &fabric->nodes[number_of_node];
    uint64_t sent = 0, received = 0;
    json_t *object = json_object();
    if (node->link)
        fabric_link_bytes(node->link, &sent, &received);
    set(object, "node", number(number_of_node));
    set(object, "state", json_string(state_of(fabric, number_of_node)));
    set(object, "linked", json_boolean(node->link != NULL));
    set(object, "address", json_string(node->address));
    set(object, "version", json_string(node->version));
    set(object, "since_ms", number(node->since_ns ? (now_ns - node->since_ns) / CLOCK_NS_PER_MS : 0));
    set(object, "rtt_ns", number(node->rtt_ns));
    set(object, "losses", number(node->n_losses));
    set(object, "sent_bytes", number(node->sent_bytes + sent));
    set(object, "received_bytes", number(node->received_bytes + received));
    set(object, "last_error", json_string(node->last_error));
    return object;
}

static json_t *rails_document(const struct group *group)
{
    struct rails_traffic traffic;
    json_t *nodes = json_array();
    rails_traffic(group->span->rails, &traffic);
    for (uint32_t node = 0; group->span->id && node < group->span->n_nodes; node++) {
        if (node == group->span->node)
            continue;
        json_t *object = json_object();
        set(object, "node", number(group->span->nodes[node]));
        set(object, "sent_bytes", number(traffic.sent_bytes[node]));
        set(object, "received_bytes", number(traffic.received_bytes[node]));
        (void)json_array_append_new(nodes, object);
    }
    json_t *object = json_object();
    set(object, "transport", json_string(rails_transport(group->span->rails)));
    set(object, "swaps", number(traffic.n_swaps));
    set(object, "swap_ns", number(traffic.waited_ns));
    set(object, "nodes", nodes);
    return object;
}

static json_t *group_document(const struct group *group)
{
    const struct group_span *span = group->span;
    json_t *object = json_object(), *nodes = json_array();
    for (uint32_t node = 0; span->id && node < span->n_nodes; node++)
        (void)json_array_append_new(nodes, number(span->nodes[node]));
    set(object, "group_id", number(group->id));
    set(object, "name", json_string(group->name));
    set(object, "state", json_string(group_span_state_name(span->state)));
    set(object, "n_nodes", number(span->n_nodes));
    set(object, "nodes", nodes);
    set(object, "first_rank", number(span->first_rank));
    set(object, "n_ranks", number(span->n_ranks));
    set(object, "steps", number(span->n_gone));
    set(object, "announced", number(group->ordinal - span->n_gone));
    set(object, "joint_plans", number(group->n_joint_plans));
    if (span->rails && !span->job)
        set(object, "rails", rails_document(group));
    return object;
}

static json_t *coordinator_document(const struct fabric *fabric)
{
    uint64_t n_groups, n_plans;
    json_t *object = json_object();
    coordinator_count(fabric->coordinator, &n_groups, &n_plans);
    set(object, "groups", number(n_groups));
    set(object, "unsettled_plans", number(n_plans));
    return object;
}

void fabric_fill_document(const struct fabric *fabric, json_t *document)
{
    json_t *nodes = json_array(), *groups = json_array();
    const uint64_t now_ns = clock_ns();
    if (!fabric) {
        set(document, "n_nodes", number(1));
        set(document, "nodes", nodes);
        set(document, "groups", groups);
        return;
    }
    const struct fabric_agreements *agreements = &fabric->agreements;
    for (uint32_t node = 0; node < fabric->config.n_nodes; node++)
        (void)json_array_append_new(nodes, node_document(fabric, node, now_ns));
    list_each(place, after, &fabric->worker->groups)
    {
        const struct group *group = list_owner(place, struct group, in_worker);
        if (group->span)
            (void)json_array_append_new(groups, group_document(group));
    }
    set(document, "n_nodes", number(fabric->config.n_nodes));
    set(document, "node", number(fabric->config.node));
    set(document, "rendezvous", json_string(fabric->config.rendezvous));
    set(document, "complete", json_boolean(fabric->complete));
    set(document, "fabric_epoch", number(fabric->epoch));
    set(document, "last_error", json_string(fabric->complete ? "" : fabric->last_error));
    set(document, "agreement",
        json_pack("{s:I s:I s:I s:I}", "steps", (json_int_t)agreements->n, "mean_ns",
                  (json_int_t)(agreements->n ? agreements->sum_ns / agreements->n : 0), "max_ns",
                  (json_int_t)agreements->max_ns, "ahead", (json_int_t)agreements->n_ahead));
    if (fabric->coordinator)
        set(document, "coordinator", coordinator_document(fabric));
    set(document, "nodes", nodes);
    set(document, "groups", groups);
}
