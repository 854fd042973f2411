/* One rank's side of a job: connection, group, buffers with inputs, plans. One owner, one thread. */
#ifndef EPD_BENCH_OP_H
#define EPD_BENCH_OP_H

#include <stdio.h>

#include "client/bench/gpu.h"

struct op {
    const struct job *job; /* borrowed; may change between op_leave and op_enter */
    uint32_t rank, n_marks;
    struct epd_client *client; /* owned; ends everything else */
    struct epd_group *group;
    struct epd_group_info group_info;
    struct epd_tensor tensors[EPD_ROLE_COUNT]; /* by role; buffer NULL: not there */
    struct epd_plan *before;                   /* launched before every timed launch, untimed; NULL: none */
    struct epd_plan *measured;                 /* NULL: this rank only keeps the others company */
    struct gpu gpu;                            /* owned; open on the CUDA backend */
    double own_bytes;                          /* memory of this process that the daemon imported */
    double free_bytes;                         /* of the GPU before the group came to be */
    char text[320];                            /* why the last call failed */
};

/* On failure text says why. The connection, and the GPU on the CUDA backend, with n_marks for its stream. */
enum epd_status op_connect(struct op *op, const struct job *job, uint32_t rank, uint32_t n_marks);
/* Collective: group, buffers, plans. */
enum epd_status op_enter(struct op *op);
/* Ends what op_enter made. */
void op_leave(struct op *op);
void op_close(struct op *op);
/* Untimed part of an iteration. */
enum epd_status op_prepare(struct op *op);
/* Launch and wait. */
enum epd_status op_run(struct op *op);
/* CUDA: only launches, in the stream of gpu. */
enum epd_status op_enqueue(struct op *op);
enum epd_status op_enqueue_prepare(struct op *op);
/* CUDA: how the launches since the last call ended, after the stream has come to its end. */
enum epd_status op_settle(struct op *op);

#endif
