#include "tests/gpu/fabric/rail_node.h"

#include <cuda_runtime_api.h>
#include <dirent.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "ep/backend_cuda.h"
#include "ep/clock.h"
#include "ep/transport.h"

#define MS 1000000ull
/* A stream must be free so soon after an abort. */
#define FREE_MS 1000
/* A killed node must have been noticed. */
#define NOTICED_MS 5000
/* All that a rail has in streams must have left so soon after it was told to close. */
#define LEAVE_MS 5000
/* No call of a lane may take longer, whatever waits on the device. */
#define STALL_MS 100

static unsigned my_node;

static void fail(const char *format, ...) __attribute__((format(printf, 1, 2), noreturn));
static void fail(const char *format, ...)
{
    va_list args;
    va_start(args, format);
    (void)fprintf(stderr, "node %u: ", my_node);
    (void)vfprintf(stderr, format, args);
    (void)fprintf(stderr, "\n");
    va_end(args);
    _exit(1);
}

#define say(...)                                                                                             \
    do {                                                                                                     \
        (void)fprintf(stderr, "node %u: ", my_node);                                                         \
        (void)fprintf(stderr, __VA_ARGS__);                                                                  \
        (void)fprintf(stderr, "\n");                                                                         \
    } while (0)

#define want(condition, ...)                                                                                 \
    do {                                                                                                     \
        if (!(condition))                                                                                    \
            fail(__VA_ARGS__);                                                                               \
    } while (0)

static void cuda(cudaError_t result, const char *what)
{
    want(result == cudaSuccess, "%s: %s", what, cudaGetErrorString(result));
}

static void ok(enum epd_status status, const struct epd_error *error, const char *what)
{
    want(status == EPD_OK, "%s: %s", what, error->text);
}

static void sleep_ms(unsigned ms)
{
    const struct timespec time = {.tv_sec = ms / 1000, .tv_nsec = (long)(ms % 1000) * 1000000};
    (void)nanosleep(&time, NULL);
}

static double ms_since(uint64_t begun_ns)
{
    return (double)(clock_now_ns() - begun_ns) / 1e6;
}

/* ---- the rail ---- */

struct seat {
    const struct transport *transport;
    struct backend_device
        device; /* as far as rails need one: its account of streams, and that one connects */
    struct transport_rail *rail;
    struct transport_address addresses[2];
    cudaStream_t stream;
    int fd;
    unsigned n_threads; /* of the process, before the rail */
};

static unsigned n_threads(void)
{
    unsigned n = 0;
    DIR *tasks = opendir("/proc/self/task");
    for (struct dirent *task; tasks && (task = readdir(tasks));)
        n += task->d_name[0] != '.';
    (void)closedir(tasks);
    return n;
}

static void seat_close(struct seat *seat)
{
    uint64_t begun_ns = clock_now_ns();
    seat->transport->rail_close(seat->rail);
    const double closed_ms = ms_since(begun_ns);
    want(closed_ms < STALL_MS, "closing waits");
    begun_ns = clock_now_ns();
    while (!seat->transport->rail_closed(seat->rail) && ms_since(begun_ns) < LEAVE_MS)
        sleep_ms(1);
    const double left_ms = ms_since(begun_ns);
    want(left_ms < LEAVE_MS, "it has not left the streams after %.0f ms", left_ms);
    begun_ns = clock_now_ns();
    seat->transport->rails_end(&seat->rail, 1);
    const double ended_ms = ms_since(begun_ns);
    want(seat->device.n_library_streams == 0, "%u streams are not given back",
         seat->device.n_library_streams);
    want(cuda_queues_idle(&seat->device), "the device is not idle behind a rail that has gone");
    say("closed in %.1f ms, left streams in %.1f ms, ended in %.1f ms", closed_ms, left_ms, ended_ms);
    want(ended_ms < TRANSPORT_END_MS + STALL_MS, "the quiet moment would last %.0f ms", ended_ms);
}

static void meet(const struct seat *seat)
{
    char byte = 1;
    want(send(seat->fd, &byte, 1, 0) == 1 && recv(seat->fd, &byte, 1, 0) == 1, "the other node is gone");
}

