/* One rank's side of a job: connection, group, buffers with inputs, plans. One owner, one thread. */
#ifndef EPD_BENCH_OP_H
#define EPD_BENCH_OP_H

#include <stdio.h>

#include "client/bench/job.h"

struct op {
    const struct job *job; /* borrowed, outlives this */
    uint32_t rank;
    struct epd_client *client; /* owned; ends everything else */
    struct epd_group *group;
    struct epd_group_info group_info;
    struct epd_tensor tensors[EPD_ROLE_COUNT]; /* by role; buffer NULL: not there */
    struct epd_plan *before;                   /* launched before every timed launch, untimed; NULL: none */
    struct epd_plan *measured;                 /* NULL: this rank only keeps the others company */
    char text[320];                            /* why the last call failed */
};

/* Collective. On failure text says why. */
enum epd_status op_open(struct op *op, const struct job *job, uint32_t rank);
void op_close(struct op *op);
/* Untimed part of an iteration. */
enum epd_status op_prepare(struct op *op);
/* Timed part: launch and wait. */
enum epd_status op_run(struct op *op);

#endif
