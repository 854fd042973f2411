#include "client/bench/plan_scale.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "client/bench/clock.h"

#define RANKS_PER_NODE   8u
#define EXPERTS_PER_RANK 4u
#define MIN_RANKS        16u
#define MAX_RANKS        1024u
#define MAX_NODES        (MAX_RANKS / RANKS_PER_NODE)
#define ELEMENT_BYTES    2u
/* Room over the mean that a rank's slabs are given. */
#define CAPACITY_FACTOR 1.25
/* How much the time of a rank over ranks * log(ranks) may grow from the smallest size to the largest: caches. */
#define MAX_GROWTH 1.5

/* A fabric of n_ranks, its routing, and the plans of all ranks. */
struct world {
    uint32_t n_ranks, n_nodes, n_experts, n_tokens, top_k;
    int32_t *experts;    /* [R, T, K] */
    int32_t *counts;     /* [R, E] rows of a rank for each expert */
    int32_t *first_rows; /* [R, E] where they begin in the slabs of the expert's rank */
    int64_t *m_splits;   /* [E] */
    int64_t *offsets;    /* [E] of the expert's slab */
    int32_t *crossings;  /* [R, nodes] tokens of a rank that go to a node */
    uint8_t *schedule;   /* [nodes, rounds] whom a node sends to */
    int64_t capacity_rows, dropped_rows, needed_rows; /* the last two: of the fullest rank */
};

struct scale {
    double plan_us;             /* of one rank */
    double link_mean, link_max; /* bytes of a dispatch over one node's link, out */
    double rail_imbalance;      /* fullest rail over the mean */
    double row_imbalance;       /* rows of the fullest rank over the mean */
};

static void world_fini(struct world *world)
{
    free(world->experts);
    free(world->counts);
    free(world->first_rows);
    free(world->m_splits);
    free(world->offsets);
    free(world->crossings);
    free(world->schedule);
}

static int world_init(struct world *world, const struct plan_scale_options *options, uint32_t n_ranks)
{
    const size_t n_choices = (size_t)n_ranks * options->n_tokens * options->top_k;
    *world = (struct world){.n_ranks = n_ranks,
                            .n_nodes = n_ranks / RANKS_PER_NODE,
                            .n_experts = n_ranks * EXPERTS_PER_RANK,
                            .n_tokens = options->n_tokens,
                            .top_k = options->top_k};
    const size_t n_pairs = (size_t)n_ranks * world->n_experts;
    world->experts = malloc(n_choices * sizeof(*world->experts));
    world->counts = malloc(n_pairs * sizeof(*world->counts));
    world->first_rows = malloc(n_pairs * sizeof(*world->first_rows));
    world->m_splits = malloc(world->n_experts * sizeof(*world->m_splits));
    world->offsets = malloc(world->n_experts * sizeof(*world->offsets));
    world->crossings = malloc((size_t)n_ranks * world->n_nodes * sizeof(*world->crossings));
    world->schedule = malloc((size_t)world->n_nodes * world->n_nodes);
    world->capacity_rows = (int64_t)(CAPACITY_FACTOR * options->n_tokens * options->top_k) + EXPERTS_PER_RANK;
    return world->experts && world->counts && world->first_rows && world->m_splits && world->offsets &&
           world->crossings && world->schedule;
}

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

static void route(struct world *world, double zipf)
{
    uint64_t seed = 0x9e3779b97f4a7c15u;
    const size_t n_tokens = (size_t)world->n_ranks * world->n_tokens;
    for (size_t t = 0; t < n_tokens; t++) {
        int32_t *experts = world->experts + t * world->top_k;
        for (uint32_t k = 0; k < world->top_k; k++) {
            int again = 1;
            while (again) {
                /* Popular experts lie anywhere, not all on the first ranks. */
                const uint64_t drawn = draw(world->n_experts, zipf, &seed);
                experts[k] = (int32_t)(drawn * 2654435761u % world->n_experts);
                again = 0;
                for (uint32_t i = 0; i < k; i++)
                    again |= experts[i] == experts[k];
            }
        }
    }
}

/* ---- planning ---- */

/* A rank's own part: T K. */
static void plan_rank(struct world *world, uint32_t rank)
{
    int32_t *counts = world->counts + (size_t)rank * world->n_experts;
    int32_t *crossings = world->crossings + (size_t)rank * world->n_nodes;
    const int32_t *experts = world->experts + (size_t)rank * world->n_tokens * world->top_k;
    memset(counts, 0, world->n_experts * sizeof(*counts));
    memset(crossings, 0, world->n_nodes * sizeof(*crossings));
    for (uint32_t t = 0; t < world->n_tokens; t++) {
        uint64_t there[(MAX_NODES + 63) / 64] = {0};
        for (uint32_t k = 0; k < world->top_k; k++) {
            const uint32_t expert = (uint32_t)experts[t * world->top_k + k];
            const uint32_t node = expert / (EXPERTS_PER_RANK * RANKS_PER_NODE);
            counts[expert]++;
            crossings[node] += !(there[node / 64] >> node % 64 & 1);
            there[node / 64] |= 1ull << node % 64;
        }
    }
    crossings[rank / RANKS_PER_NODE] = 0;
}

/* What a rank does as the receiver of its experts' rows: where the rows of every rank begin. R L. */
static void plan_slabs(struct world *world, uint32_t rank)
{
    int64_t next = 0, dropped = 0;
    for (uint32_t l = 0; l < EXPERTS_PER_RANK; l++) {
        const uint32_t expert = rank * EXPERTS_PER_RANK + l;
        int64_t rows = 0;
        for (uint32_t source = 0; source < world->n_ranks; source++) {
            const size_t pair = (size_t)source * world->n_experts + expert;
            world->first_rows[pair] = (int32_t)(next + rows);
            rows += world->counts[pair];
        }
        world->offsets[expert] = next;
        world->m_splits[expert] = rows;
        next += rows;
    }
    dropped = next > world->capacity_rows ? next - world->capacity_rows : 0;
    world->dropped_rows += dropped;
    world->needed_rows = next > world->needed_rows ? next : world->needed_rows;
}

