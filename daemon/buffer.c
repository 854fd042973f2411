#include "daemon/buffer.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "daemon/document.h"
#include "daemon/member.h"
#include "daemon/session.h"

static enum quota_kind bytes_quota(enum epd_memory_kind kind)
{
    return kind == EPD_MEMORY_HEAP ? QUOTA_HEAP_BYTES : QUOTA_IMPORTED_BYTES;
}

static void give_quotas(struct buffer *buffer)
{
    quota_give(&buffer->session->quota, QUOTA_BUFFERS, 1);
    quota_give(&buffer->session->quota, bytes_quota(buffer->kind), buffer->bytes);
}

static enum epd_status take_quotas(struct buffer *buffer, struct epd_error *error)
{
    struct session *session = buffer->session;
    struct worker *worker = session->worker;
    enum epd_status status =
        quota_take(&worker->accounts, &worker->config, &session->quota, QUOTA_BUFFERS, 1, error);
    if (status != EPD_OK)
        return status;
    status = quota_take(&worker->accounts, &worker->config, &session->quota, bytes_quota(buffer->kind),
                        buffer->bytes, error);
    if (status != EPD_OK)
        quota_give(&session->quota, QUOTA_BUFFERS, 1);
    return status;
}

static void forget(struct buffer *buffer)
{
    give_quotas(buffer);
    list_remove(&buffer->in_session);
    free(buffer);
}

/* What the allocation takes beyond what was asked for: many small buffers are not small. */
static enum epd_status take_rest(struct buffer *buffer, struct epd_error *error)
{
    struct session *session = buffer->session;
    struct worker *worker = session->worker;
    const uint64_t held = memory_held_bytes(buffer->memory);
    const uint64_t rest = held > buffer->bytes ? held - buffer->bytes : 0;
    enum epd_status status = quota_take(&worker->accounts, &worker->config, &session->quota,
                                        bytes_quota(buffer->kind), rest, error);
    if (status == EPD_OK)
        buffer->bytes += rest;
    return status;
}

static enum epd_status make_known(struct buffer *buffer, struct epd_error *error)
{
    struct worker *worker = buffer->session->worker;
    enum epd_status status = failpoint_hit(&worker->failpoints, "buffer_ready", error);
    if (status == EPD_OK)
        status = take_rest(buffer, error);
    if (status != EPD_OK)
        return status;
    return registry_add(&worker->registry, REGISTRY_BUFFER, buffer->session->id, buffer, &buffer->id, error);
}

static void reply(struct buffer *buffer)
{
    struct message message = {
        .kind = MESSAGE_REPLY_BUFFER,
        .request_id = buffer->request_id,
        .reply_buffer = {.buffer_id = buffer->id, .bytes = memory_bytes(buffer->memory)}};
    session_send(buffer->session, &message, memory_fd(buffer->memory));
}

static void on_memory(void *arg, struct memory *memory, const struct epd_error *result)
{
    struct buffer *buffer = arg;
    struct session *session = buffer->session;
    struct epd_error error = *result;
    buffer->memory = memory;
    if (!buffer->dropped && error.status == EPD_OK)
        error.status = make_known(buffer, &error);
    if (buffer->dropped || error.status != EPD_OK) {
        if (!buffer->dropped)
            session_reply_error(session, buffer->request_id, &error);
        if (memory)
            memory_release(memory);
        if (buffer->dropped) /* quotas went with the session */
            free(buffer);
        else
            forget(buffer);
    } else {
        reply(buffer);
    }
    session_release(session);
}

/* Takes over request->fd. */
static enum epd_status start(struct session *session, struct member *member, uint64_t request_id,
                             struct memory_request *request, struct epd_error *error)
{
    enum epd_status status = EPD_OK;
    struct buffer *buffer = calloc(1, sizeof(*buffer));
    if (!buffer) {
        status = error_set(error, EPD_NO_MEMORY, "buffer: no memory for its entry");
        goto close_fd;
    }
    *buffer = (struct buffer){.session = session,
                              .kind = request->kind,
                              .group_id = member->group->id,
                              .bytes = request->bytes,
                              .device_idx = member->device_idx,
                              .request_id = request_id};
    list_init(&buffer->in_session);
    status = take_quotas(buffer, error);
    if (status != EPD_OK)
        goto free_buffer;
    request->device_idx = member->device_idx;
    session_hold(session);
    list_append(&session->buffers, &buffer->in_session);
    status = memory_acquire(session->worker->node, request, on_memory, buffer, error);
    if (status == EPD_OK)
        return EPD_OK;
    forget(buffer);
    session_release(session);
    return status; /* memory_acquire has taken the fd in every case */

free_buffer:
    free(buffer);
close_fd:
    if (request->fd >= 0)
        (void)close(request->fd);
    return status;
}

