/* Seeded chaos: teams of ranks work while ranks are killed and stopped, sessions evicted, the worker killed,
 * and hostile clients come and go. Afterwards: no wrong answer, no hang, no status that no fault explains, no
 * counter that fell, and the daemon holds what it held before.
 *
 *   chaos [--seed N] [--seconds N] [--report]
 *
 * The same seed gives the same actions in the same order; --report prints one JSON line in the end. */
#include "tests/fault/chaos.h"

#include <getopt.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "tests/fault/baseline.h"
#include "tests/fault/control.h"
#include "tests/fault/spawn.h"
#include "tests/fault/wire.h"
#include "tests/fault/workload.h"
#include "tests/reference/values.h"

#define N_TEAMS      3
#define PAUSE_MIN_MS 5
#define PAUSE_MAX_MS 60
#define STOP_MAX_MS  4000 /* longer than the dead timer: some stopped ranks are evicted */
#define CALM_MS      20000

enum action {
    ACTION_KILL_RANK,
    ACTION_STOP_RANK,
    ACTION_KILL_WORKER,
    ACTION_EVICT,
    ACTION_GARBAGE,
    ACTION_SILENT,
    ACTION_HALF_CLIENT,
    ACTION_RELOAD,
    ACTION_LOOK,
    ACTION_COUNT
};

static const struct {
    const char *name;
    unsigned weight;
} actions[ACTION_COUNT] = {
    [ACTION_KILL_RANK] = {"kill_rank", 30},
    [ACTION_STOP_RANK] = {"stop_rank", 6},
    [ACTION_KILL_WORKER] = {"kill_worker", 3},
    [ACTION_EVICT] = {"evict", 8},
    [ACTION_GARBAGE] = {"garbage", 20},
    [ACTION_SILENT] = {"silent", 8},
    [ACTION_HALF_CLIENT] = {"half_client", 15},
    [ACTION_RELOAD] = {"reload", 2},
    [ACTION_LOOK] = {"look", 8},
};

struct driver {
    struct daemon_process daemon;
    struct chaos *chaos;
    pid_t pids[N_TEAMS][CHAOS_RANKS], scraper, machine;
    uint64_t continue_us[N_TEAMS][CHAOS_RANKS]; /* when a stopped rank goes on; 0: it runs */
    uint64_t seed, first_seed;
    unsigned long n_done[ACTION_COUNT];
    struct baseline before;
};

static uint64_t draw(struct driver *driver, uint64_t n)
{
    return values_random(&driver->seed) % n;
}

static void fail(const struct driver *driver, const char *what)
{
    fprintf(stderr, "chaos: %s; replay with --seed %llu\n", what, (unsigned long long)driver->first_seed);
    daemon_print_log(&driver->daemon);
    for (unsigned i = 0; i < N_TEAMS * CHAOS_RANKS; i++)
        if (driver->pids[i / CHAOS_RANKS][i % CHAOS_RANKS])
            kill(driver->pids[i / CHAOS_RANKS][i % CHAOS_RANKS], SIGKILL);
    kill(driver->daemon.pid, SIGKILL);
    exit(EXIT_FAILURE);
}

/* ---- processes ---- */

static void start_rank(struct driver *driver, unsigned team, unsigned rank)
{
    struct chaos_rank *shared = &driver->chaos->teams[team].ranks[rank];
    const struct chaos_role role = {.chaos = driver->chaos,
                                    .socket_path = driver->daemon.socket_path,
                                    .team = team,
                                    .rank = rank,
                                    .seed = driver->first_seed ^
                                            (team * 2 + rank + 1) * 0x9e3779b97f4a7c15ull ^
                                            atomic_fetch_add(&shared->life, 1)};
    atomic_store(&shared->alive_ms, chaos_now_us() / 1000);
    pid_t pid = fork();
    if (pid == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        chaos_rank_run(&role);
    }
    driver->pids[team][rank] = pid;
}

static void reap_rank(struct driver *driver, unsigned team, unsigned rank)
{
    int status;
    waitpid(driver->pids[team][rank], &status, 0);
    if (WIFEXITED(status) && WEXITSTATUS(status) == WORKLOAD_WRONG)
        atomic_fetch_add(&driver->chaos->n_wrong, 1);
    driver->pids[team][rank] = 0;
    driver->continue_us[team][rank] = 0;
}

/* ---- what happens ---- */

static void kill_rank(struct driver *driver)
{
    const unsigned team = (unsigned)draw(driver, N_TEAMS), rank = (unsigned)draw(driver, CHAOS_RANKS);
    const uint64_t now_us = chaos_now_us();
    kill(driver->pids[team][rank], SIGKILL);
    atomic_store(&driver->chaos->teams[team].noticing_us, now_us);
    atomic_store(&driver->chaos->teams[team].killed_us, now_us);
    reap_rank(driver, team, rank);
    start_rank(driver, team, rank);
}