static void seat_open(struct seat *seat, int device, int fd)
{
    const struct transport_options options = {.ways = "tcp", .devices = ""};
    struct epd_error error = {.status = EPD_OK};
    memset(seat, 0, sizeof *seat);
    seat->fd = fd;
    cuda(cudaSetDevice(device), "device");
    cuda(cudaStreamCreateWithFlags(&seat->stream, cudaStreamNonBlocking), "stream");
    seat->transport = transport_find(EPD_BACKEND_CUDA, &error);
    want(seat->transport != NULL, "%s", error.text);
    ok(seat->transport->load(&options, &error), &error, "load");
    const uint64_t begun_ns = clock_now_ns();
    ok(seat->transport->device_begin(&error), &error, "device");
    say("device begun in %.0f ms", ms_since(begun_ns));
    seat->n_threads = n_threads();
    ok(seat->transport->rail_open(&seat->device, my_node, &seat->rail, &seat->addresses[my_node], &error),
       &error, "open");
}

/* Returns the status; the text is in error. */
static enum epd_status seat_connect(struct seat *seat, unsigned limit_ms, struct epd_error *error)
{
    const uint64_t begun_ns = clock_now_ns();
    if (seat->transport->rail_connect(seat->rail, 2, my_node, seat->addresses, limit_ms * MS, error))
        return error->status;
    while (!seat->transport->rail_connected(seat->rail, error)) {
        want(!cuda_queues_idle(&seat->device), "the device is idle while a rail connects");
        sleep_ms(1);
    }
    want(error->status || cuda_queues_idle(&seat->device),
         "the device is not idle behind a rail that connected");
    say("connect: %s after %.0f ms", error->status ? error->text : "ok", ms_since(begun_ns));
    return error->status;
}

static void swap_addresses(struct seat *seat)
{
    const struct transport_address *mine = &seat->addresses[my_node];
    want(send(seat->fd, mine, sizeof *mine, 0) == (ssize_t)sizeof *mine, "address not sent");
    want(recv(seat->fd, &seat->addresses[1 - my_node], sizeof *mine, 0) == (ssize_t)sizeof *mine,
         "no address of the other node");
}

static void swap_on(const struct seat *seat, const void *from, size_t send_bytes, void *to,
                    size_t receive_bytes)
{
    struct epd_error error = {.status = EPD_OK};
    struct transport_move moves[2] = {0};
    moves[1 - my_node] = (struct transport_move){
        .send = from, .send_bytes = send_bytes, .receive = to, .receive_bytes = receive_bytes};
    ok(seat->transport->rail_swap_on(seat->rail, moves, 1, seat->stream, &error), &error, "swap");
}

static void expect_works(const struct seat *seat)
{
    struct epd_error error = {.status = EPD_OK};
    ok(seat->transport->rail_check(seat->rail, &error), &error, "check");
}

/* Waits for the stream; 0 if it is not free in time. */
static int is_free_within(cudaStream_t stream, unsigned ms)
{
    const uint64_t begun_ns = clock_now_ns();
    cudaError_t state;
    while ((state = cudaStreamQuery(stream)) == cudaErrorNotReady && ms_since(begun_ns) < ms)
        sleep_ms(1);
    want(state == cudaSuccess || state == cudaErrorNotReady, "stream: %s", cudaGetErrorString(state));
    return state == cudaSuccess;
}

/* ---- roles ---- */

#define MAX_BYTES (16u << 20)

static void fill(uint8_t *bytes, size_t n, unsigned node, unsigned round)
{
    uint32_t state = 2654435761u * (round * 2 + node + 1);
    for (size_t i = 0; i < n; i++) {
        state = state * 1664525u + 1013904223u;
        bytes[i] = (uint8_t)(state >> 24);
    }
}

