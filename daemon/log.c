#include "daemon/log.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#define LOG_LINE_BYTES 768

static const char *const level_names[] = {"error", "warn", "info", "debug"};
static const int level_priorities[] = {3, 4, 6, 7}; /* syslog numbers */

/* Of a pipe or a terminal; a file has no reader, and its place in it is shared. Not where it belongs to another user. */
static int open_copy(int fd)
{
    struct stat info;
    char path[40];
    if (fstat(fd, &info) != 0 || !(S_ISFIFO(info.st_mode) || S_ISCHR(info.st_mode)))
        return -1;
    (void)snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
    return open(path, O_WRONLY | O_APPEND | O_NONBLOCK | O_NOCTTY | O_CLOEXEC);
}

void log_init(struct log *log, const char *who, enum log_level level, int fd)
{
    *log = (struct log){.level = level, .fd = fd, .who = who, .copy = open_copy(fd)};
    log->journal = getenv("JOURNAL_STREAM") != NULL;
}

void log_fini(struct log *log)
{
    if (log->copy >= 0)
        (void)close(log->copy);
    log->copy = -1;
}

static int line_start(const struct log *log, enum log_level level, char *line, size_t bytes)
{
    if (log->journal)
        return snprintf(line, bytes, "<%d>%s %s ", level_priorities[level], log->who, level_names[level]);
    struct timespec now;
    struct tm utc;
    (void)clock_gettime(CLOCK_REALTIME, &now);
    (void)gmtime_r(&now.tv_sec, &utc);
    char date[32];
    if (strftime(date, sizeof(date), "%Y-%m-%dT%H:%M:%S", &utc) == 0)
        date[0] = 0;
    return snprintf(line, bytes, "%s.%03ldZ %s %s ", date, now.tv_nsec / 1000000, log->who,
                    level_names[level]);
}

/* A client's bytes may be in the line (names, texts): a line stays one line of printable characters. */
static void line_clean(char *line, size_t length)
{
    for (size_t i = 0; i < length; i++)
        if ((unsigned char)line[i] < 0x20 || line[i] == 0x7f)
            line[i] = '?';
}

const char *log_word(struct log_word *word, const char *name)
{
    size_t length = 0;
    word->text[0] = 0;
    for (; *name && length + 4 < sizeof(word->text); name++) {
        const unsigned char byte = (unsigned char)*name;
        const int plain = byte > ' ' && byte < 0x7f && byte != '\\';
        length += (size_t)snprintf(word->text + length, sizeof(word->text) - length, plain ? "%c" : "\\x%02x",
                                   byte);
    }
    return word->text;
}

/* To what could not be opened again. Kernels before 6.4 do not know pipes that are not to wait for once, none knows such
 * terminals: then it is looked first, and who writes to it in between may make us wait for the reader. */
static ssize_t write_now(int fd, const char *line, size_t length)
{
    const struct iovec part = {.iov_base = (void *)(uintptr_t)line, .iov_len = length};
    struct stat info;
    if (fstat(fd, &info) == 0 && S_ISFIFO(info.st_mode)) {
        const ssize_t n = pwritev2(fd, &part, 1, -1, RWF_NOWAIT);
        if (n >= 0 || errno != EOPNOTSUPP)
            return n;
    }
    struct pollfd room = {.fd = fd, .events = POLLOUT}; /* of a pipe: for PIPE_BUF bytes, more than a line */
    return poll(&room, 1, 0) == 1 && (room.revents & POLLOUT) ? write(fd, line, length) : -1;
}

/* Waits for no reader: a line that a full pipe or socket does not take now is forgotten like one that cannot be written. */
static int put_line(const struct log *log, const char *line, size_t length)
{
    ssize_t n;
    if (log->copy >= 0)
        n = write(log->copy, line, length);
    else {
        n = send(log->fd, line, length, MSG_DONTWAIT | MSG_NOSIGNAL);
        if (n < 0 && errno == ENOTSOCK)
            n = write_now(log->fd, line, length);
    }
    return n == (ssize_t)length;
}

static void write_line(struct log *log, enum log_level level, uint32_t n_left_out, const char *format,
                       va_list args)
{
    char line[LOG_LINE_BYTES];
    const size_t room = sizeof(line) - 1; /* for the newline */
    size_t length = (size_t)line_start(log, level, line, room);
    int n = vsnprintf(line + length, room - length, format, args);
    length += n < 0 ? 0 : (size_t)n;
    if (n_left_out && length < room)
        length += (size_t)snprintf(line + length, room - length, " left_out %u", n_left_out);
    if (length > room - 1)
        length = room - 1; /* snprintf says what it would have written */
    line_clean(line, length);
    line[length++] = '\n';
    if (!put_line(log, line, length))
        log->n_unwritten++;
}

void log_write(struct log *log, enum log_level level, const char *format, ...)
{
    if (level > log->level)
        return;
    va_list args;
    va_start(args, format);
    write_line(log, level, 0, format, args);
    va_end(args);
}

static struct log_limit *find_limit(struct log *log, const char *key)
{
    for (int i = 0; i < LOG_MAX_KEYS; i++) {
        if (!log->limits[i].key)
            log->limits[i].key = key;
        if (strcmp(log->limits[i].key, key) == 0)
            return &log->limits[i];
    }
    return &log->limits[LOG_MAX_KEYS - 1]; /* more keys than places: the last ones share a limit */
}

int log_limited(struct log *log, enum log_level level, const char *key, uint64_t now_ns, const char *format,
                ...)
{
    if (level > log->level)
        return 0;
    struct log_limit *limit = find_limit(log, key);
    uint32_t n_left_out = 0;
    if (limit->n_lines == 0 || now_ns - limit->window_ns >= LOG_WINDOW_NS) {
        n_left_out = limit->n_suppressed;
        limit->window_ns = now_ns;
        limit->n_lines = 0;
        limit->n_suppressed = 0;
    }
    if (limit->n_lines >= (level >= LOG_INFO ? LOG_BURST_INFO : LOG_BURST)) {
        limit->n_suppressed++;
        log->n_suppressed++;
        return 0;
    }
    limit->n_lines++;
    va_list args;
    va_start(args, format);
    write_line(log, level, n_left_out, format, args);
    va_end(args);
    return 1;
}
