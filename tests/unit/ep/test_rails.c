/* The rails of groups on their lanes, over the fake of NCCL: what closes goes in a moment in which no rail connects and no
 * lane is at work, and holds up nobody until it comes.
 *
 * The backend is the host's, and its devices are idle when the fake's are. */
#include <string.h>
#include <time.h>

#include "ep/clock.h"
#include "ep/nccl_library.h"
#include "ep/node_impl.h"
#include "ep/rails.h"
#include "tests/unit/ep/fake_nccl.h"
#include "tests/unit/ep/harness.h"

#define COUNT(array) (sizeof(array) / sizeof *(array))
#define MS           1000000ull
#define N_LANES      2
#define N_RANKS      3 /* two share a lane */
#define N_NODES      2
#define LIMIT_NS     (20000 * MS)
#define SOON_NS      (5000 * MS)

extern const struct transport transport_nccl;

static struct backend busy; /* made before any lane runs */
static struct transport spied;
static struct transport_rail *_Atomic opened[16]; /* of the test */
static _Atomic unsigned n_opened;
static _Atomic int at_work; /* lanes */
static _Atomic int n_disturbed;

static _Thread_local int calloc_fails_in; /* calls of this thread; 0: never */

void *__real_calloc(size_t n, size_t bytes);
void *__wrap_calloc(size_t n, size_t bytes);
void *__wrap_calloc(size_t n, size_t bytes)
{
    if (calloc_fails_in && --calloc_fails_in == 0)
        return NULL;
    return __real_calloc(n, bytes);
}

static int device_idle(struct backend_device *device)
{
    (void)device;
    return fake_nccl.n_connecting == 0;
}

static enum epd_status open_rail(struct backend_device *device, uint32_t node, struct transport_rail **rail,
                                 struct transport_address *address, struct epd_error *error)
{
    (void)device;
    const enum epd_status status = transport_nccl.rail_open(NULL, node, rail, address, error);
    if (status == EPD_OK)
        opened[atomic_fetch_add(&n_opened, 1)] = *rail;
    return status;
}

const struct transport *__wrap_transport_find(enum epd_backend_kind backend, struct epd_error *reason);
const struct transport *__wrap_transport_find(enum epd_backend_kind backend, struct epd_error *reason)
{
    (void)backend, (void)reason;
    return &spied;
}

enum epd_status __real_lane_start(const struct backend *backend, const struct node_config *config,
                                  uint32_t device_idx, struct lane **lane, struct epd_error *error);
enum epd_status __wrap_lane_start(const struct backend *backend, const struct node_config *config,
                                  uint32_t device_idx, struct lane **lane, struct epd_error *error);
enum epd_status __wrap_lane_start(const struct backend *backend, const struct node_config *config,
                                  uint32_t device_idx, struct lane **lane, struct epd_error *error)
{
    (void)backend;
    return __real_lane_start(&busy, config, device_idx, lane, error);
}

static void sleep_ms(long ms)
{
    const struct timespec time = {.tv_nsec = ms * 1000000};
    (void)nanosleep(&time, NULL);
}

/* A communicator ends, and frees its memory. */
static void on_end(void)
{
    if (atomic_load(&at_work) || fake_nccl.n_connecting)
        atomic_fetch_add(&n_disturbed, 1);
}

static void open_all(struct harness *harness)
{
    fake_nccl_reset();
    fake_nccl.on_end = on_end;
    atomic_store(&n_disturbed, 0);
    atomic_store(&n_opened, 0);
    busy = backend_host;
    busy.device_idle = device_idle;
    spied = transport_nccl;
    spied.rail_open = open_rail;
    harness_open(harness, N_LANES, 0);
    harness->node->backend = &busy;
}

static void close_all(struct harness *harness)
{
    harness_settle(harness);
    harness_close(harness);
    fake_nccl_expect_clean(0);
    ck_assert_int_eq(atomic_load(&n_disturbed), 0);
}

/* The rails of one group. */
struct bundle {
    struct rails *rails;
    struct epd_error error;
    int told;
};

static void note(void *arg, const struct epd_error *error)
{
    struct bundle *bundle = arg;
    bundle->error = *error;
    bundle->told = 1;
}

static void bundle_open(struct bundle *bundle, struct harness *harness)
{
    const uint32_t devices[N_RANKS] = {0, 1, 1};
    struct epd_error error = {.status = EPD_OK};
    bundle->told = 0;
    ck_assert_int_eq(rails_open(harness->node, 0, N_RANKS, devices, note, bundle, &bundle->rails, &error),
                     EPD_OK);
    harness_wait(harness, &bundle->told);
}

