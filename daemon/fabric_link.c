#include "daemon/fabric_link.h"

#include <arpa/inet.h>
#include <assert.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "daemon/clock.h"

/* Length in front, hash behind. */
#define FRAME_HEAD_BYTES 4u
#define MAX_FRAME_BYTES  (FRAME_HEAD_BYTES + FABRIC_MAX_MESSAGE_BYTES + FABRIC_MAC_BYTES)

struct fabric_link {
    uv_tcp_t tcp;
    uv_timer_t timer; /* of the authentication */
    uv_connect_t connecting;
    const struct fabric_link_owner *owner;
    enum fabric_link_state state;
    enum fabric_side side;
    uint32_t node; /* of the other side, once it is known */
    struct fabric_hello mine, theirs;
    int heard_hello;
    int failing; /* a send could not be done: ends for `why` as soon as the loop runs */
    struct epd_error why;
    struct fabric_keys keys;
    uint64_t n_sent, n_received; /* frames */
    uint64_t sent_bytes, received_bytes, heard_ns;
    uint32_t n_handles;
    char address[64];
    size_t used;
    uint8_t input[MAX_FRAME_BYTES];
};

struct output {
    uv_write_t write;
    uint8_t data[];
};

static void on_closed(uv_handle_t *handle)
{
    struct fabric_link *link = handle->data;
    if (--link->n_handles == 0)
        free(link);
}

void fabric_link_close(struct fabric_link *link, const struct epd_error *why)
{
    if (link->state == FABRIC_LINK_CLOSED)
        return;
    link->state = FABRIC_LINK_CLOSED;
    link->owner->on_end(link->owner->arg, link, why);
    uv_close((uv_handle_t *)&link->timer, on_closed);
    uv_close((uv_handle_t *)&link->tcp, on_closed);
}

static void end(struct fabric_link *link, enum epd_status status, const char *text)
{
    struct epd_error why;
    (void)error_set(&why, status, "%s", text);
    fabric_link_close(link, &why);
}

/* ---- output ---- */

static void on_failed(uv_timer_t *timer)
{
    struct fabric_link *link = timer->data;
    fabric_link_close(link, &link->why);
}

/* Who sends is in the midst of what on_end would take from him: the link ends once the loop runs again. */
static void fail(struct fabric_link *link, enum epd_status status, const char *text)
{
    link->failing = 1;
    (void)error_set(&link->why, status, "%s", text);
    (void)uv_read_stop((uv_stream_t *)&link->tcp);
    (void)uv_timer_start(&link->timer, on_failed, 0, 0); /* cannot fail: not closing */
}

static void on_written(uv_write_t *write, int status)
{
    struct fabric_link *link = write->data;
    free((struct output *)write); /* its first member */
    if (status < 0 && status != UV_ECANCELED)
        end(link, EPD_PEER_LOST, uv_strerror(status));
}

static struct output *output_of(struct fabric_link *link, size_t bytes)
{
    if (link->failing)
        return NULL;
    if (uv_stream_get_write_queue_size((uv_stream_t *)&link->tcp) > FABRIC_MAX_OUTPUT_BYTES) {
        fail(link, EPD_QUOTA, "it does not read");
        return NULL;
    }
    struct output *output = malloc(sizeof(*output) + bytes);
    if (!output)
        fail(link, EPD_NO_MEMORY, "no memory for a message");
    return output;
}

static void write_out(struct fabric_link *link, struct output *output, size_t bytes)
{
    const uv_buf_t buffer = uv_buf_init((char *)output->data, (unsigned)bytes);
    output->write.data = link;
    const int result = uv_write(&output->write, (uv_stream_t *)&link->tcp, &buffer, 1, on_written);
    if (result < 0) {
        free(output);
        fail(link, EPD_PEER_LOST, uv_strerror(result));
        return;
    }
    link->sent_bytes += bytes;
}

static void send_raw(struct fabric_link *link, const void *first, size_t n_first, const void *second,
                     size_t n_second)
{
    struct output *output = output_of(link, n_first + n_second);
    if (!output)
        return;
    memcpy(output->data, first, n_first);
    if (n_second)
        memcpy(output->data + n_first, second, n_second);
    write_out(link, output, n_first + n_second);
}

