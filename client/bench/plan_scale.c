#include "client/bench/plan_scale.h"

#include <math.h>

#include "client/bench/plan_world.h"

#define EXPERTS_PER_RANK 4u
#define MIN_RANKS        16u
#define MAX_RANKS        1024u
/* Room over the mean that a rank's slabs are given. */
#define CAPACITY_FACTOR 1.25
/* How much the time of a rank over ranks * log(ranks) may grow from the smallest size to the largest: caches. */
#define MAX_GROWTH 1.5

struct scale {
    double plan_us;                    /* of one rank */
    double link_mean, link_max;        /* bytes of a dispatch and its combine over one node's link, out */
    double rail_imbalance;             /* fullest rail over the mean */
    double row_imbalance;              /* rows of the fullest rank over the mean */
    int64_t needed_rows, dropped_rows; /* of the fullest rank; of all */
};

/* ---- routing ---- */

static uint64_t next_random(uint64_t *seed)
{
    *seed ^= *seed << 13;
    *seed ^= *seed >> 7;
    *seed ^= *seed << 17;
    return *seed;
}

/* Expert e with a probability in proportion to (e + 1)^-zipf, by the inverse of the integral. */
static uint32_t draw(uint32_t n_experts, double zipf, uint64_t *seed)
{
    const double u = (double)(next_random(seed) >> 11) * 0x1p-53;
    double at;
    if (zipf <= 0)
        at = u * n_experts;
    else if (fabs(zipf - 1) < 1e-6)
        at = exp(u * log(n_experts + 1.0)) - 1;
    else
        at = pow(u * (pow(n_experts + 1.0, 1 - zipf) - 1) + 1, 1 / (1 - zipf)) - 1;
    return at < n_experts ? (uint32_t)at : n_experts - 1;
}

static void draw_all(struct plan_world *world, double zipf)
{
    const struct problem *problem = &world->problem;
    uint64_t seed = 0x9e3779b97f4a7c15u;
    const size_t n_tokens = (size_t)problem->world_size * problem->max_tokens;
    for (size_t t = 0; t < n_tokens; t++) {
        int32_t *experts = world->topk_idx + t * problem->top_k;
        for (uint32_t k = 0; k < problem->top_k; k++) {
            int again = 1;
            while (again) {
                /* Popular experts lie anywhere, not all on the first ranks. */
                const uint64_t drawn = draw(problem->n_experts, zipf, &seed);
                experts[k] = (int32_t)(drawn * 2654435761u % problem->n_experts);
                again = 0;
                for (uint32_t i = 0; i < k; i++)
                    again |= experts[i] == experts[k];
            }
        }
    }
}

/* ---- numbers ---- */

static void measure(const struct plan_world *world, struct scale *scale)
{
    const struct problem *problem = &world->problem;
    double sum = 0, rail_max = 0, plan_ns = 0;
    *scale = (struct scale){0};
    for (uint32_t node = 0; node < problem->n_nodes; node++) {
        double link = 0;
        for (uint32_t i = 0; i < PLAN_RANKS_PER_NODE; i++) {
            const uint32_t rank = node * PLAN_RANKS_PER_NODE + i;
            const double rail = (double)plan_world_sent_bytes(world, rank);
            rail_max = rail > rail_max ? rail : rail_max;
            link += rail;
            plan_ns += world->plan_ns[rank];
            scale->dropped_rows += world->dropped_rows[rank];
            if (world->needed_rows[rank] > scale->needed_rows)
                scale->needed_rows = world->needed_rows[rank];
        }
        sum += link;
        scale->link_max = link > scale->link_max ? link : scale->link_max;
    }
    scale->plan_us = plan_ns / problem->world_size * 1e-3;
    scale->link_mean = sum / problem->n_nodes;
    scale->rail_imbalance = rail_max / (sum / problem->world_size);
    scale->row_imbalance = (double)scale->needed_rows / ((double)problem->max_tokens * problem->top_k);
}

static void print(const struct problem *problem, const struct scale *scale, int json, FILE *out)
{
    fprintf(
        out,
        json
            ? "{\"op\": \"plan-scale\", \"ranks\": %u, \"nodes\": %u, \"experts\": %u, \"plan_us_per_rank\": "
              "%.1f, \"link_bytes_mean\": %.0f, \"link_bytes_max\": %.0f, \"rail_imbalance\": %.3f, "
              "\"row_imbalance\": %.3f, \"needed_rows\": %lld, \"capacity_rows\": %lld, \"dropped_rows\": "
              "%lld}\n"
            : "%6u ranks %4u nodes %5u experts  %9.1f us per rank  link %11.0f B mean %11.0f max  rail %.3fx"
              "  rows %.3fx  needs %lld of %lld rows, drops %lld\n",
        problem->world_size, problem->n_nodes, problem->n_experts, scale->plan_us, scale->link_mean,
        scale->link_max, scale->rail_imbalance, scale->row_imbalance, (long long)scale->needed_rows,
        (long long)problem->capacity_rows, (long long)scale->dropped_rows);
    fflush(out);
}

static int run_one(const struct plan_scale_options *options, uint32_t n_ranks, FILE *out, struct scale *scale)
{
    struct plan_world world;
    struct epd_error error = {0};
    if (plan_world_init(&world, n_ranks, n_ranks * EXPERTS_PER_RANK, options->n_tokens, options->top_k,
                        options->hidden, CAPACITY_FACTOR, &error)) {
        fprintf(out, "plan-scale: %u ranks: %s\n", n_ranks, error.text);
        return 0;
    }
    draw_all(&world, options->zipf);
    enum epd_status status = plan_world_plan(&world, &error); /* pages are touched */
    if (status == EPD_OK)
        status = plan_world_plan(&world, &error);
    if (status == EPD_OK)
        status = plan_world_check(&world, &error);
    if (status == EPD_OK) {
        measure(&world, scale);
        print(&world.problem, scale, options->json, out);
    } else {
        fprintf(out, "plan-scale: the plan of %u ranks is wrong: %s\n", n_ranks, error.text);
    }
    plan_world_fini(&world);
    return status == EPD_OK;
}

int plan_scale_run(const struct plan_scale_options *given, FILE *out)
{
    struct plan_scale_options options = *given;
    struct scale first = {0}, last = {0};
    options.n_tokens = options.n_tokens ? options.n_tokens : 1024;
    options.top_k = options.top_k ? options.top_k : 8;
    options.hidden = options.hidden ? options.hidden : 7168;
    if (options.top_k > MIN_RANKS * EXPERTS_PER_RANK) {
        fprintf(out, "plan-scale: top-k %u, want at most %u\n", options.top_k, MIN_RANKS * EXPERTS_PER_RANK);
        return 1;
    }
    for (uint32_t n_ranks = MIN_RANKS; n_ranks <= MAX_RANKS; n_ranks *= 2) {
        if (!run_one(&options, n_ranks, out, &last))
            return 1;
        if (n_ranks == MIN_RANKS)
            first = last;
    }
    const double allowed = MAX_RANKS * log2(MAX_RANKS) / (MIN_RANKS * log2(MIN_RANKS));
    const double grown = last.plan_us / first.plan_us;
    if (!options.json)
        fprintf(out,
                "planning a rank takes %.1f times as long with %u ranks as with %u; ranks x log(ranks) grows "
                "%.0f times\n",
                grown, MAX_RANKS, MIN_RANKS, allowed);
    return grown > allowed * MAX_GROWTH;
}
