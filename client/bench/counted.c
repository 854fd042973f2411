#include "client/bench/counted.h"

#include <jansson.h>
#include <string.h>

/* The daemon's name for what the job launches. */
static const char *daemon_op(enum job_op op)
{
    switch (op) {
    case JOB_HANDOFF_BARRIER:
        return "barrier";
    case JOB_HANDOFF_GROUPED_GEMM:
        return "grouped_gemm";
    case JOB_COMBINE_WEIGHTED:
        return "combine";
    default:
        return job_op_name(op);
    }
}

static double number_in(const json_t *entry, const char *name)
{
    const json_t *value = json_object_get(entry, name);
    return json_is_number(value) ? json_number_value(value) : -1;
}

struct counted counted_in(const char *document, enum job_op op)
{
    json_t *stats = json_loads(document, 0, NULL), *ops = json_object_get(stats, "ops"), *entry;
    struct counted counted = json_is_array(ops) ? (struct counted){0} : COUNTED_NONE;
    size_t idx;
    json_array_foreach (ops, idx, entry) {
        const char *name = json_string_value(json_object_get(entry, "op"));
        if (name && strcmp(name, daemon_op(op)) == 0)
            counted = (struct counted){.launches = number_in(entry, "launches"),
                                       .copied_bytes = number_in(entry, "copied_bytes"),
                                       .network_bytes = number_in(entry, "network_bytes")};
    }
    json_decref(stats);
    return counted;
}

static double growth(double before, double after)
{
    return before < 0 || after < before ? -1 : after - before;
}

struct counted counted_between(const struct counted *before, const struct counted *after)
{
    return (struct counted){.launches = growth(before->launches, after->launches),
                            .copied_bytes = growth(before->copied_bytes, after->copied_bytes),
                            .network_bytes = growth(before->network_bytes, after->network_bytes)};
}
