/* Handles that are not what they say, and memory that is not there. */
#include <cuda.h>
#include <string.h>
#include <unistd.h>

#include "proto/words.h"
#include "tests/fault/wire.h"
#include "tests/gpu/fault/roles.h"

#define BLOCK_BYTES (4 << 20)
#define LARGE_BYTES (1ull << 30)

/* ---- raw handles ---- */

static void uuid_of(int device, uint8_t uuid[16])
{
    struct cudaDeviceProp properties;
    GPU_MUST(cudaGetDeviceProperties(&properties, device) == cudaSuccess);
    memcpy(uuid, properties.uuid.bytes, 16);
}

/* By the whole of its UUID. */
static int names_gpu(const char *text, int device)
{
    uint8_t uuid[16];
    char name[33];
    uuid_of(device, uuid);
    for (int i = 0; i < 16; i++)
        snprintf(name + 2 * i, 3, "%02x", uuid[i]);
    return strstr(text, name) != NULL;
}

static enum epd_status register_raw(struct wire *wire, uint64_t group_id, int device,
                                    const cudaIpcMemHandle_t *handle, uint64_t offset, uint64_t bytes)
{
    struct message request = {
        .kind = MESSAGE_BUFFER_REGISTER,
        .buffer_register = {
            .group_id = group_id, .kind = EPD_MEMORY_CUDA_IPC, .offset = offset, .bytes = bytes}};
    uuid_of(device, request.buffer_register.device_uuid);
    memcpy(request.buffer_register.ipc_handle, handle, sizeof *handle);
    return wire_call(wire, &request, -1);
}

static uint64_t join_raw(struct wire *wire)
{
    struct message join = wire_join_message("raw", 1, 0);
    join.group_join.config.dtype = EPD_BF16;
    GPU_MUST(wire_call(wire, &join, -1) == EPD_OK);
    return wire->reply.reply_group.group_id;
}

/* ---- memory of another GPU ---- */

enum { RAW_T = 8, RAW_H = 32, RAW_E = 4, RAW_K = 2, RAW_ROWS = RAW_T * RAW_K };

static uint64_t own_raw(struct wire *wire, uint64_t group_id, size_t bytes, void **data)
{
    cudaIpcMemHandle_t handle;
    GPU_MUST(cudaSetDevice(0) == cudaSuccess && cudaMalloc(data, bytes) == cudaSuccess);
    GPU_MUST(cudaIpcGetMemHandle(&handle, *data) == cudaSuccess);
    GPU_MUST(register_raw(wire, group_id, 0, &handle, 0, bytes) == EPD_OK);
    return wire->reply.reply_buffer.buffer_id;
}

/* Until the launch has ended: no stream waits for it here. */
static void run_raw(struct wire *wire, const struct message_reply_plan *plan)
{
    struct page_plan *words = &wire->page->plans[plan->flag_idx];
    struct message launch = {.kind = MESSAGE_LAUNCH,
                             .launch = {.plan_id = plan->plan_id,
                                        .seq = ++wire->last_seq,
                                        .shape_hash = plan->shape_hash,
                                        .n_tokens = RAW_T,
                                        .n_repeats = 1}};
    flag_set(&words->ready);
    GPU_MUST(wire_send(wire, &launch, -1) == 0);
    for (int waited = 0; !atomic_load(&words->completed); waited++) {
        GPU_MUST(waited < 10000);
        usleep(1000);
    }
    GPU_MUST(atomic_load(&words->failed) == 0);
}

/* Row r of what one rank receives with all experts: token t goes to experts t and t + 1, modulo RAW_E. */
static int token_of_row(int row)
{
    for (int expert = 0; expert < RAW_E; expert++)
        for (int token = 0; token < RAW_T; token++)
            if ((token % RAW_E == expert || (token + 1) % RAW_E == expert) && row-- == 0)
                return token;
    return -1;
}

/* Says where the first difference is, how many there are, and how the rows were counted. */
static void check_rows(const char *where, const unsigned short *rows, const unsigned short *x,
                       const long long *splits)
{
    int first = -1, n_wrong = 0;
    for (int i = 0; i < RAW_ROWS * RAW_H; i++) {
        if (rows[i] == x[token_of_row(i / RAW_H) * RAW_H + i % RAW_H])
            continue;
        first = first < 0 ? i : first;
        n_wrong++;
    }
    if (!n_wrong)
        return;
    fprintf(stderr,
            "tokens %s, dispatched on GPU 0: %d of %d elements are wrong; row %d element %d is %04x, want "
            "%04x; splits %lld %lld %lld %lld\n",
            where, n_wrong, RAW_ROWS * RAW_H, first / RAW_H, first % RAW_H, rows[first],
            x[token_of_row(first / RAW_H) * RAW_H + first % RAW_H], splits[0], splits[1], splits[2],
            splits[3]);
    exit(1);
}

