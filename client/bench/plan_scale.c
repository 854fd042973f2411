#include "client/bench/plan_scale.h"

#include <math.h>

/* First: epd.h leaves the words out that are there. */
#include "client/bench/plan_world.h"

#include "client/bench/fill.h"
#include "client/bench/machine.h"

#define EXPERTS_PER_RANK 4u
#define MIN_RANKS        16u
#define MAX_RANKS        1024u
/* Room over the mean that a rank's slabs are given. */
#define CAPACITY_FACTOR 1.25
/* Times that a size is planned. */
#define N_PLANS 4
/* What the clock can tell. */
#define CLOCK_US 1e-3
/* How much the time of a rank over ranks * log(ranks) may grow from the smallest size to the largest: caches. */
#define MAX_GROWTH 1.5
_Static_assert(JOB_MAX_TOP_K <= MIN_RANKS * EXPERTS_PER_RANK, "every token finds as many experts");

struct scale {
    double plan_us;                    /* of one rank */
    double link_mean, link_max;        /* bytes of a dispatch and its combine over one node's link, out */
    double rail_imbalance;             /* fullest rail over the mean */
    double row_imbalance;              /* rows of the fullest rank over the mean */
    int64_t needed_rows, dropped_rows; /* of the fullest rank; of all */
};

/* ---- routing ---- */

/* What every rank of the benchmark's own jobs draws. */
static enum epd_status draw_all(struct plan_world *world, double zipf)
{
    const struct problem *problem = &world->problem;
    const struct job job = {.n_tokens = problem->max_tokens,
                            .n_experts = problem->n_experts,
                            .top_k = problem->top_k,
                            .zipf = zipf};
    enum epd_status status = EPD_OK;
    for (uint32_t rank = 0; status == EPD_OK && rank < problem->world_size; rank++)
        status = fill_routing(&job, rank, world->topk_idx + (size_t)rank * job.n_tokens * job.top_k, NULL);
    return status;
}

/* ---- numbers ---- */

static double mean_us(const struct plan_world *world)
{
    const uint32_t n_ranks = world->problem.world_size;
    double ns = 0;
    for (uint32_t rank = 0; rank < n_ranks; rank++)
        ns += world->plan_ns[rank];
    return ns / n_ranks * 1e-3;
}

