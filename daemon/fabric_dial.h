/* How the links of a fabric begin: node 0 listens, the others look its address up and connect, with growing pauses. Loop
 * thread. */
#ifndef EPD_DAEMON_FABRIC_DIAL_H
#define EPD_DAEMON_FABRIC_DIAL_H

#include "daemon/fabric.h"

/* Node 0. EPD_INVALID_ARGUMENT, EPD_SYSTEM: not at this address. */
EPD_MUST_CHECK enum epd_status fabric_listen(struct fabric *fabric, struct epd_error *error);
/* The others: begins to connect if there is no link, nothing under way, and the pause is over. */
void fabric_dial(struct fabric *fabric, uint64_t now_ns);

#endif
