/* Log lines to standard error: one line, lower case, `word value` pairs, id first. Under systemd
 * (JOURNAL_STREAM) a line starts with its "<n>" priority, otherwise with the time. A line that cannot be
 * written at once is counted and forgotten: a full disk, a closed stderr or a reader that does not read never stops the daemon.
 * A pipe or a terminal, which others write to as well, is opened a second time for that: our descriptor alone must not wait,
 * and whoever shares the first is not to notice. One thread. */
#ifndef EPD_DAEMON_LOG_H
#define EPD_DAEMON_LOG_H

#include <stdint.h>

#include "proto/limits.h"

enum log_level {
    LOG_ERROR = 0, /* somebody has to act */
    LOG_WARN = 1,  /* somebody should look */
    LOG_INFO = 2,  /* proportional to sessions, never to requests */
    LOG_DEBUG = 3,
};

/* A key (what a client can cause) may log LOG_BURST or LOG_BURST_INFO lines per LOG_WINDOW_NS; the next window says how many
 * were left out. */
#define LOG_BURST      5  /* errors and warnings */
#define LOG_BURST_INFO 20 /* coming and going */
#define LOG_WINDOW_NS  (10ull * 1000000000ull)
#define LOG_MAX_KEYS   32

struct log_limit {
    const char *key; /* borrowed, static text */
    uint64_t window_ns;
    uint32_t n_lines, n_suppressed;
};

struct log {
    enum log_level level;
    int fd;   /* borrowed; STDERR_FILENO */
    int copy; /* owned: the same, never waits; -1: it cannot be had, or is not needed */
    int journal;
    const char *who; /* borrowed, static text: "supervisor" or "worker" */
    struct log_limit limits[LOG_MAX_KEYS];
    uint64_t n_suppressed, n_unwritten;
};

/* A client's name as one word of a line: what could look like the next words is written as \xNN. */
struct log_word {
    char text[4 * EPD_MAX_NAME_BYTES];
};
const char *log_word(struct log_word *word, const char *name);

void log_init(struct log *log, const char *who, enum log_level level, int fd);
void log_fini(struct log *log);
void log_write(struct log *log, enum log_level level, const char *format, ...)
    __attribute__((format(printf, 3, 4)));
/* For what clients can cause: rate-limited per key, which must be static text. 1 if the line was written. */
int log_limited(struct log *log, enum log_level level, const char *key, uint64_t now_ns, const char *format,
                ...) __attribute__((format(printf, 5, 6)));

#endif
