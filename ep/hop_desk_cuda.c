/* What a rank of a team that spans nodes swaps with on CUDA: frames and reports in the memory of its device. */
#include <assert.h>
#include <stdlib.h>
#include <string.h>

#include "ep/cuda_rail.h"
#include "ep/hop.h"
#include "ep/hop_cuda.h"
#include "ep/rails.h"
#include "kernels/cuda/hop.h"

/* Words of a report up to its text, and of its text: they are written by the stream itself. */
#define HEAD_WORDS (offsetof(struct hop_report, text) / sizeof(uint64_t))
#define TEXT_WORDS (EPD_ERROR_TEXT_BYTES / sizeof(uint64_t))
_Static_assert(offsetof(struct hop_report, text) % sizeof(uint64_t) == 0, "whole words");
_Static_assert(offsetof(struct hop_report, step_again) % sizeof(uint64_t) == 0, "whole words");
_Static_assert(sizeof(struct hop_report) % sizeof(uint64_t) == 0, "copied out whole");
_Static_assert(HEAD_WORDS <= CUDA_RAIL_WORDS && TEXT_WORDS <= CUDA_RAIL_WORDS, "written at once");

struct hop_desk_cuda {
    struct backend_block block;
    struct hop_cuda_frames frames;
    struct hop_report *own, *others;                               /* device memory; [1], [n_nodes] */
    struct cuda_hop_head sent[EPD_MAX_NODES], came[EPD_MAX_NODES]; /* copied out, of an eager routing */
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
static enum epd_status swap(void *arg, const struct transport_move *moves, uint32_t n_parts,
                            struct CUstream_st *stream, struct epd_error *error)
{
    const struct swapper *swapper = arg;
    struct hop_desk_cuda *desk = swapper->desk;
    if (desk->off && desk->n_seen++ < desk->n_swaps)
        return EPD_OK;
    if (!desk->off)
        desk->n_swaps++;
    return rails_swap_on(swapper->run->plan->team->rails, rail_idx(swapper->run), moves, n_parts, stream,
                         error);
}

static int is_eager(const struct plan *plan)
{
    return plan->crossing == EPD_CROSSING_EAGER;
}

static int learns(const struct plan *plan, enum exchange_op op)
{
    return is_eager(plan) && op == EXCHANGE_ROUTE_DISPATCH;
}

/* Both ends of every line, so that both nodes of it learn the same. */
static enum epd_status copy_heads(const struct rank_run *run, struct hop_desk_cuda *desk,
                                  struct epd_error *error)
{
    struct exchange_shape shape = problem_shape(&run->plan->team->problem);
    const uint64_t row_bytes = row_bytes_of(&run->plan->team->problem);
    shape.rank = run->plan->rank;
    memset(desk->sent, 0, sizeof desk->sent);
    memset(desk->came, 0, sizeof desk->came);
    for (uint32_t node = 0; node < shape.n_nodes; node++) {
        struct cuda_hop_head *out, *in;
        if (node == run->plan->team->problem.node)
            continue;
        hop_cuda_heads(&desk->frames, &shape, row_bytes, node, &out, &in);
        if (run->backend->copy_out(run->queue, &desk->sent[node], out, sizeof *out, 0, error) ||
            run->backend->copy_out(run->queue, &desk->came[node], in, sizeof *in, 0, error))
            return error->status;
    }
    return EPD_OK;
}

/* A swap that the rails have aborted leaves anything: then that is why. */
static enum epd_status learn(const struct rank_run *run, struct epd_error *error)
{
    const struct team *team = run->plan->team;
    const struct hop_desk_cuda *desk = desk_of(run);
    struct exchange_shape shape = problem_shape(&team->problem);
    shape.rank = run->plan->rank;
    if (rails_broken(team->rails, error))
        return error->status;
    const int bad = hop_cuda_learn(&shape, desk->sent, desk->came, &run->plan->routing.hop_counts);
    if (bad < 0)
        return EPD_OK;
    (void)error_set(error, EPD_PROTOCOL, "node %u: its frame is none",
                    rails_node_name(team->rails, (uint32_t)bad));
    rails_abort(team->rails, error);
    return error->status;
}

static enum epd_status exchange(const struct rank_run *run, enum exchange_op op,
                                const struct exchange_args *args, struct epd_error *error)
{
    struct hop_desk_cuda *desk = desk_of(run);
    const struct plan *router = plan_router(run->plan);
    struct swapper swapper = {.run = run, .desk = desk};
    const struct hop_cuda hop = {.frames = desk->frames,
                                 .routing = router->routing.hop_cuda,
                                 .row_bytes = row_bytes_of(&run->plan->team->problem),
                                 .limit = router->crossing_tokens,
                                 .counts = is_eager(router) ? &router->routing.hop_counts : NULL,
                                 .eager = is_eager(run->plan),
                                 .off = desk->off,
                                 .told = desk->n_seen < desk->n_swaps,
                                 .swap = swap,
                                 .swap_arg = &swapper};
    if (hop_cuda_launch(&hop, op, run->stage, args, cuda_rail_queue_stream(run->queue), error))
        return error->status;
    if (!learns(run->plan, op) || run->stage > 0 || copy_heads(run, desk, error) == EPD_OK)
        return EPD_OK;
    rails_abort(run->plan->team->rails, error); /* what is to cross is not known here, but elsewhere */
    return error->status;
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

/* The other nodes' streams wait for these swaps, whatever is in them: the reports say that it is nothing. */
static void turn_off(const struct rank_run *runs, uint32_t n_runs)
{
    for (uint32_t i = 0; i < n_runs; i++)
        desk_of(&runs[i])->off = 1;
}

static int only_followed(const struct rank_run *run)
{
    struct epd_error ignored;
    return rails_broken(run->plan->team->rails, &ignored);
}

/* ---- reports ---- */

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
    if (cuda_rail_write(run->queue, (uint64_t *)(void *)desk->own, head, HEAD_WORDS, error) ||
        (host->status &&
         cuda_rail_write(run->queue, (uint64_t *)(void *)desk->own->text, text, TEXT_WORDS, error)) ||
        (run->plan->records
             ? run->backend->copy(run->queue, desk->own->records, run->plan->records,
                                  sizeof desk->own->records, error)
             : run->backend->zero(run->queue, desk->own->records, sizeof desk->own->records, error)))
        return error->status;
    return cuda_rail_write(run->queue, &desk->own->step_again, &desk->step, 1, error);
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
    if (rails_swap_on(run->plan->team->rails, rail_idx(run), moves, 1, cuda_rail_queue_stream(run->queue),
                      error))
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
    .turn_off = turn_off,
    .learns = learns,
    .learn = learn,
    .only_followed = only_followed,
    .report = report,
};
