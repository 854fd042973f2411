/* The verbs that change something: drain and evict. */
#ifndef EPD_EPDCTL_ACT_H
#define EPD_EPDCTL_ACT_H

#include "client/epdctl/command.h"

/* The daemon finishes what is in flight, refuses new work and ends; a supervisor (systemd) may start it
 * again. */
enum command_exit act_drain(const struct command *command);
/* Closes the session command->session_id. */
enum command_exit act_evict(const struct command *command);

#endif
