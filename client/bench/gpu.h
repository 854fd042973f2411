/* The GPU side of a rank: its device, one stream, kernels that fill inputs, marks around what is timed. In a
 * build without CUDA gpu_absent.c stands in: gpu_count is 0, gpu_open and gpu_link return EPD_UNSUPPORTED with
 * a text. One owner, one thread; the device stays current on the thread that opened it. */
#ifndef EPD_BENCH_GPU_H
#define EPD_BENCH_GPU_H

#include <stddef.h>

#include "client/bench/job.h"

#define GPU_TEXT_BYTES 200
#define GPU_MAX_BLOCKS 64

struct gpu_state;

struct gpu {
    struct gpu_state *state;   /* owned; NULL: not open */
    char text[GPU_TEXT_BYTES]; /* why the last call failed */
};

#ifdef __cplusplus
extern "C" {
#endif

/* GPUs that this process can use; 0 without a driver. Makes no context. */
int gpu_count(void);

/* n_marks: how many times gpu_begin and gpu_end can be called before gpu_times. On failure gpu holds the text only. */
enum epd_status gpu_open(struct gpu *gpu, const uint8_t uuid[16], uint32_t n_marks);
void gpu_close(struct gpu *gpu);
/* A cudaStream_t that does not wait for the default stream. */
void *gpu_stream(const struct gpu *gpu);

/* cudaMalloc, the default of frameworks; zeroed. At most GPU_MAX_BLOCKS at a time. */
enum epd_status gpu_alloc(struct gpu *gpu, uint64_t bytes, void **data);
/* Everything from gpu_alloc. */
void gpu_free_all(struct gpu *gpu);
/* Blocking copy to the device. */
enum epd_status gpu_upload(struct gpu *gpu, void *device, const void *host, uint64_t bytes);
/* The numbers of fill_values, made by the GPU. */
enum epd_status gpu_fill(struct gpu *gpu, void *device, uint64_t n, enum epd_dtype dtype, float scale,
                         uint64_t seed);
/* Free memory of the device. */
enum epd_status gpu_free_bytes(struct gpu *gpu, double *bytes);

/* In the stream: a kernel of one block that takes `us` microseconds, then the mark. */
enum epd_status gpu_begin(struct gpu *gpu, uint32_t mark_idx, double us);
enum epd_status gpu_end(struct gpu *gpu, uint32_t mark_idx);
/* Waits for the stream; [n] nanoseconds between begin and end. */
enum epd_status gpu_times(struct gpu *gpu, uint32_t n, double *times_ns);
/* Waits for the stream. */
enum epd_status gpu_sync(struct gpu *gpu);

/* What the link can do: every GPU of this process stores to all others at once; GB/s that leave the slowest
 * GPU, [n_samples]. n_gpus: as many as are asked for, at least 2. */
enum epd_status gpu_link(struct gpu *gpu, const uint8_t (*uuids)[16], uint32_t n_gpus, uint32_t n_samples,
                         double *gb_per_s);

#ifdef __cplusplus
}
#endif

#endif