void fabric_link_send(struct fabric_link *link, const void *data, size_t bytes)
{
    assert(bytes <= FABRIC_MAX_MESSAGE_BYTES);
    if (link->state != FABRIC_LINK_OPEN || link->failing)
        return;
    struct output *output = output_of(link, FRAME_HEAD_BYTES + bytes + FABRIC_MAC_BYTES);
    if (!output)
        return;
    for (unsigned i = 0; i < FRAME_HEAD_BYTES; i++)
        output->data[i] = (uint8_t)(bytes >> 8 * i);
    memcpy(output->data + FRAME_HEAD_BYTES, data, bytes);
    fabric_auth_mark(link->keys.send, link->n_sent++, data, bytes, output->data + FRAME_HEAD_BYTES + bytes);
    write_out(link, output, FRAME_HEAD_BYTES + bytes + FABRIC_MAC_BYTES);
}

/* ---- authentication ---- */

static void open_link(struct fabric_link *link)
{
    const struct fabric_hello *connector = link->side == FABRIC_CONNECTOR ? &link->mine : &link->theirs;
    const struct fabric_hello *listener = link->side == FABRIC_CONNECTOR ? &link->theirs : &link->mine;
    struct epd_error error = {0};
    if (link->failing)
        return;
    fabric_auth_derive(link->owner->key, link->side, connector, listener, &link->keys);
    link->node = link->theirs.node;
    link->state = FABRIC_LINK_OPEN;
    (void)uv_timer_stop(&link->timer);
    if (!link->owner->on_open(link->owner->arg, link, link->node, &error))
        fabric_link_close(link, &error);
}

/* 0 once the link has ended. */
static int take_hello(struct fabric_link *link)
{
    char text[128];
    memcpy(&link->theirs, link->input, sizeof(link->theirs));
    link->heard_hello = 1;
    if (!fabric_auth_hello_known(&link->theirs)) {
        end(link, EPD_PROTOCOL, "it speaks another protocol");
        return 0;
    }
    /* Told only to those who know the secret, or read our log. */
    if (link->theirs.n_nodes != link->owner->n_nodes || link->theirs.node >= link->owner->n_nodes ||
        link->theirs.node == link->owner->node) {
        (void)snprintf(text, sizeof(text), "it says that it is node %u of %u, here is node %u of %u",
                       link->theirs.node, link->theirs.n_nodes, link->owner->node, link->owner->n_nodes);
        end(link, EPD_GROUP_MISMATCH, text);
        return 0;
    }
    return 1;
}

/* The listener: hello -> its own hello and proof; then the proof of the other. */
static size_t prove_listener(struct fabric_link *link)
{
    uint8_t mac[FABRIC_MAC_BYTES];
    if (!link->heard_hello) {
        if (link->used < FABRIC_HELLO_BYTES || !take_hello(link))
            return 0;
        fabric_auth_prove(link->owner->key, FABRIC_LISTENER, &link->theirs, &link->mine, mac);
        send_raw(link, &link->mine, sizeof(link->mine), mac, sizeof(mac));
        return FABRIC_HELLO_BYTES;
    }
    if (link->used < FABRIC_MAC_BYTES)
        return 0;
    if (!fabric_auth_check(link->owner->key, FABRIC_CONNECTOR, &link->theirs, &link->mine, link->input)) {
        end(link, EPD_PERMISSION, "it does not know the secret");
        return 0;
    }
    open_link(link);
    return FABRIC_MAC_BYTES;
}

