/* The host backend: plain memory, the host kernels, everything done at once on the lane thread. Devices are
 * emulated: a lane each, memory of their own accounting, no other difference. */
#include "ep/backend.h"

#include <cblas.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "ep/import.h"
#include "kernels/host/host.h"

struct backend_device {
    struct import_cache imports;
    struct host_scratch scratch;
};

/* Work is done when the call returns, so a queue orders nothing. */
struct backend_queue {
    struct backend_device *device; /* borrowed from the lane */
};

struct backend_gemm {
    struct gemm_shape shape;
};

static int host_available(struct epd_error *reason)
{
    (void)reason;
    return 1;
}

static enum epd_status host_n_devices(const struct node_config *config, uint32_t *n_devices,
                                      struct epd_error *error)
{
    if (config->n_devices < 1 || config->n_devices > EPD_MAX_DEVICES)
        return error_set(error, EPD_INVALID_ARGUMENT, "host devices %u, want 1..%d", config->n_devices,
                         EPD_MAX_DEVICES);
    if (config->gemm_engine && strcmp(config->gemm_engine, "cblas") != 0)
        return error_set(error, EPD_UNSUPPORTED, "gemm engine %s: the host backend has cblas only",
                         config->gemm_engine);
    /* Lanes are the parallelism; one thread in each call also fixes the order of every sum. */
    openblas_set_num_threads(1);
    *n_devices = config->n_devices;
    return EPD_OK;
}

static enum epd_status host_device_open(const struct node_config *config, uint32_t device_idx,
                                        struct backend_device **device, struct device_info *info,
                                        struct epd_error *error)
{
    (void)config;
    struct backend_device *opened = calloc(1, sizeof *opened);
    if (!opened)
        return error_set(error, EPD_NO_MEMORY, "host device %u: %zu bytes", device_idx, sizeof *opened);
    memcpy(info->uuid, "epd-host-device", EPD_UUID_BYTES - 1);
    info->uuid[EPD_UUID_BYTES - 1] = (uint8_t)device_idx;
    snprintf(info->name, sizeof info->name, "host %u", device_idx);
    info->memory_bytes = (uint64_t)sysconf(_SC_PHYS_PAGES) * (uint64_t)sysconf(_SC_PAGESIZE);
    *device = opened;
    return EPD_OK;
}

static int host_device_idle(struct backend_device *device)
{
    (void)device;
    return 1;
}

static uint32_t host_device_n_waiting(struct backend_device *device)
{
    (void)device;
    return 0;
}

static uint64_t host_device_give_back(struct backend_device *device)
{
    (void)device;
    return 0;
}

static enum epd_status host_device_check(struct backend_device *device, struct epd_error *error)
{
    (void)device, (void)error;
    return EPD_OK;
}

static void host_device_close(struct backend_device *device)
{
    host_scratch_fini(&device->scratch);
    free(device);
}

/* A client that maps an exported block can neither shrink it under us nor lift the seals. */
#define BLOCK_SEALS (F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL)

