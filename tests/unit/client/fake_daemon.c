#include "tests/unit/client/fake_daemon.h"

#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "proto/codec.h"
#include "proto/packet.h"

/* Not ck_assert: it would leave the script's thread only, and the benchmark runs outside Check. */
#define SCRIPT_CHECK(condition)                                                                              \
    do {                                                                                                     \
        if (!(condition)) {                                                                                  \
            fprintf(stderr, "%s:%d: script: %s\n", __FILE__, __LINE__, #condition);                          \
            abort();                                                                                         \
        }                                                                                                    \
    } while (0)

static void client_must(enum epd_status status)
{
    if (status)
        fprintf(stderr, "client: %s\n", epd_error_text());
    SCRIPT_CHECK(status == EPD_OK);
}

void fake_open(struct fake *fake)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};

    memset(fake, 0, sizeof *fake);
    strcpy(fake->directory, "/tmp/epd-fake-XXXXXX");
    SCRIPT_CHECK(mkdtemp(fake->directory));
    snprintf(fake->path, sizeof fake->path, "%s/epd.sock", fake->directory);
    strcpy(address.sun_path, fake->path);
    fake->listener = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
    SCRIPT_CHECK(bind(fake->listener, (struct sockaddr *)&address, sizeof address) == 0);
    SCRIPT_CHECK(listen(fake->listener, 8) == 0);
    SCRIPT_CHECK(arena_init(&fake->arena, EPD_MAX_ARENA_BYTES) == EPD_OK);
    fake->socket = -1;
    fake->last_fd = -1;
    fake->session_id = 7;
    fake->next_id = 100;
    fake->boot = 1;
}

static void *run_script(void *arg)
{
    struct fake *fake = arg;

    fake->script(fake);
    return NULL;
}

void fake_start(struct fake *fake, void (*script)(struct fake *fake))
{
    fake->script = script;
    SCRIPT_CHECK(pthread_create(&fake->thread, NULL, run_script, fake) == 0);
}

void fake_stop(struct fake *fake)
{
    if (fake->script)
        pthread_join(fake->thread, NULL);
    fake_hang_up(fake);
    fake_stop_listening(fake);
    arena_fini(&fake->arena);
    unlink(fake->path);
    rmdir(fake->directory);
}

void fake_accept(struct fake *fake)
{
    fake->socket = accept4(fake->listener, NULL, NULL, SOCK_CLOEXEC);
    SCRIPT_CHECK(fake->socket >= 0);
}

static void drop_last_fd(struct fake *fake)
{
    if (fake->last_fd >= 0)
        close(fake->last_fd);
    fake->last_fd = -1;
}

static enum packet_result fake_receive(struct fake *fake, size_t *bytes)
{
    drop_last_fd(fake);
    return packet_receive(fake->socket, fake->datagram, sizeof fake->datagram, bytes, &fake->last_fd);
}

void fake_expect(struct fake *fake, enum message_kind kind)
{
    struct epd_error error;
    size_t bytes;

    SCRIPT_CHECK(fake_receive(fake, &bytes) == PACKET_OK);
    if (codec_decode(CODEC_FROM_CLIENT, fake->datagram, bytes, &fake->arena, &fake->last, &error)) {
        fprintf(stderr, "script: %s\n", error.text);
        abort();
    }
    if (fake->last.kind != kind)
        fprintf(stderr, "script: got %s, want %s\n", message_kind_name(fake->last.kind),
                message_kind_name(kind));
    SCRIPT_CHECK(fake->last.kind == kind);
}

int fake_peer_closed(struct fake *fake)
{
    struct message goodbye;
    struct epd_error error;
    size_t bytes;
    enum packet_result result;

    while ((result = fake_receive(fake, &bytes)) == PACKET_OK) {
        if (codec_decode(CODEC_FROM_CLIENT, fake->datagram, bytes, &fake->arena, &goodbye, &error) ||
            goodbye.kind != MESSAGE_GROUP_LEAVE)
            return 0;
        fake->n_goodbyes++;
    }
    return result == PACKET_EOF;
}

void fake_send(struct fake *fake, const struct message *message, int fd)
{
    struct epd_error error;
    size_t bytes;

    SCRIPT_CHECK(codec_encode(message, fake->datagram, &bytes, &error) == EPD_OK);
    SCRIPT_CHECK(packet_send(fake->socket, fake->datagram, bytes, fd) == PACKET_OK);
}

void fake_answer_ok(struct fake *fake)
{
    fake_send(fake, &(struct message){.kind = MESSAGE_REPLY_OK, .request_id = fake->last.request_id}, -1);
}

void fake_answer_error(struct fake *fake, enum epd_status status, const char *text)
{
    struct message reply = {.kind = MESSAGE_REPLY_ERROR, .request_id = fake->last.request_id};

    reply.reply_error.status = status;
    strcpy(reply.reply_error.text, text);
    fake_send(fake, &reply, -1);
}