static void stop_rank(struct driver *driver)
{
    const unsigned team = (unsigned)draw(driver, N_TEAMS), rank = (unsigned)draw(driver, CHAOS_RANKS);
    const uint64_t ms = draw(driver, 4) ? draw(driver, 300) : draw(driver, STOP_MAX_MS);
    if (driver->continue_us[team][rank])
        return;
    kill(driver->pids[team][rank], SIGSTOP);
    driver->continue_us[team][rank] = chaos_now_us() + ms * 1000;
}

static void continue_stopped(struct driver *driver, int all)
{
    for (unsigned team = 0; team < N_TEAMS; team++) {
        for (unsigned rank = 0; rank < CHAOS_RANKS; rank++) {
            uint64_t *at_us = &driver->continue_us[team][rank];
            if (!*at_us || (!all && chaos_now_us() < *at_us))
                continue;
            *at_us = 0;
            atomic_store(&driver->chaos->teams[team].ranks[rank].alive_ms, chaos_now_us() / 1000);
            kill(driver->pids[team][rank], SIGCONT);
        }
    }
}

static void kill_worker(struct driver *driver)
{
    pid_t worker = daemon_worker(&driver->daemon);
    if (!worker)
        return;
    atomic_store(&driver->chaos->worker_killed_us, chaos_now_us());
    kill(worker, SIGKILL);
}

static void evict(struct driver *driver)
{
    const uint64_t pick = draw(driver, 64);
    json_t *clients = control_ask(driver->daemon.control_path, CONTROL_CLIENTS, NULL);
    const json_t *sessions = json_object_get(clients, "sessions");
    if (json_array_size(sessions)) {
        const json_t *session = json_array_get(sessions, pick % json_array_size(sessions));
        (void)control_evict(driver->daemon.control_path, (uint64_t)control_number(session, "session_id"),
                            "chaos");
    }
    json_decref(clients);
}

static void garbage(struct driver *driver)
{
    static struct wire wire;
    unsigned char bytes[512];
    const int greet = draw(driver, 2) != 0;
    const size_t n = 1 + (size_t)draw(driver, sizeof bytes);
    for (size_t i = 0; i < sizeof bytes; i++)
        bytes[i] = (unsigned char)draw(driver, 256);
    if (wire_connect(&wire, draw(driver, 4) ? driver->daemon.socket_path : driver->daemon.control_path) != 0)
        return;
    struct message hello = {.kind = MESSAGE_HELLO, .hello = {.major = EPD_PROTOCOL_MAJOR}};
    if (greet)
        (void)!wire_send(&wire, &hello, -1);
    (void)!wire_send_bytes(&wire, bytes, n, NULL, 0);
    wire_close(&wire);
}

/* Connects and says nothing; the fd lives in a child that dies sometime. */
static void silent(struct driver *driver)
{
    static struct wire wire;
    const uint64_t ms = draw(driver, 500);
    pid_t pid = fork();
    if (pid == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        (void)!wire_connect(&wire, driver->daemon.socket_path);
        sleep_ms((long)ms);
        _exit(0);
    }
}

/* A rank that joins a group with nobody else, allocates, and dies. */
static void half_client(struct driver *driver)
{
    static struct wire wire;
    const unsigned n_messages = (unsigned)draw(driver, 5);
    struct message messages[] = {{.kind = MESSAGE_HELLO, .hello = {.major = EPD_PROTOCOL_MAJOR}},
                                 wire_join_message("half", 1 + (uint32_t)draw(driver, 2), 0),
                                 wire_alloc_message(1 + draw(driver, 100), 4096),
                                 {.kind = MESSAGE_STATS}};
    if (wire_connect(&wire, driver->daemon.socket_path) != 0)
        return;
    for (unsigned i = 0; i < n_messages && i < 4; i++)
        (void)!wire_send(&wire, &messages[i], -1);
    wire_close(&wire);
}

static void look(struct driver *driver)
{
    static const enum control_verb verbs[] = {CONTROL_STATUS, CONTROL_CLIENTS, CONTROL_GROUPS,
                                              CONTROL_PLANS,  CONTROL_DEVICES, CONTROL_DUMP};
    json_decref(control_ask(driver->daemon.control_path, verbs[draw(driver, 6)], NULL));
}

