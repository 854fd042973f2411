#include "client/bench/plan_world.h"

#include <stdlib.h>
#include <string.h>

#include "client/bench/clock.h"
#include "ep/hop_frame.h"
#include "ep/rail_order.h"
#include "kernels/host/host.h"

static struct problem problem_on(const struct plan_world *world, uint32_t node)
{
    struct problem problem = world->problem;
    problem.node = node;
    return problem;
}

static size_t n_choices(const struct plan_world *world)
{
    return (size_t)world->problem.max_tokens * world->problem.top_k;
}

/* Of the tokens of a rank: hop->sent of it while its rail is planned. */
static int32_t *sent_to(const struct plan_world *world, uint32_t from_node, uint32_t to_node)
{
    return world->sent + ((size_t)from_node * world->problem.n_nodes + to_node) * world->problem.max_tokens;
}

/* ---- memory ---- */

static int init_hop(struct plan_world *world)
{
    const uint32_t n_nodes = world->problem.n_nodes;
    world->hop.from = calloc(n_nodes, sizeof(*world->hop.from));
    world->hop.sent = calloc(n_nodes, sizeof(*world->hop.sent));
    world->words = malloc(hop_routing_place_words(&world->problem) * sizeof(*world->words));
    if (!world->hop.from || !world->hop.sent || !world->words)
        return 0;
    for (uint32_t node = 0; node < n_nodes; node++) {
        world->hop.from[node].expert = malloc(n_choices(world) * sizeof(int32_t));
        world->hop.from[node].row = malloc(n_choices(world) * sizeof(int32_t));
        if (!world->hop.from[node].expert || !world->hop.from[node].row)
            return 0;
    }
    return 1;
}

double plan_world_bytes(uint32_t n_ranks, uint32_t n_experts, uint32_t n_tokens, uint32_t top_k,
                        double capacity_factor)
{
    const double n_nodes = n_ranks / PLAN_RANKS_PER_NODE, choices = (double)n_tokens * top_k;
    const double routing = 2 * n_ranks * choices, slots = n_ranks * capacity_factor * choices;
    const double rail = n_nodes * n_nodes * n_tokens + 2 * n_nodes * choices;
    return sizeof(int32_t) * (routing + slots + rail + (double)n_ranks * n_experts);
}

enum epd_status plan_world_init(struct plan_world *world, uint32_t n_ranks, uint32_t n_experts,
                                uint32_t n_tokens, uint32_t top_k, uint32_t hidden, double capacity_factor,
                                struct epd_error *error)
{
    const uint32_t n_local = n_experts / n_ranks, n_nodes = n_ranks / PLAN_RANKS_PER_NODE;
    const struct message_group_config config = {
        .n_experts = n_experts,
        .top_k = top_k,
        .hidden = hidden,
        .max_tokens = n_tokens,
        .capacity_rows = (int64_t)(capacity_factor * n_tokens * top_k) + n_local,
        .alignment = 1,
        .dtype = EPD_BF16,
        .overflow = EPD_OVERFLOW_DROP,
    };
    *world = (struct plan_world){0};
    if (problem_init_any(&world->problem, &config, n_ranks, n_nodes, 0, error))
        return error->status;
    const size_t all = n_choices(world) * n_ranks, pairs = (size_t)n_ranks * n_experts;
    world->topk_idx = malloc(all * sizeof(*world->topk_idx));
    world->experts = malloc(all * sizeof(*world->experts));
    world->counts = malloc(pairs * sizeof(*world->counts));
    world->m_splits = malloc(n_experts * sizeof(*world->m_splits));
    world->offsets = malloc((n_experts + n_ranks) * sizeof(*world->offsets));
    world->needed_rows = malloc(n_ranks * sizeof(*world->needed_rows));
    world->dropped_rows = malloc(n_ranks * sizeof(*world->dropped_rows));
    world->n_sent = malloc((size_t)n_ranks * n_nodes * sizeof(*world->n_sent));
    world->schedule = malloc((size_t)n_nodes * n_nodes * sizeof(*world->schedule));
    world->owner = malloc((size_t)n_ranks * (size_t)config.capacity_rows * sizeof(*world->owner));
    world->sent = malloc((size_t)n_nodes * n_nodes * n_tokens * sizeof(*world->sent));
    world->plan_ns = malloc(n_ranks * sizeof(*world->plan_ns));
    if (init_hop(world) && world->topk_idx && world->experts && world->counts && world->m_splits &&
        world->offsets && world->needed_rows && world->dropped_rows && world->n_sent && world->schedule &&
        world->owner && world->sent && world->plan_ns)
        return EPD_OK;
    plan_world_fini(world);
    return error_set(error, EPD_NO_MEMORY, "no memory for %u ranks", n_ranks);
}

