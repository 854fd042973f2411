#include "kernels/host/scratch.h"

#include <stdlib.h>

#define SCRATCH_ALIGNMENT_BYTES 64

enum epd_status host_scratch_acquire(struct host_scratch *scratch, size_t n_floats, float **floats)
{
    if (n_floats > (SIZE_MAX - SCRATCH_ALIGNMENT_BYTES) / sizeof(float))
        return EPD_NO_MEMORY;
    size_t bytes = n_floats * sizeof(float);
    bytes = (bytes + SCRATCH_ALIGNMENT_BYTES - 1) / SCRATCH_ALIGNMENT_BYTES * SCRATCH_ALIGNMENT_BYTES;
    if (bytes > scratch->bytes) {
        void *data = aligned_alloc(SCRATCH_ALIGNMENT_BYTES, bytes);
        if (!data)
            return EPD_NO_MEMORY;
        free(scratch->data);
        scratch->data = data;
        scratch->bytes = bytes;
    }
    *floats = scratch->data;
    return EPD_OK;
}

void host_scratch_fini(struct host_scratch *scratch)
{
    free(scratch->data);
    scratch->data = NULL;
    scratch->bytes = 0;
}
