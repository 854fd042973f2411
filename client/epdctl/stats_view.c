#include "client/epdctl/stats_view.h"

#include <math.h>
#include <string.h>

#include "client/epdctl/bottleneck.h"
#include "client/epdctl/field.h"
#include "client/epdctl/quantity.h"
#include "client/epdctl/status_view.h"
#include "client/epdctl/table.h"

static void add_count(struct table *table, double count)
{
    char text[QUANTITY_BYTES];
    table_add(table, quantity_count(text, count));
}

static void add_duration(struct table *table, double ns)
{
    char text[QUANTITY_BYTES];
    table_add(table, quantity_duration(text, ns));
}

static void add_rate(struct table *table, double amount, double seconds, const char *unit)
{
    char text[QUANTITY_BYTES];
    table_add(table, quantity_rate(text, amount / seconds, unit));
}

/* Failures, drops and copies are few or none: their number says more than a rate. */
static void add_op_totals(struct table *table, const json_t *op)
{
    char text[QUANTITY_BYTES];
    add_count(table, field_number(op, "launches"));
    add_count(table, field_number(op, "failed"));
    add_count(table, field_number(op, "dropped_rows"));
    table_add(table, quantity_memory(text, field_number(op, "copied_bytes")));
}

static void add_op_rates(struct table *table, const json_t *op, const json_t *before, double seconds)
{
    add_rate(table, field_growth(op, before, "launches"), seconds, "");
    add_rate(table, field_growth(op, before, "tokens"), seconds, "");
    add_rate(table, field_growth(op, before, "rows"), seconds, "");
    add_rate(table, field_growth(op, before, "wire_bytes"), seconds, "B");
    add_rate(table, field_growth(op, before, "network_bytes"), seconds, "B");
}

/* FLOP per second while the GEMMs ran: what the processor or GPU gave, not what the node was asked for. */
static void add_gemm_speed(struct table *table, const json_t *op, const json_t *before)
{
    char text[QUANTITY_BYTES];
    const json_t *phases = field_object(op, "phase_ns"), *earlier = field_object(before, "phase_ns");
    const double gemm = field_growth(phases, earlier, "gemm"), wgrad = field_growth(phases, earlier, "wgrad");
    const double ns = (isnan(gemm) ? 0 : gemm) + (isnan(wgrad) ? 0 : wgrad);
    const double flops = field_growth(op, before, "flops");
    table_add(table, quantity_rate(text, ns > 0 && flops > 0 ? flops / (ns * 1e-9) : NAN, "FLOP"));
}

static void print_ops(const json_t *stats, const json_t *before, double seconds, FILE *out)
{
    struct table table;
    table_init(
        &table,
        "op,>launches,>failed,>dropped,>copied,>launches/s,>tokens/s,>rows/s,>sent,>network,>GEMM speed,"
        ">wait p50,>wait p99,>run p50,>run p99,>run max");
    size_t idx;
    json_t *op;
    json_array_foreach (field_array(stats, "ops"), idx, op) {
        if (!(field_number(op, "launches") > 0))
            continue;
        table_add(&table, field_text(op, "op", "-"));
        const json_t *earlier = bottleneck_find(before, "ops", "op", op);
        add_op_totals(&table, op);
        add_op_rates(&table, op, earlier, seconds);
        add_gemm_speed(&table, op, earlier);
        add_duration(&table, field_number_in(op, "gather_ns", "p50"));
        add_duration(&table, field_number_in(op, "gather_ns", "p99"));
        add_duration(&table, field_number_in(op, "run_ns", "p50"));
        add_duration(&table, field_number_in(op, "run_ns", "p99"));
        add_duration(&table, field_number_in(op, "run_ns", "max"));
    }
    if (table_n_rows(&table) == 0)
        fprintf(out, "nothing has been launched yet\n");
    table_print(&table, out);
    table_fini(&table);
}

static void print_groups(const json_t *stats, const json_t *before, double seconds, FILE *out)
{
    struct table table;
    table_init(&table, ">group,name,>steps,>steps/s,>failed,>imbalance now,>mean,>hottest expert,>latest "
                       "rank,>last in,>held up");
    size_t idx;
    json_t *group;
    json_array_foreach (field_array(stats, "groups"), idx, group) {
        char text[80], ratio[QUANTITY_BYTES];
        const json_t *earlier = bottleneck_find(before, "groups", "group_id", group);
        const struct late_rank late = bottleneck_late_rank(group, earlier);
        table_add(&table, field_print(group, "group_id", text, sizeof(text)));
        table_add(&table, field_text(group, "name", "-"));
        add_count(&table, field_number(group, "launches"));
        add_rate(&table, field_growth(group, earlier, "launches"), seconds, "");
        add_count(&table, field_number(group, "failed"));
        table_add(&table, quantity_ratio(ratio, field_number(group, "imbalance_last")));
        table_add(&table, quantity_ratio(ratio, field_number(group, "imbalance_mean")));
        table_add(&table, field_print(group, "hottest_expert", text, sizeof(text)));
        table_add(&table, field_print(late.rank, "rank", text, sizeof(text)));
        table_add(&table, quantity_share(ratio, late.rank ? late.n_times / late.n_steps : NAN));
        add_duration(&table, late.rank ? late.held_up_ns : NAN);
    }
    if (table_n_rows(&table) > 0)
        fputc('\n', out);
    table_print(&table, out);
    table_fini(&table);
}

