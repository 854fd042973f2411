#include "daemon/session.h"

#include <assert.h>
#include <errno.h>
#include <inttypes.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "daemon/buffer.h"
#include "daemon/clock.h"
#include "daemon/control_place.h"
#include "daemon/member.h"
#include "daemon/rank_plan.h"
#include "daemon/request.h"
#include "daemon/reserve.h"
#include "proto/codec.h"
#include "proto/packet.h"

static const char *const state_names[SESSION_STATE_COUNT] = {"opening", "open", "closing"};

/* Which state may follow which. */
static const unsigned char transitions[SESSION_STATE_COUNT][SESSION_STATE_COUNT] = {
    [SESSION_OPENING] = {[SESSION_OPEN] = 1, [SESSION_CLOSING] = 1},
    [SESSION_OPEN] = {[SESSION_CLOSING] = 1},
};

const char *session_state_name(enum session_state state)
{
    return state_names[state];
}

static void set_state(struct session *session, enum session_state state)
{
    assert(transitions[session->state][state]);
    session->state = state;
}

void session_opened(struct session *session)
{
    set_state(session, SESSION_OPEN);
}

/* ---- life ---- */

void session_hold(struct session *session)
{
    session->n_holds++;
}

void session_release(struct session *session)
{
    assert(session->n_holds > 0);
    if (--session->n_holds)
        return;
    struct worker *worker = session->worker;
    assert(session->state == SESSION_CLOSING && list_empty(&session->plans) && list_empty(&session->buffers));
    if (session->page)
        page_close(session->page);
    registry_remove(&worker->registry, REGISTRY_SESSION, session->id);
    quota_close(&worker->accounts, &session->quota);
    free(session);
}

static void on_poll_closed(uv_handle_t *handle)
{
    struct session *session = handle->data;
    (void)close(session->fd);
    session->fd = -1;
    session_release(session);
}

static void on_peer_closed(uv_handle_t *handle)
{
    struct session *session = handle->data;
    (void)close(session->peer_fd);
    session->peer_fd = -1;
    session_release(session);
}

static void on_poll(uv_poll_t *poll, int status, int events);

static void wait_for(struct session *session, int events)
{
    if (session->state == SESSION_CLOSING || events == session->events)
        return;
    session->events = events;
    if (uv_poll_start(&session->poll, events, on_poll) != 0)
        abort(); /* the handle is open and the events are legal */
}

void session_wait_as_needed(struct session *session)
{
    wait_for(session, UV_DISCONNECT | (session->n_pauses ? 0 : UV_READABLE) |
                          (session->first_output && !session->crowded ? UV_WRITABLE : 0));
}

/* The client's process is dead. Where the socket has ended too, that is the better news: it comes after all that
 * the client still sent. */
static void on_peer(uv_poll_t *poll, int status, int events)
{
    (void)status;
    (void)events;
    struct session *session = poll->data;
    (void)uv_poll_stop(poll);
    if (!session_hung_up(session))
        session_close(session, CLOSE_PEER_DIED, NULL);
}

/* A pidfd of a rank's process; -1 if there is none to have, and then the session lives on its socket alone. */
static enum epd_status find_peer(struct session *session, struct epd_error *error)
{
    struct worker *worker = session->worker;
    if (session->kind != SESSION_RANK)
        return EPD_OK;
    const enum peer_watch before = worker->peer_watch;
    enum epd_status status =
        peer_open(session->fd, &session->peer, &worker->peer_watch, &session->peer_fd, error);
    if (worker->peer_watch != before)
        log_write(worker->log, worker->peer_watch == PEER_WATCH_NONE ? LOG_WARN : LOG_INFO,
                  "processes of clients are watched by %s", peer_watch_name(worker->peer_watch));
    if (status != EPD_OK || !reserve_touched(session->peer_fd))
        return status;
    (void)close(session->peer_fd);
    return error_set(error, EPD_QUOTA, RESERVE_REFUSAL);
}

