#include <stdio.h>

#include "device.h"

static enum epd_status absent(void)
{
    fprintf(stderr, "epd-train-moe: built without CUDA; it can use `epd --backend host` only\n");
    return EPD_UNSUPPORTED;
}

enum epd_status device_select(const uint8_t uuid[16])
{
    (void)uuid;
    return absent();
}

enum epd_status device_copy(void *to, const void *from, size_t n_bytes)
{
    (void)to;
    (void)from;
    (void)n_bytes;
    return absent();
}
