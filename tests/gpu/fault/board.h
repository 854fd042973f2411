/* What the test and its rank processes share: a memfd that the ranks inherit by number. Any process. */
#ifndef EPD_TESTS_GPU_FAULT_BOARD_H
#define EPD_TESTS_GPU_FAULT_BOARD_H

#include <stdatomic.h>

#define BOARD_MAX_RANKS  16
#define BOARD_N_STATUSES 64

/* What a rank is in: said when it is stuck. */
#define BOARD_PLACES(X)                                                                                      \
    X(OUTSIDE, "nothing of the daemon")                                                                      \
    X(OPEN, "epd_open, or the join")                                                                         \
    X(MAKE, "registering buffers, or creating plans")                                                        \
    X(LAUNCH, "epd_plan_launch")                                                                             \
    X(STREAM, "cudaStreamSynchronize behind the launches")                                                   \
    X(WAIT, "epd_plan_wait")                                                                                 \
    X(RECOVER, "epd_recover")                                                                                \
    X(CLOSE, "epd_close")

enum board_place {
#define BOARD_PLACE(name, text) BOARD_##name,
    BOARD_PLACES(BOARD_PLACE)
#undef BOARD_PLACE
};

struct board_rank {
    atomic_int ready;                     /* it has got to where the test wants it */
    atomic_int place;                     /* enum board_place */
    atomic_ulong n_good;                  /* steps that ended EPD_OK with the right result */
    atomic_int n_ended[BOARD_N_STATUSES]; /* steps by the status they failed with */
    atomic_int n_recovered;
};

struct board {
    atomic_int stop;    /* ranks that go on until told end */
    atomic_int release; /* ranks that wait for something of the test go on */
    struct board_rank ranks[BOARD_MAX_RANKS];
};

/* Test: makes it; *fd is inherited. Ends the program if it cannot. */
struct board *board_create(int *fd);
/* Rank: maps it. */
struct board *board_open(int fd);
void board_reset(struct board *board);
/* Where the rank is, how its steps ended, and what its threads sleep in, to stderr. */
void board_print(const struct board *board, unsigned slot, int pid);

#endif
