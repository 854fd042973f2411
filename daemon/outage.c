#include "daemon/outage.h"

#include <errno.h>
#include <inttypes.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <unistd.h>

#include "daemon/clock.h"
#include "daemon/document.h"
#include "proto/codec.h"
#include "proto/packet.h"

/* Everything one exchange needs; too much for a stack frame that is read often. */
struct exchange {
    struct arena arena;
    struct message message;
    unsigned char datagram[EPD_MAX_DATAGRAM_BYTES];
};

static json_t *make_document(const struct outage *outage)
{
    return json_pack("{s:s s:s s:i s:i s:s s:I s:I s:s s:I s:I s:I}", "verb", "status", "version",
                     EPD_VERSION, "pid", 0, "supervisor_pid", (int)getpid(), "worker", outage->worker,
                     "generation", (json_int_t)outage->generation, "hangs", (json_int_t)outage->hangs,
                     "last_exit", outage->last_exit, "restart_in_ms", (json_int_t)outage->restart_in_ms,
                     "failures", (json_int_t)outage->failures, "time_unix_ms", (json_int_t)clock_unix_ms());
}

static void send_reply(int fd, struct exchange *exchange, const struct message *reply, int reply_fd)
{
    struct epd_error error = {0};
    size_t bytes = 0;
    if (codec_encode(reply, exchange->datagram, &bytes, &error) == EPD_OK)
        (void)!packet_send(fd, exchange->datagram, bytes,
                           reply_fd); /* a caller that has gone needs no answer */
}

static void reply_status(int fd, struct exchange *exchange, const struct outage *outage)
{
    struct epd_error error = {0};
    struct message reply = {.kind = MESSAGE_REPLY_DOCUMENT, .request_id = exchange->message.request_id};
    int document_fd = -1;
    if (document_seal(make_document(outage), &document_fd, &reply.reply_document.bytes, &error) != EPD_OK)
        return;
    send_reply(fd, exchange, &reply, document_fd);
    (void)close(document_fd);
}

static void reply_down(int fd, struct exchange *exchange, const struct outage *outage)
{
    struct message reply = {.kind = MESSAGE_REPLY_ERROR, .request_id = exchange->message.request_id};
    (void)error_set(&reply.reply_error, EPD_RESTARTED,
                    "no worker serves (%s for the next; the last one: %s, %" PRIu64
                    " failures), next start in %" PRIu64 " ms",
                    outage->worker, outage->last_exit, outage->failures, outage->restart_in_ms);
    send_reply(fd, exchange, &reply, -1);
}

static void converse(int fd, struct exchange *exchange, const struct outage *outage)
{
    size_t bytes = 0;
    int given_fd = -1;
    struct epd_error error = {0};
    if (packet_receive(fd, exchange->datagram, sizeof(exchange->datagram), &bytes, &given_fd) != PACKET_OK)
        return;
    if (given_fd >= 0)
        (void)close(given_fd);
    if (codec_decode(CODEC_FROM_CONTROL, exchange->datagram, bytes, &exchange->arena, &exchange->message,
                     &error) != EPD_OK)
        return;
    if (exchange->message.kind == MESSAGE_CONTROL && exchange->message.control.verb == CONTROL_STATUS)
        reply_status(fd, exchange, outage);
    else
        reply_down(fd, exchange, outage);
}

void outage_answer(int listen_fd, const struct outage *outage)
{
    int fd = accept4(listen_fd, NULL, NULL, SOCK_CLOEXEC);
    if (fd < 0) {
        (void)poll(
            NULL, 0,
            OUTAGE_LOOK_MS); /* no fds, perhaps: the caller is still there, and asked for again at once */
        return;
    }
    const struct timeval limit = {.tv_usec = OUTAGE_READ_MS * 1000};
    struct exchange *exchange = calloc(1, sizeof(*exchange));
    if (exchange && arena_init(&exchange->arena, EPD_MAX_ARENA_BYTES) == EPD_OK) {
        (void)setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof(limit));
        (void)setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof(limit));
        converse(fd, exchange, outage);
        arena_fini(&exchange->arena);
    }
    free(exchange);
    (void)close(fd);
}