void plan_world_fini(struct plan_world *world)
{
    void *const arrays[] = {world->topk_idx, world->experts,     world->counts,       world->m_splits,
                            world->offsets,  world->needed_rows, world->dropped_rows, world->n_sent,
                            world->schedule, world->owner,       world->sent,         world->words,
                            world->plan_ns,  world->hop.sent};
    for (size_t i = 0; i < sizeof(arrays) / sizeof(*arrays); i++)
        free(arrays[i]);
    for (uint32_t node = 0; world->hop.from && node < world->problem.n_nodes; node++) {
        free(world->hop.from[node].expert);
        free(world->hop.from[node].row);
    }
    free(world->hop.from);
    *world = (struct plan_world){0};
}

/* ---- planning ---- */

static struct route_args route_of(const struct plan_world *world, uint32_t rank, struct kernel_error *record)
{
    const struct problem *problem = &world->problem;
    const size_t first = rank * n_choices(world);
    struct route_args route = {
        .shape = problem_shape(problem),
        .topk_idx = {.data = world->topk_idx + first,
                     .dtype = EPD_I32,
                     .n_dims = 2,
                     .shape = {problem->max_tokens, problem->top_k}},
        .routing = {.expert = world->experts + first,
                    .m_splits = world->m_splits + (size_t)rank * problem->n_local_experts,
                    .offsets = world->offsets + (size_t)rank * (problem->n_local_experts + 1),
                    .needed_rows = &world->needed_rows[rank],
                    .dropped_rows = &world->dropped_rows[rank]},
        .error = record,
    };
    route.shape.rank = rank;
    route.shape.n_tokens = problem->max_tokens;
    return route;
}

/* What a rank does with its own tokens: checks and counts them, chooses which go to which node, and in what order. */
static enum epd_status plan_sender(struct plan_world *world, uint32_t rank, struct epd_error *error)
{
    const uint32_t node = rank / PLAN_RANKS_PER_NODE, n_nodes = world->problem.n_nodes;
    const struct problem problem = problem_on(world, node);
    struct kernel_error record = {0};
    const struct route_args route = route_of(world, rank, &record);
    for (uint32_t to = 0; to < n_nodes; to++)
        world->hop.sent[to] = sent_to(world, node, to);
    world->hop.n_sent = world->n_sent + (size_t)rank * n_nodes;
    const double began_ns = clock_ns();
    host_route_check(&route, world->counts + (size_t)rank * problem.n_experts);
    hop_routing_choose(&world->hop, &problem, route.routing.expert, problem.max_tokens);
    for (uint32_t round = 0; round + 1 < n_nodes; round++)
        world->schedule[(size_t)node * (n_nodes - 1) + round] = rail_peer(n_nodes, node, round);
    world->plan_ns[rank] = clock_ns() - began_ns;
    if (record.status)
        return error_set(error, (enum epd_status)record.status, "rank %u token %d: expert %lld", rank,
                         record.token, (long long)record.got);
    return EPD_OK;
}

/* What its rail brings: experts of the tokens that come from every node, its own among them. Not planning. */
static void arrive(struct plan_world *world, uint32_t rank)
{
    const struct problem *problem = &world->problem;
    const uint32_t node = rank / PLAN_RANKS_PER_NODE, rail = rank % PLAN_RANKS_PER_NODE;
    const size_t row_bytes = problem->top_k * sizeof(int32_t);
    for (uint32_t other = 0; other < problem->n_nodes; other++) {
        const uint32_t source = other * PLAN_RANKS_PER_NODE + rail;
        struct hop_arrivals *from = &world->hop.from[other];
        const int32_t *experts = world->experts + source * n_choices(world);
        from->n_tokens =
            other == node ? problem->max_tokens : world->n_sent[(size_t)source * problem->n_nodes + node];
        for (uint32_t i = 0; i < from->n_tokens; i++) {
            const size_t token = other == node ? i : (size_t)sent_to(world, other, node)[i];
            memcpy(from->expert + (size_t)i * problem->top_k, experts + token * problem->top_k, row_bytes);
        }
    }
}

