#include "tests/fault/wire.h"

#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#include "proto/codec.h"
#include "proto/packet.h"

static void die(const struct wire *wire, const char *what)
{
    fprintf(stderr, "wire: %s (%s)\n", what, wire->why);
    abort();
}

int wire_connect(struct wire *wire, const char *path)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};

    memset(wire, 0, offsetof(struct wire, datagram));
    wire->reply_fd = -1;
    snprintf(address.sun_path, sizeof address.sun_path, "%s", path);
    wire->socket = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
    if (wire->socket < 0 || arena_init(&wire->arena, EPD_MAX_ARENA_BYTES) != EPD_OK)
        die(wire, strerror(errno));
    if (connect(wire->socket, (struct sockaddr *)&address, sizeof address) == 0)
        return 0;
    int failed = errno;
    wire_close(wire);
    return failed;
}

void wire_close(struct wire *wire)
{
    if (wire->reply_fd >= 0)
        close(wire->reply_fd);
    if (wire->socket >= 0)
        close(wire->socket);
    if (wire->page)
        page_close(wire->page);
    arena_fini(&wire->arena);
    wire->socket = wire->reply_fd = -1;
    wire->page = NULL;
}

void wire_open(struct wire *wire, const char *path)
{
    int failed = wire_connect(wire, path);
    if (failed)
        die(wire, strerror(failed));
    if (wire_hello(wire) != EPD_OK)
        die(wire, "hello");
}

/* ---- datagrams ---- */

int wire_send_bytes(struct wire *wire, const void *datagram, size_t bytes, const int *fds, unsigned n_fds)
{
    struct iovec data = {.iov_base = (void *)datagram, .iov_len = bytes};
    struct msghdr header = {.msg_iov = &data, .msg_iovlen = 1};
    _Alignas(struct cmsghdr) char control[CMSG_SPACE(256 * sizeof(int))];

    if (n_fds) {
        memset(control, 0, sizeof control);
        header.msg_control = control;
        header.msg_controllen = CMSG_SPACE(n_fds * sizeof(int));
        struct cmsghdr *rights = CMSG_FIRSTHDR(&header);
        rights->cmsg_level = SOL_SOCKET;
        rights->cmsg_type = SCM_RIGHTS;
        rights->cmsg_len = CMSG_LEN(n_fds * sizeof(int));
        memcpy(CMSG_DATA(rights), fds, n_fds * sizeof(int));
    }
    return sendmsg(wire->socket, &header, MSG_NOSIGNAL) < 0 ? errno : 0;
}

int wire_send(struct wire *wire, struct message *message, int fd)
{
    unsigned char datagram[EPD_MAX_DATAGRAM_BYTES];
    struct epd_error error;
    size_t bytes;

    message->request_id = message->kind == MESSAGE_LAUNCH ? 0 : ++wire->request_id;
    if (codec_encode(message, datagram, &bytes, &error) != EPD_OK) {
        snprintf(wire->why, sizeof wire->why, "%s", error.text);
        die(wire, "not encoded");
    }
    return wire_send_bytes(wire, datagram, bytes, &fd, fd >= 0);
}

static void take_reason(struct wire *wire)
{
    const struct message *reply = &wire->reply;

    if (reply->kind == MESSAGE_REPLY_ERROR) {
        snprintf(wire->why, sizeof wire->why, "%s", reply->reply_error.text);
    } else if (reply->kind == MESSAGE_CLOSED) {
        wire->closed = reply->closed.status;
        snprintf(wire->why, sizeof wire->why, "%s", reply->closed.reason);
    }
}

enum wire_event wire_receive(struct wire *wire, int deadline_ms)
{
    struct pollfd readable = {.fd = wire->socket, .events = POLLIN};
    struct epd_error error = {0};
    size_t bytes = 0;

    if (wire->reply_fd >= 0)
        close(wire->reply_fd);
    wire->reply_fd = -1;
    int n_ready;
    do /* a signal, a fuzzer's alarm for one, may prolong the wait */
        n_ready = poll(&readable, 1, deadline_ms);
    while (n_ready < 0 && errno == EINTR);
    if (n_ready <= 0)
        return WIRE_NOTHING;
    enum packet_result result =
        packet_receive(wire->socket, wire->datagram, sizeof wire->datagram, &bytes, &wire->reply_fd);
    if (result == PACKET_EOF) /* an error of the socket may overtake the daemon's last word */
        result = packet_receive(wire->socket, wire->datagram, sizeof wire->datagram, &bytes, &wire->reply_fd);
    if (result == PACKET_EOF)
        return WIRE_ENDED;
    if (result != PACKET_OK)
        die(wire, "the daemon sent what cannot be received");
    if (codec_decode(CODEC_FROM_DAEMON, wire->datagram, bytes, &wire->arena, &wire->reply, &error) !=
        EPD_OK) {
        snprintf(wire->why, sizeof wire->why, "%s", error.text);
        die(wire, "the daemon sent what does not decode");
    }
    take_reason(wire);
    return WIRE_MESSAGE;
}

