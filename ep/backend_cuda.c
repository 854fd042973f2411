/* The CUDA backend: GPUs of one node, one lane each. */
#include "ep/backend_cuda.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "ep/cuda_exchange.h"
#include "ep/cuda_flags.h"
#include "ep/cuda_graph.h"
#include "kernels/cuda/bias_grad.h"
#include "kernels/cuda/cuda.h"

/* What the copy engines and vector loads of the kernels ask for. */
#define TENSOR_ALIGNMENT 16

static enum epd_status find_engine(const char *name, const struct gemm_engine **engine,
                                   struct epd_error *error)
{
    char known[EPD_ERROR_TEXT_BYTES] = "";
    *engine = NULL;
    if (!name)
        return EPD_OK;
    for (int i = 0; gemm_engines[i]; i++) {
        size_t used = strlen(known);
        if (strcmp(gemm_engines[i]->name, name) == 0) {
            *engine = gemm_engines[i];
            return EPD_OK;
        }
        snprintf(known + used, sizeof known - used, " %s", gemm_engines[i]->name);
    }
    for (int i = 0; gemm_engines_absent[i].name; i++)
        if (strcmp(gemm_engines_absent[i].name, name) == 0)
            return error_set(error, EPD_UNSUPPORTED, "gemm engine %s: %s", name,
                             gemm_engines_absent[i].reason);
    return error_set(error, EPD_UNSUPPORTED, "gemm engine %s: the CUDA backend has%s", name, known);
}

#define TEXT_OF(value)  #value
#define NUMBER_TEXT(of) TEXT_OF(of)

/* Before the first CUDA call: a kernel that is loaded while a stream waits for a client would wait with it, and
 * so would a stream that shares its channel. */
static int available(struct epd_error *reason)
{
    if (setenv("CUDA_MODULE_LOADING", "EAGER", 1) != 0 ||
        setenv("CUDA_DEVICE_MAX_CONNECTIONS", NUMBER_TEXT(CUDA_CONNECTIONS), 1) != 0) {
        error_set(reason, EPD_SYSTEM, "setenv: %s", strerror(errno));
        return 0;
    }
    return cuda_devices_available(reason);
}

static enum epd_status n_devices(const struct node_config *config, uint32_t *n, struct epd_error *error)
{
    const struct gemm_engine *engine;
    struct cuda_devices devices;
    if (find_engine(config->gemm_engine, &engine, error) ||
        cuda_devices_choose(config->devices, &devices, error))
        return error->status;
    *n = devices.n;
    return EPD_OK;
}

/* ---- devices ---- */

static enum epd_status check_attribute(const struct backend_device *device, enum cudaDeviceAttr attribute,
                                       const char *what, struct epd_error *error)
{
    int value = 0;
    if (cuda_runtime_check(cudaDeviceGetAttribute(&value, attribute, device->ordinal), what, error))
        return error->status;
    if (!value)
        return error_set(error, EPD_UNSUPPORTED, "GPU %d: no %s", device->ordinal, what);
    return EPD_OK;
}

static enum epd_status check_peers(const struct backend_device *device, struct epd_error *error)
{
    for (uint32_t i = 0; i < device->peers.n; i++) {
        int peer = device->peers.ordinals[i], can = 1;
        if (peer != device->ordinal &&
            cuda_runtime_check(cudaDeviceCanAccessPeer(&can, device->ordinal, peer), "peer access", error))
            return error->status;
        if (!can)
            return error_set(error, EPD_UNSUPPORTED, "GPU %d cannot reach the memory of GPU %d",
                             device->ordinal, peer);
    }
    return EPD_OK;
}

static enum epd_status device_start(struct backend_device *device, struct epd_error *error)
{
    if (cuda_runtime_check(cudaSetDevice(device->ordinal), "device", error) ||
        cuda_runtime_check(cudaFree(NULL), "CUDA context", error) ||
        cuda_driver_load(&device->driver, error) ||
        check_attribute(device, cudaDevAttrHostRegisterSupported, "registered host memory", error) ||
        check_peers(device, error) ||
        cuda_heap_init(&device->heap, &device->driver, &device->peers, device->ordinal, error) ||
        cuda_kernels_load(error) || cuda_bias_grad_load(error))
        return error->status;
    device->imports.heap = &device->heap;
    if (cuda_runtime_check(cudaStreamCreateWithFlags(&device->setup, cudaStreamNonBlocking), "stream", error))
        return error->status;
    if (cuda_runtime_check(cudaStreamCreateWithFlags(&device->urgent, cudaStreamNonBlocking), "stream",
                           error))
        return error->status;
    return cuda_runtime_check(cudaEventCreateWithFlags(&device->sign_of_life, cudaEventDisableTiming),
                              "event", error);
}

