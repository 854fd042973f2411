/* One rank process with CUDA: a client, a group, dispatch and combine with experts that return what they get, so that the
 * result of a step is twice its tokens (K = 2), exactly. x, topk_idx, recv_x and m_splits are cudaMalloc memory, out lies in
 * the daemon's heap. One thread. */
#ifndef EPD_TESTS_GPU_FAULT_GPU_RANK_H
#define EPD_TESTS_GPU_FAULT_GPU_RANK_H

#include <cuda_runtime_api.h>
#include <stdio.h>
#include <stdlib.h>

#include "client/public.h"
#include "tests/gpu/fault/board.h"

enum { GPU_T = 64, GPU_H = 512, GPU_E = 8, GPU_K = 2, GPU_BALLAST_BYTES = 64 << 20 };

/* Ends the process with what failed. */
#define GPU_MUST(condition)                                                                                  \
    do {                                                                                                     \
        if (!(condition)) {                                                                                  \
            fprintf(stderr, "%s:%d: %s failed: %s / %s / %s\n", __FILE__, __LINE__, #condition,              \
                    epd_error_text(), cudaGetErrorString(cudaGetLastError()),                                \
                    cudaGetErrorString(cudaDeviceSynchronize()));                                            \
            exit(1);                                                                                         \
        }                                                                                                    \
    } while (0)

struct gpu_rank {
    const char *socket_path, *group_name;
    unsigned world, rank;
    struct board *board;
    struct board_rank *own; /* of the board */
    int64_t capacity_rows;  /* 0: whatever could arrive */
    uint32_t alignment;     /* 0: 1 */
    uint32_t deadline_ms;   /* 0: the daemon's */
    enum epd_overflow overflow;

    struct epd_client *client;
    struct epd_group *group;
    cudaStream_t stream;
    void *x, *idx, *recv_x, *splits, *out; /* device */
    struct epd_buffer *buffers[5];         /* in that order */
    int64_t n_recv_rows;
    struct epd_plan *dispatch, *combine;
    unsigned short *x_host, *out_host; /* pinned, [GPU_T * GPU_H] */
    unsigned n_steps;                  /* so far: each has other tokens */
};

/* Selects the GPU of the rank: rank modulo their number. */
void gpu_rank_select(const struct gpu_rank *rank);
/* Opens, joins, makes buffers and plans. The first call that fails, and everything made so far is closed again. */
enum epd_status gpu_rank_try(struct gpu_rank *rank);
void gpu_rank_open(struct gpu_rank *rank);
/* The plans alone, of the buffers as they are. */
enum epd_status gpu_rank_plan(struct gpu_rank *rank);
void gpu_rank_close(struct gpu_rank *rank);

/* Token t to experts (t + rank + step) and the one after; bad_token >= 0: that token to expert GPU_E. */
void gpu_rank_route(struct gpu_rank *rank, int bad_token);
/* New tokens in, both ops, rows out, in the order of the stream alone: nothing is waited for. */
enum epd_status gpu_rank_launch(struct gpu_rank *rank);
/* Waits for the stream and for both plans; a result that is not twice the tokens ends the process. */
enum epd_status gpu_rank_wait(struct gpu_rank *rank);
enum epd_status gpu_rank_step(struct gpu_rank *rank);
/* Steps and counts on the board. */
enum epd_status gpu_rank_counted_step(struct gpu_rank *rank);

/* Copies to the current GPU and returns when it has arrived: a small copy from pageable memory is on its way when cudaMemcpy
 * returns, and no stream stands between it and the launch. */
void gpu_put(void *to, const void *from, size_t bytes);
/* bf16 of a small whole number. */
unsigned short gpu_bf16(int value);
/* Launches a kernel that faults: the context is lost. */
void gpu_crash(void);
/* Returns no more: what it frees waits for a kernel that does not end, and every other thread for it. */
void gpu_hold(void);

#endif
