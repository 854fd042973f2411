// gpu.h by the CUDA runtime. The kernels here are the client's own work: values, and a kernel that only takes time.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "client/bench/gpu.h"
#include "client/bench/gpu_check.h"

struct gpu_state {
    cudaStream_t stream;
    uint32_t n_marks;
    cudaEvent_t *begins, *ends; // owned, [n_marks]
    void *blocks[GPU_MAX_BLOCKS];
    uint32_t n_blocks;
};

enum epd_status gpu_fail(struct gpu *gpu, cudaError_t error, const char *what)
{
    if (error == cudaSuccess)
        return EPD_OK;
    (void)cudaGetLastError();
    (void)snprintf(gpu->text, sizeof(gpu->text), "%s: %s (%d)", what, cudaGetErrorString(error), (int)error);
    return error == cudaErrorMemoryAllocation ? EPD_NO_MEMORY : EPD_CUDA;
}

int gpu_count(void)
{
    int n = 0;
    if (cudaGetDeviceCount(&n) != cudaSuccess) {
        (void)cudaGetLastError();
        return 0;
    }
    return n;
}

enum epd_status gpu_select(struct gpu *gpu, const uint8_t uuid[16], int *ordinal)
{
    const int n = gpu_count();
    if (n == 0) {
        (void)snprintf(gpu->text, sizeof(gpu->text), "no GPU here, or no driver for it");
        return EPD_UNSUPPORTED;
    }
    for (int i = 0; i < n; i++) {
        cudaDeviceProp properties;
        enum epd_status status = gpu_fail(gpu, cudaGetDeviceProperties(&properties, i), "device properties");
        if (status != EPD_OK)
            return status;
        if (memcmp(properties.uuid.bytes, uuid, 16) != 0)
            continue;
        *ordinal = i;
        return gpu_fail(gpu, cudaSetDevice(i), "selecting the device");
    }
    (void)snprintf(gpu->text, sizeof(gpu->text),
                   "the daemon's device is not among the %d GPUs that this process sees", n);
    return EPD_INVALID_DEVICE;
}

static enum epd_status create_marks(struct gpu *gpu, uint32_t n)
{
    struct gpu_state *state = gpu->state;
    state->begins = static_cast<cudaEvent_t *>(calloc(n, sizeof(cudaEvent_t)));
    state->ends = static_cast<cudaEvent_t *>(calloc(n, sizeof(cudaEvent_t)));
    if (!state->begins || !state->ends)
        return EPD_NO_MEMORY;
    for (uint32_t i = 0; i < n; i++) {
        enum epd_status status = gpu_fail(gpu, cudaEventCreate(&state->begins[i]), "event");
        if (status == EPD_OK)
            status = gpu_fail(gpu, cudaEventCreate(&state->ends[i]), "event");
        if (status != EPD_OK)
            return status;
        state->n_marks = i + 1;
    }
    return EPD_OK;
}

// What the client launches must be loaded before anything waits: loading needs a context that does not.
static enum epd_status load_kernels(struct gpu *gpu);

enum epd_status gpu_open(struct gpu *gpu, const uint8_t uuid[16], uint32_t n_marks)
{
    int ordinal = 0;
    gpu->state = static_cast<struct gpu_state *>(calloc(1, sizeof(struct gpu_state)));
    if (!gpu->state)
        return EPD_NO_MEMORY;
    enum epd_status status = gpu_select(gpu, uuid, &ordinal);
    if (status == EPD_OK)
        status =
            gpu_fail(gpu, cudaStreamCreateWithFlags(&gpu->state->stream, cudaStreamNonBlocking), "stream");
    if (status == EPD_OK)
        status = create_marks(gpu, n_marks);
    if (status == EPD_OK)
        status = load_kernels(gpu);
    if (status != EPD_OK)
        gpu_close(gpu);
    return status;
}

void gpu_close(struct gpu *gpu)
{
    struct gpu_state *state = gpu->state;
    if (!state)
        return;
    for (uint32_t i = 0; i < state->n_marks; i++) {
        (void)cudaEventDestroy(state->begins[i]);
        (void)cudaEventDestroy(state->ends[i]);
    }
    if (state->stream)
        (void)cudaStreamDestroy(state->stream);
    free(state->begins);
    free(state->ends);
    free(state);
    gpu->state = NULL;
}

void *gpu_stream(const struct gpu *gpu)
{
    return gpu->state->stream;
}

enum epd_status gpu_alloc(struct gpu *gpu, uint64_t bytes, void **data)
{
    struct gpu_state *state = gpu->state;
    if (state->n_blocks == GPU_MAX_BLOCKS) {
        (void)snprintf(gpu->text, sizeof(gpu->text), "more than %d blocks of memory", GPU_MAX_BLOCKS);
        return EPD_NO_MEMORY;
    }
    enum epd_status status = gpu_fail(gpu, cudaMalloc(data, bytes), "cudaMalloc");
    if (status != EPD_OK)
        return status;
    state->blocks[state->n_blocks++] = *data;
    return gpu_fail(gpu, cudaMemset(*data, 0, bytes), "cudaMemset");
}

