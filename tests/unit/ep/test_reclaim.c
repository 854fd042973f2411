/* What devices give back when they are idle, and lanes that stand still.
 *
 * The backend is the host's, but ends imports only in device_give_back, as CUDA does those by IPC handle; when its devices are
 * idle the test says. */
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "ep/clock.h"
#include "ep/device_watch.h"
#include "ep/quiet.h"
#include "tests/unit/ep/harness.h"

#define COUNT(array) (sizeof(array) / sizeof *(array))
#define N_DEVICES    2
#define BYTES        65536
#define MAX_KEPT     64
#define LIMIT_MS     5000
/* A queue that is full runs empty in so long. */
#define DRAIN_NS 2000000ull

enum when_idle {
    ALWAYS,
    NEVER,
    WHEN_DRAINED, /* as under load: some time after the lane's last job */
};

/* One device. Lane thread, but where atomic. */
struct kept {
    struct backend_device *_Atomic device;
    struct backend_import imports[MAX_KEPT];
    uint32_t n;
};

static struct backend deferring; /* made before any lane runs */
static struct kept kept[N_DEVICES];
static _Atomic int idle[N_DEVICES]; /* enum when_idle */
static _Atomic uint64_t last_job_ns[N_DEVICES];
static _Atomic uint32_t n_disturbed;

static struct kept *kept_of(const struct backend_device *device)
{
    return device == atomic_load(&kept[0].device) ? &kept[0] : &kept[1];
}

static enum epd_status open_device(const struct node_config *config, uint32_t device_idx,
                                   struct backend_device **device, struct device_info *info,
                                   struct epd_error *error)
{
    enum epd_status status = backend_host.device_open(config, device_idx, device, info, error);
    if (status == EPD_OK)
        atomic_store(&kept[device_idx].device, *device);
    return status;
}

static int device_idle(struct backend_device *device)
{
    const size_t i = (size_t)(kept_of(device) - kept);
    switch (atomic_load(&idle[i])) {
    case ALWAYS:
        return 1;
    case NEVER:
        return 0;
    default:
        return clock_now_ns() - atomic_load(&last_job_ns[i]) > DRAIN_NS;
    }
}

static uint64_t unimport(struct backend_device *device, struct backend_import *import)
{
    struct kept *of = kept_of(device);
    ck_assert_uint_lt(of->n, MAX_KEPT);
    of->imports[of->n++] = *import;
    return 0;
}

static uint32_t n_waiting(struct backend_device *device)
{
    return kept_of(device)->n;
}

static uint64_t give_back(struct backend_device *device)
{
    struct kept *of = kept_of(device);
    uint64_t bytes = 0;
    if (!device_idle(device))
        atomic_fetch_add(&n_disturbed, 1);
    for (; of->n; of->n--)
        bytes += backend_host.memory_unimport(device, &of->imports[of->n - 1]);
    return bytes;
}

enum epd_status __real_lane_start(const struct backend *backend, const struct node_config *config,
                                  uint32_t device_idx, struct lane **lane, struct epd_error *error);
enum epd_status __wrap_lane_start(const struct backend *backend, const struct node_config *config,
                                  uint32_t device_idx, struct lane **lane, struct epd_error *error);

enum epd_status __wrap_lane_start(const struct backend *backend, const struct node_config *config,
                                  uint32_t device_idx, struct lane **lane, struct epd_error *error)
{
    (void)backend;
    return __real_lane_start(&deferring, config, device_idx, lane, error);
}

static void open_harness(struct harness *harness, enum when_idle when)
{
    deferring = backend_host;
    deferring.device_open = open_device;
    deferring.device_idle = device_idle;
    deferring.memory_unimport = unimport;
    deferring.device_n_waiting = n_waiting;
    deferring.device_give_back = give_back;
    atomic_store(&idle[0], ALWAYS);
    atomic_store(&idle[1], when);
    atomic_store(&n_disturbed, 0);
    harness_open(harness, N_DEVICES, 0);
}