static enum epd_status describe(const struct backend_device *device, struct device_info *info,
                                struct epd_error *error)
{
    struct cudaDeviceProp properties;
    if (cuda_runtime_check(cudaGetDeviceProperties(&properties, device->ordinal), "device properties", error))
        return error->status;
    memcpy(info->uuid, properties.uuid.bytes, sizeof info->uuid);
    snprintf(info->name, sizeof info->name, "%.*s", (int)sizeof info->name - 1, properties.name);
    info->memory_bytes = properties.totalGlobalMem;
    info->n_multiprocessors = (uint32_t)properties.multiProcessorCount;
    return EPD_OK;
}

static enum epd_status device_open(const struct node_config *config, uint32_t device_idx,
                                   struct backend_device **device, struct device_info *info,
                                   struct epd_error *error)
{
    struct backend_device *opened = calloc(1, sizeof *opened);
    if (!opened)
        return error_set(error, EPD_NO_MEMORY, "device %u: %zu bytes", device_idx, sizeof *opened);
    opened->device_idx = device_idx;
    if (find_engine(config->gemm_engine, &opened->engine, error) ||
        cuda_devices_choose(config->devices, &opened->peers, error))
        goto free_device;
    opened->ordinal = opened->peers.ordinals[device_idx];
    if (device_start(opened, error) || describe(opened, info, error))
        goto free_device;
    *device = opened;
    return EPD_OK;

free_device:
    free(opened);
    return error->status;
}

/* Only work that goes to the GPU tells whether it still takes any. */
static enum epd_status device_check(struct backend_device *device, struct epd_error *error)
{
    const cudaError_t last = cudaEventQuery(device->sign_of_life);
    if (last != cudaSuccess && last != cudaErrorNotReady)
        return cuda_runtime_check(last, "the GPU's last sign of life", error);
    cuda_deferred_end(device, 0);
    return cuda_runtime_check(cudaEventRecord(device->sign_of_life, device->setup),
                              "a sign of life of the GPU", error);
}

static uint32_t device_n_waiting(struct backend_device *device)
{
    return device->n_when_idle + device->imports.n_to_close;
}

static uint64_t device_give_back(struct backend_device *device)
{
    cuda_deferred_end(device, 1);
    return cuda_imports_close(&device->imports);
}

static void device_close(struct backend_device *device)
{
    (void)cudaDeviceSynchronize();
    (void)device_give_back(device);
    cuda_heap_fini(&device->heap);
    cuda_queues_free(device);
    (void)cudaStreamDestroy(device->setup);
    (void)cudaStreamDestroy(device->urgent);
    (void)cudaEventDestroy(device->sign_of_life);
    free(device);
}

/* ---- memory ---- */

static enum epd_status memory_alloc(struct backend_device *device, uint64_t bytes, int exported,
                                    struct backend_block *block, struct epd_error *error)
{
    struct backend_block taken;
    cuda_deferred_end(device, 0);
    if (cuda_heap_alloc(&device->heap, bytes, exported, &taken, error))
        return error->status;
    if (cuda_runtime_check(cudaMemsetAsync(taken.data, 0, taken.bytes, device->setup), "zeroing of memory",
                           error) ||
        cuda_runtime_check(cudaStreamSynchronize(device->setup), "zeroing of memory", error)) {
        cuda_heap_free(&device->heap, &taken);
        return error->status;
    }
    *block = taken;
    return EPD_OK;
}

static void end_block(struct backend_device *device, void *arg)
{
    cuda_heap_free(&device->heap, arg);
    free(arg);
}

static void memory_free(struct backend_device *device, struct backend_block *block)
{
    struct backend_block *kept = calloc(1, sizeof *kept);
    if (!kept) {
        cuda_queues_wait(device);
        cuda_heap_free(&device->heap, block);
        return;
    }
    *kept = *block;
    cuda_defer(device, 0, end_block, kept);
}

static enum epd_status memory_import(struct backend_device *device, const struct memory_request *request,
                                     struct backend_import *import, struct epd_error *error)
{
    return cuda_import(&device->imports, request, import, error);
}

static uint64_t memory_unimport(struct backend_device *device, struct backend_import *import)
{
    return cuda_unimport(&device->imports, import->mapping);
}

