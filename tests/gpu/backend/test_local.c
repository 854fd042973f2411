/* Local ops by clients in processes of their own, several on one GPU and on different GPUs at the same time, with memory of
 * every kind: cudaMalloc by IPC handle, a VMM allocation by fd of which every tensor is a range (as PyTorch's expandable
 * segments are), the daemon's heap. All inputs are small whole numbers, so that every GEMM is exact. */
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <math.h>
#include <string.h>

#include "client/public.h"
#include "tests/gpu/backend/process.h"

enum { L = 4, N = 64, K = 72, M = 168, MAX_M = 176, F = N / 2, N_REPEATS = 20 };
static const int64_t m_splits[L] = {33, 0, 128, 7};

#define VMM_BYTES (8u << 20)

struct client {
    struct epd_group *group;
    cudaStream_t stream;
    const char *kind; /* of memory */
    char *vmm;        /* [VMM_BYTES] */
    size_t vmm_used;
};

/* ---- memory ---- */

static void *driver_function(const char *name)
{
    void *function = NULL;
    enum cudaDriverEntryPointQueryResult found;
    MUST(cudaGetDriverEntryPointByVersion(name, &function, 12000, cudaEnableDefault, &found) == cudaSuccess &&
         function);
    return function;
}

/* One physical allocation that can go by fd, mapped in the middle of a larger range of addresses. */
static char *vmm_create(int ordinal)
{
    __typeof__(cuMemCreate) *create = driver_function("cuMemCreate");
    __typeof__(cuMemAddressReserve) *reserve = driver_function("cuMemAddressReserve");
    __typeof__(cuMemMap) *map = driver_function("cuMemMap");
    __typeof__(cuMemSetAccess) *set_access = driver_function("cuMemSetAccess");
    const CUmemLocation location = {.type = CU_MEM_LOCATION_TYPE_DEVICE, .id = ordinal};
    const CUmemAllocationProp properties = {.type = CU_MEM_ALLOCATION_TYPE_PINNED,
                                            .requestedHandleTypes = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR,
                                            .location = location};
    const CUmemAccessDesc access = {.location = location, .flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE};
    CUmemGenericAllocationHandle handle;
    CUdeviceptr range;
    MUST(reserve(&range, 4 * VMM_BYTES, 0, 0, 0) == CUDA_SUCCESS);
    MUST(create(&handle, VMM_BYTES, &properties, 0) == CUDA_SUCCESS);
    MUST(map(range + VMM_BYTES, VMM_BYTES, 0, handle, 0) == CUDA_SUCCESS);
    MUST(set_access(range + VMM_BYTES, VMM_BYTES, &access, 1) == CUDA_SUCCESS);
    return (char *)(uintptr_t)(range + VMM_BYTES);
}

static struct epd_buffer *buffer(struct client *c, size_t bytes)
{
    struct epd_buffer *made;
    void *data;
    if (strcmp(c->kind, "heap") == 0) {
        MUST(epd_buffer_alloc(c->group, bytes, &made) == EPD_OK);
        return made;
    }
    if (strcmp(c->kind, "vmm") == 0) {
        data = c->vmm + c->vmm_used;
        c->vmm_used += (bytes + 255) / 256 * 256;
        MUST(c->vmm_used <= VMM_BYTES);
    } else {
        MUST(cudaMalloc(&data, bytes) == cudaSuccess);
    }
    MUST(epd_buffer_register_cuda(c->group, data, bytes, &made) == EPD_OK);
    return made;
}

/* ---- numbers ---- */

