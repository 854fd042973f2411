#include "client/connection.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/queue.h>
#include <sys/socket.h>
#include <unistd.h>

#include "client/deadline.h"
#include "client/hello.h"
#include "proto/codec.h"
#include "proto/packet.h"

/* How long a sender that found the socket closed waits for the watcher to say why. It reads what the daemon
 * sent before it closed, which is already there; when the time passes, the sender says EPD_DISCONNECTED. */
#define CONNECTION_NOTICE_TIMEOUT_MS 1000

/* Between two hellos to a daemon that hangs up before it answers. */
#define CONNECTION_HELLO_BACKOFF_US 50000

/* One caller that waits, on its own stack. */
struct call {
    uint64_t request_id;
    pthread_cond_t ended;
    int done;
    struct inbox_item *reply; /* borrowed from the caller */
    LIST_ENTRY(call) link;
};

struct connection {
    int socket; /* owned */
    atomic_uint references;
    struct page *page; /* owned; NULL until the hello was answered */
    struct message_reply_hello hello;
    char path[DIAL_PATH_BYTES];
    uint32_t send_timeout_ms;
    void (*on_lost)(void *arg, struct connection *connection);
    void *on_lost_arg;

    _Atomic uint32_t lost; /* 0, or loss.status; loss is written before it and never again */
    struct epd_error loss;
    atomic_int stopping; /* this side hangs up */

    pthread_mutex_t lock; /* guards calls, next_request_id, watched; held for a few instructions */
    pthread_cond_t gone;  /* signalled when the connection is lost */
    LIST_HEAD(, call) calls;
    uint64_t next_request_id;
    int watched; /* the watcher runs, or has ended and was not joined */
    pthread_t watcher;

    pthread_mutex_t send_lock; /* guards send_buffer and every group's last_seq; held over one send */
    unsigned char send_buffer[EPD_MAX_DATAGRAM_BYTES];

    /* of the opener, then of the watcher */
    struct inbox inbox;
};

static void monotonic_cond_init(pthread_cond_t *cond)
{
    pthread_condattr_t monotonic;

    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_cond_init(cond, &monotonic);
    pthread_condattr_destroy(&monotonic);
}

enum epd_status connection_check(const struct connection *connection, struct epd_error *error)
{
    if (!atomic_load(&connection->lost))
        return EPD_OK;
    *error = connection->loss;
    return error->status;
}

const struct message_reply_hello *connection_hello(const struct connection *connection)
{
    return &connection->hello;
}

struct page *connection_page(const struct connection *connection)
{
    return connection->page;
}

/* ---- sending ---- */

/* The peer has closed: says what the watcher found out. */
static enum epd_status sender_lost(struct connection *connection, struct epd_error *error)
{
    struct timespec deadline = deadline_timespec(deadline_after_ms(CONNECTION_NOTICE_TIMEOUT_MS));
    int waited = 0;

    pthread_mutex_lock(&connection->lock);
    while (!atomic_load(&connection->lost) && waited != ETIMEDOUT)
        waited = pthread_cond_timedwait(&connection->gone, &connection->lock, &deadline);
    pthread_mutex_unlock(&connection->lock);
    if (connection_check(connection, error))
        return error->status;
    return error_set(error, EPD_DISCONNECTED, "connection to %s: closed by the daemon", connection->path);
}

static enum epd_status packet_check(struct connection *connection, enum packet_result result, int failed,
                                    struct epd_error *error)
{
    switch (result) {
    case PACKET_OK:
        return EPD_OK;
    case PACKET_AGAIN:
        return error_set(error, EPD_TIMEOUT, "the daemon on %s took no message for %u ms; nothing was sent",
                         connection->path, connection->send_timeout_ms);
    case PACKET_EOF:
        return sender_lost(connection, error);
    default:
        return error_set(error, EPD_SYSTEM, "sendmsg to %s: %s", connection->path, strerror(failed));
    }
}

/* Encodes and sends under send_lock, which the caller holds. *result is PACKET_OK if the message did not get
 * as far. */
static enum epd_status encode_and_send(struct connection *connection, const struct message *message, int fd,
                                       enum packet_result *result, struct epd_error *error)
{
    size_t bytes;

