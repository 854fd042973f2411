#include "daemon/postmortem.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "daemon/clock.h"
#include "daemon/dump_file.h"

struct postmortem {
    pthread_t thread;
    atomic_int ended;
    struct log log; /* a copy: the level of the original may change */
    struct recorder recorder;
    struct dump_file file;
    char why[96];
};

static void *write_it(void *arg)
{
    struct postmortem *postmortem = arg;
    struct epd_error error = {0};
    (void)!dump_file_write(&postmortem->file, &postmortem->recorder, &error);
    dump_file_log(&postmortem->file, &postmortem->log, postmortem->why, &error);
    atomic_store(&postmortem->ended, 1);
    return NULL;
}

static enum epd_status start(const struct recorder *recorder, const struct postmortem_of *of,
                             const struct log *log, struct postmortem **started, struct epd_error *error)
{
    struct postmortem *postmortem = calloc(1, sizeof(*postmortem));
    if (!postmortem)
        return error_set(error, EPD_NO_MEMORY, "no memory");
    if (recorder_copy(recorder, &postmortem->recorder, error) != EPD_OK)
        goto free_it;
    postmortem->log = *log;
    dump_file_init(&postmortem->file, of->config, (int)getpid(), of->generation, 0);
    (void)snprintf(postmortem->why, sizeof(postmortem->why), "worker ended by %s", of->last_exit);
    const int failed = pthread_create(&postmortem->thread, NULL, write_it, postmortem);
    if (failed) {
        error_set(error, EPD_SYSTEM, "pthread_create: %s", strerror(failed));
        goto free_copy;
    }
    *started = postmortem;
    return EPD_OK;

free_copy:
    recorder_copy_free(&postmortem->recorder);
free_it:
    free(postmortem);
    return error->status;
}

static void clean(struct postmortem **current)
{
    (void)pthread_join((*current)->thread, NULL);
    recorder_copy_free(&(*current)->recorder);
    free(*current);
    *current = NULL;
}

void postmortem_start(struct postmortem **current, const struct recorder *recorder,
                      const struct postmortem_of *of, const struct log *log)
{
    struct epd_error error = {0};
    struct log copy = *log;
    if (recorder->ring->magic != RECORDER_MAGIC || !recorder->ring->n_written)
        return;
    if (*current && !atomic_load(&(*current)->ended)) {
        log_write(&copy, LOG_WARN, "flight recorder not written: that of the worker before still is");
        return;
    }
    if (*current)
        clean(current);
    if (start(recorder, of, log, current, &error) != EPD_OK)
        log_write(&copy, LOG_ERROR, "flight recorder not written: %s", error.text);
}

void postmortem_finish(struct postmortem **current, struct log *log, uint64_t limit_ms)
{
    const struct timespec pause = {.tv_nsec = CLOCK_NS_PER_MS};
    const uint64_t end_ns = clock_ns() + clock_ms_to_ns(limit_ms);
    if (!*current)
        return;
    while (!atomic_load(&(*current)->ended) && clock_ns() < end_ns)
        (void)nanosleep(&pause, NULL);
    if (atomic_load(&(*current)->ended))
        clean(current);
    else
        log_write(log, LOG_ERROR, "flight recorder not written in time: %s", (*current)->file.directory);
}
