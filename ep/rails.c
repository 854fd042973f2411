#include "ep/rails.h"

#include <assert.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "ep/clock.h"
#include "ep/node_impl.h"
#include "ep/quiet.h"

struct rail {
    struct rails *rails;
    struct lane *lane;
    struct transport_rail *rail; /* NULL until opened; lane thread, but abort */
    uint64_t closed_ns;          /* when it was told to close */
    struct transport_address address;
    struct epd_error error; /* of the job */
    struct lane_job job;
    _Atomic uint64_t n_swaps, waited_ns;
    uint64_t moved_bytes; /* lane thread */
    _Atomic uint64_t sent_bytes[EPD_MAX_NODES], received_bytes[EPD_MAX_NODES];
};

struct rails {
    const struct transport *transport;
    struct node *node_of_lanes; /* borrowed */
    uint32_t n_ranks, n_nodes, node;
    uint64_t limit_ns;
    struct transport_address *addresses; /* [n_nodes * n_ranks], owned; NULL before connect */
    struct quiet *quiet; /* in which they end, made with them; NULL where the transport needs none */
    uint32_t n_jobs_left;
    int opened; /* the rails are there: abort may touch them */
    int closed;
    _Atomic int broken; /* 2: `why` is written */
    struct epd_error why;
    struct epd_error aborted; /* before they were opened */
    struct epd_error first;   /* error of the jobs under way */
    rails_callback callback;
    void *callback_arg;
    struct rail ranks[];
};

static struct rail *rail_of_job(struct lane_job *job)
{
    return (struct rail *)((char *)job - offsetof(struct rail, job));
}

int rails_available(const struct node *node, struct epd_error *reason)
{
    return transport_find(node->backend->kind, reason) != NULL;
}

/* ---- jobs of all lanes ---- */

static void rails_free(void *arg)
{
    struct rails *rails = arg;
    free(rails->addresses);
    free(rails);
}

/* Of the lane's ranks, in a quiet moment. */
static void end_of_lane(void *arg, struct lane *lane)
{
    struct rails *rails = arg;
    struct transport_rail *of_lane[EPD_MAX_WORLD_SIZE];
    uint32_t n = 0;
    for (uint32_t i = 0; i < rails->n_ranks; i++)
        if (rails->ranks[i].lane == lane && rails->ranks[i].rail)
            of_lane[n++] = rails->ranks[i].rail;
    if (n)
        rails->transport->rails_end(of_lane, n);
}

static void end_all(struct rails *rails)
{
    if (rails->quiet)
        quiet_post(rails->quiet);
    else
        rails_free(rails);
}

static void complete_job(struct lane_job *job)
{
    struct rail *rail = rail_of_job(job);
    struct rails *rails = rail->rails;
    if (rail->error.status && !rails->first.status)
        rails->first = rail->error;
    if (--rails->n_jobs_left)
        return;
    if (rails->closed) {
        end_all(rails);
        return;
    }
    rails->opened = 1;
    if (rails->aborted.status)
        rails_abort(rails, &rails->aborted);
    rails->callback(rails->callback_arg, &rails->first);
}

static void post_all(struct rails *rails, void (*run)(struct lane_job *job, struct lane *lane),
                     int (*poll)(struct lane_job *job, struct lane *lane), const char *what)
{
    rails->n_jobs_left = rails->n_ranks;
    rails->first = (struct epd_error){.status = EPD_OK};
    for (uint32_t i = 0; i < rails->n_ranks; i++) {
        struct rail *rail = &rails->ranks[i];
        rail->error = (struct epd_error){.status = EPD_OK};
        rail->job = (struct lane_job){.run = run, .poll = poll, .complete = complete_job, .what = what};
        lane_post(rail->lane, &rail->job);
    }
}

static void run_open(struct lane_job *job, struct lane *lane)
{
    struct rail *rail = rail_of_job(job);
    (void)!rail->rails->transport->rail_open(lane_device(lane), rail->rails->node, &rail->rail,
                                             &rail->address, &rail->error);
}

