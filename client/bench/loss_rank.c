#include <string.h>
#include <time.h>

#include "client/bench/board.h"
#include "client/bench/clock.h"
#include "client/bench/loss.h"
#include "client/bench/op.h"

/* Steps after which a rank counts as working. */
#define STEPS_BEFORE 10
/* How often the spare looks whether it is wanted. */
#define SPARE_LOOKS_NS 50000

/* Steps without end: only a loss ends them. */
static enum epd_status work(struct board *board, struct op *op)
{
    struct board_loss *loss = board_loss(board);
    enum epd_status status;
    for (uint64_t n = 0; (status = op_run(op)) == EPD_OK; n++)
        if (n == STEPS_BEFORE)
            atomic_fetch_add(&loss->n_ready, 1);
    if (status != EPD_PEER_LOST)
        return status;
    loss->told_ns[op->rank] = clock_ns();
    return EPD_OK;
}

static enum epd_status serve_next(struct board *board, struct op *op)
{
    struct job next = *op->job;
    (void)snprintf(next.group_name, sizeof(next.group_name), "%.25s+", op->job->group_name);
    op->job = &next;
    enum epd_status status = op_enter(op);
    if (status == EPD_OK)
        status = op_run(op);
    board_loss(board)->served_ns[op->rank] = clock_ns();
    op_leave(op);
    op->job = board_job(board);
    return status;
}

/* Connected, in the place of the last rank. */
static enum epd_status wait_as_spare(struct board *board)
{
    const struct timespec pause = {.tv_nsec = SPARE_LOOKS_NS};
    struct board_loss *loss = board_loss(board);
    atomic_fetch_add(&loss->n_ready, 1);
    while (atomic_load(&loss->killed_ns) == 0)
        nanosleep(&pause, NULL);
    return EPD_OK;
}

enum epd_status loss_rank(struct board *board, struct op *op, uint32_t rank)
{
    const struct job *job = board_job(board);
    const int spare = rank == job->n_ranks;
    enum epd_status status = op_connect(op, job, spare ? job->n_ranks - 1 : rank, 0);
    if (status == EPD_OK)
        status = spare ? wait_as_spare(board) : op_enter(op);
    if (status == EPD_OK && !spare)
        status = work(board, op);
    op_leave(op);
    if (status == EPD_OK && board_loss(board)->go_on)
        status = serve_next(board, op);
    op_close(op);
    return status;
}