static void act(struct driver *driver)
{
    unsigned sum = 0;
    for (int i = 0; i < ACTION_COUNT; i++)
        sum += actions[i].weight;
    uint64_t mark = draw(driver, sum);
    int action = 0;
    while (mark >= actions[action].weight)
        mark -= actions[action++].weight;
    driver->n_done[action]++;
    switch ((enum action)action) {
    case ACTION_KILL_RANK:
        kill_rank(driver);
        break;
    case ACTION_STOP_RANK:
        stop_rank(driver);
        break;
    case ACTION_KILL_WORKER:
        kill_worker(driver);
        break;
    case ACTION_EVICT:
        evict(driver);
        break;
    case ACTION_GARBAGE:
        garbage(driver);
        break;
    case ACTION_SILENT:
        silent(driver);
        break;
    case ACTION_HALF_CLIENT:
        half_client(driver);
        break;
    case ACTION_RELOAD:
        kill(driver->daemon.pid, SIGHUP);
        break;
    default:
        look(driver);
    }
}

/* ---- watching ---- */

static void check_ranks(struct driver *driver)
{
    const uint64_t now_ms = chaos_now_us() / 1000;
    for (unsigned team = 0; team < N_TEAMS; team++) {
        for (unsigned rank = 0; rank < CHAOS_RANKS; rank++) {
            const struct chaos_rank *shared = &driver->chaos->teams[team].ranks[rank];
            siginfo_t info = {0};
            if (!driver->continue_us[team][rank] && atomic_load(&shared->alive_ms) + CHAOS_HANG_MS < now_ms)
                fail(driver, "a rank hangs");
            if (waitid(P_PID, (id_t)driver->pids[team][rank], &info, WEXITED | WNOHANG | WNOWAIT) == 0 &&
                info.si_pid && !atomic_load(&driver->chaos->stop))
                fail(driver, "a rank ended by itself");
        }
    }
    if (kill(driver->daemon.pid, 0) != 0 || waitpid(driver->daemon.pid, NULL, WNOHANG) == driver->daemon.pid)
        fail(driver, "the daemon ended");
}

/* Every team must get to work again when nobody disturbs it any more. */
static void wait_for_calm(struct driver *driver)
{
    continue_stopped(driver, 1);
    const uint64_t begin_us = chaos_now_us();
    for (unsigned team = 0; team < N_TEAMS; team++) {
        const struct chaos_rank *rank = &driver->chaos->teams[team].ranks[0];
        const unsigned long n_good = atomic_load(&rank->n_good);
        while (atomic_load(&rank->n_good) < n_good + 3) {
            if (chaos_now_us() - begin_us > CALM_MS * 1000ull * SANITIZER_FACTOR)
                fail(driver, "a team does not get to work again");
            sleep_ms(5);
        }
    }
}

static void stop_all(struct driver *driver)
{
    atomic_store(&driver->chaos->stop, 1);
    waitpid(driver->scraper, NULL, 0);
    waitpid(driver->machine, NULL, 0);
    for (unsigned team = 0; team < N_TEAMS; team++) {
        for (unsigned rank = 0; rank < CHAOS_RANKS; rank++) {
            for (int waited = 0; waited < 3000; waited += 10) { /* one may wait for a peer that has left */
                siginfo_t info = {0};
                waitid(P_PID, (id_t)driver->pids[team][rank], &info, WEXITED | WNOHANG | WNOWAIT);
                if (info.si_pid)
                    break;
                sleep_ms(10);
            }
            kill(driver->pids[team][rank], SIGKILL);
            reap_rank(driver, team, rank);
        }
    }
    while (waitpid(-1, NULL, WNOHANG) > 0) /* the silent ones */
        ;
}

/* Another worker may serve now: its numbers are compared all the same. */
static void check_resources(struct driver *driver)
{
    driver->before.worker = daemon_wait_worker(&driver->daemon, 0);
    driver->before.rss_kib += BASELINE_RSS_SLACK_KIB; /* pools of many sessions */
    if (baseline_wait(&driver->before, &driver->daemon) < 0)
        fail(driver, "the daemon holds more than before");
}

static int verdict(struct driver *driver)
{
    struct chaos *chaos = driver->chaos;
    int n_bad =
        atomic_load(&chaos->n_wrong) + atomic_load(&chaos->n_unexpected) + atomic_load(&chaos->n_backwards);
    unsigned long n_good = 0;
    for (unsigned team = 0; team < N_TEAMS; team++)
        n_good += atomic_load(&chaos->teams[team].ranks[0].n_good);
    if (n_bad || !n_good)
        fprintf(stderr, "chaos: wrong %d unexpected %d backwards %d good %lu; replay with --seed %llu\n",
                atomic_load(&chaos->n_wrong), atomic_load(&chaos->n_unexpected),
                atomic_load(&chaos->n_backwards), n_good, (unsigned long long)driver->first_seed);
    return n_bad || !n_good;
}

static void report_times(const char *name, struct chaos_samples *samples)
{
    printf(",\"%s_ms\":{\"n\":%u,\"p50\":%.2f,\"p99\":%.2f,\"max\":%.2f}", name, atomic_load(&samples->n),
           chaos_quantile_ms(samples, 0.5), chaos_quantile_ms(samples, 0.99), chaos_quantile_ms(samples, 1));
}

