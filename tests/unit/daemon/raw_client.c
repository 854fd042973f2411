#include "tests/unit/daemon/raw_client.h"

#include <check.h>
#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#include "proto/packet.h"

static void sleep_ms(int ms)
{
    struct timespec time = {ms / 1000, (ms % 1000) * 1000000L};
    (void)nanosleep(&time, NULL);
}

static uint64_t now_ns(void)
{
    struct timespec now;
    (void)clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

void raw_connect(struct raw_client *client, const char *path)
{
    memset(client, 0, sizeof(*client));
    client->message_fd = -1;
    client->side = CODEC_FROM_DAEMON;
    ck_assert_int_eq(arena_init(&client->arena, EPD_MAX_ARENA_BYTES), EPD_OK);
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    ck_assert_uint_lt(strlen(path), sizeof(address.sun_path));
    memcpy(address.sun_path, path, strlen(path));
    for (int waited = 0;; waited += 10) {
        client->fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
        ck_assert_int_ge(client->fd, 0);
        if (connect(client->fd, (struct sockaddr *)&address, sizeof(address)) == 0)
            return;
        close(client->fd);
        ck_assert_msg(waited < RAW_DEADLINE_MS, "no daemon at %s: %s", path, strerror(errno));
        sleep_ms(10);
    }
}

void raw_send_bytes(struct raw_client *client, const void *bytes, size_t n, int fd)
{
    ck_assert_int_eq(packet_send(client->fd, bytes, n, fd), PACKET_OK);
}

uint64_t raw_send(struct raw_client *client, struct message message, int fd)
{
    struct epd_error error = {0};
    size_t bytes = 0;
    message.request_id = message.kind == MESSAGE_LAUNCH ? 0 : ++client->last_request_id;
    ck_assert_msg(codec_encode(&message, client->datagram, &bytes, &error) == EPD_OK, "%s", error.text);
    raw_send_bytes(client, client->datagram, bytes, fd);
    return message.request_id;
}

static int wait_readable(const struct raw_client *client, int ms)
{
    struct pollfd poll_fd = {.fd = client->fd, .events = POLLIN};
    return poll(&poll_fd, 1, ms) == 1;
}

const struct message *raw_expect(struct raw_client *client, enum message_kind kind)
{
    struct epd_error error = {0};
    size_t bytes = 0;
    if (client->message_fd >= 0)
        close(client->message_fd);
    client->message_fd = -1;
    ck_assert_msg(wait_readable(client, RAW_DEADLINE_MS), "nothing came, want %s", message_kind_name(kind));
    int result =
        packet_receive(client->fd, client->datagram, sizeof(client->datagram), &bytes, &client->message_fd);
    ck_assert_msg(result == PACKET_OK, "packet result %d, want %s", result, message_kind_name(kind));
    ck_assert_msg(codec_decode(client->side, client->datagram, bytes, &client->arena, &client->message,
                               &error) == EPD_OK,
                  "%s", error.text);
    const struct message *got = &client->message;
    const char *text = got->kind == MESSAGE_REPLY_ERROR ? got->reply_error.text
                       : got->kind == MESSAGE_CLOSED    ? got->closed.reason
                                                        : "";
    ck_assert_msg(got->kind == kind, "got %s (%s), want %s", message_kind_name(got->kind), text,
                  message_kind_name(kind));
    return got;
}

void raw_expect_error(struct raw_client *client, enum epd_status status, const char *part)
{
    const struct message *message = raw_expect(client, MESSAGE_REPLY_ERROR);
    ck_assert_msg(message->reply_error.status == status && strstr(message->reply_error.text, part),
                  "got %s '%s', want %s with '%s'", status_name(message->reply_error.status),
                  message->reply_error.text, status_name(status), part);
}

void raw_expect_closed(struct raw_client *client, enum epd_status status, const char *part)
{
    const struct message *message = raw_expect(client, MESSAGE_CLOSED);
    ck_assert_msg(message->closed.status == status && strstr(message->closed.reason, part),
                  "got %s '%s', want %s with '%s'", status_name(message->closed.status),
                  message->closed.reason, status_name(status), part);
    char byte;
    ck_assert(wait_readable(client, RAW_DEADLINE_MS));
    ck_assert_int_le(recv(client->fd, &byte, 1, 0), 0);
}

void raw_expect_silence(struct raw_client *client, int ms)
{
    ck_assert_msg(!wait_readable(client, ms), "something came");
}

void raw_open(struct raw_client *client, const char *path)
{
    raw_connect(client, path);
    struct message hello = {
        .kind = MESSAGE_HELLO,
        .hello = {.major = EPD_PROTOCOL_MAJOR, .minor = EPD_PROTOCOL_MINOR, .client_name = "raw"}};
    raw_send(client, hello, -1);
    const struct message *reply = raw_expect(client, MESSAGE_REPLY_HELLO);
    client->session_id = reply->reply_hello.session_id;
    client->epoch = reply->reply_hello.epoch;
    memcpy(client->boot_id, reply->reply_hello.boot_id, sizeof(client->boot_id));
    struct epd_error error = {0};
    ck_assert_msg(page_open(client->message_fd, reply->reply_hello.page_bytes, &client->page, &error) ==
                      EPD_OK,
                  "%s", error.text);
}

void raw_close(struct raw_client *client)
{
    if (client->fd >= 0)
        close(client->fd);
    if (client->message_fd >= 0)
        close(client->message_fd);
    if (client->page)
        page_close(client->page);
    arena_fini(&client->arena);
    client->fd = client->message_fd = -1;
    client->page = NULL;
}

struct message raw_join(const char *name, uint32_t world_size, uint32_t rank)
{
    struct message join = {.kind = MESSAGE_GROUP_JOIN,
                           .group_join = {.world_size = world_size,
                                          .rank = rank,
                                          .config = {.n_experts = world_size * 2,
                                                     .top_k = 2,
                                                     .hidden = 16,
                                                     .ffn = 32,
                                                     .max_tokens = 8,
                                                     .alignment = 1,
                                                     .dtype = EPD_F32,
                                                     .overflow = EPD_OVERFLOW_ERROR}}};
    strncpy(join.group_join.name, name, sizeof(join.group_join.name) - 1);
    return join;
}

uint64_t raw_join_all(struct raw_client *const *clients, uint32_t n, const char *name)
{
    uint64_t group_id = 0;
    for (uint32_t rank = 0; rank < n; rank++)
        raw_send(clients[rank], raw_join(name, n, rank), -1);
    for (uint32_t rank = 0; rank < n; rank++)
        group_id = raw_expect(clients[rank], MESSAGE_REPLY_GROUP)->reply_group.group_id;
    return group_id;
}

struct message raw_barrier(uint64_t group_id)
{
    return (struct message){.kind = MESSAGE_PLAN_CREATE,
                            .plan_create = {.group_id = group_id, .op = EPD_OP_BARRIER}};
}

struct raw_plan raw_take_plan(struct raw_client *client)
{
    const struct message_reply_plan *reply = &raw_expect(client, MESSAGE_REPLY_PLAN)->reply_plan;
    return (struct raw_plan){reply->plan_id, reply->shape_hash, reply->flag_idx, reply->plan_key};
}

void raw_barrier_all(struct raw_client *const *clients, uint32_t n, uint64_t group_id, struct raw_plan *plans)
{
    for (uint32_t rank = 0; rank < n; rank++)
        raw_send(clients[rank], raw_barrier(group_id), -1);
    for (uint32_t rank = 0; rank < n; rank++)
        plans[rank] = raw_take_plan(clients[rank]);
}

void raw_launch(struct raw_client *client, const struct raw_plan *plan, uint64_t seq)
{
    flag_set(&client->page->plans[plan->flag_idx].ready);
    struct message launch = {
        .kind = MESSAGE_LAUNCH,
        .launch = {.plan_id = plan->plan_id, .seq = seq, .shape_hash = plan->shape_hash, .n_repeats = 1}};
    raw_send(client, launch, -1);
}

enum epd_status raw_done(struct raw_client *client, const struct raw_plan *plan, const char *part)
{
    ck_assert_msg(flag_wait(&client->page->plans[plan->flag_idx].done,
                            now_ns() + RAW_DEADLINE_MS * 1000000ull) == EPD_OK,
                  "plan %lu is not done", (unsigned long)plan->plan_id);
    uint64_t seen = atomic_load(&client->page->read_idx);
    struct page_entry entry;
    if (!page_take(client->page, plan->plan_id, &seen, &entry))
        return EPD_OK;
    atomic_store(&client->page->read_idx, seen);
    ck_assert_msg(strstr(entry.text, part), "got '%s', want '%s' in it", entry.text, part);
    return (enum epd_status)entry.status;
}

char *raw_control(const char *path, enum control_verb verb)
{
    static struct raw_client client;
    raw_connect(&client, path);
    raw_send(&client, (struct message){.kind = MESSAGE_CONTROL, .control = {.verb = verb}}, -1);
    const struct message *reply = raw_expect(&client, MESSAGE_REPLY_DOCUMENT);
    const size_t bytes = reply->reply_document.bytes;
    char *text = calloc(1, bytes + 1);
    ck_assert_ptr_nonnull(text);
    ck_assert_int_eq(pread(client.message_fd, text, bytes, 0), (ssize_t)bytes);
    raw_close(&client);
    return text;
}
