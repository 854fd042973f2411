/* What a session sends. Loop thread. */
#include "daemon/session_output.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "daemon/reserve.h"
#include "daemon/session.h"
#include "proto/codec.h"
#include "proto/packet.h"

/* A datagram that the socket did not take yet. */
struct output {
    struct output *next;
    size_t bytes;
    int fd; /* owned, -1 if none */
    unsigned char datagram[];
};

void session_drop_output(struct session *session)
{
    struct output *output = session->first_output;
    session->first_output = output->next;
    if (!session->first_output)
        session->last_output = NULL;
    session->output_bytes -= output->bytes;
    if (output->fd >= 0) {
        session->n_output_fds--;
        (void)close(output->fd);
    }
    free(output);
}

static void output_queue(struct session *session, const unsigned char *datagram, size_t bytes, int fd)
{
    if (session->output_bytes + bytes > session->worker->config.output_per_session ||
        (fd >= 0 && session->n_output_fds >= SESSION_MAX_OUTPUT_FDS)) {
        session_close(session, CLOSE_SLOW_READER, NULL);
        return;
    }
    struct output *output = malloc(sizeof(*output) + bytes);
    int copy = fd >= 0 ? fcntl(fd, F_DUPFD_CLOEXEC, 0) : -1;
    const int kept = session->kind == SESSION_RANK && reserve_touched(copy); /* for people */
    if (!output || (fd >= 0 && copy < 0) || kept) {
        free(output);
        if (copy >= 0)
            (void)close(copy);
        session_close(session, CLOSE_NO_MEMORY, "no memory or no fd for a reply");
        return;
    }
    *output = (struct output){.bytes = bytes, .fd = copy};
    memcpy(output->datagram, datagram, bytes);
    if (session->last_output)
        session->last_output->next = output;
    else
        session->first_output = output;
    session->last_output = output;
    session->output_bytes += bytes;
    session->n_output_fds += fd >= 0;
    session_wait_as_needed(session);
}

/* The socket is writable, but a message with an fd is not taken: waiting for the socket would spin. */
static void wait_for_room(struct session *session)
{
    session->crowded = 1;
    worker_watch(session->worker);
}

void session_flush(struct session *session)
{
    while (session->first_output && session->state != SESSION_CLOSING) {
        struct output *output = session->first_output;
        switch (packet_send(session->fd, output->datagram, output->bytes, output->fd)) {
        case PACKET_OK:
            session_drop_output(session);
            break;
        case PACKET_AGAIN:
            return;
        case PACKET_CROWDED:
            wait_for_room(session);
            session_wait_as_needed(session);
            return;
        case PACKET_EOF:
            session_close(session, CLOSE_CLIENT, NULL);
            return;
        default:
            session_close(session, CLOSE_SOCKET_ERROR, strerror(errno));
            return;
        }
    }
    session_wait_as_needed(session);
}

int session_retry(struct session *session)
{
    if (session->crowded) {
        session->crowded = 0;
        session_flush(session);
    }
    return session->crowded;
}

void session_send(struct session *session, const struct message *message, int fd)
{
    if (session->state == SESSION_CLOSING)
        return;
    struct worker *worker = session->worker;
    struct epd_error error = {0};
    size_t bytes = 0;
    if (codec_encode(message, worker->encoded, &bytes, &error) != EPD_OK) {
        log_write(worker->log, LOG_ERROR, "session %" PRIu64 " reply %s not encoded: %s", session->id,
                  message_kind_name(message->kind), error.text);
        session_close(session, CLOSE_BAD_STATE, error.text);
        return;
    }
    if (session->first_output) { /* order */
        output_queue(session, worker->encoded, bytes, fd);
        return;
    }
    switch (packet_send(session->fd, worker->encoded, bytes, fd)) {
    case PACKET_OK:
        return;
    case PACKET_CROWDED:
        wait_for_room(session);
        output_queue(session, worker->encoded, bytes, fd);
        return;
    case PACKET_AGAIN:
        output_queue(session, worker->encoded, bytes, fd);
        return;
    case PACKET_EOF:
        session_close(session, CLOSE_CLIENT, NULL);
        return;
    default:
        session_close(session, errno == EPIPE || errno == ECONNRESET ? CLOSE_CLIENT : CLOSE_SOCKET_ERROR,
                      strerror(errno));
    }
}

void session_reply_error(struct session *session, uint64_t request_id, const struct epd_error *error)
{
    stats_count_error(&session->worker->stats, error->status);
    struct message reply = {.kind = MESSAGE_REPLY_ERROR, .request_id = request_id, .reply_error = *error};
    session_send(session, &reply, -1);
    if (error->status == EPD_CUDA) /* whatever was asked for: this process has lost its GPU */
        worker_fail(session->worker, error);
}

void session_reply_ok(struct session *session, uint64_t request_id)
{
    struct message reply = {.kind = MESSAGE_REPLY_OK, .request_id = request_id};
    session_send(session, &reply, -1);
}