/* What a rank does as the receiver of its experts' rows, and of its rail's tokens: where they go on its node. */
static void plan_receiver(struct plan_world *world, uint32_t rank)
{
    const struct problem problem = problem_on(world, rank / PLAN_RANKS_PER_NODE);
    struct kernel_error record = {0}; /* over the capacity: counted in dropped_rows */
    const struct route_args route = route_of(world, rank, &record);
    const double began_ns = clock_ns();
    host_route_slabs(&route, hop_routing_place(&world->hop, &problem, rank, world->counts, world->words));
    world->plan_ns[rank] += clock_ns() - began_ns;
}

/* Where rows were put, by slot, for the check. */
static void note_owners(struct plan_world *world, uint32_t rank)
{
    const struct problem *problem = &world->problem;
    const uint32_t node = rank / PLAN_RANKS_PER_NODE, rail = rank % PLAN_RANKS_PER_NODE;
    for (uint32_t other = 0; other < problem->n_nodes; other++) {
        const struct hop_arrivals *from = &world->hop.from[other];
        const size_t first = (other * PLAN_RANKS_PER_NODE + rail) * n_choices(world);
        for (size_t i = 0; i < (size_t)from->n_tokens * problem->top_k; i++) {
            const size_t in_list = i / problem->top_k, k = i % problem->top_k;
            const size_t token = other == node ? in_list : (size_t)sent_to(world, other, node)[in_list];
            if (from->row[i] < 0)
                continue;
            const size_t to = (size_t)from->expert[i] / problem->n_local_experts;
            int32_t *owner = &world->owner[to * (size_t)problem->capacity_rows + (size_t)from->row[i]];
            *owner = *owner == -1 ? (int32_t)(first + token * problem->top_k + k) : -2; /* -2: two rows */
        }
    }
}

enum epd_status plan_world_plan(struct plan_world *world, struct epd_error *error)
{
    const uint32_t n_ranks = world->problem.world_size;
    memset(world->owner, -1, (size_t)n_ranks * (size_t)world->problem.capacity_rows * sizeof(*world->owner));
    for (uint32_t rank = 0; rank < n_ranks; rank++)
        if (plan_sender(world, rank, error)) /* all counts must be there before rows are placed */
            return error->status;
    for (uint32_t rail = 0; rail < PLAN_RANKS_PER_NODE; rail++) {
        for (uint32_t rank = rail; rank < n_ranks; rank += PLAN_RANKS_PER_NODE) {
            const double planned_ns = world->plan_ns[rank];
            if (plan_sender(world, rank, error)) /* again: the lists of one rail are kept at a time */
                return error->status;
            world->plan_ns[rank] = planned_ns;
        }
        for (uint32_t rank = rail; rank < n_ranks; rank += PLAN_RANKS_PER_NODE) {
            arrive(world, rank);
            plan_receiver(world, rank);
            note_owners(world, rank);
        }
    }
    return EPD_OK;
}

/* ---- checks ---- */

static enum epd_status check_slab(const struct plan_world *world, uint32_t rank, uint32_t local,
                                  struct epd_error *error)
{
    const struct problem *problem = &world->problem;
    const int32_t expert = (int32_t)(rank * problem->n_local_experts + local);
    const int64_t first = world->offsets[(size_t)rank * (problem->n_local_experts + 1) + local];
    const int64_t n = world->m_splits[expert];
    const int32_t *owner = world->owner + (size_t)rank * (size_t)problem->capacity_rows + first;
    int64_t all = 0;
    for (uint32_t source = 0; source < problem->world_size; source++)
        all += world->counts[(size_t)source * problem->n_experts + (size_t)expert];
    if (first < 0 || n < 0 || first + n > problem->capacity_rows ||
        (n != all && first + n != problem->capacity_rows))
        return error_set(error, EPD_INTERNAL, "expert %d: %lld rows from %lld, %lld were routed to it",
                         expert, (long long)n, (long long)first, (long long)all);
    for (int64_t row = 0; row < n; row++)
        if (owner[row] < 0 || world->experts[owner[row]] != expert || (row && owner[row] <= owner[row - 1]))
            return error_set(error, EPD_INTERNAL, "expert %d: row %lld is of choice %d", expert,
                             (long long)row, owner[row]);
    return EPD_OK;
}

