/* The ranks of one group, as processes. */
#ifndef EPD_TESTS_GPU_FABRIC_NODE_TEAM_H
#define EPD_TESTS_GPU_FABRIC_NODE_TEAM_H

#include "tests/gpu/fabric/node_daemons.h"
#include "tests/gpu/fabric/node_result.h"

struct node_team {
    const char *mode, *group; /* as struct node_rank_options has them */
    unsigned world_size, n_nodes;
    unsigned nodes[NODE_MAX_NODES]; /* [n_nodes] which daemons, in the order of the ranks */
    char prefix[64];                /* of its files */
    const char *epdctl;
    pid_t pids[NODE_MAX_WORLD];
};

void node_team_start(struct node_team *team, const struct node_daemons *nodes);
/* Waits until ranks that step without an end have begun. 0 if they have. */
int node_team_steps(const struct node_team *team);
/* Of the first n; how many did not end well. What is left when one has failed, or time is over, is killed. */
unsigned node_team_end(struct node_team *team, unsigned n);

#endif
