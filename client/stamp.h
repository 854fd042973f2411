/* Tells a process from its forked children without a system call: a page that the kernel empties in a child
 * (MADV_WIPEONFORK) holds the pid of the process that made it. Where the kernel lacks that, getpid is asked.
 * Any thread. */
#ifndef EPD_CLIENT_STAMP_H
#define EPD_CLIENT_STAMP_H

#include <sys/types.h>

#include "proto/status.h"

struct stamp {
    pid_t *word; /* owned, one page */
    int wipes;   /* the kernel empties the page in children */
};

EPD_MUST_CHECK enum epd_status stamp_init(struct stamp *stamp, struct epd_error *error);
void stamp_fini(struct stamp *stamp);
/* 1 in the process that called stamp_init, 0 in its children. */
int stamp_is_mine(const struct stamp *stamp);

#endif
