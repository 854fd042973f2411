/* Scratch memory of a lane (struct host_scratch in host.h): one block, grown on demand, contents not kept
 * between calls. Thread: the lane that owns the scratch. */
#ifndef EPD_KERNELS_HOST_SCRATCH_H
#define EPD_KERNELS_HOST_SCRATCH_H

#include "kernels/host/host.h"

/* At least n_floats floats at a 64-byte boundary, uninitialised, valid until the next acquire on this
 * scratch. *floats is set on success only. */
EPD_MUST_CHECK enum epd_status host_scratch_acquire(struct host_scratch *scratch, size_t n_floats,
                                                    float **floats);

#endif
