#include "client/epdctl/fabric_view.h"

#include <math.h>
#include <string.h>

#include "client/epdctl/field.h"
#include "client/epdctl/quantity.h"
#include "client/epdctl/table.h"
#include "proto/limits.h"
#include "proto/status.h"

static void print_head(const json_t *document, FILE *out)
{
    char number[32], mean[QUANTITY_BYTES], max[QUANTITY_BYTES];
    const double steps = field_number_in(document, "agreement", "steps");
    const double ahead = field_number_in(document, "agreement", "ahead");
    char share[QUANTITY_BYTES];
    fprintf(out, "node %s of ", field_print(document, "node", number, sizeof(number)));
    fprintf(out, "%s, ", field_print(document, "n_nodes", number, sizeof(number)));
    fprintf(out, "%s, epoch ", field_true(document, "complete") ? "complete" : "INCOMPLETE");
    fprintf(out, "%s, rendezvous %s\n", field_print(document, "fabric_epoch", number, sizeof(number)),
            field_text(document, "rendezvous", "-"));
    if (*field_text(document, "last_error", ""))
        fprintf(out, "last error: %s\n", field_text(document, "last_error", ""));
    if (steps > 0)
        fprintf(
            out,
            "agreement about a step: %s on average, %s at most; %s of the steps had an earlier one of their "
            "group on the devices\n",
            quantity_duration(mean, field_number_in(document, "agreement", "mean_ns")),
            quantity_duration(max, field_number_in(document, "agreement", "max_ns")),
            quantity_share(share, ahead / steps));
}

static void print_nodes(const json_t *nodes, FILE *out)
{
    struct table table;
    size_t idx;
    json_t *node;
    char text[EPD_ERROR_TEXT_BYTES];
    table_init(&table,
               ">node,state,linked,address,>since,>round trip,>losses,>sent,>received,version,last error");
    json_array_foreach (nodes, idx, node) {
        static const char *const plain[] = {"node", "state", "linked", "address"};
        const double rtt_ns = field_number(node, "rtt_ns");
        for (size_t i = 0; i < sizeof(plain) / sizeof(*plain); i++)
            table_add(&table, field_print(node, plain[i], text, sizeof(text)));
        table_add(&table, quantity_age(text, field_number(node, "since_ms")));
        table_add(&table, quantity_duration(text, rtt_ns > 0 ? rtt_ns : NAN));
        table_add(&table, quantity_count(text, field_number(node, "losses")));
        table_add(&table, quantity_memory(text, field_number(node, "sent_bytes")));
        table_add(&table, quantity_memory(text, field_number(node, "received_bytes")));
        table_add(&table, field_text(node, "version", "-"));
        table_add(&table, field_text(node, "last_error", "-"));
    }
    table_print(&table, out);
    table_fini(&table);
}

/* The rail of the same group and node in an earlier document. */
static const json_t *earlier(const json_t *before, const json_t *group, const json_t *node)
{
    size_t idx, other_idx;
    json_t *other, *other_node;
    json_array_foreach (field_array(before, "groups"), idx, other) {
        if (field_number(other, "group_id") != field_number(group, "group_id"))
            continue;
        json_array_foreach (field_array(field_object(other, "rails"), "nodes"), other_idx, other_node)
            if (field_number(other_node, "node") == field_number(node, "node"))
                return other_node;
    }
    return NULL;
}

/* How long swaps took, in ns. Those of NCCL take their time in streams, where no host looks. */
static double swap_ns(const json_t *group)
{
    const int in_streams = strcmp(field_text(field_object(group, "rails"), "transport", ""), "nccl") == 0;
    return in_streams ? NAN : field_number_in(group, "rails", "swap_ns");
}

/* Bytes both ways per second: since the earlier document, or of the time spent in swaps. */
static double bandwidth(const json_t *document, const json_t *before, const json_t *group, const json_t *node)
{
    const json_t *then = earlier(before, group, node);
    const double bytes = field_number(node, "sent_bytes") + field_number(node, "received_bytes");
    if (!then)
        return bytes / (swap_ns(group) * 1e-9);
    const double s = (field_number(document, "uptime_ms") - field_number(before, "uptime_ms")) * 1e-3;
    return (bytes - field_number(then, "sent_bytes") - field_number(then, "received_bytes")) / s;
}

/* "3,0": the nodes of the group in the order of its ranks; "any 2" while it is not known which they will be. */
static const char *group_nodes(const json_t *document, const json_t *group, char *text, size_t bytes)
{
    size_t idx, length = 0;
    json_t *node;
    const json_t *nodes = field_array(group, "nodes");
    const int is_all = field_number(document, "n_nodes") == field_number(group, "n_nodes");
    if (is_all || !json_array_size(nodes)) {
        (void)snprintf(text, bytes, is_all ? "all" : "any %.0f", field_number(group, "n_nodes"));
        return text;
    }
    json_array_foreach (nodes, idx, node)
        if (length < bytes)
            length += (size_t)snprintf(text + length, bytes - length, "%s%" JSON_INTEGER_FORMAT,
                                       idx ? "," : "", json_integer_value(node));
    return text;
}

/* rail: to one node; NULL: to none yet. */
static void add_rail(struct table *table, const json_t *document, const json_t *before, const json_t *group,
                     const json_t *rail)
{
    char text[4 * EPD_MAX_NODES];
    const double swaps = field_number_in(group, "rails", "swaps");
    table_add(table, field_print(group, "group_id", text, sizeof(text)));
    table_add(table, field_text(group, "name", "-"));
    table_add(table, group_nodes(document, group, text, sizeof(text)));
    table_add(table, field_text(group, "state", "-"));
    table_add(table, quantity_count(text, field_number(group, "steps")));
    table_add(table, quantity_count(text, field_number(group, "announced")));
    table_add(table, field_print(rail, "node", text, sizeof(text)));
    table_add(table, quantity_memory(text, field_number(rail, "sent_bytes")));
    table_add(table, quantity_memory(text, field_number(rail, "received_bytes")));
    table_add(table, quantity_rate(text, bandwidth(document, before, group, rail), "B"));
    table_add(table, quantity_duration(text, swap_ns(group) / swaps));
    table_add(table, field_text(field_object(group, "rails"), "transport", "-"));
}

static void add_group(struct table *table, const json_t *document, const json_t *before, const json_t *group)
{
    size_t idx;
    json_t *rail;
    const json_t *rails = field_array(field_object(group, "rails"), "nodes");
    json_array_foreach (rails, idx, rail)
        add_rail(table, document, before, group, rail);
    if (!json_array_size(rails))
        add_rail(table, document, before, group, NULL);
}

void fabric_view(const json_t *document, const json_t *before, FILE *out)
{
    struct table table;
    size_t idx;
    json_t *group;
    if (!(field_number(document, "n_nodes") > 1)) {
        fprintf(out, "this daemon is in no fabric\n");
        return;
    }
    print_head(document, out);
    print_nodes(field_array(document, "nodes"), out);
    table_init(&table, ">group,name,nodes,state,>steps,>ahead,>to node,>sent,>received,>bandwidth,>swap,by");
    json_array_foreach (field_array(document, "groups"), idx, group)
        add_group(&table, document, before, group);
    table_print(&table, out);
    table_fini(&table);
}
