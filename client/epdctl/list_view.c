#include "client/epdctl/list_view.h"

#include <math.h>
#include <string.h>

#include "client/epdctl/field.h"
#include "client/epdctl/quantity.h"
#include "client/epdctl/table.h"

#define UUID_DIGITS 32

/* How one column is read from an object and written. */
enum column_kind {
    COLUMN_PLAIN,
    COLUMN_COUNT,
    COLUMN_MEMORY,
    COLUMN_AGE_MS,
    COLUMN_NS,
    COLUMN_IDX, /* below 0: none */
    COLUMN_UUID /* hex digits */
};

struct column {
    const char *key;
    enum column_kind kind;
};

/* As nvidia-smi writes it, without its "GPU-"; other texts as they are. */
static void add_uuid(struct table *table, const char *hex)
{
    char text[UUID_DIGITS + 5];
    size_t length = 0;
    if (strlen(hex) != UUID_DIGITS) {
        table_add(table, hex);
        return;
    }
    for (size_t i = 0; i < UUID_DIGITS; i++) {
        if (i >= 8 && i <= 20 && i % 4 == 0)
            text[length++] = '-';
        text[length++] = hex[i];
    }
    text[length] = 0;
    table_add(table, text);
}

static void add_cell(struct table *table, const json_t *object, const struct column *column)
{
    char text[512], quantity[QUANTITY_BYTES];
    const double number = field_number(object, column->key);
    switch (column->kind) {
    case COLUMN_PLAIN:
        table_add(table, field_print(object, column->key, text, sizeof(text)));
        return;
    case COLUMN_COUNT:
        table_add(table, quantity_count(quantity, number));
        return;
    case COLUMN_MEMORY:
        table_add(table, quantity_memory(quantity, number));
        return;
    case COLUMN_AGE_MS:
        table_add(table, quantity_age(quantity, number));
        return;
    case COLUMN_NS:
        table_add(table, quantity_duration(quantity, number));
        return;
    case COLUMN_IDX:
        table_add(table, number < 0 ? "-" : field_print(object, column->key, text, sizeof(text)));
        return;
    case COLUMN_UUID:
        add_uuid(table, field_text(object, column->key, "-"));
        return;
    }
}

static void print_list(const json_t *array, const char *titles, const struct column *columns,
                       const char *if_empty, FILE *out)
{
    struct table table;
    table_init(&table, titles);
    size_t idx;
    json_t *object;
    json_array_foreach (array, idx, object) {
        for (size_t column = 0; column < table.n_columns; column++)
            add_cell(&table, object, &columns[column]);
    }
    if (table_n_rows(&table) == 0)
        fprintf(out, "%s\n", if_empty);
    table_print(&table, out);
    table_fini(&table);
}

void clients_view(const json_t *document, FILE *out)
{
    static const struct column columns[] = {
        {"session_id", COLUMN_PLAIN},    {"name", COLUMN_PLAIN},
        {"kind", COLUMN_PLAIN},          {"state", COLUMN_PLAIN},
        {"pid", COLUMN_PLAIN},           {"uid", COLUMN_PLAIN},
        {"connected_ms", COLUMN_AGE_MS}, {"idle_ms", COLUMN_AGE_MS},
        {"requests", COLUMN_COUNT},      {"groups", COLUMN_COUNT},
        {"buffers", COLUMN_COUNT},       {"plans", COLUMN_COUNT},
        {"heap_bytes", COLUMN_MEMORY},   {"imported_bytes", COLUMN_MEMORY},
        {"saved_bytes", COLUMN_MEMORY},  {"in_flight", COLUMN_COUNT},
    };
    print_list(
        field_array(document, "sessions"),
        ">id,name,kind,state,>pid,>uid,>connected,>idle,>requests,>groups,>buffers,>plans,>heap,>imported,"
        ">saved,>in flight",
        columns, "no sessions", out);
}

