#include "tests/unit/ep/fake_nccl.h"

#include <check.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "ep/cuda_rail.h"
#include "ep/nccl_library.h"
#include "ep/transport.h"

#define MAX_IDS 64

struct fake_nccl fake_nccl;

struct CUstream_st {
    _Atomic int n_waiting; /* swaps that are in it, as long as nobody answers */
};

enum doing { BEGINNING, IDLE, PUTTING, FINISHING };

struct ncclComm {
    uint32_t n_ranks;
    int id;
    enum doing doing;
    struct CUstream_st *stream; /* of the latest swap */
    int n_waiting;              /* swaps of it */
    int finished;
};

/* Of the group that is being put together. */
static _Thread_local struct ncclComm *grouped;
static _Atomic int ids[MAX_IDS];        /* 1: somebody listens */
static struct ncclComm *_Atomic latest; /* one that stays with its device is nobody's */

static void must(int holds, const char *what)
{
    if (!holds) {
        ck_abort_msg("fake nccl: %s", what);
        abort();
    }
}

static void sleep_ms(int ms)
{
    const struct timespec time = {.tv_sec = ms / 1000, .tv_nsec = (long)(ms % 1000) * 1000000};
    (void)nanosleep(&time, NULL);
}

void fake_nccl_reset(void)
{
    memset(&fake_nccl, 0, sizeof fake_nccl);
    memset(ids, 0, sizeof ids);
    fake_nccl.meets = fake_nccl.takes = fake_nccl.answers = fake_nccl.leaves = fake_nccl.finishes = 1;
}

void fake_nccl_expect_clean(int n_first)
{
    for (int i = 0; i < 2000 && fake_nccl.n_comms > n_first; i++)
        sleep_ms(1);
    ck_assert_int_eq(fake_nccl.n_comms, n_first);
    ck_assert_int_eq(fake_nccl.n_ids, 0);
    ck_assert_int_eq(fake_nccl.n_rails, 0);
    ck_assert_int_eq(fake_nccl.n_channels, 0);
    ck_assert_int_eq(fake_nccl.n_connecting, 0);
}

/* ---- the library ---- */

static void return_id(int id)
{
    if (atomic_exchange(&ids[id], 0))
        fake_nccl.n_ids--;
}

static int get_unique_id(struct nccl_id *id)
{
    if (fake_nccl.id_result)
        return fake_nccl.id_result;
    int at = 1;
    while (at < MAX_IDS && atomic_exchange(&ids[at], 1))
        at++;
    must(at < MAX_IDS, "too many ids");
    memset(id, 0, sizeof *id);
    memcpy(id->bytes, &at, sizeof at);
    fake_nccl.n_ids++;
    return NCCL_OK;
}

static int init_rank(struct ncclComm **comm, int n_ranks, struct nccl_id id, int rank,
                     struct nccl_config *config)
{
    must(config->size == sizeof *config && config->magic == NCCL_CONFIG_MAGIC && config->blocking == 0,
         "a configuration that is none");
    must(rank >= 0 && rank < n_ranks, "a rank that is none");
    const int refused = atomic_exchange(&fake_nccl.begin_result, 0);
    if (refused)
        return refused;
    struct ncclComm *begun = calloc(1, sizeof *begun);
    must(begun != NULL, "memory");
    begun->n_ranks = (uint32_t)n_ranks;
    memcpy(&begun->id, id.bytes, sizeof begun->id);
    fake_nccl.n_comms++;
    latest = *comm = begun;
    return NCCL_IN_PROGRESS;
}

static int is_done(const struct ncclComm *comm)
{
    switch (comm->doing) {
    case BEGINNING:
        return comm->n_ranks == 1 || fake_nccl.meets;
    case PUTTING:
        return fake_nccl.takes;
    case FINISHING:
        return fake_nccl.finishes;
    case IDLE:
        break;
    }
    return 1;
}

static int get_async_error(struct ncclComm *comm, int *result)
{
    *result = fake_nccl.async_result;
    if (*result)
        return NCCL_OK;
    if (!is_done(comm)) {
        *result = NCCL_IN_PROGRESS;
        return NCCL_OK;
    }
    if (comm->doing == BEGINNING)
        return_id(comm->id);
    comm->finished |= comm->doing == FINISHING;
    comm->doing = IDLE;
    return NCCL_OK;
}