static size_t prove_connector(struct fabric_link *link)
{
    uint8_t mac[FABRIC_MAC_BYTES];
    if (link->used < FABRIC_HELLO_BYTES + FABRIC_MAC_BYTES || !take_hello(link))
        return 0;
    if (!fabric_auth_check(link->owner->key, FABRIC_LISTENER, &link->mine, &link->theirs,
                           link->input + FABRIC_HELLO_BYTES)) {
        end(link, EPD_PERMISSION, "it does not know the secret");
        return 0;
    }
    fabric_auth_prove(link->owner->key, FABRIC_CONNECTOR, &link->mine, &link->theirs, mac);
    send_raw(link, mac, sizeof(mac), NULL, 0);
    open_link(link);
    return FABRIC_HELLO_BYTES + FABRIC_MAC_BYTES;
}

/* ---- input ---- */

/* Bytes used up; 0: more must come, or the link has ended. */
static size_t take_frame(struct fabric_link *link)
{
    if (link->used < FRAME_HEAD_BYTES)
        return 0;
    size_t bytes = 0;
    for (unsigned i = 0; i < FRAME_HEAD_BYTES; i++)
        bytes |= (size_t)link->input[i] << 8 * i;
    if (bytes > FABRIC_MAX_MESSAGE_BYTES) {
        end(link, EPD_PROTOCOL, "a frame longer than any message");
        return 0;
    }
    if (link->used < FRAME_HEAD_BYTES + bytes + FABRIC_MAC_BYTES)
        return 0;
    const uint8_t *data = link->input + FRAME_HEAD_BYTES;
    if (!fabric_auth_marked(link->keys.receive, link->n_received++, data, bytes, data + bytes)) {
        end(link, EPD_PERMISSION, "a frame that it did not send");
        return 0;
    }
    link->owner->on_message(link->owner->arg, link, data, bytes);
    return FRAME_HEAD_BYTES + bytes + FABRIC_MAC_BYTES;
}

static size_t take_one(struct fabric_link *link)
{
    if (link->failing)
        return 0;
    if (link->state == FABRIC_LINK_OPEN)
        return take_frame(link);
    if (link->state != FABRIC_LINK_PROVING)
        return 0;
    return link->side == FABRIC_LISTENER ? prove_listener(link) : prove_connector(link);
}

static void on_alloc(uv_handle_t *handle, size_t suggested, uv_buf_t *buffer)
{
    struct fabric_link *link = handle->data;
    (void)suggested;
    /* Before it has proved itself a peer fills no more than the frames it owes. */
    const size_t room =
        link->state == FABRIC_LINK_OPEN ? sizeof(link->input) : FABRIC_HELLO_BYTES + FABRIC_MAC_BYTES;
    *buffer = uv_buf_init((char *)link->input + link->used, (unsigned)(room - link->used));
}

static void on_read(uv_stream_t *stream, ssize_t n, const uv_buf_t *buffer)
{
    struct fabric_link *link = stream->data;
    (void)buffer;
    if (n == 0)
        return;
    if (n < 0) {
        end(link, EPD_PEER_LOST, n == UV_EOF ? "it closed the connection" : uv_strerror((int)n));
        return;
    }
    link->used += (size_t)n;
    link->received_bytes += (size_t)n;
    link->heard_ns = clock_ns();
    for (size_t taken = take_one(link); taken && link->state != FABRIC_LINK_CLOSED; taken = take_one(link)) {
        link->used -= taken;
        memmove(link->input, link->input + taken, link->used);
    }
    if (link->state == FABRIC_LINK_PROVING && !link->failing &&
        link->used >= FABRIC_HELLO_BYTES + FABRIC_MAC_BYTES)
        end(link, EPD_PROTOCOL, "too much before it has shown the secret");
}

/* ---- begin ---- */

static void on_auth_timeout(uv_timer_t *timer)
{
    end(timer->data, EPD_TIMEOUT, "it did not show the secret in time");
}

static struct fabric_link *create(const struct fabric_link_owner *owner, enum fabric_side side)
{
    struct fabric_link *link = calloc(1, sizeof(*link));
    if (!link)
        return NULL;
    link->owner = owner;
    link->side = side;
    link->heard_ns = clock_ns();
    link->n_handles = 2;
    fabric_auth_hello(&link->mine, owner->node, owner->n_nodes);
    (void)uv_tcp_init(owner->loop, &link->tcp); /* neither can fail */
    (void)uv_timer_init(owner->loop, &link->timer);
    link->tcp.data = link->timer.data = link->connecting.data = link;
    return link;
}