static void measure(const struct plan_world *world, double plan_us, struct scale *scale)
{
    const struct problem *problem = &world->problem;
    double sum = 0, rail_max = 0;
    *scale = (struct scale){.plan_us = plan_us};
    for (uint32_t node = 0; node < problem->n_nodes; node++) {
        double link = 0;
        for (uint32_t i = 0; i < PLAN_RANKS_PER_NODE; i++) {
            const uint32_t rank = node * PLAN_RANKS_PER_NODE + i;
            const double rail = (double)plan_world_sent_bytes(world, rank);
            rail_max = rail > rail_max ? rail : rail_max;
            link += rail;
            scale->dropped_rows += world->dropped_rows[rank];
            if (world->needed_rows[rank] > scale->needed_rows)
                scale->needed_rows = world->needed_rows[rank];
        }
        sum += link;
        scale->link_max = link > scale->link_max ? link : scale->link_max;
    }
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

/* The first planning touches the pages; of the others the fastest counts, which a busy machine disturbed least. */
static enum epd_status plan_one(const struct plan_scale_options *options, struct plan_world *world,
                                double *plan_us, struct epd_error *error)
{
    enum epd_status status = draw_all(world, options->zipf);
    if (status != EPD_OK)
        return error_set(error, status, "no memory for the routing");
    for (uint32_t i = 0; status == EPD_OK && i < N_PLANS; i++) {
        status = plan_world_plan(world, error);
        *plan_us = i <= 1 ? mean_us(world) : fmin(*plan_us, mean_us(world));
    }
    return status == EPD_OK ? plan_world_check(world, error) : status;
}

static enum epd_status run_one(const struct plan_scale_options *options, uint32_t n_ranks, FILE *out,
                               struct scale *scale)
{
    struct plan_world world;
    struct epd_error error = {0};
    enum epd_status status = plan_world_init(&world, n_ranks, n_ranks * EXPERTS_PER_RANK, options->n_tokens,
                                             options->top_k, options->hidden, CAPACITY_FACTOR, &error);
    if (status == EPD_OK) {
        double plan_us = 0;
        status = plan_one(options, &world, &plan_us, &error);
        if (status == EPD_OK) {
            measure(&world, plan_us, scale);
            print(&world.problem, scale, options->json, out);
        }
        plan_world_fini(&world);
    }
    if (status != EPD_OK)
        fprintf(stderr, "epd-bench: plan-scale: %u ranks: %s\n", n_ranks, error.text);
    return status;
}

/* Of the largest size, which takes most. */
static enum epd_status check_memory(const struct plan_scale_options *options)
{
    const double available = machine_available_bytes();
    const double wanted = plan_world_bytes(MAX_RANKS, MAX_RANKS * EXPERTS_PER_RANK, options->n_tokens,
                                           options->top_k, CAPACITY_FACTOR);
    if (available == 0 || wanted <= MACHINE_MEMORY_SHARE * available)
        return EPD_OK;
    fprintf(stderr,
            "epd-bench: plan-scale of %u ranks needs about %.1f GiB, %.1f GiB are available: choose smaller "
            "--tokens or --topk\n",
            MAX_RANKS, wanted / (1 << 30), available / (1 << 30));
    return EPD_NO_MEMORY;
}

/* ---- growth ---- */

struct plan_scale_growth plan_scale_growth(double first_us, double last_us)
{
    const double sizes = MAX_RANKS * log2(MAX_RANKS) / (MIN_RANKS * log2(MIN_RANKS));
    const struct plan_scale_growth growth = {
        .time = last_us / fmax(first_us, CLOCK_US), .sizes = sizes, .allowed = sizes * MAX_GROWTH};
    return growth;
}

int plan_scale_too_fast(const struct plan_scale_growth *growth)
{
    return growth->time > growth->allowed;
}

static void print_growth(const struct plan_scale_growth *growth, int json, FILE *out)
{
    if (json)
        fprintf(
            out,
            "{\"op\": \"plan-scale-growth\", \"from_ranks\": %u, \"to_ranks\": %u, \"time_growth\": %.2f, "
            "\"ranks_log_ranks_growth\": %.2f, \"allowed\": %.2f, \"too_fast\": %s}\n",
            MIN_RANKS, MAX_RANKS, growth->time, growth->sizes, growth->allowed,
            plan_scale_too_fast(growth) ? "true" : "false");
    else
        fprintf(out,
                "planning a rank takes %.1f times as long with %u ranks as with %u; ranks x log(ranks) grows "
                "%.0f times\n",
                growth->time, MAX_RANKS, MIN_RANKS, growth->sizes);
    fflush(out);
    if (plan_scale_too_fast(growth))
        fprintf(stderr, "epd-bench: plan-scale: planning grows too fast: %.1f times, allowed %.0f\n",
                growth->time, growth->allowed);
}

int plan_scale_run(const struct plan_scale_options *given, FILE *out)
{
    struct plan_scale_options options = *given;
    struct scale first = {0}, last = {0};
    options.n_tokens = options.n_tokens ? options.n_tokens : 1024;
    options.top_k = options.top_k ? options.top_k : 8;
    options.hidden = options.hidden ? options.hidden : 7168;
    if (check_memory(&options))
        return 1;
    for (uint32_t n_ranks = MIN_RANKS; n_ranks <= MAX_RANKS; n_ranks *= 2) {
        if (run_one(&options, n_ranks, out, &last))
            return 1;
        if (n_ranks == MIN_RANKS)
            first = last;
    }
    const struct plan_scale_growth growth = plan_scale_growth(first.plan_us, last.plan_us);
    print_growth(&growth, options.json, out);
    return plan_scale_too_fast(&growth);
}
