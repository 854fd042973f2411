/* Rails over NCCL, for the CUDA backend: a communicator for each rail, of the GPUs of one local index on all nodes.
 *
 * It must end in two parts. A swap that waits for a node that is gone has to leave its stream at once; but when NCCL frees
 * a communicator CUDA waits for the whole device, clients' streams included, and holds up everybody's calls meanwhile
 * (measured: no other stream of the process gets anything). So an abort only makes all swaps leave (release), on a thread
 * of the rail's own, for that waits until they have; and the communicator goes when nothing is left in any queue of the
 * device, on the lane, which puts nothing in before it is gone.
 *
 * Communicators are not blocking: every call is asked how far it is, so that a lane that waits can be told to leave. The
 * lane waits only until a swap is in its stream. */
#include <assert.h>
#include <cuda_runtime_api.h>
#include <dirent.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "ep/backend_cuda.h"
#include "ep/clock.h"
#include "ep/nccl_library.h"
#include "ep/transport.h"

extern const struct transport transport_nccl;

/* How long a communicator that has not failed may take to hand over what was sent last, and any to go. */
#define NCCL_FINISH_NS 1000000000ull
#define NCCL_GO_NS     2000000000ull
/* How long an id that nobody has come for may take to be given back. */
#define NCCL_RETURN_NS 2000000000ull
/* How long a swap that is being put into its stream may take to get there before it is aborted. */
#define NCCL_SETTLE_NS 1000000000ull
/* Looks before sleeping: putting a swap into a stream takes NCCL some 50 us. */
#define NCCL_SPINS  2000
#define NCCL_NAP_NS 100000
/* Bytes of a first message: it makes NCCL open its connections and load its kernels, before anything waits. */
#define NCCL_FIRST_BYTES 256

#define NCCL_NET_BYTES 64

/* Set once by load. */
static char net_name[NCCL_NET_BYTES];

enum nccl_stage {
    NCCL_OPENED,   /* nothing has begun */
    NCCL_MEETING,  /* the nodes find each other */
    NCCL_STARTING, /* the first swap is being put into its stream */
    NCCL_RUNNING,  /* it is there and runs */
    NCCL_CONNECTED
};

struct transport_rail {
    const struct nccl_library *nccl;
    int ordinal; /* CUDA's number of the device */
    struct nccl_id id;
    int owns_id; /* made here, and nobody has come for it: its thread listens */
    uint32_t n_nodes, node;
    uint64_t limit_ns, begun_ns;
    enum nccl_stage stage;
    cudaStream_t stream; /* of the first swap; owned */
    char *first;         /* [2 * n_nodes * NCCL_FIRST_BYTES], owned */
    struct ncclComm *comm;
    struct backend_device *device; /* borrowed; may be NULL */
    pthread_t releaser;

    pthread_mutex_t lock; /* of what follows */
    pthread_cond_t changed;
    int busy;             /* the lane is inside */
    int released;         /* the releaser has its turn, or had it */
    int closed;           /* the releaser ends without one */
    struct epd_error why; /* OK while the rail works */
};

static enum epd_status nccl_check(const struct transport_rail *rail, int result, const char *what,
                                  struct epd_error *error)
{
    if (result == NCCL_OK || result == NCCL_IN_PROGRESS)
        return EPD_OK;
    const char *last = rail->nccl->ncclGetLastError(NULL);
    return error_set(error, result == NCCL_REMOTE_ERROR ? EPD_PEER_LOST : EPD_NCCL, "nccl %s: %s%s%.120s",
                     what, rail->nccl->ncclGetErrorString(result), last && last[0] ? ": " : "",
                     last ? last : "");
}

static enum epd_status nccl_load(const struct transport_options *options, struct epd_error *error)
{
    /* UCX's word for what NCCL calls Socket: the option has one default for both. */
    const int tcp = strcmp(options->ways, "tcp") == 0;
    (void)snprintf(net_name, sizeof net_name, "%s", tcp ? "Socket" : options->ways);
    return nccl_library_load(options->devices, error);
}

/* ---- ends ---- */

