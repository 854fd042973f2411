#include "daemon/listener.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "daemon/clock.h"
#include "daemon/reserve.h"
#include "daemon/session.h"
#include "daemon/worker.h"
#include "proto/codec.h"
#include "proto/packet.h"

static int open_spare(void)
{
    return open("/dev/null", O_RDONLY | O_CLOEXEC);
}

/* Tells a peer that never becomes a session why, and hangs up. */
static void refuse(struct listener *listener, int fd, const struct epd_error *why)
{
    struct worker *worker = listener->worker;
    struct message message = {.kind = MESSAGE_CLOSED, .closed = {.status = why->status}};
    (void)snprintf(message.closed.reason, sizeof(message.closed.reason), "%s", why->text);
    struct epd_error error = {0};
    size_t bytes = 0;
    worker->stats.sessions_refused++;
    if (codec_encode(&message, worker->encoded, &bytes, &error) == EPD_OK)
        (void)!packet_send(fd, worker->encoded, bytes, -1); /* best effort, the hang-up says it too */
    (void)close(fd);
}

static enum epd_status check_peer(struct listener *listener, int fd, struct ucred *peer,
                                  struct epd_error *error)
{
    struct worker *worker = listener->worker;
    socklen_t bytes = sizeof(*peer);
    if (getsockopt(fd, SOL_SOCKET, SO_PEERCRED, peer, &bytes) != 0)
        return error_set(error, EPD_SYSTEM, "peer credentials: %s", strerror(errno));
    if (listener->kind == SESSION_RANK && !config_allows_uid(&worker->config, peer->uid))
        return error_set(error, EPD_PERMISSION, "uid %u may not connect (allow_uids)", peer->uid);
    if (worker->state != WORKER_SERVING && listener->kind == SESSION_RANK)
        return error_set(error, EPD_DRAINING, "the daemon is draining, no new sessions");
    if (listener->kind == SESSION_RANK && reserve_touched(fd))
        return error_set(error, EPD_QUOTA, RESERVE_REFUSAL);
    return EPD_OK;
}

static void admit(struct listener *listener, int fd)
{
    struct worker *worker = listener->worker;
    struct ucred peer = {0};
    struct epd_error error = {0};
    enum epd_status status = check_peer(listener, fd, &peer, &error);
    if (status == EPD_OK)
        status = failpoint_hit(&worker->failpoints, "session_open", &error);
    if (status == EPD_OK)
        status = session_open(worker, listener->kind, fd, &peer, &error);
    if (status == EPD_OK)
        return;
    (void)log_limited(worker->log, LOG_WARN, status_name(status), clock_ns(),
                      "connection refused pid %d uid %u: %s", (int)peer.pid, peer.uid, error.text);
    refuse(listener, fd, &error);
}

static void on_connection(uv_poll_t *poll, int status, int events);

static void on_pause_over(uv_timer_t *timer)
{
    struct listener *listener = timer->data;
    if (listener->spare_fd < 0)
        listener->spare_fd = open_spare();
    if (uv_poll_start(&listener->poll, UV_READABLE, on_connection) != 0)
        abort();
}

/* What keeps us from accepting now will not be over at once, and the socket stays readable meanwhile. */
static void pause_accepting(struct listener *listener)
{
    (void)uv_poll_stop(&listener->poll);
    (void)uv_timer_start(&listener->pause, on_pause_over, LISTENER_PAUSE_MS, 0);
}

/* Out of fds: the spare one lets us take peers and hang up on them, so that they do not wait for nothing. */
static void out_of_fds(struct listener *listener)
{
    struct worker *worker = listener->worker;
    (void)log_limited(worker->log, LOG_ERROR, "emfile", clock_ns(), "connection refused: no fds left");
    if (listener->spare_fd >= 0) {
        (void)close(listener->spare_fd);
        listener->spare_fd = -1;
        const struct epd_error why = {EPD_QUOTA, "the daemon has no fds left"};
        for (int i = 0; i < LISTENER_BATCH; i++) {
            int fd = accept4(listener->fd, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
            if (fd < 0)
                break;
            refuse(listener, fd, &why);
        }
        listener->spare_fd = open_spare();
    }
    pause_accepting(listener);
}

/* 1 if there may be more. */
static int accept_one(struct listener *listener)
{
    int fd = accept4(listener->fd, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
    if (fd >= 0) {
        admit(listener, fd);
        return 1;
    }
    if (errno == ECONNABORTED || errno == EINTR)
        return 1;
    if (errno == EMFILE || errno == ENFILE || errno == ENOBUFS || errno == ENOMEM)
        out_of_fds(listener);
    else if (errno != EAGAIN) {
        (void)log_limited(listener->worker->log, LOG_ERROR, "accept", clock_ns(), "accept failed: %s",
                          strerror(errno));
        pause_accepting(listener);
    }
    return 0;
}

static void on_connection(uv_poll_t *poll, int status, int events)
{
    (void)events;
    struct listener *listener = poll->data;
    if (status < 0)
        return;
    for (int i = 0; i < LISTENER_BATCH && listener->started; i++)
        if (!accept_one(listener))
            return;
}

void listener_start(struct listener *listener, struct worker *worker, enum session_kind kind, int fd)
{
    *listener =
        (struct listener){.worker = worker, .kind = kind, .fd = fd, .spare_fd = open_spare(), .started = 1};
    if (uv_poll_init(&worker->loop, &listener->poll, fd) != 0 ||
        uv_timer_init(&worker->loop, &listener->pause) != 0)
        abort();
    listener->poll.data = listener;
    listener->pause.data = listener;
    if (uv_poll_start(&listener->poll, UV_READABLE, on_connection) != 0)
        abort();
}

static void on_closed(uv_handle_t *handle)
{
    struct listener *listener = handle->data;
    if (listener->fd >= 0)
        (void)close(listener->fd);
    listener->fd = -1;
}

void listener_stop(struct listener *listener)
{
    if (!listener->started)
        return;
    listener->started = 0;
    if (listener->spare_fd >= 0)
        (void)close(listener->spare_fd);
    listener->spare_fd = -1;
    uv_close((uv_handle_t *)&listener->pause, NULL);
    uv_close((uv_handle_t *)&listener->poll, on_closed);
}
