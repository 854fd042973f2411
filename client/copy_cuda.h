/* Copies inside a device in the order of a stream. Each call of the driver's own copy costs the host 4 to 9 us and the stream
 * 4 to 5, however small it is; a step has up to three of them side by side. So small ones go together, in one kernel. */
#ifndef EPD_CLIENT_COPY_CUDA_H
#define EPD_CLIENT_COPY_CUDA_H

#include <cuda.h>

#include "client/public.h"
#include "proto/status.h"

/* Copies of at most this many bytes go together; above it the driver's copy is as fast and uses the memory better. */
#define COPY_TOGETHER_BYTES (4u << 20)
#define COPY_TOGETHER_PARTS 4u

/* The kernel in the current context, loaded there if it is not yet: before anything waits in it. The library keeps it as long as
 * the process lives. */
EPD_MUST_CHECK enum epd_status copy_load(CUfunction *kernel, struct epd_error *error);
/* The copies, in no order among themselves: none reads or writes what another one writes. Ranges that are no multiple of 16 bytes
 * go one by one. */
EPD_MUST_CHECK enum epd_status copy_enqueue(CUfunction kernel, const struct epd_copy *copies,
                                            uint32_t n_copies, CUstream stream, struct epd_error *error);

#endif
