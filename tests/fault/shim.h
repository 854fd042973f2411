/* What a test and the library that it preloads into the daemon (shim.c) share: a page in a file that
 * FAULT_SHIM names. Any thread, any process. */
#ifndef EPD_TESTS_FAULT_SHIM_H
#define EPD_TESTS_FAULT_SHIM_H

#include <stdatomic.h>

struct shim {
    /* Counts the daemon's own allocations down while it is positive; the one that makes it 0 fails. */
    atomic_long allocations_left;
    atomic_long n_failed;  /* so far */
    atomic_int crowded;    /* every fd that the daemon sends finds too many on their way */
    atomic_long n_crowded; /* that it has sent in vain */
    atomic_int
        stuck; /* a disk that does not answer: files of flight recorders are opened only when this is 0 again */
    atomic_long n_stuck;      /* that have begun to be opened meanwhile */
    atomic_int deaf;          /* accepting fails with EPERM */
    atomic_long n_deaf;       /* how often it has */
    atomic_long clock_jump_s; /* added to CLOCK_REALTIME, with another sign at each look */
};

#endif
