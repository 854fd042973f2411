/* What a rank of a team that spans nodes swaps with on CUDA: frames and reports in the memory of its device. */
#include <assert.h>
#include <stdlib.h>
#include <string.h>

#include "ep/backend_cuda.h"
#include "ep/hop.h"
#include "ep/hop_cuda.h"
#include "ep/rails.h"

/* Words of a report up to its text, and of its text: they are written by the stream itself. */
#define HEAD_WORDS (offsetof(struct hop_report, text) / sizeof(uint64_t))
#define TEXT_WORDS (EPD_ERROR_TEXT_BYTES / sizeof(uint64_t))
_Static_assert(offsetof(struct hop_report, text) % sizeof(uint64_t) == 0, "whole words");
_Static_assert(offsetof(struct hop_report, step_again) % sizeof(uint64_t) == 0, "whole words");
_Static_assert(sizeof(struct hop_report) % sizeof(uint64_t) == 0, "copied out whole");

struct hop_desk_cuda {
    struct backend_block block;
    struct hop_cuda_frames frames;
    struct hop_report *own, *others; /* device memory; [1], [n_nodes] */
    uint64_t step;
    uint32_t n_swaps; /* of the step, that are in the stream */
    uint32_t n_seen;  /* of them, while the rank is off: those that it comes by once more */
    int off;
};

/* One rank's swaps. */
struct swapper {
    const struct rank_run *run;
    struct hop_desk_cuda *desk;
};

static struct hop_desk_cuda *desk_of(const struct rank_run *run)
{
    return run->plan->team->ranks[run->plan->rank].desk_cuda;
}

static uint32_t rail_idx(const struct rank_run *run)
{
    return run->plan->rank - problem_first_rank(&run->plan->team->problem);
}

static uint32_t row_bytes_of(const struct problem *problem)
{
    return problem->hidden * dtype_bytes(problem->dtype);
}

/* ---- memory ---- */

static uint64_t carve(struct hop_desk_cuda *desk, const struct problem *problem)
{
    const struct exchange_shape shape = problem_shape(problem);
    struct layout layout = {.base = desk->block.data};
    hop_cuda_carve_frames(&desk->frames, &shape, row_bytes_of(problem), &layout);
    desk->own = layout_take(&layout, sizeof *desk->own);
    desk->others = layout_take(&layout, problem->n_nodes * sizeof *desk->others);
    return layout.bytes;
}

static enum epd_status desk_create(struct team *team, uint32_t rank, struct epd_error *error)
{
    struct hop_desk_cuda *desk = calloc(1, sizeof *desk);
    if (!desk)
        return error_set(error, EPD_NO_MEMORY, "hop: no memory");
    if (team_alloc(team, rank, carve(desk, &team->problem), &desk->block, error)) {
        free(desk);
        return error->status;
    }
    (void)carve(desk, &team->problem);
    team->ranks[rank].desk_cuda = desk;
    return EPD_OK;
}

static void desk_destroy(struct team *team, uint32_t rank)
{
    struct hop_desk_cuda *desk = team->ranks[rank].desk_cuda;
    team_free(team, rank, &desk->block);
    free(desk);
    team->ranks[rank].desk_cuda = NULL;
}

static void carve_routing(struct routing_context *routing, const struct problem *problem,
                          struct layout *layout)
{
    const struct exchange_shape shape = problem_shape(problem);
    hop_cuda_carve_routing(&routing->hop_cuda, &shape, layout);
}

/* ---- swaps ---- */

/* Of a rank that is off: those that it has taken are not taken again. */
static enum epd_status swap(void *arg, const struct transport_move *moves, struct CUstream_st *stream,
                            struct epd_error *error)
{
    const struct swapper *swapper = arg;
    struct hop_desk_cuda *desk = swapper->desk;
    if (desk->off && desk->n_seen++ < desk->n_swaps)
        return EPD_OK;
    if (!desk->off)
        desk->n_swaps++;
    return rails_swap_on(swapper->run->plan->team->rails, rail_idx(swapper->run), moves, stream, error);
}

static enum epd_status exchange(const struct rank_run *run, enum exchange_op op,
                                const struct exchange_args *args, struct epd_error *error)
{
    struct hop_desk_cuda *desk = desk_of(run);
    struct swapper swapper = {.run = run, .desk = desk};
    const struct hop_cuda hop = {.frames = desk->frames,
                                 .routing = plan_router(run->plan)->routing.hop_cuda,
                                 .row_bytes = row_bytes_of(&run->plan->team->problem),
                                 .off = desk->off,
                                 .swap = swap,
                                 .swap_arg = &swapper};
    return hop_cuda_launch(&hop, op, run->stage, args, cuda_queue_stream(run->queue), error);
}

/* ---- a step ---- */

