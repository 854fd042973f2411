#include "tests/gpu/fault/team.h"

#include <check.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include "tests/fault/spawn.h"
#include "tests/gpu/fault/roles.h"

#define RANK_MS      30000
#define N_RANK_WORDS 8

static pid_t start(const char *const *argv)
{
    pid_t pid = fork();
    if (pid == 0) {
        (void)prctl(PR_SET_PDEATHSIG, SIGKILL);
        execv("/proc/self/exe", (char *const *)argv);
        _exit(127);
    }
    return pid;
}

void team_start_rank(struct team *team, unsigned rank)
{
    char world[16], number[16], fd[16], slot[16];
    snprintf(world, sizeof world, "%u", team->world);
    snprintf(number, sizeof number, "%u", rank);
    snprintf(fd, sizeof fd, "%d", team->board_fd);
    snprintf(slot, sizeof slot, "%u", team->slot);
    const char *const argv[] = {"rank", team->role, team->socket_path, team->group_name, world, number, fd,
                                slot,   NULL};
    team->pids[rank] = start(argv);
}

void team_start(struct team *team)
{
    for (unsigned rank = 0; rank < team->world; rank++)
        team_start_rank(team, rank);
}

void team_kill(struct team *team, unsigned rank)
{
    kill(team->pids[rank], SIGKILL);
    waitpid(team->pids[rank], NULL, 0);
    team->pids[rank] = 0;
}

/* The whole team: one rank is stuck because another one is. */
static void explain(const struct team *team)
{
    for (unsigned rank = 0; rank < team->world; rank++)
        board_print(team->board, team->slot + rank, (int)team->pids[rank]);
    if (team->explain)
        team->explain();
}

unsigned team_wait(struct team *team, int deadline_ms)
{
    unsigned n_failed = 0;
    const double until = now_ms() + deadline_ms;
    for (unsigned rank = 0; rank < team->world; rank++) {
        int status = 0;
        if (!team->pids[rank])
            continue;
        pid_t ended;
        while ((ended = waitpid(team->pids[rank], &status, WNOHANG)) == 0 && now_ms() < until)
            sleep_ms(2);
        if (!ended) {
            fprintf(stderr, "rank %u of %s hangs\n", rank, team->role);
            explain(team);
            team_kill(team, rank);
            n_failed++;
            continue;
        }
        team->pids[rank] = 0;
        if (WIFEXITED(status) && WEXITSTATUS(status) == 0)
            continue;
        fprintf(stderr, "rank %u of %s ended 0x%x\n", rank, team->role, (unsigned)status);
        n_failed++;
    }
    return n_failed;
}

static void expect_alive(const struct team *team, unsigned rank, double until, const char *what)
{
    int status;
    const int ended = team->pids[rank] && waitpid(team->pids[rank], &status, WNOHANG) != 0;
    const int late = now_ms() >= until;
    if (ended || late)
        explain(team);
    ck_assert_msg(!ended, "rank %u of %s has ended (%s)", rank, team->role, what);
    ck_assert_msg(!late, "rank %u of %s is stuck (%s)", rank, team->role, what);
    sleep_ms(1);
}

void team_wait_ready(struct team *team, struct board *board, int value)
{
    const double until = now_ms() + RANK_MS;
    for (unsigned rank = 0; rank < team->world; rank++)
        while (atomic_load(&board->ranks[team->slot + rank].ready) < value)
            expect_alive(team, rank, until, "ready");
}

void team_wait_steps(struct team *team, struct board *board, unsigned long n)
{
    const double until = now_ms() + RANK_MS;
    unsigned long want[BOARD_MAX_RANKS];
    for (unsigned rank = 0; rank < team->world; rank++)
        want[rank] = atomic_load(&board->ranks[team->slot + rank].n_good) + n;
    for (unsigned rank = 0; rank < team->world; rank++)
        while (atomic_load(&board->ranks[team->slot + rank].n_good) < want[rank])
            expect_alive(team, rank, until, "steps");
}

unsigned team_run(const struct team *options)
{
    struct team team = *options;
    team_start(&team);
    return team_wait(&team, RANK_MS);
}

/* ---- the rank's side ---- */

static const struct role *find_role(const char *name)
{
    const struct role *const tables[] = {roles_of_life, roles_of_input, roles_of_memory};
    for (size_t i = 0; i < sizeof tables / sizeof tables[0]; i++)
        for (const struct role *role = tables[i]; role->name; role++)
            if (strcmp(role->name, name) == 0)
                return role;
    return NULL;
}

int team_rank_main(int argc, char **argv, int *code)
{
    int n_gpus = 0;
    if (argc == 1 && strcmp(argv[0], "count-gpus") == 0) {
        *code = cudaGetDeviceCount(&n_gpus) == cudaSuccess ? n_gpus : 0;
        return 1;
    }
    if (argc != N_RANK_WORDS || strcmp(argv[0], "rank") != 0)
        return 0;
    const struct role *role = find_role(argv[1]);
    struct gpu_rank rank = {.socket_path = argv[2],
                            .group_name = argv[3],
                            .world = (unsigned)atoi(argv[4]),
                            .rank = (unsigned)atoi(argv[5]),
                            .board = board_open(atoi(argv[6]))};
    rank.own = &rank.board->ranks[(unsigned)atoi(argv[7]) + rank.rank];
    *code = 3;
    if (!role)
        return 1;
    role->run(&rank);
    *code = 0;
    return 1;
}

int team_count_gpus(void)
{
    const char *const argv[] = {"count-gpus", NULL};
    int status = 0;
    pid_t pid = start(argv);
    return waitpid(pid, &status, 0) == pid && WIFEXITED(status) ? WEXITSTATUS(status) : 0;
}
