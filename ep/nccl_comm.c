#include "ep/nccl_comm.h"

#include <dirent.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

#include "ep/clock.h"
#include "ep/transport.h"

/* Of the time in which all that ends together must: until what was sent last has been handed over, until communicators
 * that no id is left without have gone, and until ids have been given back. */
#define NCCL_FINISH_NS 1000000000ull
#define NCCL_GO_NS     2000000000ull
#define NCCL_RETURN_NS 2500000000ull
#define NCCL_END_NS    (TRANSPORT_END_MS * 1000000ull)
/* How long one that has to be aborted beside running streams may take to go. */
#define NCCL_ABORT_NS 2000000000ull
/* How long a swap that is being put into its stream may take to get there before it is aborted. */
#define NCCL_SETTLE_NS 1000000000ull
/* How long a device's first communicator may take. */
#define NCCL_BEGIN_NS  30000000000ull
#define NCCL_NAP_NS    100000
#define NCCL_NET_BYTES 64

/* Set once, before any thread runs. */
static char net_name[NCCL_NET_BYTES];

void nccl_comm_choose_network(const char *name)
{
    (void)snprintf(net_name, sizeof net_name, "%s", strcmp(name, "tcp") == 0 ? "Socket" : name);
}

int nccl_comm_begin(struct ncclComm **comm, uint32_t n_nodes, uint32_t node, const struct nccl_id *id)
{
    struct nccl_config config = {.size = sizeof(struct nccl_config),
                                 .magic = NCCL_CONFIG_MAGIC,
                                 .version = NCCL_CONFIG_VERSION,
                                 .blocking = 0,
                                 .cga_cluster_size = NCCL_CONFIG_NOT_CHOSEN,
                                 .min_ctas = NCCL_CONFIG_NOT_CHOSEN,
                                 .max_ctas = TRANSPORT_RAIL_BLOCKS,
                                 .net_name = net_name[0] ? net_name : NULL,
                                 .split_share = NCCL_CONFIG_NOT_CHOSEN};
    return nccl_library()->ncclCommInitRankConfig(comm, (int)n_nodes, *id, (int)node, &config);
}

static void nap(void)
{
    const struct timespec time = {.tv_nsec = NCCL_NAP_NS};
    (void)nanosleep(&time, NULL);
}

/* How far it is: NCCL_OK, an error, or in progress at that time. */
static int wait_until(struct ncclComm *comm, uint64_t until_ns)
{
    int result = NCCL_IN_PROGRESS;
    while (nccl_library()->ncclCommGetAsyncError(comm, &result) == NCCL_OK && result == NCCL_IN_PROGRESS &&
           clock_now_ns() < until_ns)
        nap();
    return result;
}

static enum epd_status check(int result, const char *what, struct epd_error *error)
{
    if (result == NCCL_OK)
        return EPD_OK;
    return error_set(error, EPD_NCCL, "nccl %s: %s", what,
                     result == NCCL_IN_PROGRESS ? "did not end" : nccl_library()->ncclGetErrorString(result));
}

static int swap_with_itself(struct ncclComm *comm, char *memory, size_t bytes, struct CUstream_st *stream,
                            uint64_t until_ns)
{
    const struct nccl_library *nccl = nccl_library();
    int result = nccl->ncclGroupStart();
    if (result == NCCL_OK)
        result = nccl->ncclSend(memory, bytes, NCCL_TYPE_INT8, 0, comm, stream);
    if (result == NCCL_OK)
        result = nccl->ncclRecv(memory + bytes, bytes, NCCL_TYPE_INT8, 0, comm, stream);
    const int ended = nccl->ncclGroupEnd();
    if (result != NCCL_OK || (ended != NCCL_OK && ended != NCCL_IN_PROGRESS))
        return result != NCCL_OK ? result : ended;
    return wait_until(comm, until_ns);
}

static enum epd_status await_passed(const struct cuda_rail *rail, uint64_t until_ns, struct epd_error *error)
{
    error->status = EPD_OK;
    while (!cuda_rail_passed(rail, error)) {
        if (clock_now_ns() > until_ns)
            return error_set(error, EPD_NCCL, "nccl first swap: it is not done in %llu s",
                             (unsigned long long)(NCCL_BEGIN_NS / 1000000000));
        nap();
    }
    return error->status;
}

enum epd_status nccl_comm_begin_device(struct cuda_rail *rail, char *memory, size_t bytes,
                                       struct epd_error *error)
{
    const uint64_t until_ns = clock_now_ns() + NCCL_BEGIN_NS;
    struct nccl_id id;
    struct nccl_end end = {.failed = 1};
    if (check(nccl_library()->ncclGetUniqueId(&id), "id", error))
        return error->status;
    const int begun = nccl_comm_begin(&end.comm, 1, 0, &id);
    if ((begun == NCCL_IN_PROGRESS || check(begun, "first communicator", error) == EPD_OK) &&
        check(wait_until(end.comm, until_ns), "first communicator", error) == EPD_OK &&
        check(swap_with_itself(end.comm, memory, bytes, cuda_rail_stream(rail), until_ns), "first swap",
              error) == EPD_OK &&
        await_passed(rail, until_ns, error) == EPD_OK)
        return EPD_OK;
    /* Before its stream goes: NCCL still has it. Nothing else runs on the device yet. */
    if (!end.comm)
        end.id = &id;
    nccl_comm_end_all(&end, 1);
    return error->status;
}