enum epd_status wire_wait_end(struct wire *wire)
{
    for (;;) {
        switch (wire_receive(wire, WIRE_DEADLINE_MS)) {
        case WIRE_ENDED:
            return wire->closed ? wire->closed : EPD_DISCONNECTED;
        case WIRE_NOTHING:
            return EPD_TIMEOUT;
        case WIRE_MESSAGE:
            break;
        }
    }
}

/* ---- requests ---- */

enum epd_status wire_answer(struct wire *wire)
{
    for (;;) {
        switch (wire_receive(wire, WIRE_DEADLINE_MS)) {
        case WIRE_ENDED:
            return wire->closed ? wire->closed : EPD_DISCONNECTED;
        case WIRE_NOTHING:
            die(wire, "no answer");
            break;
        case WIRE_MESSAGE:
            break;
        }
        if (wire->reply.kind == MESSAGE_CLOSED || wire->reply.request_id != wire->request_id)
            continue;
        return wire->reply.kind == MESSAGE_REPLY_ERROR ? wire->reply.reply_error.status : EPD_OK;
    }
}

enum epd_status wire_call(struct wire *wire, struct message *message, int fd)
{
    if (wire_send(wire, message, fd) != 0)
        return wire_wait_end(wire);
    return wire_answer(wire);
}

enum epd_status wire_hello(struct wire *wire)
{
    struct message hello = {
        .kind = MESSAGE_HELLO,
        .hello = {.major = EPD_PROTOCOL_MAJOR, .minor = EPD_PROTOCOL_MINOR, .client_name = "wire"}};
    struct epd_error error = {0};

    enum epd_status status = wire_call(wire, &hello, -1);
    if (status == EPD_OK &&
        page_open(wire->reply_fd, wire->reply.reply_hello.page_bytes, &wire->page, &error))
        die(wire, error.text);
    return status;
}

struct message wire_join_message(const char *group, uint32_t world_size, uint32_t rank)
{
    struct message join = {.kind = MESSAGE_GROUP_JOIN,
                           .group_join = {.world_size = world_size,
                                          .rank = rank,
                                          .config = {.n_experts = 4 * world_size,
                                                     .top_k = 2,
                                                     .hidden = 32,
                                                     .ffn = 16,
                                                     .max_tokens = 8,
                                                     .capacity_rows = 64,
                                                     .alignment = 1,
                                                     .dtype = EPD_F32,
                                                     .overflow = EPD_OVERFLOW_ERROR}}};
    snprintf(join.group_join.name, sizeof join.group_join.name, "%s", group);
    return join;
}

struct message wire_alloc_message(uint64_t group_id, uint64_t bytes)
{
    return (struct message){.kind = MESSAGE_BUFFER_ALLOC,
                            .buffer_alloc = {.group_id = group_id, .bytes = bytes}};
}

struct message wire_register_message(uint64_t group_id, uint64_t offset, uint64_t bytes)
{
    return (struct message){
        .kind = MESSAGE_BUFFER_REGISTER,
        .buffer_register = {
            .group_id = group_id, .kind = EPD_MEMORY_MEMFD, .offset = offset, .bytes = bytes}};
}

struct message wire_id_message(enum message_kind kind, uint64_t id)
{
    /* leave, release and destroy have the same body */
    return (struct message){.kind = kind, .group_leave = {.id = id}};
}

struct message wire_barrier_message(uint64_t group_id)
{
    return (struct message){.kind = MESSAGE_PLAN_CREATE,
                            .plan_create = {.group_id = group_id, .op = EPD_OP_BARRIER}};
}

uint64_t wire_join_alone(struct wire *wire, const char *group)
{
    struct message join = wire_join_message(group, 1, 0);

    if (wire_call(wire, &join, -1) != EPD_OK)
        die(wire, "join");
    return wire->reply.reply_group.group_id;
}

int wire_launch(struct wire *wire, const struct message_reply_plan *plan, int ready)
{
    struct message launch = {.kind = MESSAGE_LAUNCH,
                             .launch = {.plan_id = plan->plan_id,
                                        .seq = ++wire->last_seq,
                                        .shape_hash = plan->shape_hash,
                                        .n_repeats = 1}};
    if (ready)
        flag_set(&wire->page->plans[plan->flag_idx].ready);
    return wire_send(wire, &launch, -1);
}

enum epd_status wire_done(struct wire *wire, const struct message_reply_plan *plan)
{
    struct page_entry entry;
    struct timespec now;
    uint64_t seen = 0; /* the newest entry of the plan, whenever it was written */

    clock_gettime(CLOCK_MONOTONIC, &now);
    uint64_t deadline_ns =
        ((uint64_t)now.tv_sec * 1000 + WIRE_DEADLINE_MS) * 1000000ull + (uint64_t)now.tv_nsec;
    if (flag_wait(&wire->page->plans[plan->flag_idx].done, deadline_ns) != EPD_OK)
        die(wire, "a launch does not end");
    if (page_take(wire->page, plan->plan_id, &seen, &entry) && entry.seq == wire->last_seq)
        return (enum epd_status)entry.status;
    return EPD_OK;
}