/* Round r: every node sends to the one r + 1 further on. Nobody is sent to twice in a round. */
static void plan_schedule(struct world *world, uint32_t node)
{
    for (uint32_t round = 0; round + 1 < world->n_nodes; round++)
        world->schedule[(size_t)node * world->n_nodes + round] =
            (uint8_t)((node + round + 1) % world->n_nodes);
}

/* ---- checks ---- */

/* Slabs hold the rows of all ranks, in their order, without gap or overlap. */
static int check_slabs(const struct world *world)
{
    for (uint32_t expert = 0; expert < world->n_experts; expert++) {
        int64_t next = world->offsets[expert];
        for (uint32_t rank = 0; rank < world->n_ranks; rank++) {
            const size_t pair = (size_t)rank * world->n_experts + expert;
            if (world->first_rows[pair] != next)
                return 0;
            next += world->counts[pair];
        }
        const int last = (expert + 1) % EXPERTS_PER_RANK == 0;
        if (next != world->offsets[expert] + world->m_splits[expert] ||
            (!last && next != world->offsets[expert + 1]))
            return 0;
    }
    return 1;
}

static int check_rows(const struct world *world)
{
    int64_t rows = 0;
    for (uint32_t expert = 0; expert < world->n_experts; expert++)
        rows += world->m_splits[expert];
    return rows == (int64_t)world->n_ranks * world->n_tokens * world->top_k;
}

/* In every round each node sends once and is sent to once; after all rounds each has sent to each other. */
static int check_schedule(const struct world *world)
{
    uint8_t met[MAX_NODES][MAX_NODES] = {{0}};
    for (uint32_t round = 0; round + 1 < world->n_nodes; round++) {
        uint8_t receives[MAX_NODES] = {0};
        for (uint32_t node = 0; node < world->n_nodes; node++) {
            const uint8_t to = world->schedule[(size_t)node * world->n_nodes + round];
            if (to >= world->n_nodes || to == node || receives[to]++ || met[node][to]++)
                return 0;
        }
    }
    return 1;
}

/* ---- numbers ---- */

static double plan_all(struct world *world)
{
    const double began_ns = clock_ns();
    for (uint32_t rank = 0; rank < world->n_ranks; rank++)
        plan_rank(world, rank);
    for (uint32_t rank = 0; rank < world->n_ranks; rank++)
        plan_slabs(world, rank);
    for (uint32_t node = 0; node < world->n_nodes; node++)
        plan_schedule(world, node);
    return clock_ns() - began_ns;
}

static void measure_links(const struct world *world, uint32_t hidden, struct scale *scale)
{
    double sum = 0, rail_max = 0;
    scale->link_max = 0;
    for (uint32_t node = 0; node < world->n_nodes; node++) {
        double link = 0;
        for (uint32_t i = 0; i < RANKS_PER_NODE; i++) {
            double rail = 0;
            for (uint32_t to = 0; to < world->n_nodes; to++)
                rail += world->crossings[(size_t)(node * RANKS_PER_NODE + i) * world->n_nodes + to];
            rail *= (double)hidden * ELEMENT_BYTES + 8.0 * world->top_k;
            rail_max = rail > rail_max ? rail : rail_max;
            link += rail;
        }
        sum += link;
        scale->link_max = link > scale->link_max ? link : scale->link_max;
    }
    scale->link_mean = sum / world->n_nodes;
    scale->rail_imbalance = rail_max / (sum / world->n_ranks);
}

static int run_one(const struct plan_scale_options *options, uint32_t n_ranks, FILE *out, struct scale *scale)
{
    struct world world;
    int right = 0;
    if (!world_init(&world, options, n_ranks)) {
        fprintf(out, "plan-scale: no memory for %u ranks\n", n_ranks);
        goto fini_world;
    }
    route(&world, options->zipf);
    (void)plan_all(&world); /* pages are touched */
    world.dropped_rows = world.needed_rows = 0;
    scale->plan_us = plan_all(&world) / n_ranks * 1e-3;
    right = check_slabs(&world) && check_rows(&world) && check_schedule(&world);
    if (!right)
        fprintf(out, "plan-scale: the plan of %u ranks is wrong\n", n_ranks);
    measure_links(&world, options->hidden, scale);
    scale->row_imbalance = (double)world.needed_rows / ((double)world.n_tokens * world.top_k);
    fprintf(
        out,
        options->json
            ? "{\"op\": \"plan-scale\", \"ranks\": %u, \"nodes\": %u, \"experts\": %u, \"plan_us_per_rank\": "
              "%.1f, \"link_bytes_mean\": %.0f, \"link_bytes_max\": %.0f, \"rail_imbalance\": %.3f, "
              "\"row_imbalance\": %.3f, \"needed_rows\": %lld, \"capacity_rows\": %lld, \"dropped_rows\": "
              "%lld}\n"
            : "%6u ranks %4u nodes %5u experts  %9.1f us per rank  link %11.0f B mean %11.0f max  rail %.3fx"
              "  rows %.3fx  needs %lld of %lld rows, drops %lld\n",
        n_ranks, world.n_nodes, world.n_experts, scale->plan_us, scale->link_mean, scale->link_max,
        scale->rail_imbalance, scale->row_imbalance, (long long)world.needed_rows,
        (long long)world.capacity_rows, (long long)world.dropped_rows);
fini_world:
    world_fini(&world);
    return right;
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
        fflush(out);
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