/* All of it has come back, and never while anything ran. */
static void close_harness(struct harness *harness)
{
    harness_close(harness);
    ck_assert_uint_eq(atomic_load(&n_disturbed), 0);
}

static struct memory *import(struct harness *harness, uint32_t device_idx)
{
    struct epd_error error = {.status = EPD_OK};
    struct memory *memory = NULL;
    int fd = memfd_create("test", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    ck_assert_int_ge(fd, 0);
    ck_assert_int_eq(ftruncate(fd, BYTES), 0);
    ck_assert_int_eq(fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK), 0);
    const struct memory_request request = {
        .kind = EPD_MEMORY_MEMFD, .fd = fd, .bytes = BYTES, .device_idx = device_idx};
    ck_assert_msg(harness_acquire(harness, &request, &memory, &error) == EPD_OK, "%s", error.text);
    return memory;
}

static uint64_t imported_bytes(const struct harness *harness)
{
    struct device_info info;
    uint64_t bytes = 0;
    for (uint32_t i = 0; i < N_DEVICES; i++) {
        node_device_info(harness->node, i, &info);
        bytes += info.imported_bytes;
    }
    return bytes;
}

static void sleep_us(long us)
{
    const struct timespec time = {.tv_nsec = us * 1000};
    nanosleep(&time, NULL);
}

static void poll_for(struct harness *harness, uint64_t ms)
{
    for (const uint64_t until_ns = clock_now_ns() + ms * 1000000; clock_now_ns() < until_ns;) {
        (void)node_poll(harness->node);
        sleep_us(200);
    }
}

/* How long it took, in ms. */
static uint64_t wait_given_back(struct harness *harness)
{
    const uint64_t begin_ns = clock_now_ns();
    while (imported_bytes(harness)) {
        const uint64_t ms = (clock_now_ns() - begin_ns) / 1000000;
        ck_assert_msg(ms < LIMIT_MS, "%llu bytes are still mapped after %llu ms",
                      (unsigned long long)imported_bytes(harness), (unsigned long long)ms);
        poll_for(harness, 1);
    }
    return (clock_now_ns() - begin_ns) / 1000000;
}

START_TEST(imports_that_end_are_unmapped_at_once_where_nothing_runs)
{
    struct harness harness;
    struct memory *memories[8];
    open_harness(&harness, ALWAYS);
    for (uint32_t round = 0; round < 3; round++) {
        for (uint32_t i = 0; i < COUNT(memories); i++)
            memories[i] = import(&harness, i % N_DEVICES);
        ck_assert_uint_eq(imported_bytes(&harness), COUNT(memories) * BYTES);
        for (uint32_t i = 0; i < COUNT(memories); i++)
            memory_release(memories[i]);
        harness_settle(&harness);
        ck_assert_uint_eq(imported_bytes(&harness), 0);
    }
    close_harness(&harness);
}
END_TEST

/* Work of a lane that goes on for as long as the test does: its next job is given when one has ended. */
struct load {
    struct lane_job job;
    struct lane *lane;
    uint32_t device_idx, n_done;
    int stops, stopped;
};

static void run_load(struct lane_job *job, struct lane *lane)
{
    sleep_us(300);
    atomic_store(&last_job_ns[((struct load *)job)->device_idx], clock_now_ns());
    (void)lane;
}

static void complete_load(struct lane_job *job)
{
    struct load *load = (struct load *)job;
    load->n_done++;
    load->stopped = load->stops;
    if (!load->stops)
        lane_post(load->lane, &load->job);
}

static void start_load(struct harness *harness, struct load *load, uint32_t device_idx)
{
    *load = (struct load){.job = {.run = run_load, .complete = complete_load},
                          .lane = harness->node->lanes[device_idx],
                          .device_idx = device_idx};
    lane_post(load->lane, &load->job);
}

static void stop_load(struct harness *harness, struct load *load)
{
    load->stops = 1;
    harness_wait(harness, &load->stopped);
}