static void begin_connect(struct bundle *bundle, uint64_t limit_ns)
{
    struct transport_address addresses[N_NODES * N_RANKS];
    struct epd_error error = {.status = EPD_OK};
    memset(addresses, 0, sizeof addresses);
    for (uint32_t rank = 0; rank < N_RANKS; rank++) {
        addresses[rank] = *rails_address(bundle->rails, rank);
        addresses[N_RANKS + rank] = (struct transport_address){.bytes = 1, .node = 1};
    }
    bundle->told = 0;
    ck_assert_int_eq(rails_connect(bundle->rails, N_NODES, addresses, limit_ns, note, bundle, &error),
                     EPD_OK);
}

static void bundle_connect(struct bundle *bundle, struct harness *harness)
{
    begin_connect(bundle, LIMIT_NS);
    harness_wait(harness, &bundle->told);
    ck_assert_msg(bundle->error.status == EPD_OK, "%s", bundle->error.text);
}

static void poll_for(struct harness *harness, unsigned ms)
{
    const uint64_t begun_ns = clock_now_ns();
    while (clock_now_ns() - begun_ns < ms * MS) {
        (void)node_poll(harness->node);
        sleep_ms(1);
    }
}

/* Polls until so many communicators are left. */
static void expect_comms(struct harness *harness, int n)
{
    const uint64_t begun_ns = clock_now_ns();
    while (fake_nccl.n_comms != n && clock_now_ns() - begun_ns < SOON_NS)
        poll_for(harness, 1);
    ck_assert_int_eq(fake_nccl.n_comms, n);
}

START_TEST(what_closes_does_not_end_while_another_group_connects)
{
    struct harness harness;
    struct bundle old, young;
    open_all(&harness);
    bundle_open(&old, &harness);
    bundle_connect(&old, &harness);
    bundle_open(&young, &harness);
    fake_nccl.meets = 0;
    begin_connect(&young, LIMIT_NS);
    poll_for(&harness, 20);
    rails_close(old.rails);
    poll_for(&harness, 200); /* ten moments that might have been quiet */
    ck_assert_int_eq(fake_nccl.n_comms, 2 * N_RANKS);
    ck_assert_int_eq(young.told, 0);
    fake_nccl.meets = 1;
    harness_wait(&harness, &young.told);
    ck_assert_int_eq(young.error.status, EPD_OK);
    expect_comms(&harness, N_RANKS);
    rails_close(young.rails);
    close_all(&harness);
}
END_TEST

/* The others' node is gone behind the meeting: the first swap waits until the limit, and then until it has left. */
START_TEST(what_closes_does_not_end_before_a_failed_first_swap_has_left_its_stream)
{
    struct harness harness;
    struct bundle old, young;
    open_all(&harness);
    bundle_open(&old, &harness);
    bundle_connect(&old, &harness);
    bundle_open(&young, &harness);
    fake_nccl.answers = fake_nccl.leaves = 0;
    begin_connect(&young, 50 * MS);
    rails_close(old.rails);
    harness_wait(&harness, &young.told);
    ck_assert_int_eq(young.error.status, EPD_TIMEOUT);
    rails_close(young.rails);
    poll_for(&harness, 200);
    ck_assert_int_eq(fake_nccl.n_comms, 2 * N_RANKS);
    fake_nccl.leaves = 1;
    expect_comms(&harness, 0);
    close_all(&harness);
}
END_TEST

struct work {
    struct lane_job job;
    int left;
};

static void run_work(struct lane_job *job, struct lane *lane)
{
    (void)job, (void)lane;
    atomic_fetch_add(&at_work, 1);
    sleep_ms(30);
    atomic_fetch_sub(&at_work, 1);
}

static void complete_work(struct lane_job *job)
{
    ((struct work *)job)->left = 0;
}

static void expect_done(struct harness *harness, const struct work *work)
{
    const uint64_t begun_ns = clock_now_ns();
    while (work->left && clock_now_ns() - begun_ns < SOON_NS)
        poll_for(harness, 1);
    ck_assert_int_eq(work->left, 0);
}

START_TEST(lanes_work_on_while_closed_rails_wait_for_their_streams)
{
    struct harness harness;
    struct bundle bundle;
    struct work works[6];
    open_all(&harness);
    bundle_open(&bundle, &harness);
    bundle_connect(&bundle, &harness);
    fake_nccl.leaves = 0;
    rails_abort(bundle.rails, &(struct epd_error){EPD_PEER_LOST, "node 1 is gone"});
    rails_close(bundle.rails);
    for (size_t i = 0; i < COUNT(works); i++) {
        works[i] = (struct work){.job = {.run = run_work, .complete = complete_work}, .left = 1};
        lane_post(harness.node->lanes[i % N_LANES], &works[i].job);
    }
    for (size_t i = 0; i < COUNT(works); i++)
        expect_done(&harness, &works[i]);
    ck_assert_int_eq(fake_nccl.n_comms, N_RANKS);
    fake_nccl.leaves = 1;
    expect_comms(&harness, 0);
    close_all(&harness);
}
END_TEST

