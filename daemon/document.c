#include "daemon/document.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

static enum epd_status write_all(int fd, const char *text, size_t bytes, struct epd_error *error)
{
    for (size_t done = 0; done < bytes;) {
        ssize_t n = write(fd, text + done, bytes - done);
        if (n < 0)
            return error_set(error, EPD_SYSTEM, "document: write to a memfd: %s", strerror(errno));
        done += (size_t)n;
    }
    if (fcntl(fd, F_ADD_SEALS, F_SEAL_WRITE | F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) != 0)
        return error_set(error, EPD_SYSTEM, "document: sealing: %s", strerror(errno));
    return EPD_OK;
}

static enum epd_status seal_text(const char *text, int *fd, uint64_t *bytes, struct epd_error *error)
{
    int made = memfd_create("epd-document", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (made < 0)
        return error_set(error, EPD_SYSTEM, "document: memfd_create: %s", strerror(errno));
    const size_t length = strlen(text);
    enum epd_status status = write_all(made, text, length, error);
    if (status != EPD_OK) {
        close(made);
        return status;
    }
    *fd = made;
    *bytes = length;
    return EPD_OK;
}

enum epd_status document_seal(json_t *json, int *fd, uint64_t *bytes, struct epd_error *error)
{
    char *text = json ? json_dumps(json, JSON_COMPACT) : NULL;
    json_decref(json);
    if (!text)
        return error_set(error, EPD_NO_MEMORY, "document: no memory");
    enum epd_status status = seal_text(text, fd, bytes, error);
    free(text);
    return status;
}

void document_hex(const uint8_t *data, size_t bytes, char *text)
{
    static const char digits[] = "0123456789abcdef";
    for (size_t i = 0; i < bytes; i++) {
        text[2 * i] = digits[data[i] >> 4];
        text[2 * i + 1] = digits[data[i] & 15];
    }
    text[2 * bytes] = 0;
}
