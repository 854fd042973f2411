#include "ep/nccl_comm.h"

#include <cuda_runtime_api.h>
#include <dirent.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

#include "ep/clock.h"
#include "ep/cuda_driver.h"
#include "ep/transport.h"

/* How long a communicator that has not failed may take to hand over what was sent last, and any to go. */
#define NCCL_FINISH_NS 1000000000ull
#define NCCL_GO_NS     2000000000ull
/* How long an id that nobody has come for may take to be given back. */
#define NCCL_RETURN_NS 2000000000ull
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

/* How far it is: NCCL_OK, an error, or in progress until the limit. */
static int wait_for(struct ncclComm *comm, uint64_t limit_ns)
{
    const uint64_t begun_ns = clock_now_ns();
    int result = NCCL_IN_PROGRESS;
    while (nccl_library()->ncclCommGetAsyncError(comm, &result) == NCCL_OK && result == NCCL_IN_PROGRESS &&
           clock_now_ns() - begun_ns < limit_ns)
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

static int swap_with_itself(struct ncclComm *comm, char *memory, size_t bytes, struct CUstream_st *stream)
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
    return wait_for(comm, NCCL_BEGIN_NS);
}

enum epd_status nccl_comm_begin_device(void *memory, size_t bytes, struct CUstream_st *stream,
                                       struct epd_error *error)
{
    struct nccl_id id;
    struct ncclComm *comm = NULL;
    if (check(nccl_library()->ncclGetUniqueId(&id), "id", error))
        return error->status;
    const int begun = nccl_comm_begin(&comm, 1, 0, &id);
    if ((begun != NCCL_IN_PROGRESS && check(begun, "first communicator", error)) ||
        check(wait_for(comm, NCCL_BEGIN_NS), "first communicator", error) ||
        check(swap_with_itself(comm, memory, bytes, stream), "first swap", error))
        return error->status;
    return cuda_runtime_check(cudaStreamSynchronize(stream), "nccl first swap", error);
}

/* ---- ends ---- */

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

/* NCCL ends it on a thread that nobody can ask, but that inherits the name of the one that called. */
static void end_by(struct ncclComm *comm, int (*end)(struct ncclComm *comm))
{
    static _Atomic unsigned n_ended;
    char own[16], name[16];
    const uint64_t begun_ns = clock_now_ns();
    (void)pthread_getname_np(pthread_self(), own, sizeof own);
    (void)snprintf(name, sizeof name, "nccl-end-%u", atomic_fetch_add(&n_ended, 1) % 100000);
    (void)pthread_setname_np(pthread_self(), name);
    (void)end(comm);
    while (count_threads(name) > 1 && clock_now_ns() - begun_ns < NCCL_GO_NS)
        nap();
    (void)pthread_setname_np(pthread_self(), own);
}

/* Aborting is what shrinking does first; no list of nodes to leave out ends it there. */
int nccl_comm_leave_streams(struct ncclComm *comm)
{
    struct ncclComm *none = NULL;
    if (wait_for(comm, NCCL_SETTLE_NS) == NCCL_IN_PROGRESS) {
        end_by(comm, nccl_library()->ncclCommAbort);
        return 0;
    }
    (void)nccl_library()->ncclCommShrink(comm, NULL, 0, &none, NULL, NCCL_SHRINK_BY_ABORT);
    return 1;
}

static int finish(struct ncclComm *comm)
{
    const int result = nccl_library()->ncclCommFinalize(comm);
    return (result == NCCL_OK || result == NCCL_IN_PROGRESS) && wait_for(comm, NCCL_FINISH_NS) == NCCL_OK;
}

void nccl_comm_end(struct ncclComm *comm, int failed)
{
    if (!failed && finish(comm))
        end_by(comm, nccl_library()->ncclCommDestroy);
    else
        end_by(comm, nccl_library()->ncclCommAbort);
}

/* The thread ends when one comes alone, and also when one comes that tells something else than the one before. */
void nccl_comm_return_id(const struct nccl_id *id)
{
    struct ncclComm *comm = NULL;
    (void)nccl_comm_begin(&comm, 1, 0, id);
    if (!comm)
        return;
    (void)wait_for(comm, NCCL_RETURN_NS);
    end_by(comm, nccl_library()->ncclCommAbort);
}