/* A dispatch on GPU 0 of tokens that lie on the current GPU, in the buffer x_id: what arrives is right. */
static void step_on(struct wire *wire, uint64_t group_id, uint64_t x_id, void *tokens, const char *where)
{
    unsigned short x[RAW_T * RAW_H], rows[RAW_ROWS * RAW_H];
    int idx[RAW_T * RAW_K];
    long long splits_host[RAW_E];
    void *idx_data, *recv, *splits;
    for (int i = 0; i < RAW_T * RAW_H; i++)
        x[i] = gpu_bf16(1 + i % 199);
    for (int i = 0; i < RAW_T * RAW_K; i++)
        idx[i] = (i / RAW_K + i % RAW_K) % RAW_E;
    gpu_put(tokens, x, sizeof x);
    const uint64_t idx_id = own_raw(wire, group_id, sizeof idx, &idx_data),
                   recv_id = own_raw(wire, group_id, 64 * RAW_H * 2, &recv),
                   splits_id = own_raw(wire, group_id, RAW_E * 8, &splits);
    gpu_put(idx_data, idx, sizeof idx);
    struct message_binding bindings[] = {
        {.role = EPD_ROLE_X, .buffer_id = x_id, .dtype = EPD_BF16, .n_dims = 2, .shape = {RAW_T, RAW_H}},
        {.role = EPD_ROLE_TOPK_IDX,
         .buffer_id = idx_id,
         .dtype = EPD_I32,
         .n_dims = 2,
         .shape = {RAW_T, RAW_K}},
        {.role = EPD_ROLE_RECV_X, .buffer_id = recv_id, .dtype = EPD_BF16, .n_dims = 2, .shape = {64, RAW_H}},
        {.role = EPD_ROLE_M_SPLITS, .buffer_id = splits_id, .dtype = EPD_I64, .n_dims = 1, .shape = {RAW_E}}};
    struct message plan = {
        .kind = MESSAGE_PLAN_CREATE,
        .plan_create = {.group_id = group_id, .op = EPD_OP_DISPATCH, .n_bindings = 4, .bindings = bindings}};
    GPU_MUST(wire_call(wire, &plan, -1) == EPD_OK);
    const struct message_reply_plan reply = wire->reply.reply_plan;
    run_raw(wire, &reply);
    GPU_MUST(cudaMemcpy(rows, recv, sizeof rows, cudaMemcpyDeviceToHost) == cudaSuccess);
    GPU_MUST(cudaMemcpy(splits_host, splits, sizeof splits_host, cudaMemcpyDeviceToHost) == cudaSuccess);
    check_rows(where, rows, x, splits_host);
}

static void *driver_function(const char *name)
{
    enum cudaDriverEntryPointQueryResult found;
    void *function = NULL;
    GPU_MUST(cudaGetDriverEntryPointByVersion(name, &function, 12000, cudaEnableDefault, &found) ==
                 cudaSuccess &&
             function);
    return function;
}

/* A VMM allocation of that GPU, said to be of GPU 0. */
static enum epd_status register_vmm_of(struct wire *wire, uint64_t group_id, int device)
{
    __typeof__(cuMemCreate) *create = driver_function("cuMemCreate");
    __typeof__(cuMemExportToShareableHandle) *export = driver_function("cuMemExportToShareableHandle");
    const CUmemAllocationProp prop = {.type = CU_MEM_ALLOCATION_TYPE_PINNED,
                                      .requestedHandleTypes = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR,
                                      .location = {.type = CU_MEM_LOCATION_TYPE_DEVICE, .id = device}};
    CUmemGenericAllocationHandle handle;
    int fd = -1;
    GPU_MUST(create(&handle, BLOCK_BYTES, &prop, 0) == CUDA_SUCCESS);
    GPU_MUST(export(&fd, handle, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0) == CUDA_SUCCESS);
    struct message request = {.kind = MESSAGE_BUFFER_REGISTER,
                              .buffer_register = {.group_id = group_id,
                                                  .kind = EPD_MEMORY_CUDA_VMM,
                                                  .bytes = 4096,
                                                  .allocation_bytes = BLOCK_BYTES}};
    uuid_of(0, request.buffer_register.device_uuid);
    const enum epd_status status = wire_call(wire, &request, fd);
    close(fd);
    return status;
}