static void note_address(struct fabric_link *link)
{
    struct sockaddr_storage address;
    int length = sizeof(address);
    char text[48] = "?";
    if (uv_tcp_getpeername(&link->tcp, (struct sockaddr *)&address, &length) != 0)
        return;
    const struct sockaddr_in *v4 = (const struct sockaddr_in *)&address;
    const struct sockaddr_in6 *v6 = (const struct sockaddr_in6 *)&address;
    if (address.ss_family == AF_INET)
        (void)uv_ip4_name(v4, text, sizeof(text));
    else if (address.ss_family == AF_INET6)
        (void)uv_ip6_name(v6, text, sizeof(text));
    (void)snprintf(link->address, sizeof(link->address), address.ss_family == AF_INET6 ? "[%s]:%u" : "%s:%u",
                   text, ntohs(address.ss_family == AF_INET ? v4->sin_port : v6->sin6_port));
}

static int begin(struct fabric_link *link)
{
    link->state = FABRIC_LINK_PROVING;
    note_address(link);
    (void)uv_tcp_nodelay(&link->tcp, 1);
    (void)uv_timer_start(&link->timer, on_auth_timeout, FABRIC_AUTH_MS, 0);
    return uv_read_start((uv_stream_t *)&link->tcp, on_alloc, on_read);
}

static void discard(struct fabric_link *link)
{
    link->state = FABRIC_LINK_CLOSED;
    uv_close((uv_handle_t *)&link->timer, on_closed);
    uv_close((uv_handle_t *)&link->tcp, on_closed);
}

enum epd_status fabric_link_accept(const struct fabric_link_owner *owner, uv_stream_t *server,
                                   struct fabric_link **result, struct epd_error *error)
{
    struct fabric_link *link = create(owner, FABRIC_LISTENER);
    if (!link)
        return error_set(error, EPD_NO_MEMORY, "fabric: no memory for a link");
    int failed = uv_accept(server, (uv_stream_t *)&link->tcp);
    if (failed == 0)
        failed = begin(link);
    if (failed) {
        discard(link);
        return error_set(error, EPD_SYSTEM, "fabric: accept: %s", uv_strerror(failed));
    }
    *result = link;
    return EPD_OK;
}

static void on_connected(uv_connect_t *request, int status)
{
    struct fabric_link *link = request->data;
    if (link->state != FABRIC_LINK_CONNECTING)
        return;
    if (status == 0)
        status = begin(link);
    if (status < 0) {
        end(link, EPD_PEER_LOST, uv_strerror(status));
        return;
    }
    send_raw(link, &link->mine, sizeof(link->mine), NULL, 0);
}

enum epd_status fabric_link_connect(const struct fabric_link_owner *owner, const struct sockaddr *address,
                                    struct fabric_link **result, struct epd_error *error)
{
    struct fabric_link *link = create(owner, FABRIC_CONNECTOR);
    if (!link)
        return error_set(error, EPD_NO_MEMORY, "fabric: no memory for a link");
    link->state = FABRIC_LINK_CONNECTING;
    const int failed = uv_tcp_connect(&link->connecting, &link->tcp, address, on_connected);
    if (failed) {
        discard(link);
        return error_set(error, EPD_PEER_LOST, "fabric: connect: %s", uv_strerror(failed));
    }
    (void)uv_timer_start(&link->timer, on_auth_timeout, FABRIC_AUTH_MS, 0);
    *result = link;
    return EPD_OK;
}

enum fabric_link_state fabric_link_state(const struct fabric_link *link)
{
    return link->state;
}

uint64_t fabric_link_heard_ns(const struct fabric_link *link)
{
    return link->heard_ns;
}

void fabric_link_bytes(const struct fabric_link *link, uint64_t *sent, uint64_t *received)
{
    *sent = link->sent_bytes;
    *received = link->received_bytes;
}

const char *fabric_link_address(const struct fabric_link *link)
{
    return link->address;
}
