/* gpu.h in a build without CUDA: there is no GPU, and whoever asks for one is told why. */
#include "client/bench/gpu.h"

#include <stdio.h>

int gpu_count(void)
{
    return 0;
}

static enum epd_status absent(struct gpu *gpu)
{
    (void)snprintf(gpu->text, sizeof(gpu->text),
                   "this epd-bench was built without CUDA (EPD_CUDA); it measures the host backend only");
    return EPD_UNSUPPORTED;
}

enum epd_status gpu_open(struct gpu *gpu, const uint8_t uuid[16], uint32_t n_marks)
{
    (void)uuid;
    (void)n_marks;
    gpu->state = NULL;
    return absent(gpu);
}

void gpu_close(struct gpu *gpu)
{
    gpu->state = NULL;
}

void *gpu_stream(const struct gpu *gpu)
{
    (void)gpu;
    return NULL;
}

enum epd_status gpu_alloc(struct gpu *gpu, uint64_t bytes, void **data)
{
    (void)bytes;
    (void)data;
    return absent(gpu);
}

void gpu_free_all(struct gpu *gpu)
{
    (void)gpu;
}

enum epd_status gpu_upload(struct gpu *gpu, void *device, const void *host, uint64_t bytes)
{
    (void)device;
    (void)host;
    (void)bytes;
    return absent(gpu);
}

enum epd_status gpu_fill(struct gpu *gpu, void *device, uint64_t n, enum epd_dtype dtype, float scale,
                         uint64_t seed)
{
    (void)device;
    (void)n;
    (void)dtype;
    (void)scale;
    (void)seed;
    return absent(gpu);
}

enum epd_status gpu_free_bytes(struct gpu *gpu, double *bytes)
{
    (void)bytes;
    return absent(gpu);
}

enum epd_status gpu_begin(struct gpu *gpu, uint32_t mark_idx, double us)
{
    (void)mark_idx;
    (void)us;
    return absent(gpu);
}

enum epd_status gpu_end(struct gpu *gpu, uint32_t mark_idx)
{
    (void)mark_idx;
    return absent(gpu);
}

enum epd_status gpu_times(struct gpu *gpu, uint32_t n, double *times_ns)
{
    (void)n;
    (void)times_ns;
    return absent(gpu);
}

enum epd_status gpu_sync(struct gpu *gpu)
{
    return absent(gpu);
}

enum epd_status gpu_link(struct gpu *gpu, const uint8_t (*uuids)[16], uint32_t n_gpus, uint32_t n_samples,
                         double *gb_per_s)
{
    (void)uuids;
    (void)n_gpus;
    (void)n_samples;
    (void)gb_per_s;
    return absent(gpu);
}
