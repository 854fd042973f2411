/* No memory, at every single allocation of the daemon in the life of a client; no room for fds; a wall clock that jumps;
 * and a disk that does not answer.
 * The daemon runs with a preloaded library (shim.h) that the sanitizers do not get along with: there these
 * tests are not built. */
#include <check.h>
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "tests/fault/baseline.h"
#include "tests/fault/bystander.h"
#include "tests/fault/control.h"
#include "tests/fault/shim.h"
#include "tests/fault/spawn.h"
#include "tests/fault/suite.h"
#include "tests/fault/wire.h"
#include "tests/fault/workload.h"

#define MAX_ALLOCATIONS 2000 /* of one life; more mean that the count never ends */
#define N_MEMFD_BYTES   65536
#define DAY_S           86400
#define STUCK_END_MS    4500 /* less than a worker has before it is killed */

static struct daemon_process epd_daemon;
static struct shim *shim;

static void start(void)
{
    char path[] = "/tmp/epd-shim-XXXXXX";
    int fd = mkstemp(path);
    ck_assert(fd >= 0 && ftruncate(fd, sizeof *shim) == 0);
    shim = mmap(NULL, sizeof *shim, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    ck_assert_ptr_ne(shim, MAP_FAILED);
    close(fd);
    setenv("FAULT_SHIM", path, 1);
    setenv("LD_PRELOAD", SHIM_LIBRARY, 1);
    daemon_start(&epd_daemon, 2, (const char *const[]){"--log-level", "error", "--warn", "50ms", NULL});
    unsetenv("LD_PRELOAD");
    unlink(path);
}

static void stop(void)
{
    daemon_stop(&epd_daemon);
}

/* Which request met the failure, for messages. */
static const char *at;

static enum epd_status ask(struct wire *wire, struct message message, int fd, const char *what)
{
    at = what;
    return wire_call(wire, &message, fd);
}

/* Everything that a client can ask for, up to the first refusal. Returns it. */
static enum epd_status live(struct wire *wire, int memfd)
{
    at = "hello";
    enum epd_status status = wire_hello(wire);
    if (status != EPD_OK)
        return status;
    status = ask(wire, wire_join_message("tight", 1, 0), -1, "join");
    if (status != EPD_OK)
        return status;
    const uint64_t group = wire->reply.reply_group.group_id;
    status = ask(wire, wire_alloc_message(group, 65536), -1, "alloc");
    if (status != EPD_OK)
        return status;
    const uint64_t buffer = wire->reply.reply_buffer.buffer_id;
    status = ask(wire, wire_register_message(group, 0, N_MEMFD_BYTES), memfd, "register");
    if (status != EPD_OK)
        return status;
    const uint64_t imported = wire->reply.reply_buffer.buffer_id;
    struct message_binding bindings[] = {
        {.role = EPD_ROLE_X, .buffer_id = imported, .dtype = EPD_F32, .n_dims = 2, .shape = {8, 32}},
        {.role = EPD_ROLE_TOPK_IDX, .buffer_id = buffer, .dtype = EPD_I64, .n_dims = 2, .shape = {8, 2}},
        {.role = EPD_ROLE_RECV_X,
         .buffer_id = buffer,
         .offset = 4096,
         .dtype = EPD_F32,
         .n_dims = 2,
         .shape = {64, 32}},
        {.role = EPD_ROLE_M_SPLITS,
         .buffer_id = buffer,
         .offset = 2048,
         .dtype = EPD_I64,
         .n_dims = 1,
         .shape = {4}}};
    struct message dispatch = {
        .kind = MESSAGE_PLAN_CREATE,
        .plan_create = {.group_id = group, .op = EPD_OP_DISPATCH, .n_bindings = 4, .bindings = bindings}};
    status = ask(wire, dispatch, -1, "plan");
    if (status != EPD_OK)
        return status;
    const struct message_reply_plan plan = wire->reply.reply_plan;
    for (int i = 0; i < 2 && status == EPD_OK; i++) {
        at = "launch";
        if (wire_launch(wire, &plan, 1) != 0)
            return EPD_DISCONNECTED;
        status = wire_done(wire, &plan);
        if (status == EPD_BAD_ROUTING) /* all zero: the same expert twice; a fine answer */
            status = EPD_OK;
    }
    if (status != EPD_OK)
        return status;
    status = ask(wire, (struct message){.kind = MESSAGE_STATS}, -1, "stats");
    if (status == EPD_OK)
        status = ask(wire, wire_id_message(MESSAGE_PLAN_DESTROY, plan.plan_id), -1, "destroy");
    if (status == EPD_OK)
        status = ask(wire, wire_id_message(MESSAGE_BUFFER_RELEASE, imported), -1, "release");
    return status;
}

START_TEST(every_allocation_may_fail_and_only_the_request_that_needed_it_does)
{
    static struct wire wire;
    struct baseline before;
    int n_failures = 0;
    int memfd = memfd_create("mine", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    ck_assert_int_eq(ftruncate(memfd, N_MEMFD_BYTES), 0);
    ck_assert_int_eq(fcntl(memfd, F_ADD_SEALS, F_SEAL_SHRINK), 0);
    ck_assert_int_eq(wire_connect(&wire, epd_daemon.socket_path), 0); /* pools fill up */
    enum epd_status status = live(&wire, memfd);
    ck_assert_msg(status == EPD_OK, "undisturbed %s: %s %s", at, status_name(status), wire.why);
    wire_close(&wire);
    baseline_take(&before, &epd_daemon);
    for (int n = 1;; n++) {
        ck_assert_int_lt(n, MAX_ALLOCATIONS);
        atomic_store(&shim->n_failed, 0);
        atomic_store(&shim->allocations_left, n);
        ck_assert_int_eq(wire_connect(&wire, epd_daemon.socket_path), 0);
        status = live(&wire, memfd);
        atomic_store(&shim->allocations_left, 0);
        const long n_failed = atomic_load(&shim->n_failed);
        ck_assert_msg(status == EPD_OK || status == EPD_NO_MEMORY || status == EPD_SYSTEM ||
                          status == EPD_DISCONNECTED,
                      "allocation %d failed: %s answers %s: %s", n, at, status_name(status), wire.why);
        ck_assert_msg(n_failed || status == EPD_OK, "nothing failed, but %s ends %s: %s", at,
                      status_name(status), wire.why);
        wire_close(&wire);
        ck_assert_msg(daemon_worker(&epd_daemon) == before.worker, "allocation %d of %s ended the worker", n,
                      at);
        n_failures += status != EPD_OK;
        if (!n_failed)
            break;
    }
    ck_assert_int_gt(n_failures, 10); /* it is about something */
    ck_assert_int_ge(baseline_wait(&before, &epd_daemon), 0);
    ck_assert_int_eq(wire_connect(&wire, epd_daemon.socket_path), 0);
    ck_assert_int_eq(live(&wire, memfd), EPD_OK);
    wire_close(&wire);
    close(memfd);
}
END_TEST

/* The control documents are made of hundreds of allocations, most of them of the JSON library. */
START_TEST(documents_without_memory_are_refused_or_answered_and_the_worker_lives)
{
    struct baseline before;
    struct bystander bystander;
    bystander_start(&bystander, epd_daemon.socket_path);
    baseline_take(&before, &epd_daemon);
    for (int verb = CONTROL_STATUS; verb <= CONTROL_DUMP; verb++) {
        for (int n = 1; n < 8 && verb != CONTROL_DRAIN && verb != CONTROL_EVICT; n++) {
            atomic_store(&shim->allocations_left, n);
            json_decref(control_ask(epd_daemon.control_path, (enum control_verb)verb, NULL));
            atomic_store(&shim->allocations_left, 0);
        }
    }
    ck_assert_int_ge(baseline_wait(&before, &epd_daemon), 0);
    bystander_stop(&bystander);
}
END_TEST

static void deadline_rank(const struct rank *rank)
{
    struct workload w;
    workload_open(&w, rank, &workload_case, 400);
    RANK_CHECK(workload_step(&w) == EPD_OK);
    if (rank->rank == 0) {
        const double begin = now_ms();
        RANK_CHECK(workload_step(&w) == EPD_TIMEOUT);
        RANK_CHECK(now_ms() - begin > 350); /* not before its time, and it does come */
    } else {
        sleep_ms(1500);
    }
    workload_close(&w);
}

START_TEST(deadlines_do_not_care_for_a_wall_clock_that_jumps_by_a_day)
{
    struct bystander bystander;
    bystander_start(&bystander, epd_daemon.socket_path);
    atomic_store(&shim->clock_jump_s, DAY_S);
    ck_assert_uint_eq(ranks_run(epd_daemon.socket_path, "jump", 2, deadline_rank, NULL), 0);
    bystander_stop(&bystander);
    const long jump_s = atomic_load(&shim->clock_jump_s);
    ck_assert(jump_s == DAY_S || jump_s == -DAY_S);
    json_t *status = control_ask(epd_daemon.control_path, CONTROL_STATUS, NULL);
    ck_assert_int_lt(control_number(status, "uptime_ms"), 10 * 60 * 1000);
    json_decref(status);
}
END_TEST

/* Replies that carry memory wait until the kernel takes fds again; everything else goes on, and nobody spins. */
START_TEST(fds_that_the_kernel_does_not_take_are_sent_later)
{
    static struct wire wire;
    struct bystander bystander;
    struct baseline before;
    bystander_start(&bystander, epd_daemon.socket_path);
    baseline_take(&before, &epd_daemon);
    ck_assert_int_eq(wire_connect(&wire, epd_daemon.socket_path), 0);
    ck_assert_int_eq(wire_hello(&wire), EPD_OK);
    ck_assert_int_eq(ask(&wire, wire_join_message("crowd", 1, 0), -1, "join"), EPD_OK);
    const uint64_t group = wire.reply.reply_group.group_id;
    atomic_store(&shim->n_crowded, 0);
    atomic_store(&shim->crowded, 1);
    struct message alloc = wire_alloc_message(group, 4096), stats = {.kind = MESSAGE_STATS};
    ck_assert_int_eq(wire_send(&wire, &alloc, -1), 0);
    ck_assert_int_eq(wire_send(&wire, &stats, -1), 0);
    sleep_ms(500);
    const long n_tries = atomic_load(&shim->n_crowded);
    ck_assert_msg(n_tries > 1 && n_tries < 50, "%ld tries in 500 ms", n_tries);
    atomic_store(&shim->crowded, 0);
    int n_buffers = 0, n_documents = 0; /* memory comes when the lane has made it */
    for (int i = 0; i < 2; i++) {
        ck_assert_int_eq(wire_receive(&wire, WIRE_DEADLINE_MS), WIRE_MESSAGE);
        n_buffers += wire.reply.kind == MESSAGE_REPLY_BUFFER && wire.reply_fd >= 0;
        n_documents += wire.reply.kind == MESSAGE_REPLY_DOCUMENT && wire.reply_fd >= 0;
    }
    ck_assert(n_buffers == 1 && n_documents == 1);
    wire_close(&wire);
    ck_assert_int_ge(baseline_wait(&before, &epd_daemon), 0);
    bystander_stop(&bystander);
}
END_TEST

/* The daemon ends with 0 although the record of its last failure cannot be written. */
static void stop_with_a_stuck_disk(void)
{
    const double begin = now_ms();
    ck_assert_int_gt(atomic_load(&shim->n_stuck), 0);
    daemon_stop(&epd_daemon);
    ck_assert_msg(now_ms() - begin < STUCK_END_MS, "%.0f ms", now_ms() - begin);
    start(); /* for the fixture */
}

static void wait_until_stuck(void)
{
    for (int waited = 0; !atomic_load(&shim->n_stuck); waited++) {
        ck_assert_int_lt(waited, WIRE_DEADLINE_MS);
        sleep_ms(1);
    }
}

START_TEST(a_disk_that_does_not_take_the_record_of_a_timeout_does_not_hold_up_the_end)
{
    atomic_store(&shim->stuck, 1);
    ck_assert_uint_eq(ranks_run(epd_daemon.socket_path, "stuck", 2, deadline_rank, NULL), 0);
    wait_until_stuck();
    stop_with_a_stuck_disk();
}
END_TEST

START_TEST(a_disk_that_does_not_take_the_record_of_a_killed_worker_does_not_hold_up_the_end)
{
    static struct wire wire;
    wire_open(&wire, epd_daemon.socket_path);
    struct message plan = wire_barrier_message(wire_join_alone(&wire, "stuck"));
    ck_assert_int_eq(wire_call(&wire, &plan, -1), EPD_OK);
    const struct message_reply_plan reply = wire.reply.reply_plan;
    ck_assert_int_eq(wire_launch(&wire, &reply, 1), 0);
    ck_assert_int_eq(wire_done(&wire, &reply), EPD_OK);
    atomic_store(&shim->stuck, 1);
    const pid_t worker = daemon_worker(&epd_daemon);
    kill(worker, SIGKILL);
    wait_until_stuck();
    (void)daemon_wait_worker(&epd_daemon, worker);
    wire_close(&wire);
    stop_with_a_stuck_disk();
}
END_TEST

/* A filter that forbids it for a while, say: nobody is accepted, nobody spins, and then all are served. */
START_TEST(a_socket_that_cannot_be_accepted_from_is_tried_again_without_spinning)
{
    static struct wire wire;
    atomic_store(&shim->deaf, 1);
    ck_assert_int_eq(wire_connect(&wire, epd_daemon.socket_path), 0);
    sleep_ms(500);
    const long n = atomic_load(&shim->n_deaf);
    ck_assert_msg(n > 1 && n < 50, "%ld tries in 500 ms", n);
    atomic_store(&shim->deaf, 0);
    ck_assert_int_eq(wire_hello(&wire), EPD_OK);
    wire_close(&wire);
}
END_TEST

int main(void)
{
    const TTest *const tests[] = {
        every_allocation_may_fail_and_only_the_request_that_needed_it_does,
        documents_without_memory_are_refused_or_answered_and_the_worker_lives,
        deadlines_do_not_care_for_a_wall_clock_that_jumps_by_a_day,
        fds_that_the_kernel_does_not_take_are_sent_later,
        a_socket_that_cannot_be_accepted_from_is_tried_again_without_spinning,
        a_disk_that_does_not_take_the_record_of_a_timeout_does_not_hold_up_the_end,
        a_disk_that_does_not_take_the_record_of_a_killed_worker_does_not_hold_up_the_end,
    };
    return suite_run("memory", tests, SUITE_COUNT(tests), start, stop);
}