struct asked {
    struct lane_job job;
    struct epd_error error;
    int answered;
};

static void run_asked(struct lane_job *job, struct lane *lane)
{
    struct asked *asked = (struct asked *)job;
    asked->error.status = EPD_OK;
    (void)!lane_check_device(lane, &asked->error);
}

static void complete_asked(struct lane_job *job)
{
    ((struct asked *)job)->answered = 1;
}

static enum epd_status ask_device(struct harness *harness)
{
    struct asked asked = {.job = {.run = run_asked, .complete = complete_asked}};
    lane_post(harness->node->lanes[0], &asked.job);
    harness_wait(harness, &asked.answered);
    return asked.error.status;
}

/* As a step that does not end: the worker is replaced, and takes along what nobody could free. */
START_TEST(a_swap_that_never_leaves_its_stream_costs_its_device)
{
    struct harness harness;
    struct bundle bundle;
    open_all(&harness);
    harness.node->step_lost_ns = 500 * MS;
    bundle_open(&bundle, &harness);
    bundle_connect(&bundle, &harness);
    fake_nccl.leaves = 0;
    rails_abort(bundle.rails, &(struct epd_error){EPD_PEER_LOST, "node 1 is gone"});
    rails_close(bundle.rails);
    ck_assert_int_eq(ask_device(&harness), EPD_OK);
    const uint64_t begun_ns = clock_now_ns();
    while (ask_device(&harness) == EPD_OK)
        ck_assert_uint_lt(clock_now_ns() - begun_ns, SOON_NS);
    ck_assert_int_eq(ask_device(&harness), EPD_CUDA);
    harness_settle(&harness);
    ck_assert_int_eq(fake_nccl.n_comms, N_RANKS);
    fake_nccl.leaves = 1;
    for (unsigned i = 0; i < n_opened; i++) {
        while (!transport_nccl.rail_closed(opened[i]))
            sleep_ms(1);
        transport_nccl.rails_end((struct transport_rail *const[]){opened[i]}, 1);
    }
    close_all(&harness);
}
END_TEST

START_TEST(a_lane_says_what_its_rails_are_at)
{
    struct harness harness;
    struct bundle bundle;
    open_all(&harness);
    bundle_open(&bundle, &harness);
    ck_assert_str_eq(lane_doing(harness.node->lanes[0]), "a rail that is opened");
    bundle_connect(&bundle, &harness);
    ck_assert_str_eq(lane_doing(harness.node->lanes[0]), "a rail that is connected");
    rails_close(bundle.rails);
    close_all(&harness);
}
END_TEST

START_TEST(rails_of_which_one_could_not_be_opened_close)
{
    struct harness harness;
    struct bundle bundle;
    open_all(&harness);
    fake_nccl.no_channels = 1;
    bundle_open(&bundle, &harness);
    ck_assert_int_eq(bundle.error.status, EPD_QUOTA);
    rails_close(bundle.rails);
    close_all(&harness);
}
END_TEST

/* What rails need to end is there when they are opened. */
START_TEST(without_memory_rails_do_not_open_and_open_ones_end)
{
    const uint32_t devices[N_RANKS] = {0, 1, 1};
    struct harness harness;
    struct bundle bundle;
    int k = 1;
    open_all(&harness);
    for (;; k++) {
        struct epd_error error = {.status = EPD_OK};
        bundle.told = 0;
        calloc_fails_in = k;
        const enum epd_status status =
            rails_open(harness.node, 0, N_RANKS, devices, note, &bundle, &bundle.rails, &error);
        const int failed = calloc_fails_in == 0;
        calloc_fails_in = 0;
        ck_assert_int_eq(status, failed ? EPD_NO_MEMORY : EPD_OK);
        if (!failed)
            break;
    }
    ck_assert_int_eq(k, 3); /* the rails, and the moment in which they end */
    harness_wait(&harness, &bundle.told);
    bundle_connect(&bundle, &harness);
    calloc_fails_in = 1;
    rails_close(bundle.rails);
    while (fake_nccl.n_comms)
        poll_for(&harness, 1);
    harness_settle(&harness);
    ck_assert_int_eq(calloc_fails_in, 1);
    calloc_fails_in = 0;
    close_all(&harness);
}
END_TEST

int main(void)
{
    const TTest *const tests[] = {
        what_closes_does_not_end_while_another_group_connects,
        what_closes_does_not_end_before_a_failed_first_swap_has_left_its_stream,
        lanes_work_on_while_closed_rails_wait_for_their_streams,
        a_swap_that_never_leaves_its_stream_costs_its_device,
        a_lane_says_what_its_rails_are_at,
        rails_of_which_one_could_not_be_opened_close,
        without_memory_rails_do_not_open_and_open_ones_end,
    };
    return suite_run("ep rails", tests, COUNT(tests));
}