    *result = PACKET_OK;
    if (connection_check(connection, error) || codec_encode(message, connection->send_buffer, &bytes, error))
        return error->status;
    *result = packet_send(connection->socket, connection->send_buffer, bytes, fd);
    return EPD_OK;
}

static enum epd_status send_message(struct connection *connection, const struct message *message, int fd,
                                    struct epd_error *error)
{
    enum packet_result result;

    pthread_mutex_lock(&connection->send_lock);
    enum epd_status status = encode_and_send(connection, message, fd, &result, error);
    int failed = errno;
    pthread_mutex_unlock(&connection->send_lock);
    return status ? status : packet_check(connection, result, failed, error);
}

enum epd_status connection_launch(struct connection *connection, struct message_launch *launch,
                                  uint64_t *last_seq, struct epd_error *error)
{
    struct message message; /* not zeroed: the union is large, a launch is small */
    enum packet_result result;

    message.kind = MESSAGE_LAUNCH;
    message.request_id = 0;
    pthread_mutex_lock(&connection->send_lock);
    launch->seq = *last_seq + 1;
    message.launch = *launch;
    enum epd_status status = encode_and_send(connection, &message, -1, &result, error);
    int failed = errno;
    if (status == EPD_OK && result == PACKET_OK)
        *last_seq += launch->n_repeats;
    pthread_mutex_unlock(&connection->send_lock);
    return status ? status : packet_check(connection, result, failed, error);
}

/* ---- calls ---- */

static void call_init(struct connection *connection, struct call *call)
{
    monotonic_cond_init(&call->ended);
    pthread_mutex_lock(&connection->lock);
    call->request_id = connection->next_request_id++;
    LIST_INSERT_HEAD(&connection->calls, call, link);
    pthread_mutex_unlock(&connection->lock);
}

/* Waits for the reply or the loss of the connection; then nobody but the caller knows the call any more. */
static int call_wait(struct connection *connection, struct call *call, uint64_t deadline_ns)
{
    struct timespec deadline = deadline_timespec(deadline_ns);
    int waited = 0;

    pthread_mutex_lock(&connection->lock);
    while (!call->done && !atomic_load(&connection->lost) && waited != ETIMEDOUT)
        waited = pthread_cond_timedwait(&call->ended, &connection->lock, &deadline);
    if (!call->done)
        LIST_REMOVE(call, link);
    pthread_mutex_unlock(&connection->lock);
    pthread_cond_destroy(&call->ended);
    return call->done;
}

enum epd_status connection_call(struct connection *connection, struct message *request, int fd,
                                enum message_kind want, uint32_t timeout_ms, struct inbox_item *reply,
                                struct epd_error *error)
{
    struct call call = {.reply = reply};

    call_init(connection, &call);
    request->request_id = call.request_id;
    if (send_message(connection, request, fd, error)) {
        struct epd_error unsent = *error;
        if (call_wait(connection, &call, 0))
            inbox_drop_fd(reply);
        *error = unsent;
        return error->status;
    }
    if (call_wait(connection, &call, deadline_after_ms(timeout_ms)))
        return inbox_check_reply(reply, want, error);
    if (connection_check(connection, error))
        return error->status;
    return error_set(error, EPD_TIMEOUT, "the daemon on %s did not answer %s within %u ms", connection->path,
                     message_kind_name(request->kind), timeout_ms);
}

/* With send_lock. Whether it leaves matters little: the daemon frees everything of a session that it loses. */
static void tell(struct connection *connection, struct message *request)
{
    enum packet_result result;
    struct epd_error ignored;

    pthread_mutex_lock(&connection->lock);
    request->request_id = connection->next_request_id++;
    pthread_mutex_unlock(&connection->lock);
    if (encode_and_send(connection, request, -1, &result, &ignored))
        result = PACKET_ERROR;
}

static void connection_tell(struct connection *connection, struct message *request)
{
    pthread_mutex_lock(&connection->send_lock);
    tell(connection, request);
    pthread_mutex_unlock(&connection->send_lock);
}

