/* The verbs that look: status, stats, clients, groups, plans, devices, dump, version. Each asks for one
 * document and shows it, once or every few seconds. */
#ifndef EPD_EPDCTL_LOOK_H
#define EPD_EPDCTL_LOOK_H

#include "client/epdctl/command.h"

enum command_exit look_run(const struct command *command, enum control_verb verb);
/* The versions of epdctl and, if one answers, of the daemon; always COMMAND_OK. */
enum command_exit look_version(const struct command *command);

#endif
