/* The command line of epd: one flag for every key of the configuration, and a few that say what to do. main
 * and supervisor. */
#ifndef EPD_DAEMON_OPTIONS_H
#define EPD_DAEMON_OPTIONS_H

#include <stdio.h>

#include "daemon/config.h"

enum options_action {
    OPTIONS_SERVE,
    OPTIONS_CHECK_CONFIG,
    OPTIONS_HELP,
    OPTIONS_VERSION,
    OPTIONS_WORKER, /* started by the supervisor */
};

struct options {
    int argc;
    char **argv; /* borrowed from main */
    enum options_action action;
    const char *config_file; /* borrowed from argv; NULL: none */
    uint64_t generation;     /* OPTIONS_WORKER */
    const char *last_exit;   /* OPTIONS_WORKER */
    uint64_t n_hangs;        /* OPTIONS_WORKER */
};

/* Looks at the whole command line; flags of the configuration are only checked for their names here. */
EPD_MUST_CHECK enum epd_status options_parse(struct options *options, int argc, char **argv,
                                             struct epd_error *error);
/* Defaults, then the file, then the flags; called again for each SIGHUP. */
EPD_MUST_CHECK enum epd_status options_load(const struct options *options, struct config *config,
                                            struct epd_error *error);
void options_help(FILE *file);

#endif
