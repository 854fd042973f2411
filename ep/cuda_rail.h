/* What a rail, and who swaps with it, has on its GPU: a stream with the memory of its first swap, an account of the channels
 * that it takes, and the mark that it connects. Where NCCL's rails touch CUDA: all of it is here, so that their course (transport_nccl.c)
 * runs in tests without a GPU (tests/unit/ep/test_nccl.c, test_rails.c). On GPUs tests/gpu/fabric/test_rail.c shows it.
 *
 * Lane thread, but cuda_rail_use and cuda_rail_settled, which any thread may call. */
#ifndef EPD_EP_CUDA_RAIL_H
#define EPD_EP_CUDA_RAIL_H

#include <stddef.h>
#include <stdint.h>

#include "proto/status.h"

struct backend_device;
struct backend_queue;
struct CUstream_st;
struct cuda_rail;

/* On the current device, which `device` is, or NULL where there is no lane. channels: that it takes of the device, those
 * of its library included. EPD_QUOTA if there are no more. */
EPD_MUST_CHECK enum epd_status cuda_rail_open(struct backend_device *device, uint32_t channels,
                                              struct cuda_rail **rail, struct epd_error *error);
/* Nothing is in its stream, or will be; waits for nothing but that its memory was taken. */
void cuda_rail_close(struct cuda_rail *rail);
/* The calling thread's device is the rail's from here on. */
void cuda_rail_use(const struct cuda_rail *rail);
struct CUstream_st *cuda_rail_stream(const struct cuda_rail *rail);
/* [bytes], zeroed in the order of the stream; the rail's. Once. */
EPD_MUST_CHECK enum epd_status cuda_rail_memory(struct cuda_rail *rail, size_t bytes, char **memory,
                                                struct epd_error *error);
/* 1 if all that was put into the stream is done, and with an error if it never will be; 0: not yet. */
int cuda_rail_passed(const struct cuda_rail *rail, struct epd_error *error);
/* The rail connects: its stream may wait for other nodes, and its device is not idle (cuda_queues_idle) until settled. */
void cuda_rail_connecting(struct cuda_rail *rail);
void cuda_rail_settled(struct cuda_rail *rail);

/* Of a queue of the CUDA backend, into which swaps are put. */
struct CUstream_st *cuda_rail_queue_stream(const struct backend_queue *queue);
/* n words of the host to device memory, in the order of the queue: `from` need not stay. n: CUDA_RAIL_WORDS at most. */
#define CUDA_RAIL_WORDS (EPD_ERROR_TEXT_BYTES / sizeof(uint64_t))
EPD_MUST_CHECK enum epd_status cuda_rail_write(struct backend_queue *queue, uint64_t *to,
                                               const uint64_t *from, size_t n, struct epd_error *error);

#endif