void connection_tell_last(struct connection *connection, struct message *request)
{
    const struct timeval at_once = {.tv_usec = 1}; /* 0 would be for ever */

    if (pthread_mutex_trylock(&connection->send_lock))
        return; /* the watcher waits there for room */
    if (setsockopt(connection->socket, SOL_SOCKET, SO_SNDTIMEO, &at_once, sizeof at_once) == 0)
        tell(connection, request);
    pthread_mutex_unlock(&connection->send_lock);
}

/* ---- the watcher ---- */

/* Nobody waits for this reply any more: what it made is given back. */
static void undo_late_reply(struct connection *connection, struct inbox_item *late)
{
    struct message undo = {0};

    inbox_drop_fd(late);
    switch (late->message.kind) {
    case MESSAGE_REPLY_GROUP:
        undo.kind = MESSAGE_GROUP_LEAVE;
        undo.group_leave.id = late->message.reply_group.group_id;
        break;
    case MESSAGE_REPLY_BUFFER:
        undo.kind = MESSAGE_BUFFER_RELEASE;
        undo.buffer_release.id = late->message.reply_buffer.buffer_id;
        break;
    case MESSAGE_REPLY_PLAN:
        undo.kind = MESSAGE_PLAN_DESTROY;
        undo.plan_destroy.id = late->message.reply_plan.plan_id;
        break;
    default:
        return; /* an error, or the answer to an undo */
    }
    connection_tell(connection, &undo);
}

static void deliver_reply(struct connection *connection, struct inbox_item *incoming)
{
    struct call *call;

    pthread_mutex_lock(&connection->lock);
    LIST_FOREACH (call, &connection->calls, link) {
        if (call->request_id == incoming->message.request_id)
            break;
    }
    if (call) {
        *call->reply = *incoming;
        LIST_REMOVE(call, link);
        call->done = 1;
        pthread_cond_signal(&call->ended);
    }
    pthread_mutex_unlock(&connection->lock);
    if (!call)
        undo_late_reply(connection, incoming);
}

/* The daemon hung up without a datagram that says why. */
static void explain_hang_up(struct connection *connection, struct epd_error *loss)
{
    uint32_t closed = atomic_load(&connection->page->closed);

    if (atomic_load(&connection->stopping))
        error_set(loss, EPD_DISCONNECTED, "the client was closed");
    else if (closed && status_known(closed))
        error_set(loss, (enum epd_status)closed, "the daemon closed session %llu: %s",
                  (unsigned long long)connection->hello.session_id, status_text((enum epd_status)closed));
    else if (dial_probe(connection->path))
        error_set(loss, EPD_RESTARTED,
                  "the daemon's worker on %s ended without a notice and is being restarted; epd_reconnect() "
                  "goes on with the next one",
                  connection->path);
    else
        error_set(loss, EPD_DISCONNECTED, "the daemon on %s is gone", connection->path);
}

/* Handles one datagram. EPD_OK, or what the connection is lost by. */
static enum epd_status watch_once(struct connection *connection, struct epd_error *loss)
{
    switch (inbox_receive(&connection->inbox, loss)) {
    case INBOX_MESSAGE:
        deliver_reply(connection, &connection->inbox.item);
        return EPD_OK;
    case INBOX_NOTHING:
        return EPD_OK;
    case INBOX_HUNG_UP:
        explain_hang_up(connection, loss);
        break;
    case INBOX_FAILED:
        break;
    }
    return loss->status;
}

static void *watch(void *arg)
{
    struct connection *connection = arg;
    struct epd_error loss;
    struct call *call;

    while (watch_once(connection, &loss) == EPD_OK)
        ;
    shutdown(connection->socket, SHUT_RDWR); /* a sender that waits for room ends too */
    pthread_mutex_lock(&connection->lock);
    connection->loss = loss;
    atomic_store(&connection->lost, (uint32_t)loss.status);
    LIST_FOREACH (call, &connection->calls, link) {
        pthread_cond_signal(&call->ended);
    }
    pthread_cond_broadcast(&connection->gone);
    pthread_mutex_unlock(&connection->lock);
    if (connection->on_lost)
        connection->on_lost(connection->on_lost_arg, connection);
    return NULL;
}