static void leave_stream(struct ncclComm *comm)
{
    if (comm->stream)
        atomic_fetch_sub(&comm->stream->n_waiting, comm->n_waiting);
    comm->n_waiting = 0;
}

static void *go(void *arg)
{
    sleep_ms(fake_nccl.go_ms);
    free(arg);
    fake_nccl.n_comms--;
    return NULL;
}

static int end_comm(struct ncclComm *comm)
{
    pthread_t thread;
    leave_stream(comm);
    must(pthread_create(&thread, NULL, go, comm) == 0 && pthread_detach(thread) == 0, "thread");
    return NCCL_IN_PROGRESS;
}

static int finalize(struct ncclComm *comm)
{
    must(comm->doing == IDLE, "finalized while it is busy");
    comm->doing = FINISHING;
    return NCCL_IN_PROGRESS;
}

static void note_end(void)
{
    void (*on_end)(void) = fake_nccl.on_end;
    if (on_end)
        on_end();
}

static int destroy(struct ncclComm *comm)
{
    must(comm->finished, "destroyed before it had finished");
    note_end();
    fake_nccl.n_destroys++;
    return end_comm(comm);
}

/* The listener of an id ends when one comes alone. */
static int abort_comm(struct ncclComm *comm)
{
    if (comm->doing != PUTTING)
        note_end();
    if (comm->n_ranks == 1)
        return_id(comm->id);
    fake_nccl.n_aborts++;
    return end_comm(comm);
}

static int shrink(struct ncclComm *comm, int *excluded, int n_excluded, struct ncclComm **shrunk,
                  struct nccl_config *config, int flags)
{
    (void)excluded, (void)config;
    must(n_excluded == 0 && shrunk && flags == NCCL_SHRINK_BY_ABORT, "another shrink than by abort");
    while (!fake_nccl.leaves)
        sleep_ms(1);
    leave_stream(comm);
    fake_nccl.n_shrinks++;
    return NCCL_SYSTEM_ERROR; /* no list of ranks */
}

static int group_start(void)
{
    must(!grouped, "a group in a group");
    return NCCL_OK;
}

static int group_end(void)
{
    struct ncclComm *comm = grouped;
    grouped = NULL;
    if (!comm)
        return NCCL_OK;
    fake_nccl.n_swaps++;
    return NCCL_IN_PROGRESS;
}

static int add_to_group(struct ncclComm *comm, struct CUstream_st *stream)
{
    must(comm->doing == IDLE || grouped == comm, "a swap while it is busy");
    if (fake_nccl.send_result)
        return fake_nccl.send_result;
    if (!grouped) {
        grouped = comm;
        comm->doing = PUTTING;
        comm->stream = stream;
        if (!fake_nccl.answers) {
            comm->n_waiting++;
            atomic_fetch_add(&stream->n_waiting, 1);
        }
    }
    return NCCL_OK;
}

static int send_to(const void *data, size_t count, int type, int peer, struct ncclComm *comm,
                   struct CUstream_st *stream)
{
    must(data && count && type == NCCL_TYPE_INT8 && peer >= 0 && peer < (int)comm->n_ranks, "a send");
    void (*on_send)(const void *, uint64_t) = fake_nccl.on_send;
    fake_nccl.sent_bytes += count;
    if (on_send)
        on_send(data, count);
    return add_to_group(comm, stream);
}

static int receive_from(void *data, size_t count, int type, int peer, struct ncclComm *comm,
                        struct CUstream_st *stream)
{
    must(data && count && type == NCCL_TYPE_INT8 && peer >= 0 && peer < (int)comm->n_ranks, "a receive");
    void (*on_receive)(void *, uint64_t) = fake_nccl.on_receive;
    fake_nccl.received_bytes += count;
    if (on_receive)
        on_receive(data, count);
    return add_to_group(comm, stream);
}

static int get_version(int *version)
{
    *version = NCCL_OLDEST;
    return NCCL_OK;
}

static const char *error_string(int result)
{
    return result == NCCL_REMOTE_ERROR ? "remote error" : "an error";
}

