/* What the kernel says of another process, from /proc. Any thread. */
#ifndef EPD_DAEMON_PROCESS_H
#define EPD_DAEMON_PROCESS_H

#include <stddef.h>
#include <sys/types.h>

/* 1 if the process is ending, or gone: with GPUs the kernel takes seconds to take down what it had. */
int process_ending(pid_t pid);
/* 1 if it does not run because somebody looks at it: a debugger is attached, or its core is being written. */
int process_held(pid_t pid);
/* "state S wchan futex_wait_queue": what its main thread is at, as far as the kernel tells us. */
void process_describe(pid_t pid, char *text, size_t bytes);

#endif
