#include "client/bench/copied.h"

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

double copied_in(const char *document, enum job_op op)
{
    json_t *stats = json_loads(document, 0, NULL), *ops = json_object_get(stats, "ops"), *entry;
    double copied = json_is_array(ops) ? 0 : -1;
    size_t idx;
    json_array_foreach (ops, idx, entry) {
        const char *name = json_string_value(json_object_get(entry, "op"));
        const json_t *bytes = json_object_get(entry, "copied_bytes");
        if (name && strcmp(name, daemon_op(op)) == 0)
            copied = json_is_number(bytes) ? json_number_value(bytes) : -1;
    }
    json_decref(stats);
    return copied;
}

double copied_between(double before, double after)
{
    return before < 0 || after < before ? -1 : after - before;
}
