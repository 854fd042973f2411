#include "daemon/postmortem.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

struct postmortem {
    pthread_t thread;
    atomic_int ended;
    struct log log; /* a copy: the level of the original may change */
    struct recorder recorder;
    int pid;
    uint32_t generation;
    char directory[CONFIG_TEXT_BYTES], last_exit[64];
};

static void *write_it(void *arg)
{
    struct postmortem *postmortem = arg;
    char path[CONFIG_TEXT_BYTES + 64];
    struct epd_error error = {0};
    if (recorder_dump(&postmortem->recorder, postmortem->directory, postmortem->pid, postmortem->generation,
                      path, sizeof(path), &error) == EPD_OK)
        log_write(&postmortem->log, LOG_WARN, "flight recorder written path %s because worker ended by %s",
                  path, postmortem->last_exit);
    else
        log_write(&postmortem->log, LOG_ERROR, "flight recorder not written: %s", error.text);
    atomic_store(&postmortem->ended, 1);
    return NULL;
}

static void fill(struct postmortem *postmortem, const struct postmortem_of *of, const struct log *log)
{
    const char *given = of->config->dump_directory, *slash = strrchr(of->control_path, '/');
    postmortem->log = *log;
    postmortem->pid = (int)getpid();
    postmortem->generation = of->generation;
    (void)snprintf(postmortem->last_exit, sizeof(postmortem->last_exit), "%s", of->last_exit);
    if (given[0])
        (void)snprintf(postmortem->directory, sizeof(postmortem->directory), "%s", given);
    else
        (void)snprintf(postmortem->directory, sizeof(postmortem->directory), "%.*s",
                       slash ? (int)(slash - of->control_path) : 1, slash ? of->control_path : ".");
}

static enum epd_status start(const struct recorder *recorder, const struct postmortem_of *of,
                             const struct log *log, struct postmortem **started, struct epd_error *error)
{
    struct postmortem *postmortem = calloc(1, sizeof(*postmortem));
    if (!postmortem)
        return error_set(error, EPD_NO_MEMORY, "no memory");
    if (recorder_copy(recorder, &postmortem->recorder, error) != EPD_OK)
        goto free_it;
    fill(postmortem, of, log);
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
    postmortem_finish(current);
    if (start(recorder, of, log, current, &error) != EPD_OK)
        log_write(&copy, LOG_ERROR, "flight recorder not written: %s", error.text);
}

void postmortem_finish(struct postmortem **current)
{
    if (!*current)
        return;
    (void)pthread_join((*current)->thread, NULL);
    recorder_copy_free(&(*current)->recorder);
    free(*current);
    *current = NULL;
}