static enum epd_status copy_in(struct backend_device *device, void *dst, const void *src, uint64_t bytes,
                               struct epd_error *error)
{
    if (bytes == 0)
        return EPD_OK;
    if (cuda_runtime_check(cudaMemcpyAsync(dst, src, bytes, cudaMemcpyHostToDevice, device->setup),
                           "copy to the device", error))
        return error->status;
    return cuda_runtime_check(cudaStreamSynchronize(device->setup), "copy to the device", error);
}

static enum epd_status zero(struct backend_queue *queue, void *dst, uint64_t bytes, struct epd_error *error)
{
    if (bytes == 0)
        return EPD_OK;
    return cuda_runtime_check(cudaMemsetAsync(dst, 0, bytes, cuda_queue_stream(queue)), "zeroing", error);
}

/* What a kernel copies sooner than the copy engine begins; words of 4 bytes. */
#define SMALL_COPY_BYTES 16384u

static int is_small_copy(const void *dst, const void *src, uint64_t bytes)
{
    return bytes <= SMALL_COPY_BYTES && (bytes | (uintptr_t)dst | (uintptr_t)src) % 4 == 0;
}

static enum epd_status copy(struct backend_queue *queue, void *dst, const void *src, uint64_t bytes,
                            struct epd_error *error)
{
    if (bytes == 0)
        return EPD_OK;
    if (is_small_copy(dst, src, bytes)) {
        const struct cuda_report_args args = {
            .n_parts = 1, .parts = {{.to = dst, .from = (void *)(uintptr_t)src, .bytes = (uint32_t)bytes}}};
        return cuda_report_launch(&args, cuda_queue_stream(queue), error);
    }
    return cuda_runtime_check(
        cudaMemcpyAsync(dst, src, bytes, cudaMemcpyDeviceToDevice, cuda_queue_stream(queue)), "copy", error);
}

/* ---- work ---- */

static enum epd_status exchange(struct backend_queue *queue, enum exchange_op op, uint32_t stage,
                                const struct exchange_args *args, struct epd_error *error)
{
    return cuda_exchange_launch(op, stage, args, cuda_queue_stream(queue), error);
}

static uint32_t exchange_blocks(const struct exchange_shape *shape)
{
    return cuda_exchange_blocks(shape, UINT32_MAX);
}

static enum epd_status exchange_abort(struct backend_queue *queue, void *const *workspaces, uint32_t n_ranks,
                                      struct epd_error *error)
{
    const struct backend_device *device = cuda_queue_device(queue);
    for (uint32_t rank = 0; rank < n_ranks; rank++) {
        CUdeviceptr word = (CUdeviceptr)(uintptr_t)workspaces[rank] + CUDA_ABORT_OFFSET;
        if (cuda_driver_check(
                &device->driver,
                device->driver.cuStreamWriteValue32(device->urgent, word, 1, CU_STREAM_WRITE_VALUE_DEFAULT),
                "abort word", error))
            return error->status;
    }
    return cuda_runtime_check(cudaStreamSynchronize(device->urgent), "abort words", error);
}

static enum epd_status exchange_reset(struct backend_queue *queue, const struct exchange_shape *shape,
                                      uint64_t row_bytes, void *workspace, struct epd_error *error)
{
    uint64_t ticket; /* of no step: cuda_defer looks for it */
    if (cuda_exchange_reset(shape, row_bytes, workspace, cuda_queue_stream(queue), error))
        return error->status;
    return cuda_queue_ticket(queue, &ticket, error);
}

static enum epd_status activation(struct backend_queue *queue, const struct activation_args *args,
                                  struct epd_error *error)
{
    return cuda_activation_launch(args, cuda_queue_stream(queue), error);
}

static enum epd_status activation_bwd(struct backend_queue *queue, const struct activation_bwd_args *args,
                                      struct epd_error *error)
{
    return cuda_activation_bwd_launch(args, cuda_queue_stream(queue), error);
}

static enum epd_status bias_grad(struct backend_queue *queue, const struct bias_grad_args *args,
                                 struct epd_error *error)
{
    return cuda_bias_grad_launch(args, cuda_queue_stream(queue), error);
}

struct backend_gemm {
    struct backend_device *device; /* borrowed from the lane */
    const struct gemm_engine *engine;
    struct gemm_engine_plan *plan; /* owned */
};