static void role_swaps(struct seat *seat)
{
    static const size_t sizes[] = {64, 1, 4096, 0, 1000003, MAX_BYTES, 3, 65536};
    const unsigned n_sizes = sizeof sizes / sizeof sizes[0];
    uint8_t *host = malloc(MAX_BYTES), *wanted = malloc(MAX_BYTES), *out, *in;
    want(host && wanted, "no memory");
    cuda(cudaMalloc((void **)&out, MAX_BYTES), "memory");
    cuda(cudaMalloc((void **)&in, MAX_BYTES), "memory");
    for (unsigned round = 0; round < 100; round++) {
        const size_t sizes_of[2] = {sizes[round % n_sizes], sizes[(round / n_sizes) % n_sizes]};
        const size_t there = sizes_of[my_node], back = sizes_of[1 - my_node];
        fill(host, there, my_node, round);
        fill(wanted, back, 1 - my_node, round);
        cuda(cudaMemcpyAsync(out, host, there, cudaMemcpyHostToDevice, seat->stream), "copy");
        cuda(cudaMemsetAsync(in, 0xff, back, seat->stream), "clear");
        swap_on(seat, out, there, in, back);
        cuda(cudaMemcpyAsync(host, in, back, cudaMemcpyDeviceToHost, seat->stream), "copy");
        cuda(cudaStreamSynchronize(seat->stream), "stream");
        want(memcmp(host, wanted, back) == 0, "round %u: %zu bytes are not what was sent", round, back);
        expect_works(seat);
    }
    say("100 swaps are what was sent");
}

static void role_speed(struct seat *seat)
{
    static const size_t sizes[] = {256, 65536, 1u << 20, MAX_BYTES};
    char *out, *in;
    cudaEvent_t begin, end;
    cuda(cudaMalloc((void **)&out, MAX_BYTES), "memory");
    cuda(cudaMalloc((void **)&in, MAX_BYTES), "memory");
    cuda(cudaEventCreate(&begin), "event");
    cuda(cudaEventCreate(&end), "event");
    for (unsigned i = 0; i < sizeof sizes / sizeof sizes[0]; i++) {
        const unsigned n = sizes[i] > 65536 ? 20 : 200;
        float ms;
        for (unsigned round = 0; round < 5; round++)
            swap_on(seat, out, sizes[i], in, sizes[i]);
        cuda(cudaStreamSynchronize(seat->stream), "stream");
        cuda(cudaEventRecord(begin, seat->stream), "event");
        const uint64_t begun_ns = clock_now_ns();
        for (unsigned round = 0; round < n; round++)
            swap_on(seat, out, sizes[i], in, sizes[i]);
        const double host_us = ms_since(begun_ns) * 1e3 / n;
        cuda(cudaEventRecord(end, seat->stream), "event");
        cuda(cudaStreamSynchronize(seat->stream), "stream");
        cuda(cudaEventElapsedTime(&ms, begin, end), "event");
        say("speed bytes %zu host_us %.1f swap_us %.1f gb_per_s %.2f", sizes[i], host_us, ms * 1e3 / n,
            (double)sizes[i] * n / ms / 1e6);
    }
}

/* A stream that waits for a client, as a device has them at any time, until `word` is set: at the latest by a guard, so
 * that what it holds up goes on and tells. */
struct client {
    cudaStream_t stream;
    _Atomic uint32_t *word;
    pthread_t guard;
};

#define GUARD_MS 3000

static void *guard(void *arg)
{
    struct client *client = arg;
    for (unsigned i = 0; i < GUARD_MS && !atomic_load(client->word); i++)
        sleep_ms(1);
    if (!atomic_exchange(client->word, 1))
        say("the guard had to let the client through");
    return NULL;
}

static void wait_for_client(struct client *client)
{
    struct cuda_driver driver;
    struct epd_error error = {.status = EPD_OK};
    void *device_word;
    ok(cuda_driver_load(&driver, &error), &error, "driver");
    cuda(cudaStreamCreateWithFlags(&client->stream, cudaStreamNonBlocking), "stream");
    cuda(cudaHostAlloc((void **)&client->word, sizeof *client->word, cudaHostAllocMapped), "word");
    atomic_store(client->word, 0);
    cuda(cudaHostGetDevicePointer(&device_word, (void *)client->word, 0), "word");
    CUstreamBatchMemOpParams wait = {.waitValue = {.operation = CU_STREAM_MEM_OP_WAIT_VALUE_32,
                                                   .address = (CUdeviceptr)(uintptr_t)device_word,
                                                   .value = 1,
                                                   .flags = CU_STREAM_WAIT_VALUE_EQ}};
    ok(cuda_driver_check(&driver, driver.cuStreamBatchMemOp(client->stream, 1, &wait, 0), "wait", &error),
       &error, "wait");
    want(pthread_create(&client->guard, NULL, guard, client) == 0, "no thread");
}

