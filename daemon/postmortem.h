/* The flight recorder of a worker that was killed, written to a file beside the supervisor's loop: composing and writing it
 * takes tens of milliseconds, and meanwhile the next worker is started and the control socket answered. Supervisor; the thread
 * inside touches nothing of it. */
#ifndef EPD_DAEMON_POSTMORTEM_H
#define EPD_DAEMON_POSTMORTEM_H

#include "daemon/config.h"
#include "daemon/log.h"
#include "daemon/recorder.h"

struct postmortem; /* one that is being written */

/* Of whom, and where to. */
struct postmortem_of {
    const struct config *config; /* says where to */
    const char *last_exit;
    uint64_t generation; /* the how manyeth worker, from 1 */
};

/* Starts one from a copy of the recorder and puts it into *current, or logs why not: an earlier one that is still being
 * written is not waited for. An empty recorder leaves nothing. */
void postmortem_start(struct postmortem **current, const struct recorder *recorder,
                      const struct postmortem_of *of, const struct log *log);
/* Waits for the one there is, if there is, but no longer than this: a disk may not answer. Then it stays in *current, and goes
 * with the process. */
void postmortem_finish(struct postmortem **current, struct log *log, uint64_t limit_ms);

#endif
