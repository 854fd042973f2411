#include "client/hello.h"

#include <errno.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>

#include "client/deadline.h"
#include "proto/codec.h"
#include "proto/packet.h"

/* 0: wait for ever. */
static enum epd_status set_receive_timeout(int socket, uint32_t ms, struct epd_error *error)
{
    struct timeval timeout = {.tv_sec = ms / 1000, .tv_usec = (suseconds_t)(ms % 1000) * 1000};

    if (setsockopt(socket, SOL_SOCKET, SO_RCVTIMEO, &timeout, sizeof timeout) < 0)
        return error_set(error, EPD_SYSTEM, "client: SO_RCVTIMEO: %s", strerror(errno));
    return EPD_OK;
}

/* A daemon that refuses the session may say so and close before the hello is sent: a failed send is no error,
 * for its word is still to be read, and without one the receiver sees the hang-up. */
static enum epd_status send_hello(struct inbox *inbox, const char *client_name, struct epd_error *error)
{
    struct message request = {.kind = MESSAGE_HELLO,
                              .request_id = HELLO_REQUEST_ID,
                              .hello = {.major = EPD_PROTOCOL_MAJOR, .minor = EPD_PROTOCOL_MINOR}};
    size_t bytes;

    strncpy(request.hello.client_name, client_name, sizeof request.hello.client_name - 1);
    if (codec_encode(&request, inbox->datagram, &bytes, error))
        return error->status;
    enum packet_result result = packet_send(inbox->socket, inbox->datagram, bytes, -1);
    if (result == PACKET_OK || result == PACKET_EOF)
        return EPD_OK;
    return error_set(error, EPD_SYSTEM, "hello: sendmsg: %s", strerror(errno));
}

static enum epd_status receive_hello(struct inbox *inbox, struct epd_error *error)
{
    switch (inbox_receive(inbox, error)) {
    case INBOX_HUNG_UP:
        return error_set(error, EPD_DISCONNECTED, "the daemon hung up before it answered the hello");
    case INBOX_NOTHING:
        return error_set(error, EPD_DISCONNECTED, "the daemon did not answer the hello in time");
    case INBOX_FAILED:
        return error->status;
    case INBOX_MESSAGE:
        break;
    }
    if (inbox_check_reply(&inbox->item, MESSAGE_REPLY_HELLO, error))
        return error->status;
    if (inbox->item.message.request_id == HELLO_REQUEST_ID)
        return EPD_OK;
    inbox_drop_fd(&inbox->item);
    return error_set(error, EPD_PROTOCOL, "the daemon answered request %llu, want %d",
                     (unsigned long long)inbox->item.message.request_id, HELLO_REQUEST_ID);
}

static enum epd_status open_page(struct inbox *inbox, struct page **page, struct epd_error *error)
{
    const struct message_reply_hello *reply = &inbox->item.message.reply_hello;

    if (reply->major != EPD_PROTOCOL_MAJOR)
        return error_set(error, EPD_VERSION_MISMATCH, "the daemon speaks protocol %u.%u, this library %d.%d",
                         reply->major, reply->minor, EPD_PROTOCOL_MAJOR, EPD_PROTOCOL_MINOR);
    if (inbox->item.fd < 0)
        return error_set(error, EPD_PROTOCOL, "the daemon's hello came without the session page");
    return page_open(inbox->item.fd, reply->page_bytes, page, error);
}

enum epd_status hello(struct inbox *inbox, const char *client_name, uint64_t deadline_ns, struct page **page,
                      struct epd_error *error)
{
    uint32_t left_ms = deadline_left_ms(deadline_ns);

    if (set_receive_timeout(inbox->socket, left_ms ? left_ms : 1, error) ||
        send_hello(inbox, client_name, error) || receive_hello(inbox, error))
        return error->status;
    enum epd_status status = open_page(inbox, page, error);
    inbox_drop_fd(&inbox->item);
    return status ? status : set_receive_timeout(inbox->socket, 0, error);
}