static void let_through(struct client *client)
{
    atomic_store(client->word, 1);
    (void)pthread_join(client->guard, NULL);
    cuda(cudaStreamSynchronize(client->stream), "client");
}

/* What a lane does meanwhile: the longest of its calls, in ms. */
static double longest_call(cudaStream_t other, char *memory, unsigned ms)
{
    const uint64_t begun_ns = clock_now_ns();
    double longest = 0;
    while (ms_since(begun_ns) < ms) {
        const uint64_t call_ns = clock_now_ns();
        cuda(cudaMemsetAsync(memory, 0, 4096, other), "memset");
        cuda(cudaStreamSynchronize(other), "stream");
        const double took = ms_since(call_ns);
        longest = took > longest ? took : longest;
        sleep_ms(1);
    }
    return longest;
}

static void expect_no_stall(const char *when, cudaStream_t other, char *memory, unsigned ms)
{
    const double stalled = longest_call(other, memory, ms);
    say("longest call %s: %.1f ms", when, stalled);
    want(stalled < STALL_MS, "a call took %.0f ms", stalled);
}

static void role_abort(struct seat *seat)
{
    const struct epd_error why = {EPD_PEER_LOST, "node 1 does not come"};
    struct epd_error error = {.status = EPD_OK};
    struct client client;
    cudaStream_t other;
    char *memory;
    if (my_node == 1) { /* never swaps */
        meet(seat);
        seat->transport->rail_abort(seat->rail, &why);
        return;
    }
    cuda(cudaMalloc((void **)&memory, 2 * MAX_BYTES), "memory");
    cuda(cudaStreamCreateWithFlags(&other, cudaStreamNonBlocking), "stream");
    wait_for_client(&client);
    swap_on(seat, memory, MAX_BYTES, memory + MAX_BYTES, MAX_BYTES);
    want(!is_free_within(seat->stream, 300), "the swap ended alone");
    expect_works(seat);
    expect_no_stall("before", other, memory, 100);
    const uint64_t begun_ns = clock_now_ns();
    seat->transport->rail_abort(seat->rail, &why);
    say("abort returned after %.2f ms", ms_since(begun_ns));
    want(is_free_within(seat->stream, FREE_MS), "the stream still waits %d ms after the abort", FREE_MS);
    say("stream free after %.1f ms", ms_since(begun_ns));
    expect_no_stall("behind the abort", other, memory, 1500);
    const struct transport_move nothing[2] = {0};
    want(seat->transport->rail_swap_on(seat->rail, nothing, 1, seat->stream, &error) == EPD_PEER_LOST &&
             strcmp(error.text, why.text) == 0,
         "a later swap: %s", error.text);
    want(cudaStreamQuery(client.stream) == cudaErrorNotReady, "the client's stream did not wait");
    let_through(&client);
    meet(seat);
}

/* Other work while a rail connects and a client's stream waits. */
static void role_connect(struct seat *seat)
{
    struct epd_error error = {.status = EPD_OK};
    struct client client;
    cudaStream_t other;
    char *memory;
    double longest = 0;
    cuda(cudaMalloc((void **)&memory, 4096), "memory");
    cuda(cudaStreamCreateWithFlags(&other, cudaStreamNonBlocking), "stream");
    wait_for_client(&client);
    ok(seat->transport->rail_connect(seat->rail, 2, my_node, seat->addresses, 60000 * MS, &error), &error,
       "connect");
    while (!seat->transport->rail_connected(seat->rail, &error)) {
        const double took = longest_call(other, memory, 5);
        longest = took > longest ? took : longest;
    }
    say("longest call beside connecting: %.1f ms, %s", longest, error.status ? error.text : "connected");
    ok(error.status, &error, "connect");
    want(!atomic_load(client.word), "it connected when the client was through");
    want(longest < STALL_MS, "a call took %.0f ms", longest);
    meet(seat);
    let_through(&client);
    role_swaps(seat);
}