static void watch_peer(struct session *session)
{
    if (session->peer_fd < 0)
        return;
    int result = uv_poll_init(&session->worker->loop, &session->peer_poll, session->peer_fd);
    if (result != 0) {
        (void)log_limited(session->worker->log, LOG_WARN, "peer_unwatched", clock_ns(),
                          "session %" PRIu64 " process %d not watched: %s", session->id,
                          (int)session->peer.pid, uv_strerror(result));
        (void)close(session->peer_fd);
        session->peer_fd = -1;
        return;
    }
    session->peer_poll.data = session;
    session_hold(session);
    if (uv_poll_start(&session->peer_poll, UV_READABLE, on_peer) != 0)
        abort(); /* the handle is open and the events are legal */
}

static void drop_peer(struct session *session)
{
    if (session->peer_fd >= 0)
        uv_close((uv_handle_t *)&session->peer_poll, on_peer_closed);
}

static enum epd_status session_init(struct session *session, int fd, struct epd_error *error)
{
    struct worker *worker = session->worker;
    list_init(&session->in_worker);
    list_init(&session->members);
    list_init(&session->plans);
    list_init(&session->buffers);
    session->opened_ns = session->active_ns = clock_ns();
    enum epd_status status = find_peer(session, error);
    if (status != EPD_OK)
        return status;
    status = session->kind == SESSION_CONTROL
                 ? control_place_take(worker, session->peer.uid, &session->quota, error)
                 : quota_open(&worker->accounts, &worker->config, session->peer.uid, &session->quota, error);
    if (status != EPD_OK)
        goto close_peer;
    status = registry_add(&worker->registry, REGISTRY_SESSION, 0, session, &session->id, error);
    if (status != EPD_OK)
        goto give_quota;
    int result = uv_poll_init(&worker->loop, &session->poll, fd);
    if (result == 0)
        return EPD_OK;
    status = error_set(error, EPD_SYSTEM, "session: watching its socket: %s", uv_strerror(result));
    registry_remove(&worker->registry, REGISTRY_SESSION, session->id);
give_quota:
    quota_close(&worker->accounts, &session->quota);
close_peer:
    if (session->peer_fd >= 0)
        (void)close(session->peer_fd);
    return status;
}

enum epd_status session_open(struct worker *worker, enum session_kind kind, int fd, const struct ucred *peer,
                             struct epd_error *error)
{
    struct session *session = calloc(1, sizeof(*session));
    if (!session)
        return error_set(error, EPD_NO_MEMORY, "session: no memory");
    *session = (struct session){.worker = worker, .kind = kind, .fd = fd, .peer = *peer, .peer_fd = -1};
    session->state = kind == SESSION_RANK ? SESSION_OPENING : SESSION_OPEN;
    enum epd_status status = session_init(session, fd, error);
    if (status != EPD_OK) {
        free(session);
        return status;
    }
    session->poll.data = session;
    session->n_holds = 1; /* the poll handle */
    list_append(&worker->sessions, &session->in_worker);
    worker->stats.sessions_opened++;
    session_wait_as_needed(session);
    watch_peer(session);
    if (kind == SESSION_RANK)
        worker_watch(worker);
    (void)log_limited(worker->log, kind == SESSION_RANK ? LOG_INFO : LOG_DEBUG, "session_opened",
                      session->opened_ns, "session %" PRIu64 " opened pid %d uid %u", session->id,
                      (int)peer->pid, peer->uid);
    return EPD_OK;
}

/* ---- input ---- */

static enum codec_side side_of(const struct session *session)
{
    return session->kind == SESSION_RANK ? CODEC_FROM_CLIENT : CODEC_FROM_CONTROL;
}

static int takes_fd(const struct message *message)
{
    return message->kind == MESSAGE_BUFFER_REGISTER;
}

