/* The supervisor process: keeps the sockets while workers come and go. It has no CUDA, no libuv and no
 * client: it binds or takes over the sockets, starts the worker (itself, by fork and exec), restarts it when
 * it fails, and passes signals on. One thread. */
#ifndef EPD_DAEMON_SUPERVISOR_H
#define EPD_DAEMON_SUPERVISOR_H

#include "daemon/inherited.h"
#include "daemon/log.h"
#include "daemon/options.h"

/* Exit codes of epd; 0 when it ended as it was asked to. */
enum supervisor_exit {
    SUPERVISOR_EXIT_DONE = 0,
    SUPERVISOR_EXIT_FAILED = 1,  /* sockets, or the worker did not end in time and was killed */
    SUPERVISOR_EXIT_CONFIG = 2,  /* bad options, or the worker cannot run with them */
    SUPERVISOR_EXIT_GAVE_UP = 4, /* restart_limit failures in a row */
};

/* At the end a record that is still being written is waited for, no longer than this. */
#define SUPERVISOR_RECORD_MS 2000

/* Runs until told to stop. config is the result of options_load; inherited fds are taken over. */
int supervisor_run(const struct options *options, const struct config *config,
                   const struct inherited *inherited, struct log *log);

#endif
