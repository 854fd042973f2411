#include "daemon/dump.h"

#include <malloc.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "daemon/clock.h"
#include "daemon/document.h"
#include "daemon/dump_file.h"
#include "daemon/session.h"

struct dump {
    struct list in_running;
    struct worker *worker; /* borrowed; the thread touches its `dumps.n_ended` and its `notify` only */
    pthread_t thread;
    atomic_int ended;
    struct recorder copy; /* owned */
    uint64_t now_ns;

    struct session *session; /* held, or NULL: into a file */
    uint64_t request_id;
    json_t *header; /* owned until the thread takes it */
    int fd;         /* owned: the sealed document */
    uint64_t bytes;

    struct dump_file file;
    char why[EPD_ERROR_TEXT_BYTES];

    struct epd_error error;
};

void dump_init(struct dumps *dumps)
{
    *dumps = (struct dumps){0};
    list_init(&dumps->running);
}

static void seal_document(struct dump *dump)
{
    json_t *document = dump->header;
    dump->header = NULL;
    (void)json_object_set_new(document, "ops", recorder_document(&dump->copy, dump->now_ns));
    (void)!document_seal(document, &dump->fd, &dump->bytes, &dump->error);
}

static void *dump_main(void *arg)
{
    struct dump *dump = arg;
    struct worker *worker = dump->worker;
    if (dump->session)
        seal_document(dump);
    else
        (void)!dump_file_write(&dump->file, &dump->copy, &dump->error);
    (void)malloc_trim(0); /* megabytes of small pieces, in an arena that nobody may use again for days */
    atomic_store(&dump->ended, 1);
    atomic_fetch_add(&worker->dumps.n_ended, 1);
    (void)uv_async_send(&worker->notify);
    return NULL;
}

static void answer(const struct dump *dump)
{
    struct message reply = {.kind = MESSAGE_REPLY_DOCUMENT,
                            .request_id = dump->request_id,
                            .reply_document = {.bytes = dump->bytes}};
    if (dump->error.status == EPD_OK)
        session_send(dump->session, &reply, dump->fd);
    else
        session_reply_error(dump->session, dump->request_id, &dump->error);
}

static void dump_free(struct dump *dump)
{
    if (dump->fd >= 0)
        (void)close(dump->fd);
    json_decref(dump->header);
    recorder_copy_free(&dump->copy);
    free(dump);
}

static void dump_end(struct dump *dump)
{
    struct session *session = dump->session;
    if (session)
        answer(dump);
    else
        dump_file_log(&dump->file, dump->worker->log, dump->why, &dump->error);
    dump_free(dump);
    if (session)
        session_release(session);
}

/* NULL and *error without memory. */
static struct dump *dump_create(struct worker *worker, struct epd_error *error)
{
    struct dump *dump = calloc(1, sizeof(*dump));
    if (!dump || recorder_copy(&worker->recorder, &dump->copy, error) != EPD_OK) {
        error_set(error, EPD_NO_MEMORY, "dump: no memory for a copy of the flight recorder");
        free(dump);
        return NULL;
    }
    dump->worker = worker;
    dump->fd = -1;
    dump->now_ns = clock_ns();
    dump->error.status = EPD_OK;
    return dump;
}

static enum epd_status dump_start(struct dump *dump, struct epd_error *error)
{
    struct dumps *dumps = &dump->worker->dumps;
    if (dumps->n_running == DUMP_MAX_RUNNING)
        return error_set(error, EPD_BUSY, "dump: %d are being written", DUMP_MAX_RUNNING);
    int failed = pthread_create(&dump->thread, NULL, dump_main, dump);
    if (failed)
        return error_set(error, EPD_SYSTEM, "dump: pthread_create: %s", strerror(failed));
    list_append(&dumps->running, &dump->in_running);
    dumps->n_running++;
    return EPD_OK;
}

static struct dump *file_create(struct worker *worker, const char *why, struct epd_error *error)
{
    struct dump *dump = dump_create(worker, error);
    if (!dump)
        return NULL;
    dump_file_init(&dump->file, &worker->config, worker->start.supervisor_pid, worker->start.generation + 1,
                   ++worker->n_dumps);
    (void)snprintf(dump->why, sizeof(dump->why), "%s", why);
    return dump;
}

void dump_to_file(struct worker *worker, const char *why)
{
    struct epd_error error = {.status = EPD_OK};
    struct dump *dump = file_create(worker, why, &error);
    if (dump && dump_start(dump, &error) == EPD_OK)
        return;
    log_write(worker->log, LOG_ERROR, "flight recorder not written: %s", error.text);
    if (dump)
        dump_free(dump);
}

void dump_to_file_last(struct worker *worker, const char *why)
{
    struct epd_error error = {.status = EPD_OK};
    struct dump *dump = file_create(worker, why, &error);
    if (!dump) {
        log_write(worker->log, LOG_ERROR, "flight recorder not written: %s", error.text);
        return;
    }
    if (dump_start(dump, &error) == EPD_OK)
        return;
    (void)!dump_file_write(&dump->file, &dump->copy, &dump->error);
    dump_end(dump);
}

void dump_answer(struct session *session, uint64_t request_id, json_t *header)
{
    struct epd_error error = {.status = EPD_OK};
    struct dump *dump = dump_create(session->worker, &error);
    if (!dump) {
        json_decref(header);
        session_reply_error(session, request_id, &error);
        return;
    }
    dump->session = session;
    dump->request_id = request_id;
    dump->header = header;
    if (dump_start(dump, &error) != EPD_OK) {
        dump_free(dump);
        session_reply_error(session, request_id, &error);
        return;
    }
    session_hold(session);
}

void dump_poll(struct worker *worker)
{
    struct dumps *dumps = &worker->dumps;
    if (!atomic_exchange(&dumps->n_ended, 0))
        return;
    list_each(node, after, &dumps->running)
    {
        struct dump *dump = list_owner(node, struct dump, in_running);
        if (!atomic_load(&dump->ended))
            continue;
        (void)pthread_join(dump->thread, NULL);
        list_remove(&dump->in_running);
        dumps->n_running--;
        dump_end(dump);
    }
}

int dump_settle(struct worker *worker, uint64_t limit_ms)
{
    const struct timespec pause = {.tv_nsec = CLOCK_NS_PER_MS};
    const uint64_t end_ns = clock_ns() + clock_ms_to_ns(limit_ms);
    while (worker->dumps.n_running && clock_ns() < end_ns) {
        dump_poll(worker);
        (void)nanosleep(&pause, NULL);
    }
    return worker->dumps.n_running == 0;
}
