/* What a test and the library that it preloads into the daemon's worker (worker_shim.c) share. Any process. */
#ifndef EPD_TESTS_GPU_FAULT_WORKER_SHIM_H
#define EPD_TESTS_GPU_FAULT_WORKER_SHIM_H

#include <stdatomic.h>

struct worker_shim {
    atomic_int crash_device; /* >= 0: the context there is to be lost; the shim takes it back to -1 */
    atomic_int n_crashes;
    atomic_int
        hold_worker; /* this pid's calls for GPU 0 are to return no more; the shim takes it back to 0 */
};

#endif