/* Sent without the library, which would refuse most of it: stale, garbage, past the end, of another GPU. */
static void run_handles(struct gpu_rank *rank)
{
    static struct wire wire;
    cudaIpcMemHandle_t handle, garbage, foreign;
    int n_gpus = 0;
    void *block, *other;
    gpu_rank_select(rank);
    GPU_MUST(cudaGetDeviceCount(&n_gpus) == cudaSuccess);
    wire_open(&wire, rank->socket_path);
    const uint64_t group_id = join_raw(&wire);
    GPU_MUST(cudaMalloc(&block, BLOCK_BYTES) == cudaSuccess);
    GPU_MUST(cudaIpcGetMemHandle(&handle, block) == cudaSuccess);
    GPU_MUST(register_raw(&wire, group_id, 0, &handle, 0, BLOCK_BYTES) == EPD_OK);
    struct message release = wire_id_message(MESSAGE_BUFFER_RELEASE, wire.reply.reply_buffer.buffer_id);
    GPU_MUST(register_raw(&wire, group_id, 0, &handle, 4096, BLOCK_BYTES) == EPD_OUT_OF_RANGE);
    GPU_MUST(register_raw(&wire, group_id, 0, &handle, 1ull << 62, 4096) == EPD_OUT_OF_RANGE);
    GPU_MUST(wire_call(&wire, &release, -1) == EPD_OK);
    for (size_t byte = 0; byte < sizeof garbage; byte += 3) {
        garbage = handle;
        ((unsigned char *)&garbage)[byte] ^= 0x5a;
        const enum epd_status status = register_raw(&wire, group_id, 0, &garbage, 0, 4096);
        GPU_MUST(status == EPD_INVALID_ARGUMENT || status == EPD_OUT_OF_RANGE ||
                 status == EPD_INVALID_DEVICE || status == EPD_OK /* a byte that means nothing */);
        release = wire_id_message(MESSAGE_BUFFER_RELEASE, wire.reply.reply_buffer.buffer_id);
        GPU_MUST(status != EPD_OK || wire_call(&wire, &release, -1) == EPD_OK);
    }
    GPU_MUST(cudaFree(block) == cudaSuccess);
    GPU_MUST(register_raw(&wire, group_id, 0, &handle, 0, 4096) == EPD_INVALID_ARGUMENT); /* stale */
    const uint64_t own_id = own_raw(&wire, group_id, BLOCK_BYTES, &block);
    step_on(&wire, group_id, own_id, block, "on GPU 0");
    if (n_gpus > 1) {
        GPU_MUST(cudaSetDevice(1) == cudaSuccess && cudaMalloc(&other, BLOCK_BYTES) == cudaSuccess);
        GPU_MUST(cudaIpcGetMemHandle(&foreign, other) == cudaSuccess);
        GPU_MUST(register_raw(&wire, group_id, 1, &foreign, 0, 4096) == EPD_INVALID_DEVICE);
        /* A lie. CUDA opens it, maps it for the group's GPU, and says nothing of the mapping that tells it from the GPU's own:
         * it must do no harm. */
        GPU_MUST(register_raw(&wire, group_id, 0, &foreign, 0, 4096) == EPD_OK);
        step_on(&wire, group_id, wire.reply.reply_buffer.buffer_id, other, "on GPU 1");
        GPU_MUST(register_vmm_of(&wire, group_id, 1) == EPD_INVALID_DEVICE); /* this one says where it lies */
        GPU_MUST(names_gpu(wire.reply.reply_error.text, 0) && names_gpu(wire.reply.reply_error.text, 1));
    }
    wire_close(&wire);
    gpu_rank_open(rank); /* nothing of it has harmed the worker */
    GPU_MUST(gpu_rank_step(rank) == EPD_OK);
    gpu_rank_close(rank);
}

/* Memory of a GPU that the group does not lie on: both are named. The daemon may not even see that GPU. */
static void run_invisible(struct gpu_rank *rank)
{
    struct epd_buffer *buffer;
    int n_gpus = 0;
    void *block;
    GPU_MUST(cudaGetDeviceCount(&n_gpus) == cudaSuccess);
    gpu_rank_open(rank);
    GPU_MUST(n_gpus > 1);
    GPU_MUST(cudaSetDevice(n_gpus - 1) == cudaSuccess && cudaMalloc(&block, BLOCK_BYTES) == cudaSuccess);
    GPU_MUST(epd_buffer_register_cuda(rank->group, block, BLOCK_BYTES, &buffer) == EPD_INVALID_DEVICE);
    GPU_MUST(names_gpu(epd_error_text(), n_gpus - 1) && names_gpu(epd_error_text(), 0));
    GPU_MUST(cudaSetDevice(0) == cudaSuccess);
    GPU_MUST(gpu_rank_step(rank) == EPD_OK);
    gpu_rank_close(rank);
}

/* ---- an address that is used again ---- */

