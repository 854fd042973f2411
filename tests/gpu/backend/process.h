/* Processes of a GPU test: a real daemon, and the test program again as its clients. The parent uses no CUDA, which does not
 * survive a fork; clients are started anew. */
#ifndef EPD_TESTS_GPU_BACKEND_PROCESS_H
#define EPD_TESTS_GPU_BACKEND_PROCESS_H

#include <stdio.h>
#include <stdlib.h>
#include <sys/types.h>

/* What a test returns where there is no GPU. */
#define PROCESS_SKIPPED 77

#define MUST(condition)                                                                                      \
    do {                                                                                                     \
        if (!(condition)) {                                                                                  \
            process_fail(__FILE__, __LINE__, #condition);                                                    \
        }                                                                                                    \
    } while (0)

/* Prints libepd's and CUDA's last words, exits 1. */
_Noreturn void process_fail(const char *file, int line, const char *condition);

/* To the current GPU. It has arrived: cudaMemcpy of pageable memory may return before that, and no stream stands between it and
 * what another process then launches. */
void process_upload(void *to, const void *from, size_t bytes);

/* argv ends with NULL; argv[0] is executed. */
pid_t process_start(const char *const *argv);
/* The exit code; -1 if a signal ended it. */
int process_wait(pid_t pid);
/* main of the program started as "PROGRAM count": its exit code is the number of GPUs. */
int process_count_main(void);
/* Asks a child. */
int process_count_gpus(void);

struct process_daemon {
    char directory[32], socket_path[64], control_path[64];
    pid_t pid;
};

/* options: more arguments of epd, ended by NULL; may be NULL. */
void process_daemon_start(struct process_daemon *daemon, const char *epd, const char *const *options);
/* SIGTERM; 0 if it ended well. */
int process_daemon_stop(struct process_daemon *daemon);

double process_seconds(void);

/* Of the statistics' text, the first number behind "name": from `from` on; -1 if there is none. */
double process_number(const char *text, const char *from, const char *name);

#endif