void fake_answer_hello(struct fake *fake)
{
    struct message reply = {.kind = MESSAGE_REPLY_HELLO, .request_id = fake->last.request_id};
    struct epd_error error;
    int fd;

    SCRIPT_CHECK(page_create(&fake->page, &fd, &error) == EPD_OK);
    reply.reply_hello = (struct message_reply_hello){.major = EPD_PROTOCOL_MAJOR,
                                                     .minor = EPD_PROTOCOL_MINOR,
                                                     .session_id = fake->session_id,
                                                     .boot_id = {fake->boot},
                                                     .epoch = 1,
                                                     .backend = EPD_BACKEND_HOST,
                                                     .page_bytes = sizeof(struct page),
                                                     .daemon_version = "0.0.fake",
                                                     .n_devices = 1,
                                                     .devices = {{.uuid = {9}, .name = "host0"}}};
    fake_send(fake, &reply, fd);
    close(fd);
}

void fake_answer_group(struct fake *fake)
{
    struct message reply = {.kind = MESSAGE_REPLY_GROUP, .request_id = fake->last.request_id};
    const struct message_group_config *config = &fake->last.group_join.config;

    reply.reply_group = (struct message_reply_group){.group_id = fake->next_id++,
                                                     .epoch = 1,
                                                     .device_uuid = {9},
                                                     .n_local_experts = config->n_experts,
                                                     .capacity_rows = 64};
    fake_send(fake, &reply, -1);
}

void fake_answer_buffer(struct fake *fake)
{
    struct message reply = {.kind = MESSAGE_REPLY_BUFFER, .request_id = fake->last.request_id};
    int fd = -1;

    reply.reply_buffer.buffer_id = fake->next_id++;
    reply.reply_buffer.bytes = fake->last.kind == MESSAGE_BUFFER_ALLOC ? fake->last.buffer_alloc.bytes
                                                                       : fake->last.buffer_register.bytes;
    if (fake->last.kind == MESSAGE_BUFFER_ALLOC) {
        fd = memfd_create("fake-buffer", MFD_CLOEXEC | MFD_ALLOW_SEALING);
        SCRIPT_CHECK(fd >= 0 && ftruncate(fd, (off_t)reply.reply_buffer.bytes) == 0);
    }
    fake_send(fake, &reply, fd);
    if (fd >= 0)
        close(fd);
}

void fake_answer_plan(struct fake *fake, uint32_t flag_idx)
{
    struct message reply = {.kind = MESSAGE_REPLY_PLAN, .request_id = fake->last.request_id};

    reply.reply_plan = (struct message_reply_plan){.plan_id = fake->next_id++,
                                                   .plan_key = 1,
                                                   .flag_idx = flag_idx,
                                                   .shape_hash = 0xabcdef,
                                                   .saved_bytes = 40};
    fake_send(fake, &reply, -1);
}

void fake_notice(struct fake *fake, enum epd_status status, const char *reason)
{
    struct message notice = {.kind = MESSAGE_CLOSED, .closed = {.status = status}};

    strcpy(notice.closed.reason, reason);
    fake_send(fake, &notice, -1);
}

void fake_hang_up(struct fake *fake)
{
    drop_last_fd(fake);
    if (fake->socket >= 0)
        close(fake->socket);
    fake->socket = -1;
    page_close(fake->page);
    fake->page = NULL;
}

void fake_stop_listening(struct fake *fake)
{
    if (fake->listener >= 0)
        close(fake->listener);
    fake->listener = -1;
}

void fake_complete(struct fake *fake, uint32_t flag_idx)
{
    struct page_plan *plan = &fake->page->plans[flag_idx];

    SCRIPT_CHECK(flag_wait(&plan->ready, UINT64_MAX) == EPD_OK);
    atomic_fetch_add(&plan->completed, 1);
    flag_set(&plan->done);
}

void fake_fail(struct fake *fake, uint32_t flag_idx, const struct page_entry *entry)
{
    struct page_plan *plan = &fake->page->plans[flag_idx];

    SCRIPT_CHECK(flag_wait(&plan->ready, UINT64_MAX) == EPD_OK);
    page_report(fake->page, entry);
    atomic_fetch_add(&plan->failed, 1);
    atomic_fetch_add(&plan->completed, 1);
    flag_set(&plan->done);
}

void fake_session(struct fake *fake)
{
    fake_accept(fake);
    fake_expect(fake, MESSAGE_HELLO);
    fake_answer_hello(fake);
    fake_expect(fake, MESSAGE_GROUP_JOIN);
    fake_answer_group(fake);
}

struct epd_client *open_client(const struct fake *fake)
{
    const struct epd_open_options options = {
        .size = sizeof options, .socket_path = fake->path, .client_name = "test", .timeout_ms = 5000};
    struct epd_client *client;

    client_must(epd_open(&options, &client));
    return client;
}

struct epd_group *join_group(struct epd_client *client)
{
    const struct epd_group_options options = {.size = sizeof options,
                                              .name = "g",
                                              .world_size = 1,
                                              .n_experts = 4,
                                              .top_k = 2,
                                              .hidden = 8,
                                              .ffn = 16,
                                              .max_tokens = 32,
                                              .dtype = EPD_F32};
    struct epd_group *group;

    client_must(epd_group_join(client, &options, &group));
    return group;
}

struct epd_plan *create_barrier(struct epd_group *group)
{
    const struct epd_plan_options options = {.size = sizeof options, .op = EPD_OP_BARRIER};
    struct epd_plan *plan;

    client_must(epd_plan_create(group, &options, &plan));
    return plan;
}

int count_fds(void)
{
    DIR *directory = opendir("/proc/self/fd");
    int n = 0;

    SCRIPT_CHECK(directory);
    while (readdir(directory))
        n++;
    closedir(directory);
    return n;
}
