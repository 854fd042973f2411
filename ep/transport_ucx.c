/* Rails over UCX, for the host backend: a worker and its endpoints for each rail, progressed by the lane that swaps. */
#include <assert.h>
#include <errno.h>
#include <poll.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "ep/clock.h"
#include "ep/rail_order.h"
#include "ep/transport.h"
#include "ep/ucx_library.h"

extern const struct transport transport_ucx;

/* Looks before sleeping: some 20 us, so that a message that is on its way costs no wake-up. */
#define UCX_SPINS 200
/* How long requests of a failed rail may take to end after they were cancelled. */
#define UCX_CANCEL_NS 20000000000ull

/* How long the end of a rail waits until its last messages are on their way. */
#define UCX_FLUSH_NS 500000000ull

#define UCX_OPTION_BYTES 256

/* Set once by load. */
static char option_ways[UCX_OPTION_BYTES], option_devices[UCX_OPTION_BYTES];

struct ucx_peer {
    struct transport_rail *rail;
    uint32_t node, name;            /* place on the rail; what errors call it */
    ucp_ep_h endpoint;              /* NULL until connected */
    ucs_status_t lost;              /* set by the error handler, on the lane */
    void *send, *receive, *closing; /* requests under way, or NULL */
    uint64_t received;
};

struct transport_rail {
    const struct ucx_library *ucx;
    ucp_context_h context;
    ucp_worker_h worker;
    int event_fd;
    uint32_t n_nodes, node;
    uint64_t limit_ns;
    uint64_t n_swaps;        /* the number of the next one, the same on all nodes */
    struct ucx_peer *peers;  /* [n_nodes] owned */
    struct epd_error broken; /* OK while the rail works */
    _Atomic int aborted;     /* 2: `why` is written */
    struct epd_error why;
};

static enum epd_status ucx_check(const struct ucx_library *ucx, ucs_status_t status, const char *what,
                                 struct epd_error *error)
{
    if (status == UCS_OK)
        return EPD_OK;
    return error_set(error, status == UCS_ERR_NO_MEMORY ? EPD_NO_MEMORY : EPD_SYSTEM, "ucx %s: %s", what,
                     ucx->status_string(status));
}

static enum epd_status ucx_load(const struct transport_options *options, struct epd_error *error)
{
    (void)snprintf(option_ways, sizeof option_ways, "%s", options->ways);
    (void)snprintf(option_devices, sizeof option_devices, "%s", options->devices);
    return ucx_library_load(error);
}

static enum epd_status open_context(struct transport_rail *rail, struct epd_error *error)
{
    const struct ucx_library *ucx = rail->ucx;
    ucp_config_t *config;
    if (ucx_check(ucx, ucx->ucp_config_read(NULL, NULL, &config), "config", error))
        return error->status;
    ucs_status_t status = UCS_OK;
    if (option_ways[0])
        status = ucx->ucp_config_modify(config, "TLS", option_ways);
    if (status == UCS_OK && option_devices[0])
        status = ucx->ucp_config_modify(config, "NET_DEVICES", option_devices);
    const ucp_params_t params = {.field_mask = UCP_PARAM_FIELD_FEATURES,
                                 .features = UCP_FEATURE_TAG | UCP_FEATURE_WAKEUP};
    if (status == UCS_OK)
        status = ucx->ucp_init_version(UCP_API_MAJOR, UCP_API_MINOR, &params, config, &rail->context);
    ucx->ucp_config_release(config);
    return ucx_check(ucx, status, "context (fabric ways and devices)", error);
}

static enum epd_status open_worker(struct transport_rail *rail, struct epd_error *error)
{
    const struct ucx_library *ucx = rail->ucx;
    const ucp_worker_params_t params = {.field_mask = UCP_WORKER_PARAM_FIELD_THREAD_MODE,
                                        .thread_mode = UCS_THREAD_MODE_SINGLE};
    if (ucx_check(ucx, ucx->ucp_worker_create(rail->context, &params, &rail->worker), "worker", error))
        return error->status;
    return ucx_check(ucx, ucx->ucp_worker_get_efd(rail->worker, &rail->event_fd), "event fd", error);
}