START_TEST(they_are_unmapped_under_constant_load_too)
{
    struct harness harness;
    struct load loads[4];
    open_harness(&harness, WHEN_DRAINED);
    for (uint32_t i = 0; i < COUNT(loads); i++)
        start_load(&harness, &loads[i], i % N_DEVICES);
    for (int round = 0; round < 3; round++) {
        memory_release(import(&harness, 1));
        printf("under load: unmapped after %llu ms\n", (unsigned long long)wait_given_back(&harness));
    }
    for (uint32_t i = 0; i < COUNT(loads); i++)
        stop_load(&harness, &loads[i]);
    close_harness(&harness);
}
END_TEST

START_TEST(what_waits_for_a_client_on_one_device_keeps_nothing_mapped_on_another)
{
    struct harness harness;
    open_harness(&harness, NEVER);
    memory_release(import(&harness, 1));
    memory_release(import(&harness, 0));
    harness_settle(&harness);
    ck_assert_uint_eq(imported_bytes(&harness), BYTES);
    atomic_store(&idle[1], ALWAYS);
    (void)wait_given_back(&harness);
    close_harness(&harness);
}
END_TEST

START_TEST(what_waits_for_a_client_keeps_them_mapped_and_other_work_goes_on)
{
    struct harness harness;
    struct load load;
    open_harness(&harness, NEVER);
    memory_release(import(&harness, 1));
    start_load(&harness, &load, 1);
    poll_for(&harness, 1000);
    ck_assert_uint_eq(imported_bytes(&harness), BYTES);
    /* The lane stood still some of the time, at most a tenth: how often 0.3 ms fit on a busy machine is not asked. */
    ck_assert_uint_ge(load.n_done, 100);
    atomic_store(&idle[1], ALWAYS);
    (void)wait_given_back(&harness);
    stop_load(&harness, &load);
    close_harness(&harness);
}
END_TEST

/* ---- quiet moments, of all devices ---- */

struct moment {
    _Atomic uint32_t n_ran, n_missed;
    int done;
};

static void run_moment(void *arg, struct lane *lane)
{
    struct moment *moment = arg;
    for (size_t i = 0; i < N_DEVICES; i++)
        if (!device_idle(atomic_load(&kept[i].device)))
            atomic_fetch_add(&moment->n_missed, 1);
    atomic_fetch_add(&moment->n_ran, 1);
    (void)lane;
}

static void on_moment(void *arg)
{
    ((struct moment *)arg)->done = 1;
}

static void post_moment(struct harness *harness, struct moment *moment)
{
    struct epd_error error = {.status = EPD_OK};
    struct quiet *quiet;
    ck_assert_int_eq(quiet_create(harness->node, run_moment, on_moment, moment, &quiet, &error), EPD_OK);
    quiet_post(quiet);
}

START_TEST(a_quiet_moment_comes_under_constant_load_too)
{
    struct harness harness;
    struct load loads[4];
    struct moment moment = {0};
    open_harness(&harness, WHEN_DRAINED);
    atomic_store(&idle[0], WHEN_DRAINED);
    for (uint32_t i = 0; i < COUNT(loads); i++)
        start_load(&harness, &loads[i], i % N_DEVICES);
    post_moment(&harness, &moment);
    const uint64_t begin_ns = clock_now_ns();
    while (!moment.done) {
        ck_assert_uint_lt((clock_now_ns() - begin_ns) / 1000000, LIMIT_MS);
        poll_for(&harness, 1);
    }
    ck_assert_uint_eq(atomic_load(&moment.n_ran), N_DEVICES);
    ck_assert_uint_eq(atomic_load(&moment.n_missed), 0);
    for (uint32_t i = 0; i < COUNT(loads); i++)
        stop_load(&harness, &loads[i]);
    close_harness(&harness);
}
END_TEST