/* Frees the memory of x under its registration and gets the same address again: the new registration is refused, or it is of
 * the new memory. Never does a step read what lay there before. */
static void run_reuse(struct gpu_rank *rank)
{
    const size_t bytes = GPU_T * GPU_H * sizeof(unsigned short);
    void *block = NULL, *again = NULL;
    struct epd_buffer *first, *second;
    gpu_rank_open(rank);
    GPU_MUST(cudaMalloc(&block, BLOCK_BYTES) == cudaSuccess &&
             cudaMemset(block, 0x11, BLOCK_BYTES) == cudaSuccess);
    GPU_MUST(epd_buffer_register_cuda(rank->group, block, bytes, &first) == EPD_OK);
    GPU_MUST(cudaFree(block) == cudaSuccess && cudaMalloc(&again, BLOCK_BYTES) == cudaSuccess);
    GPU_MUST(cudaMemset(again, 0, BLOCK_BYTES) == cudaSuccess && cudaDeviceSynchronize() == cudaSuccess);
    printf(again == block
               ? "an address used again: the same\n"
               : "SKIP: an address used again: the driver gave another one, nothing is checked of it\n");
    const enum epd_status status = epd_buffer_register_cuda(rank->group, again, bytes, &second);
    printf("its registration: %s %s\n", epd_status_name(status), epd_error_text());
    if (status == EPD_OK) {
        /* the plans' x from here on */
        GPU_MUST(cudaFree(rank->x) == cudaSuccess);
        rank->x = again;
        rank->buffers[0] = second;
        epd_plan_destroy(rank->combine);
        epd_plan_destroy(rank->dispatch);
        GPU_MUST(gpu_rank_plan(rank) == EPD_OK);
        GPU_MUST(gpu_rank_step(rank) == EPD_OK);
    } else {
        GPU_MUST(status == EPD_IN_USE || status == EPD_INVALID_ARGUMENT);
        GPU_MUST(epd_buffer_release(first) == EPD_OK);
        GPU_MUST(epd_buffer_register_cuda(rank->group, again, bytes, &second) == EPD_OK);
        GPU_MUST(gpu_rank_step(rank) == EPD_OK);
    }
    gpu_rank_close(rank);
}

/* ---- no memory ---- */

/* Takes the GPU's memory until less than LARGE_BYTES are left. */
static void run_hog(struct gpu_rank *rank)
{
    size_t n_free, total, take = (size_t)8 << 30;
    void *block;
    gpu_rank_select(rank);
    while (cudaMemGetInfo(&n_free, &total) == cudaSuccess && n_free > LARGE_BYTES / 2 && take > BLOCK_BYTES)
        if (take > n_free || cudaMalloc(&block, take) != cudaSuccess) {
            (void)cudaGetLastError();
            take /= 2;
        }
    atomic_store(&rank->own->ready, 1);
    for (;;)
        pause();
}

/* While the hog has the memory a large buffer is refused and nothing else happens; afterwards there is room. */
static void run_large(struct gpu_rank *rank)
{
    struct epd_buffer *buffer;
    enum epd_status status;
    gpu_rank_open(rank);
    atomic_store(&rank->own->ready, 1);
    while (!atomic_load(&rank->board->release)) /* the hog is about to come */
        usleep(1000);
    for (int i = 0; i < 20; i++) {
        status = epd_buffer_alloc(rank->group, LARGE_BYTES, &buffer);
        GPU_MUST(status == EPD_NO_MEMORY);
        GPU_MUST(gpu_rank_step(rank) == EPD_OK);
    }
    atomic_store(&rank->own->ready, 2);
    for (int i = 0; i < 2000 && epd_buffer_alloc(rank->group, LARGE_BYTES, &buffer) != EPD_OK; i++)
        usleep(5000);
    GPU_MUST(epd_buffer_data(buffer) != NULL);
    GPU_MUST(cudaMemset(epd_buffer_data(buffer), 1, LARGE_BYTES) == cudaSuccess);
    GPU_MUST(gpu_rank_step(rank) == EPD_OK);
    gpu_rank_close(rank);
}

/* The GPU's free memory in MiB, for the test to compare. */
static void run_free(struct gpu_rank *rank)
{
    size_t n_free, total;
    gpu_rank_select(rank);
    GPU_MUST(cudaMemGetInfo(&n_free, &total) == cudaSuccess);
    atomic_store(&rank->own->n_good, n_free >> 20);
}

const struct role roles_of_memory[] = {
    {"handles", run_handles}, {"invisible", run_invisible}, {"reuse", run_reuse}, {"hog", run_hog},
    {"large", run_large},     {"free", run_free},           {NULL, NULL},
};
