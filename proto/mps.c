#include "proto/mps.h"

#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

/* CUDA's own default. */
#define MPS_DEFAULT_DIRECTORY "/tmp/nvidia-mps"

int mps_find(char *path, size_t n_bytes)
{
    const char *directory = getenv("CUDA_MPS_PIPE_DIRECTORY");
    (void)snprintf(path, n_bytes, "%s/control", directory ? directory : MPS_DEFAULT_DIRECTORY);
    return access(path, F_OK) == 0;
}
