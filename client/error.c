#include "client/error.h"

#include "client/public.h"

static _Thread_local struct epd_error thread_error;

struct epd_error *error_begin(void)
{
    thread_error.status = EPD_OK;
    thread_error.text[0] = 0;
    return &thread_error;
}

const char *epd_error_text(void)
{
    return thread_error.text;
}

const char *epd_status_name(enum epd_status status)
{
    return status_name(status);
}

const char *epd_status_text(enum epd_status status)
{
    return status_text(status);
}

const char *epd_version(void)
{
    return EPD_VERSION;
}
