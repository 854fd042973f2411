/* The worker as its supervisor sees it: its start, what it has said so far, and until when it may live. Supervisor. */
#ifndef EPD_DAEMON_WORKER_PROCESS_H
#define EPD_DAEMON_WORKER_PROCESS_H

#include <signal.h>
#include <stdint.h>
#include <sys/types.h>

#include "daemon/config.h"
#include "daemon/inherited.h"
#include "daemon/log.h"
#include "daemon/loop_watch.h"

struct worker_process {
    pid_t pid;           /* 0: none */
    int channel_fd;      /* -1: none */
    uint64_t generation; /* workers started so far */
    uint64_t n_hangs;    /* of them, killed because their loop was stuck */
    uint64_t started_ns;
    uint64_t listens_ns; /* since when it serves: callers are its own; 0: not yet */
    uint64_t kill_at_ns; /* CLOCK_NEVER: it may live */
    int ends; /* it has said that its loop is over: it hears no signal any more, but would die of one */
    char killed_why[64]; /* "" while it was not killed by us */
    char last_exit[64];  /* how the newest that has ended did */
    struct loop_watch watch;
};

/* Fork and exec of this program. fds: what the worker gets but for its end of the channel; signals: its mask. It may live
 * until start_deadline, unless it serves. */
EPD_MUST_CHECK enum epd_status worker_process_start(struct worker_process *process,
                                                    const struct inherited *fds, const sigset_t *signals,
                                                    const struct config *config, struct epd_error *error);
/* It has said that it serves: from now on its loop is watched. */
void worker_process_serves(struct worker_process *process, const struct config *config);
/* The channel ends. */
void worker_process_hang_up(struct worker_process *process);
/* It has ended with this wait status: what is said of it, in last_exit. */
void worker_process_reaped(struct worker_process *process, int status);
/* Looks whether its loop comes round, and ends a worker whose loop does not: by SIGABRT, which leaves a core where the system
 * keeps them, and by SIGKILL (kill_at_ns) if that is not heard. */
void worker_process_watch(struct worker_process *process, const struct config *config, struct log *log,
                          uint64_t now_ns);
/* Its loop has come round. */
void worker_process_answers(struct worker_process *process, struct log *log);
/* 1: its loop has been waited for so long that callers are better answered by somebody else. */
int worker_process_is_suspect(const struct worker_process *process);
/* kill_at_ns has come. Said once, tried again: in a call of a driver a process may outlive the signal. */
void worker_process_kill(struct worker_process *process, const struct config *config, struct log *log,
                         uint64_t now_ns);

/* From SIGTERM (and the drain), from SIGABRT or from the end of the channel to SIGKILL, and between two of them. Longer than
 * WORKER_END_MS. */
#define WORKER_PROCESS_KILL_MS 5000

#endif
