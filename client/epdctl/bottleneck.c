#include "client/epdctl/bottleneck.h"

#include <math.h>
#include <string.h>

#include "client/epdctl/field.h"
#include "client/epdctl/quantity.h"

/* A waiting share below this is not worth a sentence. */
#define WORTH_SAYING 0.1
/* The busiest expert may have this many times the mean before it is called uneven. */
#define UNEVEN_RATIO 1.5

const json_t *bottleneck_late_rank(const json_t *group)
{
    const json_t *latest = NULL;
    double held_up = 0;
    size_t idx;
    json_t *rank;
    json_array_foreach (field_array(group, "ranks"), idx, rank) {
        if (field_number(rank, "held_up_ns") > held_up) {
            held_up = field_number(rank, "held_up_ns");
            latest = rank;
        }
    }
    return latest;
}

/* Total time of a histogram: count * mean. */
static double total_ns(const json_t *op, const char *key)
{
    const double total = field_number_in(op, key, "count") * field_number_in(op, key, "mean");
    return isnan(total) ? 0 : total;
}

static void print_waiting(const json_t *stats, double gather_ns, double run_ns, FILE *out)
{
    const json_t *worst_group = NULL, *worst_rank = NULL;
    size_t idx;
    json_t *group;
    json_array_foreach (field_array(stats, "groups"), idx, group) {
        const json_t *rank = bottleneck_late_rank(group);
        if (rank &&
            (!worst_rank || field_number(rank, "held_up_ns") > field_number(worst_rank, "held_up_ns"))) {
            worst_rank = rank;
            worst_group = group;
        }
    }
    char share[QUANTITY_BYTES], held_up[QUANTITY_BYTES], times[QUANTITY_BYTES], number[40];
    fprintf(out, "holds back: %s of a step is waiting for the last rank to ask",
            quantity_share(share, gather_ns / (gather_ns + run_ns)));
    if (worst_rank)
        fprintf(out, "; rank %s of group \"%s\" came last %s times and held the others up for %s",
                field_print(worst_rank, "rank", number, sizeof(number)), field_text(worst_group, "name", "-"),
                quantity_count(times, field_number(worst_rank, "came_last")),
                quantity_duration(held_up, field_number(worst_rank, "held_up_ns")));
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
                "mostly "
                "expert %s\n",
                field_text(group, "name", "-"), quantity_ratio(ratio, field_number(group, "imbalance_mean")),
                field_print(group, "hottest_expert", number, sizeof(number)));
    }
}

/* The phase in which the lanes spent most time, over all ops. */
static void print_phase(const json_t *stats, FILE *out)
{
    char names[16][24];
    double sums[16] = {0}, total = 0;
    size_t n_names = 0, idx, best = 0;
    json_t *op, *ns;
    json_array_foreach (field_array(stats, "ops"), idx, op) {
        const char *name;
        json_object_foreach (field_object(op, "phase_ns"), name, ns) {
            size_t slot = 0;
            while (slot < n_names && strcmp(names[slot], name) != 0)
                slot++;
            if (slot == 16 || strcmp(name, "gather") == 0)
                continue;
            if (slot == n_names)
                (void)snprintf(names[n_names++], sizeof(names[0]), "%s", name);
            sums[slot] += json_number_value(ns);
            total += json_number_value(ns);
        }
    }
    for (size_t slot = 1; slot < n_names; slot++)
        best = sums[slot] > sums[best] ? slot : best;
    char share[QUANTITY_BYTES];
    if (total > 0)
        fprintf(out, "most work: phase %s, %s of the time in steps\n", names[best],
                quantity_share(share, sums[best] / total));
}

void bottleneck_print(const json_t *stats, FILE *out)
{
    double gather_ns = 0, run_ns = 0;
    size_t idx;
    json_t *op;
    json_array_foreach (field_array(stats, "ops"), idx, op) {
        gather_ns += total_ns(op, "gather_ns");
        run_ns += total_ns(op, "run_ns");
    }
    if (gather_ns > WORTH_SAYING * (gather_ns + run_ns))
        print_waiting(stats, gather_ns, run_ns, out);
    print_uneven(stats, out);
    print_phase(stats, out);
}