static enum epd_status take_address(struct transport_rail *rail, struct transport_address *address,
                                    struct epd_error *error)
{
    const struct ucx_library *ucx = rail->ucx;
    ucp_address_t *bytes;
    size_t length;
    if (ucx_check(ucx, ucx->ucp_worker_get_address(rail->worker, &bytes, &length), "address", error))
        return error->status;
    if (length > sizeof address->data)
        error_set(error, EPD_UNSUPPORTED,
                  "ucx address: %zu bytes, want at most %zu; name fewer devices (fabric devices)", length,
                  sizeof address->data);
    else
        memcpy(address->data, bytes, length);
    address->bytes = (uint32_t)length;
    ucx->ucp_worker_release_address(rail->worker, bytes);
    return length > sizeof address->data ? error->status : EPD_OK;
}

static void ucx_rail_close(struct transport_rail *rail);

static enum epd_status ucx_rail_open(struct backend_device *device, uint32_t node,
                                     struct transport_rail **result, struct transport_address *address,
                                     struct epd_error *error)
{
    (void)device;
    struct transport_rail *rail = calloc(1, sizeof *rail);
    if (!rail)
        return error_set(error, EPD_NO_MEMORY, "rail: %zu bytes", sizeof *rail);
    rail->ucx = ucx_library();
    assert(rail->ucx);
    if (open_context(rail, error) || open_worker(rail, error) || take_address(rail, address, error)) {
        ucx_rail_close(rail);
        return error->status;
    }
    address->node = node;
    *result = rail;
    return EPD_OK;
}

/* Runs inside progress, on the lane. */
static void on_endpoint_error(void *arg, ucp_ep_h endpoint, ucs_status_t status)
{
    (void)endpoint;
    ((struct ucx_peer *)arg)->lost = status;
}

static enum epd_status ucx_rail_connect(struct transport_rail *rail, uint32_t n_nodes, uint32_t node,
                                        const struct transport_address *addresses, uint64_t limit_ns,
                                        struct epd_error *error)
{
    rail->peers = calloc(n_nodes, sizeof *rail->peers);
    if (!rail->peers)
        return error_set(error, EPD_NO_MEMORY, "rail: %u nodes", n_nodes);
    rail->n_nodes = n_nodes;
    rail->node = node;
    rail->limit_ns = limit_ns;
    for (uint32_t i = 0; i < n_nodes; i++) {
        struct ucx_peer *peer = &rail->peers[i];
        peer->rail = rail;
        peer->node = i;
        peer->name = addresses[i].node;
        if (i == node)
            continue;
        const ucp_ep_params_t params = {
            .field_mask = UCP_EP_PARAM_FIELD_REMOTE_ADDRESS | UCP_EP_PARAM_FIELD_ERR_HANDLING_MODE |
                          UCP_EP_PARAM_FIELD_ERR_HANDLER,
            .address = (const ucp_address_t *)(const void *)addresses[i].data,
            .err_mode = UCP_ERR_HANDLING_MODE_PEER,
            .err_handler = {.cb = on_endpoint_error, .arg = peer},
        };
        ucs_status_t status = rail->ucx->ucp_ep_create(rail->worker, &params, &peer->endpoint);
        if (status != UCS_OK)
            return error_set(error, EPD_PEER_LOST, "node %u cannot be reached: ucx endpoint: %s", peer->name,
                             rail->ucx->status_string(status));
    }
    return EPD_OK;
}

/* Nodes are met by their first messages. */
static int ucx_rail_connected(struct transport_rail *rail, struct epd_error *error)
{
    (void)rail;
    error->status = EPD_OK;
    return 1;
}

/* ---- swap ---- */

static uint64_t tag_of(uint64_t swap, uint32_t sender)
{
    return swap << 8 | sender;
}

static void on_received(void *request, ucs_status_t status, const ucp_tag_recv_info_t *info, void *arg)
{
    (void)request;
    if (status == UCS_OK)
        ((struct ucx_peer *)arg)->received = info->length;
}

/* NULL: done; an error: done; else under way. */
static ucs_status_t take_request(void **place, ucs_status_ptr_t request)
{
    *place = NULL;
    if (UCS_PTR_IS_ERR(request))
        return UCS_PTR_STATUS(request);
    *place = request;
    return UCS_OK;
}

