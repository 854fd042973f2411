#include "daemon/dump_file.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "daemon/clock.h"

#define PREFIX_BYTES 32
#define SUFFIX       ".json"

void dump_file_init(struct dump_file *file, const struct config *config, int pid, uint64_t worker,
                    uint32_t number)
{
    const char *slash = strrchr(config->control_socket, '/');
    *file = (struct dump_file){.pid = pid, .worker = worker, .number = number};
    if (config->dump_directory[0])
        (void)snprintf(file->directory, sizeof(file->directory), "%s", config->dump_directory);
    else
        (void)snprintf(file->directory, sizeof(file->directory), "%.*s",
                       slash ? (int)(slash - config->control_socket) : 1,
                       slash ? config->control_socket : ".");
}

static void name_prefix(const struct dump_file *file, char prefix[PREFIX_BYTES])
{
    (void)snprintf(prefix, PREFIX_BYTES, "epd-dump-%d-", file->pid);
}

static void name_file(struct dump_file *file)
{
    char prefix[PREFIX_BYTES], date[32] = "", number[16] = "end";
    struct tm utc;
    const time_t now_s = (time_t)(clock_unix_ms() / 1000);
    name_prefix(file, prefix);
    if (!gmtime_r(&now_s, &utc) || strftime(date, sizeof(date), "%Y%m%dT%H%M%SZ", &utc) == 0)
        date[0] = 0;
    if (file->number)
        (void)snprintf(number, sizeof(number), "%" PRIu32, file->number);
    (void)snprintf(file->path, sizeof(file->path), "%s/%s%s-%" PRIu64 "-%s" SUFFIX, file->directory, prefix,
                   date, file->worker, number);
}

static int is_dump(const char *name, const char *prefix)
{
    const size_t length = strlen(name), tail = strlen(SUFFIX);
    return strncmp(name, prefix, strlen(prefix)) == 0 && length > tail &&
           strcmp(name + length - tail, SUFFIX) == 0;
}

/* Returns how many there are, and the first by name but the new one: the clock may have been set back. */
static uint32_t find_oldest(DIR *directory, const char *prefix, const char *new, char *oldest, size_t bytes)
{
    uint32_t n = 0;
    oldest[0] = 0;
    rewinddir(directory);
    for (const struct dirent *entry; (entry = readdir(directory));) {
        if (!is_dump(entry->d_name, prefix))
            continue;
        n++;
        if (strcmp(entry->d_name, new) != 0 && (!oldest[0] || strcmp(entry->d_name, oldest) < 0))
            (void)snprintf(oldest, bytes, "%s", entry->d_name);
    }
    return n;
}

static void drop_old(const struct dump_file *file)
{
    char prefix[PREFIX_BYTES], oldest[256] = "";
    DIR *directory = opendir(file->directory);
    if (!directory)
        return;
    name_prefix(file, prefix);
    const char *new = file->path + strlen(file->directory) + 1;
    while (find_oldest(directory, prefix, new, oldest, sizeof(oldest)) > DUMP_FILE_MAX)
        if (unlinkat(dirfd(directory), oldest, 0) != 0)
            break;
    (void)closedir(directory);
}

/* In one piece: written token by token it would take as many system calls. */
static int write_document(int fd, const json_t *document)
{
    char *text = document ? json_dumps(document, JSON_INDENT(1)) : NULL;
    const size_t bytes = text ? strlen(text) : 0;
    size_t done = 0;
    while (done < bytes) {
        ssize_t n = write(fd, text + done, bytes - done);
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            break;
        done += (size_t)n;
    }
    free(text);
    return bytes > 0 && done == bytes;
}

static json_t *make_document(const struct dump_file *file, const struct recorder *recorder)
{
    return json_pack("{s:i s:I s:I s:I s:o}", "pid", file->pid, "worker", (json_int_t)file->worker, "dump",
                     (json_int_t)file->number, "time_unix_ms", (json_int_t)clock_unix_ms(), "ops",
                     recorder_document(recorder, clock_ns()));
}

enum epd_status dump_file_write(struct dump_file *file, const struct recorder *recorder,
                                struct epd_error *error)
{
    name_file(file);
    int fd = open(file->path, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600);
    if (fd < 0)
        return error_set(error, EPD_SYSTEM, "dump %.160s: %s", file->path, strerror(errno));
    json_t *document = make_document(file, recorder);
    int failed = !write_document(fd, document);
    json_decref(document);
    failed |= close(fd) != 0;
    if (failed) {
        (void)unlink(file->path); /* half a document is of no use, and the disk may be full */
        return error_set(error, EPD_SYSTEM, "dump %.160s: not written in full", file->path);
    }
    drop_old(file);
    return EPD_OK;
}

void dump_file_log(const struct dump_file *file, struct log *log, const char *why,
                   const struct epd_error *error)
{
    if (error->status == EPD_OK)
        log_write(log, LOG_WARN, "flight recorder written path %s because %s", file->path, why);
    else
        log_write(log, LOG_ERROR, "flight recorder not written: %s", error->text);
}
