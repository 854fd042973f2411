#include "tests/integration/rank_process.h"

#include <signal.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>

#define RANKS_DEADLINE_S 120

void ranks_start(struct rank_team *team, const char *socket_path, const char *group_name, unsigned world_size,
                 rank_function function, const void *arg)
{
    ranks_start_on(team, &socket_path, 1, group_name, world_size, function, arg);
}

void ranks_start_on(struct rank_team *team, const char *const *socket_paths, unsigned n_nodes,
                    const char *group_name, unsigned world_size, rank_function function, const void *arg)
{
    team->world_size = world_size;
    for (unsigned r = 0; r < world_size; r++) {
        struct rank rank = {.socket_path = socket_paths[r / (world_size / n_nodes)],
                            .group_name = group_name,
                            .world_size = world_size,
                            .rank = r,
                            .n_nodes = n_nodes,
                            .arg = arg};
        fflush(NULL);
        team->pids[r] = fork();
        if (team->pids[r] == 0) {
            prctl(PR_SET_PDEATHSIG, SIGKILL);
            function(&rank);
            exit(0); /* exit, not _exit: leak checkers report there */
        }
    }
}

static unsigned reap(struct rank_team *team, unsigned *n_failed)
{
    unsigned n_left = 0;
    for (unsigned r = 0; r < team->world_size; r++) {
        int status = 0;
        if (team->pids[r] <= 0)
            continue;
        if (waitpid(team->pids[r], &status, WNOHANG) != team->pids[r]) {
            n_left++;
            continue;
        }
        team->pids[r] = 0;
        *n_failed += !WIFEXITED(status) || WEXITSTATUS(status) != 0;
    }
    return n_left;
}

unsigned ranks_wait(struct rank_team *team, unsigned deadline_s)
{
    unsigned n_failed = 0;
    for (unsigned waited_ms = 0; reap(team, &n_failed) > 0; waited_ms += 2) {
        struct timespec t = {.tv_nsec = 2000000};
        nanosleep(&t, NULL);
        if (waited_ms > deadline_s * 1000) {
            for (unsigned r = 0; r < team->world_size; r++) {
                if (team->pids[r] > 0) {
                    fprintf(stderr, "rank %u did not end within %u s\n", r, deadline_s);
                    kill(team->pids[r], SIGKILL);
                }
            }
            deadline_s += 10;
        }
    }
    return n_failed;
}

unsigned ranks_run(const char *socket_path, const char *group_name, unsigned world_size,
                   rank_function function, const void *arg)
{
    struct rank_team team;
    ranks_start(&team, socket_path, group_name, world_size, function, arg);
    return ranks_wait(&team, RANKS_DEADLINE_S);
}