static void report(struct driver *driver, double seconds)
{
    struct chaos *chaos = driver->chaos;
    unsigned long n_good = 0, ended[CHAOS_N_STATUSES] = {0}, n_actions = 0;
    for (unsigned i = 0; i < N_TEAMS * CHAOS_RANKS; i++) {
        const struct chaos_rank *rank = &chaos->teams[i / CHAOS_RANKS].ranks[i % CHAOS_RANKS];
        n_good += atomic_load(&rank->n_good);
        for (int status = 0; status < CHAOS_N_STATUSES; status++)
            ended[status] += atomic_load(&rank->n_ended[status]);
    }
    for (int i = 0; i < ACTION_COUNT; i++)
        n_actions += driver->n_done[i];
    printf("{\"test\":\"chaos\",\"seed\":%llu,\"seconds\":%.0f,\"actions\":%lu",
           (unsigned long long)driver->first_seed, seconds, n_actions);
    for (int i = 0; i < ACTION_COUNT; i++)
        printf(",\"%s\":%lu", actions[i].name, driver->n_done[i]);
    printf(",\"good_steps\":%lu,\"wrong\":%d,\"unexpected\":%d,\"ended\":{", n_good,
           atomic_load(&chaos->n_wrong), atomic_load(&chaos->n_unexpected));
    const char *comma = "";
    for (int status = 0; status < CHAOS_N_STATUSES; status++) {
        if (!ended[status])
            continue;
        printf("%s\"%s\":%lu", comma, status_name((enum epd_status)status), ended[status]);
        comma = ",";
    }
    printf("}");
    report_times("peer_notice", &chaos->peer_notice);
    report_times("peer_serve", &chaos->peer_serve);
    report_times("worker_notice", &chaos->worker_notice);
    report_times("worker_serve", &chaos->worker_serve);
    report_times("scrape", &chaos->scrape);
    report_times("machine", &chaos->machine);
    printf(",\"unanswered_scrapes\":%lu}\n", atomic_load(&chaos->n_unanswered));
}

/* ---- the run ---- */

static void start_all(struct driver *driver)
{
    const char *const options[] = {
        "--log-level", "warn",   "--restart-first", "5ms",     "--restart-max", "20ms",   "--restart-limit",
        "0",           "--warn", "500ms",           "--stuck", "1500ms",        "--dead", "3s",
        "--join",      "4s",     "--plan",          "4s",      "--hello",       "300ms",  NULL};
    daemon_start(&driver->daemon, 2, options);
    driver->chaos =
        mmap(NULL, sizeof *driver->chaos, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (driver->chaos == MAP_FAILED)
        abort();
    baseline_take(&driver->before, &driver->daemon);
    driver->scraper = fork();
    if (driver->scraper == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        chaos_scraper_run(driver->chaos, driver->daemon.control_path);
    }
    driver->machine = fork();
    if (driver->machine == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        chaos_machine_run(driver->chaos);
    }
    for (unsigned i = 0; i < N_TEAMS * CHAOS_RANKS; i++)
        start_rank(driver, i / CHAOS_RANKS, i % CHAOS_RANKS);
}

static int run(struct driver *driver, double seconds, int with_report)
{
    start_all(driver);
    const uint64_t end_us = chaos_now_us() + (uint64_t)(seconds * 1e6);
    while (chaos_now_us() < end_us) {
        act(driver);
        continue_stopped(driver, 0);
        check_ranks(driver);
        sleep_ms(PAUSE_MIN_MS + (long)draw(driver, PAUSE_MAX_MS - PAUSE_MIN_MS));
    }
    wait_for_calm(driver);
    stop_all(driver);
    check_resources(driver);
    const int bad = verdict(driver);
    if (with_report)
        report(driver, seconds);
    daemon_stop(&driver->daemon);
    return bad ? EXIT_FAILURE : EXIT_SUCCESS;
}

int main(int argc, char **argv)
{
    static const struct option options[] = {{"seed", required_argument, NULL, 's'},
                                            {"seconds", required_argument, NULL, 't'},
                                            {"report", no_argument, NULL, 'r'},
                                            {0}};
    static struct driver driver;
    double seconds = 20;
    int with_report = 0, option;
    driver.first_seed = (uint64_t)time(NULL);
    while ((option = getopt_long(argc, argv, "", options, NULL)) != -1) {
        if (option == 's')
            driver.first_seed = strtoull(optarg, NULL, 10);
        else if (option == 't')
            seconds = atof(optarg);
        else if (option == 'r')
            with_report = 1;
        else
            return 2;
    }
    driver.seed = driver.first_seed;
    return run(&driver, seconds, with_report);
}