static const char *last_error(struct ncclComm *comm)
{
    (void)comm;
    return "";
}

static const struct nccl_library library = {
    .ncclGetVersion = get_version,
    .ncclGetErrorString = error_string,
    .ncclGetLastError = last_error,
    .ncclGetUniqueId = get_unique_id,
    .ncclCommInitRankConfig = init_rank,
    .ncclCommGetAsyncError = get_async_error,
    .ncclCommFinalize = finalize,
    .ncclCommDestroy = destroy,
    .ncclCommAbort = abort_comm,
    .ncclCommShrink = shrink,
    .ncclGroupStart = group_start,
    .ncclGroupEnd = group_end,
    .ncclSend = send_to,
    .ncclRecv = receive_from,
};

const struct nccl_library *nccl_library(void)
{
    return &library;
}

enum epd_status nccl_library_load(const char *devices, struct epd_error *error)
{
    (void)devices, (void)error;
    return EPD_OK;
}

/* ---- streams ---- */

struct CUstream_st *fake_stream_create(void)
{
    struct CUstream_st *stream = calloc(1, sizeof *stream);
    must(stream != NULL, "memory");
    return stream;
}

int fake_stream_passed(const struct CUstream_st *stream)
{
    return fake_nccl.answers || atomic_load(&stream->n_waiting) == 0;
}

void fake_stream_destroy(struct CUstream_st *stream)
{
    must(fake_stream_passed(stream), "a stream goes, and a swap is in it");
    free(stream);
}

struct cuda_rail {
    uint32_t channels;
    struct CUstream_st *stream;
    char *memory;
    _Atomic int connecting;
};

enum epd_status cuda_rail_open(struct backend_device *device, uint32_t channels, struct cuda_rail **rail,
                               struct epd_error *error)
{
    (void)device;
    if (fake_nccl.no_channels)
        return error_set(error, EPD_QUOTA, "no more channels");
    *rail = calloc(1, sizeof **rail);
    must(*rail != NULL, "memory");
    (*rail)->stream = fake_stream_create();
    (*rail)->channels = channels;
    fake_nccl.n_channels += (int)channels;
    fake_nccl.n_rails++;
    return EPD_OK;
}

void cuda_rail_close(struct cuda_rail *rail)
{
    cuda_rail_settled(rail);
    fake_stream_destroy(rail->stream);
    fake_nccl.n_channels -= (int)rail->channels;
    fake_nccl.n_rails--;
    free(rail->memory);
    free(rail);
}

void cuda_rail_use(const struct cuda_rail *rail)
{
    (void)rail;
}

struct CUstream_st *cuda_rail_stream(const struct cuda_rail *rail)
{
    return rail->stream;
}

enum epd_status cuda_rail_memory(struct cuda_rail *rail, size_t bytes, char **memory, struct epd_error *error)
{
    must(!rail->memory, "memory twice");
    if (fake_nccl.no_memory)
        return error_set(error, EPD_NO_MEMORY, "rail: no memory");
    *memory = rail->memory = calloc(1, bytes);
    return EPD_OK;
}

int cuda_rail_passed(const struct cuda_rail *rail, struct epd_error *error)
{
    if (fake_nccl.stream_lost)
        (void)error_set(error, EPD_CUDA, "rail: the device is lost");
    return fake_nccl.stream_lost || fake_stream_passed(rail->stream);
}

void cuda_rail_connecting(struct cuda_rail *rail)
{
    if (!atomic_exchange(&rail->connecting, 1))
        fake_nccl.n_connecting++;
}

void cuda_rail_settled(struct cuda_rail *rail)
{
    if (atomic_exchange(&rail->connecting, 0))
        fake_nccl.n_connecting--;
}

struct CUstream_st *cuda_rail_queue_stream(const struct backend_queue *queue)
{
    (void)queue;
    return fake_nccl.queue_stream;
}

enum epd_status cuda_rail_write(struct backend_queue *queue, uint64_t *to, const uint64_t *from, size_t n,
                                struct epd_error *error)
{
    (void)queue, (void)error;
    must(n <= CUDA_RAIL_WORDS, "too many words at once");
    memcpy(to, from, n * sizeof *to);
    return EPD_OK;
}