/* "2 (rank 3 waits: session gone)": which ranks a group is missing or waiting for. */
static void print_ranks(const json_t *group, FILE *out)
{
    static const struct column columns[] = {
        {"rank", COLUMN_PLAIN},        {"present", COLUMN_PLAIN},     {"session_id", COLUMN_PLAIN},
        {"pid", COLUMN_PLAIN},         {"device_idx", COLUMN_PLAIN},  {"queued", COLUMN_COUNT},
        {"waiting_for", COLUMN_PLAIN}, {"heap_bytes", COLUMN_MEMORY},
    };
    print_list(field_array(group, "ranks"), ">  rank,present,>session,>pid,>device,>queued,awaited,>heap",
               columns, "  no ranks", out);
}

static void print_unrecorded(const json_t *group, FILE *out)
{
    char text[QUANTITY_BYTES];
    const double n = field_number(group, "unrecorded_plans");
    if (n > 0)
        fprintf(out, "  plans that run launch by launch though [cuda] graphs is on: %s (%s)\n",
                quantity_count(text, n), field_text(group, "unrecorded_reason", "-"));
}

void groups_view(const json_t *document, FILE *out)
{
    const json_t *groups = field_array(document, "groups");
    if (json_array_size(groups) == 0)
        fprintf(out, "no groups\n");
    size_t idx;
    json_t *group;
    json_array_foreach (groups, idx, group) {
        char id[40], size[40], dtype[40], text[QUANTITY_BYTES], more[QUANTITY_BYTES], last[QUANTITY_BYTES];
        fprintf(out, "%sgroup %s \"%s\": %s, %s ranks, %s", idx ? "\n" : "",
                field_print(group, "group_id", id, sizeof(id)), field_text(group, "name", "-"),
                field_text(group, "state", "-"), field_print(group, "world_size", size, sizeof(size)),
                field_print(group, "dtype", dtype, sizeof(dtype)));
        fprintf(out, ", hidden %s, ffn %s", quantity_count(text, field_number(group, "hidden")),
                quantity_count(more, field_number(group, "ffn")));
        fprintf(out, ", %s experts, top-%s", quantity_count(text, field_number(group, "n_experts")),
                quantity_count(more, field_number(group, "top_k")));
        fprintf(out, ", up to %s tokens\n", quantity_count(text, field_number(group, "max_tokens")));
        if (*field_text(group, "reason", ""))
            fprintf(out, "  reason: %s\n", field_text(group, "reason", ""));
        fprintf(out, "  capacity %s rows, overflow %s, epoch %s, deadline %s, exchange %s\n",
                quantity_count(text, field_number(group, "capacity_rows")),
                field_text(group, "overflow", "-"), field_print(group, "epoch", id, sizeof(id)),
                quantity_duration(more, field_number(group, "deadline_ms") * 1e6),
                field_text(group, "exchange", "-"));
        fprintf(out, "  steps %s, failed %s, in flight %s\n",
                quantity_count(text, field_number(group, "launches")),
                quantity_count(more, field_number(group, "failed")),
                quantity_count(last, field_number(group, "in_flight")));
        print_unrecorded(group, out);
        print_ranks(group, out);
    }
}

void plans_view(const json_t *document, FILE *out)
{
    static const struct column columns[] = {
        {"plan_id", COLUMN_PLAIN},  {"op", COLUMN_PLAIN},           {"session_id", COLUMN_PLAIN},
        {"group_id", COLUMN_PLAIN}, {"rank", COLUMN_PLAIN},         {"plan_key", COLUMN_PLAIN},
        {"state", COLUMN_PLAIN},    {"saved_bytes", COLUMN_MEMORY}, {"launches", COLUMN_COUNT},
        {"failed", COLUMN_COUNT},   {"queued", COLUMN_COUNT},       {"in_flight", COLUMN_COUNT},
    };
    print_list(field_array(document, "plans"),
               ">id,op,>session,>group,>rank,>key,state,>saved,>launches,>failed,>queued,>in flight", columns,
               "no plans", out);
}