static ucs_status_t start_peer(struct transport_rail *rail, struct ucx_peer *peer,
                               struct transport_part *part)
{
    const struct ucx_library *ucx = rail->ucx;
    /* The length of a message that was there already is told by the callback only. */
    const ucp_request_param_t receive = {
        .op_attr_mask =
            UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA | UCP_OP_ATTR_FLAG_NO_IMM_CMPL,
        .cb.recv = on_received,
        .user_data = peer,
    };
    peer->received = 0;
    ucs_status_t status = take_request(
        &peer->receive, ucx->ucp_tag_recv_nbx(rail->worker, part->receive, part->receive_room,
                                              tag_of(rail->n_swaps, peer->node), UINT64_MAX, &receive));
    if (status != UCS_OK)
        return status;
    const ucp_request_param_t send = {0};
    return take_request(&peer->send, ucx->ucp_tag_send_nbx(peer->endpoint, part->send, part->send_bytes,
                                                           tag_of(rail->n_swaps, rail->node), &send));
}

/* Frees the request if it has ended; 1 if there is none any more. */
static int reap(const struct ucx_library *ucx, void **request, ucs_status_t *status)
{
    if (!*request)
        return 1;
    *status = ucx->ucp_request_check_status(*request);
    if (*status == UCS_INPROGRESS) {
        *status = UCS_OK;
        return 0;
    }
    ucx->ucp_request_free(*request);
    *request = NULL;
    return 1;
}

static enum epd_status lose(struct transport_rail *rail, uint32_t node, ucs_status_t status)
{
    return error_set(&rail->broken, EPD_PEER_LOST, "node %u is lost: ucx: %s", rail->peers[node].name,
                     rail->ucx->status_string(status));
}

/* 1 when all messages of the swap are through; a failure is in rail->broken. */
static int look(struct transport_rail *rail)
{
    int n_left = 0;
    for (uint32_t i = 0; i < rail->n_nodes; i++) {
        struct ucx_peer *peer = &rail->peers[i];
        ucs_status_t sent = UCS_OK, received = UCS_OK;
        if (i == rail->node)
            continue;
        n_left += !reap(rail->ucx, &peer->send, &sent);
        n_left += !reap(rail->ucx, &peer->receive, &received);
        ucs_status_t status = peer->lost != UCS_OK ? peer->lost : sent != UCS_OK ? sent : received;
        if (status != UCS_OK && !rail->broken.status)
            (void)lose(rail, i, status);
    }
    return n_left == 0;
}

/* Sleeps until something has come, at most TRANSPORT_LOOK_MS. */
static void nap(struct transport_rail *rail)
{
    ucs_status_t status = rail->ucx->ucp_worker_arm(rail->worker);
    if (status != UCS_OK) /* busy: there is something already */
        return;
    struct pollfd fd = {.fd = rail->event_fd, .events = POLLIN};
    (void)poll(&fd, 1, TRANSPORT_LOOK_MS);
}

/* Who has not been heard of in this swap. */
static void name_silent(const struct transport_rail *rail, char *text, size_t bytes)
{
    size_t length = 0;
    text[0] = 0;
    for (uint32_t i = 0; i < rail->n_nodes && length < bytes; i++)
        if (rail->peers[i].receive)
            length += (size_t)snprintf(text + length, bytes - length, " %u", rail->peers[i].name);
}

static void check_limits(struct transport_rail *rail, uint64_t begun_ns)
{
    if (atomic_load(&rail->aborted) == 2)
        rail->broken = rail->why;
    else if (clock_now_ns() - begun_ns > rail->limit_ns) {
        char silent[64];
        name_silent(rail, silent, sizeof silent);
        (void)error_set(&rail->broken, EPD_TIMEOUT, "a swap did not end in %llu ms, still due from node%s",
                        (unsigned long long)(rail->limit_ns / 1000000), silent);
    }
}

static void wait_all(struct transport_rail *rail)
{
    const uint64_t begun_ns = clock_now_ns();
    for (uint32_t spins = 0; !rail->broken.status; spins++) {
        const unsigned progressed = rail->ucx->ucp_worker_progress(rail->worker);
        if (look(rail))
            return;
        check_limits(rail, begun_ns); /* also while something comes: that may go on for ever */
        if (progressed)
            spins = 0;
        else if (spins > UCX_SPINS && !rail->broken.status)
            nap(rail);
    }
}