/* A library may take its time: other jobs of the lane go on meanwhile. */
static int poll_connect(struct lane_job *job, struct lane *lane)
{
    struct rail *rail = rail_of_job(job);
    (void)lane;
    return rail->error.status || rail->rails->transport->rail_connected(rail->rail, &rail->error);
}

static void run_connect(struct lane_job *job, struct lane *lane)
{
    struct rail *rail = rail_of_job(job);
    const struct rails *rails = rail->rails;
    struct transport_address mine[EPD_MAX_NODES];
    (void)lane;
    for (uint32_t node = 0; node < rails->n_nodes; node++)
        mine[node] = rails->addresses[node * rails->n_ranks + (uint32_t)(rail - rails->ranks)];
    (void)!rails->transport->rail_connect(rail->rail, rails->n_nodes, rails->node, mine, rails->limit_ns,
                                          &rail->error);
}

static void run_close(struct lane_job *job, struct lane *lane)
{
    struct rail *rail = rail_of_job(job);
    (void)lane;
    rail->closed_ns = clock_now_ns();
    if (rail->rail)
        rail->rails->transport->rail_close(rail->rail);
    if (!rail->rails->transport->rails_end)
        rail->rail = NULL;
}

/* What waits for streams does so here, where other jobs go on, and not in the quiet moment. A swap that does not leave is a
 * kernel that does not end: no moment would be quiet, and only a new process helps. */
static int poll_close(struct lane_job *job, struct lane *lane)
{
    struct rail *rail = rail_of_job(job);
    const uint64_t limit_ns = rail->rails->node_of_lanes->step_lost_ns;
    struct epd_error lost;
    if (!rail->rail || rail->rails->transport->rail_closed(rail->rail))
        return 1;
    if (clock_now_ns() - rail->closed_ns < limit_ns)
        return 0;
    (void)error_set(&lost, EPD_CUDA, "rail: a swap has not left its stream in %.3g s: its device is given up",
                    (double)limit_ns / 1e9);
    lane_lose_device(lane, &lost);
    rail->rail = NULL; /* the process takes it along */
    return 1;
}

/* ---- the node's beginning ---- */

struct rails_beginning {
    const struct transport *transport;
    uint32_t n_left;
    struct epd_error first;
    rails_callback callback;
    void *arg;
    struct device_beginning {
        struct lane_job job;
        struct rails_beginning *all;
        struct epd_error error;
    } devices[];
};

static struct device_beginning *device_of_job(struct lane_job *job)
{
    return (struct device_beginning *)((char *)job - offsetof(struct device_beginning, job));
}

static void run_begin(struct lane_job *job, struct lane *lane)
{
    struct device_beginning *device = device_of_job(job);
    (void)lane;
    (void)!device->all->transport->device_begin(&device->error);
}

static void complete_begin(struct lane_job *job)
{
    struct device_beginning *device = device_of_job(job);
    struct rails_beginning *all = device->all;
    if (device->error.status && !all->first.status)
        all->first = device->error;
    if (--all->n_left)
        return;
    all->callback(all->arg, &all->first);
    free(all);
}

enum epd_status rails_begin(struct node *node, rails_callback callback, void *arg, struct epd_error *error)
{
    const struct transport *transport = transport_find(node->backend->kind, error);
    const struct epd_error nothing = {.status = EPD_OK};
    if (!transport)
        return error->status;
    if (!transport->device_begin) {
        callback(arg, &nothing);
        return EPD_OK;
    }
    struct rails_beginning *all = calloc(1, sizeof *all + node->n_devices * sizeof all->devices[0]);
    if (!all)
        return error_set(error, EPD_NO_MEMORY, "rails: %u devices", node->n_devices);
    all->transport = transport;
    all->callback = callback;
    all->arg = arg;
    all->n_left = node->n_devices;
    for (uint32_t i = 0; i < node->n_devices; i++) {
        all->devices[i].all = all;
        all->devices[i].job = (struct lane_job){
            .run = run_begin, .complete = complete_begin, .what = "the first work of the rails"};
        lane_post(node->lanes[i], &all->devices[i].job);
    }
    return EPD_OK;
}

