/* A real epd on the host backend in a directory of its own, for one test. One thread. */
#ifndef EPD_TESTS_UNIT_DAEMON_EPD_PROCESS_H
#define EPD_TESTS_UNIT_DAEMON_EPD_PROCESS_H

#include <sys/types.h>

struct epd_process {
    char directory[64], socket[96], control[96];
    pid_t pid; /* of the supervisor; 0 once reaped */
};

/* Makes the directory and the paths only. */
void epd_prepare(struct epd_process *epd);
/* Starts EPD_BINARY with these flags (NULL at the end) after backend, devices and sockets; does not wait. */
void epd_spawn(struct epd_process *epd, const char *const *flags);
/* Prepares, spawns, waits until the worker serves. */
void epd_start(struct epd_process *epd, const char *const *flags);
/* Waits for the end; the exit code, or 128 + signal. Fails the test after 10 s. */
int epd_wait(struct epd_process *epd);
/* SIGTERM, wait, remove the directory; the exit code must be 0. */
void epd_stop(struct epd_process *epd);
/* Removes the directory with everything in it. */
void epd_clean(struct epd_process *epd);
/* A number in the status document, such as "pid". */
long epd_status_number(const struct epd_process *epd, const char *key);

#endif