static enum epd_status host_memory_alloc(struct backend_device *device, uint64_t bytes, int exported,
                                         struct backend_block *block, struct epd_error *error)
{
    (void)device;
    uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE);
    if (bytes == 0 || bytes > (uint64_t)INT64_MAX - page)
        return error_set(error, EPD_INVALID_ARGUMENT, "memory: %llu bytes, want 1..%lld",
                         (unsigned long long)bytes, (long long)((uint64_t)INT64_MAX - page));
    uint64_t rounded = (bytes + page - 1) & ~(page - 1);
    int fd = memfd_create("epd-heap", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (fd < 0)
        return error_set(error, EPD_SYSTEM, "memory: memfd_create: %s", strerror(errno));
    if (ftruncate(fd, (off_t)rounded) < 0 || fcntl(fd, F_ADD_SEALS, BLOCK_SEALS) < 0) {
        error_set(error, EPD_NO_MEMORY, "memory: memfd of %llu bytes: %s", (unsigned long long)rounded,
                  strerror(errno));
        goto close_fd;
    }
    void *data = mmap(NULL, rounded, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (data == MAP_FAILED) {
        error_set(error, EPD_NO_MEMORY, "memory: mmap of %llu bytes: %s", (unsigned long long)rounded,
                  strerror(errno));
        goto close_fd;
    }
    if (!exported) {
        close(fd);
        fd = -1;
    }
    *block = (struct backend_block){.data = data, .bytes = rounded, .fd = fd};
    return EPD_OK;

close_fd:
    close(fd);
    return error->status;
}

static void host_memory_free(struct backend_device *device, struct backend_block *block)
{
    (void)device;
    munmap(block->data, block->bytes);
    if (block->fd >= 0)
        close(block->fd);
}

static enum epd_status host_memory_import(struct backend_device *device, const struct memory_request *request,
                                          struct backend_import *import, struct epd_error *error)
{
    struct import_range range;
    if (request->kind != EPD_MEMORY_MEMFD)
        return error_set(error, EPD_UNSUPPORTED, "memory kind %d: the host backend imports memfds (%d) only",
                         (int)request->kind, (int)EPD_MEMORY_MEMFD);
    if (import_acquire(&device->imports, request->fd, request->offset, request->bytes, &range, error))
        return error->status;
    *import = (struct backend_import){
        .data = range.data, .mapped_bytes = range.mapped_bytes, .mapping = range.mapping};
    return EPD_OK;
}

static uint64_t host_memory_unimport(struct backend_device *device, struct backend_import *import)
{
    return import_release(&device->imports, import->mapping);
}

static enum epd_status host_queue_create(struct backend_device *device, struct backend_queue **queue,
                                         struct epd_error *error)
{
    struct backend_queue *created = calloc(1, sizeof *created);
    if (!created)
        return error_set(error, EPD_NO_MEMORY, "queue: %zu bytes", sizeof *created);
    created->device = device;
    *queue = created;
    return EPD_OK;
}

static void host_queue_destroy(struct backend_queue *queue)
{
    free(queue);
}

/* The lanes' own barrier orders host memory. */
static enum epd_status host_queue_mark(struct backend_queue *queue, uint32_t barrier_idx,
                                       struct epd_error *error)
{
    (void)queue, (void)barrier_idx, (void)error;
    return EPD_OK;
}

static enum epd_status host_queue_join(struct backend_queue *queue, struct backend_queue *other,
                                       uint32_t barrier_idx, struct epd_error *error)
{
    (void)queue, (void)other, (void)barrier_idx, (void)error;
    return EPD_OK;
}

static enum epd_status host_queue_ticket(struct backend_queue *queue, uint64_t *ticket,
                                         struct epd_error *error)
{
    (void)queue, (void)error;
    *ticket = 0;
    return EPD_OK;
}

static int host_queue_reached(struct backend_queue *queue, uint64_t ticket, struct epd_error *error)
{
    (void)queue, (void)ticket, (void)error;
    return 1;
}

/* The page is mapped already. */
static enum epd_status host_flag_open(struct backend_device *device, struct backend_flag *flag,
                                      struct epd_error *error)
{
    (void)device, (void)flag, (void)error;
    return EPD_OK;
}

static void host_flag_close(struct backend_device *device, struct backend_flag *flag)
{
    (void)device, (void)flag;
}

/* One look: the client has set the flag before it sent its datagram, or it lies. */
static enum epd_status host_flag_ready(struct backend_queue *queue, const struct backend_flag *flag,
                                       uint64_t *ticket, struct epd_error *error)
{
    (void)queue;
    uint32_t set = 1;
    *ticket = 0;
    if (!atomic_compare_exchange_strong(&flag->page->plans[flag->idx].ready, &set, 0))
        return error_set(error, EPD_PROTOCOL, "launched without setting its ready flag");
    return EPD_OK;
}

static enum epd_status host_flag_done(struct backend_queue *queue, const struct backend_flag *flag,
                                      struct epd_error *error)
{
    (void)queue, (void)error;
    flag_set(&flag->page->plans[flag->idx].done);
    return EPD_OK;
}

static enum epd_status host_zero(struct backend_queue *queue, void *dst, uint64_t bytes,
                                 struct epd_error *error)
{
    (void)queue, (void)error;
    if (bytes)
        memset(dst, 0, bytes);
    return EPD_OK;
}

static enum epd_status host_copy(struct backend_queue *queue, void *dst, const void *src, uint64_t bytes,
                                 struct epd_error *error)
{
    (void)queue, (void)error;
    if (bytes)
        memcpy(dst, src, bytes);
    return EPD_OK;
}

static enum epd_status host_copy_out(struct backend_queue *queue, void *dst, void *src, uint64_t bytes,
                                     int clear, struct epd_error *error)
{
    if (host_copy(queue, dst, src, bytes, error))
        return error->status;
    return clear ? host_zero(queue, src, bytes, error) : EPD_OK;
}

static enum epd_status host_copy_in(struct backend_device *device, void *dst, const void *src, uint64_t bytes,
                                    struct epd_error *error)
{
    (void)device;
    return host_copy(NULL, dst, src, bytes, error);
}

/* Kernels fail only for want of scratch. */
static enum epd_status host_check(enum epd_status status, const char *kernel, struct epd_error *error)
{
    if (status)
        return error_set(error, status, "%s: no scratch memory", kernel);
    return EPD_OK;
}

static void host_exchange_sizes(const struct exchange_shape *shape, uint64_t row_bytes,
                                struct exchange_sizes *sizes)
{
    (void)shape, (void)row_bytes;
    *sizes = (struct exchange_sizes){0};
}

/* Every stage is done when its call returns: there is nothing to fuse. */
static uint32_t host_exchange_blocks(const struct exchange_shape *shape)
{
    (void)shape;
    return 0;
}

static enum epd_status host_exchange_abort(struct backend_queue *queue, void *const *workspaces,
                                           uint32_t n_ranks, struct epd_error *error)
{
    (void)queue, (void)workspaces, (void)n_ranks;
    return error_set(error, EPD_INTERNAL, "the host backend has no fused exchange");
}

static enum epd_status host_exchange_reset(struct backend_queue *queue, const struct exchange_shape *shape,
                                           uint64_t row_bytes, void *workspace, struct epd_error *error)
{
    (void)queue, (void)shape, (void)row_bytes, (void)workspace;
    return error_set(error, EPD_INTERNAL, "the host backend has no fused exchange");
}

static struct route_args route_of(const struct exchange_args *args, struct kernel_error *error)
{
    struct route_args route = {
        .shape = args->shape, .topk_idx = args->topk_idx, .routing = args->routing, .error = error};
    memcpy(route.counts, args->counts, sizeof route.counts);
    return route;
}

static enum epd_status host_push(struct host_scratch *scratch, const struct exchange_args *args)
{
    struct dispatch_args push = {.shape = args->shape,
                                 .routing = args->routing,
                                 .x = args->x,
                                 .topk_weights = args->topk_weights,
                                 .scaled = args->scaled};
    memcpy(push.recv_x, args->recv_x, sizeof push.recv_x);
    memcpy(push.recv_weights, args->recv_weights, sizeof push.recv_weights);
    memcpy(push.recv_source, args->recv_source, sizeof push.recv_source);
    return host_dispatch_push(&push, scratch);
}

/* Counts of all ranks, then each rank's layout and its rows: a sender computes where they go itself. */
static enum epd_status host_route_dispatch(struct host_scratch *scratch, uint32_t stage,
                                           const struct exchange_args *args)
{
    struct route_args route = route_of(args, stage == 0 ? args->route_error : args->layout_error);
    if (stage == 0)
        return host_route_count(&route, scratch);
    enum epd_status status = host_route_layout(&route, scratch);
    uint64_t n_local = args->shape.n_local_experts;
    if (args->splits_out)
        memcpy(args->splits_out, args->routing.m_splits, n_local * sizeof(int64_t));
    if (args->offsets_out)
        memcpy(args->offsets_out, args->routing.offsets, (n_local + 1) * sizeof(int64_t));
    return status ? status : host_push(scratch, args);
}

static enum epd_status host_combine_rows(struct host_scratch *scratch, const struct exchange_args *args)
{
    struct combine_args combine = {
        .shape = args->shape, .routing = args->routing, .topk_weights = args->topk_weights, .out = args->out};
    memcpy(combine.y, args->y, sizeof combine.y);
    return host_combine(&combine, scratch);
}

static enum epd_status host_gather(const struct exchange_args *args)
{
    struct gather_scalars_args gather = {
        .shape = args->shape, .routing = args->routing, .out = args->scalars};
    memcpy(gather.value, args->value, sizeof gather.value);
    return host_gather_scalars(&gather);
}

static enum epd_status host_dots(const struct exchange_args *args)
{
    struct weight_grad_args grad = {
        .shape = args->shape, .routing = args->routing, .dout = args->x, .out = args->scalars};
    memcpy(grad.y, args->y, sizeof grad.y);
    return host_weight_grad(&grad);
}

static enum epd_status host_queue_exchange(struct backend_queue *queue, enum exchange_op op, uint32_t stage,
                                           const struct exchange_args *args, struct epd_error *error)
{
    struct host_scratch *scratch = &queue->device->scratch;
    switch (op) {
    case EXCHANGE_ROUTE_DISPATCH:
        return host_check(host_route_dispatch(scratch, stage, args), "dispatch", error);
    case EXCHANGE_DISPATCH:
        return host_check(host_push(scratch, args), "dispatch", error);
    case EXCHANGE_COMBINE:
        return host_check(host_combine_rows(scratch, args), "combine", error);
    case EXCHANGE_GATHER_SCALARS:
        return host_check(host_gather(args), "gather_scalars", error);
    case EXCHANGE_WEIGHT_GRAD:
        return host_check(host_dots(args), "weight_grad", error);
    case EXCHANGE_OP_COUNT:
        break;
    }
    return error_set(error, EPD_INTERNAL, "exchange op %d is unknown", (int)op);
}

static enum epd_status host_queue_activation(struct backend_queue *queue, const struct activation_args *args,
                                             struct epd_error *error)
{
    (void)queue;
    return host_check(host_activation(args), "activation", error);
}

static enum epd_status host_queue_activation_bwd(struct backend_queue *queue,
                                                 const struct activation_bwd_args *args,
                                                 struct epd_error *error)
{
    (void)queue;
    return host_check(host_activation_bwd(args), "activation_bwd", error);
}

static enum epd_status host_queue_bias_grad(struct backend_queue *queue, const struct bias_grad_args *args,
                                            struct epd_error *error)
{
    (void)queue;
    return host_check(host_bias_grad(args), "bias_grad", error);
}

static enum epd_status host_gemm_create(struct backend_device *device, const struct gemm_problem *problem,
                                        struct backend_gemm **gemm, struct epd_error *error)
{
    (void)device;
    if (problem->activation || problem->row_weights)
        return error_set(error, EPD_UNSUPPORTED, "gemm: the host backend fuses nothing");
    struct backend_gemm *created = calloc(1, sizeof *created);
    if (!created)
        return error_set(error, EPD_NO_MEMORY, "gemm: %zu bytes", sizeof *created);
    created->shape = problem->shape;
    *gemm = created;
    return EPD_OK;
}

static enum epd_status host_gemm_launch(struct backend_queue *queue, struct backend_gemm *gemm,
                                        const struct gemm_launch *launch, struct epd_error *error)
{
    (void)gemm;
    return host_check(host_gemm(&launch->args, &queue->device->scratch), "gemm", error);
}

static void host_gemm_destroy(struct backend_gemm *gemm)
{
    free(gemm);
}

const struct backend backend_host = {
    .kind = EPD_BACKEND_HOST,
    .tensor_alignment = 1,
    .n_stages =
        {
            [EXCHANGE_ROUTE_DISPATCH] = 2,
            [EXCHANGE_DISPATCH] = 1,
            [EXCHANGE_COMBINE] = 1,
            [EXCHANGE_GATHER_SCALARS] = 1,
            [EXCHANGE_WEIGHT_GRAD] = 1,
        },
    .available = host_available,
    .n_devices = host_n_devices,
    .device_open = host_device_open,
    .device_close = host_device_close,
    .device_check = host_device_check,
    .device_idle = host_device_idle,
    .device_n_waiting = host_device_n_waiting,
    .device_give_back = host_device_give_back,
    .memory_alloc = host_memory_alloc,
    .memory_free = host_memory_free,
    .memory_import = host_memory_import,
    .memory_unimport = host_memory_unimport,
    .queue_create = host_queue_create,
    .queue_destroy = host_queue_destroy,
    .queue_mark = host_queue_mark,
    .queue_join = host_queue_join,
    .queue_ticket = host_queue_ticket,
    .queue_reached = host_queue_reached,
    .flag_open = host_flag_open,
    .flag_close = host_flag_close,
    .flag_ready = host_flag_ready,
    .flag_done = host_flag_done,
    .zero = host_zero,
    .copy = host_copy,
    .copy_in = host_copy_in,
    .copy_out = host_copy_out,
    .exchange_sizes = host_exchange_sizes,
    .exchange_blocks = host_exchange_blocks,
    .exchange_abort = host_exchange_abort,
    .exchange_reset = host_exchange_reset,
    .exchange = host_queue_exchange,
    .activation = host_queue_activation,
    .activation_bwd = host_queue_activation_bwd,
    .bias_grad = host_queue_bias_grad,
    .gemm_create = host_gemm_create,
    .gemm_launch = host_gemm_launch,
    .gemm_destroy = host_gemm_destroy,
};