static void begin(const struct rank_run *runs, uint32_t n_runs, uint64_t step)
{
    for (uint32_t i = 0; i < n_runs; i++) {
        struct hop_desk_cuda *desk = desk_of(&runs[i]);
        desk->step = step;
        desk->n_swaps = 0;
        desk->n_seen = 0;
        desk->off = 0;
    }
}

/* One phase of ranks that are off. What fails now has failed before, or breaks the rails, which all will hear of. */
static void drain_phase(const struct rank_run *runs, uint32_t n_runs, const struct phase *phase)
{
    const uint32_t n_stages = runs[0].backend->n_stages[phase->exchange];
    for (uint32_t stage = 0; stage < n_stages; stage++)
        for (uint32_t i = 0; i < n_runs; i++) {
            struct rank_run run = runs[i];
            struct epd_error ignored = {.status = EPD_OK};
            run.stage = stage;
            (void)phase->run(&run, &ignored);
        }
}

/* The other nodes' streams wait for these swaps, whatever is in them: the reports say that it is nothing. */
static void drain(const struct rank_run *runs, uint32_t n_runs, int ran)
{
    const struct pipeline *pipeline = moe_pipeline(runs[0].plan->op);
    if (ran)
        return;
    for (uint32_t i = 0; i < n_runs; i++)
        desk_of(&runs[i])->off = 1;
    for (uint32_t i = 0; i < pipeline->n_phases; i++)
        if (pipeline->phases[i].n_exchanges)
            drain_phase(runs, n_runs, &pipeline->phases[i]);
}

static int only_followed(const struct rank_run *run)
{
    struct epd_error ignored;
    return rails_broken(run->plan->team->rails, &ignored);
}

/* ---- reports ---- */

/* The host's words, in the order of the stream: no memory of the host has to stay for it. */
static enum epd_status write_words(const struct rank_run *run, uint64_t *to, const uint64_t *from, size_t n,
                                   struct epd_error *error)
{
    const struct cuda_driver *driver = &cuda_queue_device(run->queue)->driver;
    CUstreamBatchMemOpParams ops[TEXT_WORDS];
    assert(n <= TEXT_WORDS);
    memset(ops, 0, n * sizeof *ops);
    for (size_t i = 0; i < n; i++) {
        ops[i].writeValue.operation = CU_STREAM_MEM_OP_WRITE_VALUE_64;
        ops[i].writeValue.address = (CUdeviceptr)(uintptr_t)(to + i);
        ops[i].writeValue.value64 = from[i];
    }
    return cuda_driver_check(driver,
                             driver->cuStreamBatchMemOp(cuda_queue_stream(run->queue), (unsigned)n, ops, 0),
                             "report", error);
}

static enum epd_status write_report(const struct rank_run *run, const struct hop_verdict *host,
                                    struct hop_desk_cuda *desk, struct epd_error *error)
{
    uint64_t head[HEAD_WORDS], text[TEXT_WORDS];
    struct hop_report report = {.step = desk->step,
                                .status = host->status,
                                .phase = host->phase,
                                .order = host->order,
                                .rank = host->rank};
    memcpy(head, &report, sizeof head);
    memcpy(text, host->text, sizeof text);
    if (write_words(run, (uint64_t *)(void *)desk->own, head, HEAD_WORDS, error) ||
        (host->status && write_words(run, (uint64_t *)(void *)desk->own->text, text, TEXT_WORDS, error)) ||
        (run->plan->records
             ? run->backend->copy(run->queue, desk->own->records, run->plan->records,
                                  sizeof desk->own->records, error)
             : run->backend->zero(run->queue, desk->own->records, sizeof desk->own->records, error)))
        return error->status;
    return write_words(run, &desk->own->step_again, &desk->step, 1, error);
}

static enum epd_status report(const struct rank_run *run, const struct hop_verdict *host,
                              struct hop_report *reports, struct epd_error *error)
{
    struct hop_desk_cuda *desk = desk_of(run);
    const struct problem *problem = &run->plan->team->problem;
    struct transport_move moves[EPD_MAX_NODES];
    if (write_report(run, host, desk, error))
        return error->status;
    for (uint32_t node = 0; node < problem->n_nodes; node++)
        moves[node] = (struct transport_move){.send = desk->own,
                                              .send_bytes = sizeof *desk->own,
                                              .receive = &desk->others[node],
                                              .receive_bytes = sizeof *desk->others};
    if (rails_swap_on(run->plan->team->rails, rail_idx(run), moves, cuda_queue_stream(run->queue), error))
        return error->status;
    return run->backend->copy_out(run->queue, reports, desk->others, problem->n_nodes * sizeof *reports, 0,
                                  error);
}

const struct hop_form hop_form_cuda = {
    .desk_create = desk_create,
    .desk_destroy = desk_destroy,
    .carve_routing = carve_routing,
    .exchange = exchange,
    .begin = begin,
    .drain = drain,
    .only_followed = only_followed,
    .report = report,
};
