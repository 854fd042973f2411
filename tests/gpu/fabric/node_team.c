#include "tests/gpu/fabric/node_team.h"

#include <signal.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "tests/gpu/fabric/node_rank.h"

/* A rank may take so long in all, and until its first step. */
#define RANKS_LIMIT_S 40
#define BEGIN_LIMIT_S 20

void node_team_start(struct node_team *team, const struct node_daemons *nodes)
{
    const unsigned per_node = team->world_size / team->n_nodes;
    (void)snprintf(team->prefix, sizeof team->prefix, "/tmp/epd-nodes-%d-%s-%u", (int)getpid(), team->group,
                   team->n_nodes);
    for (unsigned rank = 0; rank < team->world_size; rank++) {
        const unsigned node = team->nodes[rank / per_node];
        const struct process_daemon *daemon = &nodes->daemons[node];
        const unsigned values[] = {rank, team->world_size, team->n_nodes,
                                   node_daemon_device(nodes, node, rank % per_node)};
        char numbers[4][16];
        for (int i = 0; i < 4; i++)
            (void)snprintf(numbers[i], sizeof numbers[i], "%u", values[i]);
        const char *argv[NODE_RANK_ARGUMENTS + 1] = {"/proc/self/exe", "rank",       team->mode,
                                                     team->group,      numbers[0],   numbers[1],
                                                     numbers[2],       numbers[3],   daemon->socket_path,
                                                     team->prefix,     team->epdctl, daemon->control_path};
        team->pids[rank] = process_start(argv);
    }
}

int node_team_steps(const struct node_team *team)
{
    char path[80];
    const double until = process_seconds() + BEGIN_LIMIT_S;
    (void)snprintf(path, sizeof path, "%s.steps", team->prefix);
    while (access(path, F_OK) != 0) {
        if (process_seconds() > until) {
            printf("group %s: no step in %d s\n", team->group, BEGIN_LIMIT_S);
            return 1;
        }
        (void)usleep(2000);
    }
    return 0;
}

static void remove_files(const struct node_team *team)
{
    static const char *const ends[] = {"steps", "last"};
    char path[80];
    for (int i = 0; i < 2; i++) {
        (void)snprintf(path, sizeof path, "%s.%s", team->prefix, ends[i]);
        (void)unlink(path);
    }
}

unsigned node_team_end(struct node_team *team, unsigned n)
{
    const double until = process_seconds() + RANKS_LIMIT_S;
    unsigned n_failed = 0;
    for (unsigned left = n; left;) {
        for (unsigned rank = 0; rank < n; rank++) {
            int status;
            if (!team->pids[rank] || waitpid(team->pids[rank], &status, WNOHANG) != team->pids[rank])
                continue;
            n_failed += !WIFEXITED(status) || WEXITSTATUS(status) != 0;
            team->pids[rank] = 0;
            left--;
        }
        (void)usleep(2000);
        for (unsigned rank = 0; rank < n && (n_failed || process_seconds() > until); rank++)
            if (team->pids[rank])
                (void)kill(team->pids[rank], SIGKILL);
    }
    for (unsigned rank = n; rank < team->world_size; rank++) {
        (void)kill(team->pids[rank], SIGKILL);
        (void)process_wait(team->pids[rank]);
    }
    remove_files(team);
    return n_failed;
}
