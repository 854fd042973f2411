/* What a worker holds, seen from outside (/proc) and from its own stats: taken before a fault, compared after
 * it. Any thread. */
#ifndef EPD_TESTS_FAULT_BASELINE_H
#define EPD_TESTS_FAULT_BASELINE_H

#include "tests/integration/daemon_process.h"

/* Everything of a lost client is given back, as a rule within a second (epd-bench --op peer_loss tells how soon); on a
 * machine that has other things to do it may take longer. Sanitizers slow the daemon down by their known factor. */
#define RECLAIM_MS 5000
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define SANITIZER_FACTOR 10
#else
#define SANITIZER_FACTOR 1
#endif
/* Free memory that the allocator keeps: bytes by which RSS may stay higher. */
#define BASELINE_RSS_SLACK_KIB (8 * 1024)

struct baseline {
    pid_t worker;
    int fds;
    long rss_kib;
    int n_shared; /* shared mappings: buffers, pages, imports */
    long shared_kib;
    long long sessions, groups, buffers, plans, launches, heap_bytes, imported_bytes;
};

/* Fails the test if the daemon does not answer. */
void baseline_take(struct baseline *baseline, const struct daemon_process *daemon);
/* Waits until the worker holds no more than before; returns after how many milliseconds, -1 with a text on
 * stderr if that takes longer than RECLAIM_MS * SANITIZER_FACTOR. */
int baseline_wait(const struct baseline *before, const struct daemon_process *daemon);

#endif
