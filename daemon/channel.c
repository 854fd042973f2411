#include "daemon/channel.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>

#define CHANNEL_BYTES (CONFIG_RENDERED_BYTES + CONFIG_TEXT_BYTES + 2)

enum epd_status channel_create(int fds[2], struct epd_error *error)
{
    if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, fds) != 0)
        return error_set(error, EPD_SYSTEM, "channel: socketpair: %s", strerror(errno));
    return EPD_OK;
}

static enum epd_status send_all(int fd, const char *data, size_t bytes, struct epd_error *error)
{
    /* A side that does not read (stopped, or in a call of a driver) must not stop the other. */
    if (send(fd, data, bytes, MSG_NOSIGNAL | MSG_DONTWAIT) != (ssize_t)bytes)
        return error_set(error, EPD_SYSTEM, "channel: send: %s", strerror(errno));
    return EPD_OK;
}

enum epd_status channel_send_config(int fd, const struct config *config, struct epd_error *error)
{
    char text[CHANNEL_BYTES];
    size_t start = (size_t)snprintf(text, sizeof(text), "C%s\n", config->file);
    enum epd_status status = config_render(config, text + start, CONFIG_RENDERED_BYTES, error);
    if (status != EPD_OK)
        return status;
    return send_all(fd, text, start + strlen(text + start), error);
}

enum epd_status channel_send_listening(int fd, struct epd_error *error)
{
    return send_all(fd, "L", 1, error);
}

enum epd_status channel_send_ready(int fd, struct epd_error *error)
{
    return send_all(fd, "R", 1, error);
}

enum epd_status channel_send_question(int fd, struct epd_error *error)
{
    return send_all(fd, "?", 1, error);
}

enum epd_status channel_send_answer(int fd, struct epd_error *error)
{
    return send_all(fd, "!", 1, error);
}

enum epd_status channel_send_ending(int fd, struct epd_error *error)
{
    return send_all(fd, "E", 1, error);
}

static enum epd_status parse_config(char *text, struct config *config, struct epd_error *error)
{
    char *newline = strchr(text, '\n');
    if (!newline || newline - text >= CONFIG_TEXT_BYTES)
        return error_set(error, EPD_PROTOCOL, "channel: a configuration without a file name");
    *newline = 0;
    struct config fresh;
    config_init(&fresh);
    memcpy(fresh.file, text, (size_t)(newline - text) + 1);
    enum epd_status status = config_take_rendered(&fresh, newline + 1, error);
    if (status == EPD_OK)
        *config = fresh;
    return status;
}

/* Of one byte; CHANNEL_NOTHING: there is no such word. */
static enum channel_event word_of(char byte)
{
    switch (byte) {
    case 'L':
        return CHANNEL_LISTENING;
    case 'R':
        return CHANNEL_READY;
    case '?':
        return CHANNEL_QUESTION;
    case '!':
        return CHANNEL_ANSWER;
    case 'E':
        return CHANNEL_ENDING;
    default:
        return CHANNEL_NOTHING;
    }
}

enum channel_event channel_receive(int fd, struct config *config, struct epd_error *error)
{
    char text[CHANNEL_BYTES + 1];
    ssize_t bytes;
    do
        bytes = recv(fd, text, sizeof(text) - 1, 0);
    while (bytes < 0 && errno == EINTR);
    if (bytes < 0 && (errno == EAGAIN || errno == EWOULDBLOCK))
        return CHANNEL_NOTHING;
    if (bytes <= 0) {
        (void)error_set(error, EPD_DISCONNECTED, "channel: the other side is gone");
        return CHANNEL_ENDED;
    }
    text[bytes] = 0;
    const enum channel_event word = bytes == 1 ? word_of(text[0]) : CHANNEL_NOTHING;
    if (word != CHANNEL_NOTHING)
        return word;
    if (text[0] == 'C' && parse_config(text + 1, config, error) == EPD_OK)
        return CHANNEL_CONFIG;
    if (text[0] != 'C')
        (void)error_set(error, EPD_PROTOCOL, "channel: unknown message 0x%02x",
                        (unsigned)(unsigned char)text[0]);
    return CHANNEL_ENDED;
}
