/* Ranks that are late, stopped or silent: the others get their answer at the deadline with the rank's name,
 * the one that comes back learns what became of it, and slowness below the deadline shows in the stats only.
 */
#include <check.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>

#include "tests/fault/baseline.h"
#include "tests/fault/bystander.h"
#include "tests/fault/control.h"
#include "tests/fault/spawn.h"
#include "tests/fault/suite.h"
#include "tests/fault/wire.h"
#include "tests/fault/workload.h"

#define STEP_DEADLINE_MS 400
#define DEAD_MS          "1500ms"
#define N_SLOW_STEPS     5
#define SLOW_MS          60

static struct daemon_process epd_daemon;

static void start(void)
{
    const char *const timers[] = {"--warn", "100ms", "--stuck", "600ms", "--dead", DEAD_MS, NULL};
    daemon_start(&epd_daemon, 2, timers);
}

static void stop(void)
{
    daemon_stop(&epd_daemon);
}

struct stopped {
    atomic_int ready; /* rank 1 has stepped and may be stopped */
    atomic_int done;  /* rank 0 is through */
};

static void stopped_rank(const struct rank *rank)
{
    struct stopped *shared = *(struct stopped *const *)rank->arg;
    struct workload w;
    struct epd_failure failure = {.size = sizeof(failure)};
    workload_open(&w, rank, &workload_case, STEP_DEADLINE_MS);
    RANK_CHECK(workload_step(&w) == EPD_OK);
    if (rank->rank == 1) {
        atomic_store(&shared->ready, 1);
        while (!atomic_load(&shared->done)) /* stopped here */
            sleep_ms(1);
        RANK_CHECK(workload_step(&w) == EPD_EVICTED);
        RANK_CHECK(strstr(epd_error_text(), "rank 1") != NULL);
        workload_close(&w);
        return;
    }
    while (atomic_load(&shared->ready) < 2)
        sleep_ms(1);
    RANK_CHECK(workload_step(&w) == EPD_TIMEOUT);
    RANK_CHECK(epd_plan_failure(w.forward, &failure) == EPD_OK);
    RANK_CHECK(failure.rank == 1 && failure.phase == EPD_PHASE_GATHER);
    RANK_CHECK(strstr(failure.text, "rank 1") != NULL);
    /* later: the dead timer has evicted it, and the group says so */
    enum epd_status status = EPD_TIMEOUT;
    for (int i = 0; i < 100 && status == EPD_TIMEOUT; i++)
        status = workload_step(&w);
    RANK_CHECK(status == EPD_PEER_LOST);
    atomic_store(&shared->done, 1);
    workload_close(&w);
}

