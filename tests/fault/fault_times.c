/* How long faults are felt, one JSON line per fault; run by hand:
 *
 *   fault_times [--rounds N]
 *
 * peer:   one of two working ranks is killed. notice: until the other's wait ends EPD_PEER_LOST. reclaim: until the
 *         worker holds what it held before both ranks came. serve: until the next group's first step is done.
 * worker: the worker is killed under two working ranks. notice: until a rank's step ends EPD_RESTARTED. serve:
 *         until its next step after epd_recover is good. */
#include <getopt.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/wait.h>

#include "tests/fault/baseline.h"
#include "tests/fault/chaos.h"
#include "tests/fault/spawn.h"
#include "tests/fault/workload.h"

#define RECOVER_MS 20000

struct times {
    atomic_ulong killed_us;
    atomic_int ready, finish;
    atomic_int n_served[CHAOS_RANKS]; /* good steps after the newest loss */
    struct chaos_samples notice, reclaim, serve;
};

static struct times *times_create(void)
{
    struct times *times =
        mmap(NULL, sizeof *times, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (times == MAP_FAILED)
        abort();
    return times;
}

static void print(const char *fault, const char *what, struct chaos_samples *samples)
{
    printf("{\"fault\":\"%s\",\"time\":\"%s\",\"n\":%u,\"p50_ms\":%.2f,\"p99_ms\":%.2f,\"max_ms\":%.2f}\n",
           fault, what, atomic_load(&samples->n), chaos_quantile_ms(samples, 0.5),
           chaos_quantile_ms(samples, 0.99), chaos_quantile_ms(samples, 1));
}

static uint64_t since(struct times *times)
{
    return chaos_now_us() - atomic_load(&times->killed_us);
}

/* ---- a rank dies ---- */

static void working_rank(const struct rank *rank)
{
    struct times *times = *(struct times *const *)rank->arg;
    struct workload w;
    enum epd_status status;
    workload_open(&w, rank, &workload_case, 0);
    for (int n = 0; (status = workload_step(&w)) == EPD_OK; n++)
        if (n == 10)
            atomic_fetch_add(&times->ready, 1);
    RANK_CHECK(status == EPD_PEER_LOST);
    chaos_sample(&times->notice, since(times));
    workload_close(&w);
}

static void next_rank(const struct rank *rank)
{
    struct times *times = *(struct times *const *)rank->arg;
    struct workload w;
    workload_open(&w, rank, &workload_case, 0);
    RANK_CHECK(workload_step(&w) == EPD_OK);
    if (rank->rank == 0)
        chaos_sample(&times->serve, since(times));
    workload_close(&w);
}

static void peer_round(const struct daemon_process *daemon, struct times *times,
                       const struct baseline *before, int measure_serve)
{
    struct rank_team team;
    atomic_store(&times->ready, 0);
    ranks_start(&team, daemon->socket_path, "times", 2, working_rank, &times);
    while (atomic_load(&times->ready) < 2)
        sleep_ms(1);
    atomic_store(&times->killed_us, chaos_now_us());
    kill(team.pids[1], SIGKILL);
    if (measure_serve) {
        if (ranks_run(daemon->socket_path, "times-next", 2, next_rank, &times) != 0)
            abort();
    } else {
        if (baseline_wait(before, daemon) < 0)
            abort();
        chaos_sample(&times->reclaim, since(times));
    }
    if (ranks_wait(&team, 60) != 1)
        abort();
}

static void measure_peer(int n_rounds)
{
    struct daemon_process daemon;
    struct baseline before;
    struct times *times = times_create();
    daemon_start(&daemon, 2, NULL);
    for (int n = 0; n < 2; n++) /* pools */
        if (ranks_run(daemon.socket_path, "warm", 2, next_rank, &times) != 0)
            abort();
    atomic_store(&times->serve.n, 0);
    baseline_take(&before, &daemon);
    for (int n = 0; n < 2 * n_rounds; n++)
        peer_round(&daemon, times, &before, n % 2);
    print("peer", "notice", &times->notice);
    print("peer", "reclaim", &times->reclaim);
    print("peer", "serve", &times->serve);
    daemon_stop(&daemon);
}

/* ---- the worker dies ---- */

static void recovering_rank(const struct rank *rank)
{
    struct times *times = *(struct times *const *)rank->arg;
    struct workload w;
    int lost = 0;
    workload_open(&w, rank, &workload_case, 0);
    for (;;) {
        enum epd_status status = workload_step(&w);
        if (status == EPD_OK) {
            if (lost)
                chaos_sample(&times->serve, since(times));
            lost = 0;
            atomic_fetch_add(&times->n_served[rank->rank], 1);
            if (atomic_load(&times->finish))
                break;
            continue;
        }
        if (atomic_load(&times->finish) && status == EPD_PEER_LOST)
            break;
        if (status == EPD_RESTARTED)
            chaos_sample(&times->notice, since(times));
        lost = 1;
        RANK_CHECK(status == EPD_RESTARTED || status == EPD_PEER_LOST);
        RANK_CHECK(epd_recover(w.layer.client, RECOVER_MS) == EPD_OK);
    }
    workload_close(&w);
}

static void wait_for_steps(struct times *times)
{
    int want[CHAOS_RANKS];
    for (int r = 0; r < CHAOS_RANKS; r++)
        want[r] = atomic_load(&times->n_served[r]) + 20;
    for (int r = 0; r < CHAOS_RANKS; r++)
        while (atomic_load(&times->n_served[r]) < want[r])
            sleep_ms(1);
}

static void measure_worker(int n_rounds)
{
    struct daemon_process daemon;
    struct rank_team team;
    struct times *times = times_create();
    daemon_start(&daemon, 2,
                 (const char *const[]){"--restart-first", "1ms", "--restart-max", "1ms", "--restart-limit",
                                       "0", NULL});
    ranks_start(&team, daemon.socket_path, "times", 2, recovering_rank, &times);
    for (int n = 0; n < n_rounds; n++) {
        wait_for_steps(times);
        pid_t worker = daemon_worker(&daemon);
        atomic_store(&times->killed_us, chaos_now_us());
        kill(worker, SIGKILL);
        (void)daemon_wait_worker(&daemon, worker);
    }
    wait_for_steps(times);
    atomic_store(&times->finish, 1);
    if (ranks_wait(&team, 60) != 0)
        abort();
    print("worker", "notice", &times->notice);
    print("worker", "serve", &times->serve);
    daemon_stop(&daemon);
}

int main(int argc, char **argv)
{
    static const struct option options[] = {{"rounds", required_argument, NULL, 'r'}, {0}};
    int n_rounds = 100, option;
    while ((option = getopt_long(argc, argv, "", options, NULL)) != -1) {
        if (option != 'r')
            return 2;
        n_rounds = atoi(optarg);
    }
    measure_peer(n_rounds);
    measure_worker(n_rounds);
    return 0;
}
