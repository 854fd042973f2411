#include "daemon/request.h"

#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "daemon/buffer.h"
#include "daemon/clock.h"
#include "daemon/control.h"
#include "daemon/member.h"
#include "daemon/rank_plan.h"
#include "daemon/reserve.h"
#include "proto/packet.h"

/* No optional feature exists in protocol 1.0. */
#define DAEMON_FEATURES 0ull

static uint32_t lower(uint32_t a, uint32_t b)
{
    return a < b ? a : b;
}

/* ---- hello ---- */

static void keep_name(struct session *session, const char *name)
{
    for (size_t i = 0; i + 1 < sizeof(session->name) && name[i]; i++)
        session->name[i] = name[i] >= ' ' && name[i] <= '~' ? name[i] : '?';
}

static void fill_devices(const struct worker *worker, struct message_reply_hello *hello)
{
    hello->n_devices = node_n_devices(worker->node);
    for (uint32_t i = 0; i < hello->n_devices && i < EPD_MAX_DEVICES; i++) {
        struct device_info info;
        node_device_info(worker->node, i, &info);
        hello->devices[i].device_idx = i;
        hello->devices[i].memory_bytes = info.memory_bytes;
        memcpy(hello->devices[i].uuid, info.uuid, sizeof(info.uuid));
        memcpy(hello->devices[i].name, info.name, sizeof(hello->devices[i].name));
    }
}

static enum epd_status greet(struct session *session, const struct message *message, struct epd_error *error)
{
    struct worker *worker = session->worker;
    const struct message_hello *hello = &message->hello;
    if (hello->major != EPD_PROTOCOL_MAJOR)
        return error_set(error, EPD_VERSION_MISMATCH, "protocol: client speaks %u.%u, daemon %s speaks %d.%d",
                         hello->major, hello->minor, EPD_VERSION, EPD_PROTOCOL_MAJOR, EPD_PROTOCOL_MINOR);
    int page_fd = -1;
    enum epd_status status = failpoint_hit(&worker->failpoints, "hello_reply", error);
    if (status == EPD_OK)
        status = page_create(&session->page, &page_fd, error);
    if (status != EPD_OK)
        return status;
    keep_name(session, hello->client_name);
    session->features = hello->features & DAEMON_FEATURES;
    session_opened(session);
    struct message reply = {.kind = MESSAGE_REPLY_HELLO,
                            .request_id = message->request_id,
                            .reply_hello = {.major = EPD_PROTOCOL_MAJOR,
                                            .minor = lower(hello->minor, EPD_PROTOCOL_MINOR),
                                            .features = session->features,
                                            .session_id = session->id,
                                            .epoch = worker->epoch,
                                            .backend = node_backend(worker->node),
                                            .page_bytes = sizeof(struct page),
                                            .daemon_version = EPD_VERSION}};
    memcpy(reply.reply_hello.boot_id, worker->boot_id, sizeof(worker->boot_id));
    fill_devices(worker, &reply.reply_hello);
    session_send(session, &reply, page_fd);
    (void)close(page_fd);
    return EPD_OK;
}

/* A Hello that fails ends the session: there is nothing else that it could do. */
static void handle_hello(struct session *session, const struct message *message)
{
    struct epd_error error = {0};
    enum epd_status status = greet(session, message, &error);
    if (status == EPD_OK)
        return;
    session_reply_error(session, message->request_id, &error);
    session_close(session, status == EPD_VERSION_MISMATCH ? CLOSE_VERSION : CLOSE_NO_MEMORY, error.text);
}

/* ---- requests of an open session; a status other than EPD_OK is answered by request_handle ---- */

static enum epd_status handle_join(struct session *session, const struct message *message,
                                   struct epd_error *error)
{
    return group_join(session, message->request_id, &message->group_join, error);
}

static enum epd_status handle_leave(struct session *session, const struct message *message,
                                    struct epd_error *error)
{
    struct member *member = NULL;
    enum epd_status status = group_find_member(session, message->group_leave.id, &member, error);
    if (status != EPD_OK)
        return status;
    const struct epd_error left = {EPD_PEER_LOST, "it has left"};
    member_leave(member, &left, 1);
    session_reply_ok(session, message->request_id);
    return EPD_OK;
}

static enum epd_status handle_alloc(struct session *session, const struct message *message,
                                    struct epd_error *error)
{
    return buffer_alloc(session, message->request_id, &message->buffer_alloc, error);
}

static enum epd_status handle_release(struct session *session, const struct message *message,
                                      struct epd_error *error)
{
    enum epd_status status = buffer_release(session, message->buffer_release.id, error);
    if (status == EPD_OK)
        session_reply_ok(session, message->request_id);
    return status;
}

static enum epd_status handle_plan_create(struct session *session, const struct message *message,
                                          struct epd_error *error)
{
    return rank_plan_create(session, message->request_id, &message->plan_create, error);
}

