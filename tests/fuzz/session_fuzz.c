/* Whatever clients do: the worker neither crashes nor reads out of bounds nor keeps what they left. The worker
 * (daemon/worker.h) runs whole, with its loop and lanes, in a thread of the fuzzer, on the host backend; the input
 * is a script for three clients on its rank socket: decent messages with odd fields, raw bytes, fds, writes into
 * the session page, hang-ups. Ids that the daemon gives out are learnt, so that scripts reach open groups, plans
 * and launches. Every CHECK_EVERY inputs the control socket must report that nothing is held. */
#include <assert.h>
#include <fcntl.h>
#include <pthread.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#include "daemon/channel.h"
#include "daemon/recorder.h"
#include "daemon/worker.h"
#include "proto/codec.h"
#include "tests/fault/control.h"
#include "tests/fault/wire.h"

#define N_CLIENTS   3
#define MAX_ACTIONS 48
#define MAX_IDS     4
#define ANSWER_MS   2000 /* a question that the daemon answers at once */
#define OTHERS_MS   2    /* one that may have to wait for other ranks */
#define CHECK_EVERY 64
#define SETTLE_MS   10000
#define FENCE_ID    ((uint64_t)1 << 61) /* a buffer that nobody has */
#define NAME_BYTES  64

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes);
int LLVMFuzzerInitialize(int *argc, char ***argv);

/* ---- the worker ---- */

struct host {
    char rank_path[NAME_BYTES], control_path[NAME_BYTES];
    struct worker_start start;
    struct log log;
    pthread_t thread;
    unsigned long n_inputs;
};

/* libFuzzer hands nothing through from its initialisation to its inputs. */
static struct host host;

static const char config_text[] =
    "[daemon]\nbackend = host\ndevices = 2\nlog_level = error\ndump_directory = /nonexistent\n"
    "[limits]\nheap_per_device = 16M\nheap_per_session = 4M\nimported_per_session = 4M\nsaved_per_session = "
    "1M\n"
    "plans_per_session = 16\nbuffers_per_session = 16\ngroups_per_session = 4\nlaunches_per_rank = 8\n"
    "[timers]\nwarn = 20ms\nstuck = 40ms\ndead = 80ms\njoin = 80ms\nplan = 80ms\nhello = 500ms\n";

static int listen_on(const char *path)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    snprintf(address.sun_path, sizeof address.sun_path, "%s", path);
    int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    (void)unlink(path);
    assert(fd >= 0 && bind(fd, (struct sockaddr *)&address, sizeof address) == 0 && listen(fd, 64) == 0);
    return fd;
}

static void *run_worker(void *arg)
{
    struct host *h = arg;
    (void)worker_run(&h->start, &h->log);
    abort(); /* nobody asked it to end */
}

static void remove_sockets(void)
{
    (void)unlink(host.rank_path);
    (void)unlink(host.control_path);
}

int LLVMFuzzerInitialize(int *argc, char ***argv)
{
    (void)argc, (void)argv;
    int channel[2];
    struct config config;
    struct epd_error error = {0};
    snprintf(host.rank_path, sizeof host.rank_path, "/tmp/session-fuzz-%d.sock", (int)getpid());
    snprintf(host.control_path, sizeof host.control_path, "/tmp/session-fuzz-%d-control.sock", (int)getpid());
    (void)atexit(remove_sockets);
    config_init(&config);
    if (config_parse(&config, config_text, "session_fuzz", &error) != EPD_OK) {
        fprintf(stderr, "%s\n", error.text);
        abort();
    }
    snprintf(config.socket, sizeof config.socket, "%s", host.rank_path);
    snprintf(config.control_socket, sizeof config.control_socket, "%s", host.control_path);
    host.start = (struct worker_start){.rank_fd = listen_on(host.rank_path),
                                       .control_fd = listen_on(host.control_path),
                                       .last_exit = "",
                                       .supervisor_pid = (int)getpid()};
    assert(channel_create(channel, &error) == EPD_OK);
    assert(channel_send_config(channel[0], &config, &error) == EPD_OK);
    assert(recorder_create(&host.start.recorder_fd, &error) == EPD_OK);
    host.start.channel_fd = channel[1]; /* the other end stays open as long as the process */
    log_init(&host.log, "worker", LOG_ERROR, open("/dev/null", O_WRONLY | O_CLOEXEC));
    assert(pthread_create(&host.thread, NULL, run_worker, &host) == 0);
    return 0;
}

/* ---- the script ---- */

struct script {
    const uint8_t *data;
    size_t left;
};

static uint8_t take(struct script *script)
{
    if (!script->left)
        return 0;
    script->left--;
    return *script->data++;
}