static void handle_datagram(struct session *session, size_t bytes, int fd)
{
    struct worker *worker = session->worker;
    struct message *message = &worker->message;
    struct epd_error error = {0};
    session->n_requests++;
    if (codec_decode(side_of(session), worker->received, bytes, &worker->arena, message, &error) != EPD_OK) {
        if (fd >= 0)
            (void)close(fd);
        session_close(session, CLOSE_BAD_FRAME, error.text);
        return;
    }
    worker->stats.requests[message->kind]++;
    if (fd >= 0 && !takes_fd(message)) {
        (void)close(fd);
        session_close(session, CLOSE_UNEXPECTED_FD, message_kind_name(message->kind));
        return;
    }
    request_handle(session, message, fd);
}

/* 1 if there may be more to read. */
static int read_datagram(struct session *session)
{
    struct worker *worker = session->worker;
    size_t bytes = 0;
    int fd = -1;
    switch (packet_receive(session->fd, worker->received, sizeof(worker->received), &bytes, &fd)) {
    case PACKET_OK:
        handle_datagram(session, bytes, fd);
        return 1;
    case PACKET_AGAIN:
        return 0;
    case PACKET_EOF:
        session_close(session, CLOSE_CLIENT, NULL);
        return 0;
    case PACKET_TRUNCATED:
        if (fd >= 0)
            (void)close(fd);
        session_close(session, CLOSE_OVERSIZED, NULL);
        return 0;
    case PACKET_BAD_FDS:
        session_close(session, CLOSE_BAD_FDS, NULL);
        return 0;
    default:
        session_close(session, errno == ECONNRESET ? CLOSE_CLIENT : CLOSE_SOCKET_ERROR, strerror(errno));
        return 0;
    }
}

/* Documents take longer than everything else together: one, and it is the next session's turn. */
static int was_a_document(const struct session *session)
{
    const enum message_kind kind = session->worker->message.kind;
    return kind == MESSAGE_STATS || kind == MESSAGE_CONTROL;
}

static void on_poll(uv_poll_t *poll, int status, int events)
{
    struct session *session = poll->data;
    if (status < 0) {
        session_close(session, CLOSE_SOCKET_ERROR, uv_strerror(status));
        return;
    }
    session->active_ns = clock_ns();
    if (events & UV_WRITABLE)
        session_flush(session);
    if (session->n_pauses &&
        (events & UV_DISCONNECT)) { /* what it still sent can reach nobody who waits for it */
        session_close(session, CLOSE_CLIENT, NULL);
        return;
    }
    for (int i = 0; i < SESSION_BATCH && session->state != SESSION_CLOSING && !session->n_pauses; i++)
        if (!read_datagram(session) || was_a_document(session))
            break;
}

void session_pause(struct session *session)
{
    session->n_pauses++;
    session->worker->stats.window_full++;
    session_wait_as_needed(session);
}

void session_resume(struct session *session)
{
    assert(session->n_pauses > 0);
    session->n_pauses--;
    session_wait_as_needed(session);
}

int session_hung_up(const struct session *session)
{
    struct pollfd poll_fd = {.fd = session->fd, .events = POLLRDHUP};
    return session->state != SESSION_CLOSING && poll(&poll_fd, 1, 0) == 1 &&
           (poll_fd.revents & (POLLRDHUP | POLLHUP | POLLERR)) != 0;
}

/* ---- page ---- */

enum epd_status session_flag_acquire(struct session *session, uint32_t *flag_idx, struct epd_error *error)
{
    for (uint32_t word = 0; word < EPD_PAGE_MAX_PLANS / 64; word++) {
        if (session->flags_used[word] == UINT64_MAX)
            continue;
        const uint32_t bit = (uint32_t)__builtin_ctzll(~session->flags_used[word]);
        session->flags_used[word] |= 1ull << bit;
        *flag_idx = word * 64 + bit;
        return EPD_OK;
    }
    return error_set(error, EPD_QUOTA, "plans: the session page has %d places, all taken",
                     EPD_PAGE_MAX_PLANS);
}

