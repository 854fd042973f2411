/* Clients that die: idle, and after every message of their life. What they held is given back within a
 * second, the ranks beside them are told who is gone, and the next group of the same name works. */
#include <check.h>
#include <poll.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>

#include "tests/fault/baseline.h"
#include "tests/fault/bystander.h"
#include "tests/fault/suite.h"
#include "tests/fault/wire.h"
#include "tests/fault/workload.h"

#define N_IDLE_KILLS   1000
#define BUFFER_BYTES   (256 * 1024)
#define N_RANDOM_KILLS 12

static struct daemon_process epd_daemon;

static void start(void)
{
    const char *const quiet[] = {"--log-level", "warn", NULL};
    daemon_start(&epd_daemon, 2, quiet);
}

static void stop(void)
{
    daemon_stop(&epd_daemon);
}

/* ---- idle ---- */

/* A session with everything that a rank holds; every third one without a group. */
static void hold_and_wait(int n, int ready_fd)
{
    static struct wire wire;
    char name[32];
    wire_open(&wire, epd_daemon.socket_path);
    if (n % 3) {
        snprintf(name, sizeof name, "idle-%d", n);
        const uint64_t group = wire_join_alone(&wire, name);
        struct message alloc = wire_alloc_message(group, BUFFER_BYTES), plan = wire_barrier_message(group);
        if (wire_call(&wire, &alloc, -1) != EPD_OK || wire_call(&wire, &plan, -1) != EPD_OK)
            _exit(1);
    }
    if (write(ready_fd, "", 1) != 1)
        _exit(1);
    for (;;)
        pause();
}

static void kill_one_idle(int n)
{
    int ready[2];
    char byte;
    ck_assert_int_eq(pipe(ready), 0);
    pid_t pid = fork();
    if (pid == 0) {
        close(ready[0]);
        hold_and_wait(n, ready[1]);
    }
    close(ready[1]);
    ck_assert_msg(read(ready[0], &byte, 1) == 1, "client %d did not get ready", n);
    close(ready[0]);
    kill(pid, SIGKILL);
    ck_assert_int_eq(waitpid(pid, NULL, 0), pid);
}

START_TEST(a_thousand_clients_killed_while_idle_leave_nothing_and_nobody_notices)
{
    struct bystander bystander;
    struct baseline before;
    const int n_kills = SANITIZER_FACTOR == 1 ? N_IDLE_KILLS : N_IDLE_KILLS / 5;
    bystander_start(&bystander, epd_daemon.socket_path);
    for (int n = 0; n < 10; n++) /* pools and tables grow to their working size */
        kill_one_idle(n);
    baseline_take(&before, &epd_daemon);
    for (int n = 0; n < n_kills; n++) {
        kill_one_idle(n);
        if (n % 100 == 99)
            ck_assert_int_ge(baseline_wait(&before, &epd_daemon), 0);
    }
    ck_assert_int_ge(baseline_wait(&before, &epd_daemon), 0);
    bystander_stop(&bystander);
}
END_TEST

/* ---- in the middle of something ---- */

/* What a rank does before it dies, one message more at each stage. */
enum victim_stage {
    VICTIM_CONNECTED,
    VICTIM_GREETED,
    VICTIM_JOINING, /* asked, not answered */
    VICTIM_JOINED,
    VICTIM_ALLOCATING,
    VICTIM_ALLOCATED,
    VICTIM_PLANNING,
    VICTIM_PLANNED,
    VICTIM_READY,            /* flag set, nothing sent */
    VICTIM_LAUNCHED_UNREADY, /* sent without the flag: the lane finds it missing */
    VICTIM_LAUNCHED,
    VICTIM_STEPPED,
    VICTIM_STAGE_COUNT
};

