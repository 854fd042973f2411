/* Rank processes of a test: this program again, started anew, because CUDA does not survive a fork. Owned by the test. They
 * end with it. */
#ifndef EPD_TESTS_GPU_FAULT_TEAM_H
#define EPD_TESTS_GPU_FAULT_TEAM_H

#include <sys/types.h>

#include "tests/gpu/fault/board.h"

struct team {
    pid_t pids[BOARD_MAX_RANKS]; /* 0: not running */
    unsigned world, slot;        /* rank r has place slot + r on the board */
    const char *role, *socket_path, *group_name;
    struct board *board;
    int board_fd;
    void (*explain)(void); /* prints the daemon's side when ranks are stuck; NULL: nobody does */
};

/* Starts `world` ranks. */
void team_start(struct team *team);
/* One of them, again. */
void team_start_rank(struct team *team, unsigned rank);
void team_kill(struct team *team, unsigned rank);
/* Until all have ended, or the time is up: then they are killed. Returns how many did not end with 0. */
unsigned team_wait(struct team *team, int deadline_ms);
/* Until every rank has ready >= value. Ends the test if that takes longer than 30 s or a rank ends. */
void team_wait_ready(struct team *team, struct board *board, int value);
/* Until every rank has made n more good steps. */
void team_wait_steps(struct team *team, struct board *board, unsigned long n);

/* Starts, waits; returns how many failed. */
unsigned team_run(const struct team *options);

/* In main of the started program: 1 if it is a rank, and *code what to end with. */
int team_rank_main(int argc, char **argv, int *code);
/* How many GPUs a process sees. */
int team_count_gpus(void);

#endif