/* ---- ends ---- */

/* NCCL ends a communicator on a thread that nobody can ask, but that inherits the name of the one that called. */
struct calling {
    char own[16], name[16];
};

static void begin_calling(struct calling *calling)
{
    static _Atomic unsigned n_ever;
    (void)pthread_getname_np(pthread_self(), calling->own, sizeof calling->own);
    (void)snprintf(calling->name, sizeof calling->name, "nccl-end-%u", atomic_fetch_add(&n_ever, 1) % 100000);
    (void)pthread_setname_np(pthread_self(), calling->name);
}

static void end_calling(const struct calling *calling)
{
    (void)pthread_setname_np(pthread_self(), calling->own);
}

/* Threads of this process called so. */
static unsigned count_threads(const char *name)
{
    unsigned n = 0;
    DIR *tasks = opendir("/proc/self/task");
    for (struct dirent *task; tasks && (task = readdir(tasks));) {
        char path[64], found[32] = "";
        (void)snprintf(path, sizeof path, "/proc/self/task/%.20s/comm", task->d_name);
        FILE *file = task->d_name[0] == '.' ? NULL : fopen(path, "r");
        if (file && fgets(found, sizeof found, file)) {
            found[strcspn(found, "\n")] = 0;
            n += strcmp(found, name) == 0;
        }
        if (file)
            (void)fclose(file);
    }
    if (tasks)
        (void)closedir(tasks);
    return n;
}

static void await_gone(const struct calling *calling, uint64_t until_ns)
{
    while (count_threads(calling->name) > 1 && clock_now_ns() < until_ns)
        nap();
}

/* Aborting is what shrinking does first; no list of nodes to leave out ends it there. */
int nccl_comm_leave_streams(struct ncclComm *comm)
{
    struct ncclComm *none = NULL;
    struct calling calling;
    if (wait_until(comm, clock_now_ns() + NCCL_SETTLE_NS) != NCCL_IN_PROGRESS) {
        (void)nccl_library()->ncclCommShrink(comm, NULL, 0, &none, NULL, NCCL_SHRINK_BY_ABORT);
        return 1;
    }
    begin_calling(&calling);
    (void)nccl_library()->ncclCommAbort(comm);
    await_gone(&calling, clock_now_ns() + NCCL_ABORT_NS);
    end_calling(&calling);
    return 0;
}

/* What cannot be handed over has failed too. */
static void finish(struct nccl_end *ends, uint32_t n, uint64_t until_ns)
{
    for (uint32_t i = 0; i < n; i++) {
        if (!ends[i].comm || ends[i].failed)
            continue;
        const int begun = nccl_library()->ncclCommFinalize(ends[i].comm);
        ends[i].failed = begun != NCCL_OK && begun != NCCL_IN_PROGRESS;
    }
    for (uint32_t i = 0; i < n; i++)
        if (ends[i].comm && !ends[i].failed)
            ends[i].failed = wait_until(ends[i].comm, until_ns) != NCCL_OK;
}

static void let_go(struct nccl_end *ends, uint32_t n)
{
    for (uint32_t i = 0; i < n; i++) {
        if (!ends[i].comm)
            continue;
        if (ends[i].failed)
            (void)nccl_library()->ncclCommAbort(ends[i].comm);
        else
            (void)nccl_library()->ncclCommDestroy(ends[i].comm);
        ends[i].comm = NULL;
    }
}

/* The thread of an id ends when one comes alone, and also when one comes that tells something else than the one before. */
static void return_ids(struct nccl_end *ends, uint32_t n, uint64_t until_ns)
{
    for (uint32_t i = 0; i < n; i++)
        if (ends[i].id) {
            (void)nccl_comm_begin(&ends[i].comm, 1, 0, ends[i].id);
            ends[i].failed = 1;
        }
    for (uint32_t i = 0; i < n; i++)
        if (ends[i].comm)
            (void)wait_until(ends[i].comm, until_ns);
}

static int has_ids(const struct nccl_end *ends, uint32_t n)
{
    int has = 0;
    for (uint32_t i = 0; i < n; i++)
        has |= ends[i].id != NULL;
    return has;
}

void nccl_comm_end_all(struct nccl_end *ends, uint32_t n)
{
    const uint64_t begun_ns = clock_now_ns();
    const int ids = has_ids(ends, n);
    struct calling calling;
    begin_calling(&calling);
    finish(ends, n, begun_ns + NCCL_FINISH_NS);
    let_go(ends, n);
    await_gone(&calling, begun_ns + (ids ? NCCL_GO_NS : NCCL_END_NS));
    if (ids) {
        return_ids(ends, n, begun_ns + NCCL_RETURN_NS);
        let_go(ends, n);
        await_gone(&calling, begun_ns + NCCL_END_NS);
    }
    end_calling(&calling);
}