static void nap(void)
{
    const struct timespec time = {.tv_nsec = NCCL_NAP_NS};
    (void)nanosleep(&time, NULL);
}

/* How far the communicator is: NCCL_OK, an error, or in progress until the limit. */
static int wait_for(const struct nccl_library *nccl, struct ncclComm *comm, uint64_t limit_ns)
{
    const uint64_t begun_ns = clock_now_ns();
    int result = NCCL_IN_PROGRESS;
    while (nccl->ncclCommGetAsyncError(comm, &result) == NCCL_OK && result == NCCL_IN_PROGRESS &&
           clock_now_ns() - begun_ns < limit_ns)
        nap();
    return result;
}

static struct nccl_config config_of(void)
{
    return (struct nccl_config){.size = sizeof(struct nccl_config),
                                .magic = NCCL_CONFIG_MAGIC,
                                .version = NCCL_CONFIG_VERSION,
                                .blocking = 0,
                                .cga_cluster_size = NCCL_CONFIG_NOT_CHOSEN,
                                .min_ctas = NCCL_CONFIG_NOT_CHOSEN,
                                .max_ctas = TRANSPORT_RAIL_BLOCKS,
                                .net_name = net_name[0] ? net_name : NULL,
                                .split_share = NCCL_CONFIG_NOT_CHOSEN};
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

/* Ends a communicator and returns when it is gone. NCCL does it on a thread that nobody can ask, and that has the name of
 * the one that made it. */
static void end_comm(struct ncclComm *comm, int (*end)(struct ncclComm *comm))
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

/* Makes every swap that is in a stream leave it, and returns when all have: the part of shrinking that comes first. No list
 * of nodes to leave out ends it there. */
static void leave_streams(struct transport_rail *rail)
{
    struct ncclComm *none = NULL;
    if (wait_for(rail->nccl, rail->comm, NCCL_SETTLE_NS) == NCCL_IN_PROGRESS) {
        /* Its calls do not end either, and only the end of all ends them, whatever that holds up. */
        end_comm(rail->comm, rail->nccl->ncclCommAbort);
        rail->comm = NULL;
        return;
    }
    (void)rail->nccl->ncclCommShrink(rail->comm, NULL, 0, &none, NULL, NCCL_SHRINK_BY_ABORT);
}

/* Made with the rail: an abort must not fail for want of a thread. */
static void *release(void *arg)
{
    struct transport_rail *rail = arg;
    (void)cudaSetDevice(rail->ordinal);
    (void)pthread_mutex_lock(&rail->lock);
    while (!rail->released && !rail->closed)
        (void)pthread_cond_wait(&rail->changed, &rail->lock);
    const int released = rail->released;
    (void)pthread_mutex_unlock(&rail->lock);
    if (released && rail->stage > NCCL_MEETING)
        leave_streams(rail);
    return NULL;
}

/* What was sent last is on its way before the end: other nodes may still wait for it. */
static int finish(const struct transport_rail *rail)
{
    const int result = rail->nccl->ncclCommFinalize(rail->comm);
    return (result == NCCL_OK || result == NCCL_IN_PROGRESS) &&
           wait_for(rail->nccl, rail->comm, NCCL_FINISH_NS) == NCCL_OK;
}

/* An id is a socket and a thread that waits for as many nodes as the first one that comes tells it of, for ever if they do
 * not come. It ends when one comes alone, and also when one comes that tells something else. */
static void return_id(const struct transport_rail *rail)
{
    struct nccl_config config = config_of();
    struct ncclComm *comm = NULL;
    (void)rail->nccl->ncclCommInitRankConfig(&comm, 1, rail->id, 0, &config);
    if (!comm)
        return;
    (void)wait_for(rail->nccl, comm, NCCL_RETURN_NS);
    end_comm(comm, rail->nccl->ncclCommAbort);
}

static void rail_free(struct transport_rail *rail)
{
    if (rail->first)
        (void)cudaFreeAsync(rail->first, rail->stream);
    if (rail->stream)
        (void)cudaStreamDestroy(rail->stream);
    (void)pthread_cond_destroy(&rail->changed);
    (void)pthread_mutex_destroy(&rail->lock);
    free(rail);
}

/* Lane thread; nothing is in any queue of the device. */
static void end_rail(struct backend_device *device, void *arg)
{
    struct transport_rail *rail = arg;
    (void)device;
    (void)pthread_join(rail->releaser, NULL);
    if (rail->comm && !rail->why.status && finish(rail))
        end_comm(rail->comm, rail->nccl->ncclCommDestroy);
    else if (rail->comm)
        end_comm(rail->comm, rail->nccl->ncclCommAbort);
    if (rail->owns_id)
        return_id(rail);
    rail_free(rail);
}

static void nccl_rail_close(struct transport_rail *rail)
{
    (void)pthread_mutex_lock(&rail->lock);
    assert(!rail->busy);
    rail->closed = 1;
    (void)pthread_cond_signal(&rail->changed);
    (void)pthread_mutex_unlock(&rail->lock);
    if (rail->device)
        cuda_defer(rail->device, 1, end_rail, rail);
    else
        end_rail(NULL, rail);
}

/* Locked. Once; the lane touches the communicator no more. */
static void give_away(struct transport_rail *rail)
{
    rail->released = 1;
    (void)pthread_cond_signal(&rail->changed);
}

static void fail(struct transport_rail *rail, const struct epd_error *why)
{
    (void)pthread_mutex_lock(&rail->lock);
    if (!rail->why.status)
        rail->why = *why;
    if (!rail->busy && !rail->released)
        give_away(rail);
    (void)pthread_mutex_unlock(&rail->lock);
}

/* The lane uses the communicator; what fails meanwhile ends it when the lane leaves. */
static enum epd_status enter(struct transport_rail *rail, struct epd_error *error)
{
    (void)pthread_mutex_lock(&rail->lock);
    error->status = rail->why.status;
    if (rail->why.status)
        *error = rail->why;
    else
        rail->busy = 1;
    (void)pthread_mutex_unlock(&rail->lock);
    return error->status;
}

/* error: what the lane has met, OK if nothing; out: the rail's first. */
static enum epd_status leave(struct transport_rail *rail, struct epd_error *error)
{
    (void)pthread_mutex_lock(&rail->lock);
    rail->busy = 0;
    if (!rail->why.status && error->status)
        rail->why = *error;
    if (rail->why.status) {
        *error = rail->why;
        if (!rail->released)
            give_away(rail);
    }
    (void)pthread_mutex_unlock(&rail->lock);
    return error->status;
}

static int is_failed(struct transport_rail *rail)
{
    (void)pthread_mutex_lock(&rail->lock);
    const int failed = rail->why.status != EPD_OK;
    (void)pthread_mutex_unlock(&rail->lock);
    return failed;
}

/* ---- open, connect ---- */

static enum epd_status nccl_rail_open(struct backend_device *device, uint32_t node,
                                      struct transport_rail **result, struct transport_address *address,
                                      struct epd_error *error)
{
    struct transport_rail *rail = calloc(1, sizeof *rail);
    if (!rail)
        return error_set(error, EPD_NO_MEMORY, "rail: %zu bytes", sizeof *rail);
    rail->nccl = nccl_library();
    assert(rail->nccl);
    (void)pthread_mutex_init(&rail->lock, NULL);
    (void)pthread_cond_init(&rail->changed, NULL);
    rail->device = device;
    rail->node = node;
    if (cuda_runtime_check(cudaGetDevice(&rail->ordinal), "rail: device", error) ||
        cuda_runtime_check(cudaStreamCreateWithFlags(&rail->stream, cudaStreamNonBlocking), "rail: stream",
                           error))
        goto free_rail;
    if (pthread_create(&rail->releaser, NULL, release, rail) != 0) {
        (void)error_set(error, EPD_SYSTEM, "rail: no thread for aborts");
        goto free_rail;
    }
    if (node == 0 && nccl_check(rail, rail->nccl->ncclGetUniqueId(&rail->id), "id", error)) {
        nccl_rail_close(rail);
        return error->status;
    }
    rail->owns_id = node == 0;
    address->bytes = node == 0 ? sizeof rail->id : 1; /* the others are not looked for */
    memset(address->data, 0, address->bytes);
    memcpy(address->data, &rail->id, address->bytes);
    *result = rail;
    return EPD_OK;

free_rail:
    rail_free(rail);
    return error->status;
}

static enum epd_status nccl_rail_connect(struct transport_rail *rail, uint32_t n_nodes, uint32_t node,
                                         const struct transport_address *addresses, uint64_t limit_ns,
                                         struct epd_error *error)
{
    const size_t bytes = 2 * (size_t)n_nodes * NCCL_FIRST_BYTES;
    struct nccl_config config = config_of();
    if (enter(rail, error))
        return error->status;
    assert(node == rail->node);
    rail->n_nodes = n_nodes;
    rail->limit_ns = limit_ns;
    rail->begun_ns = clock_now_ns();
    if (addresses[0].bytes != sizeof rail->id) {
        (void)error_set(error, EPD_PROTOCOL, "rail: the address of node 0 has %u bytes, want %zu",
                        addresses[0].bytes, sizeof rail->id);
        return leave(rail, error);
    }
    memcpy(&rail->id, addresses[0].data, sizeof rail->id);
    if (cuda_runtime_check(cudaMallocAsync((void **)&rail->first, bytes, rail->stream), "rail: memory",
                           error) == EPD_OK &&
        cuda_runtime_check(cudaMemsetAsync(rail->first, 0, bytes, rail->stream), "rail: memory", error) ==
            EPD_OK)
        (void)nccl_check(
            rail, rail->nccl->ncclCommInitRankConfig(&rail->comm, (int)n_nodes, rail->id, (int)node, &config),
            "communicator", error);
    rail->stage = NCCL_MEETING;
    return leave(rail, error);
}

/* ---- swaps ---- */

/* Begins to put all messages into the stream. */
static int begin_swap(const struct transport_rail *rail, const struct transport_move *moves,
                      struct CUstream_st *stream)
{
    const struct nccl_library *nccl = rail->nccl;
    int result = nccl->ncclGroupStart();
    for (uint32_t node = 0; node < rail->n_nodes && result == NCCL_OK; node++) {
        const struct transport_move *move = &moves[node];
        if (node == rail->node)
            continue;
        if (move->send_bytes)
            result =
                nccl->ncclSend(move->send, move->send_bytes, NCCL_TYPE_INT8, (int)node, rail->comm, stream);
        if (move->receive_bytes && result == NCCL_OK)
            result = nccl->ncclRecv(move->receive, move->receive_bytes, NCCL_TYPE_INT8, (int)node, rail->comm,
                                    stream);
    }
    const int ended = nccl->ncclGroupEnd();
    return result != NCCL_OK ? result : ended;
}

static enum epd_status begin_first(struct transport_rail *rail, struct epd_error *error)
{
    struct transport_move moves[EPD_MAX_NODES];
    for (uint32_t node = 0; node < rail->n_nodes; node++)
        moves[node] = (struct transport_move){.send = rail->first + (size_t)node * NCCL_FIRST_BYTES,
                                              .send_bytes = NCCL_FIRST_BYTES,
                                              .receive = rail->first +
                                                         (size_t)(rail->n_nodes + node) * NCCL_FIRST_BYTES,
                                              .receive_bytes = NCCL_FIRST_BYTES};
    return nccl_check(rail, begin_swap(rail, moves, rail->stream), "first swap", error);
}

/* NCCL_IN_PROGRESS, or the rail's error, is what the last call has come to so far. */
static int progress(const struct transport_rail *rail)
{
    int result = NCCL_IN_PROGRESS;
    const int asked = rail->nccl->ncclCommGetAsyncError(rail->comm, &result);
    return asked != NCCL_OK ? asked : result;
}

/* One look at the stage that connecting has reached. */
static enum epd_status advance(struct transport_rail *rail, struct epd_error *error)
{
    const int result = progress(rail);
    if (result == NCCL_IN_PROGRESS || nccl_check(rail, result, "communicator", error))
        return error->status;
    if (rail->stage == NCCL_MEETING) {
        if (begin_first(rail, error) == EPD_OK)
            rail->stage = NCCL_STARTING;
    } else if (rail->stage == NCCL_STARTING) {
        rail->stage = NCCL_RUNNING;
    } else {
        const cudaError_t done = cudaStreamQuery(rail->stream);
        if (done == cudaSuccess)
            rail->stage = NCCL_CONNECTED;
        else if (done != cudaErrorNotReady)
            return cuda_runtime_check(done, "rail: first swap", error);
    }
    return error->status;
}

static int nccl_rail_connected(struct transport_rail *rail, struct epd_error *error)
{
    error->status = EPD_OK;
    if (enter(rail, error))
        return 1;
    if (advance(rail, error) == EPD_OK && rail->stage != NCCL_CONNECTED &&
        clock_now_ns() - rail->begun_ns > rail->limit_ns)
        (void)error_set(error, EPD_TIMEOUT, "the nodes did not connect in %llu ms",
                        (unsigned long long)(rail->limit_ns / 1000000));
    if (rail->stage == NCCL_CONNECTED)
        rail->owns_id = 0; /* all have come for it */
    return leave(rail, error) || rail->stage == NCCL_CONNECTED;
}

/* NCCL does not say which node it misses; where there are two it is the other one. */
static void name_others(const struct transport_rail *rail, char *text, size_t bytes)
{
    size_t length = 0;
    text[0] = 0;
    for (uint32_t node = 0; node < rail->n_nodes && length < bytes; node++)
        if (node != rail->node)
            length += (size_t)snprintf(text + length, bytes - length, "%s%u", length ? ", " : "", node);
}

/* Of a rail that was connected: whatever the library saw of it, the others do not answer. */
static enum epd_status swap_check(const struct transport_rail *rail, int result, struct epd_error *error)
{
    char others[64];
    if (result == NCCL_OK || result == NCCL_IN_PROGRESS)
        return EPD_OK;
    name_others(rail, others, sizeof others);
    return error_set(error, EPD_PEER_LOST, "%s %s is lost: nccl: %s",
                     rail->n_nodes == 2 ? "node" : "one of nodes", others,
                     rail->nccl->ncclGetErrorString(result));
}

/* Until NCCL has put it into the stream. */
static enum epd_status await_enqueued(struct transport_rail *rail, struct epd_error *error)
{
    const uint64_t begun_ns = clock_now_ns();
    for (uint32_t spins = 0;; spins++) {
        const int result = progress(rail);
        if (result != NCCL_IN_PROGRESS)
            return swap_check(rail, result, error);
        if (is_failed(rail))
            return EPD_OK; /* leave tells */
        if (clock_now_ns() - begun_ns > rail->limit_ns)
            return error_set(error, EPD_TIMEOUT, "nccl did not take a swap in %llu ms",
                             (unsigned long long)(rail->limit_ns / 1000000));
        if (spins > NCCL_SPINS)
            nap();
        else
            (void)sched_yield();
    }
}

static enum epd_status nccl_rail_swap_on(struct transport_rail *rail, const struct transport_move *moves,
                                         struct CUstream_st *stream, struct epd_error *error)
{
    if (enter(rail, error))
        return error->status;
    if (swap_check(rail, begin_swap(rail, moves, stream), error) == EPD_OK)
        (void)await_enqueued(rail, error);
    return leave(rail, error);
}

static enum epd_status nccl_rail_check(struct transport_rail *rail, struct epd_error *error)
{
    if (enter(rail, error))
        return error->status;
    (void)swap_check(rail, progress(rail), error);
    return leave(rail, error);
}

static void nccl_rail_abort(struct transport_rail *rail, const struct epd_error *why)
{
    fail(rail, why);
}

const struct transport transport_nccl = {
    .name = "nccl",
    .load = nccl_load,
    .rail_open = nccl_rail_open,
    .rail_connect = nccl_rail_connect,
    .rail_connected = nccl_rail_connected,
    .rail_swap_on = nccl_rail_swap_on,
    .rail_check = nccl_rail_check,
    .rail_abort = nccl_rail_abort,
    .rail_close = nccl_rail_close,
};