/* ---- life ---- */

enum epd_status rails_open(struct node *node, uint32_t node_idx, uint32_t n_ranks, const uint32_t *device_idx,
                           rails_callback callback, void *arg, struct rails **result, struct epd_error *error)
{
    if (!rails_available(node, error))
        return error->status;
    struct rails *rails = calloc(1, sizeof *rails + n_ranks * sizeof rails->ranks[0]);
    if (!rails)
        return error_set(error, EPD_NO_MEMORY, "rails: %u ranks", n_ranks);
    rails->transport = transport_find(node->backend->kind, error);
    if (rails->transport->rails_end &&
        quiet_create(node, end_of_lane, rails_free, rails, &rails->quiet, error)) {
        free(rails);
        return error->status;
    }
    rails->n_ranks = n_ranks;
    rails->node = node_idx;
    rails->node_of_lanes = node;
    rails->callback = callback;
    rails->callback_arg = arg;
    for (uint32_t i = 0; i < n_ranks; i++) {
        assert(device_idx[i] < node->n_devices);
        rails->ranks[i].rails = rails;
        rails->ranks[i].lane = node->lanes[device_idx[i]];
    }
    *result = rails;
    post_all(rails, run_open, NULL, "a rail that is opened");
    return EPD_OK;
}

const struct transport_address *rails_address(const struct rails *rails, uint32_t rank_idx)
{
    return &rails->ranks[rank_idx].address;
}

enum epd_status rails_connect(struct rails *rails, uint32_t n_nodes,
                              const struct transport_address *addresses, uint64_t limit_ns,
                              rails_callback callback, void *arg, struct epd_error *error)
{
    const size_t n = (size_t)n_nodes * rails->n_ranks;
    assert(n_nodes <= EPD_MAX_NODES && rails->n_jobs_left == 0);
    rails->addresses = calloc(n, sizeof *rails->addresses);
    if (!rails->addresses)
        return error_set(error, EPD_NO_MEMORY, "rails: %zu addresses", n);
    memcpy(rails->addresses, addresses, n * sizeof *addresses);
    rails->n_nodes = n_nodes;
    rails->limit_ns = limit_ns;
    rails->callback = callback;
    rails->callback_arg = arg;
    post_all(rails, run_connect, poll_connect, "a rail that is connected");
    return EPD_OK;
}

/* Any thread; the first one counts. */
static void note_broken(struct rails *rails, const struct epd_error *why)
{
    int whole = 0;
    if (!atomic_compare_exchange_strong(&rails->broken, &whole, 1))
        return;
    rails->why = *why;
    atomic_store(&rails->broken, 2);
}

void rails_abort(struct rails *rails, const struct epd_error *why)
{
    note_broken(rails, why);
    if (!rails->opened) {
        rails->aborted = *why;
        return;
    }
    for (uint32_t i = 0; i < rails->n_ranks && !rails->closed; i++)
        if (rails->ranks[i].rail)
            rails->transport->rail_abort(rails->ranks[i].rail, why);
}

static void ignore(void *arg, const struct epd_error *error)
{
    (void)arg, (void)error;
}

void rails_close(struct rails *rails)
{
    assert(!rails->closed);
    rails->callback = ignore;
    if (rails->n_jobs_left == 0) {
        rails->closed = 1;
        post_all(rails, run_close, rails->transport->rail_closed ? poll_close : NULL,
                 "a rail that is closed");
        return;
    }
    assert(!"rails that are being opened or connected are closed by their callback");
}

