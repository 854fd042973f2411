#include "client/bench/rank.h"

#include <jansson.h>
#include <signal.h>
#include <string.h>
#include <sys/prctl.h>

#include "client/bench/board.h"
#include "client/bench/clock.h"
#include "client/bench/op.h"

static enum epd_status iterate(struct board *board, struct op *op)
{
    const struct job *job = board_job(board);
    double *samples = board_samples(board, op->rank);
    for (uint32_t i = 0; i < job->n_warmup + job->n_iterations; i++) {
        enum epd_status status = op_prepare(op);
        if (status == EPD_OK)
            status = board_barrier(board);
        if (status != EPD_OK)
            return status;
        const double start_ns = clock_ns();
        status = op_run(op);
        if (status != EPD_OK)
            return status;
        if (i >= job->n_warmup)
            samples[i - job->n_warmup] = op->measured ? clock_ns() - start_ns : 0;
    }
    return board_barrier(board); /* nobody leaves the group while another still works in it */
}

/* Bytes that the daemon copied in our op so far, from its statistics; -1 if they do not say. */
static double read_copied_bytes(struct op *op)
{
    char *text = NULL;
    if (epd_stats(op->client, &text) != EPD_OK)
        return -1;
    double copied = -1;
    json_t *stats = json_loads(text, 0, NULL), *entry;
    size_t idx;
    json_array_foreach (json_object_get(stats, "ops"), idx, entry) {
        const char *name = json_string_value(json_object_get(entry, "op"));
        if (name && strcmp(name, job_op_name(op->job->op)) == 0)
            copied = json_number_value(json_object_get(entry, "copied_bytes"));
    }
    json_decref(stats);
    epd_free(text);
    return copied;
}

int rank_run(int board_fd, uint32_t rank)
{
    struct board board;
    struct op op = {0};
    (void)prctl(PR_SET_PDEATHSIG, SIGTERM); /* a rank does not outlive the benchmark */
    if (board_open(&board, board_fd) != EPD_OK)
        return 1;
    const struct job *job = board_job(&board);
    enum epd_status status = rank < job->n_ranks ? op_open(&op, job, rank) : EPD_INVALID_ARGUMENT;
    if (status == EPD_OK) {
        status = iterate(&board, &op);
        if (status == EPD_OK && rank == 0)
            *board_copied_bytes(&board) = read_copied_bytes(&op);
        op_close(&op);
    }
    if (status != EPD_OK)
        (void)snprintf(board_text(&board, rank), BOARD_TEXT_BYTES, "%s",
                       op.text[0] ? op.text : epd_status_text(status));
    board_close(&board);
    return status == EPD_OK ? 0 : 1;
}