/* The rail is broken, or ends: nothing may touch the caller's memory when this returns. */
static void cancel_all(struct transport_rail *rail)
{
    const struct ucx_library *ucx = rail->ucx;
    const uint64_t begun_ns = clock_now_ns();
    const ucp_request_param_t force = {.op_attr_mask = UCP_OP_ATTR_FIELD_FLAGS,
                                       .flags = UCP_EP_CLOSE_FLAG_FORCE};
    for (uint32_t i = 0; i < rail->n_nodes; i++) {
        struct ucx_peer *peer = &rail->peers[i];
        if (peer->receive)
            ucx->ucp_request_cancel(rail->worker, peer->receive);
        if (peer->endpoint)
            (void)take_request(&peer->closing, ucx->ucp_ep_close_nbx(peer->endpoint, &force));
        peer->endpoint = NULL;
    }
    for (int n_left = 1; n_left;) {
        ucs_status_t ignored;
        (void)ucx->ucp_worker_progress(rail->worker);
        n_left = !look(rail);
        for (uint32_t i = 0; i < rail->n_nodes; i++)
            n_left += !reap(ucx, &rail->peers[i].closing, &ignored);
        assert(clock_now_ns() - begun_ns < UCX_CANCEL_NS); /* it would write into freed memory */
    }
}

static enum epd_status ucx_rail_swap(struct transport_rail *rail, struct transport_part *parts,
                                     struct epd_error *error)
{
    if (!rail->broken.status && atomic_load(&rail->aborted) == 2) {
        rail->broken = rail->why;
        cancel_all(rail);
    }
    if (rail->broken.status) {
        *error = rail->broken;
        return error->status;
    }
    for (uint32_t round = 0; round + 1 < rail->n_nodes && !rail->broken.status; round++) {
        const uint32_t i = rail_peer(rail->n_nodes, rail->node, round);
        ucs_status_t status = start_peer(rail, &rail->peers[i], &parts[i]);
        if (status != UCS_OK)
            (void)lose(rail, i, status);
    }
    wait_all(rail);
    if (rail->broken.status) {
        *error = rail->broken;
        cancel_all(rail);
        return error->status;
    }
    for (uint32_t i = 0; i < rail->n_nodes; i++)
        parts[i].received_bytes = i == rail->node ? 0 : rail->peers[i].received;
    rail->n_swaps++;
    return EPD_OK;
}

static void ucx_rail_abort(struct transport_rail *rail, const struct epd_error *why)
{
    int none = 0;
    if (!atomic_compare_exchange_strong(&rail->aborted, &none, 1))
        return;
    rail->why = *why;
    atomic_store(&rail->aborted, 2);
}

/* What was sent last is on its way when this returns: the other nodes may still wait for it. A node that takes too
 * long, or is closing too, is not waited for. */
static void flush_endpoints(struct transport_rail *rail)
{
    const struct ucx_library *ucx = rail->ucx;
    const uint64_t begun_ns = clock_now_ns();
    const ucp_request_param_t none = {0};
    int n_left = 1;
    for (uint32_t i = 0; i < rail->n_nodes; i++) {
        struct ucx_peer *peer = &rail->peers[i];
        if (peer->endpoint && peer->lost == UCS_OK)
            (void)take_request(&peer->send, ucx->ucp_ep_flush_nbx(peer->endpoint, &none));
    }
    while (n_left && clock_now_ns() - begun_ns < UCX_FLUSH_NS) {
        ucs_status_t ignored;
        n_left = 0;
        (void)ucx->ucp_worker_progress(rail->worker);
        for (uint32_t i = 0; i < rail->n_nodes; i++)
            n_left += !reap(ucx, &rail->peers[i].send, &ignored);
    }
}

static void ucx_rail_close(struct transport_rail *rail)
{
    const struct ucx_library *ucx = rail->ucx;
    if (rail->peers && !rail->broken.status && !atomic_load(&rail->aborted))
        flush_endpoints(rail);
    if (rail->peers)
        cancel_all(rail);
    free(rail->peers);
    if (rail->worker)
        ucx->ucp_worker_destroy(rail->worker);
    if (rail->context)
        ucx->ucp_cleanup(rail->context);
    free(rail);
}

const struct transport transport_ucx = {
    .name = "ucx",
    .load = ucx_load,
    .rail_open = ucx_rail_open,
    .rail_connect = ucx_rail_connect,
    .rail_connected = ucx_rail_connected,
    .rail_swap = ucx_rail_swap,
    .rail_abort = ucx_rail_abort,
    .rail_close = ucx_rail_close,
};
