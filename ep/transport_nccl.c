/* Rails over NCCL, for the CUDA backend: a communicator for each rail, of the GPUs of one local index on all nodes. An
 * abort makes its swaps leave their streams at once, on a thread of the rail's own, for that waits until they have; the
 * communicator itself goes in a quiet moment of the node (nccl_comm.h says why).
 *
 * The lane waits only until a swap is in its stream, and asks how far it is, so that it can be told to leave. */
#include <assert.h>
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "ep/clock.h"
#include "ep/cuda_rail.h"
#include "ep/nccl_comm.h"
#include "ep/nccl_library.h"
#include "ep/transport.h"

extern const struct transport transport_nccl;

/* Looks before sleeping: putting a swap into a stream takes NCCL some 50 us. */
#define NCCL_SPINS  2000
#define NCCL_NAP_NS 100000
/* Bytes of a first message: it makes NCCL open its connections and load its kernels, before anything waits. */
#define NCCL_FIRST_BYTES 256

enum nccl_stage {
    NCCL_OPENED,   /* nothing has begun */
    NCCL_MEETING,  /* the nodes find each other */
    NCCL_STARTING, /* the first swap is being put into its stream */
    NCCL_RUNNING,  /* it is there and runs */
    NCCL_CONNECTED
};

struct transport_rail {
    const struct nccl_library *nccl;
    struct cuda_rail *cuda; /* owned */
    struct nccl_id id;
    int owns_id; /* made here, and nobody has come for it: its thread listens */
    uint32_t n_nodes, node;
    uint32_t names[EPD_MAX_NODES]; /* what errors call the nodes */
    uint64_t limit_ns, begun_ns;
    enum nccl_stage stage;
    char *first; /* [2 * n_nodes * NCCL_FIRST_BYTES] of the first swap */
    struct ncclComm *comm;
    pthread_t releaser;

    pthread_mutex_t lock; /* of what follows */
    pthread_cond_t changed;
    int busy;             /* the lane is inside */
    int released;         /* the releaser has its turn, or had it */
    int closed;           /* the releaser ends without one */
    int left;             /* the releaser has ended: nothing of the rail is in any stream */
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
    nccl_comm_choose_network(options->ways);
    return nccl_library_load(options->devices, error);
}

/* NCCL's kernels are loaded when a device's first communicator is made, and CUDA loads nothing while a stream waits. That
 * one stays: its end would be no better a moment. */
static enum epd_status nccl_device_begin(struct epd_error *error)
{
    struct cuda_rail *cuda;
    char *bytes;
    error->status = EPD_OK;
    if (cuda_rail_open(NULL, 0, &cuda, error))
        return error->status;
    if (cuda_rail_memory(cuda, 2 * NCCL_FIRST_BYTES, &bytes, error) == EPD_OK)
        (void)!nccl_comm_begin_device(cuda, bytes, NCCL_FIRST_BYTES, error);
    cuda_rail_close(cuda);
    return error->status;
}

/* ---- ends ---- */

static void nap(void)
{
    const struct timespec time = {.tv_nsec = NCCL_NAP_NS};
    (void)nanosleep(&time, NULL);
}

/* Made with the rail: an abort must not fail for want of a thread. */
static void *release(void *arg)
{
    struct transport_rail *rail = arg;
    cuda_rail_use(rail->cuda);
    (void)pthread_mutex_lock(&rail->lock);
    while (!rail->released && !rail->closed)
        (void)pthread_cond_wait(&rail->changed, &rail->lock);
    const int released = rail->released;
    (void)pthread_mutex_unlock(&rail->lock);
    if (released && rail->stage > NCCL_MEETING && !nccl_comm_leave_streams(rail->comm))
        rail->comm = NULL;
    cuda_rail_settled(rail->cuda);
    (void)pthread_mutex_lock(&rail->lock);
    rail->left = 1;
    (void)pthread_mutex_unlock(&rail->lock);
    return NULL;
}

static void rail_free(struct transport_rail *rail)
{
    if (rail->cuda)
        cuda_rail_close(rail->cuda);
    (void)pthread_cond_destroy(&rail->changed);
    (void)pthread_mutex_destroy(&rail->lock);
    free(rail);
}

static int nccl_rail_closed(struct transport_rail *rail)
{
    (void)pthread_mutex_lock(&rail->lock);
    const int left = rail->left;
    (void)pthread_mutex_unlock(&rail->lock);
    return left;
}

static void nccl_rails_end(struct transport_rail *const *rails, uint32_t n_rails)
{
    struct nccl_end ends[EPD_MAX_WORLD_SIZE];
    assert(n_rails <= EPD_MAX_WORLD_SIZE);
    for (uint32_t i = 0; i < n_rails; i++) {
        struct transport_rail *rail = rails[i];
        (void)pthread_join(rail->releaser, NULL); /* it has left */
        ends[i] = (struct nccl_end){
            .comm = rail->comm, .failed = rail->why.status != EPD_OK, .id = rail->owns_id ? &rail->id : NULL};
    }
    nccl_comm_end_all(ends, n_rails);
    for (uint32_t i = 0; i < n_rails; i++)
        rail_free(rails[i]);
}

