/* Where a CUDA process of this environment finds the control daemon of MPS. Any thread. */
#ifndef EPD_PROTO_MPS_H
#define EPD_PROTO_MPS_H

#include <stddef.h>

/* Writes the path of its control pipe to path[n_bytes]; 1 if the pipe is there. */
int mps_find(char *path, size_t n_bytes);

#endif