/* Runs as rank 1 of a barrier group until `stage`, then kills itself. */
static void victim(enum victim_stage stage, const char *group)
{
    static struct wire wire;
    struct message_reply_plan plan;
    struct message join = wire_join_message(group, 2, 1), message;
    for (int at = VICTIM_CONNECTED; at <= (int)stage; at++) {
        int failed = 0;
        switch ((enum victim_stage)at) {
        case VICTIM_CONNECTED:
            failed = wire_connect(&wire, epd_daemon.socket_path);
            break;
        case VICTIM_GREETED:
            failed = wire_hello(&wire) != EPD_OK;
            break;
        case VICTIM_JOINING:
            failed = wire_send(&wire, &join, -1);
            break;
        case VICTIM_JOINED:
        case VICTIM_ALLOCATED:
        case VICTIM_PLANNED:
            failed = wire_answer(&wire) != EPD_OK;
            plan = wire.reply.reply_plan;
            if (at == VICTIM_JOINED)
                join.request_id = wire.reply.reply_group.group_id; /* kept for the next messages */
            break;
        case VICTIM_ALLOCATING:
            message = wire_alloc_message(join.request_id, BUFFER_BYTES);
            failed = wire_send(&wire, &message, -1);
            break;
        case VICTIM_PLANNING:
            message = wire_barrier_message(join.request_id);
            failed = wire_send(&wire, &message, -1);
            break;
        case VICTIM_READY:
            if (stage != VICTIM_LAUNCHED_UNREADY)
                flag_set(&wire.page->plans[plan.flag_idx].ready);
            break;
        case VICTIM_LAUNCHED_UNREADY:
            failed = wire_launch(&wire, &plan, 0);
            break;
        case VICTIM_LAUNCHED:
            break; /* the flag was set before */
        case VICTIM_STEPPED:
            failed = wire_done(&wire, &plan) != EPD_OK;
            break;
        default:
            break;
        }
        if (failed)
            _exit(1);
    }
    kill(getpid(), SIGKILL);
}

static void victim_rank(const struct rank *rank)
{
    victim(*(const enum victim_stage *)rank->arg, rank->group_name);
}

static pid_t start_victim(enum victim_stage stage, const char *group)
{
    pid_t pid = fork();
    if (pid == 0)
        victim_rank(
            &(struct rank){.socket_path = epd_daemon.socket_path, .group_name = group, .arg = &stage});
    return pid;
}

static void expect_blamed(enum epd_status got, enum epd_status want, const char *text, const char *words,
                          enum victim_stage stage)
{
    ck_assert_msg(got == want && strstr(text, words), "stage %d: want %s naming \"%s\", got %s: %s",
                  (int)stage, status_name(want), words, status_name(got), text);
}

/* Launches until the group is found broken; the page must blame rank 1. */
static void survive_steps(struct wire *wire, const struct message_reply_plan *plan, enum victim_stage stage)
{
    struct page_entry entry;
    uint64_t seen = 0;
    enum epd_status status = EPD_OK;
    for (int i = 0; i < 3 && status == EPD_OK; i++) {
        ck_assert_int_eq(wire_launch(wire, plan, 1), 0);
        status = wire_done(wire, plan);
    }
    ck_assert_msg(status == EPD_PEER_LOST, "stage %d: the step ended %s", (int)stage, status_name(status));
    ck_assert(page_take(wire->page, plan->plan_id, &seen, &entry));
    ck_assert_int_eq(entry.rank, 1);
    expect_blamed((enum epd_status)entry.status, EPD_PEER_LOST, entry.text, "rank 1", stage);
}

/* Rank 0, alive throughout: gets as far as the victim lets it. */
static void survivor(enum victim_stage stage, const char *group)
{
    static struct wire wire;
    wire_open(&wire, epd_daemon.socket_path);
    struct message join = wire_join_message(group, 2, 0), plan;
    ck_assert_int_eq(wire_send(&wire, &join, -1), 0);
    pid_t pid = start_victim(stage, group);
    int status;
    ck_assert_int_eq(waitpid(pid, &status, 0), pid);
    ck_assert_msg(WIFSIGNALED(status), "stage %d: the victim failed before it died", (int)stage);
    if (stage < VICTIM_JOINING) { /* the group still waits for rank 1: leave it alone */
        ck_assert_int_eq(wire_receive(&wire, 50), WIRE_NOTHING);
        wire_close(&wire);
        return;
    }
    /* Its join may have met ours, or its end may have overtaken it. */
    struct pollfd readable = {.fd = wire.socket, .events = POLLIN};
    if (stage == VICTIM_JOINING && poll(&readable, 1, 300) == 0) {
        wire_close(&wire);
        return;
    }
    ck_assert_int_eq(wire_answer(&wire), EPD_OK);
    plan = wire_barrier_message(wire.reply.reply_group.group_id);
    enum epd_status made = wire_call(&wire, &plan, -1);
    if (stage < VICTIM_PLANNING)
        expect_blamed(made, EPD_PEER_LOST, wire.why, "rank 1", stage);
    if (made == EPD_OK) {
        const struct message_reply_plan reply = wire.reply.reply_plan;
        survive_steps(&wire, &reply, stage);
    }
    wire_close(&wire);
}

/* For the stages after the plan the victim needs the survivor's plan and launch meanwhile: both run at once.
 */
