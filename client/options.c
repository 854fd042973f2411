#include "client/options.h"

#include <string.h>

/* 0, and *error set, if it cannot be the size of a versioned struct. */
static size_t options_size(const void *given, const char *name, struct epd_error *error)
{
    size_t size;

    if (!given) {
        error_set(error, EPD_INVALID_ARGUMENT, "%s: NULL", name);
        return 0;
    }
    memcpy(&size, given, sizeof size);
    if (size >= sizeof size)
        return size;
    error_set(error, EPD_INVALID_ARGUMENT, "%s: size %zu, want sizeof(struct %s)", name, size, name);
    return 0;
}

enum epd_status options_read(void *known, size_t known_bytes, const void *given, const char *name,
                             struct epd_error *error)
{
    const unsigned char *bytes = given;
    size_t size = options_size(given, name, error);

    if (!size)
        return error->status;
    for (size_t i = known_bytes; i < size; i++)
        if (bytes[i])
            return error_set(error, EPD_INVALID_ARGUMENT,
                             "%s: size %zu with a field at byte %zu set, this library knows %zu bytes", name,
                             size, i, known_bytes);
    memset(known, 0, known_bytes);
    memcpy(known, given, size < known_bytes ? size : known_bytes);
    return EPD_OK;
}

enum epd_status options_write(void *given, const void *known, size_t known_bytes, const char *name,
                              struct epd_error *error)
{
    size_t size = options_size(given, name, error);

    if (!size)
        return error->status;
    memcpy(given, known, size < known_bytes ? size : known_bytes);
    if (size > known_bytes)
        memset((unsigned char *)given + known_bytes, 0, size - known_bytes);
    memcpy(given, &size, sizeof size);
    return EPD_OK;
}
