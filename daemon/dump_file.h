/* A flight recorder as a file: its place, its name, and how many there may be. Any thread; the struct is its caller's.
 *
 * Name: epd-dump-PID-TIME-WORKER-N.json. PID is the supervisor's, TIME that of writing (UTC), WORKER counts the workers from 1
 * and N the dumps of that worker from 1; N is "end" of what a supervisor writes of a worker that was killed. So no two are
 * alike, none is ever written over, and those of one PID are listed in the order of their times, to the second. */
#ifndef EPD_DAEMON_DUMP_FILE_H
#define EPD_DAEMON_DUMP_FILE_H

#include "daemon/config.h"
#include "daemon/log.h"
#include "daemon/recorder.h"

/* Of one PID; the oldest goes when there is one more. */
#define DUMP_FILE_MAX 8

struct dump_file {
    char directory[CONFIG_TEXT_BYTES];
    int pid;
    uint64_t worker;
    uint32_t number; /* 0: its end */
    char path[CONFIG_TEXT_BYTES + 96];
};

/* In the configured directory, or beside the control socket. */
void dump_file_init(struct dump_file *file, const struct config *config, int pid, uint64_t worker,
                    uint32_t number);
/* Writes {pid, worker, dump, time_unix_ms, ops}; sets path first. May take long: a disk is waited for. */
EPD_MUST_CHECK enum epd_status dump_file_write(struct dump_file *file, const struct recorder *recorder,
                                               struct epd_error *error);
/* One line: where it is and why it was written, or why not. */
void dump_file_log(const struct dump_file *file, struct log *log, const char *why,
                   const struct epd_error *error);

#endif
