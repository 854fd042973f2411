#include "client/inbox.h"

#include <errno.h>
#include <string.h>
#include <unistd.h>

#include "proto/codec.h"
#include "proto/packet.h"

enum epd_status inbox_init(struct inbox *inbox, int socket, struct epd_error *error)
{
    inbox->socket = socket;
    inbox->item.fd = -1;
    if (arena_init(&inbox->arena, EPD_MAX_ARENA_BYTES))
        return error_set(error, EPD_NO_MEMORY, "client: no memory for %d bytes to decode in",
                         EPD_MAX_ARENA_BYTES);
    return EPD_OK;
}

void inbox_fini(struct inbox *inbox)
{
    arena_fini(&inbox->arena);
}

void inbox_drop_fd(struct inbox_item *item)
{
    if (item->fd >= 0)
        close(item->fd);
    item->fd = -1;
}

static enum packet_result receive_once(struct inbox *inbox, size_t *bytes)
{
    return packet_receive(inbox->socket, inbox->datagram, sizeof inbox->datagram, bytes, &inbox->item.fd);
}

/* Next datagram. The first end of file may be an error of the socket that overtakes datagrams sent before the
 * daemon closed, its CLOSED notice among them: only the second one in a row counts. */
static enum packet_result receive(struct inbox *inbox, size_t *bytes)
{
    enum packet_result result = receive_once(inbox, bytes);

    return result == PACKET_EOF ? receive_once(inbox, bytes) : result;
}

static enum inbox_result packet_check(enum packet_result result, struct epd_error *error)
{
    switch (result) {
    case PACKET_OK:
        return INBOX_MESSAGE;
    case PACKET_EOF:
        return INBOX_HUNG_UP;
    case PACKET_AGAIN:
        return INBOX_NOTHING;
    case PACKET_TRUNCATED:
        error_set(error, EPD_PROTOCOL, "datagram from the daemon: longer than %d bytes",
                  EPD_MAX_DATAGRAM_BYTES);
        return INBOX_FAILED;
    case PACKET_BAD_FDS:
        error_set(
            error, EPD_PROTOCOL,
            "datagram from the daemon: more than one fd, or no room for its fd in this process (ulimit -n)");
        return INBOX_FAILED;
    case PACKET_CROWDED: /* of senders */
    case PACKET_ERROR:
        break;
    }
    error_set(error, EPD_SYSTEM, "recvmsg from the daemon: %s", strerror(errno));
    return INBOX_FAILED;
}

enum inbox_result inbox_receive(struct inbox *inbox, struct epd_error *error)
{
    struct message *message = &inbox->item.message;
    size_t bytes = 0;

    inbox->item.fd = -1;
    enum inbox_result result = packet_check(receive(inbox, &bytes), error);
    if (result != INBOX_MESSAGE)
        return result;
    if (codec_decode(CODEC_FROM_DAEMON, inbox->datagram, bytes, &inbox->arena, message, error)) {
        inbox_drop_fd(&inbox->item);
        return INBOX_FAILED;
    }
    if (message->kind != MESSAGE_CLOSED)
        return INBOX_MESSAGE;
    inbox_drop_fd(&inbox->item);
    error_set(error, message->closed.status, "closed by the daemon: %.200s", message->closed.reason);
    return INBOX_FAILED;
}

static int carries_fd(enum message_kind kind)
{
    return kind == MESSAGE_REPLY_HELLO || kind == MESSAGE_REPLY_BUFFER || kind == MESSAGE_REPLY_DOCUMENT;
}

enum epd_status inbox_check_reply(struct inbox_item *item, enum message_kind want, struct epd_error *error)
{
    const struct message *message = &item->message;

    if (message->kind != want || !carries_fd(want))
        inbox_drop_fd(item);
    if (message->kind == want)
        return EPD_OK;
    if (message->kind == MESSAGE_REPLY_ERROR) {
        *error = message->reply_error;
        return error->status;
    }
    return error_set(error, EPD_PROTOCOL, "the daemon answered %s, want %s", message_kind_name(message->kind),
                     message_kind_name(want));
}