static void survivor_rank(const struct rank *rank)
{
    static struct wire wire;
    const enum victim_stage stage = *(const enum victim_stage *)rank->arg;
    if (rank->rank == 1)
        victim_rank(rank);
    wire_open(&wire, rank->socket_path);
    struct message join = wire_join_message(rank->group_name, 2, 0);
    RANK_CHECK(wire_call(&wire, &join, -1) == EPD_OK);
    struct message plan = wire_barrier_message(wire.reply.reply_group.group_id);
    enum epd_status made = wire_call(&wire, &plan, -1);
    if (made == EPD_PEER_LOST && stage == VICTIM_PLANNING)
        return; /* the end overtook the plan */
    RANK_CHECK(made == EPD_OK);
    const struct message_reply_plan reply = wire.reply.reply_plan;
    survive_steps(&wire, &reply, stage);
    wire_close(&wire);
}

static void next_group_rank(const struct rank *rank)
{
    struct workload w;
    workload_open(&w, rank, &workload_case, 0);
    for (int i = 0; i < 3; i++)
        RANK_CHECK(workload_step(&w) == EPD_OK);
    workload_close(&w);
}

START_TEST(a_client_killed_after_any_message_is_named_and_the_next_group_works)
{
    struct bystander bystander;
    struct baseline before;
    struct rank_team team;
    bystander_start(&bystander, epd_daemon.socket_path);
    survivor(VICTIM_ALLOCATED, "warm");
    baseline_take(&before, &epd_daemon);
    for (int stage = VICTIM_CONNECTED; stage < VICTIM_STAGE_COUNT; stage++) {
        enum victim_stage at = (enum victim_stage)stage;
        if (at < VICTIM_PLANNING) {
            survivor(at, "stages");
        } else {
            ranks_start(&team, epd_daemon.socket_path, "stages", 2, survivor_rank, &at);
            ck_assert_msg(ranks_wait(&team, 60) == 1, "stage %d: not exactly the victim ended badly", stage);
        }
        ck_assert_msg(ranks_run(epd_daemon.socket_path, "stages", 2, next_group_rank, NULL) == 0,
                      "stage %d: the next group does not work", stage);
        ck_assert_msg(baseline_wait(&before, &epd_daemon) >= 0, "stage %d", stage);
    }
    bystander_stop(&bystander);
}
END_TEST

/* Killed from outside once it steps, wherever it happens to be: the survivor's steps end EPD_OK or EPD_PEER_LOST. */
static void stepping_rank(const struct rank *rank)
{
    _Atomic int *n_stepping = *(_Atomic int *const *)rank->arg;
    struct workload w;
    struct epd_failure failure = {.size = sizeof(failure)};
    enum epd_status status;
    workload_open(&w, rank, &workload_case, 0);
    RANK_CHECK(workload_step(&w) == EPD_OK);
    atomic_fetch_add(n_stepping, 1);
    while ((status = workload_step(&w)) == EPD_OK)
        ;
    RANK_CHECK(status == EPD_PEER_LOST);
    RANK_CHECK(epd_plan_failure(w.forward, &failure) == EPD_OK && failure.rank == 1);
    RANK_CHECK(strstr(failure.text, "rank 1") != NULL);
    workload_close(&w);
}

START_TEST(a_rank_killed_in_the_middle_of_steps_is_named_and_nothing_stays)
{
    struct baseline before;
    _Atomic int *n_stepping =
        mmap(NULL, sizeof(*n_stepping), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    ck_assert(n_stepping != MAP_FAILED);
    ck_assert_uint_eq(ranks_run(epd_daemon.socket_path, "random", 2, next_group_rank, NULL), 0);
    baseline_take(&before, &epd_daemon);
    for (int i = 0; i < N_RANDOM_KILLS; i++) {
        struct rank_team team;
        atomic_store(n_stepping, 0);
        ranks_start(&team, epd_daemon.socket_path, "random", 2, stepping_rank, &n_stepping);
        struct timespec t = {.tv_nsec = 1000000};
        while (atomic_load(n_stepping) < 2) /* a rank that fails before leaves its suite to the time limit */
            nanosleep(&t, NULL);
        t.tv_nsec = 17 * i * 1000000l;
        nanosleep(&t, NULL);
        kill(team.pids[1], SIGKILL);
        ck_assert_uint_eq(ranks_wait(&team, 60), 1);
        ck_assert_int_ge(baseline_wait(&before, &epd_daemon), 0);
    }
}
END_TEST

int main(void)
{
    const TTest *const tests[] = {
        a_thousand_clients_killed_while_idle_leave_nothing_and_nobody_notices,
        a_client_killed_after_any_message_is_named_and_the_next_group_works,
        a_rank_killed_in_the_middle_of_steps_is_named_and_nothing_stays,
    };
    return suite_run("reclaim", tests, SUITE_COUNT(tests), start, stop);
}
