#include "client/epdctl/step_time.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

#include "client/epdctl/field.h"

/* What grew since before; 0 where it is not known. */
static double grown(double now, double before)
{
    const double more = now - (isnan(before) ? 0 : before);
    return more > 0 ? more : 0;
}

/* Total time of a histogram. */
static double histogram_ns(const json_t *op, const char *key)
{
    return field_number_in(op, key, "count") * field_number_in(op, key, "mean");
}

static double *find_phase(struct step_time *time, const char *name)
{
    size_t i = 0;
    while (i < time->n_phases && strcmp(time->phases[i].name, name) != 0)
        i++;
    if (i == STEP_TIME_MAX_PHASES)
        return NULL;
    if (i == time->n_phases) {
        (void)snprintf(time->phases[i].name, sizeof(time->phases[i].name), "%s", name);
        time->phases[i].ns = 0;
        time->n_phases++;
    }
    return &time->phases[i].ns;
}

/* Lanes work side by side: what all ranks spent is divided by their number, and by what they overlap beyond the step. */
static void take_phases(struct step_time *time, const json_t *op, const json_t *before, double n_ranks)
{
    const json_t *earlier = field_object(before, "phase_ns");
    const char *name;
    double sum = 0;
    json_t *ns;
    json_object_foreach (field_object(op, "phase_ns"), name, ns) {
        double *phase = strcmp(name, "gather") == 0 ? NULL : find_phase(time, name);
        if (phase)
            sum += *phase = grown(json_number_value(ns), field_number(earlier, name)) / n_ranks;
    }
    for (size_t i = 0; sum > time->run_ns && i < time->n_phases; i++)
        time->phases[i].ns *= time->run_ns / sum;
}

void step_time_take(struct step_time *time, const json_t *op, const json_t *before)
{
    *time = (struct step_time){
        .n_steps = grown(field_number_in(op, "run_ns", "count"), field_number_in(before, "run_ns", "count")),
        .wait_ns = grown(histogram_ns(op, "gather_ns"), histogram_ns(before, "gather_ns")),
        .run_ns = grown(histogram_ns(op, "run_ns"), histogram_ns(before, "run_ns")),
    };
    const double launches = field_growth(op, before, "launches");
    if (time->n_steps > 0 && launches > 0)
        take_phases(time, op, before, launches > time->n_steps ? launches / time->n_steps : 1);
}

void step_time_add(struct step_time *time, const struct step_time *more)
{
    time->n_steps += more->n_steps;
    time->wait_ns += more->wait_ns;
    time->run_ns += more->run_ns;
    for (size_t i = 0; i < more->n_phases; i++) {
        double *phase = find_phase(time, more->phases[i].name);
        if (phase)
            *phase += more->phases[i].ns;
    }
}

double step_time_total_ns(const struct step_time *time)
{
    return time->wait_ns + time->run_ns;
}

double step_time_phase_ns(const struct step_time *time, const char *name)
{
    for (size_t i = 0; i < time->n_phases; i++)
        if (strcmp(time->phases[i].name, name) == 0)
            return time->phases[i].ns;
    return 0;
}

double step_time_rest_ns(const struct step_time *time)
{
    double rest = time->run_ns;
    for (size_t i = 0; i < time->n_phases; i++)
        rest -= time->phases[i].ns;
    return rest > 0 ? rest : 0;
}
