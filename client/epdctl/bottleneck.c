#include "client/epdctl/bottleneck.h"

#include <math.h>
#include <string.h>

#include "client/epdctl/field.h"
#include "client/epdctl/quantity.h"
#include "client/epdctl/step_time.h"
#include "client/epdctl/table.h"

/* A waiting share below this is not worth a sentence. */
#define WORTH_SAYING 0.1
/* The busiest expert may have this many times the mean before it is called uneven. */
#define UNEVEN_RATIO 1.5

const json_t *bottleneck_find(const json_t *document, const char *key, const char *id_key, const json_t *like)
{
    const json_t *id = json_object_get(like, id_key);
    size_t idx;
    json_t *object;
    json_array_foreach (field_array(document, key), idx, object) {
        if (id && json_equal(json_object_get(object, id_key), id))
            return object;
    }
    return NULL;
}

struct late_rank bottleneck_late_rank(const json_t *group, const json_t *before)
{
    struct late_rank latest = {.n_steps = field_growth(group, before, "launches")};
    size_t idx;
    json_t *rank;
    json_array_foreach (field_array(group, "ranks"), idx, rank) {
        const json_t *earlier = bottleneck_find(before, "ranks", "rank", rank);
        const double held_up_ns = field_growth(rank, earlier, "held_up_ns");
        if (!(held_up_ns > latest.held_up_ns))
            continue;
        latest.group = group;
        latest.rank = rank;
        latest.n_times = field_growth(rank, earlier, "came_last");
        latest.held_up_ns = held_up_ns;
    }
    return latest;
}

static struct late_rank worst_late_rank(const json_t *stats, const json_t *before)
{
    struct late_rank worst = {0};
    size_t idx;
    json_t *group;
    json_array_foreach (field_array(stats, "groups"), idx, group) {
        const struct late_rank late =
            bottleneck_late_rank(group, bottleneck_find(before, "groups", "group_id", group));
        if (late.held_up_ns > worst.held_up_ns)
            worst = late;
    }
    return worst;
}

static void print_waiting(const json_t *stats, const json_t *before, const struct step_time *sum, FILE *out)
{
    const struct late_rank late = worst_late_rank(stats, before);
    char share[QUANTITY_BYTES], held_up[QUANTITY_BYTES], times[QUANTITY_BYTES], steps[QUANTITY_BYTES],
        number[40];
    fprintf(out, "holds back: %s of a step is waiting for the last rank to ask",
            quantity_share(share, sum->wait_ns / step_time_total_ns(sum)));
    if (late.rank)
        fprintf(out, "; rank %s of group \"%s\" came last in %s of %s steps and held the others up for %s",
                field_print(late.rank, "rank", number, sizeof(number)), field_text(late.group, "name", "-"),
                quantity_count(times, late.n_times), quantity_count(steps, late.n_steps),
                quantity_duration(held_up, late.held_up_ns));
    fputc('\n', out);
}

static void print_uneven(const json_t *stats, FILE *out)
{
    size_t idx;
    json_t *group;
    json_array_foreach (field_array(stats, "groups"), idx, group) {
        char ratio[QUANTITY_BYTES], number[40];
        if (!(field_number(group, "imbalance_mean") >= UNEVEN_RATIO))
            continue;
        fprintf(out,
                "holds back: the experts of group \"%s\" are loaded unevenly: the busiest gets %s the mean, "
                "mostly expert %s\n",
                field_text(group, "name", "-"), quantity_ratio(ratio, field_number(group, "imbalance_mean")),
                field_print(group, "hottest_expert", number, sizeof(number)));
    }
}

/* What the time that is in no phase was spent with. */
static const char *rest_name(const struct step_time *sum)
{
    return sum->n_phases ? "lanes that wait for each other or for a processor"
                         : "work on the device, with its queue";
}

/* The largest part of a step, whatever it is. */
static void print_largest(const struct step_time *sum, FILE *out)
{
    const char *name = "waiting for the last rank to ask";
    double largest = sum->wait_ns;
    char phase[STEP_TIME_NAME_BYTES + 16], share[QUANTITY_BYTES];
    for (size_t i = 0; i < sum->n_phases; i++) {
        if (sum->phases[i].ns <= largest)
            continue;
        largest = sum->phases[i].ns;
        (void)snprintf(phase, sizeof(phase), "phase %s", sum->phases[i].name);
        name = phase;
    }
    if (step_time_rest_ns(sum) > largest) {
        largest = step_time_rest_ns(sum);
        name = rest_name(sum);
    }
    fprintf(out, "bottleneck: %s, %s of a step\n", name,
            quantity_share(share, largest / step_time_total_ns(sum)));
}

static void add_share(struct table *table, double ns, const struct step_time *time)
{
    char text[QUANTITY_BYTES];
    table_add(table, quantity_share(text, ns / step_time_total_ns(time)));
}

/* One row per op; `sum` has the phases of all of them. */
static void print_parts(const json_t *stats, const json_t *before, const struct step_time *sum, FILE *out)
{
    char titles[(STEP_TIME_MAX_PHASES + 4) * (STEP_TIME_NAME_BYTES + 2)] = "op,>mean step,>wait";
    struct table table;
    for (size_t i = 0; i < sum->n_phases; i++) {
        strcat(titles, ",>");
        strcat(titles, sum->phases[i].name);
    }
    strcat(titles, sum->n_phases ? ",>lanes wait" : ",>device");
    table_init(&table, titles);
    size_t idx;
    json_t *op;
    json_array_foreach (field_array(stats, "ops"), idx, op) {
        struct step_time time;
        char text[QUANTITY_BYTES];
        step_time_take(&time, op, bottleneck_find(before, "ops", "op", op));
        if (!(step_time_total_ns(&time) > 0))
            continue;
        table_add(&table, field_text(op, "op", "-"));
        table_add(&table, quantity_duration(text, step_time_total_ns(&time) / time.n_steps));
        add_share(&table, time.wait_ns, &time);
        for (size_t i = 0; i < sum->n_phases; i++)
            add_share(&table, step_time_phase_ns(&time, sum->phases[i].name), &time);
        add_share(&table, step_time_rest_ns(&time), &time);
    }
    table_print(&table, out);
    table_fini(&table);
}

static struct step_time sum_ops(const json_t *stats, const json_t *before)
{
    struct step_time sum = {0};
    size_t idx;
    json_t *op;
    json_array_foreach (field_array(stats, "ops"), idx, op) {
        struct step_time time;
        step_time_take(&time, op, bottleneck_find(before, "ops", "op", op));
        step_time_add(&sum, &time);
    }
    return sum;
}

void bottleneck_print(const json_t *stats, const json_t *before, FILE *out)
{
    char period[QUANTITY_BYTES];
    struct step_time sum = sum_ops(stats, before);
    if (before && !(step_time_total_ns(&sum) > 0)) {
        before = NULL;
        sum = sum_ops(stats, NULL);
    }
    if (!(step_time_total_ns(&sum) > 0))
        return;
    if (before)
        fprintf(out, "where the time of a step went in the last %s\n",
                quantity_duration(period, 1e6 * field_growth(stats, before, "uptime_ms")));
    else
        fprintf(out, "where the time of a step went since the start\n");
    print_parts(stats, before, &sum, out);
    fputc('\n', out);
    print_largest(&sum, out);
    if (sum.wait_ns > WORTH_SAYING * step_time_total_ns(&sum))
        print_waiting(stats, before, &sum, out);
    print_uneven(stats, out);
}
