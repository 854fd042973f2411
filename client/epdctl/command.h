/* The command line of epdctl, and what every verb gets. Filled once by main; strings point into argv. */
#ifndef EPD_EPDCTL_COMMAND_H
#define EPD_EPDCTL_COMMAND_H

#include <stdint.h>

#include "client/epdctl/link.h"

/* Exit codes; scripts rely on them, see epdctl(1). */
enum command_exit {
    COMMAND_OK = 0,
    COMMAND_REFUSED = 1,   /* the daemon refused or failed the request; doctor: something must be fixed */
    COMMAND_USAGE = 2,     /* wrong arguments */
    COMMAND_NO_DAEMON = 3, /* nobody answers at the control socket */
};

#define COMMAND_PATH_BYTES 256

struct command {
    char socket[COMMAND_PATH_BYTES];
    int timeout_ms;
    int json;
    int verbose;
    uint32_t watch_s;    /* 0: once */
    uint64_t max_ops;    /* of dump; 0: all */
    int has_last;        /* max_ops was given: it is of --json, too */
    uint64_t session_id; /* of evict */
    const char *reason;  /* of evict; NULL: the default */
};

/* One request over a connection of its own; prints the error and returns the exit code. *document may become
 * NULL where the daemon answers without one. */
enum command_exit command_request(const struct command *command, const struct message_control *control,
                                  json_t **document);
/* Writes a document as JSON text with a newline. */
void command_print_json(const json_t *document);

#endif