START_TEST(a_stopped_rank_is_warned_of_timed_out_evicted_and_learns_it_when_it_goes_on)
{
    struct rank_team team;
    struct bystander bystander;
    struct stopped *shared =
        mmap(NULL, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    bystander_start(&bystander, epd_daemon.socket_path);
    ranks_start(&team, epd_daemon.socket_path, "stopped", 2, stopped_rank, &shared);
    while (!atomic_load(&shared->ready))
        sleep_ms(1);
    kill(team.pids[1], SIGSTOP);
    waitpid(team.pids[1], NULL, WUNTRACED);
    atomic_store(&shared->ready, 2);
    for (int waited = 0; !atomic_load(&shared->done); waited++) {
        ck_assert_msg(waited < 30000, "rank 0 does not get through");
        sleep_ms(1);
    }
    kill(team.pids[1], SIGCONT);
    ck_assert_uint_eq(ranks_wait(&team, 60), 0);
    ck_assert(file_contains(epd_daemon.log_path, "missing_ranks 1"));
    json_t *stats = control_ask(epd_daemon.control_path, CONTROL_STATS, NULL);
    ck_assert_int_eq(control_number(stats, "sessions.closed.dead"), 1);
    json_decref(stats);
    bystander_stop(&bystander);
}
END_TEST

/* Two of three ranks missing: both are named. */
static void alone_rank(const struct rank *rank)
{
    static struct wire wire;
    atomic_int *n_late = *(atomic_int *const *)rank->arg;
    wire_open(&wire, rank->socket_path);
    struct message join = wire_join_message(rank->group_name, 3, rank->rank);
    join.group_join.config.deadline_ms = STEP_DEADLINE_MS;
    RANK_CHECK(wire_call(&wire, &join, -1) == EPD_OK);
    struct message plan = wire_barrier_message(wire.reply.reply_group.group_id);
    RANK_CHECK(wire_call(&wire, &plan, -1) == EPD_OK);
    const struct message_reply_plan reply = wire.reply.reply_plan;
    if (rank->rank == 1) {
        struct page_entry entry;
        uint64_t seen = 0;
        RANK_CHECK(wire_launch(&wire, &reply, 1) == 0);
        RANK_CHECK(wire_done(&wire, &reply) == EPD_TIMEOUT);
        RANK_CHECK(page_take(wire.page, reply.plan_id, &seen, &entry));
        RANK_CHECK(strstr(entry.text, "rank 0 2") != NULL && entry.rank == 0);
        while (atomic_load(n_late) < 2) /* who leaves breaks the group */
            sleep_ms(1);
    } else {
        sleep_ms(2 * STEP_DEADLINE_MS);
        RANK_CHECK(wire_launch(&wire, &reply, 1) == 0); /* too late: the same, at once */
        RANK_CHECK(wire_done(&wire, &reply) == EPD_TIMEOUT);
        atomic_fetch_add(n_late, 1);
        while (atomic_load(n_late) < 2)
            sleep_ms(1);
    }
    wire_close(&wire);
}

START_TEST(every_missing_rank_is_named_and_late_ones_get_the_same_answer)
{
    atomic_int *n_late =
        mmap(NULL, sizeof *n_late, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    ck_assert_uint_eq(ranks_run(epd_daemon.socket_path, "alone", 3, alone_rank, &n_late), 0);
}
END_TEST

static void slow_rank(const struct rank *rank)
{
    struct workload w;
    workload_open(&w, rank, &workload_case, 30000);
    for (int i = 0; i < N_SLOW_STEPS; i++) {
        if (rank->rank == 1)
            sleep_ms(SLOW_MS);
        RANK_CHECK(workload_step(&w) == EPD_OK);
    }
    if (rank->rank == 1) {
        char *text;
        RANK_CHECK(epd_stats(w.layer.client, &text) == EPD_OK);
        json_t *stats = json_loads(text, 0, NULL), *group = NULL, *item;
        size_t i;
        json_array_foreach (json_object_get(stats, "groups"), i, item) {
            if (strcmp(json_string_value(json_object_get(item, "name")), rank->group_name) == 0)
                group = item;
        }
        RANK_CHECK(group != NULL);
        const json_t *me = json_array_get(json_object_get(group, "ranks"), 1);
        RANK_CHECK(control_number(me, "came_last") == N_SLOW_STEPS);
        RANK_CHECK(control_number(me, "held_up_ns") > 1000000ll * SLOW_MS * (N_SLOW_STEPS - 1) / 2);
        json_decref(stats);
        epd_free(text);
    }
    RANK_CHECK(workload_step(&w) == EPD_OK); /* nobody leaves while the other looks */
    workload_close(&w);
}

START_TEST(a_slow_rank_below_the_deadline_succeeds_and_shows_as_the_straggler)
{
    ck_assert_uint_eq(ranks_run(epd_daemon.socket_path, "slow", 2, slow_rank, NULL), 0);
}
END_TEST

int main(void)
{
    const TTest *const tests[] = {
        a_stopped_rank_is_warned_of_timed_out_evicted_and_learns_it_when_it_goes_on,
        every_missing_rank_is_named_and_late_ones_get_the_same_answer,
        a_slow_rank_below_the_deadline_succeeds_and_shows_as_the_straggler,
    };
    return suite_run("slow", tests, SUITE_COUNT(tests), start, stop);
}