/* Mostly small, sometimes an edge. */
static uint64_t take_number(struct script *script)
{
    static const uint64_t edges[] = {
        0, 1, 4095, 4096, 65536, UINT32_MAX, 1u << 24, INT64_MAX, (uint64_t)1 << 62, UINT64_MAX};
    const uint8_t byte = take(script);
    return byte < 200 ? byte % 64u : edges[byte % (sizeof edges / sizeof edges[0])];
}

/* ---- clients ---- */

struct client {
    struct wire wire;
    int open;
    uint64_t groups[MAX_IDS], buffers[MAX_IDS];
    struct message_reply_plan plans[MAX_IDS];
    unsigned n_groups, n_buffers, n_plans;
};

static void learn(struct client *client)
{
    const struct message *reply = &client->wire.reply;
    if (reply->kind == MESSAGE_REPLY_GROUP)
        client->groups[client->n_groups++ % MAX_IDS] = reply->reply_group.group_id;
    else if (reply->kind == MESSAGE_REPLY_BUFFER)
        client->buffers[client->n_buffers++ % MAX_IDS] = reply->reply_buffer.buffer_id;
    else if (reply->kind == MESSAGE_REPLY_PLAN)
        client->plans[client->n_plans++ % MAX_IDS] = reply->reply_plan;
}

static void hang_up(struct client *client)
{
    if (client->open)
        wire_close(&client->wire);
    client->open = 0;
}

/* Whatever has arrived by now. 0 if the daemon has hung up. */
static int listen_to(struct client *client, uint64_t until_id, int deadline_ms)
{
    for (;;) {
        switch (wire_receive(&client->wire, deadline_ms)) {
        case WIRE_ENDED:
            hang_up(client);
            return 0;
        case WIRE_NOTHING:
            return 1;
        case WIRE_MESSAGE:
            learn(client);
            if (until_id && client->wire.reply.request_id == until_id)
                return 1;
        }
    }
}

/* All that was sent before has been read by the daemon. */
static void fence(struct client *client)
{
    struct message message = wire_id_message(MESSAGE_BUFFER_RELEASE, FENCE_ID);
    if (!client->open)
        return;
    if (wire_send(&client->wire, &message, -1) != 0)
        (void)listen_to(client, 0, 0);
    else if (listen_to(client, client->wire.request_id, ANSWER_MS))
        assert(client->wire.reply.request_id == client->wire.request_id || client->wire.page == NULL);
}

static void connect_client(struct client *client)
{
    memset(client, 0, offsetof(struct client, plans));
    client->n_groups = client->n_buffers = client->n_plans = 0;
    if (wire_connect(&client->wire, host.rank_path) != 0)
        abort(); /* the listener is gone */
    client->open = 1;
}

static void greet(struct client *client)
{
    connect_client(client);
    if (wire_hello(&client->wire) != EPD_OK)
        hang_up(client);
}

static uint64_t pick(struct script *script, const uint64_t ids[MAX_IDS])
{
    const uint8_t byte = take(script);
    return byte < 220 ? ids[byte % MAX_IDS] : take_number(script);
}

static void finish(struct message *message, struct message_binding *bindings, struct script *script,
                   const struct client *client)
{
    struct message_plan_create *plan = &message->plan_create;
    const unsigned n = take(script) % 12;
    plan->n_bindings = n;
    plan->bindings = bindings;
    for (unsigned i = 0; i < n; i++) {
        bindings[i] =
            (struct message_binding){.role = (enum epd_role)(1 + take(script) % (EPD_ROLE_COUNT - 1)),
                                     .buffer_id = pick(script, client->buffers),
                                     .offset = take_number(script) * 16,
                                     .dtype = (enum epd_dtype)(1 + take(script) % 5),
                                     .n_dims = 1 + take(script) % 3u};
        for (unsigned d = 0; d < bindings[i].n_dims; d++)
            bindings[i].shape[d] = (int64_t)take_number(script);
    }
}

/* The tensors of a dispatch or a moe_forward as they should be, for the group of wire_join_message: so that
 * scripts reach steps without having to guess ten shapes. */