static enum epd_status check_rank(const struct plan_world *world, uint32_t rank, struct epd_error *error)
{
    const struct problem *problem = &world->problem;
    const int32_t *owner = world->owner + (size_t)rank * (size_t)problem->capacity_rows;
    int64_t rows = 0, owned = 0;
    for (uint32_t local = 0; local < problem->n_local_experts; local++) {
        if (check_slab(world, rank, local, error))
            return error->status;
        rows += world->m_splits[(size_t)rank * problem->n_local_experts + local];
    }
    for (int64_t row = 0; row < problem->capacity_rows; row++)
        owned += owner[row] != -1;
    if (owned != rows || rows + world->dropped_rows[rank] != world->needed_rows[rank])
        return error_set(error, EPD_INTERNAL, "rank %u: %lld rows in %lld slots, %lld dropped of %lld", rank,
                         (long long)rows, (long long)owned, (long long)world->dropped_rows[rank],
                         (long long)world->needed_rows[rank]);
    return EPD_OK;
}

/* met: bytes [nodes, nodes], zeroed. */
static int schedule_is_whole(const struct plan_world *world, uint8_t *met)
{
    const uint32_t n_nodes = world->problem.n_nodes;
    for (uint32_t round = 0; round + 1 < n_nodes; round++) {
        uint8_t *turned_to = met + (size_t)n_nodes * n_nodes;
        memset(turned_to, 0, n_nodes);
        for (uint32_t node = 0; node < n_nodes; node++) {
            const uint32_t to = world->schedule[(size_t)node * (n_nodes - 1) + round];
            if (to >= n_nodes || to == node || turned_to[to]++ || met[(size_t)node * n_nodes + to]++)
                return 0;
        }
    }
    return 1;
}

enum epd_status plan_world_check(const struct plan_world *world, struct epd_error *error)
{
    const size_t n_nodes = world->problem.n_nodes;
    int64_t needed = 0;
    for (uint32_t rank = 0; rank < world->problem.world_size; rank++) {
        if (check_rank(world, rank, error))
            return error->status;
        needed += world->needed_rows[rank];
    }
    if (needed != (int64_t)(n_choices(world) * world->problem.world_size))
        return error_set(error, EPD_INTERNAL, "%lld rows are needed, %zu were routed", (long long)needed,
                         n_choices(world) * world->problem.world_size);
    uint8_t *met = calloc(n_nodes * n_nodes + n_nodes, 1);
    if (!met)
        return error_set(error, EPD_NO_MEMORY, "no memory for %zu nodes", n_nodes);
    const int whole = schedule_is_whole(world, met);
    free(met);
    return whole ? EPD_OK : error_set(error, EPD_INTERNAL, "the schedule has nodes that meet twice or never");
}

uint64_t plan_world_sent_bytes(const struct plan_world *world, uint32_t rank)
{
    const struct problem *problem = &world->problem;
    const uint32_t node = rank / PLAN_RANKS_PER_NODE, rail = rank % PLAN_RANKS_PER_NODE;
    uint64_t bytes = 0;
    for (uint32_t other = 0; other < problem->n_nodes; other++) {
        struct hop_frame there, back;
        if (other == node)
            continue;
        const uint32_t source = other * PLAN_RANKS_PER_NODE + rail;
        hop_frame_lay(&there, problem, HOP_COUNTS | HOP_EXPERTS | HOP_WEIGHTS | HOP_ROWS,
                      (struct hop_tokens){.n = world->n_sent[(size_t)rank * problem->n_nodes + other]}, NULL);
        hop_frame_lay(&back, problem, HOP_SUMS,
                      (struct hop_tokens){.n = world->n_sent[(size_t)source * problem->n_nodes + node]},
                      NULL);
        bytes += there.bytes + back.bytes;
    }
    return bytes;
}
