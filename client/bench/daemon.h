/* An epd of the benchmark's own: temporary folder, own sockets, own log; gone at the end. Owned by main. */
#ifndef EPD_BENCH_DAEMON_H
#define EPD_BENCH_DAEMON_H

#include <epd.h>
#include <sys/types.h>

struct daemon {
    char directory[96];
    char socket_path[128], control_path[128], log_path[128];
    pid_t pid; /* of the supervisor; 0 if none was started */
};

struct daemon_options {
    const char *program; /* NULL: beside epd-bench, in the build tree, or on PATH */
    const char *backend;
    const char *devices;                  /* NULL: the daemon's default */
    uint32_t n_nodes, node;               /* n_nodes 0 or 1: it is in no fabric */
    const char *rendezvous, *secret_path; /* of a fabric */
};

/* Starts it; it may still be opening its sockets (epd_open waits for them). Errors have been printed. */
enum epd_status daemon_start(struct daemon *daemon, const struct daemon_options *options);
/* Whether it has ended by itself; how has been printed. */
int daemon_has_ended(const struct daemon *daemon);
/* SIGTERM, waits, SIGKILL after DAEMON_STOP_S; removes the folder. Legal on a daemon that was not started. */
void daemon_stop(struct daemon *daemon);
/* The last lines of its log to stderr. */
void daemon_print_log(const struct daemon *daemon);

#endif
