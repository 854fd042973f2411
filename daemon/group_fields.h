/* The fields that all ranks of a group must agree on, for comparing and naming them, in a daemon and between daemons. */
#ifndef EPD_DAEMON_GROUP_FIELDS_H
#define EPD_DAEMON_GROUP_FIELDS_H

#include "proto/message.h"

#define GROUP_N_FIELDS 11

/* Position of max_tokens. */
#define GROUP_FIELD_TOKENS 4
/* Position of the deadline in milliseconds. */
#define GROUP_FIELD_DEADLINE 9
/* Position of the number of nodes. */
#define GROUP_FIELD_NODES 10

const char *group_field_name(size_t field);
void group_field_values(const struct message_group_config *config, int64_t values[GROUP_N_FIELDS]);
/* "64", or "bf16". */
void group_field_format(size_t field, int64_t value, char *text, size_t bytes);

#endif