static void fill_decent(struct message *message, struct message_binding *b, const struct client *client,
                        unsigned slot, int moe)
{
    static const struct message_binding dispatch[] = {
        {.role = EPD_ROLE_X, .dtype = EPD_F32, .n_dims = 2, .shape = {8, 32}},
        {.role = EPD_ROLE_TOPK_IDX, .offset = 8192, .dtype = EPD_I64, .n_dims = 2, .shape = {8, 2}},
        {.role = EPD_ROLE_RECV_X, .offset = 16384, .dtype = EPD_F32, .n_dims = 2, .shape = {64, 32}},
        {.role = EPD_ROLE_M_SPLITS, .offset = 12288, .dtype = EPD_I64, .n_dims = 1, .shape = {4}}};
    static const struct message_binding forward[] = {
        {.role = EPD_ROLE_X, .dtype = EPD_F32, .n_dims = 2, .shape = {8, 32}},
        {.role = EPD_ROLE_TOPK_IDX, .offset = 8192, .dtype = EPD_I64, .n_dims = 2, .shape = {8, 2}},
        {.role = EPD_ROLE_TOPK_WEIGHTS, .offset = 12288, .dtype = EPD_F32, .n_dims = 2, .shape = {8, 2}},
        {.role = EPD_ROLE_W1, .offset = 16384, .dtype = EPD_F32, .n_dims = 3, .shape = {4, 32, 32}},
        {.role = EPD_ROLE_W2, .offset = 32768, .dtype = EPD_F32, .n_dims = 3, .shape = {4, 32, 16}},
        {.role = EPD_ROLE_OUT, .offset = 4096, .dtype = EPD_F32, .n_dims = 2, .shape = {8, 32}}};
    const unsigned n = moe ? 6 : 4;
    memcpy(b, moe ? forward : dispatch, n * sizeof *b);
    for (unsigned i = 0; i < n; i++)
        b[i].buffer_id = client->buffers[slot % MAX_IDS];
    message->plan_create.op = moe ? EPD_OP_MOE_FORWARD : EPD_OP_DISPATCH;
    message->plan_create.activation = moe ? EPD_SWIGLU : EPD_ACTIVATION_UNSPECIFIED;
    message->plan_create.n_bindings = n;
    message->plan_create.bindings = b;
}

/* wait_ms: for the answer. */
static void send_message(struct client *client, struct message *message, int fd, int wait_ms)
{
    static unsigned char datagram[EPD_MAX_DATAGRAM_BYTES];
    struct epd_error error;
    size_t bytes;
    /* What the encoder refuses, a raw script can still send. */
    message->request_id = message->kind == MESSAGE_LAUNCH ? 0 : client->wire.request_id + 1;
    if (codec_encode(message, datagram, &bytes, &error) != EPD_OK)
        return;
    client->wire.request_id += message->kind != MESSAGE_LAUNCH;
    if (wire_send_bytes(&client->wire, datagram, bytes, &fd, fd >= 0) != 0)
        (void)listen_to(client, 0, 0);
    else if (wait_ms)
        (void)listen_to(client, client->wire.request_id, wait_ms);
}

static void act_join(struct client *client, struct script *script)
{
    const uint8_t shape = take(script);
    const char name[2] = {(char)('a' + shape % 3), 0};
    const uint32_t world_size = 1 + (shape >> 2) % 3, rank = (shape >> 4) % 4;
    struct message join = wire_join_message(name, world_size, rank < world_size ? rank : 0);
    if (take(script) > 200) { /* another configuration */
        join.group_join.config.hidden = (uint32_t)take_number(script);
        join.group_join.config.max_tokens = (uint32_t)take_number(script);
        join.group_join.config.capacity_rows = (int64_t)take_number(script);
        join.group_join.config.alignment = 1u << take(script) % 13;
        join.group_join.config.dtype = (enum epd_dtype)(1 + take(script) % 3);
    }
    send_message(client, &join, -1, world_size == 1 ? ANSWER_MS : OTHERS_MS);
}

static void act_plan(struct client *client, struct script *script)
{
    static struct message_binding bindings[16];
    const uint8_t mode = take(script);
    struct message plan = wire_barrier_message(pick(script, client->groups));
    if (mode % 4 == 1 || mode % 4 == 2)
        fill_decent(&plan, bindings, client, take(script), mode % 4 == 2);
    if (mode % 4 == 3) {
        plan.plan_create.op = (enum epd_op)(1 + take(script) % (EPD_OP_COUNT - 1));
        plan.plan_create.layout = (enum epd_gemm_layout)(take(script) % 4);
        plan.plan_create.activation = (enum epd_activation)(take(script) % 4);
        plan.plan_create.saved = (enum epd_saved)(take(script) % 3);
        plan.plan_create.crossing = (enum epd_crossing)(take(script) % 3);
        const uint8_t context = take(script);
        plan.plan_create.context_plan_id = context < 128 ? client->plans[context % MAX_IDS].plan_id : 0;
        finish(&plan, bindings, script, client);
    }
    send_message(client, &plan, -1, OTHERS_MS);
}

