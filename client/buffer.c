#include "client/buffer.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "client/options.h"

static struct epd_buffer *buffer_create(struct epd_group *group, enum epd_memory_kind kind, uint64_t bytes,
                                        struct epd_error *error)
{
    struct epd_buffer *buffer = calloc(1, sizeof *buffer);

    if (!buffer) {
        error_set(error, EPD_NO_MEMORY, "buffer: no memory for %zu bytes", sizeof *buffer);
        return NULL;
    }
    buffer->group = group;
    buffer->kind = kind;
    buffer->bytes = bytes;
    buffer->fd = -1;
    return buffer;
}

void buffer_free(struct epd_buffer *buffer)
{
    if (buffer->mapping && buffer->kind == EPD_MEMORY_HEAP)
        buffer->group->ops->unmap(buffer->mapping, buffer->mapping_bytes);
    else if (buffer->mapping)
        munmap(buffer->mapping, (size_t)buffer->mapping_bytes);
    if (buffer->fd >= 0)
        close(buffer->fd);
    free(buffer);
}

static void buffer_publish(struct epd_buffer *buffer, struct epd_buffer **published)
{
    struct epd_client *client = buffer->group->client;

    pthread_mutex_lock(&client->lock);
    TAILQ_INSERT_TAIL(&buffer->group->buffers, buffer, link);
    pthread_mutex_unlock(&client->lock);
    *published = buffer;
}

static enum epd_status buffer_begin(struct epd_group *group, uint64_t bytes, struct epd_buffer **buffer,
                                    struct epd_error **error)
{
    if (group_enter(group, "group", error))
        return (*error)->status;
    if (!buffer)
        return error_set(*error, EPD_INVALID_ARGUMENT, "buffer: nowhere to put it");
    if (bytes == 0)
        return error_set(*error, EPD_INVALID_ARGUMENT, "buffer bytes: 0, want at least 1");
    return EPD_OK;
}

/* Tells the daemon to forget a buffer that this side could not finish. */
static void buffer_abandon(struct epd_buffer *buffer)
{
    struct message request = {.kind = MESSAGE_BUFFER_RELEASE, .buffer_release = {.id = buffer->buffer_id}};
    struct inbox_item reply;
    struct epd_error ignored;

    if (group_call(buffer->group, &request, -1, MESSAGE_REPLY_OK, CLIENT_REPLY_TIMEOUT_MS, &reply, &ignored))
        return; /* the session is lost, and the buffer with it */
}

/* ---- owned ---- */

static enum epd_status buffer_map(struct epd_buffer *buffer, int fd, struct epd_error *error)
{
    if (fd < 0)
        return error_set(error, EPD_PROTOCOL, "buffer %llu came without its memory",
                         (unsigned long long)buffer->buffer_id);
    if (buffer->mapping)
        return buffer->group->ops->remap(fd, buffer->bytes, buffer->mapping, error);
    if (buffer->group->ops->map(fd, buffer->bytes, &buffer->mapping, error))
        return error->status;
    buffer->mapping_bytes = buffer->bytes;
    buffer->data = buffer->mapping;
    return EPD_OK;
}

/* Asks for buffer->bytes and maps them. */
static enum epd_status buffer_request(struct epd_buffer *buffer, struct epd_error *error)
{
    struct message request = {
        .kind = MESSAGE_BUFFER_ALLOC,
        .buffer_alloc = {.group_id = buffer->group->reply.group_id, .bytes = buffer->bytes}};
    struct inbox_item reply;

    if (group_call(buffer->group, &request, -1, MESSAGE_REPLY_BUFFER, CLIENT_REPLY_TIMEOUT_MS, &reply, error))
        return error->status;
    buffer->buffer_id = reply.message.reply_buffer.buffer_id;
    enum epd_status status = buffer_map(buffer, reply.fd, error);
    if (reply.fd >= 0)
        close(reply.fd);
    if (status)
        buffer_abandon(buffer);
    return status;
}

enum epd_status epd_buffer_alloc(struct epd_group *group, uint64_t bytes, struct epd_buffer **allocated)
{
    struct epd_error *error;

