/* What a client leaves behind: killed or evicted with imported and heap memory, again and again. The daemon unmaps its imports,
 * and the GPU's free memory is what it was before. */
#include <cuda_runtime_api.h>
#include <signal.h>
#include <string.h>
#include <unistd.h>

#include "client/public.h"
#include "tests/gpu/backend/process.h"

enum { N_ROUNDS = 8 };

#define IMPORTED_BYTES ((size_t)1 << 30)
#define HEAP_BYTES     ((size_t)256 << 20)
/* Until everything is back. */
#define RECLAIM_S 2.0
/* What contexts and tables may differ by. */
#define SLACK_BYTES ((double)(64 << 20))

static struct epd_client *connect_to(const char *socket_path)
{
    struct epd_open_options open = {.size = sizeof open, .socket_path = socket_path, .timeout_ms = 60000};
    struct epd_client *client;
    MUST(epd_open(&open, &client) == EPD_OK);
    return client;
}

/* ---- the client that goes away ---- */

static int victim_main(const char *socket_path, int ready_fd, int expects_eviction)
{
    struct epd_group_options join = {.size = sizeof join,
                                     .name = "victim",
                                     .world_size = 1,
                                     .n_experts = 1,
                                     .top_k = 1,
                                     .hidden = 64,
                                     .max_tokens = 64,
                                     .dtype = EPD_BF16};
    struct epd_client *client = connect_to(socket_path);
    struct epd_client_info info = {.size = sizeof info};
    struct epd_group *group;
    struct epd_buffer *imported, *heap;
    struct epd_plan *plan;
    void *data;
    MUST(cudaSetDevice(0) == cudaSuccess && cudaMalloc(&data, IMPORTED_BYTES) == cudaSuccess);
    MUST(epd_client_info(client, &info) == EPD_OK && epd_group_join(client, &join, &group) == EPD_OK);
    MUST(epd_buffer_register_cuda(group, data, IMPORTED_BYTES, &imported) == EPD_OK);
    MUST(epd_buffer_alloc(group, HEAP_BYTES, &heap) == EPD_OK);
    const struct epd_tensor tensors[] = {
        {.role = EPD_ROLE_X, .buffer = imported, .dtype = EPD_BF16, .n_dims = 2, .shape = {64, 64}},
        {.role = EPD_ROLE_TOPK_IDX,
         .buffer = imported,
         .offset_bytes = 1 << 20,
         .dtype = EPD_I32,
         .n_dims = 2,
         .shape = {64, 1}},
        {.role = EPD_ROLE_RECV_X, .buffer = heap, .dtype = EPD_BF16, .n_dims = 2, .shape = {64, 64}}};
    const struct epd_plan_options options = {
        .size = sizeof options, .op = EPD_OP_DISPATCH, .n_tensors = 3, .tensors = tensors};
    MUST(cudaMemset(data, 0, IMPORTED_BYTES) == cudaSuccess);
    MUST(epd_plan_create(group, &options, &plan) == EPD_OK);
    for (;;) { /* killed in here */
        enum epd_status status = epd_plan_launch(plan, NULL);
        if (status == EPD_OK)
            status = epd_plan_wait(plan, 20000);
        if (status != EPD_OK)
            return expects_eviction && status == EPD_EVICTED ? 0 : 1;
        if (ready_fd >= 0) {
            MUST(write(ready_fd, &info.session_id, sizeof info.session_id) == sizeof info.session_id);
            ready_fd = -1;
        }
    }
}

/* ---- the one that looks ---- */

struct holdings {
    double imports, imported_bytes, heap_bytes, sessions, free_bytes;
};

static struct holdings look(struct epd_client *client)
{
    char *stats = NULL;
    size_t n_free = 0, n_total = 0;
    MUST(epd_stats(client, &stats) == EPD_OK);
    MUST(cudaMemGetInfo(&n_free, &n_total) == cudaSuccess);
    struct holdings now = {.imports = process_number(stats, "\"devices\"", "n_imports"),
                           .imported_bytes = process_number(stats, "\"devices\"", "imported_bytes"),
                           .heap_bytes = process_number(stats, "\"devices\"", "heap_bytes"),
                           .sessions = process_number(stats, "\"sessions\"", "open"),
                           .free_bytes = (double)n_free};
    epd_free(stats);
    MUST(now.imports >= 0 && now.imported_bytes >= 0 && now.heap_bytes >= 0 && now.sessions >= 1);
    return now;
}

