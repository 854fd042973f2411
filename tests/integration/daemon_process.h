/* A real `epd` for one test, the one of this build or that of EPD_TEST_EPD: own directory, own sockets, own log. Owned by the test; one
 * thread. */
#ifndef EPD_TESTS_INTEGRATION_DAEMON_PROCESS_H
#define EPD_TESTS_INTEGRATION_DAEMON_PROCESS_H

#include <limits.h>
#include <sys/types.h>

struct daemon_process {
    char directory[64];
    char socket_path[96];
    char control_path[96];
    char log_path[96];
    pid_t pid; /* of the supervisor; 0 when it has been reaped */
};

/* Starts epd on the host backend with n_devices emulated devices (0: on the backend that the arguments choose) and
 * the extra arguments (NULL-terminated, may be NULL) and waits until it accepts. Aborts the test with the log if it does not. */
void daemon_start(struct daemon_process *daemon, unsigned n_devices, const char *const *extra);
/* SIGTERM, waits, checks that the exit code is 0, removes the directory. */
void daemon_stop(struct daemon_process *daemon);
/* Pid of the worker process now, 0 if there is none. */
pid_t daemon_worker(const struct daemon_process *daemon);
/* Waits until a worker other than `old` is there; returns it. Aborts after 10 s. */
pid_t daemon_wait_worker(const struct daemon_process *daemon, pid_t old);
/* Open fds of a process, from /proc. */
int process_fds(pid_t pid);
/* Prints the daemon's log to stderr. */
void daemon_print_log(const struct daemon_process *daemon);

#endif
