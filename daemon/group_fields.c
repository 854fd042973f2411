#include "daemon/group_fields.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>

static const char *const names[GROUP_N_FIELDS] = {"n_experts",  "top_k",         "hidden",    "ffn",
                                                  "max_tokens", "capacity_rows", "alignment", "dtype",
                                                  "overflow",   "deadline_ms",   "n_nodes"};

const char *group_field_name(size_t field)
{
    return names[field];
}

void group_field_values(const struct message_group_config *config, int64_t values[GROUP_N_FIELDS])
{
    const uint32_t n_nodes = config->n_nodes ? config->n_nodes : 1; /* two words for the same */
    const int64_t all[GROUP_N_FIELDS] = {config->n_experts,
                                         config->top_k,
                                         config->hidden,
                                         config->ffn,
                                         config->max_tokens,
                                         config->capacity_rows,
                                         config->alignment,
                                         config->dtype,
                                         config->overflow,
                                         config->deadline_ms,
                                         n_nodes};
    memcpy(values, all, sizeof(all));
}

void group_field_format(size_t field, int64_t value, char *text, size_t bytes)
{
    if (strcmp(names[field], "dtype") == 0)
        (void)snprintf(text, bytes, "%s", dtype_name((enum epd_dtype)value));
    else
        (void)snprintf(text, bytes, "%" PRId64, value);
}
