#include "ep/cuda_rail.h"

#include <assert.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "ep/backend_cuda.h"

struct cuda_rail {
    struct backend_device *device; /* borrowed; may be NULL */
    int ordinal;                   /* CUDA's number of it */
    uint32_t channels;             /* taken of it */
    _Atomic int connecting;
    cudaStream_t stream; /* owned */
    char *memory;        /* owned */
};

enum epd_status cuda_rail_open(struct backend_device *device, uint32_t channels, struct cuda_rail **rail,
                               struct epd_error *error)
{
    struct cuda_rail *opened = calloc(1, sizeof *opened);
    if (!opened)
        return error_set(error, EPD_NO_MEMORY, "rail: %zu bytes", sizeof *opened);
    opened->device = device;
    if (device && cuda_streams_take(device, channels, error))
        goto close;
    opened->channels = device ? channels : 0;
    if (cuda_runtime_check(cudaGetDevice(&opened->ordinal), "rail: device", error) ||
        cuda_runtime_check(cudaStreamCreateWithFlags(&opened->stream, cudaStreamNonBlocking), "rail: stream",
                           error))
        goto close;
    *rail = opened;
    return EPD_OK;

close:
    cuda_rail_close(opened);
    return error->status;
}

void cuda_rail_close(struct cuda_rail *rail)
{
    cuda_rail_settled(rail);
    if (rail->channels)
        cuda_streams_give_back(rail->device, rail->channels);
    if (rail->memory)
        (void)cudaFreeAsync(rail->memory, rail->stream);
    if (rail->stream)
        (void)cudaStreamDestroy(rail->stream);
    free(rail);
}

void cuda_rail_use(const struct cuda_rail *rail)
{
    (void)cudaSetDevice(rail->ordinal);
}

struct CUstream_st *cuda_rail_stream(const struct cuda_rail *rail)
{
    return rail->stream;
}

enum epd_status cuda_rail_memory(struct cuda_rail *rail, size_t bytes, char **memory, struct epd_error *error)
{
    if (cuda_runtime_check(cudaMallocAsync((void **)&rail->memory, bytes, rail->stream), "rail: memory",
                           error) ||
        cuda_runtime_check(cudaMemsetAsync(rail->memory, 0, bytes, rail->stream), "rail: memory", error))
        return error->status;
    *memory = rail->memory;
    return EPD_OK;
}

int cuda_rail_passed(const struct cuda_rail *rail, struct epd_error *error)
{
    const cudaError_t done = cudaStreamQuery(rail->stream);
    if (done == cudaErrorNotReady)
        return 0;
    (void)!cuda_runtime_check(done, "rail: first swap", error);
    return 1;
}

void cuda_rail_connecting(struct cuda_rail *rail)
{
    if (!atomic_exchange(&rail->connecting, 1) && rail->device)
        atomic_fetch_add(&rail->device->n_connecting, 1);
}

void cuda_rail_settled(struct cuda_rail *rail)
{
    if (atomic_exchange(&rail->connecting, 0) && rail->device)
        atomic_fetch_sub(&rail->device->n_connecting, 1);
}

struct CUstream_st *cuda_rail_queue_stream(const struct backend_queue *queue)
{
    return cuda_queue_stream(queue);
}

enum epd_status cuda_rail_write(struct backend_queue *queue, uint64_t *to, const uint64_t *from, size_t n,
                                struct epd_error *error)
{
    const struct cuda_driver *driver = &cuda_queue_device(queue)->driver;
    CUstreamBatchMemOpParams ops[CUDA_RAIL_WORDS];
    assert(n <= CUDA_RAIL_WORDS);
    memset(ops, 0, n * sizeof *ops);
    for (size_t i = 0; i < n; i++) {
        ops[i].writeValue.operation = CU_STREAM_MEM_OP_WRITE_VALUE_64;
        ops[i].writeValue.address = (CUdeviceptr)(uintptr_t)(to + i);
        ops[i].writeValue.value64 = from[i];
    }
    return cuda_driver_check(
        driver, driver->cuStreamBatchMemOp(cuda_queue_stream(queue), (unsigned)n, ops, 0), "report", error);
}