/* Signals are for the program's own threads. */
static enum epd_status watcher_start(struct connection *connection, struct epd_error *error)
{
    sigset_t all, before;

    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int failed = pthread_create(&connection->watcher, NULL, watch, connection);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (failed)
        return error_set(error, EPD_SYSTEM, "client: thread for the connection: %s", strerror(failed));
    connection->watched = 1;
    return EPD_OK;
}

/* ---- open and close ---- */

static void connection_free(struct connection *connection)
{
    inbox_fini(&connection->inbox);
    page_close(connection->page);
    close(connection->socket);
    pthread_cond_destroy(&connection->gone);
    pthread_mutex_destroy(&connection->lock);
    pthread_mutex_destroy(&connection->send_lock);
    free(connection);
}

/* Takes the socket over in every case. NULL, and *error set, without memory. */
static struct connection *connection_create(const struct connection_config *config, int socket,
                                            struct epd_error *error)
{
    const struct timeval send_timeout = {.tv_sec = config->send_timeout_ms / 1000,
                                         .tv_usec = (suseconds_t)(config->send_timeout_ms % 1000) * 1000};
    struct connection *connection = calloc(1, sizeof *connection);

    if (!connection) {
        close(socket);
        error_set(error, EPD_NO_MEMORY, "client: no memory for a connection of %zu bytes",
                  sizeof *connection);
        return NULL;
    }
    connection->socket = socket;
    atomic_init(&connection->references, 1);
    connection->next_request_id = HELLO_REQUEST_ID + 1;
    connection->send_timeout_ms = config->send_timeout_ms;
    connection->on_lost = config->lost;
    connection->on_lost_arg = config->arg;
    strcpy(connection->path, config->path);
    LIST_INIT(&connection->calls);
    pthread_mutex_init(&connection->lock, NULL);
    pthread_mutex_init(&connection->send_lock, NULL);
    monotonic_cond_init(&connection->gone);
    if (inbox_init(&connection->inbox, socket, error) == EPD_OK) {
        if (setsockopt(socket, SOL_SOCKET, SO_SNDTIMEO, &send_timeout, sizeof send_timeout) == 0)
            return connection;
        error_set(error, EPD_SYSTEM, "client: SO_SNDTIMEO: %s", strerror(errno));
    }
    connection_free(connection);
    return NULL;
}

/* One try at a session. */
static struct connection *connection_try(const struct connection_config *config, struct epd_error *error)
{
    int socket;

    if (dial(config->path, config->deadline_ns, &socket, error))
        return NULL;
    struct connection *connection = connection_create(config, socket, error);
    if (!connection)
        return NULL;
    if (hello(&connection->inbox, config->client_name, config->deadline_ns, &connection->page, error) ==
        EPD_OK) {
        connection->hello = connection->inbox.item.message.reply_hello;
        if (watcher_start(connection, error) == EPD_OK)
            return connection;
    }
    connection_free(connection);
    return NULL;
}

enum epd_status connection_open(const struct connection_config *config, struct connection **opened,
                                struct epd_error *error)
{
    for (;;) {
        struct connection *connection = connection_try(config, error);

        if (connection) {
            *opened = connection;
            return EPD_OK;
        }
        /* One that hangs up before it answers is being restarted. */
        if (error->status != EPD_DISCONNECTED || deadline_left_ms(config->deadline_ns) == 0)
            return error->status;
        usleep(CONNECTION_HELLO_BACKOFF_US);
    }
}

void connection_retain(struct connection *connection)
{
    atomic_fetch_add(&connection->references, 1);
}

void connection_stop(struct connection *connection)
{
    atomic_store(&connection->stopping, 1);
    shutdown(connection->socket, SHUT_RDWR);
    pthread_mutex_lock(&connection->lock);
    int watched = connection->watched;
    connection->watched = 0;
    pthread_mutex_unlock(&connection->lock);
    if (watched)
        pthread_join(connection->watcher, NULL);
}

int connection_stopping(const struct connection *connection)
{
    return atomic_load(&connection->stopping);
}

void connection_release(struct connection *connection)
{
    if (atomic_fetch_sub(&connection->references, 1) > 1)
        return;
    connection_stop(connection);
    connection_free(connection);
}