void devices_view(const json_t *document, FILE *out)
{
    static const struct column columns[] = {
        {"device_idx", COLUMN_PLAIN},      {"name", COLUMN_PLAIN},        {"uuid", COLUMN_UUID},
        {"memory_bytes", COLUMN_MEMORY},   {"heap_bytes", COLUMN_MEMORY}, {"heap_peak_bytes", COLUMN_MEMORY},
        {"imported_bytes", COLUMN_MEMORY}, {"n_imports", COLUMN_COUNT},   {"jobs_done", COLUMN_COUNT},
        {"jobs_queued", COLUMN_COUNT},     {"busy_ns", COLUMN_NS},
    };
    print_list(field_array(document, "devices"),
               ">device,name,uuid,>memory,>heap,>heap peak,>imported,>imports,>jobs,>queued,>busy", columns,
               "no devices", out);
}

/* "1 3" */
static const char *missing_ranks(const json_t *op, char *text, size_t bytes)
{
    size_t idx, length = 0;
    json_t *rank;
    text[0] = 0;
    json_array_foreach (field_array(op, "missing"), idx, rank) {
        if (length < bytes)
            length += (size_t)snprintf(text + length, bytes - length, "%s%" JSON_INTEGER_FORMAT,
                                       idx ? " " : "", json_integer_value(rank));
    }
    return text;
}

/* "gemm 383 us" of the slowest rank; "" where the host cannot know. */
static const char *longest_phase(const json_t *op, char *text, size_t bytes)
{
    char duration[QUANTITY_BYTES];
    const char *name;
    double longest = 0;
    json_t *ns;
    text[0] = 0;
    json_object_foreach (field_object(op, "phase_ns"), name, ns) {
        if (!(json_number_value(ns) > longest))
            continue;
        longest = json_number_value(ns);
        (void)snprintf(text, bytes, "%s %s", name, quantity_duration(duration, longest));
    }
    return text;
}

/* What a step does not have yet: how it ended while it runs, and how long it lay in the queue while ranks are missing. */
static int is_to_come(const json_t *op, const char *key)
{
    const char *state = field_text(op, "state", "");
    const int gathers = strcmp(state, "gathering") == 0;
    if (!gathers && strcmp(state, "running") != 0)
        return 0;
    return strcmp(key, "status") == 0 || strcmp(key, "phase") == 0 || strcmp(key, "run_ns") == 0 ||
           (gathers && strcmp(key, "wait_ns") == 0);
}

void dump_view(const json_t *document, size_t max_ops, FILE *out)
{
    static const struct column columns[] = {
        {"serial", COLUMN_PLAIN}, {"group_id", COLUMN_PLAIN}, {"ordinal", COLUMN_PLAIN},
        {"op", COLUMN_PLAIN},     {"state", COLUMN_PLAIN},    {"status", COLUMN_PLAIN},
        {"phase", COLUMN_PLAIN},  {"rank", COLUMN_IDX},       {"age_ms", COLUMN_AGE_MS},
        {"gather_ns", COLUMN_NS}, {"wait_ns", COLUMN_NS},     {"run_ns", COLUMN_NS},
    };
    const size_t n_columns = sizeof(columns) / sizeof(columns[0]);
    struct table table;
    table_init(&table, ">serial,>group,>step,op,state,status,failed in,>rank,>age,>wait,>queue,>run,longest "
                       "phase,missing,text");
    const json_t *ops = field_array(document, "ops");
    const size_t n_ops = json_array_size(ops);
    for (size_t i = max_ops && n_ops > max_ops ? n_ops - max_ops : 0; i < n_ops; i++) {
        const json_t *op = json_array_get(ops, i);
        char missing[256], phase[64];
        for (size_t column = 0; column < n_columns; column++)
            if (is_to_come(op, columns[column].key))
                table_add(&table, "-");
            else
                add_cell(&table, op, &columns[column]);
        table_add(&table, longest_phase(op, phase, sizeof(phase)));
        table_add(&table, missing_ranks(op, missing, sizeof(missing)));
        table_add(&table, field_text(op, "text", ""));
    }
    if (table_n_rows(&table) == 0)
        fprintf(out, "the flight recorder is empty\n");
    table_print(&table, out);
    table_fini(&table);
}