    if (buffer_begin(group, bytes, allocated, &error))
        return error->status;
    struct epd_buffer *buffer = buffer_create(group, EPD_MEMORY_HEAP, bytes, error);
    if (!buffer)
        return error->status;
    if (buffer_request(buffer, error)) {
        buffer_free(buffer);
        return error->status;
    }
    buffer_publish(buffer, allocated);
    return EPD_OK;
}

/* ---- imported ---- */

/* Sends the request that describes the buffer's memory. */
static enum epd_status buffer_register(struct epd_buffer *buffer, struct message_buffer_register *described,
                                       int fd, struct epd_error *error)
{
    struct message request = {.kind = MESSAGE_BUFFER_REGISTER};
    struct inbox_item reply;

    described->group_id = buffer->group->reply.group_id;
    described->bytes = buffer->bytes;
    request.buffer_register = *described;
    if (group_call(buffer->group, &request, fd, MESSAGE_REPLY_BUFFER, CLIENT_REPLY_TIMEOUT_MS, &reply, error))
        return error->status;
    buffer->buffer_id = reply.message.reply_buffer.buffer_id;
    if (reply.fd >= 0)
        close(reply.fd);
    return EPD_OK;
}

/* The daemon maps this memory: it must not be able to lose its pages. */
static enum epd_status memfd_check(int fd, uint64_t offset, uint64_t bytes, struct epd_error *error)
{
    struct stat file;
    int seals = fcntl(fd, F_GET_SEALS);

    if (seals < 0)
        return error_set(error, EPD_INVALID_ARGUMENT, "buffer fd %d: not a memfd (%s)", fd, strerror(errno));
    if (!(seals & F_SEAL_SHRINK))
        return error_set(error, EPD_INVALID_ARGUMENT, "buffer fd %d: seals 0x%x, want F_SEAL_SHRINK", fd,
                         (unsigned)seals);
    if (fstat(fd, &file) < 0)
        return error_set(error, EPD_SYSTEM, "buffer fd %d: fstat: %s", fd, strerror(errno));
    if (offset > (uint64_t)file.st_size || bytes > (uint64_t)file.st_size - offset)
        return error_set(error, EPD_OUT_OF_RANGE,
                         "buffer fd %d: offset %llu + %llu bytes, the memfd has %lld", fd,
                         (unsigned long long)offset, (unsigned long long)bytes, (long long)file.st_size);
    return EPD_OK;
}

/* Maps the whole pages around the range. */
static enum epd_status memfd_map(struct epd_buffer *buffer, int fd, struct epd_error *error)
{
    uint64_t before = buffer->offset % (uint64_t)sysconf(_SC_PAGESIZE);
    uint64_t bytes = buffer->bytes + before;
    void *mapping =
        mmap(NULL, (size_t)bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, (off_t)(buffer->offset - before));

    if (mapping == MAP_FAILED)
        return error_set(error, EPD_SYSTEM, "buffer fd %d: mmap of %llu bytes: %s", fd,
                         (unsigned long long)bytes, strerror(errno));
    buffer->mapping = mapping;
    buffer->mapping_bytes = bytes;
    buffer->data = (char *)mapping + before;
    buffer->fd = fcntl(fd, F_DUPFD_CLOEXEC, 0);
    if (buffer->fd < 0)
        return error_set(error, EPD_SYSTEM, "buffer fd %d: dup: %s", fd, strerror(errno));
    return EPD_OK;
}

enum epd_status epd_buffer_register_memfd(struct epd_group *group, int fd, uint64_t offset, uint64_t bytes,
                                          struct epd_buffer **registered)
{
    struct message_buffer_register described = {.kind = EPD_MEMORY_MEMFD, .offset = offset};
    struct epd_error *error;