static enum epd_status handle_plan_destroy(struct session *session, const struct message *message,
                                           struct epd_error *error)
{
    void *object = NULL;
    enum epd_status status = registry_find_owned(&session->worker->registry, REGISTRY_PLAN,
                                                 message->plan_destroy.id, session->id, &object, error);
    if (status != EPD_OK)
        return status;
    struct rank_plan *plan = object;
    if (plan->state != RANK_PLAN_READY)
        return error_set(error, EPD_BUSY, "plan %llu: still being created", (unsigned long long)plan->id);
    if (plan->n_queued)
        return error_set(error, EPD_IN_USE, "plan %llu: %u launches wait for other ranks",
                         (unsigned long long)plan->id, plan->n_queued);
    rank_plan_destroy(plan);
    session_reply_ok(session, message->request_id);
    return EPD_OK;
}

static enum epd_status handle_stats(struct session *session, const struct message *message,
                                    struct epd_error *error)
{
    (void)error;
    control_answer(session, message);
    return EPD_OK;
}

/* No reply: whatever is wrong with a plan that can be launched is told through its flags. A plan that is not
 * the session's has none, so that a client which launches it can only be closed. */
static void handle_launch(struct session *session, const struct message *message)
{
    const struct message_launch *launch = &message->launch;
    void *object = NULL;
    struct epd_error error = {0};
    enum epd_status status = registry_find_owned(&session->worker->registry, REGISTRY_PLAN, launch->plan_id,
                                                 session->id, &object, &error);
    struct rank_plan *plan = object;
    if (status == EPD_OK && plan->state != RANK_PLAN_READY)
        status = error_set(&error, EPD_BUSY, "plan %llu is not ready", (unsigned long long)launch->plan_id);
    if (status != EPD_OK) {
        session_close(session, CLOSE_BAD_LAUNCH, error.text);
        return;
    }
    member_launch(plan->member, plan, launch);
}

/* ---- which state allows what ---- */

typedef enum epd_status (*request_handler)(struct session *session, const struct message *message,
                                           struct epd_error *error);

static request_handler handler_of(enum message_kind kind)
{
    switch (kind) {
    case MESSAGE_GROUP_JOIN:
        return handle_join;
    case MESSAGE_GROUP_LEAVE:
        return handle_leave;
    case MESSAGE_BUFFER_ALLOC:
        return handle_alloc;
    case MESSAGE_BUFFER_RELEASE:
        return handle_release;
    case MESSAGE_PLAN_CREATE:
        return handle_plan_create;
    case MESSAGE_PLAN_DESTROY:
        return handle_plan_destroy;
    case MESSAGE_STATS:
        return handle_stats;
    default:
        return NULL;
    }
}

static void refuse_state(struct session *session, const struct message *message)
{
    char text[96];
    (void)snprintf(text, sizeof(text), "%s in state %s", message_kind_name(message->kind),
                   session_state_name(session->state));
    session_close(session, CLOSE_BAD_STATE, text);
}

/* What a rank has to show for it may hold fds of the daemon for as long as it lives. */
static int makes_fds(enum message_kind kind)
{
    return kind == MESSAGE_GROUP_JOIN || kind == MESSAGE_BUFFER_ALLOC || kind == MESSAGE_BUFFER_REGISTER ||
           kind == MESSAGE_PLAN_CREATE;
}

static void handle_open(struct session *session, const struct message *message, int fd)
{
    struct epd_error error = {0};
    enum epd_status status = EPD_OK;
    const request_handler handler = handler_of(message->kind);
    if (makes_fds(message->kind) && (fd >= 0 ? reserve_touched(fd) : reserve_next(session->fd))) {
        if (fd >= 0)
            (void)close(fd);
        status = error_set(&error, EPD_QUOTA, RESERVE_REFUSAL);
        if (message->kind == MESSAGE_GROUP_JOIN)
            group_refuse_rank(session, &message->group_join, &error);
    } else if (message->kind == MESSAGE_BUFFER_REGISTER)
        status = buffer_register(session, message->request_id, &message->buffer_register, fd, &error);
    else if (handler)
        status = handler(session, message, &error);
    else
        refuse_state(session, message);
    if (status != EPD_OK)
        session_reply_error(session, message->request_id, &error);
}

void request_handle(struct session *session, const struct message *message, int fd)
{
    if (message->kind == MESSAGE_LAUNCH && session->state == SESSION_OPEN) {
        handle_launch(session, message);
    } else if (session->kind == SESSION_CONTROL && message->kind == MESSAGE_CONTROL) {
        control_answer(session, message);
    } else if (session->state == SESSION_OPENING && message->kind == MESSAGE_HELLO) {
        handle_hello(session, message);
    } else if (session->state == SESSION_OPEN && session->kind == SESSION_RANK) {
        handle_open(session, message, fd);
    } else {
        if (fd >= 0)
            (void)close(fd);
        refuse_state(session, message);
    }
}