void gpu_free_all(struct gpu *gpu)
{
    struct gpu_state *state = gpu->state;
    while (state && state->n_blocks > 0)
        (void)cudaFree(state->blocks[--state->n_blocks]);
}

enum epd_status gpu_upload(struct gpu *gpu, void *device, const void *host, uint64_t bytes)
{
    return gpu_fail(gpu, cudaMemcpy(device, host, bytes, cudaMemcpyHostToDevice), "copy to the device");
}

// The i-th number of fill.c's sequence: its state grows by a constant, so every element stands alone.
static __device__ uint64_t random_at(uint64_t seed, uint64_t i)
{
    uint64_t value = seed + (i + 1) * 0x9e3779b97f4a7c15ull;
    value = (value ^ value >> 32) * 0xd6e8feb86659fd93ull;
    value = (value ^ value >> 32) * 0xd6e8feb86659fd93ull;
    return value ^ value >> 32;
}

template <typename element>
static __global__ void fill_kernel(element *data, uint64_t n, float scale, uint64_t seed)
{
    for (uint64_t i = blockIdx.x * (uint64_t)blockDim.x + threadIdx.x; i < n;
         i += (uint64_t)gridDim.x * blockDim.x) {
        const uint64_t random = random_at(seed, i);
        const float size = (float)(64 + (random >> 8) % 64) / 128.0f * scale;
        data[i] = (element)(random & 1 ? size : -size);
    }
}

static __global__ void busy_kernel(uint64_t ns)
{
    uint64_t begin, now;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(begin));
    do
        asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
    while (now - begin < ns);
}

static enum epd_status load_kernels(struct gpu *gpu)
{
    cudaFuncAttributes attributes;
    const void *kernels[] = {(const void *)busy_kernel, (const void *)fill_kernel<float>,
                             (const void *)fill_kernel<__nv_bfloat16>, (const void *)fill_kernel<__half>};
    for (const void *kernel : kernels) {
        enum epd_status status =
            gpu_fail(gpu, cudaFuncGetAttributes(&attributes, kernel), "loading a kernel");
        if (status != EPD_OK)
            return status;
    }
    return EPD_OK;
}

enum epd_status gpu_fill(struct gpu *gpu, void *device, uint64_t n, enum epd_dtype dtype, float scale,
                         uint64_t seed)
{
    const int n_blocks = 1024, n_threads = 256;
    if (n == 0)
        return EPD_OK;
    if (dtype == EPD_F32)
        fill_kernel<<<n_blocks, n_threads>>>(static_cast<float *>(device), n, scale, seed);
    else if (dtype == EPD_BF16)
        fill_kernel<<<n_blocks, n_threads>>>(static_cast<__nv_bfloat16 *>(device), n, scale, seed);
    else
        fill_kernel<<<n_blocks, n_threads>>>(static_cast<__half *>(device), n, scale, seed);
    enum epd_status status = gpu_fail(gpu, cudaGetLastError(), "filling");
    return status == EPD_OK ? gpu_fail(gpu, cudaDeviceSynchronize(), "filling") : status;
}

enum epd_status gpu_free_bytes(struct gpu *gpu, double *bytes)
{
    size_t n_free = 0, n_total = 0;
    enum epd_status status = gpu_fail(gpu, cudaMemGetInfo(&n_free, &n_total), "free memory");
    *bytes = (double)n_free;
    return status;
}

enum epd_status gpu_begin(struct gpu *gpu, uint32_t mark_idx, double us)
{
    busy_kernel<<<1, 1, 0, gpu->state->stream>>>((uint64_t)(us * 1000));
    enum epd_status status = gpu_fail(gpu, cudaGetLastError(), "the client's kernel");
    if (status != EPD_OK)
        return status;
    return gpu_fail(gpu, cudaEventRecord(gpu->state->begins[mark_idx], gpu->state->stream), "mark");
}

enum epd_status gpu_end(struct gpu *gpu, uint32_t mark_idx)
{
    return gpu_fail(gpu, cudaEventRecord(gpu->state->ends[mark_idx], gpu->state->stream), "mark");
}

enum epd_status gpu_sync(struct gpu *gpu)
{
    return gpu_fail(gpu, cudaStreamSynchronize(gpu->state->stream), "waiting for the stream");
}

enum epd_status gpu_times(struct gpu *gpu, uint32_t n, double *times_ns)
{
    enum epd_status status = gpu_sync(gpu);
    for (uint32_t i = 0; status == EPD_OK && i < n; i++) {
        float ms = 0;
        status =
            gpu_fail(gpu, cudaEventElapsedTime(&ms, gpu->state->begins[i], gpu->state->ends[i]), "times");
        times_ns[i] = ms * 1e6;
    }
    return status;
}