static int is_back(const struct holdings *now, const struct holdings *before)
{
    return now->imports <= before->imports && now->imported_bytes <= before->imported_bytes &&
           now->heap_bytes <= before->heap_bytes && now->sessions <= before->sessions &&
           now->free_bytes >= before->free_bytes - SLACK_BYTES;
}

static double wait_back(struct epd_client *client, const struct holdings *before)
{
    double begin = process_seconds();
    for (;;) {
        struct holdings now = look(client);
        double waited = process_seconds() - begin;
        if (is_back(&now, before))
            return waited;
        if (waited > RECLAIM_S) {
            fprintf(stderr,
                    "after %.1f s: %.0f imports of %.0f bytes, heap %.0f, %.0f sessions, free %.0f; before: "
                    "%.0f, %.0f, %.0f, "
                    "%.0f, %.0f\n",
                    waited, now.imports, now.imported_bytes, now.heap_bytes, now.sessions, now.free_bytes,
                    before->imports, before->imported_bytes, before->heap_bytes, before->sessions,
                    before->free_bytes);
            exit(1);
        }
        usleep(1000);
    }
}

static pid_t start_victim(const char *socket_path, const char *how, uint64_t *session_id)
{
    int fds[2];
    char fd[16];
    MUST(pipe(fds) == 0);
    snprintf(fd, sizeof fd, "%d", fds[1]);
    const char *argv[] = {"/proc/self/exe", "victim", socket_path, fd, how, NULL};
    pid_t pid = process_start(argv);
    close(fds[1]);
    MUST(read(fds[0], session_id, sizeof *session_id) == sizeof *session_id);
    close(fds[0]);
    return pid;
}

static void evict(const char *epdctl, const char *control_path, uint64_t session_id)
{
    char id[24];
    snprintf(id, sizeof id, "%llu", (unsigned long long)session_id);
    const char *argv[] = {epdctl, "--control-socket", control_path, "evict", id, "--reason", "test", NULL};
    MUST(process_wait(process_start(argv)) == 0);
}

static int watcher_main(const char *socket_path, const char *control_path, const char *epdctl)
{
    struct epd_client *client = connect_to(socket_path);
    struct holdings before = {0};
    MUST(cudaSetDevice(0) == cudaSuccess && cudaFree(NULL) == cudaSuccess);
    for (int round = 0; round <= N_ROUNDS; round++) {
        const int evicts = round % 2;
        uint64_t session_id = 0;
        pid_t victim = start_victim(socket_path, evicts ? "evict" : "kill", &session_id);
        struct holdings during = look(client);
        MUST(during.imports >= 1 && during.imported_bytes >= (double)IMPORTED_BYTES);
        if (evicts)
            evict(epdctl, control_path, session_id);
        else
            MUST(kill(victim, SIGKILL) == 0);
        const int code = process_wait(victim);
        MUST(evicts ? code == 0 : code == -1);
        if (round == 0) { /* what the first group of all makes stays */
            usleep(1000000);
            before = look(client);
            MUST(before.imports == 0 && before.imported_bytes == 0);
            continue;
        }
        printf("%s client: everything back after %.1f ms\n", evicts ? "evicted" : "killed",
               wait_back(client, &before) * 1e3);
    }
    epd_close(client);
    return 0;
}

int main(int argc, char **argv)
{
    struct process_daemon daemon;
    if (argc == 2 && strcmp(argv[1], "count") == 0)
        return process_count_main();
    if (argc == 5 && strcmp(argv[1], "victim") == 0)
        return victim_main(argv[2], atoi(argv[3]), strcmp(argv[4], "evict") == 0);
    if (argc == 5 && strcmp(argv[1], "watcher") == 0)
        return watcher_main(argv[2], argv[3], argv[4]);
    if (argc != 3) {
        fprintf(stderr, "usage: %s EPD EPDCTL\n", argv[0]);
        return 2;
    }
    if (process_count_gpus() == 0) {
        printf("SKIP: no GPU\n");
        return PROCESS_SKIPPED;
    }
    process_daemon_start(&daemon, argv[1], NULL);
    const char *watcher[] = {"/proc/self/exe",    "watcher", daemon.socket_path,
                             daemon.control_path, argv[2],   NULL};
    int failed = process_wait(process_start(watcher)) != 0;
    failed |= process_daemon_stop(&daemon);
    printf("%s\n", failed ? "FAILED" : "PASSED");
    return failed;
}