/* busy: share of the time between the documents, or since the start, that the lane spent in jobs. */
static void print_devices(const json_t *stats, const json_t *before, double seconds, FILE *out)
{
    struct table table;
    table_init(&table, ">device,name,>busy,>heap,>heap peak,>imported,>jobs,>queued");
    size_t idx;
    json_t *device;
    json_array_foreach (field_array(stats, "devices"), idx, device) {
        char text[80], quantity[QUANTITY_BYTES];
        const json_t *earlier = bottleneck_find(before, "devices", "device_idx", device);
        table_add(&table, field_print(device, "device_idx", text, sizeof(text)));
        table_add(&table, field_text(device, "name", "-"));
        table_add(&table,
                  quantity_share(quantity, field_growth(device, earlier, "busy_ns") * 1e-9 / seconds));
        table_add(&table, quantity_memory(quantity, field_number(device, "heap_bytes")));
        table_add(&table, quantity_memory(quantity, field_number(device, "heap_peak_bytes")));
        table_add(&table, quantity_memory(quantity, field_number(device, "imported_bytes")));
        add_count(&table, field_growth(device, earlier, "jobs_done"));
        add_count(&table, field_number(device, "jobs_queued"));
    }
    if (table_n_rows(&table) > 0)
        fputc('\n', out);
    table_print(&table, out);
    table_fini(&table);
}

/* "label: name 3, name 1" for the counters of an object that are not 0. */
static void print_counters(const json_t *object, const char *label, FILE *out)
{
    const char *name;
    json_t *count;
    int n_printed = 0;
    json_object_foreach ((json_t *)object, name, count) {
        if (json_is_number(count) && json_number_value(count) > 0)
            fprintf(out, "%s%s %.0f", n_printed++ ? ", " : label, name, json_number_value(count));
    }
    if (n_printed)
        fputc('\n', out);
}

static int has_run(const json_t *stats, const json_t *before)
{
    size_t idx;
    json_t *op;
    json_array_foreach (field_array(stats, "ops"), idx, op) {
        if (field_growth(op, bottleneck_find(before, "ops", "op", op), "launches") > 0)
            return 1;
    }
    return 0;
}

/* Says what the rates are of. Where nothing has run since the earlier document, it is left out of what follows. */
static void print_period(const json_t *stats, const json_t **before, double *seconds, FILE *out)
{
    char text[QUANTITY_BYTES];
    if (*before && has_run(stats, *before)) {
        fprintf(out, "rates and late ranks: of the last %s; p50, p99, max: since the start\n\n",
                quantity_duration(text, *seconds * 1e9));
        return;
    }
    if (*before)
        fprintf(out, "nothing was launched in the last %s: ", quantity_duration(text, *seconds * 1e9));
    fprintf(out, "everything is since the start\n\n");
    *before = NULL;
    *seconds = field_number(stats, "uptime_ms") / 1000;
}

void stats_view(const json_t *stats, const json_t *before, FILE *out)
{
    const json_t *sessions = field_object(stats, "sessions");
    char memory[QUANTITY_BYTES], fds[QUANTITY_BYTES], open[QUANTITY_BYTES], opened[QUANTITY_BYTES];
    double seconds = field_growth(stats, before, "uptime_ms") / 1000;
    status_view_headline(stats, out);
    fprintf(out, "sessions %s open, %s since the start; daemon memory %s, open files %s\n",
            quantity_count(open, field_number(sessions, "open")),
            quantity_count(opened, field_number(sessions, "opened")),
            quantity_memory(memory, field_number(stats, "rss_bytes")),
            quantity_count(fds, field_number(stats, "fds")));
    print_period(stats, &before, &seconds, out);
    print_ops(stats, before, seconds, out);
    print_groups(stats, before, seconds, out);
    print_devices(stats, before, seconds, out);
    fputc('\n', out);
    bottleneck_print(stats, before, out);
    print_counters(field_object(stats, "failed_launches"), "failed launches: ", out);
    print_counters(field_object(stats, "errors"), "refused requests: ", out);
    print_counters(field_object(stats, "limits_hit"), "limits hit, times: ", out);
    print_counters(field_object(sessions, "closed"), "sessions closed, by reason: ", out);
}
