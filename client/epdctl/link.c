#include "client/epdctl/link.h"

#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include "proto/codec.h"
#include "proto/packet.h"

/* A document larger than this is not ours. */
#define MAX_DOCUMENT_BYTES (256u << 20)
#define CONTROL_NAME       "epd-control.sock"
/* Of a daemon that was started without XDG_RUNTIME_DIR, as systemd starts it. */
#define SYSTEM_PATH "/run/epd/" CONTROL_NAME

void link_default_path(char *path, size_t bytes)
{
    const char *control = getenv("EPD_CONTROL_SOCKET"), *ranks = getenv("EPD_SOCKET");
    const char *runtime = getenv("XDG_RUNTIME_DIR");
    if (control && *control) {
        (void)snprintf(path, bytes, "%s", control);
        return;
    }
    if (ranks && *ranks) {
        const char *slash = strrchr(ranks, '/');
        (void)snprintf(path, bytes, "%.*s" CONTROL_NAME, slash ? (int)(slash - ranks) + 1 : 0, ranks);
        return;
    }
    if (runtime && runtime[0] == '/') {
        (void)snprintf(path, bytes, "%s/epd/" CONTROL_NAME, runtime);
        if (access(path, F_OK) == 0 || access(SYSTEM_PATH, F_OK) != 0)
            return;
    }
    (void)snprintf(path, bytes, "%s", SYSTEM_PATH);
}

static enum epd_status connect_error(const char *path, int code, struct epd_error *error)
{
    if (code == EACCES || code == EPERM)
        return error_set(error, EPD_PERMISSION,
                         "%.120s: %s; the socket's group and mode are set by control_group and control_mode",
                         path, strerror(code));
    return error_set(error, EPD_DISCONNECTED,
                     "no daemon at %.160s: %s; name its socket with --control-socket", path, strerror(code));
}

enum epd_status link_open(struct link *link, const char *path, int timeout_ms, struct epd_error *error)
{
    *link = (struct link){.socket = -1, .timeout_ms = timeout_ms};
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    if (strlen(path) >= sizeof(address.sun_path))
        return error_set(error, EPD_INVALID_ARGUMENT, "control socket path: %zu bytes, at most %zu",
                         strlen(path), sizeof(address.sun_path) - 1);
    memcpy(address.sun_path, path, strlen(path));
    enum epd_status status = arena_init(&link->arena, EPD_MAX_ARENA_BYTES);
    if (status != EPD_OK)
        return error_set(error, status, "no memory for decoding");
    link->datagram = malloc(EPD_MAX_DATAGRAM_BYTES);
    link->socket = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
    if (!link->datagram || link->socket < 0) {
        link_close(link);
        return error_set(error, EPD_SYSTEM, "socket: %s", strerror(errno));
    }
    if (connect(link->socket, (const struct sockaddr *)&address, sizeof(address)) != 0) {
        const int code = errno;
        link_close(link);
        return connect_error(path, code, error);
    }
    return EPD_OK;
}

void link_close(struct link *link)
{
    if (link->socket >= 0)
        close(link->socket);
    link->socket = -1;
    free(link->datagram);
    link->datagram = NULL;
    if (link->arena.data)
        arena_fini(&link->arena);
}

static enum epd_status read_document(int fd, uint64_t bytes, json_t **document, struct epd_error *error)
{
    struct stat info;
    if (fd < 0 || fstat(fd, &info) != 0)
        return error_set(error, EPD_PROTOCOL, "the daemon's document came without its memory");
    if (bytes == 0 || bytes > MAX_DOCUMENT_BYTES || (uint64_t)info.st_size < bytes)
        return error_set(error, EPD_PROTOCOL,
                         "document of %llu bytes in memory of %lld, at most %u are taken",
                         (unsigned long long)bytes, (long long)info.st_size, MAX_DOCUMENT_BYTES);
    void *text = mmap(NULL, bytes, PROT_READ, MAP_SHARED, fd, 0);
    if (text == MAP_FAILED)
        return error_set(error, EPD_SYSTEM, "mapping the document: %s", strerror(errno));
    json_error_t json_error;
    *document = json_loadb(text, bytes, 0, &json_error);
    munmap(text, bytes);
    if (!*document)
        return error_set(error, EPD_PROTOCOL, "the daemon's document is not JSON: %.160s", json_error.text);
    return EPD_OK;
}

static enum epd_status take_answer(const struct message *answer, int fd, json_t **document,
                                   struct epd_error *error)
{
    switch (answer->kind) {
    case MESSAGE_REPLY_OK:
        *document = NULL;
        return EPD_OK;
    case MESSAGE_REPLY_DOCUMENT:
        return read_document(fd, answer->reply_document.bytes, document, error);
    case MESSAGE_REPLY_ERROR:
        *error = answer->reply_error;
        return error->status;
    case MESSAGE_CLOSED:
        return error_set(error, EPD_DISCONNECTED, "the daemon closed the connection: %s: %.180s",
                         status_name(answer->closed.status), answer->closed.reason);
    default:
        return error_set(error, EPD_PROTOCOL, "unexpected answer %s", message_kind_name(answer->kind));
    }
}

static enum epd_status receive_answer(struct link *link, struct message *answer, int *fd,
                                      struct epd_error *error)
{
    struct pollfd poll_socket = {.fd = link->socket, .events = POLLIN};
    int n_ready;
    while ((n_ready = poll(&poll_socket, 1, link->timeout_ms)) < 0 && errno == EINTR)
        ;
    if (n_ready == 0)
        return error_set(error, EPD_TIMEOUT, "the daemon did not answer within %d ms", link->timeout_ms);
    size_t bytes = 0;
    enum packet_result result =
        packet_receive(link->socket, link->datagram, EPD_MAX_DATAGRAM_BYTES, &bytes, fd);
    if (result == PACKET_EOF)
        return error_set(error, EPD_DISCONNECTED, "the daemon closed the connection");
    if (result != PACKET_OK)
        return error_set(error, EPD_DISCONNECTED, "receiving: %s",
                         result == PACKET_ERROR ? strerror(errno) : "a damaged datagram");
    return codec_decode(CODEC_FROM_DAEMON, link->datagram, bytes, &link->arena, answer, error);
}

enum epd_status link_request(struct link *link, const struct message_control *control, json_t **document,
                             struct epd_error *error)
{
    struct message message = {
        .kind = MESSAGE_CONTROL, .request_id = ++link->last_request_id, .control = *control};
    size_t bytes = 0;
    enum epd_status status = codec_encode(&message, link->datagram, &bytes, error);
    if (status != EPD_OK)
        return status;
    if (packet_send(link->socket, link->datagram, bytes, -1) != PACKET_OK)
        return error_set(error, EPD_DISCONNECTED, "sending: %s", strerror(errno));
    int fd = -1;
    status = receive_answer(link, &message, &fd, error);
    if (status == EPD_OK)
        status = take_answer(&message, fd, document, error);
    if (fd >= 0)
        close(fd);
    return status;
}
