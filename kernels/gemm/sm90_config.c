#include "kernels/gemm/sm90_config.h"

#include "kernels/gemm/sm90_args.h"

/* Cycles of one pipeline stage and tile on an H100 or H200, from the chip's rates and checked against measurements:
 * 64 x 64 x inner products of two warpgroups at 4096 flop per cycle are 4 cycles per inner column; the L2 feeds a block
 * about 36 bytes per cycle when all of them ask; what a tile costs besides (first copies, epilogue that is not hidden)
 * is about 1200 cycles. */
#define CYCLES_PER_COLUMN  4.0
#define L2_BYTES_PER_CYCLE 36.0
#define CYCLES_PER_TILE    1200.0
#define SMEM_BYTES         232448u /* a block's most on sm_90 */
#define SM90_BOX_ROWS_MOST 64u
#define BACKWARD_BYTES     (3u * 64u * SM90_OUTER_ROWS * 2u)

static uint32_t div_up(uint32_t a, uint32_t b)
{
    return (a + b - 1) / b;
}

static uint32_t round_up(uint32_t a, uint32_t b)
{
    return div_up(a, b) * b;
}

/* Cycles of a whole problem whose groups all have `rows` rows, cut at `limit` tokens (TN, NN). */
static double tokens_cost(const struct gemm_problem *problem, uint32_t rows, uint32_t limit,
                          uint32_t n_clusters)
{
    uint32_t outer = problem->shape.layout == EPD_GEMM_TN ? problem->shape.n : problem->shape.k;
    uint32_t reduction = problem->shape.layout == EPD_GEMM_TN ? problem->shape.k : problem->shape.n;
    uint32_t height = round_up(div_up(rows, div_up(rows, limit)), 8);
    double tiles = (double)div_up(rows, height) * div_up(outer, 2 * SM90_OUTER_ROWS) * problem->n_groups;
    double products = CYCLES_PER_COLUMN * height;
    double copies = (SM90_OUTER_ROWS * SM90_STEP * 2 + height * SM90_STEP) / L2_BYTES_PER_CYCLE;
    double tile = div_up(reduction, SM90_STEP) * (products > copies ? products : copies) + CYCLES_PER_TILE;
    double waves = tiles / n_clusters;
    /* Few waves end together, many overlap their ends. */
    double whole = (double)(uint64_t)(waves + 0.999);
    return tile * (whole < 8 ? whole : waves + 0.5);
}

static uint32_t choose_tokens(const struct gemm_problem *problem, uint32_t n_clusters)
{
    int64_t expected = problem->expected_rows ? problem->expected_rows : problem->max_rows;
    int64_t average = expected / problem->n_groups;
    uint32_t rows = average < 8 ? 8 : average > 65536 ? 65536 : (uint32_t)average;
    /* Few rows: reading weights is all there is to do, and smaller tiles leave room for more stages in flight. */
    if (rows <= 64)
        return rows <= 32 ? 64 : 128;
    uint32_t best = SM90_INNER_MAX;
    double best_cost = tokens_cost(problem, rows, best, n_clusters);
    for (uint32_t limit = SM90_INNER_MAX - 8; limit >= 64; limit -= 8) {
        double cost = tokens_cost(problem, rows, limit, n_clusters);
        if (cost < 0.98 * best_cost) {
            best = limit;
            best_cost = cost;
        }
    }
    return best;
}

struct sm90_config sm90_config_choose(const struct gemm_problem *problem, uint32_t n_clusters)
{
    struct sm90_config config = {0};
    if (problem->shape.layout == EPD_GEMM_NT) {
        uint32_t columns = round_up(problem->shape.k, 64);
        config.tile_inner = columns < SM90_INNER_MAX ? columns : SM90_INNER_MAX;
        config.box_rows = SM90_STEP;
    } else {
        int64_t expected = problem->expected_rows ? problem->expected_rows : problem->max_rows;
        config.tile_inner = choose_tokens(problem, n_clusters);
        config.box_rows = SM90_BOX_ROWS_MOST;
        while (config.box_rows > 8 && config.box_rows >= expected / problem->n_groups)
            config.box_rows /= 2;
    }
    config.stage_bytes = SM90_STEP * 2 * (SM90_OUTER_ROWS + round_up(config.tile_inner, config.box_rows));
    /* The activation's backward works in stages: 64 tokens of gates, ups and results of 128 columns. */
    if (problem->activation && problem->shape.layout == EPD_GEMM_NN && config.stage_bytes < BACKWARD_BYTES)
        config.stage_bytes = BACKWARD_BYTES;
    config.n_stages = SM90_MAX_STAGES;
    while (sm90_smem_bytes(config.n_stages, config.stage_bytes) > SMEM_BYTES)
        config.n_stages--;
    return config;
}
