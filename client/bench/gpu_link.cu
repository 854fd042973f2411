// The ceiling of an all-to-all: every GPU stores to all others at the same time, one process drives them. 16 bytes a store, four
// on their way per thread, as the best of kernel stores measured on NVLink; each GPU sends n_bytes to every other one, its
// threads spread over the peers, so that all its links are busy from the first to the last store.
#include <cuda_runtime.h>
#include <stdio.h>
#include <string.h>

#include "client/bench/gpu_check.h"

enum { MAX_GPUS = 16, BLOCKS = 132, THREADS = 1024, UNROLL = 4 };
static const uint64_t bytes_per_peer = 128ull << 20;

struct peers {
    uint4 *data[MAX_GPUS];
    uint32_t n;
};

static __global__ void __launch_bounds__(THREADS) store_kernel(struct peers peers, uint64_t n_vectors)
{
    const uint32_t peer_idx = blockIdx.x % peers.n, n_blocks = (gridDim.x - peer_idx + peers.n - 1) / peers.n;
    uint4 *to = peers.data[peer_idx];
    const uint64_t step = (uint64_t)n_blocks * THREADS;
    const uint4 value = make_uint4(threadIdx.x, blockIdx.x, 1, 2);
    uint64_t i = (uint64_t)(blockIdx.x / peers.n) * THREADS + threadIdx.x;
    for (; i + (UNROLL - 1) * step < n_vectors; i += UNROLL * step)
#pragma unroll
        for (int u = 0; u < UNROLL; u++)
            to[i + u * step] = value;
    for (; i < n_vectors; i += step)
        to[i] = value;
}

struct link {
    uint32_t n;
    int ordinals[MAX_GPUS];
    uint4 *targets[MAX_GPUS]; // [n - 1][bytes_per_peer], a slab per sender
    cudaStream_t streams[MAX_GPUS];
    cudaEvent_t begins[MAX_GPUS], ends[MAX_GPUS];
};

static enum epd_status open_gpu(struct gpu *gpu, struct link *link, uint32_t i, const uint8_t uuid[16])
{
    enum epd_status status = gpu_select(gpu, uuid, &link->ordinals[i]);
    if (status == EPD_OK)
        status = gpu_fail(gpu, cudaMalloc(&link->targets[i], (link->n - 1) * bytes_per_peer), "cudaMalloc");
    if (status == EPD_OK)
        status = gpu_fail(gpu, cudaStreamCreateWithFlags(&link->streams[i], cudaStreamNonBlocking), "stream");
    if (status == EPD_OK)
        status = gpu_fail(gpu, cudaEventCreate(&link->begins[i]), "event");
    if (status == EPD_OK)
        status = gpu_fail(gpu, cudaEventCreate(&link->ends[i]), "event");
    return status;
}

static enum epd_status enable_peers(struct gpu *gpu, const struct link *link)
{
    for (uint32_t i = 0; i < link->n; i++) {
        enum epd_status status = gpu_fail(gpu, cudaSetDevice(link->ordinals[i]), "selecting a device");
        for (uint32_t p = 0; status == EPD_OK && p < link->n; p++)
            if (p != i)
                status = gpu_fail(gpu, cudaDeviceEnablePeerAccess(link->ordinals[p], 0), "peer access");
        if (status != EPD_OK)
            return status;
    }
    return EPD_OK;
}

static enum epd_status launch(struct gpu *gpu, const struct link *link, uint32_t i)
{
    struct peers peers = {};
    for (uint32_t distance = 1; distance < link->n;
         distance++) { // the next GPU first: no two start at the same one
        const uint32_t p = (i + distance) % link->n, slab = i < p ? i : i - 1;
        peers.data[peers.n++] = link->targets[p] + slab * (bytes_per_peer / sizeof(uint4));
    }
    enum epd_status status = gpu_fail(gpu, cudaSetDevice(link->ordinals[i]), "selecting a device");
    if (status == EPD_OK)
        status = gpu_fail(gpu, cudaEventRecord(link->begins[i], link->streams[i]), "mark");
    if (status != EPD_OK)
        return status;
    store_kernel<<<BLOCKS, THREADS, 0, link->streams[i]>>>(peers, bytes_per_peer / sizeof(uint4));
    status = gpu_fail(gpu, cudaGetLastError(), "stores");
    return status == EPD_OK ? gpu_fail(gpu, cudaEventRecord(link->ends[i], link->streams[i]), "mark")
                            : status;
}

static enum epd_status sample(struct gpu *gpu, const struct link *link, double *gb_per_s)
{
    enum epd_status status = EPD_OK;
    float slowest_ms = 0;
    for (uint32_t i = 0; status == EPD_OK && i < link->n; i++)
        status = launch(gpu, link, i);
    for (uint32_t i = 0; status == EPD_OK && i < link->n; i++) {
        float ms = 0;
        status = gpu_fail(gpu, cudaEventSynchronize(link->ends[i]), "stores");
        if (status == EPD_OK)
            status = gpu_fail(gpu, cudaEventElapsedTime(&ms, link->begins[i], link->ends[i]), "times");
        slowest_ms = ms > slowest_ms ? ms : slowest_ms;
    }
    if (status == EPD_OK)
        *gb_per_s = (double)(link->n - 1) * bytes_per_peer / (slowest_ms * 1e-3) * 1e-9;
    return status;
}

// Memory, streams and events end with the process, which ends after this.
enum epd_status gpu_link(struct gpu *gpu, const uint8_t (*uuids)[16], uint32_t n_gpus, uint32_t n_samples,
                         double *gb_per_s)
{
    struct link link = {};
    if (n_gpus < 2 || n_gpus > MAX_GPUS) {
        (void)snprintf(gpu->text, sizeof(gpu->text), "link: %u GPUs, want 2 to %d", n_gpus, (int)MAX_GPUS);
        return EPD_INVALID_ARGUMENT;
    }
    link.n = n_gpus;
    enum epd_status status = EPD_OK;
    for (uint32_t i = 0; status == EPD_OK && i < n_gpus; i++)
        status = open_gpu(gpu, &link, i, uuids[i]);
    if (status == EPD_OK)
        status = enable_peers(gpu, &link);
    for (uint32_t s = 0; status == EPD_OK && s < n_samples; s++)
        status = sample(gpu, &link, &gb_per_s[s]);
    return status;
}