    if (buffer_begin(group, bytes, registered, &error))
        return error->status;
    if (connection_hello(group->connection)->backend != EPD_BACKEND_HOST)
        return error_set(error, EPD_UNSUPPORTED,
                         "buffer fd %d: memfds are for the host backend, this one is %s", fd,
                         backend_name(connection_hello(group->connection)->backend));
    if (memfd_check(fd, offset, bytes, error))
        return error->status;
    struct epd_buffer *buffer = buffer_create(group, EPD_MEMORY_MEMFD, bytes, error);
    if (!buffer)
        return error->status;
    buffer->offset = offset;
    if (memfd_map(buffer, fd, error) || buffer_register(buffer, &described, fd, error)) {
        buffer_free(buffer);
        return error->status;
    }
    buffer_publish(buffer, registered);
    return EPD_OK;
}

enum epd_status epd_buffer_register_cuda(struct epd_group *group, void *data, uint64_t bytes,
                                         struct epd_buffer **registered)
{
    struct message_buffer_register described = {0};
    struct epd_error *error;
    int fd;

    if (buffer_begin(group, bytes, registered, &error) ||
        group->ops->describe(data, bytes, &described, &fd, error))
        return error->status;
    struct epd_buffer *buffer = buffer_create(group, described.kind, bytes, error);
    enum epd_status status = error->status;
    if (buffer) {
        buffer->offset = described.offset;
        buffer->data = data;
        status = buffer_register(buffer, &described, fd, error);
        if (status)
            buffer_free(buffer);
        else
            buffer_publish(buffer, registered);
    }
    if (fd >= 0)
        close(fd);
    return status;
}

enum epd_status epd_memory_range(const struct epd_group *group, const void *data,
                                 struct epd_memory_range *given)
{
    struct epd_memory_range range = {.size = sizeof range};
    struct epd_error *error;

    if (group_enter(group, "group", &error) || group->ops->range(data, &range, error))
        return error->status;
    return options_write(given, &range, sizeof range, "epd_memory_range", error);
}

/* ---- both ---- */

enum epd_status buffer_restore(struct epd_buffer *buffer, struct epd_error *error)
{
    struct message_buffer_register described = {.kind = EPD_MEMORY_MEMFD, .offset = buffer->offset};
    int fd = buffer->fd;

    if (buffer->kind == EPD_MEMORY_HEAP)
        return buffer_request(buffer, error);
    if (buffer->kind == EPD_MEMORY_MEMFD)
        return buffer_register(buffer, &described, fd, error);
    if (buffer->group->ops->describe(buffer->data, buffer->bytes, &described, &fd, error))
        return error->status;
    enum epd_status status = buffer_register(buffer, &described, fd, error);
    if (fd >= 0)
        close(fd);
    return status;
}

void *epd_buffer_data(const struct epd_buffer *buffer)
{
    return buffer ? buffer->data : NULL;
}

uint64_t epd_buffer_bytes(const struct epd_buffer *buffer)
{
    return buffer ? buffer->bytes : 0;
}

enum epd_status epd_buffer_release(struct epd_buffer *buffer)
{
    struct epd_error *error;
    struct inbox_item reply;

    if (!buffer) {
        error_begin();
        return EPD_OK;
    }
    if (client_enter(buffer->group->client, "buffer", &error))
        return error->status;
    unsigned n_bindings = atomic_load(&buffer->n_bindings);
    if (n_bindings > 0)
        return error_set(error, EPD_IN_USE, "buffer of %llu bytes: %u tensors of plans are bound to it",
                         (unsigned long long)buffer->bytes, n_bindings);
    struct message request = {.kind = MESSAGE_BUFFER_RELEASE, .buffer_release = {.id = buffer->buffer_id}};
    enum epd_status status =
        group_call(buffer->group, &request, -1, MESSAGE_REPLY_OK, CLIENT_REPLY_TIMEOUT_MS, &reply, error);
    /* Of a session that is lost, the daemon has nothing left. While it lives, its refusal leaves the buffer
     * as it was. */
    if (status && connection_check(buffer->group->connection, error) == EPD_OK)
        return status;
    pthread_mutex_lock(&buffer->group->client->lock);
    TAILQ_REMOVE(&buffer->group->buffers, buffer, link);
    pthread_mutex_unlock(&buffer->group->client->lock);
    buffer_free(buffer);
    error_begin();
    return EPD_OK;
}
