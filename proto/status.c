#include "proto/status.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

const char *status_name(enum epd_status status)
{
    switch (status) {
#define STATUS_NAME(id, number, text)                                                                        \
    case id:                                                                                                 \
        return #id;
        EPD_STATUS_TABLE(STATUS_NAME)
#undef STATUS_NAME
    }
    return "EPD_?";
}

const char *status_text(enum epd_status status)
{
    switch (status) {
#define STATUS_TEXT(id, number, text)                                                                        \
    case id:                                                                                                 \
        return text;
        EPD_STATUS_TABLE(STATUS_TEXT)
#undef STATUS_TEXT
    }
    return "unknown status";
}

int status_known(uint32_t number)
{
    switch (number) {
#define STATUS_NUMBER(id, number, text) case number:
        EPD_STATUS_TABLE(STATUS_NUMBER)
#undef STATUS_NUMBER
        return 1;
    }
    return 0;
}

enum epd_status error_set(struct epd_error *error, enum epd_status status, const char *format, ...)
{
    va_list arguments;

    error->status = status;
    va_start(arguments, format);
    const int length = vsnprintf(error->text, sizeof error->text, format, arguments);
    va_end(arguments);
    if (length >= (int)sizeof error->text)
        memcpy(error->text + sizeof error->text - sizeof "...", "...", sizeof "...");
    /* A library's own text may bring line ends; on the wire and in the log an error is one line. */
    for (char *c = error->text; *c; c++)
        if ((unsigned char)*c < 0x20 || *c == 0x7f)
            *c = ' ';
    return status;
}