static void act_launch(struct client *client, struct script *script)
{
    const uint8_t mode = take(script);
    const struct message_reply_plan *plan = &client->plans[mode % MAX_IDS];
    struct message launch = {
        .kind = MESSAGE_LAUNCH,
        .launch = {.plan_id = plan->plan_id,
                   .seq = ++client->wire.last_seq,
                   .n_tokens = mode & 8 ? (uint32_t)take_number(script) : 8,
                   .shape_hash = plan->shape_hash,
                   .n_repeats = mode & 16 ? 1 + (uint32_t)take_number(script) % 100 : 1}};
    if (mode & 32)
        launch.launch.seq = take_number(script);
    if (!(mode & 64) && client->wire.page)
        atomic_store(&client->wire.page->plans[plan->flag_idx % EPD_PAGE_MAX_PLANS].ready, 1);
    send_message(client, &launch, -1, 0);
}

static int make_fd(uint8_t kind)
{
    if (kind % 4 == 0)
        return open("/dev/null", O_RDWR | O_CLOEXEC);
    int fd = memfd_create("fuzz", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (fd >= 0 && (ftruncate(fd, (off_t)(kind % 4) * 65536) != 0 ||
                    (kind & 8 && fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK) != 0)))
        abort();
    return fd;
}

static void act_fd(struct client *client, struct script *script)
{
    const uint8_t kind = take(script);
    int fd = make_fd(kind);
    struct message message = kind & 16
                                 ? wire_barrier_message(1)
                                 : wire_register_message(pick(script, client->groups), take_number(script),
                                                         take_number(script) * 1024);
    send_message(client, &message, fd, ANSWER_MS);
    close(fd);
}

static void act_page(struct client *client, struct script *script)
{
    uint8_t *page = (uint8_t *)client->wire.page;
    const size_t at = (size_t)take(script) * 256 + take(script);
    if (page && at < sizeof(struct page))
        __atomic_store_n(&page[at], take(script), __ATOMIC_RELAXED);
}

static void act_raw(struct client *client, struct script *script)
{
    size_t n = take(script);
    n = n < script->left ? n : script->left;
    if (wire_send_bytes(&client->wire, script->data, n, NULL, 0) != 0)
        (void)listen_to(client, 0, 0);
    script->data += n;
    script->left -= n;
}

static void act_id(struct client *client, struct script *script)
{
    const uint8_t mode = take(script);
    struct message message;
    if (mode % 3 == 0)
        message = wire_id_message(MESSAGE_GROUP_LEAVE, pick(script, client->groups));
    else if (mode % 3 == 1)
        message = wire_id_message(MESSAGE_BUFFER_RELEASE, pick(script, client->buffers));
    else
        message = wire_id_message(MESSAGE_PLAN_DESTROY, client->plans[mode / 3 % MAX_IDS].plan_id);
    send_message(client, &message, -1, ANSWER_MS);
}

static void act(struct client *client, struct script *script, uint8_t action)
{
    struct message message;
    if (!listen_to(client, 0, 0)) /* learns what the other ranks' requests have answered */
        return;
    switch (action % 12) {
    case 0:
        hang_up(client);
        break;
    case 1:
    case 2:
        act_join(client, script);
        break;
    case 3:
        message = wire_alloc_message(pick(script, client->groups), 1 + take_number(script) * 1024);
        send_message(client, &message, -1, ANSWER_MS);
        break;
    case 4:
    case 5:
        act_plan(client, script);
        break;
    case 6:
    case 7:
        act_launch(client, script);
        break;
    case 8:
        act_fd(client, script);
        break;
    case 9:
        act_page(client, script);
        break;
    case 10:
        act_raw(client, script);
        break;
    default:
        act_id(client, script);
    }
}

/* ---- afterwards ---- */

static int nothing_held(void)
{
    json_t *status = control_ask(host.control_path, CONTROL_STATUS, NULL);
    const int empty = control_number(status, "groups") == 0 && control_number(status, "buffers") == 0 &&
                      control_number(status, "plans") == 0 &&
                      control_number(status, "launches_in_flight") == 0;
    json_decref(status);
    return empty;
}

static void check_nothing_held(void)
{
    for (int waited = 0; !nothing_held(); waited++) {
        struct timespec t = {.tv_nsec = 1000000};
        if (waited > SETTLE_MS) {
            fprintf(stderr, "the worker holds what its clients left\n");
            abort();
        }
        nanosleep(&t, NULL);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
    static struct client clients[N_CLIENTS];
    struct script script = {data, bytes};
    for (int i = 0; i < MAX_ACTIONS && script.left; i++) {
        const uint8_t action = take(&script);
        struct client *client = &clients[action / 12 % N_CLIENTS];
        if (!client->open && action >= 250)
            connect_client(client); /* no Hello */
        else if (!client->open)
            greet(client);
        if (client->open)
            act(client, &script, action);
    }
    for (int i = 0; i < N_CLIENTS; i++) {
        fence(&clients[i]);
        hang_up(&clients[i]);
    }
    if (++host.n_inputs % CHECK_EVERY == 0)
        check_nothing_held();
    return 0;
}