static unsigned short to_bf16(float value)
{
    unsigned bits;
    memcpy(&bits, &value, sizeof bits);
    return (unsigned short)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static float from_bf16(unsigned short half)
{
    const unsigned bits = (unsigned)half << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* -1, 0 or 1 by position. */
static float whole(size_t i, unsigned salt)
{
    const uint32_t mixed = (uint32_t)i * 2654435761u + salt * 40503u;
    return (float)((mixed >> 13) % 3) - 1.0f;
}

struct tensor {
    struct epd_tensor epd;
    float *host; /* what it holds, as fp32 */
    size_t n;
};

static size_t element_bytes(enum epd_dtype dtype)
{
    return dtype == EPD_F32 ? 4 : 2;
}

static void push(const struct tensor *t)
{
    unsigned short *halves = malloc(t->n * 2);
    const void *data = t->host;
    for (size_t i = 0; i < t->n; i++)
        halves[i] = to_bf16(t->host[i]);
    if (t->epd.dtype == EPD_BF16)
        data = halves;
    process_upload(epd_buffer_data(t->epd.buffer), data, t->n * element_bytes(t->epd.dtype));
    free(halves);
}

static void pull(const struct tensor *t, float *values)
{
    unsigned short *halves = malloc(t->n * 2);
    void *data = t->epd.dtype == EPD_BF16 ? (void *)halves : (void *)values;
    MUST(cudaMemcpy(data, epd_buffer_data(t->epd.buffer), t->n * element_bytes(t->epd.dtype),
                    cudaMemcpyDeviceToHost) == cudaSuccess);
    for (size_t i = 0; t->epd.dtype == EPD_BF16 && i < t->n; i++)
        values[i] = from_bf16(halves[i]);
    free(halves);
}

/* d1, d2 0: not there. Filled by salt; salt 0: with 7, which no op here writes. */
static struct tensor tensor(struct client *c, enum epd_role role, enum epd_dtype dtype, int64_t d0,
                            int64_t d1, int64_t d2, unsigned salt)
{
    struct tensor t = {.n = (size_t)(d0 * (d1 ? d1 : 1) * (d2 ? d2 : 1))};
    t.host = malloc(t.n * sizeof(float));
    for (size_t i = 0; i < t.n; i++)
        t.host[i] = salt ? whole(i, salt) : 7.0f;
    t.epd = (struct epd_tensor){.role = role,
                                .buffer = buffer(c, t.n * element_bytes(dtype)),
                                .dtype = dtype,
                                .n_dims = d2   ? 3
                                          : d1 ? 2
                                               : 1,
                                .shape = {d0, d1, d2}};
    push(&t);
    return t;
}

static struct epd_tensor splits(struct client *c)
{
    struct epd_buffer *made = buffer(c, sizeof m_splits);
    process_upload(epd_buffer_data(made), m_splits, sizeof m_splits);
    return (struct epd_tensor){
        .role = EPD_ROLE_M_SPLITS, .buffer = made, .dtype = EPD_I64, .n_dims = 1, .shape = {L}};
}

/* ---- ops ---- */

static void run(struct client *c, struct epd_plan_options options, const struct epd_tensor *tensors,
                uint32_t n, int n_repeats)
{
    struct epd_plan *plan;
    options.size = sizeof options;
    options.tensors = tensors;
    options.n_tensors = n;
    MUST(epd_plan_create(c->group, &options, &plan) == EPD_OK);
    for (int i = 0; i < n_repeats; i++)
        MUST(epd_plan_launch(plan, c->stream) == EPD_OK);
    MUST(cudaStreamSynchronize(c->stream) == cudaSuccess);
    MUST(epd_plan_wait(plan, 20000) == EPD_OK);
    epd_plan_destroy(plan);
}

static void expect(const char *what, const struct tensor *t, const float *want, float tolerance)
{
    float *got = malloc(t->n * sizeof(float));
    pull(t, got);
    for (size_t i = 0; i < t->n; i++) {
        if (fabsf(got[i] - want[i]) <= tolerance * (1 + fabsf(want[i])))
            continue;
        fprintf(stderr, "%s element %zu: %g, want %g\n", what, i, (double)got[i], (double)want[i]);
        exit(1);
    }
    free(got);
}

/* Y = X Wt + bias. */
static void run_fprop(struct client *c)
{
    struct tensor x = tensor(c, EPD_ROLE_A, EPD_BF16, MAX_M, K, 0, 1),
                  w = tensor(c, EPD_ROLE_B, EPD_BF16, L, N, K, 2);
    struct tensor bias = tensor(c, EPD_ROLE_BIAS, EPD_BF16, L, N, 0, 3),
                  y = tensor(c, EPD_ROLE_C, EPD_BF16, MAX_M, N, 0, 0);
    const struct epd_tensor tensors[] = {x.epd, w.epd, bias.epd, y.epd, splits(c)};
    run(c, (struct epd_plan_options){.op = EPD_OP_GROUPED_GEMM, .layout = EPD_GEMM_TN}, tensors, 5,
        N_REPEATS);
    for (size_t l = 0, row = 0; l < L; l++)
        for (int64_t m = 0; m < m_splits[l]; m++, row++)
            for (size_t n = 0; n < N; n++) {
                y.host[row * N + n] = bias.host[l * N + n];
                for (size_t k = 0; k < K; k++)
                    y.host[row * N + n] += x.host[row * K + k] * w.host[(l * N + n) * K + k];
            }
    expect("fprop", &y, y.host, 0);
}

/* dX = dY W. */
static void run_dgrad(struct client *c)
{
    struct tensor dy = tensor(c, EPD_ROLE_A, EPD_BF16, MAX_M, N, 0, 4),
                  w = tensor(c, EPD_ROLE_B, EPD_BF16, L, N, K, 5);
    struct tensor dx = tensor(c, EPD_ROLE_C, EPD_BF16, MAX_M, K, 0, 0);
    const struct epd_tensor tensors[] = {dy.epd, w.epd, dx.epd, splits(c)};
    run(c, (struct epd_plan_options){.op = EPD_OP_GROUPED_GEMM, .layout = EPD_GEMM_NN}, tensors, 4,
        N_REPEATS);
    for (size_t l = 0, row = 0; l < L; l++)
        for (int64_t m = 0; m < m_splits[l]; m++, row++)
            for (size_t k = 0; k < K; k++) {
                dx.host[row * K + k] = 0;
                for (size_t n = 0; n < N; n++)
                    dx.host[row * K + k] += dy.host[row * N + n] * w.host[(l * N + n) * K + k];
            }
    expect("dgrad", &dx, dx.host, 0);
}

/* dW += dYt X in fp32, N_REPEATS times; dbias. */
static void run_wgrad(struct client *c)
{
    struct tensor dy = tensor(c, EPD_ROLE_A, EPD_BF16, MAX_M, N, 0, 6),
                  x = tensor(c, EPD_ROLE_B, EPD_BF16, MAX_M, K, 0, 7);
    struct tensor dw = tensor(c, EPD_ROLE_C, EPD_F32, L, N, K, 8),
                  dbias = tensor(c, EPD_ROLE_DBIAS, EPD_F32, L, N, 0, 9);
    const struct epd_tensor tensors[] = {dy.epd, x.epd, dw.epd, dbias.epd, splits(c)};
    run(c, (struct epd_plan_options){.op = EPD_OP_GROUPED_GEMM, .layout = EPD_GEMM_NT, .accumulate = 1},
        tensors, 5, N_REPEATS);
    for (size_t l = 0, row = 0; l < L; l++)
        for (int64_t m = 0; m < m_splits[l]; m++, row++)
            for (size_t n = 0; n < N; n++) {
                dbias.host[l * N + n] += N_REPEATS * dy.host[row * N + n];
                for (size_t k = 0; k < K; k++)
                    dw.host[(l * N + n) * K + k] += N_REPEATS * dy.host[row * N + n] * x.host[row * K + k];
            }
    expect("wgrad", &dw, dw.host, 0);
    expect("dbias", &dbias, dbias.host, 0);
}

/* SwiGLU and its backward. */
static void run_activation(struct client *c)
{
    struct tensor preact = tensor(c, EPD_ROLE_PREACT, EPD_BF16, MAX_M, 2 * F, 0, 10);
    struct tensor act = tensor(c, EPD_ROLE_ACT, EPD_BF16, MAX_M, F, 0, 0),
                  d_act = tensor(c, EPD_ROLE_D_ACT, EPD_BF16, MAX_M, F, 0, 11);
    struct tensor d_preact = tensor(c, EPD_ROLE_D_PREACT, EPD_BF16, MAX_M, 2 * F, 0, 0);
    const struct epd_tensor forward[] = {preact.epd, act.epd, splits(c)};
    const struct epd_tensor backward[] = {preact.epd, d_act.epd, d_preact.epd, splits(c)};
    run(c, (struct epd_plan_options){.op = EPD_OP_ACTIVATION, .activation = EPD_SWIGLU}, forward, 3,
        N_REPEATS);
    run(c, (struct epd_plan_options){.op = EPD_OP_ACTIVATION_BWD, .activation = EPD_SWIGLU}, backward, 4,
        N_REPEATS);
    for (size_t row = 0; row < M; row++)
        for (size_t f = 0; f < F; f++) {
            const float g = preact.host[row * 2 * F + f], u = preact.host[row * 2 * F + F + f];
            const float s = 1 / (1 + expf(-g)), d = d_act.host[row * F + f];
            act.host[row * F + f] = g * s * u;
            d_preact.host[row * 2 * F + f] = d * u * (s + g * s * (1 - s));
            d_preact.host[row * 2 * F + F + f] = d * g * s;
        }
    expect("activation", &act, act.host, 0.005f);
    expect("activation_bwd", &d_preact, d_preact.host, 0.005f);
}

/* A range that goes past its allocation is refused, whatever its kind. */
static void run_out_of_range(struct client *c)
{
    struct epd_buffer *made;
    char *data;
    if (strcmp(c->kind, "heap") == 0)
        return;
    MUST(cudaMalloc((void **)&data, 4096) == cudaSuccess);
    if (strcmp(c->kind, "vmm") == 0)
        MUST(epd_buffer_register_cuda(c->group, c->vmm + VMM_BYTES - 256, 512, &made) == EPD_OUT_OF_RANGE);
    else
        MUST(epd_buffer_register_cuda(c->group, data, 1u << 30, &made) == EPD_OUT_OF_RANGE);
}

static int client_main(const char *socket_path, int ordinal, const char *kind)
{
    struct epd_open_options open = {.size = sizeof open, .socket_path = socket_path, .timeout_ms = 60000};
    struct epd_group_options join = {.size = sizeof join,
                                     .world_size = 1,
                                     .n_experts = L,
                                     .top_k = 1,
                                     .hidden = K,
                                     .max_tokens = 1,
                                     .dtype = EPD_BF16};
    struct epd_client *client;
    struct client c = {.kind = kind};
    struct cudaDeviceProp properties;
    char name[32];
    MUST(cudaSetDevice(ordinal) == cudaSuccess &&
         cudaGetDeviceProperties(&properties, ordinal) == cudaSuccess);
    MUST(cudaStreamCreateWithFlags(&c.stream, cudaStreamNonBlocking) == cudaSuccess);
    if (strcmp(kind, "vmm") == 0)
        c.vmm = vmm_create(ordinal);
    snprintf(name, sizeof name, "local-%d-%s", ordinal, kind);
    join.name = name;
    join.device_uuid = (const uint8_t *)properties.uuid.bytes;
    MUST(epd_open(&open, &client) == EPD_OK);
    MUST(epd_group_join(client, &join, &c.group) == EPD_OK);
    run_fprop(&c);
    run_dgrad(&c);
    run_wgrad(&c);
    run_activation(&c);
    run_out_of_range(&c);
    epd_close(client);
    printf("client on GPU %d with %s memory ok\n", ordinal, kind);
    return 0;
}

/* All at once. */
static int run_clients(const char *socket_path, int n_gpus)
{
    static const char *const kinds[] = {"ipc", "vmm", "heap"};
    pid_t pids[6];
    int failed = 0;
    char ordinals[2][16];
    snprintf(ordinals[0], sizeof ordinals[0], "0");
    snprintf(ordinals[1], sizeof ordinals[1], "%d", n_gpus - 1);
    for (int i = 0; i < 6; i++) {
        const char *argv[] = {"/proc/self/exe", "client", socket_path, ordinals[i / 3], kinds[i % 3], NULL};
        pids[i] = i < 3 || n_gpus > 1 ? process_start(argv) : 0;
    }
    for (int i = 0; i < 6; i++)
        failed |= pids[i] > 0 && process_wait(pids[i]) != 0;
    return failed;
}

int main(int argc, char **argv)
{
    struct process_daemon daemon;
    if (argc == 2 && strcmp(argv[1], "count") == 0)
        return process_count_main();
    if (argc == 5 && strcmp(argv[1], "client") == 0)
        return client_main(argv[2], atoi(argv[3]), argv[4]);
    if (argc != 2) {
        fprintf(stderr, "usage: %s EPD\n", argv[0]);
        return 2;
    }
    const int n_gpus = process_count_gpus();
    if (n_gpus == 0) {
        printf("SKIP: no GPU\n");
        return PROCESS_SKIPPED;
    }
    process_daemon_start(&daemon, argv[1], NULL);
    int failed = run_clients(daemon.socket_path, n_gpus);
    failed |= process_daemon_stop(&daemon);
    printf("%s\n", failed ? "FAILED" : "PASSED");
    return failed;
}