static void role_kill(struct seat *seat)
{
    struct epd_error error = {.status = EPD_OK};
    char *memory;
    cuda(cudaMalloc((void **)&memory, 2 * MAX_BYTES), "memory");
    meet(seat);
    if (my_node == 1)
        (void)raise(SIGKILL);
    swap_on(seat, memory, MAX_BYTES, memory + MAX_BYTES, MAX_BYTES);
    const uint64_t begun_ns = clock_now_ns();
    while (seat->transport->rail_check(seat->rail, &error) == EPD_OK && ms_since(begun_ns) < NOTICED_MS)
        sleep_ms(1);
    say("noticed after %.1f ms: %s", ms_since(begun_ns), error.text);
    want(error.status == EPD_PEER_LOST, "not noticed");
    want(is_free_within(seat->stream, FREE_MS), "the stream still waits");
    say("stream free after %.1f ms", ms_since(begun_ns));
}

/* The thread that listens for an id, and those of the communicator. */
static void expect_no_threads_left(const struct seat *seat)
{
    const uint64_t begun_ns = clock_now_ns();
    while (n_threads() > seat->n_threads && ms_since(begun_ns) < 3000)
        sleep_ms(5);
    say("%u threads after %.0f ms, %u before the rail", n_threads(), ms_since(begun_ns), seat->n_threads);
    want(n_threads() <= seat->n_threads, "threads are left");
}

static void role_alone(struct seat *seat)
{
    struct epd_error error = {.status = EPD_OK};
    seat->addresses[1] = (struct transport_address){.bytes = 1};
    want(seat_connect(seat, 1000, &error) == EPD_TIMEOUT, "connect alone: %s", error.text);
    seat_close(seat);
    expect_no_threads_left(seat);
}

/* Node 1 meets and swaps nothing: the first swap of node 0 is in its stream until it is told to leave. */
static void role_half(struct seat *seat)
{
    const struct epd_error why = {EPD_PEER_LOST, "enough"};
    struct epd_error error = {.status = EPD_OK};
    if (my_node == 1) {
        ok(seat->transport->rail_connect(seat->rail, 2, my_node, seat->addresses, 60000 * MS, &error), &error,
           "connect");
        meet(seat);
        seat->transport->rail_abort(seat->rail, &why);
        return;
    }
    want(seat_connect(seat, 5000, &error) == EPD_TIMEOUT, "connect: %s", error.text);
    const uint64_t begun_ns = clock_now_ns();
    while (!cuda_queues_idle(&seat->device) && ms_since(begun_ns) < LEAVE_MS)
        sleep_ms(1);
    say("first swap left after %.1f ms", ms_since(begun_ns));
    want(cuda_queues_idle(&seat->device), "the first swap has not left its stream");
    meet(seat);
}

static void role_unused(struct seat *seat)
{
    seat_close(seat);
    expect_no_threads_left(seat);
}

struct role {
    const char *name;
    void (*run)(struct seat *seat);
    enum { ALONE, ADDRESSED, CONNECTED } begins;
};

static const struct role roles[] = {
    {"swaps", role_swaps, CONNECTED}, {"speed", role_speed, CONNECTED},     {"abort", role_abort, CONNECTED},
    {"kill", role_kill, CONNECTED},   {"connect", role_connect, ADDRESSED}, {"alone", role_alone, ALONE},
    {"unused", role_unused, ALONE},   {"half", role_half, ADDRESSED},
};

static void take_role(const struct role *role, int device, int fd)
{
    struct epd_error error = {.status = EPD_OK};
    struct seat seat;
    if (role->begins == ALONE && my_node != 0)
        return;
    seat_open(&seat, device, fd);
    if (role->begins != ALONE)
        swap_addresses(&seat);
    if (role->begins == CONNECTED)
        ok(seat_connect(&seat, 60000, &error), &error, "connect");
    role->run(&seat);
    if (role->begins == ALONE)
        return;
    seat_close(&seat);
}

void rail_node_run(const char *role, unsigned node, int device, int fd)
{
    my_node = node;
    for (size_t i = 0; i < sizeof roles / sizeof *roles; i++)
        if (strcmp(role, roles[i].name) == 0) {
            take_role(&roles[i], device, fd);
            exit(0); /* with NCCL's threads, as a daemon ends */
        }
    fail("no role %s", role);
}