void session_flag_release(struct session *session, uint32_t flag_idx)
{
    session->flags_used[flag_idx / 64] &= ~(1ull << (flag_idx % 64));
}

/* ---- close ---- */

static void tell_client(struct session *session)
{
    const enum epd_status status = close_reason_status(session->reason);
    if (session->page)
        atomic_store_explicit(&session->page->closed, (uint32_t)status, memory_order_release);
    if (session->reason == CLOSE_CLIENT || session->reason == CLOSE_SOCKET_ERROR)
        return;
    struct worker *worker = session->worker;
    struct message message = {.kind = MESSAGE_CLOSED, .closed = {.status = status}};
    (void)snprintf(message.closed.reason, sizeof(message.closed.reason), "%s", session->detail);
    struct epd_error error = {0};
    size_t bytes = 0;
    if (codec_encode(&message, worker->encoded, &bytes, &error) != EPD_OK)
        return;
    /* Best effort: a client that does not read learns it from the end of the connection and from its page. */
    if (packet_send(session->fd, worker->encoded, bytes, -1) != PACKET_OK)
        log_write(worker->log, LOG_DEBUG, "session %" PRIu64 " was not told why it ends", session->id);
}

/* Members first: their queued launches end while plans and page are still there. */
static void drop_holdings(struct session *session)
{
    struct epd_error why;
    (void)error_set(&why, close_reason_status(session->reason), "%s", session->detail);
    list_each(node, after, &session->members)
        member_leave(list_owner(node, struct member, in_session), &why, 0);
    while (!list_empty(&session->plans))
        rank_plan_destroy(list_owner(session->plans.next, struct rank_plan, in_session));
    while (!list_empty(&session->buffers))
        buffer_drop(list_owner(session->buffers.next, struct buffer, in_session));
    while (session->first_output)
        session_drop_output(session);
}

void session_close(struct session *session, enum close_reason reason, const char *detail)
{
    if (session->state == SESSION_CLOSING)
        return;
    set_state(session, SESSION_CLOSING);
    session->reason = reason;
    (void)snprintf(session->detail, sizeof(session->detail), "%.*s", (int)sizeof(session->detail) - 1,
                   detail ? detail : close_reason_text(reason));
    for (char *at = session->detail; *at; at++) /* it may hold a client's bytes, and goes into documents */
        if (*at < ' ' || *at > '~')
            *at = '?';
    list_remove(&session->in_worker);
    list_append(&session->worker->closing, &session->in_worker);
    if (session->kind ==
        SESSION_CONTROL) /* it holds nothing else, and somebody may be waiting for the place */
        quota_close(&session->worker->accounts, &session->quota);
}

static void log_end(struct session *session)
{
    struct worker *worker = session->worker;
    const enum close_reason reason = session->reason;
    const enum log_level expected = session->kind == SESSION_RANK ? LOG_INFO : LOG_DEBUG;
    (void)log_limited(worker->log, close_reason_expected(reason) ? expected : LOG_WARN,
                      close_reason_name(reason), clock_ns(),
                      "session %" PRIu64 " closed reason %s pid %d uid %u requests %" PRIu64 " detail %s",
                      session->id, close_reason_name(reason), (int)session->peer.pid, session->peer.uid,
                      session->n_requests, session->detail);
}

void session_end_closed(struct worker *worker)
{
    while (!list_empty(&worker->closing)) {
        struct session *session = list_owner(worker->closing.next, struct session, in_worker);
        list_remove(&session->in_worker);
        worker->stats.sessions_closed[session->reason]++;
        log_end(session);
        tell_client(session);
        drop_holdings(session);
        drop_peer(session);
        uv_close((uv_handle_t *)&session->poll, on_poll_closed);
    }
}
