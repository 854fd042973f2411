#include "client/bench/rank.h"

#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>

#include "client/bench/board.h"
#include "client/bench/clock.h"
#include "client/bench/counted.h"
#include "client/bench/loss.h"
#include "client/bench/op.h"

/* Iterations that the host runs ahead of its stream: few enough that no queue of the driver fills up, where a launch would wait
 * for the GPU. */
#define MAX_AHEAD 64
/* Before a job on GPUs: the daemon has taken back what the last one used. */
#define SETTLE_NS 20000000

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

/* What the group costs on the GPU: taken between two meetings, when nobody allocates. */
static enum epd_status measure_memory(struct board *board, struct op *op)
{
    double free_bytes = 0;
    enum epd_status status = board_barrier(board);
    if (status == EPD_OK)
        status = gpu_free_bytes(&op->gpu, &free_bytes);
    if (status == EPD_OK)
        *board_memory(board, op->rank) = op->free_bytes - free_bytes - op->own_bytes;
    return status == EPD_OK ? board_barrier(board) : status;
}

static enum epd_status enqueue(struct board *board, struct op *op, uint32_t i)
{
    const struct job *job = board_job(board);
    enum epd_status status = op_enqueue_prepare(op);
    if (status == EPD_OK)
        status = gpu_begin(&op->gpu, i, job->client_kernel_us);
    const double start_ns = clock_ns();
    if (status == EPD_OK)
        status = op_enqueue(op);
    if (i >= job->n_warmup)
        board_launches(board, op->rank)[i - job->n_warmup] = clock_ns() - start_ns;
    return status == EPD_OK ? gpu_end(&op->gpu, i) : status;
}

/* The host runs ahead, as in a training loop: what is timed is the stream, from the end of a kernel of the client to the start of
 * its next work. */
static enum epd_status iterate_stream(struct board *board, struct op *op)
{
    const struct job *job = board_job(board);
    const uint32_t n = job->n_warmup + job->n_iterations;
    enum epd_status status = measure_memory(board, op);
    double *times = calloc(n, sizeof(double));
    if (!times)
        return EPD_NO_MEMORY;
    for (uint32_t i = 0; status == EPD_OK && op->measured && i < n; i++) {
        if (i > 0 && i % MAX_AHEAD == 0)
            status = gpu_sync(&op->gpu);
        if (status == EPD_OK)
            status = enqueue(board, op, i);
    }
    if (status == EPD_OK && op->measured)
        status = gpu_times(&op->gpu, n, times);
    if (status != EPD_OK && op->gpu.text[0])
        (void)snprintf(op->text, sizeof(op->text), "%s", op->gpu.text);
    if (status == EPD_OK)
        status = op_settle(op);
    memcpy(board_samples(board, op->rank), times + job->n_warmup, job->n_iterations * sizeof(double));
    free(times);
    return status == EPD_OK ? board_barrier(board) : status;
}

/* Of our op so far. */
static struct counted read_counted(struct op *op)
{
    char *text = NULL;
    if (epd_stats(op->client, &text) != EPD_OK)
        return COUNTED_NONE;
    const struct counted counted = counted_in(text, op->job->op);
    epd_free(text);
    return counted;
}

/* One job, from joining to leaving. */
static enum epd_status run_op(struct board *board, struct op *op)
{
    const struct timespec settle = {.tv_nsec = op->gpu.state ? SETTLE_NS : 0};
    nanosleep(&settle, NULL);
    enum epd_status status = board_barrier(board);
    if (status == EPD_OK)
        status = op_enter(op);
    const struct counted before = status == EPD_OK && op->rank == 0 ? read_counted(op) : COUNTED_NONE;
    if (status == EPD_OK)
        status = op->gpu.state ? iterate_stream(board, op) : iterate(board, op);
    if (status == EPD_OK && op->rank == 0) {
        const struct counted after = read_counted(op);
        *board_counted(board) = counted_between(&before, &after);
    }
    op_leave(op);
    return status;
}

/* Job after job, as long as all goes well. */
static enum epd_status run_ops(struct board *board, struct op *op, uint32_t rank)
{
    uint32_t turn = 0;
    enum epd_status status = op_connect(op, board_job(board), rank, board_max_marks(board));
    while (status == EPD_OK && board_wait_job(board, &turn)) {
        status = run_op(board, op);
        if (status == EPD_OK)
            board_finish(board);
    }
    op_close(op);
    return status;
}

/* The GPUs of the daemon, all driven by this process. */
static enum epd_status run_link(struct board *board, struct op *op)
{
    const struct job *job = board_job(board);
    const struct epd_open_options options = {.size = sizeof(options), .socket_path = job->socket_path};
    struct epd_client_info info = {.size = sizeof(info)};
    uint8_t uuids[16][16];
    enum epd_status status = epd_open(&options, &op->client);
    if (status == EPD_OK)
        status = epd_client_info(op->client, &info);
    if (status != EPD_OK)
        (void)snprintf(op->text, sizeof(op->text), "%s", epd_error_text());
    epd_close(op->client);
    if (status != EPD_OK)
        return status;
    for (uint32_t i = 0; i < info.n_devices; i++)
        memcpy(uuids[i], info.devices[i].uuid, sizeof(uuids[i]));
    status = gpu_link(&op->gpu, (const uint8_t(*)[16])uuids, info.n_devices, job->n_iterations,
                      board_samples(board, 0));
    if (status != EPD_OK)
        (void)snprintf(op->text, sizeof(op->text), "%s", op->gpu.text);
    return status;
}

int rank_run(int board_fd, uint32_t rank)
{
    struct board board;
    struct op op = {0};
    (void)prctl(PR_SET_PDEATHSIG, SIGTERM); /* a rank does not outlive the benchmark */
    if (board_open(&board, board_fd) != EPD_OK)
        return 1;
    const struct job *job = board_job(&board); /* the first */
    enum epd_status status = EPD_INVALID_ARGUMENT;
    if (job->op == JOB_PEER_LOSS)
        status = loss_rank(&board, &op, rank);
    else if (rank < job->n_ranks)
        status = job->op == JOB_LINK ? run_link(&board, &op) : run_ops(&board, &op, rank);
    if (status != EPD_OK)
        (void)snprintf(board_text(&board, rank), BOARD_TEXT_BYTES, "%s",
                       op.text[0] ? op.text : epd_status_text(status));
    board_close(&board);
    return status == EPD_OK ? 0 : 1;
}