uint32_t rails_node_name(const struct rails *rails, uint32_t node)
{
    return node < rails->n_nodes ? rails->addresses[(size_t)node * rails->n_ranks].node : node;
}

uint64_t rails_moved_bytes(const struct rails *rails, uint32_t rank_idx)
{
    return rails->ranks[rank_idx].moved_bytes;
}

void rails_traffic(const struct rails *rails, struct rails_traffic *traffic)
{
    memset(traffic, 0, sizeof *traffic);
    for (uint32_t i = 0; i < rails->n_ranks; i++) {
        const struct rail *rail = &rails->ranks[i];
        traffic->n_swaps += atomic_load(&rail->n_swaps);
        traffic->waited_ns += atomic_load(&rail->waited_ns);
        for (uint32_t node = 0; node < rails->n_nodes; node++) {
            traffic->sent_bytes[node] += atomic_load(&rail->sent_bytes[node]);
            traffic->received_bytes[node] += atomic_load(&rail->received_bytes[node]);
        }
    }
}

const char *rails_transport(const struct rails *rails)
{
    return rails->transport->name;
}

/* ---- lane thread ---- */

static enum epd_status note_swap(struct rails *rails, struct rail *rail, uint64_t begun_ns,
                                 enum epd_status status, const struct epd_error *error)
{
    atomic_fetch_add(&rail->waited_ns, clock_now_ns() - begun_ns);
    if (status)
        note_broken(rails, error);
    else
        atomic_fetch_add(&rail->n_swaps, 1);
    return status;
}

static void count_bytes(const struct rails *rails, struct rail *rail, uint32_t node, uint64_t sent,
                        uint64_t received)
{
    if (node == rails->node)
        return;
    rail->moved_bytes += sent + received;
    atomic_fetch_add(&rail->sent_bytes[node], sent);
    atomic_fetch_add(&rail->received_bytes[node], received);
}

enum epd_status rails_swap(struct rails *rails, uint32_t rank_idx, struct transport_part *parts,
                           struct epd_error *error)
{
    struct rail *rail = &rails->ranks[rank_idx];
    assert(rails->transport->rail_swap);
    const uint64_t begun_ns = clock_now_ns();
    enum epd_status status = rails->transport->rail_swap(rail->rail, parts, error);
    if (note_swap(rails, rail, begun_ns, status, error))
        return status;
    for (uint32_t node = 0; node < rails->n_nodes; node++)
        count_bytes(rails, rail, node, parts[node].send_bytes, parts[node].received_bytes);
    return EPD_OK;
}

enum epd_status rails_swap_on(struct rails *rails, uint32_t rank_idx, const struct transport_move *moves,
                              uint32_t n_parts, struct CUstream_st *stream, struct epd_error *error)
{
    struct rail *rail = &rails->ranks[rank_idx];
    assert(rails->transport->rail_swap_on);
    const uint64_t begun_ns = clock_now_ns();
    enum epd_status status = rails->transport->rail_swap_on(rail->rail, moves, n_parts, stream, error);
    if (note_swap(rails, rail, begun_ns, status, error))
        return status;
    for (uint32_t i = 0; i < n_parts * rails->n_nodes; i++)
        count_bytes(rails, rail, i % rails->n_nodes, moves[i].send_bytes, moves[i].receive_bytes);
    return EPD_OK;
}

enum epd_status rails_check(struct rails *rails, uint32_t rank_idx, struct epd_error *error)
{
    enum epd_status status = rails->transport->rail_check(rails->ranks[rank_idx].rail, error);
    if (status)
        note_broken(rails, error);
    return status;
}

int rails_broken(const struct rails *rails, struct epd_error *why)
{
    int broken = atomic_load(&rails->broken);
    while (broken == 1) /* who writes down why is a copy away; all lanes are to say the same */
        broken = atomic_load(&rails->broken);
    if (!broken)
        return 0;
    *why = rails->why;
    return 1;
}
