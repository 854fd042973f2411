/* Ranks of a group as real processes: forked from the test, each with a client of its own. A rank ends by
 * returning from its function (success) or through RANK_CHECK (failure, with the sentence on stderr). */
#ifndef EPD_TESTS_INTEGRATION_RANK_PROCESS_H
#define EPD_TESTS_INTEGRATION_RANK_PROCESS_H

#include <stdio.h>
#include <sys/types.h>
#include <unistd.h>

#include "client/public.h"

#define MAX_TEST_RANKS 8

struct rank_team {
    unsigned world_size;
    pid_t pids[MAX_TEST_RANKS];
};

struct rank {
    const char *socket_path;
    const char *group_name;
    unsigned world_size, rank;
    const void *arg;  /* borrowed from the test */
    unsigned n_nodes; /* that the group spans */
};

typedef void (*rank_function)(const struct rank *rank);

/* Fails the rank process, saying what was wanted and what the library said last. */
#define RANK_CHECK(condition)                                                                                \
    do {                                                                                                     \
        if (!(condition)) {                                                                                  \
            fprintf(stderr, "%s:%d: rank check failed: %s (last error: %s)\n", __FILE__, __LINE__,           \
                    #condition, epd_error_text());                                                           \
            _exit(1);                                                                                        \
        }                                                                                                    \
    } while (0)

/* Forks world_size processes. */
void ranks_start(struct rank_team *team, const char *socket_path, const char *group_name, unsigned world_size,
                 rank_function function, const void *arg);
/* The same, the ranks in order on the daemons at these sockets, as many on each. */
void ranks_start_on(struct rank_team *team, const char *const *socket_paths, unsigned n_nodes,
                    const char *group_name, unsigned world_size, rank_function function, const void *arg);
/* Waits for all; returns how many did not exit with 0. Kills what is left after deadline_s seconds and counts
 * it. */
unsigned ranks_wait(struct rank_team *team, unsigned deadline_s);
/* Both. */
unsigned ranks_run(const char *socket_path, const char *group_name, unsigned world_size,
                   rank_function function, const void *arg);

#endif