enum epd_status buffer_alloc(struct session *session, uint64_t request_id,
                             const struct message_buffer_alloc *request, struct epd_error *error)
{
    struct member *member = NULL;
    enum epd_status status = group_find_member(session, request->group_id, &member, error);
    if (status != EPD_OK)
        return status;
    if (!request->bytes)
        return error_set(error, EPD_INVALID_ARGUMENT, "buffer: 0 bytes, want at least 1");
    struct memory_request memory = {.kind = EPD_MEMORY_HEAP, .bytes = request->bytes, .fd = -1};
    return start(session, member, request_id, &memory, error);
}

/* Memory that lives on another GPU cannot be touched by the kernels of the rank's device. */
static enum epd_status check_device(const struct member *member, const uint8_t uuid[EPD_UUID_BYTES],
                                    struct epd_error *error)
{
    struct device_info info;
    node_device_info(member->group->worker->node, member->device_idx, &info);
    if (memcmp(uuid, info.uuid, EPD_UUID_BYTES) == 0)
        return EPD_OK;
    char given[2 * EPD_UUID_BYTES + 1], want[2 * EPD_UUID_BYTES + 1];
    document_hex(uuid, EPD_UUID_BYTES, given);
    document_hex(info.uuid, EPD_UUID_BYTES, want);
    return error_set(error, EPD_INVALID_DEVICE,
                     "buffer: memory of device %s, want %s (device %u of this rank)", given, want,
                     member->device_idx);
}

static enum epd_status check_register(struct session *session, const struct message_buffer_register *request,
                                      int fd, struct member **member, struct epd_error *error)
{
    enum epd_status status = group_find_member(session, request->group_id, member, error);
    if (status != EPD_OK)
        return status;
    if (request->kind == EPD_MEMORY_HEAP || request->kind == EPD_MEMORY_UNSPECIFIED)
        return error_set(error, EPD_INVALID_ARGUMENT, "buffer: memory kind %d cannot be registered",
                         (int)request->kind);
    const int wants_fd = request->kind != EPD_MEMORY_CUDA_IPC;
    if (wants_fd != (fd >= 0))
        return error_set(error, EPD_INVALID_ARGUMENT, "buffer: %s fd came with memory kind %d",
                         fd >= 0 ? "an" : "no", (int)request->kind);
    if (!request->bytes)
        return error_set(error, EPD_INVALID_ARGUMENT, "buffer: 0 bytes, want at least 1");
    if (request->offset > UINT64_MAX - request->bytes)
        return error_set(error, EPD_OUT_OF_RANGE, "buffer: offset %llu + bytes %llu overflows",
                         (unsigned long long)request->offset, (unsigned long long)request->bytes);
    return request->kind == EPD_MEMORY_MEMFD ? EPD_OK : check_device(*member, request->device_uuid, error);
}

enum epd_status buffer_register(struct session *session, uint64_t request_id,
                                const struct message_buffer_register *request, int fd,
                                struct epd_error *error)
{
    struct member *member = NULL;
    enum epd_status status = check_register(session, request, fd, &member, error);
    if (status != EPD_OK) {
        if (fd >= 0)
            (void)close(fd);
        return status;
    }
    struct memory_request memory = {
        .kind = request->kind, .bytes = request->bytes, .offset = request->offset, .fd = fd};
    memory.allocation_bytes = request->allocation_bytes;
    memcpy(memory.ipc_handle, request->ipc_handle, sizeof(memory.ipc_handle));
    return start(session, member, request_id, &memory, error);
}

enum epd_status buffer_release(struct session *session, uint64_t buffer_id, struct epd_error *error)
{
    void *object = NULL;
    enum epd_status status = registry_find_owned(&session->worker->registry, REGISTRY_BUFFER, buffer_id,
                                                 session->id, &object, error);
    if (status != EPD_OK)
        return status;
    struct buffer *buffer = object;
    if (buffer->n_plans > buffer->n_ending)
        return error_set(error, EPD_IN_USE, "buffer %llu: bound %u times in plans, destroy them first",
                         (unsigned long long)buffer_id, buffer->n_plans - buffer->n_ending);
    buffer_drop(buffer);
    return EPD_OK;
}

static void end(struct buffer *buffer)
{
    memory_release(buffer->memory);
    forget(buffer);
}

void buffer_drop(struct buffer *buffer)
{
    if (!buffer->id) { /* still being made: on_memory frees it */
        assert(!buffer->dropped);
        give_quotas(buffer);
        list_remove(&buffer->in_session);
        buffer->dropped = 1;
        return;
    }
    registry_remove(&buffer->session->worker->registry, REGISTRY_BUFFER, buffer->id);
    list_remove(&buffer->in_session);
    buffer->dropped = 1;
    if (!buffer->n_plans)
        end(buffer);
}

void buffer_bind(struct buffer *buffer)
{
    buffer->n_plans++;
}

void buffer_unbind(struct buffer *buffer)
{
    assert(buffer->n_plans > 0);
    if (--buffer->n_plans == 0 && buffer->dropped)
        end(buffer);
}

void buffer_bind_ending(struct buffer *buffer)
{
    buffer->n_ending++;
}

void buffer_unbind_ending(struct buffer *buffer)
{
    assert(buffer->n_ending > 0);
    buffer->n_ending--;
    buffer_unbind(buffer);
}
