/* Which GPUs the node was told to use. Before any lane runs, and while lanes open their devices. */
#ifndef EPD_EP_CUDA_DEVICES_H
#define EPD_EP_CUDA_DEVICES_H

#include "ep/node.h"

struct cuda_devices {
    uint32_t n;
    int ordinals[EPD_MAX_DEVICES]; /* CUDA's numbers, in the order they were named in */
};

/* 1 if there is a driver and a GPU; else 0 and the reason: EPD_CUDA if they may be there in a moment. */
int cuda_devices_available(struct epd_error *reason);
/* names: comma list of indices and UUIDs ("GPU-..." or 32 hex digits); NULL or empty: all. */
EPD_MUST_CHECK enum epd_status cuda_devices_choose(const char *names, struct cuda_devices *devices,
                                                   struct epd_error *error);

#endif
