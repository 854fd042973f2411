/* What a launch costs on the way: encode, decode, a datagram between two processes, a flag hand-off between
 * two processes. Prints one JSON line per case; times are of one operation (codec: mean of a batch) in
 * nanoseconds. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "proto/packet.h"
#include "proto/page.h"
#include "tests/golden/samples.h"

#define N_SAMPLES   20000
#define CODEC_BATCH 100
#define SECOND_NS   1000000000ull

static uint64_t now_ns(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * SECOND_NS + (uint64_t)now.tv_nsec;
}

static void must(int holds, const char *what)
{
    if (holds)
        return;
    fprintf(stderr, "bench_wire: %s failed\n", what);
    exit(1);
}

static int compare_times(const void *a, const void *b)
{
    uint64_t left = *(const uint64_t *)a, right = *(const uint64_t *)b;

    return (left > right) - (left < right);
}

static void print_case(const char *name, uint64_t *times, size_t n, unsigned batch)
{
    qsort(times, n, sizeof times[0], compare_times);
    printf("{\"case\":\"%s\",\"median_ns\":%.1f,\"p99_ns\":%.1f,\"samples\":%zu}\n", name,
           (double)times[n / 2] / batch, (double)times[n * 99 / 100] / batch, n);
}

static void bench_codec(enum message_kind kind, uint64_t *times)
{
    static struct sample sample;
    static unsigned char datagram[EPD_MAX_DATAGRAM_BYTES];
    struct arena arena;
    struct message message;
    struct epd_error error;
    size_t bytes = 0;
    char name[64];
    int ok = 1;

    must(arena_init(&arena, EPD_MAX_ARENA_BYTES) == EPD_OK, "arena_init");
    sample_typical(kind, &sample);
    for (size_t i = 0; i < N_SAMPLES / 10; i++) {
        uint64_t start = now_ns();
        for (int n = 0; n < CODEC_BATCH; n++)
            ok &= codec_encode(&sample.message, datagram, &bytes, &error) == EPD_OK;
        times[i] = now_ns() - start;
    }
    snprintf(name, sizeof name, "encode_%s", message_kind_name(kind));
    print_case(name, times, N_SAMPLES / 10, CODEC_BATCH);
    for (size_t i = 0; i < N_SAMPLES / 10; i++) {
        uint64_t start = now_ns();
        for (int n = 0; n < CODEC_BATCH; n++)
            ok &= codec_decode(sample_side(kind), datagram, bytes, &arena, &message, &error) == EPD_OK;
        times[i] = now_ns() - start;
    }
    snprintf(name, sizeof name, "decode_%s", message_kind_name(kind));
    print_case(name, times, N_SAMPLES / 10, CODEC_BATCH);
    must(ok, "codec");
    arena_fini(&arena);
}

/* Round trip of ready and done between two processes. */
static void bench_flags(uint64_t *times)
{
    struct page *page;
    struct epd_error error;
    int fd, status;

    must(page_create(&page, &fd, &error) == EPD_OK, "page_create");
    pid_t child = fork();
    must(child >= 0, "fork");
    if (child == 0) {
        for (size_t i = 0; i < N_SAMPLES; i++) {
            if (flag_wait(&page->plans[0].ready, now_ns() + 10 * SECOND_NS))
                _exit(1);
            flag_set(&page->plans[0].done);
        }
        _exit(0);
    }
    for (size_t i = 0; i < N_SAMPLES; i++) {
        uint64_t start = now_ns();
        flag_set(&page->plans[0].ready);
        must(flag_wait(&page->plans[0].done, start + 10 * SECOND_NS) == EPD_OK, "flag_wait");
        times[i] = now_ns() - start;
    }
    must(waitpid(child, &status, 0) == child && status == 0, "child");
    print_case("flag_round_trip_two_processes", times, N_SAMPLES, 1);
    page_close(page);
    close(fd);
}

static void echo(int socket)
{
    char buffer[64];
    size_t bytes;
    int fd;

    while (packet_receive(socket, buffer, sizeof buffer, &bytes, &fd) == PACKET_OK)
        if (packet_send(socket, buffer, bytes, -1) != PACKET_OK)
            _exit(1);
    _exit(0);
}

static void bench_packets(uint64_t *times)
{
    char buffer[64] = {0};
    size_t bytes;
    int ends[2], fd, status;

    must(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends) == 0, "socketpair");
    pid_t child = fork();
    must(child >= 0, "fork");
    if (child == 0) {
        close(ends[0]);
        echo(ends[1]);
    }
    close(ends[1]);
    for (size_t i = 0; i < N_SAMPLES; i++) {
        uint64_t start = now_ns();
        must(packet_send(ends[0], buffer, 26, -1) == PACKET_OK, "packet_send");
        must(packet_receive(ends[0], buffer, sizeof buffer, &bytes, &fd) == PACKET_OK, "packet_receive");
        times[i] = now_ns() - start;
    }
    close(ends[0]);
    must(waitpid(child, &status, 0) == child && status == 0, "child");
    print_case("packet_round_trip_two_processes", times, N_SAMPLES, 1);
}

int main(void)
{
    uint64_t *times = malloc(N_SAMPLES * sizeof *times);

    must(times != NULL, "malloc");
    bench_codec(MESSAGE_LAUNCH, times);
    bench_codec(MESSAGE_GROUP_JOIN, times);
    bench_codec(MESSAGE_PLAN_CREATE, times);
    bench_codec(MESSAGE_REPLY_HELLO, times);
    bench_packets(times);
    bench_flags(times);
    free(times);
    return 0;
}