static void nccl_rail_close(struct transport_rail *rail)
{
    (void)pthread_mutex_lock(&rail->lock);
    assert(!rail->busy);
    rail->closed = 1;
    (void)pthread_cond_signal(&rail->changed);
    (void)pthread_mutex_unlock(&rail->lock);
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
    rail->node = node;
    if (cuda_rail_open(device, TRANSPORT_RAIL_STREAMS, &rail->cuda, error))
        goto free_rail;
    if (pthread_create(&rail->releaser, NULL, release, rail) != 0) {
        (void)error_set(error, EPD_SYSTEM, "rail: no thread for aborts");
        goto free_rail;
    }
    if (node == 0 && nccl_check(rail, rail->nccl->ncclGetUniqueId(&rail->id), "id", error))
        goto end_releaser;
    rail->owns_id = node == 0;
    address->bytes = node == 0 ? sizeof rail->id : 1; /* the others are not looked for */
    address->node = node;
    memset(address->data, 0, address->bytes);
    memcpy(address->data, &rail->id, address->bytes);
    *result = rail;
    return EPD_OK;

end_releaser:
    nccl_rail_close(rail);
    (void)pthread_join(rail->releaser, NULL);
free_rail:
    rail_free(rail);
    return error->status;
}

static enum epd_status nccl_rail_connect(struct transport_rail *rail, uint32_t n_nodes, uint32_t node,
                                         const struct transport_address *addresses, uint64_t limit_ns,
                                         struct epd_error *error)
{
    const size_t bytes = 2 * (size_t)n_nodes * NCCL_FIRST_BYTES;
    if (enter(rail, error))
        return error->status;
    assert(node == rail->node);
    rail->n_nodes = n_nodes;
    rail->limit_ns = limit_ns;
    rail->begun_ns = clock_now_ns();
    for (uint32_t i = 0; i < n_nodes; i++)
        rail->names[i] = addresses[i].node;
    if (addresses[0].bytes != sizeof rail->id) {
        (void)error_set(error, EPD_PROTOCOL, "rail: the address of node %u has %u bytes, want %zu",
                        rail->names[0], addresses[0].bytes, sizeof rail->id);
        return leave(rail, error);
    }
    memcpy(&rail->id, addresses[0].data, sizeof rail->id);
    cuda_rail_connecting(rail->cuda);
    if (cuda_rail_memory(rail->cuda, bytes, &rail->first, error) == EPD_OK)
        (void)nccl_check(rail, nccl_comm_begin(&rail->comm, n_nodes, node, &rail->id), "communicator", error);
    rail->stage = NCCL_MEETING;
    return leave(rail, error);
}

/* ---- swaps ---- */

/* Begins to put all messages into the stream. */
static int begin_swap(const struct transport_rail *rail, const struct transport_move *moves, uint32_t n_parts,
                      struct CUstream_st *stream)
{
    const struct nccl_library *nccl = rail->nccl;
    int result = nccl->ncclGroupStart();
    for (uint32_t i = 0; i < n_parts * rail->n_nodes && result == NCCL_OK; i++) {
        const struct transport_move *move = &moves[i];
        const uint32_t node = i % rail->n_nodes;
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
    return nccl_check(rail, begin_swap(rail, moves, 1, cuda_rail_stream(rail->cuda)), "first swap", error);
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
    } else if (cuda_rail_passed(rail->cuda, error) && error->status == EPD_OK) {
        rail->stage = NCCL_CONNECTED;
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
    if (rail->stage == NCCL_CONNECTED) {
        rail->owns_id = 0; /* all have come for it */
        cuda_rail_settled(rail->cuda);
    }
    return leave(rail, error) || rail->stage == NCCL_CONNECTED;
}

/* NCCL does not say which node it misses; where there are two it is the other one. */
static void name_others(const struct transport_rail *rail, char *text, size_t bytes)
{
    size_t length = 0;
    text[0] = 0;
    for (uint32_t node = 0; node < rail->n_nodes && length < bytes; node++)
        if (node != rail->node)
            length += (size_t)snprintf(text + length, bytes - length, "%s%u", length ? ", " : "",
                                       rail->names[node]);
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
                                         uint32_t n_parts, struct CUstream_st *stream,
                                         struct epd_error *error)
{
    if (enter(rail, error))
        return error->status;
    if (swap_check(rail, begin_swap(rail, moves, n_parts, stream), error) == EPD_OK)
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
    .device_begin = nccl_device_begin,
    .rail_open = nccl_rail_open,
    .rail_connect = nccl_rail_connect,
    .rail_connected = nccl_rail_connected,
    .rail_swap_on = nccl_rail_swap_on,
    .rail_check = nccl_rail_check,
    .rail_abort = nccl_rail_abort,
    .rail_close = nccl_rail_close,
    .rail_closed = nccl_rail_closed,
    .rails_end = nccl_rails_end,
};