START_TEST(a_quiet_moment_waits_for_what_waits_for_a_client_and_other_work_goes_on)
{
    struct harness harness;
    struct load load;
    struct moment moment = {0};
    open_harness(&harness, NEVER);
    start_load(&harness, &load, 0);
    post_moment(&harness, &moment);
    poll_for(&harness, 1000);
    ck_assert_int_eq(moment.done, 0);
    ck_assert_uint_ge(load.n_done, 100);
    atomic_store(&idle[1], ALWAYS);
    harness_wait(&harness, &moment.done);
    ck_assert_uint_eq(atomic_load(&moment.n_missed), 0);
    stop_load(&harness, &load);
    close_harness(&harness);
}
END_TEST

/* ---- lanes that stand still ---- */

struct standing {
    struct lane_job job;
    _Atomic int may_go;
    int ended;
};

static void stand(struct lane_job *job, struct lane *lane)
{
    (void)lane;
    while (!atomic_load(&((struct standing *)job)->may_go))
        sleep_us(1000);
}

static void complete_standing(struct lane_job *job)
{
    ((struct standing *)job)->ended = 1;
}

struct told {
    uint32_t n_slow, n_lost, device_idx;
    char doing[64];
    struct epd_error lost;
};

static void on_slow(void *arg, uint32_t device_idx, uint64_t waited_ns, const char *doing)
{
    struct told *told = arg;
    ck_assert_uint_ge(waited_ns, 20000000);
    told->n_slow++;
    told->device_idx = device_idx;
    snprintf(told->doing, sizeof told->doing, "%s", doing);
}

static void on_lost(void *arg, const struct epd_error *error)
{
    struct told *told = arg;
    told->n_lost++;
    told->lost = *error;
}

static void look_for(struct harness *harness, struct device_watch *watch, uint64_t ms)
{
    for (uint64_t i = 0; i < ms; i += 5) {
        device_watch_look(watch);
        poll_for(harness, 5);
    }
}

START_TEST(a_lane_that_stands_still_is_told_of_and_then_its_device_is_lost)
{
    struct harness harness;
    struct epd_error error = {.status = EPD_OK};
    struct standing standing = {
        .job = {.run = stand, .complete = complete_standing, .what = "a test that stands"}};
    struct told told = {0};
    const struct device_watch_rules rules = {
        .slow_ns = 20000000, .stuck_ns = 200000000, .slow = on_slow, .lost = on_lost, .arg = &told};
    struct device_watch *watch;
    open_harness(&harness, ALWAYS);
    ck_assert_int_eq(device_watch_create(harness.node, &rules, &watch, &error), EPD_OK);
    lane_post(harness.node->lanes[1], &standing.job);
    look_for(&harness, watch, 600);
    ck_assert_uint_eq(told.n_slow, 1);
    ck_assert_uint_eq(told.device_idx, 1);
    ck_assert_str_eq(told.doing, "a test that stands");
    ck_assert_uint_eq(told.n_lost, 1);
    ck_assert_int_eq(told.lost.status, EPD_CUDA);
    ck_assert_msg(strstr(told.lost.text, "device 1: ") && strstr(told.lost.text, "a test that stands"), "%s",
                  told.lost.text);
    atomic_store(&standing.may_go, 1);
    harness_wait(&harness, &standing.ended);
    close_harness(&harness);
    device_watch_destroy(watch);
}
END_TEST

int main(void)
{
    const TTest *const tests[] = {
        imports_that_end_are_unmapped_at_once_where_nothing_runs,
        they_are_unmapped_under_constant_load_too,
        what_waits_for_a_client_on_one_device_keeps_nothing_mapped_on_another,
        what_waits_for_a_client_keeps_them_mapped_and_other_work_goes_on,
        a_quiet_moment_comes_under_constant_load_too,
        a_quiet_moment_waits_for_what_waits_for_a_client_and_other_work_goes_on,
        a_lane_that_stands_still_is_told_of_and_then_its_device_is_lost,
    };
    return suite_run("ep reclaim", tests, COUNT(tests));
}