static const struct gemm_engine *choose_engine(const struct backend_device *device,
                                               const struct gemm_problem *problem, struct epd_error *error)
{
    struct epd_error reason = {.status = EPD_OK};
    char reasons[EPD_ERROR_TEXT_BYTES] = "";
    for (int i = 0; gemm_engines[i]; i++) {
        const struct gemm_engine *engine = gemm_engines[i];
        if (device->engine && device->engine != engine)
            continue;
        if (engine->supports(problem, device->ordinal, &reason))
            return engine;
        size_t used = strlen(reasons);
        snprintf(reasons + used, sizeof reasons - used, "%s%.100s", used ? "; " : "", reason.text);
    }
    error_set(error, EPD_UNSUPPORTED, "no gemm engine: %.230s", reasons);
    return NULL;
}

static enum epd_status gemm_create(struct backend_device *device, const struct gemm_problem *problem,
                                   struct backend_gemm **gemm, struct epd_error *error)
{
    if (problem->shape.dtype == EPD_F32)
        return error_set(error, EPD_UNSUPPORTED, "gemm of f32: on the host backend only; want bf16 or f16");
    const struct gemm_engine *engine = choose_engine(device, problem, error);
    if (!engine)
        return error->status;
    struct backend_gemm *created = calloc(1, sizeof *created);
    if (!created)
        return error_set(error, EPD_NO_MEMORY, "gemm: %zu bytes", sizeof *created);
    *created = (struct backend_gemm){.device = device, .engine = engine};
    if (engine->create(problem, device->ordinal, &created->plan, error)) {
        free(created);
        return error->status;
    }
    *gemm = created;
    return EPD_OK;
}

static enum epd_status gemm_launch(struct backend_queue *queue, struct backend_gemm *gemm,
                                   const struct gemm_launch *launch, struct epd_error *error)
{
    return gemm->engine->launch(gemm->plan, launch, cuda_queue_stream(queue), error);
}

static void end_gemm(struct backend_device *device, void *arg)
{
    struct backend_gemm *gemm = arg;
    (void)device;
    gemm->engine->destroy(gemm->plan);
    free(gemm);
}

static void gemm_destroy(struct backend_gemm *gemm)
{
    cuda_defer(gemm->device, gemm->engine->destroy_waits, end_gemm, gemm);
}

static int gemm_recordable(const struct backend_gemm *gemm)
{
    return gemm->engine->splits_on_device;
}

const struct backend backend_cuda = {
    .kind = EPD_BACKEND_CUDA,
    .tensor_alignment = TENSOR_ALIGNMENT,
    .works_later = 1,
    .n_stages =
        {
            [EXCHANGE_ROUTE_DISPATCH] = CUDA_ROUTE_DISPATCH_STAGES,
            [EXCHANGE_DISPATCH] = CUDA_DISPATCH_STAGES,
            [EXCHANGE_COMBINE] = CUDA_COMBINE_STAGES,
            [EXCHANGE_GATHER_SCALARS] = CUDA_GATHER_STAGES,
            [EXCHANGE_WEIGHT_GRAD] = CUDA_WEIGHT_GRAD_STAGES,
        },
    .records = 1,
    .exchange_takes_turns = 1,
    .weight_grad_pushes = 1,
    .available = available,
    .n_devices = n_devices,
    .device_open = device_open,
    .device_close = device_close,
    .device_check = device_check,
    .device_idle = cuda_queues_idle,
    .device_n_waiting = device_n_waiting,
    .device_give_back = device_give_back,
    .memory_alloc = memory_alloc,
    .memory_free = memory_free,
    .memory_import = memory_import,
    .memory_unimport = memory_unimport,
    .queue_create = cuda_queue_create,
    .queue_destroy = cuda_queue_destroy,
    .queue_mark = cuda_queue_mark,
    .queue_join = cuda_queue_join,
    .queue_ticket = cuda_queue_ticket,
    .queue_reached = cuda_queue_reached,
    .flag_open = cuda_flag_open,
    .flag_close = cuda_flag_close,
    .flag_ready = cuda_flag_ready,
    .flag_done = cuda_flag_done,
    .zero = zero,
    .copy = copy,
    .copy_in = copy_in,
    .copy_out = cuda_queue_copy_out,
    .exchange_sizes = cuda_exchange_sizes,
    .exchange_blocks = exchange_blocks,
    .exchange_abort = exchange_abort,
    .exchange_reset = exchange_reset,
    .exchange = exchange,
    .activation = activation,
    .activation_bwd = activation_bwd,
    .bias_grad = bias_grad,
    .gemm_create = gemm_create,
    .gemm_launch = gemm_launch,
    .gemm_destroy = gemm_destroy,
    .graph_begin = cuda_graph_begin,
    .graph_end = cuda_graph_end,
    .graph_launch = cuda_graph_launch,
    .graph_destroy = cuda_graph_destroy,
    .gemm_recordable = gemm_recordable,
};
